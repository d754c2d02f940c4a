r"""The evidence of every task under many values of φ.

.. math:: \log p(D_j \mid \varphi_s), \qquad s = 1..S, \; j = 1..J

What draws of φ are weighed by: when new tasks arrive, and when one is left out. Exact of Gaussian
tasks; of others by quadrature around the mode, and by Laplace's approximation in many dimensions.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.quadrature import rule_of
from hierbayes.evidence import exact, quadrature
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.priors import Prior
from hierbayes.rows import Rows, Whole, rows_of
from hierbayes.sharding import gathered
from hierbayes.statistics import Statistics, placed_statistics
from hierbayes.tasks import Tasks

NODES = {1: 15, 2: 9, 3: 5}
"""Nodes a dimension where a fit has none of its own; Laplace's approximation beyond."""

DRAWS_AT_ONCE, ROWS_AT_ONCE = 64, 200_000
"""Draws of Gaussian tasks, and draws × rows of others, that are worked on together."""


def log_evidence_over_draws(
    model: HierarchicalModel,
    tasks: Tasks,
    phis: dict[str, np.ndarray],
    num_nodes: int | None = None,
) -> np.ndarray:
    """log p(D_j | φ_s) of every draw and task, (S, J).

    Parameters
    ----------
    model : HierarchicalModel
    tasks : Tasks
    phis : dict
        φ by name, the S draws on a leading axis.
    num_nodes : int, optional
        Nodes a dimension where tasks are not Gaussian; one is Laplace's approximation.
    """
    with float64():
        if model.likelihood.gaussian_in_theta:
            found = _of_gaussian_tasks(placed_statistics(tasks), model.prior, phis)
            return gathered(found, tasks.num_tasks, axis=1)
        model.require_gaussian_prior(
            "the evidence of tasks that are not Gaussian (for leave_one_task_out, for adapt)",
            "it is not offered there", "take priors.Gaussian()",
        )  # fmt: skip
        rows = rows_of(tasks, model.likelihood)
        nodes = NODES.get(len(tasks.coef), 1) if num_nodes is None else num_nodes
        start = np.zeros((len(tasks.coef), tasks.num_tasks))
        counted = np.ones(tasks.num_tasks, bool)
        return of_draws(model.without_encoder(), phis, rows, start, counted, nodes)


@functools.partial(jax.jit, static_argnums=1)
def _of_gaussian_tasks(stats: Statistics, prior: Prior, phis: dict[str, Any]) -> jax.Array:
    def one(phi: dict[str, Any]) -> jax.Array:
        return exact.log_evidence(stats, prior, phi)

    return jax.lax.map(one, phis, batch_size=DRAWS_AT_ONCE)


@functools.partial(jax.jit, static_argnums=(0, 5))
def of_tasks(
    model: HierarchicalModel, phi: dict[str, Any], rows: Rows | Whole, start: Any, counted: Any,
    num_nodes: int,
) -> Any:  # fmt: skip
    """(log p̂(D_j | φ), zero where not ``counted``; the mode) of tasks that are not Gaussian."""
    rule = rule_of(num_nodes, len(start))
    found = quadrature.log_evidence(model.likelihood, model.prior, rows, phi, start, rule)
    return jnp.where(counted, found.log_evidence, 0.0), found.mode


def of_draws(
    model: HierarchicalModel, phis: dict[str, Any], rows: Rows | Whole, start: Any, counted: Any,
    num_nodes: int,
) -> np.ndarray:  # fmt: skip
    """log p̂(D_j | φ_s) (S, J) of tasks that are not Gaussian; use it in float64."""
    batch = int(np.clip(ROWS_AT_ONCE // max(rows.num_cells, 1), 1, 256))
    return np.asarray(_of_draws(model, phis, rows, start, counted, num_nodes, batch))


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _of_draws(
    model: HierarchicalModel, phis: dict[str, Any], rows: Rows | Whole, start: Any, counted: Any,
    num_nodes: int, batch: int,
) -> Any:  # fmt: skip
    def one(phi: dict[str, Any]) -> Any:
        return of_tasks(model, phi, rows, start, counted, num_nodes)[0]

    return jax.lax.map(one, phis, batch_size=batch)
