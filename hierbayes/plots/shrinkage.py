"""Every task's way from its own estimate to the common one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hierbayes.fit import Fit
from hierbayes.plots.labels import named
from hierbayes.plots.style import as_fits, axes_or_new, looks, pick_coef


def shrinkage(fits: Mapping[str, Fit], *, coef: str | None = None, ax: Any = None) -> Any:
    """One column a method, from no pooling to complete pooling, one line a task.

    Lines are darker the more rows a task has; tasks that do not identify the coefficient alone
    start at the second column.

    Parameters
    ----------
    fits : mapping from label to Fit
    coef : str, optional
        The coefficient shown; the first by default.
    ax : matplotlib Axes, optional

    Returns
    -------
    matplotlib Axes
    """
    fits = as_fits(fits)
    fits = dict(sorted(fits.items(), key=lambda item: item[1].method.rank))
    name, styles = pick_coef(fits, coef), looks(fits)
    ax = axes_or_new(ax, (1.7 * len(fits) + 1.5, 4.2))
    first = next(iter(fits.values()))
    k = first.tasks.coef.index(name)
    columns = []
    for fit in fits.values():
        values = fit.theta.sel(coef=name).values.copy()
        values[~fit.adapted.posterior.identified[:, k]] = np.nan
        columns.append(values)
    paths, places = np.array(columns), np.arange(len(fits))
    sizes = first.tasks.sizes
    weight = 0.12 + 0.6 * np.sqrt(sizes / max(sizes.max(), 1))
    for j in range(paths.shape[1]):
        ax.plot(places, paths[:, j], color="#333333", alpha=weight[j], linewidth=0.8, zorder=1)
    for place, label in enumerate(fits):
        size = 6 + 60 * np.sqrt(sizes / max(sizes.max(), 1))
        ax.scatter(
            np.full(paths.shape[1], place), paths[place], s=size, linewidth=0.8, zorder=2,
            color=styles[label]["color"],
            marker="o" if styles[label]["marker"] == "|" else styles[label]["marker"],
        )  # fmt: skip
    ax.set_xticks(places, [named(label) for label in fits])
    ax.set_xlim(-0.35, len(fits) - 0.65)
    ax.set_ylabel(f"θ_j, {named(name)}")
    ax.set_title(f"{first.tasks.num_tasks} tasks: shrinkage of {named(name)}", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    return ax
