"""Estimates and intervals of every task, methods side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hierbayes.fit import Fit
from hierbayes.plots.labels import named
from hierbayes.plots.style import as_fits, axes_or_new, looks, pick_coef


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
    from scipy import stats

    fits = as_fits(fits)
    name, styles = pick_coef(fits, coef), looks(fits)
    reference = next((f for f in fits.values() if f.phi_draws is not None), None)
    reference = reference or next(iter(fits.values()))
    order = np.argsort(reference.theta.sel(coef=name).values)
    if len(order) > max_tasks:
        order = order[np.linspace(0, len(order) - 1, max_tasks).round().astype(int)]
    ax = axes_or_new(ax, (6.5, 1.2 + 0.045 * len(order) * (1.5 + len(fits))))
    tail = (1 - probability) / 2
    k = reference.tasks.coef.index(name)
    for i, (label, fit) in enumerate(fits.items()):
        offset = (i - (len(fits) - 1) / 2) * 0.8 / max(len(fits), 1)
        rows = np.arange(len(order)) - offset
        mean, sd = fit.theta.values[order, k], fit.adapted.sd.values[order, k]
        draws = fit.adapted.draws
        if draws is not None:
            low, high = np.quantile(draws[:, order, k], [tail, 1 - tail], axis=0)
        else:
            reach = stats.norm.ppf(1 - tail) * sd
            low, high = mean - reach, mean + reach
        shown = fit.adapted.posterior.identified[order, k]
        ax.hlines(rows[shown], low[shown], high[shown], color=styles[label]["color"], linewidth=1.1)
        marker = styles[label]["marker"]
        ax.scatter(mean[shown], rows[shown], s=11, zorder=3, label=named(label),
                   color=styles[label]["color"], marker=marker, linewidth=1.0)  # fmt: skip
    names = reference.tasks.names[order]
    sizes = reference.tasks.sizes[order]
    ax.set_yticks(
        np.arange(len(order)),
        [f"{named(n)} ({s})" for n, s in zip(names.tolist(), sizes, strict=True)],
        fontsize=7,
    )
    ax.set_ylim(-0.8, len(order) - 0.2)
    if len(fits) > 1:
        ax.legend(frameon=False, fontsize=8, loc="lower right")
    some = "" if len(order) == reference.tasks.num_tasks else f", {len(order)} of the tasks"
    ax.set_xlabel(f"θ_j, {named(name)}")
    title = f"{named(name)}: estimates and {probability:.0%} intervals (rows){some}"
    ax.set_title(title, loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
