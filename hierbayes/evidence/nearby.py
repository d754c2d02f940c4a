"""The profiled evidence near one Λ, from sums over tasks alone; see :mod:`.curved`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hierbayes.evidence.profile import Profile

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
