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

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hierbayes.adaptation.quadrature import Rays, Rule
from hierbayes.adaptation.whitened import Stand, Whitened, after_newton, climb
from hierbayes.likelihoods import Likelihood
from hierbayes.numerics import cholesky, log_diagonal_sum, solve_lower
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
    rule: Rule | Rays | None,
) -> Evidence:
    """The evidence of every task by the nodes of ``rule``; without one it is Laplace's.

    The nodes are held where they stand at φ: the integral does not depend on where they are, and
    its slope is the mean over them of the slope of log p(D_j, z | φ).
    """
    tasks = Whitened.at(likelihood, prior, rows, phi)
    held = Whitened.at(likelihood, prior, *jax.lax.stop_gradient((rows, phi)))
    found = jax.lax.stop_gradient(climb(held, start))
    if rule is None:
        value, z = _laplace(tasks, found.z)
        return Evidence(value + tasks.rows.constant, jax.lax.stop_gradient(z), found.converged)
    stand = rule.around(held, found.z)
    rule = jax.tree.map(jnp.asarray, rule)
    total: Any = _log_sum(likelihood, _moving(tasks), tasks.rows, stand, rule)
    value = stand.base + total - log_diagonal_sum(stand.factor)
    return Evidence(value + tasks.rows.constant, stand.z, found.converged)


def laplace_near(
    likelihood: Likelihood, prior: Prior, rows: Rows | Whole, phi: dict[str, Any], near: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Laplace's evidence of every task (J,), two Newton steps from ``near`` (d, J).

    Beside it what says how far from a mode the steps have ended: what a third would add to Ψ_j,
    and where Ψ_j may bend upwards, what they have lost instead of gained; NaN off its domain.
    """
    tasks = Whitened.at(likelihood, prior, rows, phi)
    z = after_newton(tasks, near)
    at = tasks.bend(z)
    factor = cholesky(at.curvature)
    missed = 0.5 * (solve_lower(factor, at.slope) ** 2).sum(0)
    if not likelihood.log_concave:
        missed = jnp.maximum(missed, tasks.value(near) - at.value)
    return at.value - log_diagonal_sum(factor) + tasks.rows.constant, missed


def _laplace(tasks: Whitened, near: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ψ_j(z*) − ½ log |A_j| (J,), right to second order, and z*.

    Of the two Newton steps each doubles the order to which the mode depends on φ as it should.
    """
    z = after_newton(tasks, near)
    at = tasks.bend(z)
    return at.value - log_diagonal_sum(cholesky(at.curvature)), z


# what of a Whitened depends on φ: rows that moved, φ, m and L
Moving = tuple[dict[str, Any], dict[str, Any], jax.Array, jax.Array]


def _moving(tasks: Whitened) -> Moving:
    return tasks.rows.moving, tasks.phi, tasks.location, tasks.root


def _values(likelihood: Likelihood, moving: Moving, rows: Rows | Whole, z: jax.Array) -> jax.Array:
    moved, phi, location, root = moving
    return Whitened(likelihood, rows.moved(moved), phi, location, root).value(z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sum(
    likelihood: Likelihood, moving: Moving, rows: Rows | Whole, stand: Stand, rule: Rule | Rays
) -> jax.Array:
    """log Σ_q w̄_q exp(Ψ_j(z_q) − Ψ_j(z*) + ½ |t_q|²) of every task (J,), node after node."""

    def more(q: Any, total: jax.Array) -> jax.Array:
        z, log_weight = rule.node(stand, q)
        value = _values(likelihood, moving, rows, z)
        return total + jnp.exp(value - stand.base + log_weight)

    return jnp.log(jax.lax.fori_loop(0, rule.count, more, jnp.zeros_like(stand.base)))


def _forward(likelihood: Likelihood, *given: Any) -> tuple[jax.Array, Any]:
    value: Any = _log_sum(likelihood, *given)
    return value, (given, value)


def _backward(likelihood: Likelihood, kept: Any, slope: jax.Array) -> Any:
    (moving, rows, stand, rule), found = kept

    def more(q: Any, total: Any) -> Any:
        z, log_weight = rule.node(stand, q)
        value, pull = jax.vjp(lambda m: _values(likelihood, m, rows, z), moving)
        share = jnp.exp(value - stand.base + log_weight - found)
        return jax.tree.map(jnp.add, total, pull(slope * share)[0])

    none = jax.tree.map(jnp.zeros_like, moving)
    return jax.lax.fori_loop(0, rule.count, more, none), None, None, None


_log_sum.defvjp(_forward, _backward)
