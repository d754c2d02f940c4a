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

The profiled evidence near one Λ, from sums over tasks alone; see :mod:`.curved`.

The profiled evidence with its first and second derivatives, in one pass over the tasks.

With A = ΛΛᵀ, V_j = I + R_j A R_jᵀ and S_j = [F_j, y_j − F_j b₀] the tasks enter the evidence by

.. math::

    \textstyle\sum_j \log|V_j|, \qquad C = \sum_j S_j^\top V_j^{-1} S_j

only, and both have short derivatives in A: with M_j = RᵀV⁻¹R and U_j = RᵀV⁻¹S,

.. math::

    \log|V(A + \delta)| &= \log|V| + \operatorname{tr} M\delta
        - \tfrac12 \operatorname{tr} M\delta M\delta + O(\delta^3), \\
    C(A + \delta) &= C + \textstyle\sum_j \left(-U^\top\delta U + U^\top\delta M\delta U\right)
        + O(\delta^3).

The sums over tasks of M, M ⊗ M, U ⊗ U and U ⊗ U ⊗ M therefore give the evidence near A, exact to
second order, in whatever parameters: a Newton step and standard errors cost one pass. Tasks are
taken by the thousand, so that what lies between stays in the processor's cache. b₀ is the last
value of the fixed effects, which makes the residual sum of squares a sum without cancellation.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.numerics import (
    UNROLL_UP_TO,
    cholesky,
    float64,
    log_diagonal_sum,
    solve_lower,
    triangle,
)
from hierbayes.priors.hyperprior import Shape
from hierbayes.sharding import on_device
from hierbayes.statistics import Statistics, design_and_variance

Slopes = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Terms:
    """What does not depend on Λ: the whitener T (P, P) and which criterion is asked for."""

    whitener: np.ndarray
    reml: bool
    known_noise: bool


class Sums(NamedTuple):
    """Sums over tasks: log|V|; M (d, d); M ⊗ M; C (q, q); U ⊗ U; U ⊗ U ⊗ M; rows; log scale."""

    log_det: float
    m: np.ndarray
    mm: np.ndarray
    gram: np.ndarray
    uu: np.ndarray
    uum: np.ndarray
    num_rows: float
    log_scale: float

    @classmethod
    def unpacked(cls, raw: Any, d: int) -> Sums:
        """From the distinct entries of the symmetric products."""
        width = raw.gram.shape[0]
        size = d * width
        pairs, halves = _places(size), _places(d)
        num_pairs = size * (size + 1) // 2
        products = np.concatenate([raw.products[:1], raw.products[1:][halves.ravel()]])
        uu = products[:, :num_pairs][:, pairs].reshape(-1, d, width, d, width)
        m = products[:, num_pairs:][:, halves]
        return cls(
            float(raw.log_det), m[0], m[1:].reshape(d, d, d, d), raw.gram,
            uu[0], uu[1:].reshape(d, d, d, width, d, width), *raw.counts.tolist(),
        )  # fmt: skip


