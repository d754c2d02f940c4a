r"""D_1, …, D_J: the data of many related tasks.

.. math:: D_j = \{(x_{ij}, z_{ij}, y_{ij})\}_{i=1}^{n_j}, \qquad w_j, \qquad j = 1, \dots, J

Tasks are ragged. Their rows lie flat, one task after another; likelihoods that must be vmapped
see them in power-of-two buckets, which never pad beyond twice the observations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hierbayes import inputs
from hierbayes.errors import InputError
from hierbayes.sharding import sharding_over
from hierbayes.tasks import layout
from hierbayes.tasks.frames import Missing
from hierbayes.tasks.views import Labels, Slots, Task, unwritable


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
        from hierbayes.tasks.reading import ColumnReader

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
        from hierbayes.tasks.reading import read_arrays

        return read_arrays(arrays, names, coef, shared, known_se, task_predictors)

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
        from hierbayes.tasks import selection

        return self.take([selection.position(self, n) for n in selection.names_asked(names)])

    def __iter__(self) -> Iterator[tuple[Any, Tasks]]:
        """Each task as ``(name, Tasks of one)``."""
        return ((name, self.take([j])) for j, name in enumerate(self.names.tolist()))

    def take(self, positions: Sequence[int] | np.ndarray) -> Tasks:
        """The tasks at these positions, in this order; −1 is the last; or a mask (J,) of bool."""
        from hierbayes.tasks import selection

        return selection.taken(self, positions)

    def keep_rows(self, keep: np.ndarray) -> Tasks:
        """The same tasks with only the rows where ``keep`` (N,) is True; tasks may become empty."""
        from hierbayes.tasks import selection

        return selection.rows_kept(self, keep)

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
        from hierbayes.tasks import selection

        return selection.with_columns(self, columns)

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
        chosen = layout.choose_rows(self, query, seed, lonely_is_chosen=True)
        return self.keep_rows(~chosen), self.keep_rows(chosen)

    def hold_out(self, fraction: float = 0.2, seed: int | jax.Array = 0) -> tuple[Tasks, Tasks]:
        """(train, test): a share of each task's rows held out for scoring.

        As :meth:`split`, but a one-row task stays in the training part.
        """
        fraction = inputs.share("fraction", fraction)
        chosen = layout.choose_rows(self, fraction, seed, lonely_is_chosen=False)
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

    def batch(self, key: Any, step: int) -> Tasks:
        """A fixed set of tasks is a source that always yields itself."""
        del key, step
        return self

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
        return layout.blocks(self)

    def block(self, positions: np.ndarray, width: int) -> Task:
        """The tasks at these positions side by side, each filled up to ``width`` rows."""
        return layout.block(self, positions, width)

    def to_dataframe(self) -> Any:
        """The rows as a pandas DataFrame: task, columns, outcome, slots."""
        from hierbayes.tasks import selection

        return selection.to_dataframe(self)
