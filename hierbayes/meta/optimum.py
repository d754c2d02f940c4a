"""Bounded maximisation of smooth criteria in few dimensions, polished by Newton steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import optimize

ValueAndSlope = Callable[[np.ndarray], tuple[float, np.ndarray]]


@dataclass(frozen=True)
class Optimum:
    """A learned φ̂ and what is known about it."""

    phi: dict[str, np.ndarray]
    log_evidence: float
    standard_errors: dict[str, np.ndarray]
    warnings: list[str] = field(default_factory=list)
    log_posterior: float | None = None


@dataclass(frozen=True)
class Minimum:
    """Where a bounded minimisation ended; ``problem`` says why it may not be a minimum."""

    x: np.ndarray
    value: float
    problem: str | None


def minimise(
    value_and_slope: ValueAndSlope,
    starts: list[np.ndarray],
    lower: np.ndarray,
) -> Minimum:
    """The best of several bounded quasi-Newton runs, polished by Newton steps off the bounds."""
    runs = []
    for start in starts:
        run: Any = optimize.minimize(
            value_and_slope, start, jac=True, method="L-BFGS-B",
            bounds=[(b if np.isfinite(b) else None, None) for b in lower],
            options={"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-9},
        )  # fmt: skip
        if np.isfinite(run.fun):
            runs.append(run)
    if not runs:
        return Minimum(starts[0], np.nan, "the criterion is not finite at any starting point")
    best = min(runs, key=lambda run: run.fun)
    x, value = np.asarray(best.x), float(best.fun)
    for _ in range(20):
        value, slope = value_and_slope(x)
        free = ~((x <= lower) & (slope >= 0))
        if not free.any():
            break
        hessian = curvature(value_and_slope, x, free)
        values, vectors = np.linalg.eigh(hessian)
        if values[0] <= 0:
            break
        step = np.zeros_like(x)
        step[free] = -vectors @ ((vectors.T @ slope[free]) / values)
        decrement = float(-slope @ step)
        trial = np.maximum(x + step, lower)
        if decrement < 1e-14 * max(1.0, abs(value)):
            break
        if not value_and_slope(trial)[0] <= value + 1e-12 * abs(value):
            break
        x = trial
    else:
        value, slope = value_and_slope(x)
    free = ~((x <= lower) & (slope >= 0))
    hessian = curvature(value_and_slope, x, free)
    return Minimum(x, float(value), _problem(slope[free], hessian, value))


def curvature(value_and_slope: ValueAndSlope, x: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Hessian in the coordinates ``which`` (bool), by fourth-order differences of exact slopes.

    Second derivatives by automatic differentiation would take longer to compile than all the rest;
    the differences are right to about ten digits.
    """
    places = np.flatnonzero(which)
    columns = []
    for i in places:
        step = np.zeros_like(x)
        step[i] = 1e-3 * max(abs(x[i]), 1e-2)
        near = value_and_slope(x + step)[1] - value_and_slope(x - step)[1]
        far = value_and_slope(x + 2 * step)[1] - value_and_slope(x - 2 * step)[1]
        columns.append((8 * near - far)[places] / (12 * step[i]))
    hessian = np.array(columns).reshape(len(places), len(places))
    return 0.5 * (hessian + hessian.T)


def _problem(slope: np.ndarray, hessian: np.ndarray, value: float) -> str | None:
    if not slope.size:
        return None
    if not (np.isfinite(slope).all() and np.isfinite(hessian).all()):
        return "the criterion's derivatives are not finite at the estimate"
    step = np.linalg.lstsq(hessian, slope, rcond=1e-12)[0]
    gain = 0.5 * float(slope @ step)
    if abs(gain) > 1e-6 * max(1.0, abs(value) * 1e-3):
        return (
            f"the optimiser stopped before a maximum (a Newton step would still change the "
            f"log evidence by {abs(gain):.2g}); rescale the predictors, or look for tasks or "
            "columns with hardly any information"
        )
    return None