class Nearby:
    """The evidence near Λ₀, exact to second order in ΛΛᵀ − Λ₀Λ₀ᵀ: value, slopes, curvature."""

    def __init__(self, root: np.ndarray, sums: Sums, effects: np.ndarray, terms: Terms):
        self.root, self.sums, self.terms, self._start = root, sums, terms, effects
        with np.errstate(all="ignore"):  # a Λ of no finite evidence is for the search to see
            self.profile = self._profile()

    @property
    def effects(self) -> np.ndarray:
        """The best whitened fixed effects at Λ₀, (P,)."""
        return self._start + self._solved(self.sums.gram)[1]

    def value_and_slope(self, root: np.ndarray, sigma: float = np.nan) -> tuple[float, Slopes]:
        """The evidence and its slopes in Λ and σ; σ is maximised out where it is NaN."""
        with np.errstate(all="ignore"):
            return self._value_and_slope(root, sigma)

    def _value_and_slope(self, root: np.ndarray, sigma: float) -> tuple[float, Slopes]:
        s = self.sums
        move = root @ root.T - self.root @ self.root.T
        gram, log_det, by_matrix = s.gram, s.log_det, s.m
        half: Any = 0.0
        if move.any():
            half = np.einsum("cexkyl,ey->cxkl", s.uum, move)  # Σ_j M_ce U_xk (δU)_el
            second = np.einsum("cxkl,xc->kl", half, move)
            gram = gram - np.einsum("akbl,ab->kl", s.uu, move) + 0.5 * (second + second.T)
            turned = np.einsum("abce,bc->ae", s.mm, move)
            log_det = log_det + (s.m * move).sum() - 0.5 * (turned * move).sum()
            by_matrix = s.m - turned
        squares, step, inverse = self._solved(gram)
        total = s.num_rows - len(step) * self.terms.reml
        given = np.isfinite(sigma)
        best = 1.0 if self.terms.known_noise else np.sqrt(squares / total)
        noise = sigma if given else best
        value = self._value(total, squares, noise, log_det, inverse)
        toward = np.append(-step, 1.0)
        weight = np.outer(toward, toward) / noise**2
        if self.terms.reml:
            weight[:-1, :-1] += inverse
        by_matrix = by_matrix - np.einsum("akbl,kl->ab", s.uu, weight)
        if move.any():
            bent = np.einsum("cxkl,kl->xc", half, weight)
            by_matrix = by_matrix + bent + bent.T
        by_root = -0.5 * (by_matrix + by_matrix.T) @ root
        by_sigma = (squares / noise**2 - total) / noise if given else 0.0
        return float(value), (by_root, np.asarray(by_sigma))

    def _value(
        self, total: float, squares: float, noise: Any, log_det: float, inverse: np.ndarray
    ) -> Any:
        if self.terms.reml:
            log_det = log_det - np.linalg.slogdet(inverse)[1]
            log_det = log_det + 2 * np.log(np.abs(np.diag(self.terms.whitener))).sum()
        minus_two = total * np.log(2 * np.pi * noise**2) + squares / noise**2 + log_det
        return -0.5 * minus_two + self.sums.log_scale

    def _solved(self, gram: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
        """(residual sum of squares, step in the effects, inverse of FᵀV⁻¹F); NaN if singular."""
        size = len(gram) - 1
        try:
            np.linalg.cholesky(gram[:size, :size])
            inverse = np.linalg.inv(gram[:size, :size])
        except np.linalg.LinAlgError:
            inverse = np.full((size, size), np.nan)
        step = inverse @ gram[:size, -1]
        return gram[-1, -1] - gram[:size, -1] @ step, step, inverse

    def _profile(self) -> Profile:
        squares, step, inverse = self._solved(self.sums.gram)
        total = self.sums.num_rows - len(step) * self.terms.reml
        sigma = np.ones(()) if self.terms.known_noise else np.sqrt(squares / total)
        unwhiten = np.linalg.inv(self.terms.whitener)
        value = self._value(total, squares, sigma, self.sums.log_det, inverse)
        spread = sigma**2 * unwhiten @ inverse @ unwhiten.T
        found: tuple[Any, ...] = (value, unwhiten @ (self._start + step), spread, sigma)
        return Profile(*found)


def _places(size: int) -> np.ndarray:
    """Where the entry (i, k) of a symmetric matrix stands among those with i ≤ k, (size, size)."""
    rows, columns = np.triu_indices(size)
    places = np.zeros((size, size), int)
    places[rows, columns] = places[columns, rows] = np.arange(len(rows))
    return places


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
        whitener = jnp.asarray(p.whitener)
        solved = _least_squares(white_f, white_y, below_f, below_y, whitener)
        squares, fixed, spread, log_gram = solved
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


def _least_squares(
    white_f: jax.Array,
    white_y: jax.Array,
    below_f: jax.Array,
    below_y: jax.Array,
    whitener: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Q, the fixed effects b, their covariance over σ², and log |Fᵀ V⁻¹ F|."""
    gram = jnp.einsum("ikj,imj->km", white_f, white_f)
    gram = gram + jnp.einsum("ikj,imj->km", below_f, below_f)
    target = jnp.einsum("ikj,ij->k", white_f, white_y)
    target = target + jnp.einsum("ikj,ij->k", below_f, below_y)
    factor = jnp.linalg.cholesky(gram)
    effects = jax.scipy.linalg.cho_solve((factor, True), target)
    above = white_y - jnp.einsum("ikj,k->ij", white_f, effects)
    below = below_y - jnp.einsum("ikj,k->ij", below_f, effects)
    squares = (above**2).sum() + (below**2).sum()
    unwhiten = jnp.linalg.inv(whitener)
    spread = unwhiten @ jax.scipy.linalg.cho_solve((factor, True), unwhiten.T)
    log_gram = 2 * jnp.log(jnp.diag(factor)).sum()
    log_gram = log_gram + 2 * jnp.log(jnp.abs(jnp.diag(whitener))).sum()
    return squares, unwhiten @ effects, spread, log_gram


@jax.jit
def profile_and_slopes(
    problem: ProfileProblem, root: jax.Array, sigma: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The profiled log evidence and its slopes in Λ (d, d) and in σ, zero where σ is NaN."""
    return jax.value_and_grad(lambda r, s: profile(problem, r, s).log_evidence, argnums=(0, 1))(
        root, sigma
    )


LANES = 1024
"""Tasks side by side: few enough for the cache, and for XLA not to wake threads for each line."""

LARGEST_PRODUCT = 1000
"""Distinct entries of U ⊗ U up to which second derivatives are summed."""

CHUNKS_FOR_THREADS = 16

TOGETHER = 512
"""Tasks of many coefficients that are worked on at once."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["x", "right", "counts"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Chunks:
    """Tasks in ``n`` chunks of ``B``, dealt out like cards, on each of ``G`` devices.

    ``x`` (d, d, G, n, B); ``right`` (m, P + 1, G, n, B), whitened fixed columns and y; ``counts``
    (2, G, n, B), rows and log scale. The first chunks are an even sample of the tasks.
    """

    x: Any
    right: Any
    counts: Any


class Raw(NamedTuple):
    """Sums over tasks as they come off the device, (G, …)."""

    log_det: Any
    gram: Any
    products: Any
    counts: Any


def fits(num_coef: int, num_fixed: int) -> bool:
    """Whether second derivatives are few enough to be summed over tasks."""
    size = num_coef * (num_fixed + 1)
    return num_coef <= UNROLL_UP_TO and size * (size + 1) // 2 <= LARGEST_PRODUCT


def chunks_of(problem: ProfileProblem) -> Chunks:
    """The problem's tasks dealt out; on the device, or devices, where they lie."""
    num_tasks = problem.y.shape[-1]
    if isinstance(problem.y, np.ndarray):
        return _deal(np, problem, 1, _number(num_tasks))
    groups = len(problem.y.sharding.device_set)
    return _deal_on_device(problem, groups, _number(-(-num_tasks // groups)))


def _number(num_tasks: int) -> int:
    return max(1, -(-num_tasks // LANES))


def _deal(xp: Any, problem: ProfileProblem, groups: int, number: int) -> Chunks:
    num_tasks = problem.y.shape[-1]
    lanes = max(1, -(-num_tasks // (groups * number)))
    missing = groups * number * lanes - num_tasks

    def dealt(a: Any) -> Any:
        a = xp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)]) if missing else a
        a = xp.swapaxes(a.reshape(*a.shape[:-1], groups, lanes, number), -1, -2)
        return xp.ascontiguousarray(a) if xp is np else a

    right = xp.concatenate([problem.fixed, problem.y[:, None]], axis=1)
    counts = xp.stack([problem.num_rows, problem.log_scale])
    return Chunks(dealt(problem.x), dealt(right), dealt(counts))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _deal_on_device(problem: ProfileProblem, groups: int, number: int) -> Chunks:
    return _deal(jnp, problem, groups, number)


@jax.jit
def _sum(chunks: Chunks, root: Any, effects: Any, first: Any, last: Any) -> Raw:
    """Sums over the chunks ``first`` to ``last``."""
    d, width, groups = chunks.x.shape[0], chunks.right.shape[1], chunks.x.shape[2]
    pairs, halves = np.triu_indices(d * width), np.triu_indices(d)

    def add(i: Any, sums: Raw) -> Raw:
        x, right, counts = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, i, a.ndim - 2, keepdims=False),
            (chunks.x, chunks.right, chunks.counts),
        )
        residual = right[:, -1:] - (right[:, :-1] * effects[:, None, None]).sum(1, keepdims=True)
        right = jnp.concatenate([right[:, :-1], residual], axis=1)
        factor = cholesky(design_and_variance(x, root)[1])
        white = solve_lower(factor, jnp.concatenate([x, right[:d]], axis=1))
        white_x, white_right = white[:, :d], white[:, d:]
        m = (white_x[:, :, None] * white_x[:, None]).sum(0)[halves]
        u = (white_x[:, :, None] * white_right[:, None]).sum(0).reshape(-1, *x.shape[2:])
        uu = u[pairs[0]] * u[pairs[1]]
        left = jnp.concatenate([jnp.ones_like(m[:1]), m])
        rows = jnp.concatenate([white_right, right[d:]])
        pivots = functools.reduce(jnp.multiply, [factor[k, k] for k in range(d)])
        found = Raw(
            2 * jnp.log(pivots).sum(-1),
            jnp.einsum("ikgb,ilgb->gkl", rows, rows),
            jnp.einsum("kgb,lgb->gkl", left, jnp.concatenate([uu, m])),
            counts.sum(-1).T,
        )
        return Raw(*(a + b for a, b in zip(sums, found, strict=True)))

    zero = Raw(
        jnp.zeros(groups),
        jnp.zeros((groups, width, width)),
        jnp.zeros((groups, 1 + len(halves[0]), len(pairs[0]) + len(halves[0]))),
        jnp.zeros((groups, 2)),
    )
    return jax.tree.map(lambda a: a.sum(0), jax.lax.fori_loop(first, last, add, zero))


class Curved:
    """The profiled evidence as a function of Λ, and near any Λ as a function of everything."""

    def __init__(self, chunks: Chunks, effects: np.ndarray, terms: Terms, last: int | None = None):
        self.chunks, self.effects, self.terms = chunks, effects, terms
        self.last = chunks.x.shape[3] if last is None else last
        self._recent: dict[bytes, Nearby] = {}

    @property
    def num_chunks(self) -> int:
        """Number of chunks, about J / 1024."""
        return self.last

    def sample(self, num_chunks: int) -> Curved:
        """The same of an even sample of the tasks, for which nothing is compiled anew."""
        return Curved(self.chunks, self.effects, self.terms, num_chunks)

    def at(self, root: np.ndarray) -> Nearby:
        """The evidence near Λ; the last few are remembered."""
        key = np.ascontiguousarray(root).tobytes()
        if key not in self._recent:
            while len(self._recent) >= 4:
                del self._recent[next(iter(self._recent))]
            near = Nearby(root, self._sums(root), self.effects, self.terms)
            if np.isfinite(near.effects).all():
                self.effects = near.effects
            self._recent[key] = near
        return self._recent[key]

    def _sums(self, root: np.ndarray) -> Sums:
        parts = 1
        if self.last >= CHUNKS_FOR_THREADS and self.chunks.x.shape[2] == 1:
            parts = min(os.cpu_count() or 1, self.last // (CHUNKS_FOR_THREADS // 2))
        ends = np.linspace(0, self.last, parts + 1).astype(int)

        def part(k: int) -> list[np.ndarray]:
            with float64():  # the flag is each thread's own
                raw = _sum(self.chunks, root, self.effects, ends[k], ends[k + 1])
                return [np.asarray(a) for a in raw]

        found = _in_threads(part, parts)
        return Sums.unpacked(Raw(*(sum(a) for a in zip(*found, strict=True))), root.shape[0])


def _in_threads(part: Any, number: int) -> Sequence[list[np.ndarray]]:
    """XLA runs one small loop on one core; as many loops as cores run side by side."""
    if number == 1:
        return [part(0)]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(part, range(number)))


class PlainAt(NamedTuple):
    """The evidence itself, for a function that holds near a Λ: as exact, and dearer.

    ``centred``: the same with y as residuals, on the host; None where tasks lie elsewhere.
    """

    problem: ProfileProblem
    centred: ProfileProblem | None
    root: np.ndarray

    @property
    def profile(self) -> Profile:
        """What Λ implies."""
        return profile(self.problem, jnp.asarray(self.root))

    def value_and_slope(self, root: np.ndarray, sigma: float = np.nan) -> tuple[float, Slopes]:
        """The evidence and its slopes in Λ and σ; σ is maximised out where it is NaN."""
        if self.centred is not None:
            with np.errstate(all="ignore"):
                return _on_host(self.centred, root, sigma)
        value, slopes = profile_and_slopes(self.problem, root, np.float64(sigma))
        return float(value), (np.asarray(slopes[0]), np.asarray(slopes[1]))


def _on_host(p: ProfileProblem, root: np.ndarray, sigma: float) -> tuple[float, Slopes]:
    """The evidence and its slopes, some tasks at a time, by their short derivatives.

    Where d is large an automatic derivative would keep every step of every task's factorisation.
    """
    d, num_fixed = len(root), p.fixed.shape[1]
    log_det, m, us = 0.0, np.zeros((d, d)), []
    below = np.concatenate([p.fixed[d:], p.y[d:, None]], axis=1)
    below = np.moveaxis(below, 1, -1).reshape(-1, num_fixed + 1)
    gram = below.T @ below
    for first in range(0, p.x.shape[2], TOGETHER):
        some = slice(first, first + TOGETHER)
        x = np.ascontiguousarray(p.x[..., some].transpose(2, 0, 1))
        right = np.concatenate([p.fixed[:d, :, some], p.y[:d, None, some]], axis=1)
        design = x @ root
        variance = design @ design.swapaxes(1, 2) + np.eye(d)
        if not np.isfinite(variance).all():
            return -np.inf, (np.zeros_like(root), np.zeros(()))
        factor = np.linalg.cholesky(variance)
        both = np.concatenate([x, right.transpose(2, 0, 1)], axis=2)
        white = np.linalg.solve(factor, both)
        white_x, white_right = white[..., :d], white[..., d:]
        log_det += 2 * float(np.log(np.einsum("jii->ji", factor)).sum())
        flat_x, flat_right = white_x.reshape(-1, d), white_right.reshape(-1, num_fixed + 1)
        m += flat_x.T @ flat_x
        gram += flat_right.T @ flat_right
        us.append(white_x.swapaxes(1, 2) @ white_right)
    u = np.concatenate(us)
    inverse = np.linalg.inv(gram[:-1, :-1])
    step = inverse @ gram[:-1, -1]
    squares = float(gram[-1, -1] - gram[:-1, -1] @ step)
    total = float(np.sum(p.num_rows)) - num_fixed * p.reml
    given = bool(np.isfinite(sigma))
    noise = sigma if given else 1.0 if p.known_noise else np.sqrt(squares / total)
    toward = np.append(-step, 1.0)
    weight = np.outer(toward, toward) / noise**2
    if p.reml:
        log_det = log_det + np.linalg.slogdet(gram[:-1, :-1])[1]
        log_det = log_det + 2 * float(np.log(np.abs(np.diag(p.whitener))).sum())
        weight[:-1, :-1] += inverse
    turned = (u @ weight).transpose(1, 0, 2).reshape(d, -1)
    by_matrix = m - turned @ u.transpose(1, 0, 2).reshape(d, -1).T
    value = total * np.log(2 * np.pi * noise**2) + squares / noise**2 + log_det
    by_sigma = (squares / noise**2 - total) / noise if given else 0.0
    by_root = -0.5 * (by_matrix + by_matrix.T) @ root
    return float(-0.5 * value + np.sum(p.log_scale)), (by_root, np.asarray(by_sigma))


@dataclass(frozen=True)
class Plain:
    """The profiled evidence where second derivatives would be too many to sum over tasks."""

    problem: ProfileProblem
    centred: ProfileProblem | None = None
    num_chunks = 1

    def sample(self, num_chunks: int) -> Plain:
        """All of it: there are no chunks."""
        del num_chunks
        return self

    def at(self, root: np.ndarray) -> PlainAt:
        """The evidence near Λ, and anywhere else."""
        return PlainAt(self.problem, self.centred, root)


def with_criterion(evidence: Curved | Plain, *, reml: bool, known_noise: bool) -> Curved | Plain:
    """The same tasks under another criterion, and nothing remembered."""
    given: dict[str, Any] = {"reml": reml, "known_noise": known_noise}
    if isinstance(evidence, Plain):
        centred = None if evidence.centred is None else replace(evidence.centred, **given)
        return Plain(replace(evidence.problem, **given), centred)
    return Curved(evidence.chunks, evidence.effects, replace(evidence.terms, **given))


def around(problem: ProfileProblem) -> Curved | Plain:
    """The evidence laid out on the device, for single passes where that is to be had."""
    if not fits(problem.x.shape[0], problem.fixed.shape[1]):
        if not isinstance(problem.y, np.ndarray):
            return Plain(problem)
        # the residuals of pooled least squares, so that no sum of squares cancels
        centre = np.einsum("mpj,mj->p", problem.fixed, problem.y)
        left = problem.y - np.einsum("mpj,p->mj", problem.fixed, centre)
        return Plain(problem, replace(problem, y=left))
    xp: Any = np if isinstance(problem.y, np.ndarray) else jnp
    effects = np.asarray(xp.einsum("mpj,mj->p", problem.fixed, problem.y))
    terms = Terms(np.asarray(problem.whitener), problem.reml, problem.known_noise)
    return Curved(on_device(chunks_of(problem)), effects, terms)
