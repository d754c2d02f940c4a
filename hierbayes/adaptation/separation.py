r"""Tasks whose own likelihood has no maximum, found without fitting anything.

.. math:: \exists v: \quad x_i^\top v \ge 0 \text{ where } f \text{ may rise for ever}, \quad
          x_i^\top v \le 0 \text{ where it may fall}, \quad
          x_i^\top v = 0 \text{ elsewhere}, \quad x^\top v \ne 0 \text{ for some row}

Zeros and ones all alike, or separated by x; counts that are all zero. Along such a v only the prior
holds θ_j. One coefficient needs signs, two need angles: v exists where all rows' s_i x_i lie in a
half-plane and not all on its edge. More take a linear programme a task (Albert and Anderson 1984,
Biometrika 71(1)).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hierbayes.adaptation.unpooled import perfectly_explained
from hierbayes.errors import listing
from hierbayes.likelihoods import Likelihood
from hierbayes.likelihoods.generalised import GeneralisedLinear
from hierbayes.tasks import Tasks

MOST_PROGRAMMES = 200
"""Tasks of which a linear programme is solved, some milliseconds each."""

SAME = 1e-9
"""Angle, in radians, up to which two rows point the same way."""


class Separated(NamedTuple):
    """``tasks`` (J,) of bool: those found to be separated; ``unchecked``: how many were not seen.

    Of the unchecked ones a column by itself separates nothing; some combination may.
    """

    tasks: np.ndarray
    unchecked: int


def separated(tasks: Tasks, likelihood: GeneralisedLinear) -> Separated:
    """Which tasks' own likelihood grows for ever along some direction of θ_j.

    Parameters
    ----------
    tasks : Tasks
    likelihood : GeneralisedLinear

    Returns
    -------
    Separated

    Examples
    --------
    >>> import hierbayes as hb, numpy as np
    >>> one = np.ones((3, 1))
    >>> tasks = hb.Tasks.from_arrays([(one, np.array([0.0, 0, 0])), (one, np.array([0.0, 1, 0]))])
    >>> separated(tasks, hb.likelihoods.Bernoulli()).tasks.tolist()
    [True, False]
    """
    up, down = likelihood.endless(tasks)
    x, of_row, count = tasks.predictors, tasks.task_of_row, tasks.num_tasks
    found = np.zeros(count, bool)
    if not (up | down).any():
        return Separated(found, 0)
    found = _by_sign(x, of_row, count, up, down)
    if x.shape[1] == 1:
        return Separated(found, 0)
    open_tasks = ~found & (np.bincount(of_row, up | down, count) > 0)
    if x.shape[1] == 2:
        rows = open_tasks[of_row]
        found |= _by_angle(x[rows], of_row[rows], count, up[rows], down[rows])
        return Separated(found, 0)
    places = np.flatnonzero(open_tasks)
    some = places[:MOST_PROGRAMMES]
    for j in some:
        rows = slice(tasks.starts[j], tasks.starts[j + 1])
        one = np.zeros(tasks.sizes[j], int)
        found[j] = perfectly_explained(x[rows], one, 1, up[rows], down[rows]).any()
    return Separated(found, len(places) - len(some))


def _by_sign(
    x: np.ndarray, of_row: np.ndarray, count: int, up: np.ndarray, down: np.ndarray
) -> np.ndarray:
    """Tasks (J,) that a single column separates; an intercept, where all outcomes are alike."""
    found = np.zeros(count, bool)
    for column in x.T:
        alone = perfectly_explained(column[:, None], of_row, count, up, down)
        found |= np.bincount(of_row, alone, count) > 0
    return found


def _by_angle(
    x: np.ndarray, of_row: np.ndarray, count: int, up: np.ndarray, down: np.ndarray
) -> np.ndarray:
    """Tasks (J,) of two columns whose rows all point into one half-plane, not all along its edge.

    A row of which f may neither rise nor fall points both ways.
    """
    scale = np.zeros((count, 2))
    for k in range(2):
        np.maximum.at(scale[:, k], of_row, np.abs(x[:, k]))
    x = x / np.where(scale > 0, scale, 1.0)[of_row]
    seen = np.hypot(*x.T) > SAME
    forth, back = seen & ~(down & ~up), seen & ~(up & ~down)
    angle = np.concatenate([np.arctan2(x[forth, 1], x[forth, 0]),
                            np.arctan2(-x[back, 1], -x[back, 0])])  # fmt: skip
    owner = np.concatenate([of_row[forth], of_row[back]])
    order = np.lexsort((angle, owner))
    angle, owner = angle[order], owner[order]
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    last = np.append(first[1:], len(owner))[: len(first)] - 1
    gap = np.append(np.diff(angle), 0.0)
    gap[last] = angle[first] + 2 * np.pi - angle[last]
    half = np.bincount(owner, gap >= np.pi - SAME, count)
    wide = np.bincount(owner, gap > np.pi + SAME, count)
    # two gaps of π: every row lies on one line, and both ways
    return (wide > 0) | (half == 1)


def remark(tasks: Tasks, likelihood: Likelihood) -> tuple[str, ...]:
    """One sentence that counts and names separated tasks, up to three; none where none is."""
    if not (isinstance(likelihood, GeneralisedLinear) and likelihood.linear):
        return ()
    found, unchecked = separated(tasks, likelihood)
    if not found.any():
        return ()
    what = "are all alike, or separated by the predictors"
    if likelihood.log_link:  # counts
        what = "are all zero, or zero wherever some combination of predictors is not"
    said = (
        f"{found.sum()} of {tasks.num_tasks} tasks have outcomes that {what} "
        f"({listing(tasks.names[found].tolist(), 3)}): their own likelihood has no maximum, and "
        "where it has none their theta is held by the prior alone"
    )
    if unchecked:
        said += (
            f". Combinations of predictors were looked at in {MOST_PROGRAMMES} tasks; in "
            f"{unchecked} more only each predictor by itself"
        )
    return (said,)
