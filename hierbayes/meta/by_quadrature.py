r"""p(φ | D) where the evidence is an integral without a closed form, as a density without bounds.

.. math:: \log p(x \mid D) = \log p(\varphi(x)) + \log\left|\tfrac{d\varphi}{dx}\right|
          + \sum_j \log \hat p(D_j \mid \varphi(x))

x is that of :mod:`hierbayes.meta.by_evidence`. A rough density has Laplace's p̂, two Newton
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
from hierbayes.adaptation.mode import LogJoint, find_mode, mode_near
from hierbayes.adaptation.quadrature import nodes_of
from hierbayes.errors import listing
from hierbayes.meta.approximate_evidence import LARGE_ERROR, NODES, maximise_approximate
from hierbayes.meta.by_evidence import (
    FEW,
    ByEvidence,
    Data,
    Made,
    near_expected,
    phi_and_density,
    point,
)
from hierbayes.meta.collapsed import Point
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import cholesky, matmul, matvec, solve_lower, solve_upper
from hierbayes.tasks import Tasks

FINEST_GRID = {1: 61, 2: 31, 3: 13}
"""Nodes a dimension up to which a grid is held against a finer one; beyond, rays."""

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

    def under(self, made: Made, data: Data, phi: dict[str, Any]) -> jax.Array:
        """Where z* is at φ."""
        prior = made.model.prior
        location = prior.location(phi, data.tasks.rows.task_predictors).T
        return self.mode(location, prior.scale_tril(phi))


class Known(NamedTuple):
    """The modes at x: parabolas there, and how modes move (k, d, J) otherwise than those say."""

    x: jax.Array
    parabola: Parabola
    drift: jax.Array

    def expected(self, made: Made, data: Data, phi: dict[str, Any], x: Any) -> jax.Array:
        """Where the modes are at another x."""
        moved = jnp.einsum("k,kdj->dj", x - self.x, self.drift)
        by_parabola = self.parabola.under(made, data, phi)
        return by_parabola + jnp.clip(moved, -FARTHEST, FARTHEST)


class Rough(NamedTuple):
    """φ by name, a rough log density, and what Newton's steps have left to gain in it."""

    phi: dict[str, Any]
    log_density: Any
    missed: Any


def _rough_point(made: Made, data: Data, x: Any) -> Rough:
    """Laplace's evidence of every task, two Newton steps from where its mode is expected.

    Where Ψ_j may bend upwards, what the steps have lost instead of gained counts as missed.
    """
    phi, total = phi_and_density(made, data.around, x)
    tasks, near = _tasks(made, data, phi), near_expected(made, data, phi, x)
    mode = mode_near(tasks, near)
    missed = mode.gain
    if not made.model.likelihood.concave_in_theta:
        missed = jnp.maximum(missed, tasks.value(near) - mode.base)
    total = total + (mode.log_integral + tasks.rows.constant).sum()
    return Rough(phi, total, missed.sum())


def _tasks(made: Made, data: Data, phi: dict[str, Any]) -> LogJoint:
    return LogJoint.at(made.model, phi, data.tasks.rows)


@functools.partial(jax.jit, static_argnums=0)
def _modes_near(made: Made, data: Data, x: Any) -> tuple[jax.Array, Known]:
    """z* (d, J) at x, and what is known of how they move: in all by A⁻¹ ∂(∇Ψ)/∂x."""
    likelihood = made.model.likelihood

    def tasks(v: Any) -> LogJoint:
        return _tasks(made, data, phi_and_density(made, data.around, v)[0])

    here = tasks(x)
    mode = find_mode(here, data.start)
    theta = here.theta(mode.z)
    damped = not likelihood.concave_in_theta
    at = here.rows.to_second_order(likelihood, theta, here.phi, damped=damped)
    slope = here.rows.to_second_order(likelihood, theta, here.phi, damped=False).slope
    parabola = Parabola(theta, slope, at.curvature)

    def by_parabola(v: Any) -> jax.Array:
        return parabola.under(made, data, phi_and_density(made, data.around, v)[0])

    def drift(direction: Any) -> Any:
        slope = jax.jvp(lambda v: tasks(v).bend(mode.z).slope, (x,), (direction,))[1]
        moved = solve_upper(mode.factor, solve_lower(mode.factor, slope))
        return moved - jax.jvp(by_parabola, (x,), (direction,))[1]

    return mode.z, Known(x, parabola, jax.lax.map(drift, jnp.eye(len(x))))


