"""The Bernoulli likelihood: yes or no, by a logistic predictor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy import special

from hierbayes.likelihoods.base import Aggregated, columns_of, groups, merged
from hierbayes.likelihoods.generalised import GeneralisedLinear
from hierbayes.likelihoods.over_normal import Kernel, log_average
from hierbayes.tasks import Tasks

POSSIBLE = (np.finfo(float).tiny, 1.0 - np.finfo(float).epsneg)
"""A chance that rounds to 0 or 1 would score a single contradicting row as −∞."""


@jax.custom_jvp
def logistic(f: Any) -> tuple[Any, Any]:
    """log(1 + e^f) and 1 / (1 + e^−f), from one exponential that never overflows."""
    small = jnp.exp(-jnp.abs(f))
    rest = 1.0 / (1.0 + small)
    return jnp.maximum(f, 0.0) + jnp.log1p(small), jnp.where(f >= 0, rest, small * rest)


@logistic.defjvp
def _(primals: Any, tangents: Any) -> Any:
    value, chance = logistic(*primals)
    (moved,) = tangents
    return (value, chance), (chance * moved, chance * (1.0 - chance) * moved)


def softplus(f: Any) -> Any:
    """log(1 + e^f), with a slope that is right at f = 0."""
    return logistic(f)[0]


class Logistic(dist.BernoulliLogits):
    """Bernoulli by its logit, with a slope that is right at a logit of zero.

    NumPyro writes the log probability with max(f, 0) and |f|, whose automatic derivatives at f = 0
    make the slope 0 or 1 in the place of ∓½: just where logistic regressions start.
    """

    def log_prob(self, value: Any) -> jax.Array:
        """``y f`` − log(1 + e^f)."""
        return value * self.logits - logistic(self.logits)[0]


@dataclass(frozen=True)
class Bernoulli(GeneralisedLinear):
    r"""Outcomes of 0 and 1 with a linear predictor on the logit scale.

    .. math:: y_{ij} \sim \text{Bernoulli}\!\left(\frac{1}{1 + e^{-f_{ij}}}\right), \qquad
              f_{ij} = o_{ij} + x_{ij}^\top\theta_j + z_{ij}^\top\beta

    Examples
    --------
    >>> import numpy as np, hierbayes as hb
    >>> tasks = hb.Tasks.from_arrays([(np.ones((4, 1)), [0, 1, 1, 1]), (np.ones((2, 1)), [0, 1])])
    >>> model = hb.HierarchicalModel(hb.likelihoods.Bernoulli(), hb.priors.Gaussian())
    >>> sorted(model.phi_distributions(tasks))
    ['mu', 'tau']
    """

    log_concave = True
    discrete = True
    binary = True

    def _check_outcome(self, tasks: Tasks) -> None:
        self._refuse_rows(
            tasks, ~np.isin(tasks.outcome, (0.0, 1.0)), "outcomes of 0 and 1",
            "code them so, or use a binomial family for successes of trials and Categorical for "
            "classes",
        )  # fmt: skip

    def best_location(self, outcome: Any, slots: dict[str, Any]) -> Any:
        """The logit, of a share kept away from 0 and 1."""
        del slots
        return 2.0 * outcome - 1.0

    def endless(self, tasks: Tasks) -> tuple[np.ndarray, np.ndarray]:
        """Ones upwards, zeros downwards."""
        return tasks.outcome == 1, tasks.outcome == 0

    def family(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> dist.Distribution:
        """Bernoulli with logit f."""
        del phi, slots
        return Logistic(logits=location)

    def kernel(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any], outcome: Any
    ) -> Any:
        """``y f`` − log(1 + e^f)."""
        del phi, slots
        return outcome * location - softplus(location)

    def to_second_order(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any], outcome: Any
    ) -> tuple[Any, Any, Any]:
        """With one exponential a row."""
        del phi, slots
        value, chance = logistic(location)
        return outcome * location - value, outcome - chance, -chance * (1.0 - chance)

    def predictive(
        self, location: Any, variance: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> Any:
        """Bernoulli with the mean probability under normal f."""
        from scipy import stats

        del phi, slots
        if np.max(variance, initial=0.0) == 0:
            return stats.bernoulli(np.clip(special.expit(location), *POSSIBLE))
        m, sd = np.broadcast_arrays(np.asarray(location, float), np.sqrt(variance))
        chance = np.exp(log_average(Kernel(True, 1.0, 0.0, 0.0), m, sd))
        return stats.bernoulli(np.clip(chance, *POSSIBLE))

    def divergence(
        self, location: Any, other: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> jax.Array:
        """KL of two Bernoulli distributions by their logits."""
        del phi, slots
        between = jax.nn.sigmoid(location) * (location - other)
        return between - jax.nn.softplus(location) + jax.nn.softplus(other)

    def curvature_bound(self, phi: dict[str, Any], slots: dict[str, Any]) -> Any:
        """p (1 − p) is at most ¼."""
        del phi
        return 0.25 * slots.get("weight", 1.0)

    def units(self, tasks: Tasks) -> tuple[float, float]:
        """The logit of the overall share of ones, and one logit."""
        ones = float(np.sum(tasks.outcome))
        offset = float(np.mean(tasks.slots.get("offset", 0.0)))
        return float(np.log((ones + 0.5) / (tasks.num_rows - ones + 0.5))) - offset, 1.0

    def add_up(self, tasks: Tasks) -> Aggregated:
        """The share of ones in alike rows, weighted by their number."""
        weight = tasks.slots.get("weight", np.ones(tasks.num_rows))
        found = groups(tasks, columns_of(tasks, "offset"))
        total = found.sum(weight)
        together = merged(tasks, found, found.sum(weight * tasks.outcome) / total)
        return Aggregated(together, total, np.zeros(tasks.num_tasks))
