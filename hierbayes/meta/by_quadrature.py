r"""p(φ | D) where the evidence is an integral without a closed form, as a density without bounds.

.. math:: \log p(x \mid D) = \log p(\varphi(x)) + \log\left|\tfrac{d\varphi}{dx}\right|
          + \sum_j \log \hat p(D_j \mid \varphi(x))

x is that of :mod:`hierbayes.meta.chart_of_phi`. A rough density has Laplace's p̂, two Newton
steps from where the modes are expected, the density itself quadrature's. With g and W the slope and
the curvature of log p(D_j | θ) at a mode θ*, known at one φ, a mode is expected at

.. math:: z_j(\varphi) = (I + L^\top W L)^{-1} L^\top \left(W (\theta^* - m_j) + g\right)

which is right where log p(D_j | θ) is a parabola, however large or small τ is, and moved along a
straight line by what that leaves. Points whose Newton steps do not reach a mode have the density
itself in place of the rough one: a rough density of zero would keep the sampler out for good.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation import Quadrature
from hierbayes.adaptation.quadrature import Rule, grid
from hierbayes.adaptation.whitened import Whitened, at_modes, climb
from hierbayes.evidence.quadrature import laplace_near, log_evidence
from hierbayes.meta.approximate_evidence import Integrated, maximise_approximate
from hierbayes.meta.chart_of_phi import Around, Chart, Made, phi_and_density
from hierbayes.meta.collapsed import Point, in_batches
from hierbayes.meta.scales_of_phi import Units
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import cholesky, matmul, matvec, solve_lower, solve_upper
from hierbayes.rows import Rows, Whole, rows_of
from hierbayes.tasks import Tasks

ROWS_AT_ONCE = 200_000
"""Points × rows of one compiled call: more than this leaves the processor's cache."""

MOST_AT_ONCE = 1024

FARTHEST = 1.0
"""How far the straight line may move a mode: beyond, it is no guide."""

MOST_MISSED = 0.25
"""What Newton's steps may leave to gain, of all tasks together, in a rough log density."""


class Parabola(NamedTuple):
    """Every log p(D_j | θ) to second order at ``theta`` (d, J); the curvature is that of −log p."""

    theta: jax.Array
    slope: jax.Array
    curvature: jax.Array

    def mode(self, location: jax.Array, root: jax.Array) -> jax.Array:
        """Where z* is under m (d, J) and L (d, d), (d, J)."""
        root = root[:, :, None]
        up = jnp.swapaxes(root, 0, 1)
        pull = matvec(up, matvec(self.curvature, self.theta - location) + self.slope)
        bent = matmul(matmul(up, self.curvature), root) + jnp.eye(len(pull))[:, :, None]
        factor = cholesky(bent)
        return solve_upper(factor, solve_lower(factor, pull))


class Known(NamedTuple):
    """The modes at x: parabolas there, and how modes move (k, d, J) otherwise than those say."""

    x: jax.Array
    parabola: Parabola
    drift: jax.Array


class Given(NamedTuple):
    """What a compiled program is given: numbers only; ``modes`` (d, J) are z* near the mode."""

    rows: Rows | Whole
    around: Around
    rule: Rule
    modes: Any
    known: Known | None

    def within(self, units: Units) -> Given:
        """The same in other units."""
        return self._replace(around=self.around._replace(units=units))


class Rough(NamedTuple):
    """φ by name, a rough log density, and what Newton's steps have left to gain in it."""

    phi: dict[str, Any]
    log_density: Any
    missed: Any


def _of_parabolas(made: Made, given: Given, parabola: Parabola, phi: dict[str, Any]) -> jax.Array:
    location = made.prior.location(phi, given.rows.task_predictors).T
    return parabola.mode(location, made.prior.scale_tril(phi))


def _expected(made: Made, given: Given, phi: dict[str, Any], x: Any) -> jax.Array:
    """Where the modes are at x, from where they are known."""
    known = given.known
    if known is None:
        return given.modes
    moved = jnp.einsum("k,kdj->dj", x - known.x, known.drift)
    return _of_parabolas(made, given, known.parabola, phi) + jnp.clip(moved, -FARTHEST, FARTHEST)


def _point(made: Made, given: Given, x: Any) -> Point:
    phi, total = phi_and_density(made, given.around, x)
    near = _expected(made, given, phi, x)
    found = log_evidence(made.likelihood, made.prior, given.rows, phi, near, given.rule)
    total = total + found.log_evidence.sum()
    return Point(phi, jnp.where(jnp.isnan(total), -jnp.inf, total))


def _rough_point(made: Made, given: Given, x: Any) -> Rough:
    phi, total = phi_and_density(made, given.around, x)
    near = _expected(made, given, phi, x)
    found, missed = laplace_near(made.likelihood, made.prior, given.rows, phi, near)
    return Rough(phi, total + found.sum(), missed.sum())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _points(of: Any, made: Made, given: Given, xs: Any) -> Any:
    return jax.vmap(lambda x: of(made, given, x))(xs)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_slope(made: Made, given: Given, x: Any) -> Any:
    def log_density(v: Any) -> Any:
        phi, total = phi_and_density(made, given.around, v)
        found = log_evidence(made.likelihood, made.prior, given.rows, phi, given.modes, given.rule)
        return total + found.log_evidence.sum()

    return jax.value_and_grad(log_density)(x)


