r"""How skew the posterior of a task is: the largest third derivative in whitened directions.

.. math::

    \gamma_j = \max_{\lVert v \rVert = 1} \left|D^3 \Psi_j(z_j^*)[U_j v, U_j v, U_j v]\right|,
    \qquad A_j^{-1} = U_j U_j^\top

It is what Laplace's approximation leaves out first: with one coefficient its relative error begins
with (5/24) γ². Reference: Tierney and Kadane (1986), JASA 81(393).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hierbayes.adaptation.mode import LogJoint
from hierbayes.numerics import solve_upper

ASCENT_STEPS = 60
"""Of the power method from every axis."""


def third_derivatives(tasks: LogJoint, z: jax.Array, factor: jax.Array) -> jax.Array:
    """D³Ψ_j (d, d, d, J) at z (d, J) along the columns of U_j, from factors of A_j (d, d, J)."""
    d, identity = len(z), jnp.broadcast_to(jnp.eye(len(z))[:, :, None], factor.shape)
    columns = jnp.stack([solve_upper(factor, identity[:, k]) for k in range(d)], axis=1)

    def along(k: jax.Array) -> jax.Array:
        direction = jnp.take(columns, k, axis=1)
        bent = jax.jvp(lambda at: tasks.bend(at).curvature, (z,), (direction,))[1]
        return -jnp.einsum("abj,apj,bqj->pqj", bent, columns, columns)

    return jax.lax.map(along, jnp.arange(d))


def largest(tensors: jax.Array) -> jax.Array:
    """max |T[v, v, v]| over unit vectors, (J,), of symmetric tensors (d, d, d, J).

    By the power method with a shift, which never falls (Kolda and Mayo 2011, SIAM Journal on Matrix
    Analysis 32(4)), from every axis and every diagonal between two.
    """
    d, num_tasks = tensors.shape[0], tensors.shape[-1]
    if d == 1:
        return jnp.abs(tensors[0, 0, 0])
    unit = jnp.eye(d)
    pairs = [unit[i] + s * unit[k] for i in range(d) for k in range(i) for s in (1.0, -1.0)]
    starts = jnp.stack([*unit, *(pair / jnp.sqrt(2.0) for pair in pairs)])
    shift = jnp.sqrt((tensors**2).sum((0, 1, 2)))

    def ascend(start: jax.Array) -> jax.Array:
        def step(v: jax.Array, _: None) -> tuple[jax.Array, None]:
            pull = jnp.einsum("abcj,bj,cj->aj", tensors, v, v)
            turned = jnp.where((pull * v).sum(0) < 0, -v, v)  # T is odd
            v = pull + 2.0 * shift * turned
            return v / jnp.maximum(jnp.sqrt((v**2).sum(0)), 1e-300), None

        first = jnp.broadcast_to(start[:, None], (d, num_tasks))
        v, _ = jax.lax.scan(step, first, None, length=ASCENT_STEPS)
        return jnp.abs(jnp.einsum("abcj,aj,bj,cj->j", tensors, v, v, v))

    return jax.lax.map(ascend, starts).max(0)


def skewness(tasks: LogJoint, z: jax.Array, factor: jax.Array) -> jax.Array:
    """γ_j of every task, (J,), at its mode z (d, J) with a lower factor of A_j (d, d, J)."""
    return largest(third_derivatives(tasks, z, factor))
