r"""p(φ | D) with every θ_j integrated out, as a density over few numbers without bounds.

With b = (μ, Γ, β) and a normal belief s(b) that equals p(b), or stands near it,

.. math::

    \log p(D, x, b) = \underbrace{\log p(\psi(x)) + \log\left|\tfrac{d\psi}{dx}\right|
        + \log \int p(D \mid \psi, b)\, s(b)\, db}_{\text{density of } x}
        + \log q(b \mid D, \psi) + \log \frac{p(b)}{s(b)}

where q(b | D, ψ) is the exact conditional under s. A point (x, e) stands for
b = E_q[b] + C⁻ᵀ e with e standard normal; the last term, the correction, is zero where the belief
is normal, as it is by default.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.evidence.integrated import (
    IntegratedProblem,
    NormalBelief,
    amplification,
    integrate,
    integrated_problem,
    least_squares,
)
from hierbayes.meta.scales_of_phi import Beliefs, Coordinates, Units, fixed_by_name
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import one_behind, solve_upper, to_numpy
from hierbayes.priors.hyperprior import Shape
from hierbayes.priors.normality import as_normal, improper
from hierbayes.sharding import num_shares
from hierbayes.statistics import placed_statistics
from hierbayes.tasks import Tasks

MOST_AT_ONCE = 2048
"""Points of one compiled call: one shape, so one compilation."""

CHUNK, WHOLE_UP_TO = 256, 1024
"""Tasks that are summed over together, and the number up to which all of them are."""

NUMBERS_AT_ONCE = 100_000
"""Points × tasks of one compiled call: more than this leaves the processor's cache."""

LARGEST_AMPLIFICATION = 1e9
"""Of rounding errors, where inverses are quicker: log densities then err by 1e-7."""


class Point(NamedTuple):
    """φ at one point: its parts by name, and the log density of the point."""

    phi: dict[str, Any]
    log_density: Any


