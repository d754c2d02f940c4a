r"""Integrals of many positive functions at once, each where it is large.

.. math:: \log \int e^{L_i(x)}\, dx, \qquad i = 1, \dots, n

Around the mode where they are log-concave, in units of their width there: by the trapezium rule
where half as many nodes say the same, else by Gauss–Kronrod on panels that are halved until they
agree, and that enclose all of a function but e^−40 of its height. So no factor, however narrow
beside the other, is missed between nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# Kronrod's 15 nodes, and the weights of theirs and of Gauss's 7 among them
_HALF = np.array([
    0.991455371120812639206854697526329, 0.949107912342758524526189684047851,
    0.864864423359769072789712788640926, 0.741531185599394439863864773280788,
    0.586087235467691130294144691693013, 0.405845151377397166906606412076961,
    0.207784955007898467600689403773245, 0.0,
])  # fmt: skip
_KRONROD = np.array([
    0.022935322010529224963732008058970, 0.063092092629978553290700663189204,
    0.104790010322250183839876322541518, 0.140653259715525918745189590510238,
    0.169004726639267902826583426598550, 0.190350578064785409913256402421014,
    0.204432940075298892414161999234649, 0.209482141084727828012999174891714,
])  # fmt: skip
_GAUSS = np.array([
    0.129484966168869693270611432679082, 0.279705391489276667901467771423780,
    0.381830050505118944950369775488975, 0.417959183673469387755102040816327,
])  # fmt: skip
NODES = np.concatenate([-_HALF, _HALF[-2::-1]])
KRONROD = np.concatenate([_KRONROD, _KRONROD[-2::-1]])
GAUSS = np.zeros(15)
GAUSS[1::2] = np.concatenate([_GAUSS, _GAUSS[-2::-1]])

TOLERANCE = 1e-10
"""Of an integral's error, relative to it."""

TRAPEZIUM = 0.4 * np.arange(-23.0, 24.0)
"""Nodes in widths of a function; every other one is right to 1e-13 of a normal density."""

DROP = 40.0
"""Nats below its mode where a function is left off."""

Curve = Callable[[np.ndarray, Any], np.ndarray]
"""(x, i) ↦ L_i(x), with numbers i of the functions that go with the last axes of x."""

Slopes = Callable[[np.ndarray, Any], tuple[np.ndarray, np.ndarray]]
"""(x, i) ↦ L_i′(x) and −L_i″(x) > 0."""


def log_integral(curve: Curve, edges: np.ndarray) -> np.ndarray:
    """log ∫ e^{L_i} (n,), over panels between ``edges`` (n, k), in order."""
    size = len(edges)
    owner = np.repeat(np.arange(size), edges.shape[1] - 1)
    left, right = edges[:, :-1].ravel(), edges[:, 1:].ravel()
    wide = right > left
    owner, left, right = owner[wide], left[wide], right[wide]
    settled = np.full(size, -np.inf)
    for _ in range(60):
        half = 0.5 * (right - left)
        x = 0.5 * (right + left)[:, None] + half[:, None] * NODES
        value = curve(x, owner[:, None])
        top = value.max(1, initial=-np.inf)
        with np.errstate(invalid="ignore"):
            scaled = np.where(np.isfinite(top)[:, None], np.exp(value - top[:, None]), 0.0)
        fine, coarse = scaled @ KRONROD, scaled @ GAUSS
        with np.errstate(divide="ignore"):
            found = top + np.log(half * fine)
            # what the finer rule is off by, as QUADPACK judges it
            apart = np.abs(fine - coarse) / np.maximum(fine, 1e-300)
            doubt = found + np.log(np.minimum(apart, (200.0 * apart) ** 1.5))
        total = np.logaddexp(settled, log_sum(found, owner, size))
        rough = doubt > total[owner] + np.log(TOLERANCE)
        rough &= (half > 1e-14 * np.abs(x[:, 7])) & (half > 1e-300)
        if not rough.any():
            return total
        settled = np.logaddexp(settled, log_sum(found[~rough], owner[~rough], size))
        middle, owner = x[rough, 7], np.concatenate([owner[rough], owner[rough]])
        left, right = np.append(left[rough], middle), np.append(middle, right[rough])
    return total


def log_sum(values: np.ndarray, owner: np.ndarray, size: int) -> np.ndarray:
    """log Σ e^v over the values of each owner, (size,)."""
    top = np.full(size, -np.inf)
    np.maximum.at(top, owner, values)
    base = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return base + np.log(np.bincount(owner, np.exp(values - base[owner]), size))


