r"""Tasks without end: a source that draws batches of tasks, each in two parts.

.. math:: D_j = (D_j^{\text{support}}, D_j^{\text{query}}), \qquad j = 1, \dots, B,
          \quad \text{fresh in every meta-step}

A source draws inside the compiled outer loop where it can (:class:`Sampled`), and otherwise hands
batches in from the host, a chunk of meta-steps at a time
(:class:`~hierbayes.tasks.streams.Streamed`).
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes import inputs
from hierbayes.errors import InputError
from hierbayes.numerics import as_key, standard_promotion
from hierbayes.tasks.container import Tasks
from hierbayes.tasks.views import Labels, Task

if TYPE_CHECKING:
    from hierbayes.tasks.streams import Streamed

Episode = tuple[Task, Task]
"""(support, query) of B tasks, on a leading axis."""


class StreamEnded(Exception):
    """A generator of batches has no more of them."""


class Episodes(abc.ABC):
    """A source of tasks, each in rows to adapt to (support) and rows to be judged by (query).

    Make one with :meth:`from_sampler` (tasks drawn on the fly), :meth:`from_classes` (N-way K-shot
    episodes from labelled examples), :meth:`from_tasks` (resplit a fixed set of tasks) or
    :meth:`from_generator` (batches that a Python generator yields).

    Examples
    --------
    >>> import hierbayes as hb
    >>> sinusoids = hb.datasets.sinusoids(shots=10)
    >>> support, query = sinusoids.draw(3, seed=0)
    >>> support
    Tasks(3 tasks, 30 rows (10 to 10 a task), coef=('x0',))
    """

    coef: tuple[str, ...] | None = None
    """Names of x's columns, where they have some."""

    filled: tuple[int, ...] = ()
    """Sizes of the tasks drawn, where they differ, so that parts are filled up to the longest."""

    # ---------------------------------------------------------------- ways in

    @staticmethod
    def from_sampler(
        sample: Callable[[Any, int], tuple[Any, Any]], shots: int, queries: int | None = None
    ) -> Sampled:
        """Tasks that a JAX function draws, fresh in every meta-step, inside the compiled loop.

        Parameters
        ----------
        sample : callable
            ``sample(key, num_rows)`` → (x, y) of **one** task, x (num_rows, …), y (num_rows,).
        shots, queries : int
            Rows in the support and in the query part; as many queries as shots by default.
        """
        shots, queries = inputs.counts(shots=shots, queries=shots if queries is None else queries)
        one = _OneTask(sample, shots, queries)
        one.check(None)
        return Sampled(one)

    @staticmethod
    def from_classes(x: Any, labels: Any, *, ways: int, shots: int, queries: int = 15) -> Sampled:
        """N-way K-shot episodes: a few classes at random, a few examples of each.

        Parameters
        ----------
        x : array (N, …)
            Examples, images too.
        labels : array (N,)
            The class of each, of any kind.
        ways : int
            Classes an episode; outcomes are 0 … ways − 1, dealt out anew in every episode.
        shots, queries : int
            Examples **of each class** in the support and in the query part.

        Raises
        ------
        InputError
            Fewer classes than ways, or a class (named) with fewer than shots + queries examples.
        """
        from hierbayes.tasks.classes import episodes_of_classes

        return episodes_of_classes(x, labels, ways, shots, queries)

    @staticmethod
    def from_tasks(
        tasks: Tasks,
        *,
        shots: int | None = None,
        queries: int | None = None,
        query: float = 0.5,
    ) -> Sampled:
        """A fixed set of tasks, drawn at random and split anew in every meta-step.

        Parameters
        ----------
        tasks : Tasks
        shots, queries : int, optional
            Rows of each part, drawn from a task's rows, of which it must have enough.
        query : float
            Where shots is not given: share of a task's rows in the query part; tasks may then be
            of any size, but for tasks of a single row, which are left out.
        """
        from hierbayes.tasks.resplit import episodes_of_tasks

        return episodes_of_tasks(tasks, shots, queries, query)

    @staticmethod
    def from_generator(make: Callable[[int], Iterator[Any]]) -> Streamed:
        """Batches from the host, such as examples read from files.

        Parameters
        ----------
        make : callable
            ``make(seed)`` → an iterator over batches ``((x, y), (x, y))``, support and query, with
            tasks on the leading axis: x (B, n, …), y (B, n), the same shapes in every batch. The
            same seed must give the same batches: a resumed run starts it again and skips those
            that it has seen. Tasks to be held out come from another seed.
        """
        from hierbayes.tasks.streams import Streamed

        if not callable(make):
            raise InputError(
                "from_generator takes a function of a seed that returns an iterator over batches, "
                f"found {type(make).__name__}"
            )
        return Streamed(make)

    # ----------------------------------------------------------------- ways out

    @abc.abstractmethod
    def feed(self, seed: int | jax.Array, batch_size: int, start: int) -> Feed:
        """The source from meta-step ``start`` on, for the outer loop."""

    @abc.abstractmethod
    def batch(self, num_tasks: int, seed: int | jax.Array) -> Episode:
        """(support, query) of ``num_tasks`` tasks on a leading axis, NumPy arrays."""

    def draw(self, num_tasks: int, seed: int | jax.Array = 0) -> tuple[Tasks, Tasks]:
        """(support, query) of ``num_tasks`` fresh tasks, named 0, 1, …; to adapt to and to score.

        Parameters
        ----------
        num_tasks : int
        seed : int or JAX key
        """
        num_tasks, seed = inputs.count("num_tasks", num_tasks), inputs.seed(seed)
        support, query = self.batch(num_tasks, seed)
        return side_by_side(support, self.coef), side_by_side(query, self.coef)


