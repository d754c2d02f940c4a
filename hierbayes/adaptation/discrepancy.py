"""Where tasks are not Gaussian: how far K steps are from the MAP estimate that they stand for."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from hierbayes.adaptation.curvature import Kind, curvatures_at, slopes
from hierbayes.adaptation.newton import climb
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Task

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
    mode = climb(
        model, phi, rows, task_of_row, location, jnp.eye(d), precision, theta - location, kind
    )
    at_mode, at_theta = (
        model.likelihood.location(t[task_of_row], phi, rows) for t in (mode.theta, theta)
    )
    by_row = model.likelihood.divergence(at_mode, at_theta, phi, rows.slots)
    counts = jnp.maximum(jax.ops.segment_sum(jnp.ones_like(by_row), task_of_row, num_tasks), 1)
    kl = jax.ops.segment_sum(by_row, task_of_row, num_tasks) / counts
    return missed, linearisation, drift, jnp.where(mode.converged, kl, jnp.nan)
