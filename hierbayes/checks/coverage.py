r"""How often intervals of θ_j hold the truth that data were simulated from.

.. math:: \text{coverage} = \frac{1}{J d} \sum_{j, k}
          1\{\, |F_{jk}(\theta_{jk}) - \tfrac12| \le \tfrac12 \text{level} \,\}

averaged over data sets, which are the units of its standard error: tasks of one data set share φ̂,
and fail together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import special

from hierbayes.adaptation import GradientSteps
from hierbayes.checks.scores import LEVELS
from hierbayes.equivalence import equivalent_prior
from hierbayes.equivalence.validity import Status
from hierbayes.errors import NotApplicable
from hierbayes.fit import Fit


def normal_posterior(fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Means (J, d) and standard deviations (J, d) of what a fit says of θ_j.

    Of gradient steps those of the posterior that they imply; NaN in tasks without one.
    """
    if isinstance(fit.adaptation, GradientSteps):
        implied = equivalent_prior(fit.model, fit.tasks, fit)
        variance = np.diagonal(implied.posterior_covariance, axis1=1, axis2=2)
        none = np.asarray(implied.status == Status.NO_PRIOR)[:, None]
        sd = np.sqrt(np.where(none, np.nan, np.maximum(variance, 0.0)))
        return np.asarray(implied.posterior_mean), sd
    found = fit.adapted.posterior
    if found.covariance is None:
        raise NotApplicable(f"{fit.method} says nothing about how sure it is of theta")
    return found.mean, np.sqrt(np.diagonal(found.covariance, axis1=1, axis2=2))


def covered_by_normal(truth: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """The share of the (J, d) truths inside the central normal interval of each level, (3,)."""
    known = np.isfinite(sd)
    away = np.abs(truth - mean)[known]
    if not away.size:
        return np.full(len(LEVELS), np.nan)
    half = special.ndtri(0.5 + 0.5 * np.array(LEVELS))
    return (away <= half[:, None] * sd[known]).mean(1)


def covered_by_draws(truth: np.ndarray, draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same of the central interval of draws (L, J, d), by the rank of the truth among them.

    A rank is spread at random over its own (L + 1)th of the probability, so that independent draws
    from the posterior cover exactly what they should.
    """
    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)
    at = (below + rng.random(truth.shape) * (ties + 1)) / (len(draws) + 1)
    return np.array([(np.abs(at - 0.5) <= level / 2).mean() for level in LEVELS])


def coverage_table(covered: dict[str, np.ndarray]) -> Any:
    """A row a method and level, from shares (data sets, levels), as a pandas DataFrame."""
    import pandas as pd

    rows = []
    for method, shares in covered.items():
        known = np.isfinite(shares).all(1)
        kept = shares[known]
        for k, level in enumerate(LEVELS):
            one = len(kept) == 1
            se = np.nan if one or not len(kept) else kept[:, k].std(ddof=1) / np.sqrt(len(kept))
            mean = kept[:, k].mean() if len(kept) else np.nan
            rows.append((method, level, mean, se, len(kept)))
    columns = ["method", "nominal", "coverage", "se", "data_sets"]
    return pd.DataFrame(rows, columns=columns).set_index(["method", "nominal"])
