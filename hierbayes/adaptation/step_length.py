r"""How long gradient steps on a task may be.

.. math:: \eta \le \frac{1}{\lambda_{\max}}, \qquad
          \lambda_{\max} = \max_j \lambda_{\max}(X_j^\top C_j X_j), \qquad
          c_{ij} \ge -\partial_f^2 \log p(y_{ij} \mid f)

Steps of that length never overshoot, and beyond 2/λ_max they diverge, or can: c is the curvature
itself of Gaussian rows, and the largest that any f can give a Bernoulli, binomial or Student-t row.

On a log scale (counts, positive amounts) no such bound exists: a rate grows without end. There c is
a row's **largest curvature between where the steps start and its own outcome**, the f that explains
the row best: steps that do not overshoot stay between. Where φ is still to be learned they are
taken to start at the overall level, where the outer loop starts too, so that "auto" is one number
throughout training. Of a NumPyro program, which has no f, λ_max is that of −∇² log p(D_j | θ) where
the steps start. Neither is a bound, and nothing is refused by it: the steps themselves are watched,
and tasks whose log likelihood falls along the way are named.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.curvature import curvatures_at
from hierbayes.errors import InputError, listing
from hierbayes.likelihoods import Likelihood
from hierbayes.likelihoods.base import sum_by_task
from hierbayes.likelihoods.generalised import GeneralisedLinear
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.sharding import gathered
from hierbayes.tasks import Task, Tasks
from hierbayes.tasks.layout import on_devices

BETWEEN = np.linspace(0.0, 1.0, 9)
"""Where between two values of f a row's curvature is read: it is smooth and has one summit."""

FALLS = 1e-9
"""Share of a log likelihood by which rounding may make it fall."""


def bounded(model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> bool:
    """Whether some curvature of a row is never exceeded, whatever θ."""
    with float64():
        return bool(np.isfinite(model.likelihood.curvature_bound(phi, tasks.slots)).all())


def largest_between(
    likelihood: Likelihood, start: Any, phi: dict[str, Any], slots: dict[str, Any], outcome: Any
) -> Any:
    """A row's largest curvature between f = ``start`` and its own outcome, (n,)."""
    assert isinstance(likelihood, GeneralisedLinear)
    end = likelihood.best_location(outcome, slots)
    bend: Any = 0.0
    for share in BETWEEN:
        _, _, second = likelihood.to_second_order(
            start + share * (end - start), phi, slots, outcome
        )
        bend = jnp.maximum(bend, -second)
    return bend * slots.get("weight", 1.0)


def row_curvature(likelihood: Likelihood, level: float, phi: dict[str, Any], rows: Task) -> Any:
    """c of each row: its bound, or the largest between the overall level and its own outcome."""
    bound = likelihood.curvature_bound(phi, rows.slots)
    if not isinstance(bound, float) or np.isfinite(bound):
        return bound
    outcome = jnp.where(rows.mask, rows.outcome, 1.0)
    start = level + rows.slots.get("offset", 0.0) + jnp.zeros(outcome.shape)
    return largest_between(likelihood, start, phi, rows.slots, outcome)


def _bounds(model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> np.ndarray:
    """c of each row (N,), from φ's own location where it is known."""
    likelihood = model.likelihood
    with float64():
        if bounded(model, tasks, phi):
            return np.asarray(likelihood.curvature_bound(phi, tasks.slots))
        arranged = tasks.flat(), tasks.task_of_row
        rows, of_row = on_devices(arranged, tasks.shard(None))  # filled up
        if "mu" not in phi:
            found = row_curvature(likelihood, likelihood.units(tasks)[0], phi, rows)
        else:
            thetas = jnp.asarray(model.prior.location(phi, rows.task_predictors))
            start = likelihood.locations(thetas, phi, rows, of_row)
            outcome = np.where(rows.mask, rows.outcome, 1.0)
            found = largest_between(likelihood, start, phi, rows.slots, outcome)
        return np.asarray(found)[: tasks.num_rows]


def curvatures(
    model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any], loss: str = "sum"
) -> np.ndarray:
    """Eigenvalues of each task's XᵀCX, ascending, (J, d); zero without rows.

    Of −∇² log p(D_j | θ) exactly for Gaussian tasks; elsewhere with C as above. ``loss="mean"``: of
    the mean over a task's rows.
    """
    if not model.likelihood.has_location:
        return _of_programs(model, tasks, phi, loss)
    tasks = model.likelihood.design(tasks, phi)
    bound = _bounds(model, tasks, phi)
    scaled = tasks.predictors * np.sqrt(np.broadcast_to(bound, tasks.num_rows))[:, None]
    grams = np.zeros((tasks.num_tasks, scaled.shape[1], scaled.shape[1]))
    np.add.at(grams, tasks.task_of_row, scaled[:, :, None] * scaled[:, None, :])
    if loss == "mean":
        grams /= np.maximum(tasks.sizes, 1)[:, None, None]
    return np.linalg.eigvalsh(grams)


def _of_programs(
    model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any], loss: str
) -> np.ndarray:
    """Sizes of the eigenvalues of −∇² log p(D_j | θ) at φ's location, or at 0, ascending."""
    with float64():
        thetas = jnp.zeros((tasks.num_tasks, len(tasks.coef)))
        if "mu" in phi:
            thetas = jnp.asarray(model.prior.location(phi, tasks.task_predictors))
        arranged = model.likelihood.arrange(tasks)
        found = curvatures_at(model.without_encoder(), phi, *arranged, thetas, "hessian")
    sizes = np.sort(np.abs(np.linalg.eigvalsh(np.asarray(found))), axis=1)
    return sizes / np.maximum(tasks.sizes, 1)[:, None] if loss == "mean" else sizes


