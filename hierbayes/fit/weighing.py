r"""Draws of φ given some data, as draws given more: Pareto-smoothed importance resampling.

.. math:: w_s \propto p(D_{\text{new}} \mid \varphi_s), \qquad
          \varphi_s \sim p(\varphi \mid D_{1..J})

Reference: Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling,
Journal of Machine Learning Research 25(72).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

EVEN = 1e-10
"""Log weights that differ by less than this weigh nothing."""

HOPELESS = 6.0
"""Standard deviation of log weights from which on no draws that there could be would do."""


class Weighed(NamedTuple):
    """Positions of the draws to keep (S,), Pareto's k̂, NaN where the weights are even."""

    chosen: np.ndarray
    pareto_k: float
    even: bool = False

    @property
    def sound(self) -> bool:
        """True where the weights are even, or their tail is one that draws can carry."""
        return self.even or bool(self.pareto_k <= largest_k(len(self.chosen)))


FEWEST = 25
"""Draws below which their weights have too few in the tail for Pareto's k̂."""


def largest_k(num_draws: int) -> float:
    """Pareto's k̂ up to which so many draws can be weighed, ArviZ's ``good_k``."""
    return min(1 - 1 / np.log10(num_draws), 0.7) if num_draws > 1 else 0.7


def weigh(log_weights: np.ndarray, rng: np.random.Generator) -> Weighed:
    """Systematic resampling by smoothed weights, in random order."""
    size = len(log_weights)
    if np.isnan(log_weights).any() or np.isposinf(log_weights).any():
        return Weighed(np.arange(size), np.inf)
    if np.ptp(log_weights) < EVEN:
        return Weighed(np.arange(size), np.nan, even=True)
    if size < FEWEST:  # no tail to judge
        return Weighed(np.arange(size), np.inf)
    from arviz_stats.base import array_stats

    smoothed, k = array_stats.psislw(-log_weights)
    weights = np.exp(smoothed - smoothed.max())
    upto = np.cumsum(weights) / weights.sum()
    chosen = np.searchsorted(upto, (np.arange(size) + rng.random()) / size)
    return Weighed(rng.permutation(np.minimum(chosen, size - 1)), float(k))
