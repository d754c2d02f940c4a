"""Parts of Tasks, and the same Tasks with other numbers: what is asked for is checked first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from hierbayes import inputs
from hierbayes.errors import InputError, listing, suggestion
from hierbayes.tasks.container import Tasks
from hierbayes.tasks.views import SLOTS

POSITIVE = ("known_se", "weight", "trials")
"""Slots that hold positive numbers only."""


def taken(tasks: Tasks, positions: Any) -> Tasks:
    """See :meth:`Tasks.take`."""
    at = positions_of(tasks, positions)
    ranges = [np.arange(tasks.starts[j], tasks.starts[j + 1]) for j in at]
    rows = np.concatenate(ranges) if ranges else np.zeros(0, dtype=int)
    return replace(
        _with_rows(tasks, rows),
        task_predictors=tasks.task_predictors[at],
        starts=np.concatenate([[0], np.cumsum(tasks.sizes[at])]).astype(int),
        labels=replace(tasks.labels, names=tasks.names[at]),
    )


def rows_kept(tasks: Tasks, keep: Any) -> Tasks:
    """See :meth:`Tasks.keep_rows`."""
    kept = mask_of_rows(tasks, keep)
    counts = np.bincount(tasks.task_of_row[kept], minlength=tasks.num_tasks)
    return replace(
        _with_rows(tasks, np.flatnonzero(kept)),
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(int),
    )


def _with_rows(tasks: Tasks, rows: np.ndarray) -> Tasks:
    return replace(
        tasks,
        predictors=tasks.predictors[rows],
        shared=tasks.shared[rows],
        outcome=None if tasks.outcome is None else tasks.outcome[rows],
        slots={name: values[rows] for name, values in tasks.slots.items()},
        rows=tasks.rows[rows],
    )


def positions_of(tasks: Tasks, asked: Any) -> np.ndarray:
    """Positions (B,) of int, each once, as :meth:`Tasks.take` takes them."""
    try:
        found = np.atleast_1d(np.asarray(asked))
    except (TypeError, ValueError) as error:
        raise InputError(f"positions must be whole numbers: {error}") from error
    if found.ndim != 1:
        raise InputError(f"positions has shape {found.shape}; expected one dimension")
    if found.dtype.kind == "b":
        if len(found) != tasks.num_tasks:
            raise InputError(
                f"positions holds {len(found)} truth values for {tasks.num_tasks} tasks; a mask "
                "has one for each task"
            )
        return np.flatnonzero(found)
    if found.size and found.dtype.kind not in "iu":
        raise InputError(
            f"positions must be whole numbers, or one truth value a task; found "
            f"{inputs.shown(asked)}. Tasks are taken by name by tasks[names]"
        )
    outside = (found < -tasks.num_tasks) | (found >= tasks.num_tasks)
    if outside.any():
        raise InputError(
            f"position {found[outside][0]} is out of range: there are {tasks.num_tasks} tasks, "
            "and −1 is the last"
        )
    found = found.astype(int) % max(tasks.num_tasks, 1)
    if len(np.unique(found)) < len(found):
        values, counts = np.unique(found, return_counts=True)
        twice = listing(tasks.names[values[counts > 1]].tolist())
        raise InputError(f"positions holds task(s) {twice} twice; each can be taken once")
    return found


def names_asked(names: Any) -> list[Any]:
    """The names that ``tasks[names]`` asks for, one or many."""
    if isinstance(names, (list, tuple)) or getattr(names, "ndim", 0) == 1:
        return list(names)
    if getattr(names, "ndim", 0) > 1:
        raise InputError(f"names must be one name or a sequence of them, named as the tasks are; "
                         f"found {inputs.shown(names)}")  # fmt: skip
    return [names]


def position(tasks: Tasks, name: Any) -> int:
    """Where the task of this name stands."""
    plain = name.item() if isinstance(name, (np.generic, np.ndarray)) and name.ndim == 0 else name
    found = tasks.labels.position(plain)
    if found is None:
        raise InputError(
            f"no task is named {inputs.shown(plain)}; "
            f"{suggestion(str(plain), tasks.names.tolist())}"
        )
    return found


def mask_of_rows(tasks: Tasks, keep: Any) -> np.ndarray:
    """Rows (N,) of bool, as :meth:`Tasks.keep_rows` takes them."""
    try:
        found = np.asarray(keep)
    except (TypeError, ValueError) as error:
        raise InputError(f"keep must be one truth value a row: {error}") from error
    empty = found.shape == (0,) and tasks.num_rows == 0
    if found.shape != (tasks.num_rows,) or not (found.dtype.kind == "b" or empty):
        raise InputError(
            f"keep must be one truth value for each of {tasks.num_rows} rows; found "
            f"{found.dtype} of shape {found.shape}. Of row numbers: "
            "np.isin(np.arange(tasks.num_rows), numbers)"
        )
    return found.astype(bool)


def with_columns(tasks: Tasks, given: dict[str, Any]) -> Tasks:
    """See :meth:`Tasks.replace`."""
    arrays = ("outcome", "predictors", "shared", "task_predictors")
    changed: dict[str, Any] = {}
    slots = dict(tasks.slots)
    for name, value in given.items():
        if name not in (*arrays, *SLOTS):
            raise InputError(
                f"tasks.replace takes no {name!r}; {suggestion(name, (*arrays, *SLOTS))}"
            )
        if value is None and name in SLOTS:
            slots.pop(name, None)
        elif value is None and name == "outcome":
            changed[name] = None
        elif name in SLOTS or name == "outcome":
            found = inputs.numbers(name, value, shape=(tasks.num_rows,))
            changed |= {name: found} if name == "outcome" else {}
            slots |= {} if name == "outcome" else {name: found}
        else:
            changed[name] = inputs.numbers(name, value, shape=np.shape(getattr(tasks, name)))
    found = replace(tasks, slots=slots, **changed)
    refuse_negative_slots(found)
    return found


def refuse_negative_slots(tasks: Tasks) -> None:
    """Refuse standard errors, weights and trials that are not positive, naming the task."""
    for name in POSITIVE:
        if name in tasks.slots and (bad := tasks.slots[name] <= 0).any():
            row = int(np.flatnonzero(bad)[0])
            raise InputError(
                f"{name} must be positive: {bad.sum()} value(s) are not, the first "
                f"{tasks.slots[name][row]:g} in task "
                f"{tasks.names.tolist()[tasks.task_of_row[row]]!r}"
            )


def to_dataframe(tasks: Tasks) -> Any:
    """See :meth:`Tasks.to_dataframe`."""
    import pandas as pd

    labels = tasks.labels
    columns: list[tuple[str, str, Any]] = [("task", labels.task, tasks.names[tasks.task_of_row])]
    if tasks.outcome is not None:
        columns.append(("outcome", labels.outcome, tasks.outcome))
    columns += [("predictor", c, tasks.predictors[:, i]) for i, c in enumerate(labels.coef)]
    columns += [("shared", c, tasks.shared[:, i]) for i, c in enumerate(labels.shared)]
    columns += [
        ("task predictor", c, tasks.task_predictors[tasks.task_of_row, i])
        for i, c in enumerate(labels.task_predictors)
    ]
    columns += [("slot", name, values) for name, values in tasks.slots.items()]
    table: dict[str, Any] = {}
    for role, name, values in columns:
        # a name may stand in two roles; only other numbers need a column of their own
        if name in table and not np.array_equal(table[name], values):
            name = f"{name} ({role})"
        table[name] = values
    return pd.DataFrame(table, index=tasks.rows)