def largest_curvature(
    model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any], loss: str = "sum"
) -> np.ndarray:
    """λ_max of each task, (J,)."""
    return curvatures(model, tasks, phi, loss)[:, -1]


def check_step_size(
    step_size: Any,
    model: HierarchicalModel,
    tasks: Tasks,
    phi: dict[str, Any],
    loss: str = "sum",
) -> None:
    """Refuse a step size at which some task's gradient steps diverge, or can diverge.

    Of step sizes by coefficient the longest is judged; shorter ones beside it can only help. Where
    the curvature has no bound nothing but the sign is judged.
    """
    step_size = float(np.max(step_size))
    if not (np.isfinite(step_size) and step_size > 0):
        raise InputError(f"step_size must be positive, found {step_size}")
    if not bounded(model, tasks, phi):
        return
    curvature = largest_curvature(model, tasks, phi, loss)
    product = step_size * curvature
    if (bad := product > 2).any():
        worst = int(np.argmax(product))
        certain = "makes" if model.likelihood.gaussian_in_theta else "can make"
        units = f"{loss}-of-log-likelihood units"
        raise InputError(
            f"step_size={step_size:.3g} {certain} gradient steps diverge in {bad.sum()} of "
            f"{tasks.num_tasks} tasks, most in {tasks.names.tolist()[worst]!r} "
            f"({tasks.sizes[worst]} rows), where it must stay below 2/λ_max = "
            f"{2 / curvature[worst]:.3g}; step sizes are in {units}, "
            'and "auto" takes 1/λ_max over all tasks'
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _watched(
    model: HierarchicalModel,
    num_steps: int,
    loss: str,
    phi: dict[str, Any],
    eta: Any,
    rows: Task,
    task_of_row: Any,
) -> jax.Array:
    """Whether a task's log likelihood falls along the steps, (J,) of bool."""
    start = model.prior.location(phi, rows.task_predictors)
    num_tasks = len(start)
    share = jnp.ones(num_tasks)
    if loss == "mean":
        share = jnp.maximum(
            sum_by_task(jnp.asarray(rows.mask, start.dtype), task_of_row, num_tasks), 1
        )

    def ascend(thetas: Any) -> tuple[Any, Any]:
        def total(t: Any) -> Any:
            each = model.likelihood.log_likelihood_of_rows(t, phi, rows, task_of_row)
            return each.sum(), sum_by_task(each, task_of_row, num_tasks)

        slope, values = jax.grad(total, has_aux=True)(thetas)
        return thetas + eta * slope / share[:, None], values

    def step(carry: Any, _: None) -> tuple[Any, None]:
        thetas, before, fell = carry
        after, values = ascend(thetas)
        fell = fell | ~(values >= before - FALLS * (1 + jnp.abs(before)))
        return (after, values, fell), None

    first, value = ascend(start)
    carry = (first, value, jnp.zeros(num_tasks, bool))
    # one more than the steps, so that the value at θ_K is seen too
    return jax.lax.scan(step, carry, None, num_steps)[0][2]


def overshooting(
    model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any], num_steps: int, step_size: Any,
    loss: str = "sum",
) -> tuple[str, ...]:  # fmt: skip
    """Which tasks' log likelihood falls along K steps from φ, in words: none where all climb."""
    with float64():
        rows = on_devices(model.likelihood.arrange(tasks), tasks)
        plain = model.without_encoder()
        found = _watched(plain, num_steps, loss, dict(phi), step_size, *rows)
        fell = gathered(found, tasks.num_tasks)
    if not fell.any():
        return ()
    names = listing(tasks.names[fell].tolist(), 3)
    return (
        f"gradient steps of {float(np.max(step_size)):.3g} overshoot in {fell.sum()} of "
        f"{tasks.num_tasks} tasks ({names}): the log likelihood falls along the way, so that more "
        "steps do not lead nearer to the task's own optimum and no Gaussian prior makes them a MAP "
        "estimate; take shorter steps",
    )