class Feed(abc.ABC):
    """Where the outer loop takes its batches from."""

    most: int
    """Meta-steps that one chunk can serve."""

    @abc.abstractmethod
    def chunk(self, count: int) -> tuple[Any, int]:
        """What the next ``count`` meta-steps need, arrays of constant shapes; and for how many.

        :class:`StreamEnded` where there is nothing more.
        """

    @abc.abstractmethod
    def take(self, chunk: Any, place: Any, key: Any) -> Episode:
        """The batch at ``place`` of a chunk; pure, called inside the compiled loop."""


# ------------------------------------------------------------------ drawn by JAX


@dataclass(frozen=True, eq=False)
class Sampled(Episodes):
    """Episodes that a pure function of a key draws.

    ``draw_one(data, key)`` → (support, query) of one task; ``data`` what it draws from.
    """

    draw_one: Callable[[Any, Any], Episode]
    data: Any = None
    coef: tuple[str, ...] | None = None
    filled: tuple[int, ...] = ()

    def with_rows(self, shots: int, queries: int | None = None) -> Sampled:
        """The same source with other numbers of rows in the two parts."""
        shots, queries = inputs.counts(shots=shots, queries=shots if queries is None else queries)
        one: Any = replace(self.draw_one, shots=shots, queries=queries)  # type: ignore[type-var]
        one.check(self.data)
        return replace(self, draw_one=one, filled=())

    def many(self, data: Any, key: Any, num_tasks: int) -> Episode:
        """(support, query) of ``num_tasks`` tasks; pure."""
        keys = jax.random.split(key, num_tasks)
        return jax.vmap(self.draw_one, (None, 0))(data, keys)

    def feed(self, seed: int | jax.Array, batch_size: int, start: int) -> Feed:
        """Nothing to bring in: batches are drawn in the loop."""
        del seed, start
        # on the device once, and not with every chunk
        return _SampledFeed(replace(self, data=jax.tree.map(jnp.asarray, self.data)), batch_size)

    def batch(self, num_tasks: int, seed: int | jax.Array) -> Episode:
        """(support, query) of ``num_tasks`` tasks on a leading axis, NumPy arrays."""
        with standard_promotion():
            return jax.tree.map(np.asarray, self._drawn(self.data, as_key(seed), num_tasks))

    @functools.cached_property
    def _drawn(self) -> Any:
        return jax.jit(self.many, static_argnums=2)


@dataclass(frozen=True, eq=False)
class _SampledFeed(Feed):
    source: Sampled
    batch_size: int
    most = 1 << 30

    def chunk(self, count: int) -> tuple[Any, int]:
        return self.source.data, count

    def take(self, chunk: Any, place: Any, key: Any) -> Episode:
        del place
        return self.source.many(chunk, key, self.batch_size)


@dataclass(frozen=True)
class _OneTask:
    """One task of a sampler, its first rows the support."""

    sample: Callable[[Any, int], tuple[Any, Any]]
    shots: int
    queries: int

    def check(self, data: Any) -> None:
        """Refuse a sampler that does not give so many rows."""
        del data
        _check_sampler(self.sample, self.shots + self.queries)

    def __call__(self, data: Any, key: Any) -> Episode:
        del data
        x, y = self.sample(key, self.shots + self.queries)
        return rows_of(x[: self.shots], y[: self.shots]), rows_of(x[self.shots :], y[self.shots :])


def rows_of(x: Any, y: Any, mask: Any = None) -> Task:
    """Rows as a likelihood sees them, with x and y alone."""
    n = y.shape[0]
    full = jnp.ones(n, bool) if mask is None else mask
    return Task(x, jnp.zeros((n, 0)), jnp.zeros(0), y, {}, full)


def side_by_side(part: Task, coef: tuple[str, ...] | None = None) -> Tasks:
    """Tasks on a leading axis as :class:`Tasks`, without the rows that only fill up."""
    mask = np.asarray(part.mask)
    sizes, x = mask.sum(1), np.asarray(part.predictors, dtype=np.float64)
    if coef is None:
        coef = tuple(f"x{i}" for i in range(x.shape[2])) if x.ndim == 3 else ()
    return Tasks(
        x[mask], np.zeros((sizes.sum(), 0)), np.zeros((len(sizes), 0)),
        np.asarray(part.outcome, dtype=np.float64)[mask], {},
        np.concatenate([[0], np.cumsum(sizes)]), np.arange(sizes.sum()),
        Labels(np.arange(len(sizes)), coef),
    )  # fmt: skip


def _check_sampler(sample: Any, num_rows: int) -> None:
    if not callable(sample):
        raise InputError(f"sample must be a function of (key, num_rows), found {sample!r}")
    try:
        with standard_promotion():
            x, y = jax.eval_shape(lambda key: sample(key, num_rows), jax.random.key(0))
    except Exception as error:
        raise InputError(
            "sample(key, num_rows) must be a JAX function that returns (x, y) of one task; it "
            f"raised {type(error).__name__}: {error}"
        ) from error
    if not (hasattr(x, "shape") and hasattr(y, "shape")):
        raise InputError(
            f"sample(key, {num_rows}) must return two arrays, x and y of one task; found "
            f"{type(x).__name__} and {type(y).__name__}"
        )
    if y.shape != (num_rows,) or x.ndim < 2 or x.shape[0] != num_rows:
        raise InputError(
            f"sample(key, {num_rows}) gives x of shape {x.shape} and y of shape {y.shape}; "
            f"expected ({num_rows}, …) and ({num_rows},)"
        )
