r"""Slope and curvature of every task's log likelihood in its own θ.

.. math::

    g_j = \nabla_\theta \log p(D_j \mid \theta), \qquad
    H_j = -\nabla_\theta^2 \log p(D_j \mid \theta)
    \quad\text{or}\quad
    H_j^{\text{GGN}} = J_j^\top W_j J_j, \;\; W_j = -\partial_f^2 \log p(y \mid f)

with J = ∂f/∂θ. The generalised Gauss–Newton matrix is positive semidefinite where the family is
log-concave in f; both are the same where f is linear in θ. A row moves its own task's θ only, so
one product with the sum over all rows is every task's product: d products give all matrices, and
no row is padded.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Task

Kind = Literal["ggn", "hessian"]


def slopes(
    model: HierarchicalModel, phi: dict[str, Any], rows: Task, task_of_row: Any, thetas: Any
) -> Any:
    """g_j of every task at its own θ (J, …)."""
    return jax.grad(
        lambda t: model.likelihood.log_likelihood_of_rows(t, phi, rows, task_of_row).sum()
    )(thetas)


def products(
    model: HierarchicalModel,
    phi: dict[str, Any],
    rows: Task,
    task_of_row: Any,
    thetas: Any,
    vectors: Any,
    kind: Kind,
) -> Any:
    """H_j v_j of every task, (J, …), without forming H."""
    linear = model.likelihood.linear  # then both are the same
    if kind == "hessian" or linear or not model.likelihood.has_location:
        return -jax.jvp(lambda t: slopes(model, phi, rows, task_of_row, t), (thetas,), (vectors,))[
            1
        ]
    likelihood = model.likelihood

    def outputs(t: Any) -> Any:
        return likelihood.locations(t, phi, rows, task_of_row)

    def slope_in_f(f: Any) -> Any:
        return jax.grad(
            lambda values: jnp.where(
                rows.mask, likelihood.family(values, phi, rows.slots).log_prob(rows.outcome), 0.0
            ).sum()
        )(f)

    f, moved = jax.jvp(outputs, (thetas,), (vectors,))
    weighted = jax.jvp(slope_in_f, (f,), (moved,))[1]
    return -jax.vjp(outputs, thetas)[1](weighted)[0]


def curvatures_at(
    model: HierarchicalModel,
    phi: dict[str, Any],
    rows: Task,
    task_of_row: Any,
    thetas: jax.Array,
    kind: Kind,
) -> jax.Array:
    """H_j of every task, (J, d, d), symmetric, one product a column."""
    d = thetas.shape[-1]

    def column(unit: jax.Array) -> jax.Array:
        vectors = jnp.broadcast_to(unit, thetas.shape)
        return products(model, phi, rows, task_of_row, thetas, vectors, kind)

    columns = jax.lax.map(column, jnp.eye(d, dtype=thetas.dtype))
    matrices = jnp.moveaxis(columns, 0, -1)
    return 0.5 * (matrices + jnp.swapaxes(matrices, -1, -2))
