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
import numpy as np

from hierbayes.numerics import (
    UNROLL_UP_TO,
    cholesky,
    eliminate,
    log_diagonal_sum,
    log_product,
    solve_lower,
    solve_upper,
    to_numpy,
    total,
)
from hierbayes.statistics import Statistics, design_and_variance


class NormalHyperprior(NamedTuple):
    """b ~ N(location, 1/precision), entries independent; precision 0 is flat. Each (P,)."""

    location: Any
    precision: Any


FEW_COLUMNS = 6
"""Columns of fixed effects and y up to which inverses are quicker than elimination."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "x", "fixed", "y", "gram", "gram_below", "slope_below", "square_below", "centre",
        "hyperprior", "num_rows", "log_scale",
    ],
    meta_fields=[],
)  # fmt: skip
@dataclass(frozen=True)
class IntegratedProblem:
    """Statistics laid out for one evaluation after another, y as the residual at b_*.

    ``x`` (d, d, J), ``fixed`` (d, P, J), ``y`` (d, J) are the rows that θ moves, or with a leading
    axis over chunks of tasks, the last of them filled up with empty ones; ``gram`` is Σ_j R_jᵀR_j
    (d, d). Of the rows below only FᵀF (P, P), Fᵀy (P,) and yᵀy are needed. ``num_rows`` and
    ``log_scale`` are totals, ``centre`` is b_* (P,).
    """

    x: Any
    fixed: Any
    y: Any
    gram: Any
    gram_below: Any
    slope_below: Any
    square_below: Any
    centre: Any
    hyperprior: NormalHyperprior
    num_rows: Any
    log_scale: Any


def amplification(problem: IntegratedProblem, covariance: np.ndarray, sigma: float) -> float:
    """N + Σ_j tr(R_j Σ R_jᵀ) / σ²: how much larger than one what cancels in inverses may be."""
    return float(problem.num_rows) + float((to_numpy(problem.gram) * covariance).sum() / sigma**2)


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
    hyperprior: NormalHyperprior,
    chunk: int | None = None,
) -> IntegratedProblem:
    """Lay out b = (μ_free, Γ row by row, β) around ``centre``, in chunks of so many tasks."""
    d = stats.num_coef
    fixed = stats.fixed_columns(free_mean, jnp)
    y = jnp.asarray(stats.y) - (fixed * centre[:, None]).sum(1)
    below, left, x = fixed[d:], y[d:], jnp.asarray(stats.x)[:d]
    return IntegratedProblem(
        _chunked(x, chunk), _chunked(fixed[:d], chunk), _chunked(y[:d], chunk),
        jnp.einsum("ikj,imj->km", x, x),
        jnp.einsum("ikj,imj->km", below, below), jnp.einsum("ikj,ij->k", below, left),
        (left**2).sum(), centre, hyperprior, jnp.sum(stats.num_rows), jnp.sum(stats.log_scale),
    )  # fmt: skip


def _chunked(array: jax.Array, chunk: int | None) -> jax.Array:
    """Tasks from the last axis to (chunks, …, tasks of one)."""
    size = array.shape[-1]
    if chunk is None or size <= chunk:
        return array
    filled = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -size % chunk)])
    return jnp.moveaxis(filled.reshape(*array.shape[:-1], -1, chunk), -2, 0)


class Sums(NamedTuple):
    """Over tasks, of the rows that θ moves, with W = V / σ².

    yᵀW⁻¹y, log |W|, FᵀW⁻¹F (P, P), FᵀW⁻¹y (P,).
    """

    squares: Any
    log_det: Any
    gram: Any
    slope: Any


def _sums(x: jax.Array, fixed: jax.Array, y: jax.Array, root: jax.Array, *, fast: bool) -> Sums:
    """``root`` is a root of Σ / σ²; ``fast`` as in :func:`integrate`."""
    d, num_fixed = len(root), fixed.shape[1]
    ratio = design_and_variance(x, root)[1]
    columns = jnp.concatenate([fixed, y[:, None]], axis=1)
    if fast and d <= UNROLL_UP_TO and num_fixed < FEW_COLUMNS:
        products, pivots = _products_by_inverse(ratio, columns)
    else:
        rows, pivots = eliminate(ratio, columns)
        parts = zip(rows, pivots, strict=True)
        products = total(jnp.einsum("kj,mj->km", c / pivot, c) for c, pivot in parts)
    return Sums(
        products[-1, -1], log_product(pivots).sum(), products[:num_fixed, :num_fixed],
        products[:num_fixed, -1],
    )  # fmt: skip


def _products_by_inverse(ratio: jax.Array, columns: jax.Array) -> tuple[Any, list[jax.Array]]:
    """Σ_j C_jᵀ W_j⁻¹ C_j, as one matrix product of the inverses with what no point changes."""
    d, width = columns.shape[:2]
    rows, pivots = eliminate(ratio, jnp.eye(d)[:, :, None])
    weighted = [row / pivot for row, pivot in zip(rows, pivots, strict=True)]
    entries = [(a, b) for a in range(d) for b in range(a + 1)]
    inverse = [total(w[a] * row[b] for w, row in zip(weighted, rows, strict=True))
               for a, b in entries]  # fmt: skip
    lower = np.tril_indices(width)
    crossed = [columns[a][:, None] * columns[b][None] for a, b in entries]
    both = [c if a == b else c + jnp.swapaxes(c, 0, 1)
            for c, (a, b) in zip(crossed, entries, strict=True)]  # fmt: skip
    sums = jnp.einsum("ej,epj->p", jnp.stack(inverse), jnp.stack(both)[:, *lower])
    products = jnp.zeros((width, width)).at[lower].set(sums)
    return products + jnp.tril(products, -1).T, pivots


def _all_sums(p: IntegratedProblem, root: jax.Array, *, fast: bool) -> Sums:
    """Chunk after chunk where there are many tasks, so that what is in use stays in the cache."""
    if p.y.ndim == 2:
        return _sums(p.x, p.fixed, p.y, root, fast=fast)

    def add(total: Sums, part: Any) -> tuple[Sums, None]:
        x, fixed, y = part
        return jax.tree.map(jnp.add, total, _sums(x, fixed, y, root, fast=fast)), None

    num_fixed = p.fixed.shape[2]
    zero = Sums(
        jnp.zeros(()), jnp.zeros(()), jnp.zeros((num_fixed, num_fixed)), jnp.zeros(num_fixed)
    )
    return jax.lax.scan(add, zero, (p.x, p.fixed, p.y))[0]


def integrate(
    problem: IntegratedProblem, root: jax.Array, sigma: Any, *, fast: bool = False
) -> Integrated:
    """log p(D | ψ) at the root L of Σ (d, d) and σ, and what b concludes there.

    ``fast`` computes with explicit inverses, for many values of ψ at once: its error in the log
    evidence is that of one rounding, 1e-16, times :func:`amplification`.
    """
    p, num_fixed, noise = problem, problem.fixed.shape[-2], sigma**2
    squares, log_det, gram, slope = _all_sums(p, root / sigma, fast=fast)
    squares = (squares + p.square_below) / noise
    log_det = log_det + p.num_rows * jnp.log(noise)
    value = p.num_rows * jnp.log(2 * jnp.pi) + log_det + squares
    if not num_fixed:
        empty = jnp.zeros(0)
        return Integrated(-0.5 * value + p.log_scale, empty, jnp.zeros((0, 0)))
    location, precision = p.hyperprior
    away = location - p.centre
    inverse = (gram + p.gram_below) / noise + jnp.diag(precision)
    h = (slope + p.slope_below) / noise + precision * away
    lower = cholesky(inverse[:, :, None])
    solved = solve_lower(lower, h[:, None])
    flat = precision == 0
    log_prior = jnp.where(flat, jnp.log(2 * jnp.pi), jnp.log(jnp.where(flat, 1.0, precision)))
    value = value + (precision * away**2).sum() - (solved**2).sum()
    value = value + 2 * log_diagonal_sum(lower)[0] - log_prior.sum()
    mean = p.centre + solve_upper(lower, solved)[:, 0]
    return Integrated(-0.5 * value + p.log_scale, mean, lower[:, :, 0])
