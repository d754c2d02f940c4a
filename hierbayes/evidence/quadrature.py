r"""The evidence of a task that is not Gaussian: adaptive Gauss–Hermite quadrature around its mode.

.. math::

    \log p(D_j \mid \varphi) \approx \log |U_j| + \log \sum_q \bar w_q\,
        e^{\Psi_j(z_j^* + U_j t_q) + \frac12 \lVert t_q \rVert^2}, \qquad
    \Psi_j(z) = \log p(D_j \mid m_j + L z, \varphi) - \tfrac12 \lVert z \rVert^2

with Σ = L Lᵀ, z* the mode of Ψ_j, A_j = −∇²Ψ_j there and A⁻¹ = U Uᵀ. One node is Laplace's
approximation, Ψ_j(z*) − ½ log |A_j|. Whitened by L, A ≥ I for log-concave families: τ → 0 is an
ordinary point. References: Pinheiro and Bates (1995), Journal of Computational and Graphical
Statistics 4(1); Naylor and Smith (1982), Applied Statistics 31(3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hierbayes.adaptation.quadrature import Whitened, climb, grid, newton_step
from hierbayes.likelihoods import Likelihood
from hierbayes.numerics import cholesky, log_diagonal_sum, solve_upper
from hierbayes.priors import Prior
from hierbayes.rows import Rows, Whole


class Evidence(NamedTuple):
    """log p(D_j | φ) (J,), where the mode is (d, J), and whether it was reached (J,)."""

    log_evidence: jax.Array
    mode: jax.Array
    converged: jax.Array


def log_evidence(
    likelihood: Likelihood,
    prior: Prior,
    rows: Rows | Whole,
    phi: dict[str, Any],
    start: jax.Array,
    num_nodes: int,
) -> Evidence:
    """The evidence of every task with ``num_nodes`` nodes a dimension; one is Laplace's.

    Laplace's has right derivatives to second order: two Newton steps follow the mode, of which
    each doubles the order to which the mode depends on φ as it should. With more nodes the nodes
    are held, since the integral does not depend on where they are.
    """
    tasks = Whitened.at(likelihood, prior, rows, phi)
    held = Whitened.at(likelihood, prior, *jax.lax.stop_gradient((rows, phi)))
    found = jax.lax.stop_gradient(climb(held, start))
    if num_nodes == 1:
        z = found.z
        for _ in range(2):
            at = tasks.bend(z)
            z = z + newton_step(at.curvature, at.slope)[0]
        at = tasks.bend(z)
        value = at.value - log_diagonal_sum(cholesky(at.curvature))
        return Evidence(value + tasks.rows.constant, jax.lax.stop_gradient(z), found.converged)
    z = found.z
    for _ in range(2):
        at = held.bend(z)
        z = z + newton_step(at.curvature, at.slope)[0]
    factor = cholesky(held.bend(z).curvature)
    base = held.value(z)
    nodes, log_weights = grid(num_nodes, len(z))

    def term(node: Any, log_weight: Any) -> jax.Array:
        at = z + solve_upper(factor, jnp.broadcast_to(node[:, None], z.shape))
        return jnp.exp(tasks.value(at) - base + log_weight)

    if len(nodes) <= 32:
        total = sum(term(n, w) for n, w in zip(nodes, log_weights, strict=True))
    else:
        step = jax.checkpoint(lambda t, at: (t + term(*at), None))
        total, _ = jax.lax.scan(step, jnp.zeros(z.shape[1]), (nodes, log_weights))
    value = base + jnp.log(total) - log_diagonal_sum(factor)
    return Evidence(value + tasks.rows.constant, z, found.converged)
