r"""Predictive distributions of single rows.

.. math:: p(y \mid x, D) = \frac1S \sum_s N(y \mid m_s,\; v_s)

One component for a point φ, one a draw under full Bayes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special, stats

from hierbayes.errors import InputError
from hierbayes.tasks import Tasks


@dataclass(frozen=True)
class Prediction:
    """Predictive distributions of rows, and what they are predictions of.

    Attributes
    ----------
    target : str
        "known task", "new task" or "population".
    tasks : Tasks
        The rows predicted.
    means : array (S, N)
        Means of the components, equally weighted.
    sds : array (S, N)
        Their standard deviations.
    unidentified : array (N,) of bool
        Rows that need a coefficient which the fit does not know; they are left out of scores.
    """

    target: str
    tasks: Tasks
    means: np.ndarray
    sds: np.ndarray
    unidentified: np.ndarray

    def __repr__(self) -> str:
        return f"Prediction({self.means.shape[1]} rows, target={self.target!r})"

    @property
    def mean(self) -> np.ndarray:
        """Predictive mean of each row (N,); NaN where unidentified."""
        return self._known(self.means.mean(0))

    @property
    def sd(self) -> np.ndarray:
        """Predictive standard deviation of each row (N,); NaN where unidentified."""
        return self._known(np.sqrt((self.sds**2).mean(0) + self.means.var(0)))

    def _known(self, values: np.ndarray) -> np.ndarray:
        return np.where(self.unidentified, np.nan, values)

    def _outcome(self, outcome: np.ndarray | None) -> np.ndarray:
        outcome = self.tasks.outcome if outcome is None else outcome
        if outcome is None:
            raise InputError("these rows hold no outcome to score")
        return outcome

    def log_density(self, outcome: np.ndarray | None = None) -> np.ndarray:
        """Log predictive density of each observed row (N,); NaN where unidentified."""
        parts = stats.norm.logpdf(self._outcome(outcome), self.means, self.sds)
        return self._known(special.logsumexp(parts, axis=0) - np.log(len(self.means)))

    def pit(self, outcome: np.ndarray | None = None) -> np.ndarray:
        """P(new outcome ≤ the observed one) of each row (N,); NaN where unidentified."""
        return self._known(stats.norm.cdf(self._outcome(outcome), self.means, self.sds).mean(0))

    def quantile(self, probability: float) -> np.ndarray:
        """Predictive quantile of each row (N,), by bisection on the mixture's cdf."""
        low = (self.means - 12 * self.sds).min(0)
        high = (self.means + 12 * self.sds).max(0)
        if len(self.means) == 1:
            return self._known(stats.norm.ppf(probability, self.means[0], self.sds[0]))
        tightest = 1e-6 * self.sds.min()
        while (high - low).max() > tightest:
            middle = 0.5 * (low + high)
            below = special.ndtr((middle - self.means) / self.sds).mean(0) < probability
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return self._known(0.5 * (low + high))

    def interval(self, probability: float = 0.95) -> np.ndarray:
        """Central interval of each row, (2, N)."""
        tail = (1 - probability) / 2
        return np.stack([self.quantile(tail), self.quantile(1 - tail)])

    def draws(self, num_draws: int = 1000, seed: int = 0) -> np.ndarray:
        """Predictive draws (num_draws, N) of each row by itself.

        Rows of one task are drawn independently of one another: sums and means over a task's
        rows come out too narrow where the task's own θ is uncertain.
        """
        rng = np.random.default_rng(seed)
        component = rng.integers(len(self.means), size=num_draws)
        white = rng.standard_normal((num_draws, self.means.shape[1]))
        return self._known(self.means[component] + self.sds[component] * white)

    def to_dataframe(self) -> Any:
        """Task, mean, sd and 95 % interval of each row, in the order of the data it came from."""
        import pandas as pd

        low, high = self.interval(0.95)
        table = pd.DataFrame(
            {
                self.tasks.labels.task: self.tasks.names[self.tasks.task_of_row],
                "mean": self.mean, "sd": self.sd, "low_95": low, "high_95": high,
            },
            index=self.tasks.rows,
        )  # fmt: skip
        return table.sort_index()
