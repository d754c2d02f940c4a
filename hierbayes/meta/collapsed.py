r"""p(φ | D) with every θ_j integrated out, as a density over few numbers without bounds.

With b = (μ, Γ, β) and a normal hyperprior s(b) that equals p(b), or stands near it,

.. math::

    \log p(D, x, b) = \underbrace{\log p(\psi(x)) + \log\left|\tfrac{d\psi}{dx}\right|
        + \log \int p(D \mid \psi, b)\, s(b)\, db}_{\text{density of } x}
        + \log q(b \mid D, \psi) + \log \frac{p(b)}{s(b)}

where q(b | D, ψ) is the exact conditional under s. A point (x, e) stands for
b = E_q[b] + C⁻ᵀ e with e standard normal; the last term, the correction, is zero where the
hyperprior is normal, as it is by default.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from hierbayes.evidence.fixed_effects_out import (
    IntegratedProblem,
    NormalHyperprior,
    amplification,
    integrate,
    integrated_problem,
    least_squares,
)
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import one_behind, solve_upper, to_numpy
from hierbayes.phi.space import Placed, Space, log_prob
from hierbayes.priors.normality import as_normal, improper
from hierbayes.sharding import num_shares
from hierbayes.statistics import placed_statistics
from hierbayes.tasks import Tasks

Hyperpriors = dict[str, dist.Distribution]

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


class Spaces(NamedTuple):
    """``psi``, of what is sampled: (τ, R, σ), and ``fixed``: b = (μ, Γ, β) as it is."""

    psi: Space
    fixed: Space

    @classmethod
    def of(cls, space: Space) -> Spaces:
        """The two parts of φ's space."""
        fixed = space.only("mu", "gamma", "beta").plain()
        return cls(space.only("tau", "corr", "sigma").opened(), fixed)


def point(
    spaces: Spaces, problem: IntegratedProblem, hyperpriors: Hyperpriors, x: Any, e: Any, *,
    exact: bool, fast: bool = False,
) -> Point:  # fmt: skip
    """φ and the log density at (x, e); ``exact``: of hyperpriors on b that are all normal."""
    at = spaces.psi.placed(x, hyperpriors)
    found = integrate(problem, *root_and_noise(at), fast=fast)
    total = at.log_density + found.log_evidence
    b = found.mean
    if spaces.fixed.size:
        b = b + solve_upper(found.factor[:, :, None], e[:, None])[:, 0]
    named = spaces.fixed.phi(b)
    if not exact:
        total = total + _correction(problem, hyperpriors, named, b)
    total = jnp.where(jnp.isnan(total), -jnp.inf, total)
    return Point(named | at.phi, total)


def root_and_noise(at: Placed) -> tuple[Any, Any]:
    """L with Σ = L Lᵀ (d, d), and σ: one where the errors are known."""
    tau = at.phi["tau"]
    root = jnp.eye(len(tau)) if at.root is None else at.root
    return tau[:, None] * root, at.phi.get("sigma", jnp.ones(()))


def _correction(
    problem: IntegratedProblem, hyperpriors: Hyperpriors, named: Any, b: Any
) -> jax.Array:
    """log p(b) − log s(b)."""
    location, precision = problem.hyperprior
    flat = precision == 0
    log_scale = jnp.log(jnp.where(flat, 1.0, precision / (2 * jnp.pi)))
    stand_in = 0.5 * (log_scale - precision * (b - location) ** 2).sum()
    total = -stand_in
    return total + sum(log_prob(hyperpriors[name], value) for name, value in named.items())


class Target(NamedTuple):
    """What a compiled program is given: numbers only.

    Hyperpriors come as their leaves, since NumPyro takes long to take its distributions apart.
    """

    problem: IntegratedProblem
    hyperpriors: list[Any]
    spaces: Spaces


Compiled = tuple[bool, Any]
"""What a compiled program is made for: whether b is exact, and how hyperpriors are put together."""


def _point(made_for: Compiled, target: Target, x: Any, e: Any, *, fast: bool = False) -> Point:
    exact, how = made_for
    hyperpriors = jax.tree.unflatten(how, target.hyperpriors)
    return point(target.spaces, target.problem, hyperpriors, x, e, exact=exact, fast=fast)


class AtPoint(NamedTuple):
    """The log density of one point (x, e), of the numbers of a target."""

    made_for: Compiled

    def __call__(self, target: Target, x: Any, e: Any) -> Any:
        """The log density."""
        return _point(self.made_for, target, x, e).log_density


