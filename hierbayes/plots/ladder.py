"""The rungs between gradient steps and the full posterior: how far each is, and how it looks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hierbayes.errors import InputError, suggestion
from hierbayes.fit import Fit
from hierbayes.plots.labels import named
from hierbayes.plots.style import ellipse

_COLOURS = ("#D55E00", "#E69F00", "#009E73", "#0072B2")
_LINES = ("-", (0, (5, 2)), (0, (1, 1.2)), "-")
"""Rungs may lie on top of one another: broken lines let the one below be seen."""


def ladder(
    fits: Mapping[str, Fit], by_task: Any, *, floor: float, task: Any = None, axes: Any = None
) -> Any:
    """Each task's divergence from the full posterior by rung, and one task's rungs over its draws.

    Left: one point a task and rung, larger where the task has more rows; below the grey line the
    full posterior's own Monte-Carlo error would be as large. Right: 90 % ellipses of every rung for
    one task over draws from its full posterior (densities where there is one coefficient).

    Parameters
    ----------
    fits : mapping from rung to Fit
        The last is the full posterior.
    by_task : DataFrame
        With ``kl`` and ``status``, indexed by rung and task, as :func:`equivalence_report` makes.
    floor : float
        Of the divergence.
    task : optional
        Name of the task on the right; by default the one with the median divergence of the first
        rung, among those whose steps are a prior.
    axes : sequence of two matplotlib Axes, optional

    Returns
    -------
    array of two matplotlib Axes
    """
    if axes is None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(1, 2, figsize=(10.5, 4.3), layout="constrained")
    left, right = axes
    _divergences(fits, by_task, floor, left)
    _one_task(fits, by_task, task, right)
    return np.array([left, right])


def _divergences(fits: Mapping[str, Fit], by_task: Any, floor: float, ax: Any) -> None:
    rungs = list(fits)[:-1]
    rng = np.random.default_rng(0)
    sizes = fits[rungs[0]].tasks.sizes
    area = 8 + 50 * np.sqrt(sizes / max(sizes.max(), 1))
    for place, rung in enumerate(rungs):
        kl = by_task.loc[rung, "kl"].to_numpy()
        shown = np.isfinite(kl)
        offset = rng.uniform(-0.18, 0.18, len(kl))
        ax.scatter(
            place + offset[shown], np.maximum(kl[shown], floor * 1e-2), s=area[shown],
            color=_COLOURS[place], alpha=0.6, linewidth=0,
        )  # fmt: skip
        middle = np.median(kl[~np.isnan(kl)]) if (~np.isnan(kl)).any() else np.nan
        if np.isfinite(middle):
            ax.plot([place - 0.3, place + 0.3], [middle] * 2, color="black", linewidth=1.5)
        if infinite := int(np.isinf(kl).sum()):
            ax.text(
                place, 0.98, f"infinite in\n{infinite} task(s)", fontsize=8, ha="center", va="top",
                transform=ax.get_xaxis_transform(), color=_COLOURS[place],
            )  # fmt: skip
    ax.set_yscale("log")
    bottom = min(ax.get_ylim()[0], floor / 3)
    ax.set_ylim(bottom=bottom)
    ax.axhspan(bottom, floor, color="#bbbbbb", alpha=0.35, linewidth=0, zorder=0)
    ax.annotate(
        "Monte-Carlo error", (len(rungs) - 0.5, floor), (-4, -3), color="#555555", fontsize=8,
        textcoords="offset points", va="top", ha="right",
    )  # fmt: skip
    left_out = int((by_task.loc[rungs[0], "status"] == "no prior").sum())
    if left_out:
        ax.text(
            0, 0.98, f"{left_out} task(s) without\na Gaussian prior", fontsize=8, ha="center",
            va="top", transform=ax.get_xaxis_transform(), color=_COLOURS[0],
        )  # fmt: skip
    ax.set_xticks(range(len(rungs)), rungs)
    ax.set_xlim(-0.5, len(rungs) - 0.5)
    ax.set_ylabel("KL to the full posterior, nats")
    ax.set_title("how far each rung is, task by task", loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def _one_task(fits: Mapping[str, Fit], by_task: Any, task: Any, ax: Any) -> None:
    from scipy import stats

    full = list(fits.values())[-1]
    tasks = full.tasks
    first = by_task.loc[next(iter(fits))]
    if task is None:
        kl = first["kl"].to_numpy()
        order = np.argsort(np.where(np.isfinite(kl), kl, np.inf))
        j = int(order[max((np.isfinite(kl).sum() - 1) // 2, 0)])
    else:
        position = tasks.labels.position(task)
        if position is None:
            raise InputError(
                f"no task is named {task!r}; {suggestion(str(task), tasks.names.tolist())}"
            )
        j = position
    assert full.theta_draws is not None
    draws = full.theta_draws.reshape(-1, *full.theta_draws.shape[2:])[:, j]
    none = first["status"].to_numpy()[j] == "no prior"
    pair = draws.shape[1] > 1
    if pair:
        thin = draws[:: max(len(draws) // 1500, 1)]
        ax.plot(thin[:, 0], thin[:, 1], ".", color="#999999", markersize=2, alpha=0.5, zorder=0)
    else:
        ax.hist(draws[:, 0], bins=60, density=True, color="#cccccc", zorder=0)
    for place, (rung, fit) in enumerate(fits.items()):
        adapted = fit.adapted.posterior
        assert adapted.covariance is not None
        mean, covariance = adapted.mean[j], adapted.covariance[j]
        missing = none and place == 0
        label = f"{rung}: no Gaussian prior" if missing else rung
        if missing:
            ax.plot(*(mean[:2] if pair else (mean[0], 0.0)), "x", color=_COLOURS[0], label=label)
            continue
        if pair:
            x, y = ellipse(mean[:2], covariance[:2, :2], 0.9).T
            ax.plot(mean[0], mean[1], "o", color=_COLOURS[place], markersize=4)
        else:
            sd = float(np.sqrt(covariance[0, 0]))
            if sd < 1e-3 * draws.std():  # a point: its density would flatten all others
                ax.axvline(
                    mean[0], color=_COLOURS[place], linestyle=_LINES[place], linewidth=2.0,
                    label=f"{rung}: a point",
                )  # fmt: skip
                continue
            x = np.linspace(mean[0] - 4 * sd, mean[0] + 4 * sd, 200)
            y = stats.norm.pdf(x, mean[0], sd)
        ax.plot(x, y, color=_COLOURS[place], linestyle=_LINES[place], linewidth=2.0, label=label)
    names = [named(coef) for coef in tasks.coef[:2]]
    ax.set_xlabel(f"θ, {names[0]}")
    ax.set_ylabel(f"θ, {names[1]}" if pair else "posterior density")
    ax.set_title(
        f"{named(tasks.labels.task)} {named(tasks.names[j])}: {tasks.sizes[j]} "
        + ("row" if tasks.sizes[j] == 1 else "rows")
        + (", 90 % ellipses" if pair else ""),
        loc="left",
    )
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