@functools.partial(jax.jit, static_argnums=0)
def _modes_near(made: Made, given: Given, x: Any) -> tuple[jax.Array, Known]:
    """z* (d, J) at x, and what is known of how they move: in all by A⁻¹ ∂(∇Ψ)/∂x."""

    def tasks(v: Any) -> Whitened:
        return Whitened.at(
            made.likelihood, made.prior, given.rows, phi_and_density(made, given.around, v)[0]
        )

    here = tasks(x)
    stand = at_modes(here, climb(here, given.modes).z)
    theta = here.theta(stand.z)
    at = here.rows.to_second_order(
        made.likelihood, theta, here.phi, damped=not made.likelihood.log_concave
    )
    slope = here.rows.to_second_order(made.likelihood, theta, here.phi, damped=False).slope
    parabola = Parabola(theta, slope, at.curvature)

    def by_parabola(v: Any) -> jax.Array:
        phi = phi_and_density(made, given.around, v)[0]
        return _of_parabolas(made, given, parabola, phi)

    def drift(direction: Any) -> Any:
        slope = jax.jvp(lambda v: tasks(v).bend(stand.z).slope, (x,), (direction,))[1]
        moved = solve_upper(stand.factor, solve_lower(stand.factor, slope))
        return moved - jax.jvp(by_parabola, (x,), (direction,))[1]

    return stand.z, Known(x, parabola, jax.lax.map(drift, jnp.eye(len(x))))


class ByQuadrature:
    """The posterior of φ with every θ_j integrated out by ``found``'s nodes; use it in float64.

    ``found`` is the optimum of empirical Bayes, where the sampler starts.
    """

    num_white, exact, spread, has_rough = 0, True, False, True

    def __init__(self, model: HierarchicalModel, tasks: Tasks, found: Integrated, modes: Any):
        self.chart = chart = Chart(model, tasks, found.optimum)
        self.made, self.proper, self.units = chart.made, chart.proper, chart.around.units
        self.num_coef, self.num_tasks = len(chart.made.shape.coef), tasks.num_tasks
        self.num_nodes = found.num_nodes
        self.rows = jax.tree.map(jnp.asarray, rows_of(tasks, model.likelihood))
        self.given = Given(
            self.rows, chart.around, grid(found.num_nodes, self.num_coef), modes, None
        )

    @property
    def start(self) -> np.ndarray:
        """A first guess of x, in ``units``: empirical Bayes."""
        return self.chart.start

    @property
    def at_once(self) -> int:
        """Points of one compiled call, a power of two."""
        cells = self.rows.num_cells or 1
        return 2 ** int(np.log2(np.clip(ROWS_AT_ONCE // cells, 1, MOST_AT_ONCE)))

    def prepare(self, units: Units, x: np.ndarray) -> None:
        """Find the modes at x, and how they move from there."""
        modes, known = _modes_near(self.made, self.given.within(units), jnp.asarray(x))
        self.given = self.given._replace(modes=modes, known=known)

    def rescaled(self, x: np.ndarray, units: Units, new: Units) -> np.ndarray:
        """The same point in other units."""
        return self.chart.rescaled(x, units, new)

    def log_density(self, units: Units) -> Callable[[Any, Any], Any]:
        """The density of one point; without e."""
        given = self.given.within(units)
        return lambda x, e: _point(self.made, given, x).log_density

    def value_and_slope(self, units: Units, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the log density at x and its slope, for a minimiser."""
        value, slope = _value_and_slope(self.made, self.given.within(units), x)
        value = -float(value)
        return (value if np.isfinite(value) else 1e300), -np.nan_to_num(np.asarray(slope))

    def points(
        self, units: Units, xs: np.ndarray, es: np.ndarray,
        advance: Callable[[], Any] = lambda: None, *, rough: bool = False,
    ) -> Point:  # fmt: skip
        """φ by name (n, …) and log densities (n,) at xs, in batches of one shape."""
        del es
        given = self.given.within(units)

        def found(of: Any, at: np.ndarray) -> Any:
            call = functools.partial(_points, of, self.made, given)
            return in_batches(call, (at,), self.at_once, advance)

        if not rough:
            return found(_point, xs)
        phi, log_density, missed = found(_rough_point, xs)
        far = np.flatnonzero(~(missed <= MOST_MISSED) | np.isnan(log_density))
        if far.size:
            log_density = log_density.copy()
            log_density[far] = found(_point, xs[far]).log_density
        return Point(phi, log_density)


def by_quadrature(
    model: HierarchicalModel, tasks: Tasks
) -> tuple[ByQuadrature, Quadrature, dict[str, Any]]:
    """The density, how θ is drawn beside it, and what is worth knowing of both."""
    found = maximise_approximate(model, tasks, quadrature=True, with_belief=True, for_draws=True)
    target = ByQuadrature(model, tasks, found, found.modes)
    info = {"num_nodes": found.num_nodes, "evidence_error": found.error}
    return target, Quadrature(found.num_nodes), info
