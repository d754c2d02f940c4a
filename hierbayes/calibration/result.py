"""What simulation-based calibration finds."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hierbayes.checks.coverage import coverage_table
from hierbayes.checks.uniformity import Band, band, p_value
from hierbayes.checks.verdicts import shape_of, verdict
from hierbayes.plots.calibration import calibration as draw_calibration


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranks of what data were simulated from among posterior draws, and what they say.

    Attributes
    ----------
    ranks : dict
        By quantity, (N,) of integers from 0 to L: how many draws lie below the truth.
    num_draws : int
        L.
    num_simulations : int
        Data sets simulated, refused ones included.
    level : float
        Chance that a right sampler fails, over all quantities together.
    covered : dict
        By method, (N, 3): the share of θ's entries inside their 50, 80 and 95 % intervals.
    warnings : tuple of str
        What to know before relying on these numbers.
    info : dict
        ``seconds``, ``thinning``, ``refused`` by method, ``seed``.
    """

    ranks: dict[str, np.ndarray] = field(repr=False)
    num_draws: int
    num_simulations: int
    level: float = 0.01
    covered: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def p_values(self) -> dict[str, float]:
        """By quantity, of uniform ranks; each by itself."""
        return {label: p_value(ranks, self.num_draws) for label, ranks in self.ranks.items()}

    @property
    def corrected(self) -> dict[str, float]:
        """The p-values times the number of quantities (Bonferroni)."""
        return {label: min(1.0, len(self.ranks) * p) for label, p in self.p_values.items()}

    @property
    def band(self) -> Band:
        """Counts below each rank among which right samplers stay, for all quantities together."""
        size = len(next(iter(self.ranks.values())))
        return band(size, self.num_draws, self.level / len(self.ranks))

    @property
    def failed(self) -> tuple[str, ...]:
        """Quantities whose corrected p-value is below ``level``, the worst first."""
        bad = [label for label, p in self.corrected.items() if p < self.level]
        return tuple(sorted(bad, key=self.p_values.__getitem__))

    @property
    def shapes(self) -> dict[str, str]:
        """What the ranks of failed quantities look like, in words."""
        return {label: shape_of(label, self.ranks[label], self.num_draws) for label in self.failed}

    @property
    def verdict(self) -> str:
        """The check in sentences."""
        if not self.ranks:
            return "No draws were ranked: see `coverage`."
        size = len(next(iter(self.ranks.values())))
        return verdict(self.failed, self.shapes, self.corrected, size, self.level)

    @property
    def table(self) -> Any:
        """A row a quantity, as a pandas DataFrame: p-values, mean rank, spread, words.

        ``mean_rank`` is in units of L, ½ where all is well; ``spread`` the ranks' standard
        deviation in units of a uniform one's: above 1 where posteriors are too narrow.
        """
        import pandas as pd

        size = self.num_draws + 1
        at = {label: (ranks + 0.5) / size for label, ranks in self.ranks.items()}
        uniform = np.sqrt((1 - 1 / size**2) / 12)
        return pd.DataFrame(
            {
                "p_value": self.p_values,
                "corrected": self.corrected,
                "mean_rank": {label: a.mean() for label, a in at.items()},
                "spread": {label: a.std() / uniform for label, a in at.items()},
                "shape": {label: self.shapes.get(label, "uniform") for label in at},
            },
            index=pd.Index(list(at), name="quantity"),
        )

    @property
    def coverage(self) -> Any:
        """Coverage of 50, 80 and 95 % intervals of θ_j by method, as a pandas DataFrame.

        Its standard errors take data sets as units.
        """
        return coverage_table(self.covered)

    def plot(self, ax: Any = None) -> Any:
        """The ECDF of every quantity's ranks less the uniform one: see ``hb.plots.calibration``."""
        return draw_calibration(self, ax=ax)

    def __str__(self) -> str:
        return "\n".join([self.verdict, *(f"- {message}" for message in self.warnings)])
