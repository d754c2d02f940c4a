r"""The profiled evidence of many data sets of one design, with exact first and second derivatives.

Data sets b = 1..B share the predictors, so that of the statistics y alone differs. At a relative
root covariance Λ_b of each, with W_j the inverse Cholesky factor of V_j = I + R_jΛΛᵀR_jᵀ, the
white residual r_j, the white fixed columns F_j scaled so that ΣFᵀF = I, and T_k = W (∂V/∂Λ_k) Wᵀ,

.. math::

    \partial_k \textstyle\sum_j \log|V_j| &= \textstyle\sum_j \operatorname{tr} T_k, &
    \partial_k Q &= -\textstyle\sum_j r^\top T_k r, &
    \partial_k \log|G| &= -\textstyle\sum_j \operatorname{tr} F^\top T_k F

with Q the generalised residual sum of squares and G = FᵀV⁻¹F; their second derivatives are sums of
products of the same. It is the evidence of :mod:`hierbayes.evidence.profile`, in NumPy: nothing is
compiled, and data sets stand on the last axis.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from hierbayes.evidence.profile import ProfileProblem
from hierbayes.numerics import UNROLL_UP_TO, eliminate
from hierbayes.statistics import design_and_variance


class ManyProfiles(NamedTuple):
    """Minus the profiled evidence of every data set, and what Λ implies; data sets last.

    ``loss`` (B,), ``slope`` (K, B), ``hessian`` (K, K, B) in Λ's entries; ``effects`` (P, B) of
    the whitened columns; ``sigma`` (B,).
    """

    loss: np.ndarray
    slope: np.ndarray
    hessian: np.ndarray
    effects: np.ndarray
    sigma: np.ndarray


@dataclass(frozen=True)
class ManyProblems:
    """One design and the y of many data sets.

    ``x`` (d, d, J); ``fixed`` (m, P, J), whitened over all tasks; ``y`` (m, J, B) as residuals at
    ``centre`` (P, B); ``below`` = yᵀy, Fᵀy and FᵀF of the rows that θ does not move.
    """

    x: np.ndarray
    fixed: np.ndarray
    y: np.ndarray
    centre: np.ndarray
    below: tuple[np.ndarray, np.ndarray, np.ndarray]
    num_rows: float
    log_scale: float
    whitener: np.ndarray
    reml: bool
    known_noise: bool

    @property
    def num_sets(self) -> int:
        """Number of data sets B."""
        return self.y.shape[-1]

    @classmethod
    def of(cls, problem: ProfileProblem) -> ManyProblems:
        """From a problem whose ``y`` is (m, J, B)."""
        d = problem.x.shape[0]
        centre = np.einsum("mpj,mjb->pb", problem.fixed, problem.y)
        y = problem.y - np.einsum("mpj,pb->mjb", problem.fixed, centre)
        rest, columns = y[d:], problem.fixed[d:]
        below = (
            (rest**2).sum((0, 1)), np.einsum("mpj,mjb->pb", columns, rest),
            np.einsum("mpj,mqj->pq", columns, columns),
        )  # fmt: skip
        return cls(
            np.asarray(problem.x), np.asarray(problem.fixed[:d]), y[:d], centre, below,
            float(np.sum(problem.num_rows)), float(np.sum(problem.log_scale)),
            np.asarray(problem.whitener), problem.reml, problem.known_noise,
        )  # fmt: skip

    def losses(self, root: np.ndarray) -> np.ndarray:
        """Minus the profiled evidence (B,) at Λ (d, d, B); of one data set at as many Λ as given.

        Infinite where it is no number.
        """
        with np.errstate(all="ignore"):
            try:
                w = self._white(root)
            except np.linalg.LinAlgError:
                return np.full(root.shape[-1], np.inf)
            loss, _ = self._loss(w)
        return np.where(np.isfinite(loss), loss, np.inf)

    def estimates(self, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whitened effects (P, B) and σ (B,) at Λ (d, d, B)."""
        w = self._white(root)
        return w.effects + self.centre, self._loss(w)[1]

    def _loss(self, w: _White) -> tuple[np.ndarray, np.ndarray]:
        """Minus the profiled evidence and σ, each (B,)."""
        total = self.num_rows - len(w.effects) * self.reml
        squares = w.squares if self.known_noise else total
        sigma = np.ones_like(w.squares) if self.known_noise else np.sqrt(w.squares / total)
        loss = total * np.log(2 * np.pi * sigma**2) + squares
        return 0.5 * (loss + w.log_det + w.log_gram * self.reml) - self.log_scale, sigma

    def take(self, which: Any) -> ManyProblems:
        """Some of the data sets, by position."""
        squares, toward, gram = self.below
        return replace(
            self, y=self.y[..., which], centre=self.centre[:, which],
            below=(squares[which], toward[:, which], gram),
        )  # fmt: skip

    def profiles(self, root: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> ManyProfiles:
        """At Λ (d, d, B), with derivatives in its entries at ``rows`` and ``columns`` (K,)."""
        w = self._white(root)
        total = self.num_rows - len(w.effects) * self.reml
        a = w.x[:, rows]  # (d, K, J, B): W R e_row
        b = np.einsum("iejb,ecb->icjb", w.x, root)[:, columns]  # W R Λ e_column
        turned = a[:, None] * b[None] + b[:, None] * a[None]  # T_k (d, d, K, J, B)
        moved_r = np.einsum("ilkjb,ljb->ikjb", turned, w.residual)
        squares_1 = -np.einsum("ikjb,ijb->kb", moved_r, w.residual)
        log_det_1 = np.einsum("iikjb->kb", turned)
        squares_2 = 2 * np.einsum("ikjb,iljb->klb", moved_r, moved_r)
        log_det_2 = -np.einsum("mnkjb,nmljb->klb", turned, turned)
        by_r, same = np.einsum("ikjb,ijb->kjb", a, w.residual), np.equal.outer(columns, columns)
        both = 2.0 * same[:, :, None]  # of two entries in one column ∂²V is not zero
        squares_2 -= both * np.einsum("kjb,ljb->klb", by_r, by_r)
        log_det_2 += both * np.einsum("ikjb,iljb->klb", a, a)
        if len(w.effects):
            moved_f = np.einsum("ilkjb,lpjb->ipkjb", turned, w.fixed)
            g = np.einsum("ipkjb,ijb->pkb", moved_f, w.residual)
            squares_2 -= 2 * np.einsum("pkb,plb->klb", g, g)
            if self.reml:
                first, second = _of_log_gram(w.fixed, moved_f, a, both)
                log_det_1, log_det_2 = log_det_1 + first, log_det_2 + second
        loss, sigma = self._loss(w)
        if not self.known_noise:  # total · log of the squares
            share, squares_1 = squares_1 / w.squares, total * squares_1 / w.squares
            squares_2 = total * (squares_2 / w.squares - share[:, None] * share[None])
        slope, hessian = 0.5 * (squares_1 + log_det_1), 0.5 * (squares_2 + log_det_2)
        return ManyProfiles(loss, slope, hessian, w.effects + self.centre, sigma)

    def fixed_effects(self, effects: np.ndarray) -> np.ndarray:
        """b = (μ_free, Γ, β) (P, B) from the whitened effects."""
        return np.linalg.solve(self.whitener, effects) if len(effects) else effects

    def posteriors(
        self, root: np.ndarray, effects: np.ndarray, sigma: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """:func:`posteriors` of every data set at its own Λ, whitened effects and σ."""
        residual = self.y - np.einsum("ipj,pb->ijb", self.fixed, effects - self.centre)
        return posteriors(self.x, residual, root, sigma)

    def _white(self, root: np.ndarray) -> _White:
        d, num_fixed = self.x.shape[0], self.fixed.shape[1]
        shape = (*self.x.shape[2:], root.shape[-1])
        variance = design_and_variance(self.x[..., None], root[:, :, None])[1]
        wide = np.concatenate([self.x, self.fixed], axis=1)[..., None]
        wide = np.broadcast_to(wide, (*wide.shape[:2], *shape))
        y = np.broadcast_to(self.y[:, None], (d, 1, *shape))
        wide = np.concatenate([wide, y], axis=1)
        white, log_det = _whitened(variance, wide)
        x, fixed, y = white[:, :d], white[:, d:-1], white[:, -1]
        squares_below, toward_below, gram_below = self.below
        if not num_fixed:
            squares = (y**2).sum((0, 1)) + squares_below
            none = np.zeros((0, root.shape[-1]))
            return _White(x, fixed, y, squares, log_det, np.zeros(root.shape[-1]), none)
        gram = np.einsum("ipjb,iqjb->bpq", fixed, fixed) + gram_below
        toward = np.einsum("ipjb,ijb->pb", fixed, y) + toward_below
        inverse = np.linalg.inv(np.linalg.cholesky(gram))  # (B, P, P), C⁻¹ with C Cᵀ = G
        white_effects = np.einsum("bpq,qb->pb", inverse, toward)
        effects = np.einsum("bqp,qb->pb", inverse, white_effects)
        residual = y - np.einsum("ipjb,pb->ijb", fixed, effects)
        squares = (residual**2).sum((0, 1)) + squares_below
        squares = squares - 2 * (effects * toward_below).sum(0)
        squares = squares + np.einsum("pb,pq,qb->b", effects, gram_below, effects)
        log_gram = -2 * np.log(np.einsum("bpp->bp", inverse)).sum(1)
        log_gram = log_gram + 2 * np.log(np.abs(np.diag(self.whitener))).sum()
        scaled = np.einsum("bpq,iqjb->ipjb", inverse, fixed)
        return _White(x, scaled, residual, squares, log_det, log_gram, effects)


def posteriors(
    x: np.ndarray, residual: np.ndarray, root: np.ndarray, sigma: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """θ_j's posterior mean less its prior mean, and its standard deviation, each (d, J, B).

    ``x`` (d, d, J); ``residual`` (d, J, B) of y at the prior mean; ``root`` Λ (d, d, B) and
    ``sigma`` (B,), at which Σ = σ² Λ Λᵀ.
    """
    design = np.einsum("iej,ecb->icjb", x, root)
    precision = np.einsum("icjb,idjb->jbcd", design, design) + np.eye(len(root))
    spread = np.linalg.inv(precision)  # of θ = Λz: I + Λᵀ RᵀR Λ ≥ I, whatever Λ
    pull = np.einsum("icjb,ijb->jbc", design, residual)
    mean = np.einsum("dcb,jbce,jbe->djb", root, spread, pull, optimize=True)
    variance = np.einsum("dcb,jbce,deb->djb", root, spread, root, optimize=True)
    return mean, sigma * np.sqrt(np.maximum(variance, 0.0))


class _White(NamedTuple):
    """Of every data set: W R (d, d, J, B), F (d, P, J, B), r (d, J, B), Q, Σ log|V|, log|G|, b."""

    x: np.ndarray
    fixed: np.ndarray
    residual: np.ndarray
    squares: np.ndarray
    log_det: np.ndarray
    log_gram: np.ndarray
    effects: np.ndarray


def _whitened(variance: Any, columns: Any) -> tuple[np.ndarray, np.ndarray]:
    """C⁻¹ columns (d, W, J, B), C the Cholesky factor of (d, d, J, B), and Σ_j log|V| (B,)."""
    if len(variance) <= UNROLL_UP_TO:
        white, pivots = eliminate(variance, columns)
        squares, rows = np.stack(pivots), np.stack(white)
        return rows / np.sqrt(squares)[:, None], np.log(squares).sum((0, 1))
    # by LAPACK through NumPy: JAX would compile for every number of data sets
    root = np.linalg.cholesky(np.moveaxis(variance, (0, 1), (-2, -1)))
    white = np.linalg.solve(root, np.moveaxis(columns, (0, 1), (-2, -1)))
    log_det = 2 * np.log(np.einsum("...ii->...i", root)).sum(-1).sum(0)
    return np.ascontiguousarray(np.moveaxis(white, (-2, -1), (0, 1))), log_det


def _of_log_gram(fixed: Any, moved: Any, a: Any, both: Any) -> tuple[Any, Any]:
    """Derivatives of log |FᵀV⁻¹F|, which REML adds, (K, B) and (K, K, B)."""
    gram_1 = np.einsum("ipkjb,iqjb->pqkb", moved, fixed)
    by_f = np.einsum("ikjb,ipjb->pkjb", a, fixed)
    second = 2 * np.einsum("ipkjb,ipljb->klb", moved, moved)
    second -= np.einsum("pqkb,pqlb->klb", gram_1, gram_1)
    second -= both * np.einsum("pkjb,pljb->klb", by_f, by_f)
    return -np.einsum("ppkb->kb", gram_1), second
