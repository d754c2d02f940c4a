"""Ranks of simulation-based calibration: how their ECDF differs from a uniform one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hierbayes.errors import InputError
from hierbayes.plots.labels import named

PASSED, FAILED, BAND = "#0072B2", "#D55E00", "#DDDDDD"
COLUMNS = 4
WIDTH, HEIGHT = 2.35, 1.75
"""Of one panel, in inches."""

MOST_NAMED = 6
"""Failed quantities that are named in a single picture."""


def calibration(found: Any, *, ax: Any = None) -> Any:
    """The share of ranks up to each rank, less what it would be if they were uniform.

    A panel a quantity, failed ones in orange and first. Right samplers stay inside the grey band
    everywhere, in all panels together, with probability 1 − ``found.level``. Failed panels have a
    scale of their own. What shapes mean: below zero throughout, the draws lie too low; above zero,
    too high; first above, then below, the posterior is too narrow; first below, then above, too
    wide.

    Parameters
    ----------
    found : hierbayes.calibration.Calibration
        Of :func:`hierbayes.check_calibration`.
    ax : matplotlib Axes, optional
        Draw all quantities into one, without a panel each.

    Returns
    -------
    array of matplotlib Axes, or ``ax``

    Examples
    --------
    >>> import matplotlib, hierbayes as hb
    >>> matplotlib.use("Agg")
    >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
    ...                                known_se="se")
    >>> axes = hb.check_calibration(model, tasks, num_simulations=20).plot()
    """
    if not found.ranks:
        raise InputError("no draws were ranked: there is nothing to draw")
    curves = {label: _difference(ranks, found.num_draws) for label, ranks in found.ranks.items()}
    failed = list(found.failed)
    return _apart(found, curves, failed) if ax is None else _together(ax, found, curves, failed)


def _apart(found: Any, curves: dict[str, Any], failed: list[str]) -> Any:
    """A panel a quantity, failed ones first."""
    import matplotlib.pyplot as plt

    labels = [*failed, *(label for label in curves if label not in failed)]
    rows = math.ceil(len(labels) / COLUMNS)
    columns = min(COLUMNS, len(labels))
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH * columns + 0.4, HEIGHT * rows + 0.5), sharex=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    usual = _limit(found, [curves[label] for label in labels if label not in failed])
    wide = _limit(found, [curves[label] for label in failed])
    corrected = found.corrected
    for k, (panel, label) in enumerate(zip(axes.flat, labels, strict=False)):
        bad = label in failed
        _draw(panel, found, curves[label], FAILED if bad else PASSED)
        panel.set_ylim(*(np.array([-1, 1]) * (wide if bad else usual)))
        panel.set_title(named(label), loc="left", fontsize=8, color=FAILED if bad else "black")
        panel.text(
            0.97, 0.94, _p(corrected[label]), transform=panel.transAxes, ha="right", va="top",
            fontsize=7, color="#333333",
        )  # fmt: skip
        panel.tick_params(labelsize=7, labelleft=k % columns == 0 or bool(failed))
        if k + columns >= len(labels):
            panel.tick_params(labelbottom=True)
    for panel in axes.flat[len(labels) :]:
        panel.set_visible(False)
    figure.supxlabel("rank of the truth among the draws, as a share of them", fontsize=9)
    figure.supylabel("share of ranks below, less uniform", fontsize=9)
    return axes.ravel()[: len(labels)]


def _together(ax: Any, found: Any, curves: dict[str, Any], failed: list[str]) -> Any:
    for label in [label for label in curves if label not in failed]:
        _draw(ax, found, curves[label], PASSED, alpha=0.5)
    for k, label in enumerate(failed):
        _draw(ax, found, curves[label], FAILED)
        if k < MOST_NAMED:
            x, y = curves[label]
            at = int(np.argmax(np.abs(y)))
            ax.annotate(
                named(label), (x[at], y[at]), xytext=(4, 4), textcoords="offset points", fontsize=8,
                color=FAILED,
            )  # fmt: skip
    limit = _limit(found, list(curves.values()))
    ax.set_ylim(-limit, limit)
    ax.set_xlabel("rank of the truth among the draws, as a share of them")
    ax.set_ylabel("share of ranks below, less uniform")
    return ax


def _difference(ranks: np.ndarray, num_draws: int) -> tuple[np.ndarray, np.ndarray]:
    """z (L + 2,) from 0 to 1, and the share of ranks below z (L + 1) less z."""
    counts = np.bincount(ranks, minlength=num_draws + 1)
    z = np.arange(num_draws + 2) / (num_draws + 1)
    return z, np.concatenate([[0.0], np.cumsum(counts) / len(ranks)]) - z


def _draw(ax: Any, found: Any, curve: Any, colour: str, alpha: float = 1.0) -> None:
    band = found.band
    z = np.concatenate([[0.0], band.position, [1.0]])
    low, high = (
        np.concatenate([[0.0], counts / band.num_ranks - band.position, [0.0]])
        for counts in (band.low, band.high)
    )
    ax.fill_between(z, low, high, color=BAND, linewidth=0, zorder=0)
    ax.axhline(0.0, color="white", linewidth=0.8, zorder=1)
    ax.plot(*curve, color=colour, linewidth=1.3, alpha=alpha, zorder=2)
    ax.set_xlim(0.0, 1.0)
    ax.set_xticks([0.0, 0.5, 1.0], ["0", "½", "1"])
    ax.locator_params(axis="y", nbins=5)
    ax.spines[["top", "right"]].set_visible(False)


def _limit(found: Any, curves: list[Any]) -> float:
    """Of the y axis: all curves and the band fit."""
    band = found.band
    widest = np.abs(np.stack([band.low, band.high]) / band.num_ranks - band.position).max()
    return 1.25 * max([float(widest), *(float(np.abs(y).max()) for _, y in curves)])


def _p(p: float) -> str:
    return "p < 1e−6" if p < 1e-6 else f"p = {p:.2g}"
