r"""Scores of predictive distributions, with standard errors over tasks.

.. math:: \text{elpd} = \frac1N \sum_j \sum_{i \in j} \log p(y_{ij} \mid x_{ij}, D)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hierbayes import inputs
from hierbayes.errors import InputError
from hierbayes.fit import Fit, Prediction
from hierbayes.fit.fit import check_fit

LEVELS = (0.5, 0.8, 0.95)
"""Probabilities of the intervals that are checked."""


def held_out_scores(prediction: Prediction) -> dict[str, float]:
    """Log density, RMSE, interval coverage and width of a prediction on observed rows.

    Rows come in tasks, and rows of one task fail together: standard errors treat the tasks as
    the units of sampling (ratio estimator).

    Parameters
    ----------
    prediction : Prediction
        Of rows with outcomes; rows that the fit cannot predict are left out and counted.

    Returns
    -------
    dict
        ``rows`` scored, ``left_out``; ``log_density`` a row and ``log_density_se``; ``rmse`` and
        ``rmse_se``; ``coverage_50``, ``coverage_80``, ``coverage_95`` and ``width_50``, … in the
        outcome's units. Of discrete outcomes coverage and width are NaN, since central intervals
        of a few values say nothing; ``rmse`` of binary ones is the root of the Brier score, the
        mean of (y − P(Y = 1))²; of classes without order there is none.
    """
    inputs.instance("prediction", prediction, Prediction, "a Prediction, of fit.predict")
    outcome = prediction.tasks.outcome
    if outcome is None:
        raise InputError("the held-out rows hold no outcome to score")
    keep = ~prediction.unidentified
    task = prediction.tasks.task_of_row[keep]
    if not keep.any():
        return {"rows": 0, "left_out": int((~keep).sum())}
    log_density, log_density_se = mean_over_tasks(prediction.log_density()[keep], task)
    scores: dict[str, float] = {
        "rows": int(keep.sum()),
        "left_out": int((~keep).sum()),
        "log_density": log_density,
        "log_density_se": log_density_se,
    }
    scores |= root_mean_square(prediction)
    if prediction.discrete:
        of_intervals = [
            f"{kind}_{round(100 * p)}" for kind in ("coverage", "width") for p in LEVELS
        ]
        return scores | dict.fromkeys(of_intervals, float("nan"))
    pit = prediction.pit()[keep]
    for level in LEVELS:
        scores[f"coverage_{round(100 * level)}"] = float((np.abs(pit - 0.5) <= level / 2).mean())
    for level in LEVELS:
        low, high = prediction.interval(level)
        scores[f"width_{round(100 * level)}"] = float((high - low)[keep].mean())
    return scores


def root_mean_square(prediction: Prediction) -> dict[str, float]:
    """``rmse`` of predictive means on observed rows, and ``rmse_se`` over tasks; not of classes."""
    outcome, keep = prediction.tasks.outcome, ~prediction.unidentified
    if prediction.of_classes or outcome is None or not keep.any():
        return {}
    away = (outcome - prediction.mean)[keep]
    squared, error = mean_over_tasks(away**2, prediction.tasks.task_of_row[keep])
    rmse = float(np.sqrt(squared))
    return {"rmse": rmse, "rmse_se": error / (2 * rmse) if rmse > 0 else 0.0}


def mean_over_tasks(values: np.ndarray, task: np.ndarray) -> tuple[float, float]:
    """Mean of ``values`` over rows, and its standard error with tasks as the sampling units."""
    _, index = np.unique(task, return_inverse=True)
    return mean_of_totals(np.bincount(index, values), np.bincount(index))


def mean_of_totals(totals: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    r"""Σ_j t_j / Σ_j n_j over tasks with n_j > 0, and its standard error over tasks.

    .. math:: \text{se}^2 = \frac{J}{J-1} \sum_j (t_j - \bar t\, n_j)^2 \Big/ \Big(\sum_j n_j\Big)^2
    """
    held = sizes > 0
    totals, sizes = totals[held], sizes[held]
    mean = float(totals.sum() / sizes.sum())
    num_tasks = len(totals)
    if num_tasks < 2:
        return mean, float("nan")
    squares = ((totals - mean * sizes) ** 2).sum()
    return mean, float(np.sqrt(num_tasks / (num_tasks - 1) * squares) / sizes.sum())


def theta_differences(fit: Fit, reference: Fit) -> dict[str, float]:
    """How θ_j differs from a reference fit's.

    Returns
    -------
    dict
        ``theta_difference``: mean over tasks and coefficients of ``|θ_j − θ_j^ref|`` in units of
        the reference's posterior standard deviations; ``theta_sd_ratio``: geometric mean of
        sd(θ_j) / sd(θ_j^ref), NaN where the fit gives no standard deviations. Coefficients that
        the fit does not identify are left out.
    """
    check_fit(fit)
    check_fit(reference, "reference")
    reference_sd = reference.adapted.sd.values
    sd = fit.adapted.sd.values
    usable = np.isfinite(reference_sd) & (reference_sd > 0)
    usable &= fit.adapted.posterior.identified
    difference = np.abs(fit.theta.values - reference.theta.values)
    safe = np.where(usable, reference_sd, 1.0)
    some = usable & np.isfinite(sd) & (sd > 0)
    ratio = np.exp(np.log(sd[some] / reference_sd[some]).mean()) if some.any() else np.nan
    if some.sum() < usable.sum() and np.isfinite(sd[usable]).all() and not sd[usable].all():
        ratio = 0.0  # a posterior without width in some direction
    values: dict[str, Any] = {
        "theta_difference": (difference / safe)[usable].mean() if usable.any() else np.nan,
        "theta_sd_ratio": ratio,
    }
    return {name: float(value) for name, value in values.items()}
