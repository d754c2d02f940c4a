"""Tasks from DataFrames and arrays, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hierbayes.errors import InputError, listing
from hierbayes.tasks.container import Tasks
from hierbayes.tasks.frames import Frame, Missing, as_names, column_names, complete_rows
from hierbayes.tasks.views import Labels


def read_arrays(
    arrays: Sequence[tuple[Any, Any]],
    names: Sequence[Any] | None,
    coef: Sequence[str] | None,
    shared: Sequence[Any] | None,
    known_se: Sequence[Any] | None,
    task_predictors: Any | None,
) -> Tasks:
    """Tasks from one (X_j, y_j) pair a task; see :meth:`Tasks.from_arrays`."""
    if len(arrays) == 0:
        raise InputError("no tasks: `arrays` is empty")
    label = as_names(list(range(len(arrays)) if names is None else names))
    if len(label) != len(arrays):
        raise InputError(f"`names` has {len(label)} entries for {len(arrays)} tasks")
    xs = [_array(x, f"X of task {label[j]!r}") for j, (x, _) in enumerate(arrays)]
    ys = [_array(y, f"y of task {label[j]!r}", ndim=1) for j, (_, y) in enumerate(arrays)]
    width = xs[0].shape[1:]
    for j, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if x.ndim < 2 or x.shape[1:] != width or len(x) != len(y):
            raise InputError(
                f"task {label.tolist()[j]!r}: X of shape {x.shape} and y of shape {y.shape}; "
                f"expected (n, {', '.join(map(str, width))}) and (n,) as in the first task"
            )
    sizes = np.array([len(y) for y in ys])
    zs = _per_task(shared, "shared", sizes, ndim=2) or [np.zeros((n, 0)) for n in sizes]
    se = _per_task(known_se, "known_se", sizes, ndim=1)
    w = (
        np.zeros((len(ys), 0))
        if task_predictors is None
        else _array(task_predictors, "`task_predictors`", ndim=2)
    )
    if w.ndim != 2 or len(w) != len(ys):
        raise InputError(
            f"`task_predictors` has shape {w.shape}; expected ({len(ys)}, q), one row a task"
        )
    z = np.concatenate(zs)
    flat = len(width) == 1
    names_of_coef = tuple(coef) if coef is not None else _numbered("x", width[0] if flat else 0)
    if flat and len(names_of_coef) != width[0]:
        raise InputError(f"`coef` has {len(names_of_coef)} names for {width[0]} columns of X")
    labels = Labels(label, names_of_coef, _numbered("z", z.shape[1]), _numbered("w", w.shape[1]))
    return _checked(
        Tasks(
            np.concatenate(xs), z, w, np.concatenate(ys),
            {} if se is None else {"known_se": np.concatenate(se)},
            np.concatenate([[0], np.cumsum(sizes)]), np.arange(sizes.sum()), labels,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class ColumnReader:
    """Reads Tasks from plain numeric columns; the encoder of :meth:`Tasks.from_dataframe`."""

    task: str
    outcome: str
    predictors: tuple[str, ...]
    shared: tuple[str, ...]
    task_predictors: tuple[str, ...]
    intercept: bool
    slots: tuple[tuple[str, str], ...]

    def encode(self, data: Any, missing: Missing = "raise", need_outcome: bool = False) -> Tasks:
        """Tasks of ``data``; without its outcome where that column is absent."""
        frame = Frame(data)
        has_outcome = need_outcome or self.outcome in frame.columns
        frame.require([self.task], "task column")
        frame.require([self.outcome] if has_outcome else [], "outcome")
        frame.require(self.predictors + self.shared + self.task_predictors, "predictor")
        frame.require([column for _, column in self.slots], "column")
        if not self.predictors and not self.intercept:
            raise InputError("no varying coefficient: name `predictors` or keep the intercept")
        used = [*self.predictors, *self.shared, *self.task_predictors]
        used += [column for _, column in self.slots] + ([self.outcome] if has_outcome else [])
        columns = {column: frame.numbers(column) for column in used}
        nameless = {self.task: np.where(frame.is_null(self.task), np.nan, 0.0)}
        keep = complete_rows(nameless | columns, missing)
        if not keep.all():
            rows = np.flatnonzero(keep)
            frame, columns = frame.take(rows), {c: v[rows] for c, v in columns.items()}
        x = [columns[c] for c in self.predictors]
        if self.intercept:
            x.insert(0, np.ones(len(frame)))
        return assemble(
            frame, self.task,
            predictors=np.stack(x, axis=1),
            shared=_stack([columns[c] for c in self.shared], len(frame)),
            task_level=_stack([columns[c] for c in self.task_predictors], len(frame)),
            outcome=columns[self.outcome] if has_outcome else None,
            slots={name: columns[column] for name, column in self.slots},
            labels=Labels(
                np.zeros(0), ("Intercept",) * self.intercept + self.predictors, self.shared,
                self.task_predictors, self.task, self.outcome, self,
            ),
        )  # fmt: skip


def reader_of(
    task: Any, outcome: Any, predictors: Any, shared: Any, task_predictors: Any, *,
    intercept: bool, slots: Mapping[str, Any],
) -> ColumnReader:  # fmt: skip
    """A reader of columns, whose names may be numbers, as a pivoted table's are."""
    return ColumnReader(
        str(task), str(outcome), column_names(predictors), column_names(shared),
        column_names(task_predictors), intercept,
        tuple((name, str(column)) for name, column in slots.items() if column is not None),
    )  # fmt: skip


