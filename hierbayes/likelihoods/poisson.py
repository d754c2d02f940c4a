"""The Poisson likelihood: counts by a predictor of their logarithm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy.special import gammaln

from hierbayes.likelihoods.base import Aggregated, columns_of, groups, merged
from hierbayes.likelihoods.generalised import GeneralisedLinear, count_peak, less_one
from hierbayes.likelihoods.over_normal import LARGEST, Kernel, OfRate, averaged
from hierbayes.tasks import Tasks


@dataclass(frozen=True)
class Poisson(GeneralisedLinear):
    r"""Counts with a linear predictor on the log scale.

    .. math:: y_{ij} \sim \text{Poisson}\!\left(e_{ij} \, e^{f_{ij}}\right)

    An exposure e (time at risk, population, area) is an offset log e; :func:`from_formula` takes
    it as ``exposure=``.

    Examples
    --------
    >>> import numpy as np, pandas as pd, hierbayes as hb
    >>> sites = pd.DataFrame({"site": list("abc"), "count": [3, 0, 7], "days": [10.0, 4.0, 12.0]})
    >>> model, tasks = hb.from_formula(
    ...     "count ~ 1 + (1 | site)", sites, family="poisson", exposure="days"
    ... )
    >>> model.likelihood
    Poisson()
    """

    log_concave = True
    discrete = True
    condenses = True
    log_link = True

    def _check_outcome(self, tasks: Tasks) -> None:
        self._refuse_non_counts(tasks)

    def best_location(self, outcome: Any, slots: dict[str, Any]) -> Any:
        """The log, half a count standing for none."""
        del slots
        return jnp.log(jnp.maximum(outcome, 0.5))

    def endless(self, tasks: Tasks) -> tuple[np.ndarray, np.ndarray]:
        """Downwards where nothing was counted."""
        return np.zeros(tasks.num_rows, bool), tasks.outcome == 0

    def family(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> dist.Distribution:
        """Poisson with log rate f."""
        del phi, slots
        return LogPoisson(location)

    def kernel(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any], outcome: Any
    ) -> Any:
        """``y f − e^f``; of rows that carry ``log_count``, less what it is at its maximum."""
        return self.to_second_order(location, phi, slots, outcome)[0]

    def base(self, phi: dict[str, Any], slots: dict[str, Any], outcome: Any) -> Any:
        """y log y − y, the maximum of ``y f − e^f``, where the kernel leaves it out."""
        del phi
        return outcome * slots["log_count"] - outcome if "log_count" in slots else None

    def to_second_order(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any], outcome: Any
    ) -> tuple[Any, Any, Any]:
        """With one exponential a row."""
        del phi
        if "log_count" not in slots:
            rate = jnp.exp(location)
            return outcome * location - rate, outcome - rate, -rate
        apart, beyond = _apart(location, outcome, slots["log_count"])
        return outcome * apart - beyond, -beyond, -(outcome + beyond)

    def predictive(
        self, location: Any, variance: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> Any:
        """Poisson averaged over a normal log rate."""
        del phi, slots
        return averaged(Counts(), location, variance)

    def divergence(
        self, location: Any, other: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> jax.Array:
        """e^f (f − f′ − 1) + e^f′."""
        del phi, slots
        here, there = exponential(location), exponential(other)
        return jnp.asarray(here * (location - other - 1.0) + there)

    def curvature_bound(self, phi: dict[str, Any], slots: dict[str, Any]) -> Any:
        """None: a rate grows without bound."""
        del phi, slots
        return np.inf

    def units(self, tasks: Tasks) -> tuple[float, float]:
        """The log of the overall rate, and one on the log scale."""
        return log_rate(tasks), 1.0

    def add_up(self, tasks: Tasks) -> Aggregated:
        """Counts and exposures of alike rows are added up."""
        weight = tasks.slots.get("weight", np.ones(tasks.num_rows))
        offset = tasks.slots.get("offset", np.zeros(tasks.num_rows))
        found = groups(tasks, columns_of(tasks))
        largest = offset.max(initial=-np.inf) if offset.size else 0.0
        y = tasks.outcome
        counts = found.sum(weight * y)
        exposure = largest + np.log(found.sum(weight * np.exp(offset - largest)))
        together = merged(tasks, found, counts, offset=exposure)
        left = np.bincount(
            tasks.task_of_row, weight * (y * offset - gammaln(y + 1.0)), tasks.num_tasks
        )
        counted = np.bincount(together.task_of_row, counts * exposure, tasks.num_tasks)
        return Aggregated(together, np.ones(together.num_rows), left - counted)


def _apart(location: Any, count: Any, known: Any = None) -> tuple[Any, Any]:
    """d = f − log y and e^f − y; where y is none, 0 and e^f. ``known``: log y."""
    none = count <= 0
    some = jnp.where(none, 1.0, count)
    apart = location - (jnp.log(some) if known is None else known)
    beyond = some * less_one(apart)
    return jnp.where(none, 0.0, apart), jnp.where(none, beyond + 1.0, beyond)


class Counts(OfRate):
    """y ~ Poisson(e^f): Y ≤ y where a gamma variable of shape y + 1 is above e^f."""

    def at(self, f: Any) -> Any:
        """SciPy's."""
        from scipy import stats

        return stats.poisson(np.exp(np.minimum(f, LARGEST)))

    def spread(self) -> tuple[Any, Any]:
        """The variance is the mean."""
        return 1.0, 0.0

    def kernel(self, y: Any) -> Kernel:
        """log p(y | f)."""
        return Kernel(False, y, 1.0, -gammaln(y + 1.0))

    def pivot(self, y: Any) -> Kernel:
        """Of the log of the gamma variable."""
        return Kernel(False, y + 1.0, 1.0, -gammaln(y + 1.0))


def exponential(f: Any) -> Any:
    """e^f, kept away from zero and infinity, which distributions refuse as parameters."""
    return jnp.exp(jnp.clip(f, -LARGEST, LARGEST))


class LogPoisson(dist.Poisson):
    """Poisson by the log of its rate, so that no logarithm is taken of an exponential."""

    def __init__(self, log_rate: Any):
        self.log_rate = log_rate
        super().__init__(exponential(log_rate))

    def log_prob(self, value: Any) -> Any:
        """``y f`` − e^f − log y!, as what it falls short of its maximum."""
        apart, beyond = _apart(self.log_rate, value)
        return value * apart - beyond + count_peak(value)


def log_rate(tasks: Tasks) -> float:
    """The log of all counts over all exposures, half a count added."""
    exposure = np.exp(tasks.slots.get("offset", np.zeros(tasks.num_rows))).sum()
    return float(np.log((np.sum(tasks.outcome) + 0.5) / exposure))
