r"""K gradient steps from φ.

.. math:: \theta^0 = \mu + \Gamma w_j, \qquad
          \theta^{k+1} = \theta^k + \eta\, \nabla_\theta \log p(D_j \mid \theta^k, \varphi)

Step sizes are in units of the **sum** of the log likelihood over a task's rows, so that more rows
mean longer steps, or of its mean. How long they may be says
:mod:`~hierbayes.adaptation.step_length`.

The derivative of a maximum by the implicit function theorem, which keeps no step to it.

.. math:: \nabla_\theta \Psi(\theta^*, \varphi) = 0 \;\Rightarrow\;
          \frac{d\theta^*}{d\varphi} = A^{-1}\, \partial_\varphi \nabla_\theta \Psi, \qquad
          A = -\nabla_\theta^2 \Psi(\theta^*, \varphi)

A is never formed: conjugate gradients with products A v solve for its inverse, until what is left
is small. Where A is not positive definite the point is no maximum, and there is no such derivative;
conjugate gradients then stop at the first direction that bends upwards, the point before it of the
smallest residual is taken, and it is said.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from hierbayes.adaptation.base import PointAdaptation
from hierbayes.adaptation.descent import Descent
from hierbayes.adaptation.posterior import Point, Posterior
from hierbayes.adaptation.step_length import bounded, check_step_size, overshooting
from hierbayes.errors import listing
from hierbayes.likelihoods.base import sum_by_task
from hierbayes.likelihoods.neural import Neural
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import arithmetic
from hierbayes.sharding import filled_up, gathered, rung
from hierbayes.tasks import Task, Tasks
from hierbayes.tasks.layout import on_devices

if TYPE_CHECKING:
    import optax

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
"""Share of the right-hand side that may be left of it."""

A_WEIGHT, MOST = 20, 5000
"""Iterations at most: so many a weight, for rounding, and in all."""


class Solved(NamedTuple):
    """x with A x ≈ b, ‖b − A x‖ / ‖b‖, and whether A bends downwards in all directions taken."""

    x: jax.Array
    residual: jax.Array
    definite: jax.Array


def with_implicit_slope(
    run: Callable[[Any, Any], Any], slope: Callable[[Any], Any], start: Any
) -> Any:
    """``run(slope, start)`` as a point, with the derivative in φ of the maximum it stands for.

    ``slope`` is ∇Ψ and may depend on φ, and so may ``start``, which only the path depends on.
    """
    still = jax.lax.stop_gradient(run(slope, start))
    at = slope(still)
    # zero in value, ∂_φ ∇Ψ in derivative
    moves = jax.tree.map(lambda g: g - jax.lax.stop_gradient(g), at)
    shift = jax.lax.custom_linear_solve(
        curvature(slope, still), moves, lambda a, b: _solved(a, b)[0], symmetric=True
    )
    return jax.tree.map(jnp.add, still, shift)


def norm(tree: Any) -> jax.Array:
    """The length of a pytree as a vector."""
    return jnp.linalg.norm(ravel_pytree(tree)[0])


def curvature(slope: Callable[[Any], Any], at: Any) -> Callable[[Any], Any]:
    """v → A v at a point."""
    return lambda vector: jax.tree.map(jnp.negative, jax.jvp(slope, (at,), (vector,))[1])


def how_solved(slope: Callable[[Any], Any], at: Any, pull: Any) -> Solved:
    """How A x = ``pull`` is solved at a point, as the derivative of a score with this slope is."""
    return _solved(curvature(slope, at), pull)[1]


def _solved(product: Callable[[Any], Any], target: Any) -> tuple[Any, Solved]:
    flat, back = ravel_pytree(target)
    found = solve(lambda v: ravel_pytree(product(back(v)))[0], flat)
    return back(found.x), found


def solve(product: Callable[[Any], Any], target: jax.Array) -> Solved:
    """x with A x = ``target``, A symmetric, by conjugate gradients as far as A is definite."""
    square = target @ target
    enough = TOLERANCE[target.dtype.name] ** 2 * square
    most = min(A_WEIGHT * len(target), MOST)

    def body(state: Any) -> Any:
        count, x, residual, direction, before, best, _ = state
        turned = product(direction)
        bend = direction @ turned
        definite = bend > 0
        share = jnp.where(definite, before / jnp.where(definite, bend, 1.0), 0.0)
        residual = residual - share * turned
        after = residual @ residual
        onward = residual + after / before * direction
        x = x + share * direction
        closer = after < best[1]
        best = jnp.where(closer, x, best[0]), jnp.where(closer, after, best[1])
        return count + 1, x, residual, onward, after, best, definite

    def unfinished(state: Any) -> Any:
        count, *_, left, _, definite = state
        return (left > enough) & (count < most) & definite

    zero = jnp.zeros_like(target)
    start = (0, zero, target, target, square, (zero, square), jnp.asarray(True))
    _, x, *_, best, definite = jax.lax.while_loop(unfinished, body, start)
    x = jnp.where(definite, x, best[0])
    # computed anew: rounding moves it from what is carried along
    left = jnp.linalg.norm(target - product(x))
    size = jnp.sqrt(square)
    return Solved(x, jnp.where(size > 0, left / jnp.where(size > 0, size, 1.0), 0.0), definite)


Derivative = Literal["unrolled", "rematerialised", "first-order", "implicit"]
DERIVATIVES = ("unrolled", "rematerialised", "first-order", "implicit")


@dataclass(frozen=True)
class GradientSteps(PointAdaptation):
    r"""A(D; φ) = K gradient steps from the prior's location, with the step size η of φ or fixed.

    .. math:: \theta^{k+1} = \theta^k + \eta \nabla \left[\log p(D \mid \theta^k)
              - \tfrac{\lambda}{2} \lVert \theta^k - \theta^0 \rVert^2 \right]

    Parameters
    ----------
    num_steps : int
        K, the number of steps.
    step_size : float or None
        η in the units of ``loss``; None takes ``phi["step_size"]``, a number or one a coefficient.
    loss : "sum" or "mean"
        Steps on the summed log likelihood of a task's rows, or on its mean over the rows.
    optimiser : optax.GradientTransformation, optional
        In the place of plain steps, for each task by itself.
    derivative : "unrolled", "rematerialised", "first-order" or "implicit"
        How θ_K depends on φ when φ is learned: by the steps themselves, with all of them kept or
        with √K kept and the rest computed again; as if slopes did not depend on φ; or as the
        maximum that the steps stand for, by conjugate gradients, which keeps no step.
    proximal : bool
        Climb the log posterior under N(θ⁰, I τ²), τ of φ, and not the likelihood alone.
    """

    num_steps: int
    step_size: float | None = None
    loss: Literal["sum", "mean"] = "sum"
    optimiser: optax.GradientTransformation | None = None
    derivative: Derivative = "unrolled"
    proximal: bool = False
    name = "gradient steps"

    def for_programs(self, phi: dict[str, Any]) -> tuple[GradientSteps, dict[str, Any]]:
        """The same steps with η in φ, so that a compiled program serves every step size."""
        if self.step_size is None or self.optimiser is not None:
            return self, dict(phi)
        return replace(self, step_size=None), dict(phi) | {"step_size": self.step_size}

    def steps(
        self, model: HierarchicalModel, phi: dict[str, Any], rows: Task, task_of_row: Any
    ) -> Any:
        """θ_K of every task (J, d), differentiable in φ."""
        start = model.prior.location(phi, rows.task_predictors)
        if task_of_row is None:
            return jax.vmap(lambda theta, task: self._of_one(model, phi, theta, task))(start, rows)
        count = sum_by_task(jnp.asarray(rows.mask, start.dtype), task_of_row, len(start))

        def value(thetas: Any) -> Any:
            each = model.likelihood.log_likelihood_of_rows(thetas, phi, rows, task_of_row)
            return each.sum()

        return self._climb(phi, value, start, jnp.maximum(count, 1)[:, None])

    def arrange(self, model: HierarchicalModel, tasks: Tasks) -> tuple[Task, Any]:
        """As the likelihood wants them; side by side for what must see each task by itself.

        An Optax optimiser, and the conjugate gradients of the implicit derivative.
        """
        plain = self.optimiser is None and self.derivative != "implicit"
        if plain or isinstance(model.likelihood, Neural):
            return model.likelihood.arrange(tasks)
        return tasks.block(np.arange(tasks.num_tasks), int(tasks.sizes.max(initial=1))), None

    def how_solved(
        self, model: HierarchicalModel, phi: dict[str, Any], support: Task, query: Task
    ) -> tuple[Any, Solved]:
        """How well the implicit derivative's two problems are solved, of tasks on a leading axis.

        (J,) ‖∇Ψ(θ_K)‖ / ‖∇Ψ(θ_0)‖, what is left of the inner problem's slope; and how A x = b is
        solved at θ_K for the slope b of the query rows' log density.
        """
        likelihood = model.likelihood
        scored = likelihood.plug_in(phi)

        def of_one(start: Any, given: Task, asked: Task) -> Any:
            def value(theta: Any) -> Any:
                return likelihood.log_likelihood(theta, phi, given).sum()

            end = likelihood.tree(self._of_one(model, phi, start, given))
            first = likelihood.tree(start)
            tau = phi["tau"] if _is_number(phi["tau"]) else likelihood.tree(phi["tau"])
            rise = self._rise(value, tau, first)
            before, after = norm(rise(first)), norm(rise(end))
            pull = jax.grad(lambda t: likelihood.log_likelihood(t, scored, asked).sum())(end)
            share = jnp.where(before > 0, after / jnp.where(before > 0, before, 1.0), 0.0)
            return share, how_solved(rise, end, pull)

        return jax.vmap(of_one)(model.prior.location(phi, support.task_predictors), support, query)

    def _rise(self, value: Any, tau: Any, start: Any) -> Any:
        """∇Ψ in θ, of the log likelihood ``value`` under the prior around ``start``."""

        def rise(theta: Any) -> Any:
            uphill = jax.grad(value)(theta)
            return jax.tree.map(jnp.subtract, uphill, _pull(tau, theta, start))

        return rise if self.proximal else jax.grad(value)

    def path(self, model: HierarchicalModel, phi: dict[str, Any], task: Task) -> Any:
        """θ_0, …, θ_K (K + 1, d) of one task."""
        start = model.prior.location(phi, task.task_predictors)
        return self._of_one(model, phi, start, task, path=True)

    def _of_one(
        self, model: HierarchicalModel, phi: Any, start: Any, task: Task, *, path: bool = False
    ) -> Any:
        """The steps of one task, on θ as the user's own functions take it."""
        likelihood = model.likelihood
        count = jnp.maximum(task.mask.sum(), 1).astype(start.dtype)

        def value(theta: Any) -> Any:
            return likelihood.log_likelihood(theta, phi, task).sum()

        tree = jax.tree.map(lambda x: x.astype(start.dtype), likelihood.tree(start))
        scaled = dict(phi)
        for name in {"step_size", "tau"} & phi.keys():
            if jnp.ndim(phi[name]):
                scaled[name] = likelihood.tree(phi[name])
        present = task.mask.any()
        found = self._climb(scaled, value, tree, count, present=present, path=path)
        if self.optimiser is not None:
            found = jax.tree.map(lambda end, at: jnp.where(present, end, at), found, tree)
        return jax.vmap(likelihood.vector)(found) if path else likelihood.vector(found)

    def _climb(
        self, phi: Any, value: Any, start: Any, count: Any, *, present: Any = True,
        path: bool = False,
    ) -> Any:  # fmt: skip
        eta = phi["step_size"] if self.step_size is None and self.optimiser is None else None
        per_weight = eta is not None and not _is_number(eta)
        share = count if self.loss == "mean" else 1.0

        rise = self._rise(value, phi.get("tau"), start)

        def slope(theta: Any) -> Any:
            uphill = jax.tree.map(lambda g: g / share, rise(theta))
            if self.derivative == "first-order":
                uphill = jax.lax.stop_gradient(uphill)
            if self.optimiser is not None:
                # Adam and its like have no derivative at a slope of zero, which is that of a task
                # without rows: it climbs a slope of one, and its steps are not taken
                uphill = jax.tree.map(lambda g: jnp.where(present, g, 1.0), uphill)
            return jax.tree.map(jnp.multiply, eta, uphill) if per_weight else uphill

        size = 1.0 if per_weight else (self.step_size if eta is None else eta)
        descent = Descent(
            self.num_steps, size, optimiser=self.optimiser,
            rematerialise=self.derivative == "rematerialised",
        )  # fmt: skip
        if path:
            return descent.path(slope, start)
        if self.derivative == "implicit":
            # step sizes do not move the maximum; A is symmetric without them
            return with_implicit_slope(lambda _, at: descent.run(slope, at), rise, start)
        return descent.run(slope, start)

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Posterior:
        """θ_K of every task, a point; a step size too long for a task is refused, naming it.

        Where the curvature has no bound, ``remarks`` name the tasks whose log likelihood has fallen
        along the steps. Nothing is judged on learned features: φ and its features were learned
        through these very steps.
        """
        fixed = model.likelihood.linear and not isinstance(model.likelihood, Neural)
        said: tuple[str, ...] = ()
        if fixed and self.optimiser is None and not self.proximal:
            eta = phi["step_size"] if self.step_size is None else self.step_size
            check_step_size(eta, model, tasks, phi, self.loss)
            if not bounded(model, tasks, phi):
                said = overshooting(model, tasks, phi, self.num_steps, eta, self.loss)
        if self.optimiser is None:
            groups = model.likelihood.aggregate(tasks)
        else:
            blocks = model.likelihood.blocks(tasks)
            groups = [(positions, (block, None)) for positions, block in blocks]
        with arithmetic(model.likelihood.precision):
            plain, (how, at) = model.without_encoder(), self.for_programs(phi)
            parts = [
                (positions, _steps(how, plain, at, *on_devices(arranged, tasks)))
                for positions, arranged in groups
            ]
            parts = [(positions, gathered(found, len(positions))) for positions, found in parts]
            places = filled_up(tasks.task_predictors, rung(tasks.num_tasks), 0)
            start = model.prior.location(phi, places)
        theta = np.array(start, dtype=np.float64)[: tasks.num_tasks]
        for positions, found in parts:
            theta[positions] = found
        return Point(theta, remarks=_lost(theta, tasks) or said)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _steps(
    adaptation: GradientSteps,
    model: HierarchicalModel,
    phi: dict[str, Any],
    rows: Task,
    of_row: Any,
) -> Any:
    return adaptation.steps(model, phi, rows, of_row)


def _pull(tau: Any, theta: Any, start: Any) -> Any:
    """(θ − θ⁰) / τ², τ a number, or a pytree like θ."""
    moved = jax.tree.map(jnp.subtract, theta, start)
    if _is_number(tau):
        return jax.tree.map(lambda m: m / tau**2, moved)
    return jax.tree.map(lambda m, t: m / t**2, moved, tau)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or getattr(value, "ndim", 1) == 0


def _lost(theta: np.ndarray, tasks: Tasks) -> tuple[str, ...]:
    lost = ~np.isfinite(theta).all(1)
    if not np.any(lost):
        return ()
    return (
        f"gradient steps diverged in {np.sum(lost)} of {tasks.num_tasks} tasks "
        f"({listing(tasks.names[lost].tolist(), 3)}): their theta is not finite; take shorter "
        "steps",
    )