def assemble(
    frame: Frame,
    task: str,
    *,
    predictors: np.ndarray,
    shared: np.ndarray,
    task_level: np.ndarray,
    outcome: np.ndarray | None,
    slots: Mapping[str, np.ndarray],
    labels: Labels,
) -> Tasks:
    """Sort complete rows by task, check them, and lay them flat."""
    names, index = frame.groups(task)
    together = bool((index[1:] >= index[:-1]).all())
    order: Any = slice(None) if together else np.argsort(index, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(index, minlength=len(names)))]).astype(int)
    level = task_level[order]
    for i, column in enumerate(labels.task_predictors):
        spread = np.maximum.reduceat(level[:, i], starts[:-1]) - np.minimum.reduceat(
            level[:, i], starts[:-1]
        )
        if spread.any():
            raise InputError(
                f"task predictor {column!r} varies within task "
                f"{names.tolist()[int(np.argmax(spread > 0))]!r}; it must be constant within "
                "tasks (use `shared` or `predictors` for a column of rows)"
            )
    return _checked(
        Tasks(
            predictors[order], shared[order], level[starts[:-1]],
            None if outcome is None else outcome[order],
            {name: values[order] for name, values in slots.items()},
            starts, frame.rows[order], replace(labels, names=names),
        )
    )  # fmt: skip


def _checked(tasks: Tasks) -> Tasks:
    """Refuse slots that cannot be, and names that stand twice."""
    if tasks.names.dtype.kind == "i":  # of a million, faster without a dictionary
        ordered = np.sort(tasks.names)
        twice = bool((ordered[1:] == ordered[:-1]).any())
    else:
        twice = len(tasks.labels.number) < tasks.num_tasks
    if twice:
        values, counts = np.unique(tasks.names, return_counts=True)
        raise InputError(f"task names stand twice: {listing(values[counts > 1].tolist())}")
    for name in ("known_se", "weight", "trials"):
        if name in tasks.slots and (bad := tasks.slots[name] <= 0).any():
            row = int(np.flatnonzero(bad)[0])
            raise InputError(
                f"{name} must be positive: {bad.sum()} value(s) are not, the first "
                f"{tasks.slots[name][row]:g} in task "
                f"{tasks.names.tolist()[tasks.task_of_row[row]]!r}"
            )
    return tasks


def _stack(columns: list[np.ndarray], num_rows: int) -> np.ndarray:
    return np.stack(columns, axis=1) if columns else np.zeros((num_rows, 0))


def _numbered(letter: str, count: int) -> tuple[str, ...]:
    return tuple(f"{letter}{i}" for i in range(count))


def _array(values: Any, role: str, ndim: int | None = None) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{role} holds {array.dtype} where numbers belong")
    if array.dtype.kind != "f":
        array = array.astype(np.float64)
    if ndim is not None and array.ndim != ndim:
        raise InputError(f"{role} has shape {array.shape}; expected {ndim} dimension(s)")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise InputError(f"{role} has {bad} NaN or infinite value(s)")
    return array


def _per_task(
    values: Sequence[Any] | None, role: str, sizes: np.ndarray, ndim: int
) -> list[np.ndarray] | None:
    if values is None:
        return None
    if len(values) != len(sizes):
        raise InputError(f"`{role}` has {len(values)} entries for {len(sizes)} tasks")
    arrays = [_array(v, f"{role} of task number {j}", ndim) for j, v in enumerate(values)]
    for j, (array, n) in enumerate(zip(arrays, sizes, strict=True)):
        if len(array) != n:
            raise InputError(f"`{role}` of task number {j} has {len(array)} rows for {n} outcomes")
    return arrays
