"""Pictures of the benchmark on sinusoids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.output import look, plain_numbers, save_figure

GROUPS = (
    ("MAML, 0.01", "MAML, 0.001", "first-order MAML", "Meta-SGD", "ANIL"),
    ("MAML, 0.01", "iMAML", "Reptile", "LLAMA", "ABML", "Bayesian last layer"),
)
"""Curves that share a row of panels: few enough to be told apart; MAML in both."""


SHOWN = (1e-3, 10.0)
"""Errors that the curves show: steps too long for a few tasks take a mean beyond any picture."""


def draw_curves(found: dict[str, Any], shots: Sequence[int], path: Path) -> None:
    """Test error against gradient steps, a column a number of rows; bands are 95 % intervals."""
    import matplotlib.pyplot as plt

    groups = [[n for n in group if n in found["methods"]] for group in GROUPS]
    groups = [group for group in groups if group]
    if not groups:
        return
    figure, axes = plt.subplots(
        len(groups), len(shots), figsize=(3.3 * len(shots) + 2.4, 3.2 * len(groups)),
        layout="constrained", sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    for row, group in zip(axes, groups, strict=True):
        for ax, number in zip(row, shots, strict=True):
            for i, name in enumerate(group):
                _curve(ax, found["methods"][name]["curves"][str(number)], name, look(i))
            floor = found["anchors"]["unadapted"]
            ax.axhline(floor, color="0.35", lw=1, ls=(0, (2, 2)), label="best before any row")
            ax.set(yscale="log", xticks=range(0, 11, 2), ylim=SHOWN)
            plain_numbers(ax.yaxis)
            ax.grid(alpha=0.3)
        row[0].set_ylabel("test mean squared error")
        row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)
    for ax, number in zip(axes[0], shots, strict=True):
        ax.set_title(f"{number} rows", fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("gradient steps")
    save_figure(figure, path)


def _curve(ax: Any, each: list[dict[str, float]], name: str, style: dict[str, Any]) -> None:
    if len(each) == 1:
        ax.axhline(each[0]["mse"], color=style["color"], ls=style["linestyle"], label=name)
        ax.axhspan(each[0]["low"], each[0]["high"], color=style["color"], alpha=0.2, lw=0)
        return
    steps = [point["step"] for point in each]
    ax.plot(steps, [point["mse"] for point in each], **style, markersize=4, lw=1.3, label=name)
    low, high = ([max(point[side], SHOWN[0]) for point in each] for side in ("low", "high"))
    ax.fill_between(steps, low, high, color=style["color"], alpha=0.2, lw=0)


def draw_scores(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Log score, RMSE and coverage at five rows, with 95 % intervals over tasks."""
    import matplotlib.pyplot as plt

    if not rows:
        return
    rows = sorted(rows, key=lambda row: row["log_score"])
    at = range(len(rows))
    figure, axes = plt.subplots(
        1, 3, figsize=(11.5, 0.36 * len(rows) + 1.5), layout="constrained", sharey=True,
        width_ratios=(1, 1, 1.4),
    )  # fmt: skip
    for ax, name, title in zip(
        axes, ("log_score", "rmse"), ("log score a row (higher is better)", "RMSE"), strict=False
    ):
        widths = [1.96 * row[f"{name}_se"] for row in rows]
        ax.errorbar([row[name] for row in rows], at, xerr=widths, capsize=2, ls="none",
                    color=look(0)["color"], marker="o", markersize=5)  # fmt: skip
        ax.set_xlabel(title)
    for i, level in enumerate((50, 80, 95)):
        style = look(i) | {"linestyle": "none"}
        widths = [1.96 * row[f"coverage_{level}_se"] for row in rows]
        axes[2].axvline(level / 100, color=style["color"], lw=1, ls=":")
        axes[2].errorbar([row[f"coverage_{level}"] for row in rows], at, xerr=widths, capsize=2,
                         markersize=5, label=f"{level} %", **style)  # fmt: skip
    axes[2].set(xlabel="coverage of intervals (dotted: as promised)")
    axes[2].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes[0].set_yticks(at, [f"{row['method']} ({row['spread']})" for row in rows], fontsize=8)
    for ax in axes:
        ax.grid(alpha=0.3)
    save_figure(figure, path)
