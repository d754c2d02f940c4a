"""Text beside what it names, in the place of a legend: the first spot near by that is free."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

_COMPASS = [(1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)]
LEVEL_FIRST = [(-1, 0), (1, 0), *_COMPASS[:4], (0, 1), (0, -1)]
"""Sides in the order of preference where marks stand above each other."""

_REACHES = (5.5, 7.5, 11.0, 19.0, 30.0)
"""Distances between an anchor and its text, in points; those of texts left out end at the third."""

_RING = np.array([(0, 0), *_COMPASS]) * np.array([1, *[0.7] * 4, *[1] * 4])[:, None]

_SIDES = {1: ("left", "bottom"), -1: ("right", "top"), 0: ("center", "center")}


MOST_LETTERS = 40
"""Letters of a name in a picture; of a longer one its beginning and its end."""


def named(name: Any) -> str:
    """A name of the user's as it is to be read: dollars begin no mathematics, and it is short."""
    text = " ".join(str(name).split())
    if len(text) > MOST_LETTERS:
        text = f"{text[: MOST_LETTERS - 13]}…{text[-12:]}"
    return text.replace("$", r"\$")


class Label(NamedTuple):
    """A text and where it may stand: near ``at`` (several anchors: near any of them).

    ``needed``: drawn in the least crowded spot where none is free; otherwise left out. ``sides``:
    on which sides of an anchor, right and up being 1.
    """

    text: str
    at: Sequence[Any]
    color: str = "#000000"
    size: float = 8.0
    needed: bool = True
    sides: Sequence[tuple[int, int]] = _COMPASS


def halo(width: float = 2.5) -> list[Any]:
    """A white edge around letters, so that they read on lines and fields."""
    from matplotlib import patheffects

    return [patheffects.withStroke(linewidth=width, foreground="white")]


def place(
    ax: Any, labels: Sequence[Label], curves: Iterable[Any] = (), marks: Any = ()
) -> list[Any]:
    """Write labels in this order, each clear of the axes' edge, of others and of what is drawn.

    ``curves`` (each (N, 2)) and ``marks`` (M, 2) are what no text should cover, in data
    coordinates. The axes' limits must be final.
    """
    paper = ax.transData.transform
    point = ax.get_figure().dpi / 72
    spots = paper(np.reshape(np.asarray(marks, dtype=float), (-1, 2)))
    rings = (spots[:, None] + 4.5 * point * _RING).reshape(-1, 2)
    taken = np.concatenate([rings, *(_dense(paper(np.asarray(c, dtype=float))) for c in curves)])
    own = [paper(label.at[0]) for label in labels if len(label.at) == 1]
    boxes: list[np.ndarray] = []
    written = []
    for label in labels:
        text = ax.annotate(
            label.text, label.at[0], xytext=(0, 0), textcoords="offset points", color=label.color,
            fontsize=label.size, path_effects=halo(), zorder=6, annotation_clip=True,
        )  # fmt: skip
        best = _best(ax, text, label, taken, boxes, own)
        if best is None:
            text.remove()
            continue
        _move(text, *best)
        boxes.append(_box(text, 1.0))
        written.append(text)
    return written


def _best(
    ax: Any, text: Any, label: Label, taken: np.ndarray, boxes: list[np.ndarray],
    own: list[np.ndarray],
) -> tuple[Any, tuple[int, int], float] | None:  # fmt: skip
    """(anchor, side, reach) of a free spot, or of the least crowded for a text that is needed."""
    best, least = None, np.inf
    reaches = _REACHES if label.needed else _REACHES[:3]
    for reach, anchor, side in itertools.product(reaches, label.at, label.sides):
        _move(text, anchor, side, reach)
        box = _box(text, 1.0)
        crowd = _crowding(box, ax.bbox, taken, boxes)
        if len(label.at) == 1:
            crowd += 20 * _astray(box, ax.transData.transform(anchor), own)
        if crowd + 0.15 * reach < least:
            best, least = (anchor, side, reach), crowd + 0.15 * reach
            if crowd == 0:
                return best
    return best if label.needed else None


def along(ax: Any, curve: np.ndarray) -> list[np.ndarray]:
    """Points in the middle of what is seen of a curve, by its length on paper."""
    paper = ax.transAxes.inverted().transform(ax.transData.transform(curve))
    seen = ((paper > 0) & (paper < 1)).all(1)
    curve, paper = curve[seen], paper[seen]
    if len(curve) < 2:
        return list(curve)
    far = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(paper, axis=0).T))])
    at = far[-1] * np.array([0.5, 0.45, 0.55, 0.4, 0.6, 0.35, 0.65, 0.3, 0.7, 0.25, 0.75])
    return list(np.stack([np.interp(at, far, curve[:, k]) for k in (0, 1)], axis=1))


def _move(text: Any, anchor: Any, side: tuple[int, int], reach: float) -> None:
    text.xy = tuple(anchor)
    diagonal = 0.75 if all(side) else 1.0
    text.set_position((side[0] * reach * diagonal, side[1] * reach * diagonal))
    text.set_horizontalalignment(_SIDES[side[0]][0])
    text.set_verticalalignment(_SIDES[side[1]][1])


def _box(text: Any, pad: float) -> np.ndarray:
    """Left, bottom, right and top in pixels; of the text alone, without its anchor."""
    from matplotlib.text import Text

    text.update_positions(text.get_figure()._get_renderer())
    extent = Text.get_window_extent(text)
    return np.array([extent.x0 - pad, extent.y0 - pad, extent.x1 + pad, extent.y1 + pad])


def _crowding(box: np.ndarray, frame: Any, taken: np.ndarray, boxes: list[np.ndarray]) -> float:
    """Points covered, and a hundred for each text covered and for leaving the axes."""
    left, bottom, right, top = box
    inside = (taken > box[:2]).all(1) & (taken < box[2:]).all(1)
    over = sum(left < b[2] and b[0] < right and bottom < b[3] and b[1] < top for b in boxes)
    out = left < frame.x0 or bottom < frame.y0 or right > frame.x1 or top > frame.y1
    return float(inside.sum()) + 100.0 * over + 100.0 * out


def _astray(box: np.ndarray, anchor: np.ndarray, others: list[np.ndarray]) -> int:
    """How many other marks a text stands about as near to as to its own."""

    def away(point: np.ndarray) -> float:
        return float(np.hypot(*(np.clip(point, box[:2], box[2:]) - point)))

    limit = max(1.8 * away(anchor), 3.0)
    return sum(away(p) < limit for p in others if not np.allclose(p, anchor))


def _dense(points: np.ndarray, spacing: float = 3.0) -> np.ndarray:
    """A curve's points in pixels, no two neighbours farther apart than ``spacing``."""
    points = points[np.isfinite(points).all(1)]
    if len(points) < 2:
        return points
    lengths = np.hypot(*np.diff(points, axis=0).T)
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    at = np.linspace(0.0, along[-1], min(int(along[-1] / spacing) + 2, 5000))
    return np.stack([np.interp(at, along, points[:, k]) for k in (0, 1)], axis=1)
