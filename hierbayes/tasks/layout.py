"""How rows of ragged tasks lie on many devices."""

from __future__ import annotations

from typing import Any

import numpy as np

from hierbayes.sharding import filled_up, num_shares, padded, place, rung
from hierbayes.tasks.container import Tasks
from hierbayes.tasks.views import Task, taken


def on_devices(
    arranged: tuple[Task, Any], tasks: Tasks, order: np.ndarray | None = None
) -> tuple[Task, Any]:
    """Rows as a likelihood arranged them, filled up and spread over the devices of ``tasks``.

    On one device flat rows stay in a line. Spread, they become one line a device, (K, n), with the
    rows of that device's tasks and the number of each row's task among them; so no row's θ lies on
    another device. Tasks side by side on a leading axis stay so. ``order``, of :func:`dealt`, holds
    the task in each place, −1 in places that are empty; empty places come last by default. An empty
    place has no rows, but the longest task's where tasks stand side by side, for an adaptation
    whose result there is not used.
    """
    rows, of_row = arranged
    if order is None:
        count = len(rows.mask) if of_row is None else tasks.num_tasks
        order = np.full(padded(count, tasks.sharding), -1)
        order[:count] = np.arange(count)
    level = np.zeros((len(order), *rows.task_predictors.shape[1:]))
    level[order >= 0] = rows.task_predictors[order[order >= 0]]
    if of_row is None:
        # an optimiser's derivative may not exist where nothing moves it, as Adam's at slope zero
        longest = int(np.argmax(rows.mask.sum(1)))
        again = np.where(order >= 0, order, longest)
        return place((taken(rows, again, level), None), tasks.sharding, axis=0)
    if tasks.sharding is None:
        total = len(of_row)
        places = np.full(rung(total), -1)
        places[:total] = np.arange(total)
        return taken(rows, places, level), filled_up(of_row, len(places), fill=len(order) - 1)
    sizes = np.where(order >= 0, tasks.sizes[order], 0)
    shares = num_shares(tasks.sharding)
    a_share = sizes.reshape(shares, -1)
    lines = np.full((shares, rung(int(a_share.sum(1).max()))), -1)
    of_line = np.zeros(lines.shape, dtype=np.int32)
    for k, counts in enumerate(a_share):
        held = np.arange(k * len(counts), (k + 1) * len(counts))
        starts, total = tasks.starts[:-1][order[held]], int(counts.sum())
        before = np.cumsum(counts) - counts
        lines[k, :total] = np.repeat(starts - before, counts) + np.arange(total)
        of_line[k, :total] = np.repeat(np.arange(len(counts)), counts)
    return place((taken(rows, lines, level), of_line), tasks.sharding, axis=0)


def dealt(tasks: Tasks, sizes: np.ndarray) -> np.ndarray | None:
    """Which task goes to which place, so that all devices get about as many rows.

    Largest first, tasks are dealt to the devices in turn, forwards and backwards. None where tasks
    are not spread.
    """
    if tasks.sharding is None:
        return None
    order = np.full(padded(len(sizes), tasks.sharding), -1)
    order[: len(sizes)] = np.argsort(-sizes, kind="stable")
    rounds = order.reshape(-1, num_shares(tasks.sharding))
    rounds[1::2] = rounds[1::2, ::-1]
    return rounds.T.ravel()
