"""Expected numbers, and densities written out independently of hierbayes, that tests share.

Nothing here calls hierbayes: the evidence is the dense multivariate normal of each task's rows,
and derivatives are finite differences. ``tests/references/README.md`` says where numbers are from.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import arviz_stats
import numpy as np
import xarray as xr

FOLDER = Path(__file__).parent / "references"


def load(name: str) -> dict[str, Any]:
    """The reference of this name, ``tests/references/<name>.json``."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------ dense Gaussian evidence


class Rows(NamedTuple):
    """One task: varying columns (n, d), fixed columns (n, P), outcome (n,), sd in units of σ."""

    varying: np.ndarray
    fixed: np.ndarray
    outcome: np.ndarray
    sd: np.ndarray


class Profiled(NamedTuple):
    """The evidence with the fixed effects at their maximum, these effects, their covariance."""

    value: float
    effects: np.ndarray
    covariance: np.ndarray


def rows_of(
    frame: Any,
    task: str,
    outcome: str,
    varying: Sequence[str],
    fixed: Sequence[str],
    known_se: str | None = None,
) -> list[Rows]:
    """A DataFrame as tasks, in order of first appearance; "1" names the constant column."""
    tasks = []
    for _, part in frame.groupby(task, sort=False):
        columns = {name: part[name].to_numpy(float) for name in {*varying, *fixed} - {"1"}}
        columns["1"] = np.ones(len(part))
        stacked = [
            np.array([columns[name] for name in names]).reshape(len(names), len(part)).T
            for names in (varying, fixed)
        ]
        sd = np.ones(len(part)) if known_se is None else part[known_se].to_numpy(float)
        tasks.append(Rows(*stacked, part[outcome].to_numpy(float), sd))
    return tasks


def task_covariances(tasks: Sequence[Rows], tau: Any, corr: Any, sigma: float) -> list[np.ndarray]:
    """Cov(y_j) = X_j diag(τ) R diag(τ) X_jᵀ + σ² diag(sd²)."""
    tau = np.atleast_1d(np.asarray(tau, float))
    spread = tau[:, None] * (np.eye(len(tau)) if corr is None else np.asarray(corr)) * tau
    return [t.varying @ spread @ t.varying.T + np.diag((sigma * t.sd) ** 2) for t in tasks]


def dense_log_evidence(
    tasks: Sequence[Rows], effects: Any, tau: Any, corr: Any, sigma: float
) -> float:
    """Σ_j log N(y_j; F_j b, Cov(y_j)), with all constants."""
    total = 0.0
    for t, covariance in zip(tasks, task_covariances(tasks, tau, corr, sigma), strict=True):
        residual = t.outcome - t.fixed @ np.asarray(effects)
        sign, log_det = np.linalg.slogdet(covariance)
        assert sign > 0
        square = residual @ np.linalg.solve(covariance, residual)
        total -= 0.5 * (len(residual) * np.log(2 * np.pi) + log_det + square)
    return total


def profiled_log_evidence(
    tasks: Sequence[Rows], tau: Any, corr: Any, sigma: float, *, reml: bool = False
) -> Profiled:
    """The dense evidence at the generalised least-squares b; under REML b is integrated out.

    REML as lme4 has it: a flat prior on b, so the ML value at b̂ plus
    P/2 log 2π − ½ log |Σ_j F_jᵀ Cov_j⁻¹ F_j|.
    """
    precision, target = 0.0, 0.0
    for t, covariance in zip(tasks, task_covariances(tasks, tau, corr, sigma), strict=True):
        solved = np.linalg.solve(covariance, t.fixed)
        precision = precision + solved.T @ t.fixed
        target = target + solved.T @ t.outcome
    effects = np.linalg.solve(precision, target)
    value = dense_log_evidence(tasks, effects, tau, corr, sigma)
    if reml:
        value += 0.5 * (len(effects) * np.log(2 * np.pi) - np.linalg.slogdet(precision)[1])
    return Profiled(value, effects, np.linalg.inv(precision))


# ----------------------------------------------------------------- finite differences


def gradient(function: Callable[[np.ndarray], float], x: Any, steps: Any) -> np.ndarray:
    """Fourth-order central differences: the error falls as the step to the fourth."""
    x, steps = np.asarray(x, float), np.broadcast_to(np.asarray(steps, float), np.shape(x))
    slopes = []
    for i, h in enumerate(steps):
        e = np.zeros_like(x)
        e[i] = h
        near = function(x + e) - function(x - e)
        far = function(x + 2 * e) - function(x - 2 * e)
        slopes.append((8 * near - far) / (12 * h))
    return np.array(slopes)


