"""Two sets of rows of the same kind as one: the rows of a task, by its name, stand together."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np

from hierbayes.errors import InputError, listing
from hierbayes.tasks.container import Tasks
from hierbayes.tasks.frames import as_names


def joined(first: Tasks, second: Tasks) -> Tasks:
    """The tasks of ``first``, each with its rows of ``second`` after its own, then new tasks.

    Parameters
    ----------
    first, second : Tasks
        With the same columns; tasks are matched by name, compared as text.

    Raises
    ------
    InputError
        Where one part has an outcome or a row column that the other lacks, or where a task's own
        covariates differ between them.
    """
    if (first.outcome is None) != (second.outcome is None):
        raise InputError("rows with an outcome and rows without one cannot be joined")
    if lacking := sorted(first.slots.keys() ^ second.slots.keys()):
        raise InputError(f"only one of the two parts has the row column(s) {listing(lacking)}")
    at, fresh = _places(first, second)
    task_of_row = np.concatenate([first.task_of_row, at[second.task_of_row]])
    order = np.argsort(task_of_row, kind="stable")
    sizes = np.bincount(task_of_row, minlength=first.num_tasks + len(fresh))

    def together(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.concatenate([a, b])[order]

    names = [*first.names.tolist(), *second.names[fresh].tolist()]
    return replace(
        first,
        predictors=together(first.predictors, second.predictors),
        shared=together(first.shared, second.shared),
        task_predictors=np.concatenate([first.task_predictors, second.task_predictors[fresh]]),
        outcome=None if first.outcome is None else together(first.outcome, second.outcome),
        slots={name: together(first.slots[name], second.slots[name]) for name in first.slots},
        starts=np.concatenate([[0], np.cumsum(sizes)]).astype(int),
        rows=together(first.rows, second.rows + first.rows.max(initial=-1) + 1),
        labels=replace(first.labels, names=as_names(names)),
        sharding=second.sharding,
    )


def _places(first: Tasks, second: Tasks) -> tuple[np.ndarray, np.ndarray]:
    """Where each task of ``second`` stands, new ones after all of ``first``; and which are new."""
    places = [first.labels.position(name) for name in second.names.tolist()]
    fresh = np.array([j for j, at in enumerate(places) if at is None], int)
    known = np.array([j for j, at in enumerate(places) if at is not None], int)
    at = np.zeros(second.num_tasks, int)
    at[known] = [place for place in places if place is not None]
    at[fresh] = first.num_tasks + np.arange(len(fresh))
    moved = (first.task_predictors[at[known]] != second.task_predictors[known]).any(1)
    if moved.any():
        raise InputError(
            f"task(s) {listing(second.names[known[moved]].tolist(), 3)} have other task predictors "
            "than before: what tasks predict themselves by cannot change as rows arrive"
        )
    return at, fresh


def not_among(rows: Tasks, known: Tasks) -> Tasks:
    """The rows of ``rows`` that ``known`` does not hold of the task of the same name.

    A row is the same where every number of it is: predictors, outcome and row columns. Tasks may
    be left without rows.
    """
    keep = np.ones(rows.num_rows, bool)
    for j, name in enumerate(rows.names.tolist()):
        if (at := known.labels.position(name)) is None:
            continue
        left = Counter(_rows_of(known, at))
        for i, row in enumerate(_rows_of(rows, j)):
            if left[row] > 0:
                left[row] -= 1
                keep[rows.starts[j] + i] = False
    return rows.keep_rows(keep)


def _rows_of(tasks: Tasks, j: int) -> list[bytes]:
    part = slice(tasks.starts[j], tasks.starts[j + 1])
    columns = [tasks.predictors[part], tasks.shared[part], tasks.outcome[part]]
    columns += [tasks.slots[name][part] for name in sorted(tasks.slots)]
    flat = [np.asarray(c, float).reshape(len(c), math.prod(c.shape[1:])) for c in columns]
    return [row.tobytes() for row in np.concatenate(flat, axis=1) + 0.0]  # −0 is 0
