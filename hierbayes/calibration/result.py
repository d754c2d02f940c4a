r"""What simulation-based calibration finds.

Whether ranks are uniform on 0, …, L: simultaneous bands of their ECDF, and p-values, exactly.

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

What the shape of ranks says of a posterior, in words.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from hierbayes.checks.coverage import coverage_table
from hierbayes.errors import InputError
from hierbayes.plots.calibration import calibration as draw_calibration

CLEAR = 3.0
"""Standard errors from which on a mean or a spread of ranks is spoken of."""

TAIL = 0.1
"""Share of the ranks at either end that is looked at."""

EXPLAINS = ("log likelihood", "prediction error")
"""Quantities that look at the data: what lies too low there fits too badly, or too well."""


def shape_of(label: str, ranks: np.ndarray, num_draws: int) -> str:
    """What ranks (N,) on 0, …, L look like, for a quantity whose ranks are not uniform.

    Examples
    --------
    >>> import numpy as np
    >>> from hierbayes.calibration.result import shape_of
    >>> shape_of("sigma", np.array([0, 99] * 100), 99)
    '∪: the truth lies too often in the tails of the draws; their posterior is too narrow'
    """
    at = (np.asarray(ranks) + 0.5) / (num_draws + 1)
    size = len(at)
    shift = (at.mean() - 0.5) * np.sqrt(12.0 * size)
    spread = (((at - 0.5) ** 2).mean() - 1 / 12) * np.sqrt(180.0 * size)
    # ranks that pile up at one end spread out too: ∪ needs both ends, and ∩ lacks both
    fuller = [share > TAIL for share in ((at < TAIL).mean(), (at > 1 - TAIL).mean())]
    found = []
    if abs(shift) >= CLEAR:
        found.append(_shifted(label, low=bool(shift > 0)))
    if spread >= CLEAR and all(fuller):
        found.append(
            "∪: the truth lies too often in the tails of the draws; their posterior is too narrow"
        )
    if spread <= -CLEAR and not any(fuller):
        found.append(
            "∩: the truth lies too often in the middle of the draws; their posterior is too wide"
        )
    return " and ".join(found) or "neither shifted nor too narrow or wide as a whole: see the plot"


def _shifted(label: str, *, low: bool) -> str:
    side = "too low" if low else "too high"
    slope = "slope up" if low else "slope down"
    if not label.startswith(EXPLAINS):
        return f"{slope}: draws lie {side}"
    worse = low != label.startswith("prediction error")
    meaning = "explain the data worse" if worse else "explain the data better"
    return f"{slope}: draws lie {side}; they {meaning} than the truth does"


def verdict(
    failed: Sequence[str], shapes: dict[str, str], p_values: dict[str, float],
    num_simulations: int, level: float,
) -> str:  # fmt: skip
    """The whole check in sentences; p-values are corrected for their number already."""
    share = f"{level:.3g}"
    if not failed:
        least = min(p_values, key=p_values.__getitem__)
        return (
            f"Calibrated, as far as {num_simulations} simulated data sets can tell: the ranks of "
            f"all {len(p_values)} quantities are uniform (smallest p-value {p_values[least]:.2g}, "
            f"of {least}, corrected for the number of quantities; {share} would have failed)."
        )
    lines = [
        f"Not calibrated: the ranks of {len(failed)} of {len(p_values)} quantities are not uniform "
        f"over {num_simulations} simulated data sets (corrected p-values below {share})."
    ]
    for shape in dict.fromkeys(shapes[label] for label in failed):
        alike = [f"{n} (p {_small(p_values[n])})" for n in failed if shapes[n] == shape]
        lines.append(f"- {', '.join(alike)}. {shape[0].upper()}{shape[1:]}.")
    if all(label.startswith(EXPLAINS) for label in failed):
        lines.append(
            "Parameters pass and what looks at the data does not: the draws use the data wrongly, "
            "in part, or not at all."
        )
    return "\n".join(lines)


def _small(p: float) -> str:
    return "< 1e-12" if p < 1e-12 else f"= {p:.2g}"


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
    >>> from hierbayes.calibration.result import p_value
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
