"""Standardised effects of tasks against those that a Gaussian prior expects."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import special

from hierbayes.checks.task_effects import TaskEffects
from hierbayes.checks.task_effects import task_effects as standardised
from hierbayes.errors import InputError, suggestion
from hierbayes.fit import Fit
from hierbayes.plots.labels import Label, named, place
from hierbayes.plots.style import axes_or_new

COVERAGE, SIMULATIONS = 0.95, 10_000
"""Probability that all Gaussian effects lie within the band, and samples by which it is found."""

RANKS = 150
"""Of more effects the band is drawn through as many of their ranks."""


def task_effects(
    fit: Fit | TaskEffects, coef: str | None = None, *, names: int = 3, ax: Any = None
) -> Any:
    """Quantiles of the tasks' standardised effects against normal quantiles.

    Effects of Gaussian tasks lie along the line, all of them within the band in 95 % of cases. Ends
    that turn steeper than the band allows are heavy tails; one end alone is skewness.

    Parameters
    ----------
    fit : Fit or TaskEffects
        Of Gaussian tasks; see :func:`hierbayes.checks.task_effects`.
    coef : str, optional
        The coefficient shown; the first by default.
    names : int
        How many tasks at most are named, of those that lie too far out.
    ax : matplotlib Axes, optional

    Returns
    -------
    matplotlib Axes
    """
    found = fit if isinstance(fit, TaskEffects) else standardised(fit)
    name = _pick(found, coef)
    z = found.z.sel(coef=name).dropna("task")
    if z.size < 3:
        raise InputError(
            f"{z.size} task(s) say something about {name!r}: too few for a picture of quantiles"
        )
    order = np.argsort(z.values)
    values, tasks = z.values[order], z["task"].values[order]
    n = len(values)
    expected = special.ndtri((np.arange(n) + 0.5) / n)
    mean, sd = float(values.mean()), float(values.std(ddof=1))
    ax = axes_or_new(ax, (4.6, 4.4))
    low, high = _draw_band(ax, expected, mean, sd)
    below, above = values < low, values > high
    out = below | above | np.isin(tasks, found.outliers.get(name, ()))
    colours = np.where(out, "#D55E00", "#333333")
    size = float(np.clip(2000 / n, 6, 22))
    ax.scatter(expected, values, s=size, c=colours.tolist(), linewidth=0, zorder=3)
    ax.margins(0.08)
    _write(ax, name, n, float(found.p_value.sel(coef=name)))
    # points within the shoulders of heavy tails stand out too, but not for being unusual
    unusual = (below == (expected < 0)) & (np.abs(values - mean) > 2 * sd)
    told = np.flatnonzero(out & unusual)
    told = told[np.argsort(-np.abs(values[told] - mean), kind="stable")][:names]
    points = np.column_stack([expected, values])
    place(ax, [Label(named(tasks[i]), [points[i]], "#D55E00") for i in told], marks=points)
    return ax


def _pick(found: TaskEffects, coef: str | None) -> str:
    """The coefficient asked for, or the first."""
    known = found.z["coef"].values.tolist()
    if coef is not None and coef not in known:
        raise InputError(f"no coefficient is named {coef!r}; {suggestion(coef, known)}")
    return known[0] if coef is None else coef


def _draw_band(
    ax: Any, expected: np.ndarray, mean: float, sd: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the band around its line and return both its ends at every quantile."""
    ranks, low, high = simultaneous_band(len(expected))
    at, low, high = expected[ranks], mean + sd * low, mean + sd * high
    ax.fill_between(
        at, low, high, color="#0072B2", alpha=0.15, lw=0,
        label=f"{COVERAGE:.0%} of Gaussian samples",
    )  # fmt: skip
    ends = expected[[0, -1]]
    ax.plot(ends, mean + sd * ends, color="#0072B2", linewidth=1.0)
    return np.interp(expected, at, low), np.interp(expected, at, high)


def _write(ax: Any, name: str, num_tasks: int, p_value: float) -> None:
    """Title, names of the axes and legend."""
    said = "" if np.isnan(p_value) else f", p = {p_value:.2g}"
    ax.set_title(f"{named(name)}: {num_tasks} tasks{said}", loc="left")
    ax.set_xlabel("normal quantiles")
    ax.set_ylabel(f"standardised effect, {named(name)}")
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    ax.spines[["top", "right"]].set_visible(False)


def simultaneous_band(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks, and bounds of the order statistics there of n normal numbers, standardised.

    Bounds of equal local level, such that 95 % of the samples lie within all of them; samples are
    standardised by their own mean and deviation, as φ̂ does it to effects.
    """
    rng = np.random.default_rng(seed)
    if n <= RANKS:
        ranks = np.arange(n)
        samples = np.sort(rng.standard_normal((SIMULATIONS, n)), axis=1)
        share = np.full(n, 1 / n)
    else:  # gaps between the ranks of uniform numbers are gammas
        ranks = np.round(n * special.ndtr(np.linspace(-4, 4, RANKS))).astype(int)
        ranks = np.unique(np.clip(np.concatenate([[0], ranks, [n - 1]]), 0, n - 1))
        gaps = np.diff(np.concatenate([[-1], ranks, [n]]))
        sums = rng.gamma(gaps, size=(SIMULATIONS, len(gaps))).cumsum(1)
        samples = special.ndtri(sums[:, :-1] / sums[:, -1:])
        share = (gaps[:-1] + gaps[1:]) / (gaps[:-1] + gaps[1:]).sum()
    samples = samples - (samples @ share)[:, None]
    sd = np.sqrt(samples**2 @ share)
    # on average that of n normal numbers, where some of their ranks stand for all
    samples *= (sd.mean() if n > RANKS else np.sqrt((n - 1) / n)) / sd[:, None]
    each = np.sort(samples, axis=0)
    # a sample's own rank at each order statistic, from the nearer end; the least tells it apart
    place_of = samples.argsort(0).argsort(0)
    least = np.minimum(place_of, SIMULATIONS - 1 - place_of).min(1)
    cut = int(np.quantile(least, 1 - COVERAGE, method="lower"))
    return ranks, each[cut], each[SIMULATIONS - 1 - cut]