def of_concave(curve: Curve, slopes: Slopes, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """log ∫ e^{L_i} of concave L_i, whose modes lie between ``low`` and ``high``, or beyond."""
    mode, width = mode_of(slopes, low, high)
    top = curve(mode, slice(None))
    values = np.exp(curve(mode + TRAPEZIUM[:, None] * width, slice(None)) - top)
    fine, coarse = values.mean(0), values[1::2].sum(0) * 2.0 / len(TRAPEZIUM)
    found = top + np.log(width * (TRAPEZIUM[1] - TRAPEZIUM[0]) * len(TRAPEZIUM) * fine)
    rough = (np.abs(fine - coarse) > 1e-7 * fine) | (values[[0, -1]].max(0) > 1e-9)
    if (some := np.flatnonzero(rough)).size:
        found[some] = _in_panels(lambda x, i: curve(x, some[i]), mode[some], width[some])
    return found


def _in_panels(curve: Curve, mode: np.ndarray, width: np.ndarray) -> np.ndarray:
    """log ∫ e^{L_i} on both sides of the modes, as far down as DROP."""
    below, above = (_reach(curve, mode, side * width)[:, None] for side in (-1.0, 1.0))
    parts = np.array([1.0, 0.6, 0.3, 0.12])
    edges = [below * parts, np.zeros((len(mode), 1)), above * parts[::-1]]
    return log_integral(curve, mode[:, None] + np.concatenate(edges, axis=1))


def mode_of(slopes: Slopes, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each L_i is highest, to a hundredth of its width there, and that width."""
    low, high, which = low.astype(float), high.astype(float), np.arange(len(low))
    for end, sign in ((low, 1.0), (high, -1.0)):
        step = np.maximum(1.0, high - low)
        for _ in range(1000):
            beyond = sign * slopes(end, which)[0] < 0
            if not beyond.any():
                break
            end[beyond] -= sign * step[beyond]
            step[beyond] *= 2.0
    mode, scale = 0.5 * (low + high), np.ones(len(low))
    open_ = which
    for turn in range(200):
        at = mode[open_]
        slope, bend = slopes(at, open_)
        rising = slope > 0
        low[open_] = np.where(rising, at, low[open_])
        high[open_] = np.where(rising, high[open_], at)
        scale[open_] = width = 1.0 / np.sqrt(bend)
        with np.errstate(invalid="ignore", over="ignore"):
            newton = at + slope / bend
        inside = (newton > low[open_]) & (newton < high[open_])
        halved = 0.5 * (low[open_] + high[open_])
        # every other step by halves: Newton's creep where an exponential rules
        mode[open_] = moved = np.where(inside & (turn % 2 == 0), newton, halved)
        near = inside & (np.abs(newton - at) < 0.01 * width)
        mode[open_] = np.where(near, newton, moved)
        ends = high[open_] - low[open_] <= 4e-16 * np.abs(at)
        open_ = open_[~(near | ends)]
        if not len(open_):
            break
    return mode, scale


def _reach(curve: Curve, mode: np.ndarray, step: np.ndarray) -> np.ndarray:
    """How far from its mode each L_i has fallen by DROP, to a factor of two, along ``step``."""
    step, which = 9.0 * step, np.arange(len(mode))
    top = curve(mode, which)
    for grow in (True, False):
        for _ in range(1100):
            tried = step if grow else 0.5 * step
            fallen = top - curve(mode + tried, which) >= DROP
            move = ~fallen if grow else fallen
            if not move.any():
                break
            step = np.where(move, 2.0 * step if grow else tried, step)
    return step


def inverted(
    cdf: Callable[[np.ndarray], np.ndarray],
    probability: float,
    low: np.ndarray,
    high: np.ndarray,
    *,
    whole: bool = False,
    tight: Any = 0.0,
    relative: float = 4e-16,
) -> np.ndarray:
    """The smallest y with cdf(y) ≥ probability, below it at ``low`` and not at ``high``.

    To within ``tight`` or ``relative`` to y, whichever is wider; exactly where y is ``whole``, but
    for numbers beyond 1e12.
    """
    tight, relative = (1.0, max(relative, 1e-12)) if whole else (tight, relative)
    below, above = np.full(low.shape, -probability), np.full(low.shape, 1.0 - probability)
    rose, fell = np.zeros(low.shape, bool), np.zeros(low.shape, bool)
    for turn in range(2000):
        limit = np.maximum(tight, relative * np.maximum(np.abs(low), np.abs(high)))
        if not (open_ := high - low > limit).any():
            break
        share = np.clip(-below / (above - below), 0.02, 0.98)
        middle = 0.5 * low + 0.5 * high
        if turn % 3 < 2:  # regula falsi; every third step by halves
            middle = low + share * (high - low)
        # of numbers of many sizes the middle one is that of their logarithms
        wide = (low > 0) & (high > 4.0 * low)
        middle = np.where(wide, np.sqrt(np.abs(low)) * np.sqrt(np.abs(high)), middle)
        if whole:
            middle = np.clip(np.floor(middle), low + 1.0, np.maximum(high - 1.0, low + 1.0))
        middle = np.where(open_, middle, high)
        over = cdf(middle) - probability
        short, reached = open_ & (over < 0), open_ & (over >= 0)
        # an end that stays for the second time counts half (Illinois), lest the other one creep
        above = np.where(reached, over, np.where(short & rose, 0.5 * above, above))
        below = np.where(short, over, np.where(reached & fell, 0.5 * below, below))
        rose, fell = short, reached
        low, high = np.where(short, middle, low), np.where(reached, middle, high)
    return high


def enclosed(
    cdf: Callable[[np.ndarray], np.ndarray], probability: float, start: np.ndarray, step: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of which the first is too low and the second is not, by ever longer steps.

    Downwards from ``start`` by ``step``, upwards likewise, as far as numbers go.
    """
    ends = []
    for sign in (-1.0, 1.0):
        end, stride = start.copy(), step.copy()
        for _ in range(2000):
            below = cdf(end) < probability
            beyond = (~below if sign < 0 else below) & (np.abs(end) < 1e300)
            if not beyond.any():
                break
            end = np.where(beyond, np.clip(end + sign * stride, -1e300, 1e300), end)
            stride = np.where(beyond, np.minimum(2.0 * stride, 1e300), stride)
        ends.append(end)
    return ends[0], ends[1]
