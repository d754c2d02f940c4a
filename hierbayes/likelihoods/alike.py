r"""Rows of one task that say the same about θ, as one row.

.. math:: \sum_{i \in \text{alike}} \log p(y_i \mid f, \varphi)
          = w \log p(\bar y \mid f, \varphi) + c
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from hierbayes.tasks import Tasks


class Alike(NamedTuple):
    """``tasks`` with alike rows as one, the ``weight`` (N,) of each, and what is left out (J,)."""

    tasks: Tasks
    weight: np.ndarray
    constant: np.ndarray


class Groups(NamedTuple):
    """``of_row`` (N,): the group of each row; ``first`` (G,): a row of each group, task by task."""

    of_row: np.ndarray
    first: np.ndarray

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sums (G,) of row values (N,)."""
        return np.bincount(self.of_row, values, len(self.first))


def groups(tasks: Tasks, columns: Sequence[np.ndarray]) -> Groups:
    """Rows of one task that agree in all of these columns (N,)."""
    code, count = tasks.task_of_row.astype(np.int64), tasks.num_tasks
    for column in columns:
        values, place = np.unique(column, return_inverse=True)
        if len(values) == 1:
            continue
        # numbered afresh, so that the product of counts stays small
        _, code = np.unique(code * len(values) + place, return_inverse=True)
        count = int(code.max(initial=0)) + 1
    _, first, of_row = np.unique(code, return_index=True, return_inverse=True)
    order = np.lexsort((first, tasks.task_of_row[first]))
    rank = np.empty(len(order), int)
    rank[order] = np.arange(len(order))
    del count
    return Groups(rank[of_row], first[order])


def columns_of(tasks: Tasks, *slots: str) -> list[np.ndarray]:
    """What f depends on, one array (N,) each, and these slots."""
    columns = [*tasks.predictors.T, *tasks.shared.T]
    return columns + [tasks.slots[name] for name in slots if name in tasks.slots]


def merged(tasks: Tasks, found: Groups, outcome: np.ndarray, **slots: np.ndarray) -> Tasks:
    """One row a group, with a new outcome (G,) and new slots."""
    first = found.first
    sizes = np.bincount(tasks.task_of_row[first], minlength=tasks.num_tasks)
    kept = {name: values[first] for name, values in tasks.slots.items() if name != "weight"}
    return replace(
        tasks, predictors=tasks.predictors[first], shared=tasks.shared[first], outcome=outcome,
        slots=kept | slots, starts=np.concatenate([[0], np.cumsum(sizes)]), rows=tasks.rows[first],
        sharding=None,
    )  # fmt: skip


def copies_as_weights(tasks: Tasks) -> Alike:
    """Rows that agree in everything, as one row with their weights' sum: right in any family."""
    weight = tasks.slots.get("weight", np.ones(tasks.num_rows))
    others = [name for name in tasks.slots if name != "weight"]
    found = groups(tasks, [*columns_of(tasks, *others), tasks.outcome])
    together = merged(tasks, found, tasks.outcome[found.first])
    return Alike(together, found.sum(weight), np.zeros(tasks.num_tasks))
