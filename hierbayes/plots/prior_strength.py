"""How strong a prior gradient steps imply, for every number of steps and every ηλ."""

from __future__ import annotations

from typing import Any

import numpy as np

from hierbayes.adaptation.descent import Descent, implied_precision
from hierbayes.equivalence.implied import EquivalentPrior, described
from hierbayes.errors import InputError
from hierbayes.numerics import float64
from hierbayes.plots.labels import halo
from hierbayes.plots.style import axes_or_new

LEAST, MOST = 1e-3, 2.0
"""Range of ηλ."""

WEAK, STRONG = 1e-3, 1e3
"""Range of p/λ that colours tell apart."""

LINES = {100.0: "p = 100 λ", 10.0: "p = 10 λ", 1.0: "p = λ", 0.1: "p = 0.1 λ", 0.01: "p = 0.01 λ"}
DOTS = "#D55E00"


def prior_strength(
    prior: EquivalentPrior | None = None, *, num_steps: int = 100, ax: Any = None
) -> Any:
    """The prior precision that K gradient steps imply, over the curvature: p/λ against K and ηλ.

    Where p/λ is 10 the prior weighs ten times what the task's own rows say along that direction;
    where it is 0.1 the rows decide. Above ηλ = 1 each step passes the optimum: an even K still
    stands for a prior, an odd one (hatched) for none. Beyond 2 steps diverge. The steps of
    ``prior`` are dots, a dot for every direction of every task, side by side at their K: tasks at
    different heights get different priors.

    Parameters
    ----------
    prior : EquivalentPrior, optional
        Of equal gradient steps without momentum, for one task or many.
    num_steps : int
        The largest K shown.
    ax : matplotlib Axes, optional

    Returns
    -------
    matplotlib Axes

    Examples
    --------
    >>> import matplotlib, numpy as np, hierbayes as hb
    >>> matplotlib.use("Agg")
    >>> model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    >>> tasks = hb.Tasks.from_arrays([(np.ones((n, 1)), np.arange(n)) for n in (2, 5, 20)])
    >>> prior = hb.equivalent_prior(model, tasks, [0.0], num_steps=5, step_size=0.03, sigma=1.0)
    >>> ax = hb.plots.prior_strength(prior)
    """
    if not (isinstance(num_steps, (int, np.integer)) and num_steps >= 1):
        raise InputError(f"num_steps must be a positive integer, found {num_steps!r}")
    points = None if prior is None else _read(prior)
    if points is not None:
        num_steps = max(num_steps, points[0])
    ax = axes_or_new(ax, (6.4, 4.6))
    steps = np.arange(1, num_steps + 1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(0.7, num_steps + 0.5)
    ax.set_ylim(LEAST, MOST)
    _draw_mesh(ax, steps)
    _draw_lines(ax, num_steps, None if points is None else points[0])
    ax.axhline(1.0, color="#000000", linewidth=0.9, zorder=3)
    right = 0.97 * num_steps
    _say(ax, right, 0.95, "ηλ = 1: one step reaches the optimum", 7.5, ha="right", va="top")
    note = "odd K (hatched): no Gaussian prior"
    _say(ax, right, 1.41, note, 7.5, ha="right", box=True)
    if points is not None:
        _draw_tasks(ax, *points)
    _write_axes(ax, num_steps)
    title = "the prior that K gradient steps imply"
    if prior is not None and points is not None:
        tasks = "one task" if len(points[1]) == 1 else f"{len(points[1])} tasks"
        title += f"\ndots: {tasks}, {described(prior.method)}"
    ax.set_title(title, loc="left")
    return ax


def _read(prior: Any) -> tuple[int, np.ndarray]:
    """(K, ηλ of every task and direction (J, d))."""
    if not isinstance(prior, EquivalentPrior):
        raise InputError(f"prior must be an EquivalentPrior, found {type(prior).__name__}")
    method = prior.method
    if not (isinstance(method, Descent) and method.plain):
        raise InputError(
            "prior_strength shows equal gradient steps without momentum; this prior is that of "
            f"{described(method)}"
        )
    return method.num_steps, float(method.step_size) * np.atleast_2d(prior.curvature)


def _draw_mesh(ax: Any, steps: np.ndarray) -> None:
    """A column a K; where odd steps overshoot nothing is drawn, and hatches show through."""
    from matplotlib.colors import LogNorm

    below = np.geomspace(LEAST, 1.0, 301)
    edges = np.concatenate([below, np.geomspace(1.0, MOST, 61)[1:]])
    x = np.sqrt(edges[1:] * edges[:-1])
    with float64():
        strength = np.stack([np.asarray(implied_precision(x, int(k), 1.0)) / x for k in steps], 1)
    strength = np.ma.masked_where(strength < 0, strength)
    ax.axhspan(1.0, MOST, facecolor="#F4F4F4", edgecolor="#9A9A9A", hatch="////", linewidth=0,
               zorder=0)  # fmt: skip
    mesh = ax.pcolormesh(
        np.concatenate([steps - 0.5, steps[-1:] + 0.5]), edges, np.ma.clip(strength, WEAK, STRONG),
        norm=LogNorm(WEAK, STRONG), cmap="YlGnBu", zorder=1, rasterized=True,
        linewidth=0, edgecolors="none",
    )  # fmt: skip
    bar = ax.get_figure().colorbar(mesh, ax=ax, extend="both", pad=0.02, aspect=28)
    ticks = [0.001, 0.01, 0.1, 1, 10, 100, 1000]
    bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label("p/λ, prior precision over curvature")


def _draw_lines(ax: Any, num_steps: int, taken: int | None) -> None:
    """Where p/λ = c: r = c / (1 + c), so that ηλ = 1 − r^(1/K), for any K between too."""
    k = np.geomspace(0.7, num_steps + 0.5, 400)
    column = 0.42 * num_steps
    if taken is not None and 0.4 < taken / column < 2.5:
        column = 0.1 * num_steps
    for level, text in LINES.items():
        x = -np.expm1(np.log(level / (1 + level)) / k)
        heavy = level == 1
        ax.plot(k, x, color="#FFFFFF" if level > 10 else "#222222",
                linewidth=1.6 if heavy else 0.8, zorder=2, gid=text)  # fmt: skip
        # names stand below each other, away from the dots
        spot = int(np.argmin(np.abs(k - column)))
        if x[spot] < 1.5 * LEAST:
            spot = int(np.argmin(np.abs(np.log(x / (4.5 * LEAST)))))
        _say(ax, k[spot], x[spot], text, 8, ha="center")


def _draw_tasks(ax: Any, num_steps: int, heights: np.ndarray) -> None:
    """A column of dots a direction, around K."""
    shown = (heights >= LEAST) & (heights <= MOST)
    d = heights.shape[1]
    offset = np.exp(0.055 * (np.arange(d) - (d - 1) / 2))
    at = np.broadcast_to(num_steps * offset, heights.shape)
    ax.plot(at[shown], heights[shown], "o", color=DOTS, markersize=3.2, markeredgewidth=0.4,
            markeredgecolor="white", alpha=0.9, zorder=4, gid="tasks")  # fmt: skip
    low = int((heights < LEAST).sum())
    if low:
        ax.plot([num_steps], [LEAST * 1.08], "v", color=DOTS, markersize=6, zorder=4,
                markeredgecolor="white", gid="below")  # fmt: skip
        text = f"{low} direction{'s' if low > 1 else ''} below"
        _say(ax, num_steps * 1.13, LEAST * 1.12, text, 7.5, va="bottom", colour=DOTS)


def _write_axes(ax: Any, num_steps: int) -> None:
    """Ticks and names of the axes."""
    ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= num_steps]
    ax.set_xticks(ticks, [str(k) for k in ticks])
    ax.set_xticks([], minor=True)
    heights = [0.001, 0.01, 0.1, 1.0, 2.0]
    ax.set_yticks(heights, [f"{h:g}" for h in heights])
    ax.set_xlabel("K, gradient steps")
    ax.set_ylabel("ηλ, step size × curvature")
    ax.spines[["top", "right"]].set_visible(False)


def _say(
    ax: Any, x: float, y: float, text: str, size: float, *, ha: str = "left", va: str = "center",
    colour: str = "#000000", box: bool = False,
) -> None:  # fmt: skip
    written = ax.text(
        x, y, text, fontsize=size, color=colour, ha=ha, va=va, path_effects=halo(3.5), zorder=5
    )
    if box:
        written.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5})
