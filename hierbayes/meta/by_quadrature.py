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

How fine quadrature has to be is found at the mode, and judged again over draws of φ, the farthest
among them, against a finer rule: where the difference of Σ log p̂ varies over them (a constant
cancels) by more than ``LARGE_ERROR``, a finer rule takes over, on rays where it must.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation import Quadrature
from hierbayes.adaptation.quadrature import Rays, Rule, nodes_of
from hierbayes.adaptation.whitened import Whitened, at_modes, climb
from hierbayes.errors import listing
from hierbayes.evidence.quadrature import laplace_near, log_evidence
from hierbayes.meta.approximate_evidence import (
    LARGE_ERROR,
    NODES,
    Integrated,
    maximise_approximate,
)
from hierbayes.meta.chart_of_phi import Around, Chart, Made, phi_and_density
from hierbayes.meta.collapsed import Point, in_batches
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import (
    cholesky,
    log_diagonal_sum,
    matmul,
    matvec,
    solve_lower,
    solve_upper,
)
from hierbayes.rows import Rows, Whole, rows_of
from hierbayes.tasks import Tasks

ROWS_AT_ONCE = 200_000
"""Points × rows of one compiled call: more than this leaves the processor's cache."""

MOST_AT_ONCE = 1024

FINEST_GRID = {1: 61, 2: 31, 3: 13}
"""Nodes a dimension up to which a grid is held against a finer one; beyond, rays."""

FEW = 64
"""Draws of φ at which quadrature is judged, and points of the smaller of two compiled calls."""

MOST_WORK = 200_000
"""Nodes × rows of one point up to which nodes are raised: beyond, NUTS is the quicker."""

WIDTHS = (4.0, 8.0, 16.0, 32.0)
"""Widths of a mode from which other ones are climbed, either way along every axis."""

APART, LEAST_SHARE = 3.0, np.log(1e-3)
"""Widths between two modes, and the log of the mass of the lesser, from which on it counts."""

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
    rule: Rule | Rays
    modes: Any
    known: Known | None

    def within(self, units: np.ndarray) -> Given:
        """The same in other units."""
        return self._replace(around=self.around.within(units))


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


@functools.partial(jax.jit, static_argnums=0)
def _second_modes(made: Made, given: Given, x: Any) -> jax.Array:
    """Log of the mass around the best other mode, beside that around the one in use, (J,)."""
    phi, _ = phi_and_density(made, given.around, x)
    tasks = Whitened.at(made.likelihood, made.prior, given.rows, phi)
    stand = at_modes(tasks, climb(tasks, _expected(made, given, phi, x)).z)
    d = len(stand.z)
    log_mass = stand.base - log_diagonal_sum(stand.factor)

    def other(place: Any) -> jax.Array:
        near = climb(tasks, stand.node(place))
        end = at_modes(tasks, near.z)
        moved = matvec(jnp.swapaxes(stand.factor, 0, 1), end.z - stand.z)
        mass = end.base - log_diagonal_sum(end.factor) - log_mass
        there = near.converged & ((moved**2).sum(0) > APART**2) & ~jnp.isnan(mass)
        return jnp.where(there, mass, -jnp.inf)

    widths = jnp.asarray([sign * w for w in WIDTHS for sign in (1, -1)])
    places = (widths[:, None, None] * jnp.eye(d)).reshape(-1, d)
    return jax.lax.map(other, places).max(0)