@functools.partial(jax.jit, static_argnums=0)
def _second_modes(made: Made, data: Data, x: Any) -> jax.Array:
    """Log of the mass around the best other mode, beside that around the one in use, (J,)."""
    phi, _ = phi_and_density(made, data.around, x)
    tasks = _tasks(made, data, phi)
    mode = find_mode(tasks, near_expected(made, data, phi, x))
    d = len(mode.z)

    def other(place: Any) -> jax.Array:
        end = find_mode(tasks, mode.node(place))
        moved = matvec(jnp.swapaxes(mode.factor, 0, 1), end.z - mode.z)
        mass = end.log_integral - mode.log_integral
        there = end.converged & ((moved**2).sum(0) > APART**2) & ~jnp.isnan(mass)
        return jnp.where(there, mass, -jnp.inf)

    widths = jnp.asarray([sign * w for w in WIDTHS for sign in (1, -1)])
    places = (widths[:, None, None] * jnp.eye(d)).reshape(-1, d)
    return jax.lax.map(other, places).max(0)


class ByQuadrature(ByEvidence):
    """The posterior of φ with every θ_j integrated out by quadrature; use it in float64.

    It starts from the optimum of empirical Bayes. ``error`` is the largest one, over draws of φ, of
    the log evidence less its median: :meth:`refine` finds it.
    """

    def __init__(self, model: HierarchicalModel, tasks: Tasks):
        found = maximise_approximate(
            model, tasks, quadrature=True, with_hyperprior=True, for_draws=True
        )
        how = Quadrature(found.num_nodes)
        # on one device, whatever the tasks are spread over
        super().__init__(model, tasks.shard(None), how, found.optimum, start=found.modes)
        self.num_nodes, self.error = found.num_nodes, found.error
        self.names, self.bimodal = tasks.names, np.zeros(tasks.num_tasks, bool)
        self.has_rough = found.num_nodes % 2 == 1

    def prepare(self, units: np.ndarray, x: np.ndarray) -> None:
        """Find the modes at x, and how they move from there."""
        modes, known = _modes_near(self.made, self.data.within(units), x)
        self.data = self.data._replace(start=modes, known=known)

    def points(
        self, units: np.ndarray, xs: np.ndarray, es: np.ndarray,
        advance: Callable[[], Any] = lambda: None, *, rough: bool = False,
    ) -> Point:  # fmt: skip
        """φ by name (n, …) and log densities (n,) at xs, in batches of one shape."""
        del es
        data = self.data.within(units)
        if not rough:
            return self.found(point, data, xs, advance)
        phi, log_density, missed = self.found(_rough_point, data, xs, advance)
        far = np.flatnonzero(~(missed <= MOST_MISSED) | np.isnan(log_density))
        if far.size:
            log_density = log_density.copy()
            log_density[far] = self.found(point, data, xs[far], advance).log_density
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
            if self.error <= LARGE_ERROR or int(rule.count) * self.cells > MOST_WORK:
                break
            if count > self.num_nodes:
                self.num_nodes, self.error = count, error(count)
        if not self.made.model.likelihood.concave_in_theta:
            data = self.data.within(units)
            for x in some[:: max(1, len(some) // 8)]:
                share = np.asarray(_second_modes(self.made, data, x))
                self.bimodal |= share[: self.num_tasks] > LEAST_SHARE
        if self.num_nodes == before:
            return False
        self.data = self._with_nodes(self.num_nodes)
        self.has_rough = self.num_nodes % 2 == 1  # where rays are needed Laplace is no guide
        return True

    def _judged(self, xs: np.ndarray) -> np.ndarray:
        """Draws evenly spread over the ranks of every τ, the smallest and the largest included."""
        ranks = np.unique(np.linspace(0, len(xs) - 1, FEW // self.num_coef).astype(int))
        order = np.argsort(xs[:, : self.num_coef], axis=0)
        return xs[np.unique(order[ranks])]

    def _values(self, units: np.ndarray, xs: np.ndarray, num_nodes: int) -> np.ndarray:
        data = self._with_nodes(num_nodes).within(units)
        return np.asarray(self.found(point, data, xs).log_density)

    def _with_nodes(self, num_nodes: int) -> Data:
        rule = nodes_of(num_nodes, self.num_coef)
        return self.data._replace(tasks=self.data.tasks._replace(rule=rule))

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