@functools.partial(jax.jit, static_argnums=(0, 4))
def _points(made_for: Compiled, target: Target, xs: Any, es: Any, fast: bool) -> Point:
    # no loop over parts: inside one XLA works on one core alone
    return jax.vmap(lambda x, e: _point(made_for, target, x, e, fast=fast))(xs, es)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_slope(made_for: Compiled, target: Target, x: Any, e: Any) -> Any:
    """((log density, φ by name), slope)."""

    def density(v: Any) -> tuple[Any, dict[str, Any]]:
        at = _point(made_for, target, v, e)
        return at.log_density, at.phi

    return jax.value_and_grad(density, has_aux=True)(x)


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

    ``units`` (d,) are rough sizes of τ, to start from.
    """

    has_rough = False

    def __init__(self, model: HierarchicalModel, tasks: Tasks):
        stats, space = placed_statistics(tasks), model.space(tasks)
        self.hyperpriors = model.phi_distributions(tasks)
        normals = {n: as_normal(self.hyperpriors[n]) for n in ("mu", "gamma", "beta")
                   if n in self.hyperpriors}  # fmt: skip
        self.exact = all(normal.exact for normal in normals.values())
        self._leaves, how = jax.tree.flatten(self.hyperpriors)
        self._made_for = (self.exact, how)
        spaces = Spaces.of(space)
        self.num_coef, self.num_noncentred = space["tau"].size, spaces.fixed.size
        self.fast = False
        self.num_tasks, self.spread = tasks.num_tasks, tasks.sharding is not None
        chunk, self.together = None, self.num_tasks
        if tasks.sharding is not None:  # chunk after chunk would be device after device
            self.together = self.num_tasks // num_shares(tasks.sharding)
        elif self.num_tasks > WHOLE_UP_TO:
            chunk = self.together = CHUNK
        self.proper = not any(map(improper, self.hyperpriors.values()))
        location, precision = (
            spaces.fixed.x({n: getattr(a, part) for n, a in normals.items()})
            for part in ("location", "precision")
        )
        free = model.shape(tasks).free_mean
        centre, residual = least_squares(stats, free)
        psi = spaces.psi
        if "sigma" in psi.names:
            psi = psi.around(sigma=float(residual) or 1.0)
        self.spaces = spaces._replace(psi=psi)
        self.units = 0.3 * model.scales(tasks).coef
        self.problem = integrated_problem(
            stats, free, centre, NormalHyperprior(location, precision), chunk
        )

    @property
    def start(self) -> np.ndarray:
        """A first guess of x, in ``units``."""
        return self.within(self.units).psi.x({"tau": self.units})

    def within(self, units: np.ndarray) -> Spaces:
        """The spaces of ψ and b with τ in these units."""
        return self.spaces._replace(psi=self.spaces.psi.in_units(tau=units))

    def prepare(self, units: np.ndarray, x: np.ndarray) -> None:
        """Compute with explicit inverses where they lose next to nothing around x."""
        self.fast = self.well_conditioned(units, x)

    def log_density(self, units: np.ndarray) -> tuple[AtPoint, Target]:
        """The density of one point, and its numbers; on each device all of them."""
        return AtPoint(self._made_for), to_numpy(self._target(units))

    @property
    def at_once(self) -> int:
        """Points of one compiled call, a power of two."""
        most = np.clip(NUMBERS_AT_ONCE // max(self.together, 1), 1, MOST_AT_ONCE)
        return 2 ** int(np.log2(most))

    def _target(self, units: np.ndarray) -> Target:
        return Target(self.problem, self._leaves, self.within(units))

    def points(
        self, units: np.ndarray, xs: np.ndarray, es: np.ndarray,
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

    def well_conditioned(self, units: np.ndarray, x: np.ndarray) -> bool:
        """Whether explicit inverses lose next to nothing around x."""
        phi = to_numpy(self._value_and_slope(units, x)[0][1])
        tau, corr = phi["tau"], phi.get("corr", np.eye(self.num_coef))
        covariance = tau[:, None] * corr * tau
        found = amplification(self.problem, covariance, float(phi.get("sigma", 1.0)))
        return found < LARGEST_AMPLIFICATION

    def _value_and_slope(self, units: np.ndarray, x: np.ndarray) -> Any:
        e = np.zeros(self.num_noncentred)
        return _value_and_slope(self._made_for, self._target(units), x, e)

    @property
    def doubt(self) -> str | None:
        """None: the density is exact."""
        return None

    def refine(self, units: np.ndarray, xs: np.ndarray) -> bool:
        """The density is exact: nothing is to be refined."""
        del units, xs
        return False

    def value_and_slope(self, units: np.ndarray, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the log density at (x, e = 0) and its slope, for a minimiser."""
        (value, _), slope = self._value_and_slope(units, x)
        value = -float(value)
        return (value if np.isfinite(value) else 1e300), -np.nan_to_num(np.asarray(slope))