class ByQuadrature:
    """The posterior of φ with every θ_j integrated out by ``found``'s nodes; use it in float64.

    ``found`` is the optimum of empirical Bayes, where the sampler starts. ``error`` is the largest
    one, over draws of φ, of the log evidence less its median: :meth:`refine` finds it.
    """

    num_white, exact, spread = 0, True, False

    def __init__(self, model: HierarchicalModel, tasks: Tasks, found: Integrated, modes: Any):
        self.chart = chart = Chart(model, tasks, found.optimum)
        self.made, self.proper, self.units = chart.made, chart.proper, chart.units
        self.num_coef, self.num_tasks = len(tasks.coef), tasks.num_tasks
        self.num_nodes, self.error = found.num_nodes, found.error
        self.names, self.bimodal = tasks.names, np.zeros(tasks.num_tasks, bool)
        self.rows = jax.tree.map(jnp.asarray, rows_of(tasks, model.likelihood))
        self.given = Given(
            self.rows, chart.around, nodes_of(found.num_nodes, self.num_coef), modes, None
        )
        self.has_rough = found.num_nodes % 2 == 1

    @property
    def start(self) -> np.ndarray:
        """A first guess of x, in ``units``: empirical Bayes."""
        return self.chart.start

    @property
    def at_once(self) -> int:
        """Points of one compiled call, a power of two."""
        cells = self.rows.num_cells or 1
        return 2 ** int(np.log2(np.clip(ROWS_AT_ONCE // cells, 1, MOST_AT_ONCE)))

    def prepare(self, units: np.ndarray, x: np.ndarray) -> None:
        """Find the modes at x, and how they move from there."""
        modes, known = _modes_near(self.made, self.given.within(units), jnp.asarray(x))
        self.given = self.given._replace(modes=modes, known=known)

    def log_density(self, units: np.ndarray) -> Callable[[Any, Any], Any]:
        """The density of one point; without e."""
        given = self.given.within(units)
        return lambda x, e: _point(self.made, given, x).log_density

    def value_and_slope(self, units: np.ndarray, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the log density at x and its slope, for a minimiser."""
        value, slope = _value_and_slope(self.made, self.given.within(units), x)
        value = -float(value)
        return (value if np.isfinite(value) else 1e300), -np.nan_to_num(np.asarray(slope))

    def points(
        self, units: np.ndarray, xs: np.ndarray, es: np.ndarray,
        advance: Callable[[], Any] = lambda: None, *, rough: bool = False,
    ) -> Point:  # fmt: skip
        """φ by name (n, …) and log densities (n,) at xs, in batches of one shape."""
        del es
        given = self.given.within(units)

        def found(of: Any, at: np.ndarray) -> Any:
            call = functools.partial(_points, of, self.made, given)
            at_once = min(FEW, self.at_once) if len(at) <= FEW else self.at_once
            return in_batches(call, (at,), at_once, advance)

        if not rough:
            return found(_point, xs)
        phi, log_density, missed = found(_rough_point, xs)
        far = np.flatnonzero(~(missed <= MOST_MISSED) | np.isnan(log_density))
        if far.size:
            log_density = log_density.copy()
            log_density[far] = found(_point, xs[far]).log_density
        return Point(phi, log_density)

    def refine(self, units: np.ndarray, xs: np.ndarray) -> bool:
        """Hold the density against finer nodes at draws x; True where finer ones took over."""
        some = self._judged(xs)
        values: dict[int, np.ndarray] = {}

        def error(count: int) -> float:
            for nodes in (count, finer(count, self.num_coef)):
                if nodes not in values:
                    values[nodes] = self._values(units, some, nodes)
            return spread(values[count], values[finer(count, self.num_coef)])

        before, self.error = self.num_nodes, error(self.num_nodes)
        for count in NODES[self.num_coef]:
            rule = nodes_of(count, self.num_coef)
            if self.error <= LARGE_ERROR or int(rule.count) * self.rows.num_cells > MOST_WORK:
                break
            if count > self.num_nodes:
                self.num_nodes, self.error = count, error(count)
        if not self.made.likelihood.log_concave:
            given = self.given.within(units)
            for x in some[:: max(1, len(some) // 8)]:
                share = np.asarray(_second_modes(self.made, given, x))
                self.bimodal |= share > LEAST_SHARE
        if self.num_nodes == before:
            return False
        self.given = self.given._replace(rule=nodes_of(self.num_nodes, self.num_coef))
        self.has_rough = self.num_nodes % 2 == 1  # where rays are needed Laplace is no guide
        return True

    def _judged(self, xs: np.ndarray) -> np.ndarray:
        """Draws evenly spread over the ranks of every τ, the smallest and the largest included."""
        ranks = np.unique(np.linspace(0, len(xs) - 1, FEW // self.num_coef).astype(int))
        order = np.argsort(xs[:, : self.num_coef], axis=0)
        return xs[np.unique(order[ranks])]

    def _values(self, units: np.ndarray, xs: np.ndarray, num_nodes: int) -> np.ndarray:
        given = self.given.within(units)._replace(rule=nodes_of(num_nodes, self.num_coef))
        call = functools.partial(_points, _point, self.made, given)
        return np.asarray(in_batches(call, (xs,), min(FEW, self.at_once)).log_density)

    @property
    def doubt(self) -> str | None:
        """Why draws of this density are not to be relied on, if they are not."""
        if self.bimodal.any():
            names = listing(self.names[self.bimodal].tolist(), 3)
            return (
                f"posteriors of {self.bimodal.sum()} tasks ({names}) have more than one mode, and "
                "quadrature goes over one"
            )
        if self.error <= LARGE_ERROR:
            return None
        return (
            f"the log evidence by quadrature is off by up to {self.error:.2g} over the draws of "
            f"phi (at most {LARGE_ERROR} wanted) with as many nodes as are within reach"
        )


def finer(num_nodes: int, dimensions: int) -> int:
    """The rule that so many nodes are held against; of the finest, the next to the finest."""
    last = FINEST_GRID[dimensions]
    if num_nodes % 2 and num_nodes < last:
        return min(2 * num_nodes + 3, last)
    rays = [count for count in NODES[dimensions] if count % 2 == 0]
    if num_nodes % 2:
        return rays[0]
    if dimensions == 1:
        return rays[1 - rays.index(num_nodes)]
    return num_nodes + 2 * (num_nodes // 5)


def spread(values: np.ndarray, better: np.ndarray) -> float:
    """The largest difference less the median one; infinite where one of the two is not finite."""
    with np.errstate(invalid="ignore"):
        gap = values - better
    gap = gap[np.isfinite(values) | np.isfinite(better)]
    if not (gap.size and np.isfinite(gap).all()):
        return float("inf")
    return float(np.abs(gap - np.median(gap)).max())


def by_quadrature(
    model: HierarchicalModel, tasks: Tasks
) -> tuple[ByQuadrature, Quadrature, dict[str, Any]]:
    """The density, how θ is drawn beside it, and what is worth knowing of both at the mode."""
    found = maximise_approximate(model, tasks, quadrature=True, with_belief=True, for_draws=True)
    target = ByQuadrature(model, tasks, found, found.modes)
    info = {"num_nodes": found.num_nodes, "evidence_error": found.error}
    return target, Quadrature(found.num_nodes), info
