"""Estimates and intervals of every task, methods side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hierbayes.fit import Fit
from hierbayes.plots.labels import named
from hierbayes.plots.style import as_fits, axes_or_new, looks, pick_coef
from hierbayes.tasks import Tasks


def forest(
    fits: Fit | Mapping[str, Fit],
    *,
    coef: str | None = None,
    probability: float = 0.95,
    max_tasks: int = 30,
    ax: Any = None,
) -> Any:
    """Posterior means and intervals of one coefficient, a row a task, a colour a method.

    Parameters
    ----------
    fits : Fit or mapping from label to Fit
        Point estimates (MAML, iMAML, Reptile) are drawn without an interval.
    coef : str, optional
        The coefficient shown; the first by default.
    probability : float
        Of the central intervals.
    max_tasks : int
        With more tasks, an even choice of this many, from the smallest estimate to the largest.
    ax : matplotlib Axes, optional

    Returns
    -------
    matplotlib Axes
    """
    fits = as_fits(fits)
    name, styles = pick_coef(fits, coef), looks(fits)
    first = next(iter(fits.values()))
    reference = next((f for f in fits.values() if f.phi_draws is not None), first)
    order = np.argsort(reference.theta.sel(coef=name).values)
    if len(order) > max_tasks:
        order = order[np.linspace(0, len(order) - 1, max_tasks).round().astype(int)]
    ax = axes_or_new(ax, (6.5, 1.2 + 0.045 * len(order) * (1.5 + len(fits))))
    k = reference.tasks.coef.index(name)
    for i, (label, fit) in enumerate(fits.items()):
        offset = (i - (len(fits) - 1) / 2) * 0.8 / len(fits)
        rows = np.arange(len(order)) - offset
        mean, low, high = _estimates(fit, order, k, probability)
        shown = fit.adapted.posterior.identified[order, k]
        ax.hlines(rows[shown], low[shown], high[shown], color=styles[label]["color"], linewidth=1.1)
        marker = styles[label]["marker"]
        ax.scatter(mean[shown], rows[shown], s=11, zorder=3, label=named(label),
                   color=styles[label]["color"], marker=marker, linewidth=1.0)  # fmt: skip
    _name_rows(ax, reference.tasks, order)
    if len(fits) > 1:
        ax.legend(frameon=False, fontsize=8, loc="lower right")
    some = "" if len(order) == reference.tasks.num_tasks else f", {len(order)} of the tasks"
    ax.set_xlabel(f"θ_j, {named(name)}")
    title = f"{named(name)}: estimates and {probability:.0%} intervals (rows){some}"
    ax.set_title(title, loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _estimates(
    fit: Fit, order: np.ndarray, k: int, probability: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The means of tasks in this order and both ends of their intervals."""
    from scipy import stats

    tail = (1 - probability) / 2
    mean, draws = fit.theta.values[order, k], fit.adapted.draws
    if draws is not None:
        low, high = np.quantile(draws[:, order, k], [tail, 1 - tail], axis=0)
        return mean, low, high
    reach = stats.norm.ppf(1 - tail) * fit.adapted.sd.values[order, k]
    return mean, mean - reach, mean + reach


def _name_rows(ax: Any, tasks: Tasks, order: np.ndarray) -> None:
    """Each task's name and its number of rows."""
    named_sizes = zip(tasks.names[order].tolist(), tasks.sizes[order], strict=True)
    ax.set_yticks(np.arange(len(order)), [f"{named(n)} ({s})" for n, s in named_sizes], fontsize=7)
    ax.set_ylim(-0.8, len(order) - 0.2)
