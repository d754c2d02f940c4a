r"""D_1, …, D_J: the data of many related tasks.

.. math:: D_j = \{(x_{ij}, z_{ij}, y_{ij})\}_{i=1}^{n_j}, \qquad w_j, \qquad j = 1, \dots, J

Tasks are ragged. Their rows lie flat, one task after another; likelihoods that must be vmapped
see them in power-of-two buckets, which never pad beyond twice the observations.

What is computed of Tasks once and kept with them, for as long as they live.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hierbayes import inputs
from hierbayes.errors import InputError, listing, suggestion
from hierbayes.numerics import as_rng
from hierbayes.sharding import sharding_over
from hierbayes.tasks.frames import Frame, Missing, as_names, complete_rows
from hierbayes.tasks.views import SLOTS, Labels, Slots, Task, taken, unwritable

POSITIVE = ("known_se", "weight", "trials")
"""Slots that hold positive numbers only."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["predictors", "shared", "task_predictors", "outcome", "slots", "starts", "rows"],
    meta_fields=["labels", "sharding"],
)
@dataclass(frozen=True, eq=False)
class Tasks:
    """Many related tasks: ragged rows, names, task-level covariates.

    Make them with :meth:`from_dataframe`, :meth:`from_arrays` or :func:`hierbayes.from_formula`.

    Attributes
    ----------
    predictors : array (N, d) or (N, …)
        The columns whose coefficients θ_j vary between tasks, all rows, task after task.
    shared : array (N, p)
        The columns whose coefficients β are common to all tasks.
    task_predictors : array (J, q)
        Covariates w_j of the tasks themselves, which move the prior's mean: μ + Γ w_j.
    outcome : array (N,) or None
        The outcome; None where only predictions are wanted.
    slots : dict
        Optional row columns: ``offset``, ``weight``, ``trials``, ``known_se``, each (N,).
    starts : array (J + 1,)
        Task j holds the rows ``starts[j]:starts[j + 1]``.
    rows : array (N,)
        Each row's number in the data that it was read from.
    labels : Labels
        Names of tasks and columns.
    sharding : jax.sharding.NamedSharding or None
        How methods spread the tasks over devices; see :meth:`shard`. It is not saved.

    Examples
    --------
    >>> import numpy as np, hierbayes as hb
    >>> rng = np.random.default_rng(0)
    >>> tasks = hb.Tasks.from_arrays([(np.ones((n, 1)), rng.normal(size=n)) for n in (3, 1, 5)])
    >>> tasks
    Tasks(3 tasks, 9 rows (1 to 5 a task), coef=('x0',))
    >>> support, query = tasks.split(query=0.5, seed=0)
    >>> support.sizes.tolist(), query.sizes.tolist()
    ([1, 0, 2], [2, 1, 3])
    """

    predictors: Any
    shared: Any
    task_predictors: Any
    outcome: Any
    slots: dict[str, Any]
    starts: Any
    rows: Any
    labels: Labels = field(repr=False)
    sharding: NamedSharding | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("predictors", "shared", "task_predictors", "outcome", "starts", "rows"):
            object.__setattr__(self, name, unwritable(getattr(self, name)))
        if not isinstance(self.slots, Slots):
            slots = {name: unwritable(values) for name, values in self.slots.items()}
            object.__setattr__(self, "slots", Slots(slots))

    # ---------------------------------------------------------------- ways in

    @classmethod
    def from_dataframe(
        cls,
        data: Any,
        *,
        task: str,
        outcome: str,
        predictors: Sequence[str] = (),
        shared: Sequence[str] = (),
        task_predictors: Sequence[str] = (),
        intercept: bool = True,
        known_se: str | None = None,
        offset: str | None = None,
        weight: str | None = None,
        trials: str | None = None,
        missing: Missing = "raise",
    ) -> Tasks:
        """Tasks from a DataFrame (pandas, polars, …), one row an observation.

        Parameters
        ----------
        data : DataFrame
        task : str
            Column that names the task of each row.
        outcome : str
            Column of the outcome.
        predictors : sequence of str
            Columns whose coefficients vary between tasks (θ_j).
        shared : sequence of str
            Columns whose coefficients are common to all tasks (β).
        task_predictors : sequence of str
            Columns that are constant within each task and move the prior's mean (Γ).
        intercept : bool
            Put a varying ``Intercept`` before the predictors.
        known_se, offset, weight, trials : str, optional
            Columns with known standard errors (outcome's units), offsets of the linear predictor,
            precision weights and binomial trials.
        missing : "raise" or "drop"
            Refuse rows with missing values, or leave them out with a warning.

        Returns
        -------
        Tasks

        Raises
        ------
        InputError
            A missing column, strings where numbers belong, missing or infinite values, standard
            errors or weights that are not positive, a task predictor that varies within a task.

        Examples
        --------
        >>> import hierbayes as hb
        >>> df = hb.datasets.radon()
        >>> hb.Tasks.from_dataframe(df, task="county", outcome="log_radon", predictors=["floor"])
        Tasks(85 tasks, 919 rows (1 to 116 a task), coef=('Intercept', 'floor'))
        """
        slots = dict(known_se=known_se, offset=offset, weight=weight, trials=trials)
        reader = ColumnReader(
            task, outcome, predictors, shared, task_predictors, intercept,  # type: ignore[arg-type]
            tuple((name, column) for name, column in slots.items() if column is not None),
        )  # fmt: skip
        return reader.encode(data, missing=missing, need_outcome=True)

    @classmethod
    def from_arrays(
        cls,
        arrays: Sequence[tuple[Any, Any]],
        *,
        names: Sequence[Any] | None = None,
        coef: Sequence[str] | None = None,
        shared: Sequence[Any] | None = None,
        known_se: Sequence[Any] | None = None,
        task_predictors: Any | None = None,
    ) -> Tasks:
        """Tasks from one (X_j, y_j) pair a task; no intercept is added.

        Parameters
        ----------
        arrays : sequence of (X_j, y_j)
            X_j of shape (n_j, d) or (n_j, …), y_j of shape (n_j,); n_j may be zero.
        names : sequence, optional
            Task names; 0, 1, … by default.
        coef : sequence of str, optional
            Names of the columns of X_j; x0, x1, … by default.
        shared : sequence of arrays (n_j, p), optional
            Columns with coefficients common to all tasks.
        known_se : sequence of arrays (n_j,), optional
            Known standard errors, in the outcome's units.
        task_predictors : array (J, q), optional
            Covariates of the tasks.

        Returns
        -------
        Tasks
        """
        return _read_arrays(arrays, names, coef, shared, known_se, task_predictors)

    def encode(self, data: Any, missing: Missing = "raise") -> Tasks:
        """New rows as Tasks, through the transforms that the training data fixed.

        The outcome column may be absent; then ``outcome`` is None and the Tasks can be predicted
        but not fitted.
        """
        if self.labels.encoder is None:
            raise InputError(
                "these Tasks were made from arrays and hold no transforms; "
                "build new ones with Tasks.from_arrays"
            )
        return self.labels.encoder.encode(data, missing=missing)

    # ------------------------------------------------------------- properties

    @property
    def names(self) -> np.ndarray:
        """Task names, in order."""
        return self.labels.names

    @property
    def coef(self) -> tuple[str, ...]:
        """Names of the coefficients that vary between tasks."""
        return self.labels.coef

    @property
    def num_tasks(self) -> int:
        """Number of tasks J, those without rows included."""
        return len(self.starts) - 1

    @property
    def num_rows(self) -> int:
        """Number of rows N over all tasks."""
        return len(self.rows)

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each task, (J,)."""
        return np.diff(self.starts)

    @property
    def task_of_row(self) -> np.ndarray:
        """Task number of each row, (N,)."""
        return np.repeat(np.arange(self.num_tasks), self.sizes)

    def __len__(self) -> int:
        return self.num_tasks

    def __repr__(self) -> str:
        low, high = (self.sizes.min(), self.sizes.max()) if self.num_tasks else (0, 0)
        extra = "".join(
            f", {name}={value}"
            for name, value in [
                ("shared", self.labels.shared),
                ("task_predictors", self.labels.task_predictors),
            ]
            if value
        )
        return (
            f"Tasks({self.num_tasks} tasks, {self.num_rows} rows ({low} to {high} a task), "
            f"coef={self.coef}{extra})"
        )

    # -------------------------------------------------------------- selection

    def __getitem__(self, names: Any) -> Tasks:
        """The task of this name, or the tasks of these names, as Tasks."""
        return self.take([_position(self, n) for n in _names_asked(names)])

    def __iter__(self) -> Iterator[tuple[Any, Tasks]]:
        """Each task as ``(name, Tasks of one)``."""
        return ((name, self.take([j])) for j, name in enumerate(self.names.tolist()))

    def take(self, positions: Sequence[int] | np.ndarray) -> Tasks:
        """The tasks at these positions, in this order; −1 is the last; or a mask (J,) of bool."""
        return _taken(self, positions)

    def keep_rows(self, keep: np.ndarray) -> Tasks:
        """The same tasks with only the rows where ``keep`` (N,) is True; tasks may become empty."""
        return _rows_kept(self, keep)

    def replace(self, **columns: Any) -> Tasks:
        """The same tasks with other numbers: ``tasks.replace(outcome=y)``.

        Tasks never change: their arrays are copies of what was read and cannot be written to.

        Parameters
        ----------
        **columns
            ``outcome`` (N,), ``predictors``, ``shared``, ``task_predictors``, ``known_se``,
            ``offset``, ``weight`` or ``trials``, in the shape that they have, rows task by task
            (row i is row ``tasks.rows[i]`` of the data); None leaves an outcome, or a row column,
            out.

        Examples
        --------
        >>> import numpy as np, hierbayes as hb
        >>> tasks = hb.Tasks.from_arrays([(np.ones((2, 1)), np.zeros(2))] * 2)
        >>> tasks.replace(outcome=[1, 2, 3, 4]).outcome
        array([1., 2., 3., 4.])
        """
        return _with_columns(self, columns)

    # ------------------------------------------------------------------ splits

    def split(self, query: float = 0.5, seed: int | jax.Array = 0) -> tuple[Tasks, Tasks]:
        """(support, query): every task's rows cut at random into two parts.

        A task of two rows or more keeps at least one row on either side; a one-row task is
        query-only. Both parts hold all tasks, some perhaps without rows.

        Parameters
        ----------
        query : float in (0, 1)
            Share of each task's rows that go to the query part.
        seed : int or JAX key
        """
        query = inputs.share("query", query)
        chosen = _choose_rows(self, query, seed, lonely_is_chosen=True)
        return self.keep_rows(~chosen), self.keep_rows(chosen)

    def hold_out(self, fraction: float = 0.2, seed: int | jax.Array = 0) -> tuple[Tasks, Tasks]:
        """(train, test): a share of each task's rows held out for scoring.

        As :meth:`split`, but a one-row task stays in the training part.
        """
        fraction = inputs.share("fraction", fraction)
        chosen = _choose_rows(self, fraction, seed, lonely_is_chosen=False)
        return self.keep_rows(~chosen), self.keep_rows(chosen)

    # ----------------------------------------------------------------- devices

    def shard(self, mesh: Mesh | None, axis: str | Sequence[str] | None = None) -> Tasks:
        """The same tasks, to be spread over the devices of a mesh, of this host or of many.

        Every method takes them as it takes others, with the same results. The rows stay on the
        hosts; a method puts on each device what it needs of that device's share of the tasks.
        In several processes all make the same Tasks and call the same methods in the same order.

        Parameters
        ----------
        mesh : jax.sharding.Mesh or None
            Made by ``jax.make_mesh``; None takes tasks back to one device.
        axis : str or sequence of str, optional
            Axes of the mesh over which tasks are spread; the first by default.

        Returns
        -------
        Tasks
            Parts of it (:meth:`take`, :meth:`split`, …) are spread over the same devices.

        Raises
        ------
        InputError
            For what is no mesh, or an axis that it does not have.

        Examples
        --------
        >>> import jax, hierbayes as hb
        >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
        ...                                known_se="se")
        >>> mesh = jax.make_mesh((jax.device_count(),), ("tasks",))
        >>> fit = hb.empirical_bayes(model, tasks.shard(mesh), criterion="map")
        >>> fit.theta.dims
        ('task', 'coef')
        """
        return replace(self, sharding=None if mesh is None else sharding_over(mesh, axis))

    # ------------------------------------------------- what the methods consume

    def flat(self) -> Task:
        """All rows as one :class:`Task`, for likelihoods that work row by row."""
        return Task(
            self.predictors, self.shared, self.task_predictors, self.outcome, dict(self.slots),
            np.ones(self.num_rows, bool),
        )  # fmt: skip

    def blocks(self) -> list[tuple[np.ndarray, Task]]:
        """Power-of-two buckets: ``(positions (B,), Task with leading axis B)``, each task once.

        A bucket of width 2^k holds the tasks of 2^(k−1) < n_j ≤ 2^k rows, so that padding stays
        below the number of observations. Tasks without rows stand in no bucket.
        """
        sizes = self.sizes
        width = np.where(sizes > 0, 2 ** np.ceil(np.log2(np.maximum(sizes, 1))), 0)
        return self._buckets(width)

    def alike(self) -> list[tuple[np.ndarray, Task]]:
        """The same with a bucket a size, in which nothing is filled up."""
        return self._buckets(self.sizes)

    def _buckets(self, width: np.ndarray) -> list[tuple[np.ndarray, Task]]:
        return [
            (positions := np.flatnonzero(width == w), self.block(positions, int(w)))
            for w in np.unique(width[width > 0])
        ]

    def block(self, positions: np.ndarray, width: int) -> Task:
        """The tasks at these positions side by side, each filled up to ``width`` rows."""
        column = np.arange(width)
        mask = column < self.sizes[positions][:, None]
        rows = np.where(mask, self.starts[positions][:, None] + column, -1)
        return taken(self.flat(), rows, self.task_predictors[positions])

    def to_dataframe(self) -> Any:
        """The rows as a pandas DataFrame: task, columns, outcome, slots."""
        return _to_dataframe(self)


# ------------------------------------------------------------ parts and other numbers


def _taken(tasks: Tasks, positions: Any) -> Tasks:
    """See :meth:`Tasks.take`."""
    at = _positions_of(tasks, positions)
    ranges = [np.arange(tasks.starts[j], tasks.starts[j + 1]) for j in at]
    rows = np.concatenate(ranges) if ranges else np.zeros(0, dtype=int)
    return replace(
        _with_rows(tasks, rows),
        task_predictors=tasks.task_predictors[at],
        starts=np.concatenate([[0], np.cumsum(tasks.sizes[at])]).astype(int),
        labels=replace(tasks.labels, names=tasks.names[at]),
    )


def _rows_kept(tasks: Tasks, keep: Any) -> Tasks:
    """See :meth:`Tasks.keep_rows`."""
    kept = _mask_of_rows(tasks, keep)
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


def _positions_of(tasks: Tasks, asked: Any) -> np.ndarray:
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


def _names_asked(names: Any) -> list[Any]:
    """The names that ``tasks[names]`` asks for, one or many."""
    if isinstance(names, (list, tuple)) or getattr(names, "ndim", 0) == 1:
        return list(names)
    if getattr(names, "ndim", 0) > 1:
        raise InputError(f"names must be one name or a sequence of them, named as the tasks are; "
                         f"found {inputs.shown(names)}")  # fmt: skip
    return [names]


def _position(tasks: Tasks, name: Any) -> int:
    """Where the task of this name stands."""
    plain = name.item() if isinstance(name, (np.generic, np.ndarray)) and name.ndim == 0 else name
    found = tasks.labels.position(plain)
    if found is None:
        raise InputError(
            f"no task is named {inputs.shown(plain)}; "
            f"{suggestion(str(plain), tasks.names.tolist())}"
        )
    return found


def _mask_of_rows(tasks: Tasks, keep: Any) -> np.ndarray:
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


def _with_columns(tasks: Tasks, given: dict[str, Any]) -> Tasks:
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
    _refuse_negative_slots(found)
    return found


def _refuse_negative_slots(tasks: Tasks) -> None:
    """Refuse standard errors, weights and trials that are not positive, naming the task."""
    for name in POSITIVE:
        if name in tasks.slots and (bad := tasks.slots[name] <= 0).any():
            row = int(np.flatnonzero(bad)[0])
            raise InputError(
                f"{name} must be positive: {bad.sum()} value(s) are not, the first "
                f"{tasks.slots[name][row]:g} in task "
                f"{tasks.names.tolist()[tasks.task_of_row[row]]!r}"
            )


def _to_dataframe(tasks: Tasks) -> Any:
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


def _choose_rows(
    tasks: Tasks, share: float, seed: int | jax.Array, *, lonely_is_chosen: bool
) -> np.ndarray:
    """Rows (N,) of bool that go to the second part, about ``share`` of every task's."""
    sizes, task = tasks.sizes, tasks.task_of_row
    shuffled = as_rng(seed).random(tasks.num_rows)
    order = np.lexsort((shuffled, task))
    place = np.empty(tasks.num_rows, dtype=int)
    place[order] = np.arange(tasks.num_rows) - tasks.starts[:-1][task]
    count = np.clip(np.floor(share * sizes + 0.5), 1, np.maximum(sizes - 1, 1))
    count = np.where(sizes == 1, int(lonely_is_chosen), count)
    return place < count[task]


# ------------------------------------------------------------ from arrays and DataFrames


def _read_arrays(
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
        self._require(frame, has_outcome)
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

    def _require(self, frame: Frame, has_outcome: bool) -> None:
        """Refuse data without these columns, and what leaves θ empty or with a name twice."""
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
    _refuse_negative_slots(tasks)
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


Made = TypeVar("Made")

_KEPT: weakref.WeakKeyDictionary[Tasks, dict[Hashable, Any]] = weakref.WeakKeyDictionary()


def kept(function: Callable[..., Made]) -> Callable[..., Made]:
    """Remember ``function(tasks, *key)``: Tasks never change, so neither does what follows.

    The key must be hashable, and the result must not hold the tasks themselves, which would then
    live for ever. What raises is not remembered.
    """

    @functools.wraps(function)
    def remembered(tasks: Tasks, *key: Hashable) -> Made:
        of_tasks = _KEPT.setdefault(tasks, {})
        place = (function, *key)
        if place not in of_tasks:
            of_tasks[place] = function(tasks, *key)
        return of_tasks[place]

    return remembered
