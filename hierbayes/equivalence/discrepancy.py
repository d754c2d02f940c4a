"""Where tasks are not Gaussian: how far K steps are from the MAP estimate that they stand for."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.curvature import Kind, curvatures_at, run, slopes
from hierbayes.adaptation.descent import Descent, Flow
from hierbayes.adaptation.mode import LogJoint, find_mode
from hierbayes.equivalence.implied import Discrepancy
from hierbayes.equivalence.validity import Status
from hierbayes.errors import InputError, listing
from hierbayes.likelihoods.base import sum_by_task
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.rows import Whole
from hierbayes.tasks import Task, Tasks

WORST = 0.5
"""½ρ² in nats above which the equivalence is said to have stopped holding."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def measure(
    model: HierarchicalModel,
    kind: Kind,
    phi: dict[str, Any],
    rows: Task,
    task_of_row: Any,
    location: jax.Array,
    theta: jax.Array,
    theta_linear: jax.Array,
    curvature: jax.Array,
    precision: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(missed, linearisation, curvature_drift, predictive_kl) of every task; see Discrepancy."""
    num_tasks, d = location.shape
    slope = -slopes(model, phi, rows, task_of_row, theta)
    slope = slope + jnp.einsum("jkl,jl->jk", precision, theta - location)
    there = curvatures_at(model, phi, rows, task_of_row, theta, kind)
    factor = jnp.linalg.cholesky(there + precision)
    white = jax.scipy.linalg.solve_triangular(factor, slope[..., None], lower=True)[..., 0]
    # without a factor the posterior under P is not concave at θ_K: no maximum is near
    missed = jnp.where(jnp.isfinite(factor).all((-2, -1)), 0.5 * (white**2).sum(-1), jnp.inf)
    gap = theta - theta_linear
    squares = jnp.einsum("jk,jkl,jl->j", gap, curvature + precision, gap)
    linearisation = jnp.sqrt(jnp.maximum(squares, 0.0) / d)
    size = jnp.sqrt((curvature**2).sum((-2, -1)))
    drift = jnp.sqrt(((there - curvature) ** 2).sum((-2, -1)))
    drift = jnp.where(size > 0, drift / jnp.where(size > 0, size, 1.0), 0.0)
    tasks = LogJoint(
        model.likelihood, Whole.of(rows, task_of_row), phi, location.T, jnp.eye(d),
        jnp.moveaxis(precision, 0, -1),
    )  # fmt: skip
    mode = find_mode(tasks, (theta - location).T)
    there = tasks.theta(mode.z).T
    by_row = model.likelihood.divergence_of_rows(there, theta, phi, rows, task_of_row)
    counts = sum_by_task(jnp.asarray(rows.mask, float), task_of_row, num_tasks)
    kl = sum_by_task(by_row, task_of_row, num_tasks) / jnp.maximum(counts, 1)
    return missed, linearisation, drift, jnp.where(mode.converged, kl, jnp.nan)


def taken(
    model: HierarchicalModel,
    phi: dict[str, Any],
    rows: Any,
    location: np.ndarray,
    method: Descent | Flow,
    root: np.ndarray,
    tasks: Tasks,
) -> np.ndarray:
    """θ_K (J, d) of the steps themselves; refused where they leave the finite numbers."""
    with float64():
        theta = np.asarray(run(model, phi, *rows, location, method, root))
    lost = ~np.isfinite(theta).all(1)
    if lost.any():
        raise InputError(
            f"the steps themselves diverge in {lost.sum()} of {tasks.num_tasks} task(s) "
            f"({listing(tasks.names[lost].tolist(), 3)}), where the log likelihood bends more away "
            "from phi than at it; take shorter steps"
        )
    return theta


def judge_validity(
    validity: Discrepancy, status: np.ndarray, tasks: Tasks, messages: list[str]
) -> Discrepancy:
    """Say where the equivalence has stopped holding; no MAP estimate exists without a prior."""
    none = status == Status.NO_PRIOR
    broken = (validity.missed > WORST) & ~none
    if broken.any():
        largest = float(validity.missed[broken].max())
        messages.append(
            f"the steps are no longer a MAP estimate in {broken.sum()} of {len(broken)} task(s) "
            f"({listing(tasks.names[broken].tolist(), 3)}): they miss it "
            f"by up to {largest:.2g} nats, since the log likelihood is not quadratic over their "
            "length; take fewer or shorter steps, or use the exact posterior"
        )
    return Discrepancy(
        *(
            np.where(none, np.nan, value) if name in ("missed", "predictive_kl") else value
            for name, value in vars(validity).items()
        )
    )
