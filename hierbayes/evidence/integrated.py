r"""The exact evidence with the fixed effects integrated out too.

With b = (μ, Γ, β) normal a priori, b ~ N(b₀, S), everything linear is out of the way and only the
scales ψ = (τ, R, σ) are left:

.. math::

    \log p(D \mid \psi) = -\tfrac12\left[ N \log 2\pi + \log |V| + Q(b_*) - h^\top M^{-1} h
        + \log |M S| \right] + \textstyle\sum_i \log s_i, \qquad
    b \mid D, \psi \sim N(b_* + M^{-1} h,\; M^{-1})

where V = σ² I + R_j Σ R_jᵀ task by task, F the columns of b, M = FᵀV⁻¹F + S⁻¹ and
h = FᵀV⁻¹(y − F b_*) + S⁻¹(b₀ − b_*). Q is the quadratic form at b_*, a value near the answer, so
that the difference loses nothing to cancellation. A direction with S⁻¹ = 0 has a flat prior of
density one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hierbayes.numerics import (
    UNROLL_UP_TO,
    cholesky,
    log_diagonal_sum,
    matmul,
    solve_lower,
    solve_upper,
)
from hierbayes.statistics import Statistics


class NormalBelief(NamedTuple):
    """b ~ N(location, 1/precision), entries independent; precision 0 is flat. Each (P,)."""

    location: Any
    precision: Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "x", "fixed", "y", "gram_below", "slope_below", "square_below", "centre", "belief",
        "num_rows", "log_scale",
    ],
    meta_fields=[],
)  # fmt: skip
@dataclass(frozen=True)
class IntegratedProblem:
    """Statistics laid out for one evaluation after another, y as the residual at b_*.

    ``x`` (d, d, J), ``fixed`` (d, P, J), ``y`` (d, J) are the rows that θ moves, or with a leading
    axis over chunks of tasks, the last of them filled up with empty ones; of the rows below
    only FᵀF (P, P), Fᵀy (P,) and yᵀy are needed. ``num_rows`` and ``log_scale`` are totals,
    ``centre`` is b_* (P,).
    """

    x: Any
    fixed: Any
    y: Any
    gram_below: Any
    slope_below: Any
    square_below: Any
    centre: Any
    belief: NormalBelief
    num_rows: Any
    log_scale: Any


class Integrated(NamedTuple):
    """log p(D | ψ), and b | D, ψ ~ N(mean, (C Cᵀ)⁻¹) with C = ``factor`` lower triangular."""

    log_evidence: jax.Array
    mean: jax.Array
    factor: jax.Array


@functools.partial(jax.jit, static_argnums=1)
def least_squares(stats: Statistics, free_mean: tuple[bool, ...]) -> tuple[Any, Any]:
    """b (P,) without task effects, and the root mean square that it leaves; rough, to start from.

    From normal equations, whose loss of digits does not matter here.
    """
    columns, y = stats.fixed_columns(free_mean, jnp), jnp.asarray(stats.y)
    gram = jnp.einsum("ikj,imj->km", columns, columns)
    size = jnp.sqrt(jnp.diag(gram))
    scaled = gram / jnp.outer(size, size)
    b = jnp.linalg.lstsq(scaled, jnp.einsum("ikj,ij->k", columns, y) / size, rcond=1e-12)[0] / size
    left = y - (columns * b[:, None]).sum(1)
    return b, jnp.sqrt((left**2).sum() / jnp.sum(stats.num_rows))


@functools.partial(jax.jit, static_argnums=(1, 4))
def integrated_problem(
    stats: Statistics,
    free_mean: tuple[bool, ...],
    centre: Any,
    belief: NormalBelief,
    chunk: int | None = None,
) -> IntegratedProblem:
    """Lay out b = (μ_free, Γ row by row, β) around ``centre``, in chunks of so many tasks."""
    d = stats.num_coef
    fixed = stats.fixed_columns(free_mean, jnp)
    y = jnp.asarray(stats.y) - (fixed * centre[:, None]).sum(1)
    below, left = fixed[d:], y[d:]
    return IntegratedProblem(
        _chunked(jnp.asarray(stats.x)[:d], chunk), _chunked(fixed[:d], chunk),
        _chunked(y[:d], chunk),
        jnp.einsum("ikj,imj->km", below, below), jnp.einsum("ikj,ij->k", below, left),
        (left**2).sum(), centre, belief, jnp.sum(stats.num_rows), jnp.sum(stats.log_scale),
    )  # fmt: skip


def _chunked(array: jax.Array, chunk: int | None) -> jax.Array:
    """Tasks from the last axis to (chunks, …, tasks of one)."""
    size = array.shape[-1]
    if chunk is None or size <= chunk:
        return array
    filled = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -size % chunk)])
    return jnp.moveaxis(filled.reshape(*array.shape[:-1], -1, chunk), -2, 0)


class Sums(NamedTuple):
    """Over tasks: yᵀV⁻¹y, log |V|, FᵀV⁻¹F (P, P), FᵀV⁻¹y (P,), of the rows that θ moves."""

    squares: Any
    log_det: Any
    gram: Any
    slope: Any


def _sums(x: jax.Array, fixed: jax.Array, y: jax.Array, root: jax.Array, noise: Any) -> Sums:
    design = matmul(x, root[:, :, None])
    variance = matmul(design, jnp.swapaxes(design, 0, 1)) + noise * jnp.eye(len(root))[:, :, None]
    factor = cholesky(variance)
    white_y, white_f = solve_lower(factor, y), fixed
    if fixed.shape[1]:
        white_f = solve_lower(factor, fixed)
    log_det = 2 * log_diagonal_sum(factor).sum()
    gram, slope = _products(white_f, white_y)
    return Sums((white_y**2).sum(), log_det, gram, slope)


def _all_sums(p: IntegratedProblem, root: jax.Array, noise: Any) -> Sums:
    """Chunk after chunk where there are many tasks, so that what is in use stays in the cache."""
    if p.y.ndim == 2:
        return _sums(p.x, p.fixed, p.y, root, noise)

    def add(total: Sums, part: Any) -> tuple[Sums, None]:
        x, fixed, y = part
        return jax.tree.map(jnp.add, total, _sums(x, fixed, y, root, noise)), None

    num_fixed = p.fixed.shape[2]
    zero = Sums(
        jnp.zeros(()), jnp.zeros(()), jnp.zeros((num_fixed, num_fixed)), jnp.zeros(num_fixed)
    )
    return jax.lax.scan(add, zero, (p.x, p.fixed, p.y))[0]


def integrate(problem: IntegratedProblem, root: jax.Array, sigma: Any) -> Integrated:
    """log p(D | ψ) at the root L of Σ (d, d) and σ, and what b concludes there."""
    p = problem
    d, num_fixed = len(root), p.fixed.shape[-2]
    num_tasks = p.y.size // d  # the empty ones too, for each of which |V| = σ²ᵈ
    noise = sigma**2
    squares, log_det, gram, slope = _all_sums(p, root, noise)
    squares = squares + p.square_below / noise
    log_det = log_det + (p.num_rows - d * num_tasks) * jnp.log(noise)
    total = p.num_rows * jnp.log(2 * jnp.pi) + log_det + squares
    if not num_fixed:
        empty = jnp.zeros(0)
        return Integrated(-0.5 * total + p.log_scale, empty, jnp.zeros((0, 0)))
    location, precision = p.belief
    away = location - p.centre
    inverse = gram + p.gram_below / noise + jnp.diag(precision)
    h = slope + p.slope_below / noise + precision * away
    lower = cholesky(inverse[:, :, None])
    solved = solve_lower(lower, h[:, None])
    flat = precision == 0
    log_prior = jnp.where(flat, jnp.log(2 * jnp.pi), jnp.log(jnp.where(flat, 1.0, precision)))
    total = total + (precision * away**2).sum() - (solved**2).sum()
    total = total + 2 * log_diagonal_sum(lower)[0] - log_prior.sum()
    mean = p.centre + solve_upper(lower, solved)[:, 0]
    return Integrated(-0.5 * total + p.log_scale, mean, lower[:, :, 0])


def _products(f: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """FᵀF (P, P) and Fᵀy (P,) over all rows and tasks; few columns in one pass over the tasks."""
    if f.shape[1] > UNROLL_UP_TO:
        return jnp.einsum("ikj,imj->km", f, f), jnp.einsum("ikj,ij->k", f, y)
    # the squares of F are the matrix product of its transpose with itself, y one more column
    transposed = jnp.swapaxes(f, 0, 1)
    return matmul(transposed, f).sum(-1), matmul(transposed, y[:, None])[:, 0].sum(-1)