def hessian(function: Callable[[np.ndarray], float], x: Any, steps: Any) -> np.ndarray:
    """Second derivatives from values alone, by fourth-order central differences."""
    x, steps = np.asarray(x, float), np.broadcast_to(np.asarray(steps, float), np.shape(x))
    weights = {-2: 1 / 12, -1: -8 / 12, 1: 8 / 12, 2: -1 / 12}
    second = {-2: -1 / 12, -1: 16 / 12, 0: -30 / 12, 1: 16 / 12, 2: -1 / 12}
    axes = np.eye(len(x)) * steps
    matrix = np.zeros((len(x), len(x)))
    for i in range(len(x)):
        matrix[i, i] = sum(w * function(x + k * axes[i]) for k, w in second.items()) / steps[i] ** 2
        for j in range(i):
            mixed = sum(
                weights[a] * weights[b] * function(x + a * axes[i] + b * axes[j])
                for a, b in itertools.product(weights, weights)
            )
            matrix[i, j] = matrix[j, i] = mixed / (steps[i] * steps[j])
    return matrix


# ------------------------------------------------------------- draws against moments


class Agreement(NamedTuple):
    """How draws compare with a reference, one entry a parameter.

    ``mean_error`` |mean − reference| in Monte-Carlo standard errors of the mean; ``sd_ratio``
    sd / reference − 1; ``sd_precision`` the Monte-Carlo standard error of the sd, relative to it.
    """

    names: list[str]
    mean_error: np.ndarray
    sd_ratio: np.ndarray
    sd_precision: np.ndarray


def agreement(posterior: xr.Dataset, expected: Mapping[str, Mapping[str, Any]]) -> Agreement:
    """Compare every entry of ``expected`` (name → mean, sd) with the draws of that name.

    The sd's own error is mcse((x − x̄)²) / (2 sd). The mcse(method="sd") of arviz_stats 0.8, the
    newest for Python 3.11, takes the effective size of x where that of (x − x̄)² belongs, and is
    too small for antithetic chains, such as those of NUTS.
    """
    names, errors, ratios, precisions = [], [], [], []
    for name, moments in expected.items():
        draws = posterior[name]
        mean, sd = (np.ravel(np.asarray(moments[k], float)) for k in ("mean", "sd"))
        over = ("chain", "draw")
        squares = (draws - draws.mean(over)) ** 2
        found_mean, found_sd = np.ravel(draws.mean(over)), np.sqrt(np.ravel(squares.mean(over)))
        if found_mean.shape != mean.shape:
            raise ValueError(f"{name}: {found_mean.size} entries, {mean.size} in the reference")
        errors.append(np.abs(found_mean - mean) / _mean_error(draws))
        ratios.append(found_sd / sd - 1)
        precisions.append(_mean_error(squares) / (2 * found_sd**2))
        names += [f"{name}[{i}]" for i in range(mean.size)]
    return Agreement(names, *(np.concatenate(v) for v in (errors, ratios, precisions)))


def _mean_error(draws: xr.DataArray) -> np.ndarray:
    return np.ravel(arviz_stats.mcse(draws.to_dataset(name="x"), method="mean")["x"])


MEAN_ERRORS = 4.0
"""Monte-Carlo standard errors: of 200 correct means one exceeds it once in about 80 runs."""

SD_RATIO = 0.05
SD_PRECISION = 0.0125
"""A quarter of the 5 % that is allowed, so that noise alone does not pass or fail the sd."""


def assert_agreement(
    posterior: xr.Dataset, expected: Mapping[str, Mapping[str, Any]], *, sds: bool = True
) -> Agreement:
    """Every mean within four of its Monte-Carlo errors, every sd within 5 %.

    With ``sds`` the draws must be many enough that each sd is known to 1.25 %.
    """
    found = agreement(posterior, expected)
    _refuse("mean, in Monte-Carlo errors", found.names, found.mean_error, MEAN_ERRORS)
    if sds:
        _refuse("Monte-Carlo error of the sd", found.names, found.sd_precision, SD_PRECISION)
        _refuse("sd against the reference", found.names, np.abs(found.sd_ratio), SD_RATIO)
    return found


def _refuse(what: str, names: list[str], values: np.ndarray, limit: float) -> None:
    bad = ~(values <= limit)  # a NaN is bad
    listed = ", ".join(f"{names[i]} {values[i]:.3g}" for i in np.flatnonzero(bad)[:8])
    assert not bad.any(), f"{what} above {limit} in {bad.sum()} of {len(names)}: {listed}"


def assert_said(warnings: Sequence[str], *words: str) -> None:
    """One of the sentences holds all of these words."""
    found = [w for w in warnings if all(word in w for word in words)]
    assert found, f"no warning says {words}; there are: {list(warnings)}"
