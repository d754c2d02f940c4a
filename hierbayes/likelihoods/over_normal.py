r"""A family averaged over a normal f.

.. math:: p(y) = \int p(y \mid f)\, N(f; m, v)\, df \approx \sum_q w_q\, p(y \mid m + t_q \sqrt v)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

NODES = np.arange(-8.5, 8.5 + 1 / 16, 1 / 4)
"""Trapezium nodes in standard deviations of f."""

WEIGHTS = np.exp(-0.5 * NODES**2) / np.exp(-0.5 * NODES**2).sum()


def averaged(at: Callable[[Any], Any], location: Any, variance: Any) -> Any:
    """The family ``at`` (f ↦ frozen SciPy distribution) averaged over f ~ N(location, variance)."""
    if np.max(variance, initial=0.0) == 0:
        return at(np.asarray(location))
    return OverNormal(at, np.asarray(location, float), np.sqrt(np.asarray(variance, float)))


class OverNormal:
    """Answers what a frozen SciPy distribution answers, node after node."""

    def __init__(self, at: Callable[[Any], Any], location: np.ndarray, sd: np.ndarray):
        self.at = at
        self.location, self.sd = np.broadcast_arrays(location, sd)
        self.dist = at(self.location).dist

    def _average(self, of: Callable[[Any], Any]) -> np.ndarray:
        total: Any = 0.0
        for node, weight in zip(NODES, WEIGHTS, strict=True):
            total = total + weight * of(self.at(self.location + node * self.sd))
        return np.asarray(total)

    def _log_average(self, of: Callable[[Any], Any]) -> np.ndarray:
        total: Any = -np.inf
        for node, weight in zip(NODES, WEIGHTS, strict=True):
            value = of(self.at(self.location + node * self.sd)) + np.log(weight)
            total = np.logaddexp(total, value)
        return np.asarray(total)

    def mean(self) -> np.ndarray:
        """E[y]."""
        return self._average(lambda d: d.mean())

    def var(self) -> np.ndarray:
        """Var(y), of which that of f is a part."""
        middle = self.mean()
        return self._average(lambda d: d.var() + (d.mean() - middle) ** 2)

    def std(self) -> np.ndarray:
        """The root of the variance."""
        return np.sqrt(self.var())

    def cdf(self, y: Any) -> np.ndarray:
        """P(Y ≤ y)."""
        return self._average(lambda d: d.cdf(y))

    def logpmf(self, y: Any) -> np.ndarray:
        """The log probability of y."""
        return self._log_average(lambda d: d.logpmf(y))

    def logpdf(self, y: Any) -> np.ndarray:
        """The log density at y."""
        return self._log_average(lambda d: d.logpdf(y))

    def ppf(self, probability: float) -> np.ndarray:
        """The smallest y with P(Y ≤ y) ≥ probability, by halving between the nodes' own."""
        discrete = hasattr(self.dist, "pmf")
        ends = [self.at(self.location + node * self.sd).ppf(probability) for node in NODES]
        low, high = np.minimum.reduce(ends), np.maximum.reduce(ends)
        for _ in range(200):
            middle = np.floor(0.5 * (low + high)) if discrete else 0.5 * (low + high)
            if not (high - low > (0.0 if discrete else 1e-9 * (1 + np.abs(middle)))).any():
                break
            below = self.cdf(middle) < probability
            low = np.where(below, middle + (1.0 if discrete else 0.0), low)
            high = np.where(below, high, middle)
        return high

    def drawn(self, component: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draws (n, N), each from one of the components (n,) on the first axis of ``location``."""
        shape, count = self.location.shape, len(component)
        if shape[0] == 1:
            f = self.location + self.sd * rng.standard_normal((count, *shape[1:]))
            return np.asarray(self.at(f).rvs(size=f.shape, random_state=rng))
        # all components are drawn from at once: as often as one of them is wanted
        order = np.argsort(component, kind="stable")
        turn = np.empty(count, int)
        first = np.searchsorted(component[order], component[order])
        turn[order] = np.arange(count) - first
        drawn = np.empty((count, *shape[1:]))
        for k in range(int(turn.max(initial=-1)) + 1):
            f = self.location + self.sd * rng.standard_normal(shape)
            values = np.asarray(self.at(f).rvs(size=shape, random_state=rng))
            drawn[turn == k] = values[component[turn == k]]
        return drawn
