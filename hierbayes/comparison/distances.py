"""Distances of one fit's θ from another's, task by task, and what Monte-Carlo error alone gives."""

from __future__ import annotations

from typing import Any

import numpy as np

from hierbayes.checks.gaussians import LEVELS, coverage, kl_divergence, wasserstein
from hierbayes.fit import Fit, Prediction
from hierbayes.fit.effective import ess


class Reference:
    """The full posterior's moments of every task, and how well the draws tell them."""

    def __init__(self, posterior: Fit):
        theta = posterior.theta_draws
        assert theta is not None
        adapted = posterior.adapted.posterior
        assert adapted.covariance is not None
        self.mean, self.covariance = adapted.mean, adapted.covariance
        self.draws = theta.reshape(-1, *theta.shape[2:])
        self.ess = ess(theta, "bulk").min(1)
        self.num_coef = theta.shape[-1]


def distances(fit: Fit, reference: Reference) -> dict[str, np.ndarray]:
    """Of every task (J,) from the full posterior, and the share of its draws inside intervals."""
    adapted = fit.adapted.posterior
    assert adapted.covariance is not None
    here = (adapted.mean, adapted.covariance)
    there = (reference.mean, reference.covariance)
    values = between(here, there)
    for level, inside in zip(LEVELS, coverage(*here, reference.draws), strict=True):
        values[f"coverage_{round(100 * level)}"] = inside
    return values


def between(here: Any, there: Any) -> dict[str, np.ndarray]:
    """Distances of each task from one normal posterior to another.

    A coefficient that is the same point in both is no shift, and a ratio of 1.
    """
    sd, own = (np.sqrt(np.maximum(np.diagonal(c, axis1=1, axis2=2), 0.0)) for _, c in (there, here))
    shift = np.abs(here[0] - there[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.where(shift == 0, 0.0, shift / sd)
        ratio = np.where(own == sd, 1.0, own / sd)
        return {
            "kl": kl_divergence(*here, *there),
            "wasserstein": wasserstein(*here, *there),
            "mean_shift": shift.mean(1),
            "sd_ratio": np.exp(np.log(ratio).mean(1)),
        }


def summarise(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Over tasks: medians of divergences, means of shifts, geometric means of ratios."""

    def over(name: str, value: np.ndarray) -> float:
        known = value[~np.isnan(value)]
        if not known.size:
            return np.nan
        if name in ("kl", "wasserstein"):
            return float(np.median(known))
        if name == "sd_ratio":
            with np.errstate(divide="ignore"):
                return float(np.exp(np.log(known).mean()))
        return float(known.mean())

    return {name: over(name, value) for name, value in values.items()}


def density_error(prediction: Prediction, ess: float) -> float:
    """Monte-Carlo error of the mean log density: each draw's influence on Σ_i log mean_s p_is."""
    parts = prediction.log_density_of_components()
    if len(parts) == 1:
        return 0.0
    weight = np.exp(parts - parts.max(0))
    influence = (weight / weight.mean(0)).sum(1)
    return float(influence.std() / np.sqrt(ess) / parts.shape[1])
