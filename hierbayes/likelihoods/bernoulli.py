"""The Bernoulli likelihood: yes or no, by a logistic predictor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist
from scipy import special

from hierbayes.errors import InputError, listing
from hierbayes.likelihoods.base import Likelihood
from hierbayes.tasks import Tasks

NODES = np.arange(-8.5, 8.5 + 1 / 16, 1 / 8)
"""Trapezium nodes for E[1 / (1 + e^−f)] under normal f: right to 1e-10 up to an sd of 6."""

POSSIBLE = (np.finfo(float).tiny, 1.0 - np.finfo(float).epsneg)
"""A chance that rounds to 0 or 1 would score a single contradicting row as −∞."""


class Logistic(dist.BernoulliLogits):
    """Bernoulli by its logit, with a slope that is right at a logit of zero.

    NumPyro writes the log probability with max(f, 0) and |f|, whose automatic derivatives at f = 0
    make the slope 0 or 1 in the place of ∓½: just where logistic regressions start.
    """

    def log_prob(self, value: Any) -> jax.Array:
        """``y f`` − log(1 + e^f)."""
        return value * self.logits - jax.nn.softplus(self.logits)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
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

    discrete = True

    def check(self, tasks: Tasks) -> None:
        """Refuse outcomes other than 0 and 1, and columns that would be ignored."""
        self._refuse_slots(tasks, ("known_se", "trials", "weight"))
        if tasks.outcome is not None:
            odd = np.flatnonzero(~np.isin(tasks.outcome, (0.0, 1.0)))
            if odd.size:
                task = tasks.names[tasks.task_of_row[odd[0]]]
                raise InputError(
                    f"the Bernoulli likelihood takes outcomes of 0 and 1; {odd.size} row(s) hold "
                    f"others, the first {tasks.outcome[odd[0]]:g} in task {listing([task])}"
                )

    def family(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> dist.Distribution:
        """Bernoulli with logit f."""
        del phi, slots
        return Logistic(logits=location)

    def predictive(
        self, location: Any, variance: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> Any:
        """Bernoulli with the mean probability under normal f, by quadrature."""
        from scipy import stats

        del phi, slots
        if np.max(variance, initial=0.0) == 0:
            return stats.bernoulli(np.clip(special.expit(location), *POSSIBLE))
        weights = np.exp(-0.5 * NODES**2)
        sd = np.sqrt(np.asarray(variance, dtype=float))
        chance = np.zeros(np.broadcast_shapes(np.shape(location), sd.shape))
        for node, weight in zip(NODES, weights / weights.sum(), strict=True):
            chance += weight * special.expit(location + node * sd)
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
        del phi, slots
        return 0.25

    def units(self, tasks: Tasks) -> tuple[float, float]:
        """The logit of the overall share of ones, and one logit."""
        ones = float(np.sum(tasks.outcome))
        offset = float(np.mean(tasks.slots.get("offset", 0.0)))
        return float(np.log((ones + 0.5) / (tasks.num_rows - ones + 0.5))) - offset, 1.0
