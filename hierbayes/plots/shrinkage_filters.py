"""How far gradient steps, gradient flow and ridge go towards a task's own optimum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hierbayes.adaptation.descent import Descent, Flow
from hierbayes.errors import InputError
from hierbayes.numerics import float64
from hierbayes.plots.labels import Label, place
from hierbayes.plots.style import axes_or_new

LEAST = 0.08
"""Smallest u = Kηλ shown."""

CEILING = 1.35
FLOW, RIDGE = "#0072B2", "#000000"
STEPS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def shrinkage_filters(num_steps: Sequence[int] = (1, 5, 20), *, ax: Any = None) -> Any:
    """1 − r, the share of the way from φ to the optimum, against u = Kηλ.

    Gradient steps go 1 − (1 − u/K)^K of the way along a direction of curvature λ, gradient flow
    1 − e^(−u), and the MAP estimate under a prior of precision 1/(Kη), a ridge, u / (1 + u). All
    agree where u is small. Steps longer than 1/λ (u > K) are dashed: an even number falls back, an
    odd one goes past the optimum, where no Gaussian prior leads. The largest ratio of flow to
    ridge is marked.

    Parameters
    ----------
    num_steps : sequence of int
        Numbers of gradient steps K, a curve each.
    ax : matplotlib Axes, optional

    Returns
    -------
    matplotlib Axes

    Examples
    --------
    >>> import matplotlib, hierbayes as hb
    >>> matplotlib.use("Agg")
    >>> ax = hb.plots.shrinkage_filters((1, 2, 10))
    """
    counts = _read(num_steps)
    ax = axes_or_new(ax, (6.4, 4.4))
    most = max(2.2 * max(counts), 10.0)
    ax.set_xscale("log")
    ax.set_xlim(LEAST, most)
    ax.set_ylim(0.0, CEILING)
    u = np.geomspace(LEAST, most, 600)
    ax.axhspan(1.0, CEILING, facecolor="#F4F4F4", edgecolor="#C9C9C9", hatch="////", linewidth=0,
               zorder=0)  # fmt: skip
    drawn = _draw_ridge_and_flow(ax, u)
    for count, colour in zip(counts, STEPS, strict=False):
        drawn += _draw_steps(ax, int(count), colour)
    at, text = _mark_ratio(ax)
    # flow runs between others all the way: its name stands below, on a thread
    ax.annotate("gradient flow", (0.42, -np.expm1(-0.42)), (0.62, 0.13), color=FLOW, fontsize=9,
                va="center", zorder=6, arrowprops={"arrowstyle": "-", "color": FLOW,
                "linewidth": 0.9, "shrinkA": 1, "shrinkB": 0, "relpos": (0.1, 1.0)})  # fmt: skip
    below = drawn[0][(u > 0.1 * most) & (u < 0.6 * most)]
    labels = [
        Label("past the optimum: no Gaussian prior", [(LEAST, CEILING)], "#333333", 8.5),
        Label(text, [at], "#333333", 8.5),
        *(Label(f"K = {k}", [(k, 1.0)], c, 9) for k, c in zip(counts, STEPS, strict=False)),
        Label("ridge, p = 1/(Kη)", list(below[::8]), RIDGE, 9, sides=[(1, -1)]),
    ]
    place(ax, labels, drawn, [(k, 1.0) for k in counts])
    _write_axes(ax, most)
    return ax


def _read(num_steps: Any) -> list[Any]:
    """Numbers of steps, a colour for each."""
    counts = list(np.atleast_1d(np.asarray(num_steps)))
    if not counts or not all(isinstance(k, (int, np.integer)) and k >= 1 for k in counts):
        raise InputError(f"num_steps must list positive integers, found {num_steps!r}")
    if len(counts) > len(STEPS):
        raise InputError(f"num_steps lists {len(counts)} values; at most {len(STEPS)} are shown")
    return counts


def _draw_ridge_and_flow(ax: Any, u: np.ndarray) -> list[np.ndarray]:
    """Draw and return both curves."""
    ridge = u / (1 + u)
    with float64():
        flow = 1 - np.asarray(Flow(1.0).responses(u)[0])
    ax.plot(u, ridge, color=RIDGE, linewidth=1.8, gid="ridge")
    ax.plot(u, flow, color=FLOW, linewidth=1.8, gid="flow")
    return [np.stack([u, ridge], 1), np.stack([u, flow], 1)]


def _draw_steps(ax: Any, count: int, colour: str) -> list[np.ndarray]:
    """Draw and return one curve: dashed beyond u = K, to its end at u = 2K where steps diverge."""
    inside = np.geomspace(LEAST, count, 300)
    beyond = np.linspace(count, 2 * count, 200)
    method = Descent(count, 1.0 / count)
    with float64():
        near, far = (1 - np.asarray(method.responses(u)[0]) for u in (inside, beyond))
    ax.plot(inside, near, color=colour, linewidth=1.5, gid=f"K = {count}")
    ax.plot(beyond, far, color=colour, linewidth=1.5, linestyle=(0, (3, 1.6)),
            gid=f"K = {count}, overshooting")  # fmt: skip
    ax.plot(count, 1.0, "o", color=colour, markersize=4, zorder=4)
    return [np.stack([inside, near], 1), np.stack([beyond, far], 1)]


def _mark_ratio(ax: Any) -> tuple[tuple[float, float], str]:
    """Mark where gradient flow goes farthest beyond ridge, as a ratio; where, and in words."""
    from scipy.optimize import minimize_scalar

    def less(u: float) -> float:
        return float(np.expm1(-u) * (1 + u) / u)

    found: Any = minimize_scalar(
        less, bounds=(0.1, 10.0), method="bounded", options={"xatol": 1e-10}
    )
    u, ratio = float(found.x), -float(found.fun)
    low, high = u / (1 + u), -np.expm1(-u)
    ax.annotate("", (u, high), (u, low), arrowprops={"arrowstyle": "<->", "shrinkA": 0,
                "shrinkB": 0, "linewidth": 1.0, "mutation_scale": 9}, zorder=5)  # fmt: skip
    return (u, low), f"flow goes at most {ratio:.3f} times\nas far as ridge, at u = {u:.3f}"


def _write_axes(ax: Any, most: float) -> None:
    """Title, ticks and names of the axes."""
    ticks = [t for t in (0.1, 1, 10, 100, 1000) if t < most]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_xlabel("u = Kηλ")
    ax.set_ylabel("1 − r, share of the way to the optimum")
    ax.set_title("how far each goes from φ", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
