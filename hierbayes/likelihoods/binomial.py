"""The binomial likelihood: successes of trials, by a logistic predictor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import gammaln as jax_gammaln
from scipy import special

from hierbayes.errors import InputError, listing
from hierbayes.likelihoods.base import Aggregated, columns_of, groups, merged
from hierbayes.likelihoods.bernoulli import POSSIBLE, logistic, softplus
from hierbayes.likelihoods.generalised import GeneralisedLinear, mean_offset
from hierbayes.likelihoods.over_normal import Concave, Kernel, averaged, log_average
from hierbayes.tasks import Tasks


@dataclass(frozen=True)
class Binomial(GeneralisedLinear):
    r"""Successes of a known number of trials, with a linear predictor on the logit scale.

    .. math:: y_{ij} \sim \text{Binomial}\!\left(n_{ij}, \frac{1}{1 + e^{-f_{ij}}}\right)

    The trials of each row are the slot ``trials`` of the tasks.

    Examples
    --------
    >>> import numpy as np, pandas as pd, hierbayes as hb
    >>> wards = pd.DataFrame({"ward": list("abc"), "deaths": [0, 2, 1], "cases": [47, 148, 90]})
    >>> model, tasks = hb.from_formula("p(deaths, cases) ~ 1 + (1 | ward)", wards)
    >>> model.likelihood
    Binomial()
    """

    log_concave = True
    discrete = True
    refused = ("known_se",)

    def _check_outcome(self, tasks: Tasks) -> None:
        if "trials" not in tasks.slots:
            raise InputError(
                "the Binomial likelihood needs the number of trials of every row: pass `trials` "
                "when making the tasks, or write p(successes, trials) ~ … in a formula"
            )
        self._refuse_non_counts(tasks)
        trials = tasks.slots["trials"]
        odd = np.flatnonzero((trials != np.floor(trials)) | (tasks.outcome > trials))
        if odd.size:
            i = odd[0]
            raise InputError(
                f"successes cannot exceed trials, and trials are whole: {odd.size} row(s) of "
                f"{tasks.labels.outcome!r} do not fit, the first {tasks.outcome[i]:g} of "
                f"{trials[i]:g} in task {listing([tasks.names[tasks.task_of_row[i]]])}; correct "
                "these rows, or leave them out"
            )

    def best_location(self, outcome: Any, slots: dict[str, Any]) -> Any:
        """The logit, half a success and half a failure added."""
        return jnp.log(outcome + 0.5) - jnp.log(slots["trials"] - outcome + 0.5)

    def endless(self, tasks: Tasks) -> tuple[np.ndarray, np.ndarray]:
        """Upwards where every trial succeeds, downwards where none does."""
        return tasks.outcome == tasks.slots["trials"], tasks.outcome == 0

    def family(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> dist.Distribution:
        """Binomial with logit f."""
        del phi
        return LogitBinomial(location, slots["trials"], validate_args=False)

    def kernel(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any], outcome: Any
    ) -> Any:
        """``y f − n log(1 + e^f)``."""
        del phi
        return outcome * location - slots["trials"] * softplus(location)

    def to_second_order(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any], outcome: Any
    ) -> tuple[Any, Any, Any]:
        """With one exponential a row."""
        del phi
        n = slots["trials"]
        value, chance = logistic(location)
        return (
            outcome * location - n * value, outcome - n * chance, -n * chance * (1.0 - chance)
        )  # fmt: skip

    def predictive(
        self, location: Any, variance: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> Any:
        """Binomial averaged over a normal logit."""
        del phi
        return averaged(Successes(np.asarray(slots["trials"])), location, variance)

    def divergence(
        self, location: Any, other: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> jax.Array:
        """The trials times that of two Bernoulli distributions."""
        del phi
        softplus, chance = logistic(location)
        return slots["trials"] * (chance * (location - other) - softplus + logistic(other)[0])

    def curvature_bound(self, phi: dict[str, Any], slots: dict[str, Any]) -> Any:
        """n p (1 − p) is at most n / 4."""
        del phi
        return 0.25 * slots["trials"] * slots.get("weight", 1.0)

    def units(self, tasks: Tasks) -> tuple[float, float]:
        """The logit of the overall share of successes, and one logit."""
        ones, trials = float(np.sum(tasks.outcome)), float(np.sum(tasks.slots["trials"]))
        return float(np.log((ones + 0.5) / (trials - ones + 0.5))) - mean_offset(tasks), 1.0

    def add_up(self, tasks: Tasks) -> Aggregated:
        """Successes and trials of alike rows are added up."""
        weight = tasks.slots.get("weight", np.ones(tasks.num_rows))
        found = groups(tasks, columns_of(tasks, "offset"))
        y, n = tasks.outcome, tasks.slots["trials"]
        successes, trials = found.sum(weight * y), found.sum(weight * n)
        ways = np.bincount(tasks.task_of_row, weight * _log_ways(n, y), tasks.num_tasks)
        together = merged(tasks, found, successes, trials=trials)
        return Aggregated(together, np.ones(together.num_rows), ways)


class Successes(Concave):
    """y ~ Binomial(n, 1 / (1 + e^−f)): Y ≤ y where a beta variable (y + 1, n − y) is above."""

    def __init__(self, trials: np.ndarray):
        self.trials, self.highest = trials, trials

    def at(self, f: Any) -> Any:
        """SciPy's."""
        from scipy import stats

        chance = np.clip(special.expit(f), *POSSIBLE)
        return stats.binom(self.trials.astype(int), chance)  # SciPy draws from whole trials only

    def kernel(self, y: Any) -> Kernel:
        """log p(y | f)."""
        return Kernel(True, y, self.trials - y, _log_ways(self.trials, y))

    def pivot(self, y: Any) -> Kernel:
        """Of the logit of the beta variable; y = n, where there is none, is not asked for."""
        n = np.maximum(self.trials, y + 1.0)
        return Kernel(True, y + 1.0, n - y, -special.betaln(y + 1.0, n - y))

    def moments(self, m: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By E[p] and E[p²], the chances of one and of two successes in as many trials."""
        first, second = (np.exp(log_average(Kernel(True, k, 0.0, 0.0), m, s)) for k in (1.0, 2.0))
        n = self.trials
        return n * first, n * (first - second) + n**2 * np.maximum(second - first**2, 0.0)

    def typical(self, f: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """n / (1 + e^−f)."""
        n = np.broadcast_to(self.trials, (*s.shape[:-1], s.shape[-1]))
        return np.floor(n * special.expit(f)), np.ceil(np.sqrt(n) + 0.1 * n)


class LogitBinomial(dist.BinomialLogits):
    """Binomial by its logit, with a slope that is right at a logit of zero, as for Bernoulli."""

    def log_prob(self, value: Any) -> Any:
        """``y f − n log(1 + e^f)`` and the log of the number of ways."""
        n, f = self.total_count, self.logits
        return value * f - n * logistic(f)[0] + _log_ways(n, value, jax_gammaln)


def _log_ways(n: Any, y: Any, gammaln: Any = special.gammaln) -> Any:
    """log (n choose y)."""
    return gammaln(n + 1.0) - gammaln(y + 1.0) - gammaln(n - y + 1.0)
