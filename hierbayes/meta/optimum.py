"""Bounded maximisation of smooth criteria in few dimensions, polished by Newton steps.

Correlations at the end of their range, ±1, where no standard error can be had of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from hierbayes.phi.space import Space

SINGULAR = 1e-4
"""Relative size of a direction's standard deviation below which it counts as zero, as in lme4."""

HELD = (
    "the estimated correlations are at their boundary (±1): the standard errors of tau "
    "and sigma hold them fixed there, and the data may not support correlated effects"
)


def at_the_boundary(corr: np.ndarray, blocks: Iterable[Sequence[int]]) -> bool:
    """Whether some direction within a block of correlated coefficients has no variance left.

    ``corr`` (d, d): the smallest eigenvalue of a block is the squared relative standard deviation
    of a direction, and counts as zero below :data:`SINGULAR` squared.
    """
    return any(
        len(b) > 1 and np.linalg.eigvalsh(corr[np.ix_(b, b)])[0] < SINGULAR**2 for b in blocks
    )


def held_entries(space: Space, phi: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """Entries of φ's vector (P,) of bool that stand for correlations to be held, and why.

    All of them where a correlation lies at its boundary; of a pair with τ = 0 in it, the pair's,
    which nothing depends on.
    """
    held = np.zeros(space.size, bool)
    if "corr" not in phi or not space.blocks:
        return held, []
    spread = phi["tau"] > 0
    if at_the_boundary(phi["corr"], [[i for i in b if spread[i]] for b in space.blocks]):
        held[space.at["corr"]] = True
        return held, [HELD]
    start = space.at["corr"].start
    for b in space.blocks:
        size = len(b) * (len(b) - 1) // 2
        held[start : start + size] = len(b) == 2 and not spread[list(b)].all()
        start += size
    return held, []


ValueAndSlope = Callable[[np.ndarray], tuple[float, np.ndarray]]
Near = Callable[[np.ndarray], ValueAndSlope]


FAILED = (
    "the search for a maximum has failed: no point was found where the criterion's slope vanishes "
    "and that is better than complete pooling; the estimates are those of the best point that was "
    "seen, and their standard errors mean nothing"
)


@dataclass(frozen=True)
class Optimum:
    """A learned φ̂ and what is known about it.

    ``along``: how φ̂ moves along independent normal directions of unit size, by name (…, r), so that
    standard errors follow in any columns; NaN or empty where they are not known.
    """

    phi: dict[str, np.ndarray]
    log_evidence: float
    standard_errors: dict[str, np.ndarray]
    warnings: list[str] = field(default_factory=list)
    log_posterior: float | None = None
    along: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Minimum:
    """Where a bounded minimisation ended; ``problem`` says why it may not be a minimum."""

    x: np.ndarray
    value: float
    problem: str | None


def highest(
    climb: Callable[[np.ndarray], Minimum],
    start: np.ndarray | Minimum,
    rivals: list[np.ndarray],
    value_and_slope: ValueAndSlope,
) -> Minimum:
    """What ``climb`` finds from ``start``, or from whichever rival is better than what it found.

    A criterion may have several optima: rivals are points that no answer may be worse than, the
    boundary first of all, and the start of another criterion.
    """
    best = start if isinstance(start, Minimum) else climb(start)
    for rival in rivals:
        value = value_and_slope(rival)[0]
        if not np.isfinite(value) or best.value <= value + 1e-9 * max(1.0, abs(value)):
            continue
        again = climb(rival)
        if not again.value <= value + 1e-9 * max(1.0, abs(value)):
            again = Minimum(rival, value, FAILED)
        best = again
    return best


def minimise(
    value_and_slope: ValueAndSlope,
    starts: list[np.ndarray],
    lower: np.ndarray,
    near: Near | None = None,
) -> Minimum:
    """The best of several bounded quasi-Newton runs, polished by Newton steps off the bounds."""
    from scipy import optimize

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
    return polish(value_and_slope, np.asarray(best.x), lower, near)


def polish(
    value_and_slope: ValueAndSlope,
    x: np.ndarray,
    lower: np.ndarray,
    near: Near | None = None,
) -> Minimum:
    """Newton steps off the bounds, from a point that is nearly the minimum.

    ``near(x)``, where given, is the criterion around x, cheap and exact to second order.
    """
    end = newton(value_and_slope, x, lower, near)
    free = ~((end.x <= lower) & (end.slope >= 0))
    hessian = end.hessian
    if hessian is None or hessian.shape[0] != free.sum():
        hessian = curvature(value_and_slope if near is None else near(end.x), end.x, free)
    return Minimum(end.x, float(end.value), unsettled(end.slope[free], hessian, end.value))


class Stepped(NamedTuple):
    """Where Newton's steps ended; ``hessian``, of the free coordinates, where it is known there."""

    x: np.ndarray
    value: float
    slope: np.ndarray
    hessian: np.ndarray | None


def newton(
    value_and_slope: ValueAndSlope,
    x: np.ndarray,
    lower: np.ndarray,
    near: Near | None = None,
    flat: float = 0.0,
) -> Stepped:
    """The steps of :func:`polish`.

    Along directions with no more than the share ``flat`` of the largest curvature x stays.
    """
    value, slope = value_and_slope(x)
    hessian = None
    for _ in range(20):
        free = ~((x <= lower) & (slope >= 0))
        if not free.any():
            break
        hessian = curvature(value_and_slope if near is None else near(x), x, free)
        if not np.isfinite(hessian).all():
            break
        values, vectors = np.linalg.eigh(hessian)
        bent = values > flat * values[-1]
        if values[0] < -flat * values[-1] or not bent.any():
            break
        step = np.zeros_like(x)
        along = np.where(bent, vectors.T @ slope[free], 0.0)
        step[free] = -vectors @ (along / np.where(bent, values, 1.0))
        # too little for the value to tell, but the slope still tells the estimate many digits more
        settled = float(-slope @ step) < 1e-14 * max(1.0, abs(value))
        relative = float((np.abs(step) / np.maximum(0.1, np.abs(x))).max())
        if settled and not 1e-12 < relative < 1e-4:
            break
        trial = np.maximum(x + step, lower)
        after, slope_after = value_and_slope(trial)
        if not (settled or after <= value + 1e-12 * abs(value)):
            break
        x, value, slope = trial, after, slope_after
        if settled:
            break
        hessian = None
    return Stepped(x, value, slope, hessian)


def descend(
    value_and_slope: ValueAndSlope, x: np.ndarray, lower: np.ndarray, near: Near
) -> np.ndarray:
    """Damped Newton steps inside the bounds: a dozen, from afar to near a minimum.

    Directions of negative curvature are followed as if it were positive. Where nothing is gained
    any more the last point is returned, for :func:`polish` to judge.
    """
    bounded = np.isfinite(lower)
    bound = np.where(bounded, lower, 0.0)
    value, slope = value_and_slope(x)
    for _ in range(30):
        free = ~((x <= lower) & (slope >= 0))
        hessian = curvature(near(x), x, free)
        if not (free.any() and np.isfinite(hessian).all()):
            break
        values, vectors = np.linalg.eigh(hessian)
        values = np.maximum(np.abs(values), 1e-8 * np.abs(values).max() + 1e-300)
        step = np.zeros_like(x)
        step[free] = -vectors @ ((vectors.T @ slope[free]) / values)
        step /= max(1.0, np.abs(step).max())
        decrement = float(-slope @ step)
        for shrink in (1.0, 0.3, 0.1, 0.01):
            # a zero column of Λ is stationary: whoever steps on the bound never leaves it
            trial = np.maximum(x + shrink * step, np.where(bounded, 0.8 * bound + 0.2 * x, -np.inf))
            found = value_and_slope(trial)
            if found[0] < value:
                break
        else:
            break
        x, (value, slope) = trial, found
        if decrement < 1e-2:  # a tenth of a standard error
            break
    return x


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


def unsettled(slope: np.ndarray, hessian: np.ndarray, value: float) -> str | None:
    """What to say of a point off which a Newton step would still gain something; None of a maximum.

    ``slope`` and ``hessian`` in the coordinates that are free.
    """
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