@dataclass(frozen=True)
class Structure:
    """All that decides a compiled program, and nothing that does not."""

    coordinates: Coordinates
    shape: Shape
    exact: bool

    def __hash__(self) -> int:
        return hash((self.coordinates, self._names_do_not_matter()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and (
            (self.coordinates, self.exact, self._names_do_not_matter())
            == (other.coordinates, other.exact, other._names_do_not_matter())
        )

    def _names_do_not_matter(self) -> Any:
        s = self.shape
        return s.free_mean, len(s.shared), len(s.task_predictors)

    @property
    def num_fixed(self) -> int:
        """P, the number of fixed effects b."""
        free, p, q = self._names_do_not_matter()
        return sum(free) + len(free) * q + p

    def fixed(self, b: jax.Array) -> dict[str, jax.Array]:
        """b by name; pinned means are zero."""
        free, p, q = self._names_do_not_matter()
        return fixed_by_name(free, p, q, b)

    def flat(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """b from arrays by name."""
        parts = [np.asarray(values["mu"])[np.array(self.shape.free_mean)]]
        parts += [np.ravel(values[name]) for name in ("gamma", "beta") if name in values]
        return np.concatenate(parts)


def point(
    structure: Structure, problem: IntegratedProblem, beliefs: Beliefs, units: Units, x: Any,
    e: Any, *, fast: bool = False,
) -> Point:  # fmt: skip
    """φ and the log density at (x, e)."""
    scales = structure.coordinates.scales(x, units, beliefs)
    found = integrate(problem, scales.root, scales.sigma, fast=fast)
    total = scales.log_density + found.log_evidence
    b = found.mean
    if structure.num_fixed:
        b = b + solve_upper(found.factor[:, :, None], e[:, None])[:, 0]
    named = structure.fixed(b)
    if not structure.exact:
        total = total + _correction(structure, problem, beliefs, named, b)
    total = jnp.where(jnp.isnan(total), -jnp.inf, total)
    return Point(named | scales.phi, total)


def _correction(
    structure: Structure, problem: IntegratedProblem, beliefs: Beliefs, named: Any, b: Any
) -> jax.Array:
    """log p(b) − log s(b)."""
    location, precision = problem.belief
    flat = precision == 0
    log_scale = jnp.log(jnp.where(flat, 1.0, precision / (2 * jnp.pi)))
    stand_in = 0.5 * (log_scale - precision * (b - location) ** 2).sum()
    total = -stand_in
    for name in named:
        if name in beliefs:
            support: Any = beliefs[name].support
            log_prob = jnp.sum(jnp.asarray(beliefs[name].log_prob(named[name])))
            total = total + jnp.where(jnp.all(support(named[name])), log_prob, -jnp.inf)
    return total


class Target(NamedTuple):
    """What a compiled program is given: numbers only.

    Beliefs come as their leaves, since NumPyro takes long to take its distributions apart.
    """

    problem: IntegratedProblem
    beliefs: list[Any]
    units: Units


Compiled = tuple[Structure, Any]
"""What a compiled program is made for: the structure, and how beliefs are put together."""


def _point(made_for: Compiled, target: Target, x: Any, e: Any, *, fast: bool = False) -> Point:
    structure, how = made_for
    beliefs = jax.tree.unflatten(how, target.beliefs)
    return point(structure, target.problem, beliefs, target.units, x, e, fast=fast)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _points(made_for: Compiled, target: Target, xs: Any, es: Any, fast: bool) -> Point:
    # no loop over parts: inside one XLA works on one core alone
    return jax.vmap(lambda x, e: _point(made_for, target, x, e, fast=fast))(xs, es)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_slope(made_for: Compiled, target: Target, x: Any, e: Any) -> Any:
    return jax.value_and_grad(lambda v: _point(made_for, target, v, e).log_density)(x)


@functools.partial(jax.jit, static_argnums=0)
def _amplification(made_for: Compiled, target: Target, x: Any) -> jax.Array:
    structure, how = made_for
    beliefs = jax.tree.unflatten(how, target.beliefs)
    scales = structure.coordinates.scales(x, target.units, beliefs)
    return amplification(target.problem, scales.root, scales.sigma)


def in_batches(
    call: Callable[..., Any], arrays: tuple[np.ndarray, ...], at_once: int,
    advance: Callable[[], Any] = lambda: None,
) -> Any:  # fmt: skip
    """``call`` on so many rows of the arrays at once, all of one shape; results in NumPy, whole."""
    size = len(arrays[0])
    arrays = tuple(np.pad(a, ((0, -size % at_once), (0, 0)), mode="edge") for a in arrays)
    parts = [slice(start, start + at_once) for start in range(0, size, at_once)]
    found = []
    for values in one_behind(call(*(a[part] for a in arrays)) for part in parts):
        found.append(to_numpy(values))
        advance()
    return jax.tree.map(lambda *v: np.concatenate(v)[:size], *found)


class Collapsed:
    """The collapsed posterior of a model and its tasks; use it inside ``numerics.float64()``.

    ``units`` are rough sizes of τ and σ, to start from.
    """

    has_rough = False

    def __init__(self, model: HierarchicalModel, tasks: Tasks):
        shape, stats = model.shape(tasks), placed_statistics(tasks)
        self.beliefs = model.phi_distributions(tasks)
        normals = {n: as_normal(self.beliefs[n]) for n in ("mu", "gamma", "beta")
                   if n in self.beliefs}  # fmt: skip
        exact = all(normal.exact for normal in normals.values())
        self.structure = Structure(Coordinates.of(shape), shape, exact)
        self._leaves, how = jax.tree.flatten(self.beliefs)
        self._made_for = (self.structure, how)
        self.fast = False
        self.num_tasks, self.spread = tasks.num_tasks, tasks.sharding is not None
        chunk, self.together = None, self.num_tasks
        if tasks.sharding is not None:  # chunk after chunk would be device after device
            self.together = self.num_tasks // num_shares(tasks.sharding)
        elif self.num_tasks > WHOLE_UP_TO:
            chunk = self.together = CHUNK
        self.proper = not any(map(improper, self.beliefs.values()))
        location, precision = (
            self.structure.flat({n: getattr(a, part) for n, a in normals.items()})
            for part in ("location", "precision")
        )
        centre, residual = least_squares(stats, shape.free_mean)
        self.units = Units(0.3 * model.scales(tasks).coef, float(residual) or 1.0)
        self.problem = integrated_problem(
            stats, shape.free_mean, centre, NormalBelief(location, precision), chunk
        )

    @property
    def num_coef(self) -> int:
        """Entries of x that are τ's."""
        return self.structure.coordinates.num_coef

    @property
    def num_white(self) -> int:
        """Entries of e."""
        return self.structure.num_fixed

    @property
    def exact(self) -> bool:
        """Whether the density does not depend on e."""
        return self.structure.exact

    @property
    def start(self) -> np.ndarray:
        """A first guess of x, in ``units``."""
        return self.structure.coordinates.vector(self.units.tau, self.units.sigma, self.units)

    def rescaled(self, x: np.ndarray, units: Units, new: Units) -> np.ndarray:
        """The same point in other units."""
        return self.structure.coordinates.rescaled(x, units, new)

    def prepare(self, units: Units, x: np.ndarray) -> None:
        """Compute with explicit inverses where they lose next to nothing around x."""
        self.fast = self.well_conditioned(units, x)

    def log_density(self, units: Units) -> Callable[[Any, Any], Any]:
        """The density of one point (x, e)."""
        # NumPyro holds what a potential is made of, in its own programs: on each device all of it
        problem = to_numpy(self.problem)
        return lambda x, e: point(self.structure, problem, self.beliefs, units, x, e).log_density

    @property
    def at_once(self) -> int:
        """Points of one compiled call, a power of two."""
        most = np.clip(NUMBERS_AT_ONCE // max(self.together, 1), 1, MOST_AT_ONCE)
        return 2 ** int(np.log2(most))

    def _target(self, units: Units) -> Target:
        return Target(self.problem, self._leaves, units)

    def points(
        self, units: Units, xs: np.ndarray, es: np.ndarray,
        advance: Callable[[], Any] = lambda: None, *, rough: bool = False,
    ) -> Point:  # fmt: skip
        """φ by name (n, …) and log densities (n,) at (xs, es), in batches of one shape.

        ``advance`` is called after each batch. There is nothing rougher than the density itself.
        """
        del rough
        target = self._target(units)
        return in_batches(
            lambda x, e: _points(self._made_for, target, x, e, self.fast),
            (xs, es), self.at_once, advance,
        )  # fmt: skip

    def well_conditioned(self, units: Units, x: np.ndarray) -> bool:
        """Whether explicit inverses lose next to nothing around x."""
        found = _amplification(self._made_for, self._target(units), x)
        return float(found) < LARGEST_AMPLIFICATION

    @property
    def doubt(self) -> str | None:
        """None: the density is exact."""
        return None

    def refine(self, units: Units, xs: np.ndarray) -> bool:
        """The density is exact: nothing is to be refined."""
        del units, xs
        return False

    def value_and_slope(self, units: Units, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the log density at (x, e = 0) and its slope, for a minimiser."""
        e = np.zeros(self.structure.num_fixed)
        value, slope = _value_and_slope(self._made_for, self._target(units), x, e)
        value = -float(value)
        return (value if np.isfinite(value) else 1e300), -np.nan_to_num(np.asarray(slope))
