r"""The exact evidence with fixed effects and noise maximised out, as lme4 does.

Given the relative root covariance Λ (Σ = σ² Λ Λᵀ) the evidence is a generalised least-squares
problem in the fixed effects b = (μ, Γ, β), solved in closed form, and so is σ²:

.. math::

    -2\ell_{\text{ML}} &= N (1 + \log 2\pi\hat\sigma^2) + \textstyle\sum_j \log |I + R_j\Lambda
        \Lambda^\top R_j^\top|, & \hat\sigma^2 &= Q / N \\
    -2\ell_{\text{REML}} &= (N-P)(1 + \log 2\pi\hat\sigma^2) + \textstyle\sum_j \log|\cdot|
        + \log |F^\top V^{-1} F|, & \hat\sigma^2 &= Q / (N-P)

with Q the generalised residual sum of squares and F the columns of the P fixed effects. With known
standard errors σ = 1 and Λ is the root covariance itself. Reference: Bates et al. (2015), Fitting
linear mixed-effects models using lme4, equations 30 to 42.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.numerics import cholesky, log_diagonal_sum, solve_lower, triangle
from hierbayes.priors.hyperprior import Shape
from hierbayes.statistics import Statistics, design_and_variance


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["x", "fixed", "y", "num_rows", "log_scale", "whitener"],
    meta_fields=["reml", "known_noise"],
)
@dataclass(frozen=True)
class ProfileProblem:
    """Statistics with the fixed effects' columns, whitened so that FᵀF = I.

    ``x`` (d, d, J), ``fixed`` (m, P, J), ``y`` (m, J); ``whitener`` (P, P) upper triangular T with
    F = fixed · T.
    """

    x: Any
    fixed: Any
    y: Any
    num_rows: Any
    log_scale: Any
    whitener: Any
    reml: bool
    known_noise: bool


class Profile(NamedTuple):
    """What a value of Λ implies: ``fixed`` (P,) effects, their ``covariance``, ``sigma``."""

    log_evidence: jax.Array
    fixed: jax.Array
    covariance: jax.Array
    sigma: jax.Array


def profile_problem(
    stats: Statistics, shape: Shape, *, reml: bool, known_noise: bool
) -> ProfileProblem:
    """Lay out the fixed effects b = (μ_free, Γ, β) and whiten them over all tasks together.

    Statistics that lie on a device, or on many, stay there.
    """
    on_host = isinstance(stats.x, np.ndarray)
    whiten = _whiten_on_host if on_host else _whiten_on_device
    fixed, whitener = whiten(stats, shape.free_mean)
    return ProfileProblem(
        stats.x[: stats.num_coef], fixed, stats.y, stats.num_rows, stats.log_scale, whitener,
        reml, known_noise,
    )  # fmt: skip


def _whiten_on_host(
    stats: Statistics, free_mean: tuple[bool, ...]
) -> tuple[np.ndarray, np.ndarray]:
    columns = stats.fixed_columns(free_mean)
    num_fixed = columns.shape[1]
    num_rows = columns.shape[0] * columns.shape[2]
    whitener = triangle(np.moveaxis(columns, 1, -1).reshape(num_rows, num_fixed))
    white = np.empty_like(columns)
    for i in range(num_fixed):  # forward substitution, column by column
        known = sum((whitener[k, i] * white[:, k] for k in range(i)), start=np.zeros(()))
        white[:, i] = (columns[:, i] - known) / whitener[i, i]
    return white, whitener


@functools.partial(jax.jit, static_argnums=1)
def _whiten_on_device(
    stats: Statistics, free_mean: tuple[bool, ...]
) -> tuple[jax.Array, jax.Array]:
    """By sums over tasks only, which devices can share: Cholesky three times, the first shifted.

    Each round squares the condition of what it is given, but leaves what the next finds well
    conditioned. Reference: Fukaya et al. (2020), Shifted Cholesky QR, SIAM J. Sci. Comput. 42(1).
    """
    columns = stats.fixed_columns(free_mean, jnp)
    whitener = jnp.diag(jnp.sqrt((columns**2).sum((0, 2))))
    white = columns / jnp.diag(whitener)[:, None]
    for shift in (1e-14, 0.0, 0.0):
        gram = jnp.einsum("mpj,mqj->pq", white, white)
        factor = jnp.linalg.cholesky(gram + shift * len(gram) * jnp.eye(len(gram)))
        white = jnp.einsum("mpj,qp->mqj", white, jnp.linalg.inv(factor))
        whitener = factor.T @ whitener
    return white, whitener


@jax.jit
def profile(problem: ProfileProblem, root: jax.Array, sigma: Any = jnp.nan) -> Profile:
    """The profiled log evidence at the relative root covariance Λ (d, d).

    ``sigma``, where given, fixes σ instead of maximising over it; Σ is then σ² Λ Λᵀ.
    """
    p = problem
    d, num_fixed = root.shape[0], p.fixed.shape[1]
    factor = cholesky(design_and_variance(jnp.asarray(p.x), root)[1])
    white_y = solve_lower(factor, jnp.asarray(p.y[:d]))
    white_f = solve_lower(factor, jnp.asarray(p.fixed[:d]))
    below_y, below_f = jnp.asarray(p.y[d:]), jnp.asarray(p.fixed[d:])
    total = p.num_rows.sum()
    log_det = 2 * log_diagonal_sum(factor).sum()
    if num_fixed:
        gram = jnp.einsum("ikj,imj->km", white_f, white_f)
        gram = gram + jnp.einsum("ikj,imj->km", below_f, below_f)
        target = jnp.einsum("ikj,ij->k", white_f, white_y)
        target = target + jnp.einsum("ikj,ij->k", below_f, below_y)
        gram_factor = jnp.linalg.cholesky(gram)
        effects = jax.scipy.linalg.cho_solve((gram_factor, True), target)
        above = white_y - jnp.einsum("ikj,k->ij", white_f, effects)
        below = below_y - jnp.einsum("ikj,k->ij", below_f, effects)
        squares = (above**2).sum() + (below**2).sum()
        unwhiten = jnp.linalg.inv(jnp.asarray(p.whitener))
        fixed = unwhiten @ effects
        spread = unwhiten @ jax.scipy.linalg.cho_solve((gram_factor, True), unwhiten.T)
        log_gram = 2 * jnp.log(jnp.diag(gram_factor)).sum()
        log_gram = log_gram + 2 * jnp.log(jnp.abs(jnp.diag(jnp.asarray(p.whitener)))).sum()
    else:
        squares = (white_y**2).sum() + (below_y**2).sum()
        fixed, spread, log_gram = jnp.zeros(0), jnp.zeros((0, 0)), jnp.zeros(())
    if p.reml:
        total, log_det = total - num_fixed, log_det + log_gram
    best = jnp.ones(()) if p.known_noise else jnp.sqrt(squares / total)
    sigma = jnp.where(jnp.isnan(sigma), best, sigma)
    minus_two = total * jnp.log(2 * jnp.pi * sigma**2) + squares / sigma**2
    evidence = -0.5 * (minus_two + log_det) + p.log_scale.sum()
    return Profile(evidence, fixed, sigma**2 * spread, sigma)


@jax.jit
def profile_and_slopes(
    problem: ProfileProblem, root: jax.Array, sigma: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The profiled log evidence and its slopes in Λ (d, d) and in σ, zero where σ is NaN."""
    return jax.value_and_grad(lambda r, s: profile(problem, r, s).log_evidence, argnums=(0, 1))(
        root, sigma
    )
