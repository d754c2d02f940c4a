r"""The evidence of every task by any rule of nodes around its mode, the nodes held.

.. math::

    \log \hat p_r(D_j \mid \varphi) = \log |U_j| + \log \sum_q
        e^{\Psi_j(z_j^* + U_j t_{rq}; \varphi) + \log \bar w_{rq} + \frac12 \lVert t_{rq} \rVert^2},
    \qquad
    \log \tilde p = R \log \bar p - \tfrac{R - 1}{R} \sum_r \log \bar p_{(-r)}

The modes z* and roots U_j are those of one φ̂; around it the sum is differentiable, because an
integral does not depend on where its nodes stand. Where a rule has R replicates, the second line is
the jackknife: it takes away the logarithm's bias, of order 1/Q, and its leave-one-out values give
a standard error.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hierbayes.adaptation.whitened import Stand, Whitened
from hierbayes.numerics import log_diagonal_sum, solve_upper


def by_replicate(tasks: Whitened, held: Stand, nodes: Any, log_weights: Any) -> jax.Array:
    """log p̂_r(D_j | φ) (R, J), for nodes (R, Q, K, d) and their log weights (R, Q, K).

    The j-th task takes the nodes of the run j modulo K.
    One node is worked on at a time, and nothing of it is kept for the derivative: memory is that
    of one evaluation of the likelihood, whatever Q is.
    """
    run = jnp.arange(held.z.shape[1]) % nodes.shape[2]

    @jax.checkpoint
    def add(total: jax.Array, node: Any) -> tuple[jax.Array, None]:
        place, log_weight = node
        moved = solve_upper(held.factor, place.T[:, run])
        value = tasks.value(held.z + moved) - held.base + log_weight[run]
        return total + jnp.exp(value), None

    def replicate(rule: Any) -> jax.Array:
        return jnp.log(jax.lax.scan(add, jnp.zeros(held.z.shape[1]), rule)[0])

    logs = jax.lax.map(replicate, (jnp.asarray(nodes), jnp.asarray(log_weights)))
    return logs + held.base - log_diagonal_sum(held.factor) + tasks.rows.constant


def pooled(logs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p̃ (J,) from replicates (R, J) by the jackknife, and its R leave-one-out values (R, J).

    Of a single replicate: itself, and no values (0, J).
    """
    size = len(logs)
    if size == 1:
        return logs[0], logs[:0]
    base = logs.max(0)
    parts = jnp.exp(logs - base)
    whole = jnp.log(parts.mean(0))
    without = jnp.log((parts.sum(0) - parts) / (size - 1))
    return base + size * whole - (size - 1) * without.mean(0), base + without


def jackknife_error(without: Any) -> Any:
    """Standard error from leave-one-out values (R, …) of a statistic; NaN where there are none."""
    size = len(without)
    if not size:
        return jnp.full(without.shape[1:], jnp.nan)
    return jnp.sqrt((size - 1) / size * ((without - without.mean(0)) ** 2).sum(0))
