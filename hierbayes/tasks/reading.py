"""Tasks from DataFrames and arrays, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hierbayes import inputs
from hierbayes.errors import InputError, listing
from hierbayes.tasks.container import Tasks
from hierbayes.tasks.frames import Frame, Missing, as_names, complete_rows
from hierbayes.tasks.selection import refuse_negative_slots
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
    arrays = [_pair(j, each) for j, each in enumerate(_listed("arrays", arrays))]
    if len(arrays) == 0:
        raise InputError("no tasks: `arrays` is empty")
    label = as_names(list(range(len(arrays))) if names is None else _listed("names", names))
    if len(label) != len(arrays):
        raise InputError(f"`names` has {len(label)} entries for {len(arrays)} tasks")
    named = label.tolist()
    xs = [inputs.numbers(f"X of task {named[j]!r}", x) for j, (x, _) in enumerate(arrays)]
    ys = [inputs.numbers(f"y of task {named[j]!r}", y, ndim=1) for j, (_, y) in enumerate(arrays)]
    if xs[0].ndim < 2:
        raise InputError(f"X of task {named[0]!r} has shape {xs[0].shape}; expected (n, d)")
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
        else inputs.numbers("`task_predictors`", task_predictors, ndim=2)
    )
    if w.ndim != 2 or len(w) != len(ys):
        raise InputError(
            f"`task_predictors` has shape {w.shape}; expected ({len(ys)}, q), one row a task"
        )
    z = np.concatenate(zs)
    flat = len(width) == 1
    names_of_coef = _numbered("x", width[0] if flat else 0)
    if coef is not None:
        names_of_coef = inputs.names("coef", coef)
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

    def __post_init__(self) -> None:
        read: dict[str, Any] = {}
        for name in ("task", "outcome"):
            read[name] = inputs.column(name, getattr(self, name))
        read |= {
            name: inputs.names(name, getattr(self, name))
            for name in ("predictors", "shared", "task_predictors")
        }
        read["intercept"] = inputs.flag("intercept", self.intercept)
        read["slots"] = tuple((name, inputs.column(name, column)) for name, column in self.slots)
        for name, value in read.items():
            object.__setattr__(self, name, value)

    def encode(self, data: Any, missing: Missing = "raise", need_outcome: bool = False) -> Tasks:
        """Tasks of ``data``; without its outcome where that column is absent."""
        frame = Frame(data)
        has_outcome = need_outcome or self.outcome in frame.columns
        frame.require([self.task], "task column")
        frame.require([self.outcome] if has_outcome else [], "outcome")
        frame.require(self.predictors + self.shared + self.task_predictors, "predictor")
        frame.require([column for _, column in self.slots], "column")
        if self.intercept and "Intercept" in self.predictors:
            raise InputError(
                "a column called 'Intercept' stands beside the intercept: rename it, or pass "
                "intercept=False"
            )
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
    for role in ("coef", "shared", "task_predictors"):
        columns = getattr(tasks.labels, role)
        if len(set(columns)) < len(columns):
            again = sorted({c for c in columns if columns.count(c) > 1})
            raise InputError(f"{role} holds {listing(again)} twice; give each column its own name")
    if tasks.names.dtype.kind == "i":  # of a million, faster without a dictionary
        ordered = np.sort(tasks.names)
        twice = bool((ordered[1:] == ordered[:-1]).any())
    else:
        twice = len(tasks.labels.number) < tasks.num_tasks
    if twice:
        values, counts = np.unique(tasks.names, return_counts=True)
        raise InputError(f"task names stand twice: {listing(values[counts > 1].tolist())}")
    refuse_negative_slots(tasks)
    return tasks


def _stack(columns: list[np.ndarray], num_rows: int) -> np.ndarray:
    return np.stack(columns, axis=1) if columns else np.zeros((num_rows, 0))


def _numbered(letter: str, count: int) -> tuple[str, ...]:
    return tuple(f"{letter}{i}" for i in range(count))


def _listed(name: str, values: Any) -> list[Any]:
    try:
        return list(values)
    except TypeError as error:
        found = inputs.shown(values)
        raise InputError(f"`{name}` must be a sequence, one entry a task; found {found}") from error


def _pair(j: int, each: Any) -> tuple[Any, Any]:
    sized = isinstance(each, (tuple, list)) or getattr(each, "ndim", 0) > 0
    if not sized or len(each) != 2:
        raise InputError(
            f"`arrays` holds one pair (X, y) a task; entry {j} is {inputs.shown(each)}"
        )
    return each[0], each[1]


def _per_task(
    values: Sequence[Any] | None, role: str, sizes: np.ndarray, ndim: int
) -> list[np.ndarray] | None:
    if values is None:
        return None
    values = _listed(role, values)
    if len(values) != len(sizes):
        raise InputError(f"`{role}` has {len(values)} entries for {len(sizes)} tasks")
    arrays = [inputs.numbers(f"{role} of task number {j}", v, ndim=ndim)
              for j, v in enumerate(values)]  # fmt: skip
    if len({a.shape[1:] for a in arrays}) > 1:
        raise InputError(f"`{role}` has arrays of different widths")
    for j, (array, n) in enumerate(zip(arrays, sizes, strict=True)):
        if len(array) != n:
            raise InputError(f"`{role}` of task number {j} has {len(array)} rows for {n} outcomes")
    return arrays
