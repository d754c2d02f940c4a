"""Held-out scores of several fits."""

from __future__ import annotations

from typing import Any

import numpy as np

from hierbayes.plots.labels import named
from hierbayes.plots.style import axes_or_new


def scores(table: Any, *, column: str = "log_density", ax: Any = None) -> Any:
    """A score of each method with one standard error over tasks either way.

    Parameters
    ----------
    table : DataFrame
        ``Comparison.table``.
    column : str
        A column that has a ``…_se`` beside it: ``log_density`` or ``rmse``.
    ax : matplotlib Axes, optional

    Returns
    -------
    matplotlib Axes
    """
    ax = axes_or_new(ax, (5.5, 0.5 * len(table) + 1.2))
    shown = table[table[column].notna()][::-1]
    rows = np.arange(len(shown))
    error = shown[f"{column}_se"].fillna(0.0)
    ax.errorbar(shown[column], rows, xerr=error, fmt="o", color="#0072B2", capsize=3)
    ax.set_yticks(rows, [named(label) for label in shown.index])
    ax.set_ylim(-0.6, len(shown) - 0.4)
    ax.set_xlabel(f"{column.replace('_', ' ')} (± one standard error over tasks)")
    ax.locator_params(axis="x", nbins=5)
    ax.set_title("held-out score", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    return ax
