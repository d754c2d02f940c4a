r"""Whether ranks are uniform on 0, …, L: simultaneous bands of their ECDF, and p-values, exactly.

With N ranks, K_i of them below i and z_i = i / (L + 1),

.. math::

    K_i \sim \mathrm{Binomial}(N, z_i), \qquad
    \gamma = \min_i 2 \min\{P(K \le K_i),\, P(K \ge K_i)\}, \qquad
    p = P(\gamma' \le \gamma)

The band of level 1 − α holds all K_i whose γ is above the α quantile of γ. As the counts of equally
likely ranks are independent Poisson numbers given their sum, the probability that a path leaves a
band is a sum of positive terms, found by L convolutions: no simulation, and small p-values are as
exact as large ones. Reference: Säilynoja, Bürkner and Vehtari (2022), Graphical test for discrete
uniformity and its applications, Statistics and Computing 32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from scipy import stats

from hierbayes.errors import InputError

SLACK = 1e-9
"""Relative; tail probabilities that are equal in theory differ by rounding."""


class Band(NamedTuple):
    """``position`` z (L,), and the ``low`` and ``high`` counts (L,) that lie inside, of N."""

    position: np.ndarray
    low: np.ndarray
    high: np.ndarray
    num_ranks: int


def counts_below(ranks: np.ndarray, num_draws: int) -> np.ndarray:
    """How many ranks lie below 1, 2, …, L, (L,)."""
    ranks = np.asarray(ranks)
    if ranks.ndim != 1 or not len(ranks):
        raise InputError(f"expected ranks (N,), found shape {ranks.shape}")
    if num_draws < 1 or ranks.min() < 0 or ranks.max() > num_draws:
        raise InputError(
            f"ranks among {num_draws} draws lie from 0 to {num_draws}, found "
            f"{ranks.min()} to {ranks.max()}"
        )
    return np.cumsum(np.bincount(ranks, minlength=num_draws + 1))[:-1]


def p_value(ranks: np.ndarray, num_draws: int) -> float:
    """The p-value of ranks (N,) of integers under uniformity on 0, …, L.

    Examples
    --------
    >>> import numpy as np
    >>> from hierbayes.checks.uniformity import p_value
    >>> round(p_value(np.arange(100), 99), 3), p_value(np.full(100, 3), 99) < 1e-100
    (1.0, True)
    """
    counts = counts_below(ranks, num_draws)
    size, at = len(ranks), np.arange(num_draws)
    tails = np.minimum(*(tail[at, counts] for tail in _tails(size, num_draws)))
    return leaving(*_inside(size, num_draws, float(2 * tails.min())), size)


@functools.lru_cache(maxsize=64)
def band(num_ranks: int, num_draws: int, level: float) -> Band:
    """The band that the ECDF of uniform ranks leaves with a probability of at most ``level``."""
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, found {level}")

    def too_narrow(gamma: float) -> bool:
        return leaving(*_inside(num_ranks, num_draws, gamma), num_ranks) > level

    low, high = np.log(level / (2 * num_draws + 2)) - 1.0, np.log(level)
    for _ in range(30):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if too_narrow(np.exp(middle)) else (middle, high)
    inside = _inside(num_ranks, num_draws, float(np.exp(low)))
    return Band(_positions(num_draws), *inside, num_ranks)


def leaving(low: np.ndarray, high: np.ndarray, num_ranks: int) -> float:
    """P(K_i < low_i or K_i > high_i for some i), under uniformity; low, high (L,)."""
    size, steps = num_ranks, len(low) + 1
    every = np.arange(size + 1)
    jump = stats.poisson.pmf(every, size / steps)
    # log P(all is counted by the end | k counted so far), relative to P(N counted in all)
    whole = stats.poisson.logpmf(size, size)
    at, total = np.zeros(size + 1), 0.0
    at[0] = 1.0
    for i, (least, most) in enumerate(zip(low, high, strict=True), start=1):
        here = np.flatnonzero(at)
        if not len(here):
            break
        first, last = here[0], here[-1] + 1
        at = np.convolve(at[first:last], jump)[: size + 1 - first]
        at = np.concatenate([np.zeros(first), at])
        outside = (every < least) | (every > most)
        rest = stats.poisson.logpmf(size - every[outside], size * (steps - i) / steps)
        total += float((at[outside] * np.exp(rest - whole)).sum())
        at[outside] = 0.0
    return min(total, 1.0)


def _positions(num_draws: int) -> np.ndarray:
    return np.arange(1, num_draws + 1) / (num_draws + 1)


@functools.lru_cache(maxsize=8)
def _tails(size: int, num_draws: int) -> tuple[np.ndarray, np.ndarray]:
    """P(K ≤ k) and P(K ≥ k) at each position, (L, N + 1)."""
    every, z = np.arange(size + 1), _positions(num_draws)[:, None]
    return stats.binom.cdf(every, size, z), stats.binom.sf(every - 1, size, z)


def _inside(size: int, num_draws: int, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest count at each position whose two-sided tail is above γ."""
    below, above = _tails(size, num_draws)
    edge = 0.5 * gamma * (1 + SLACK)
    return (below <= edge).sum(1), size - (above <= edge).sum(1)
