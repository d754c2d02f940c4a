r"""Tasks without end: a source that draws batches of tasks, each in two parts.

.. math:: D_j = (D_j^{\text{support}}, D_j^{\text{query}}), \qquad j = 1, \dots, B,
          \quad \text{fresh in every meta-step}

A source draws inside the compiled outer loop where it can (:class:`Sampled`), and otherwise hands
batches in from the host, a chunk of meta-steps at a time
(:class:`Streamed`).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes import inputs
from hierbayes.errors import InputError, listing
from hierbayes.numerics import as_key, standard_promotion
from hierbayes.sharding import filled_up, on_device, rung
from hierbayes.tasks.container import Tasks
from hierbayes.tasks.views import Labels, Task

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
        one = _OneOfSampler(sample, shots, queries)
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


Take = Callable[[Any, Any, Any], "Episode"]
"""(chunk, place, key) → (support, query) of a batch; hashable by what it does."""


class Feed(abc.ABC):
    """Where the outer loop takes its batches from."""

    most: int
    """Meta-steps that one chunk can serve."""

    @abc.abstractmethod
    def chunk(self, count: int) -> tuple[Any, int]:
        """What the next ``count`` meta-steps need, arrays of constant shapes; and for how many.

        :class:`StreamEnded` where there is nothing more.
        """

    take: Take
    """The batch at a place of a chunk; pure, for the compiled loop, which it is part of."""


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

    def feed(self, seed: int | jax.Array, batch_size: int, start: int) -> Feed:
        """Nothing to bring in: batches are drawn in the loop."""
        del seed, start
        # on the device once, and not with every chunk
        data = on_device(self.data)
        return _SampledFeed(data, DrawnInTheLoop(self.draw_one, batch_size))

    def batch(self, num_tasks: int, seed: int | jax.Array) -> Episode:
        """(support, query) of ``num_tasks`` tasks on a leading axis, NumPy arrays."""
        with standard_promotion():
            drawn = _drawn(self.draw_one, num_tasks, self.data, as_key(seed))
            return jax.tree.map(np.asarray, drawn)


def many(draw_one: Any, num_tasks: int, data: Any, key: Any) -> Episode:
    """(support, query) of ``num_tasks`` tasks; pure."""
    return jax.vmap(draw_one, (None, 0))(data, jax.random.split(key, num_tasks))


_drawn = jax.jit(many, static_argnums=(0, 1))


@dataclass(frozen=True)
class DrawnInTheLoop:
    """Batches of so many tasks, whatever their place: the key draws them from the chunk."""

    draw_one: Any
    batch_size: int

    def __call__(self, chunk: Any, place: Any, key: Any) -> Episode:
        """The batch that this key draws."""
        del place
        return many(self.draw_one, self.batch_size, chunk, key)


@dataclass(frozen=True, eq=False)
class _SampledFeed(Feed):
    data: Any
    take: Take
    most = 1 << 30

    def chunk(self, count: int) -> tuple[Any, int]:
        return self.data, count


@dataclass(frozen=True, eq=False)
class _OneOfSampler:
    """One task of a sampler, its first rows the support; told from others by the function."""

    sample: Callable[[Any, int], tuple[Any, Any]]
    shots: int
    queries: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _OneOfSampler) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, int, int]:
        return id(self.sample), self.shots, self.queries

    def check(self, data: Any) -> None:
        """Refuse a sampler that does not give so many rows."""
        del data
        _check_sampler(self.sample, self.shots + self.queries)

    def __call__(self, data: Any, key: Any) -> Episode:
        del data
        x, y = self.sample(key, self.shots + self.queries)
        return rows_of(x[: self.shots], y[: self.shots]), rows_of(x[self.shots :], y[self.shots :])


def rows_of(x: Any, y: Any, mask: Any = None, slots: dict[str, Any] | None = None) -> Task:
    """Rows as a likelihood sees them: x, y, and what rows carry beside them."""
    n = y.shape[0]
    full = jnp.ones(n, bool) if mask is None else mask
    return Task(x, jnp.zeros((n, 0)), jnp.zeros(0), y, slots or {}, full)


def side_by_side(part: Task, coef: tuple[str, ...] | None = None) -> Tasks:
    """Tasks on a leading axis as :class:`Tasks`, without the rows that only fill up."""
    mask = np.asarray(part.mask)
    sizes, x = mask.sum(1), np.asarray(part.predictors, dtype=np.float64)
    if coef is None:
        coef = tuple(f"x{i}" for i in range(x.shape[2])) if x.ndim == 3 else ()
    return Tasks(
        x[mask], np.zeros((sizes.sum(), 0)), np.zeros((len(sizes), 0)),
        np.asarray(part.outcome, dtype=np.float64)[mask],
        {name: np.asarray(v, dtype=np.float64)[mask] for name, v in part.slots.items()},
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


# ------------------------------------------------------------ classes of examples


def episodes_of_classes(x: Any, labels: Any, ways: int, shots: int, queries: int) -> Sampled:
    """See :meth:`Episodes.from_classes`."""
    ways = inputs.count("ways", ways, least=2)
    shots, queries = inputs.count("shots", shots, 1), inputs.count("queries", queries, 1)
    x, labels = np.asarray(x), np.asarray(labels)
    if x.dtype.kind not in "biuf" or x.ndim < 2 or labels.shape != x.shape[:1]:
        raise InputError(
            f"x must be numbers (N, …) and labels (N,); found {x.dtype} {x.shape} and "
            f"{labels.shape}"
        )
    if not np.isfinite(x).all():
        raise InputError(f"x has {int((~np.isfinite(x)).sum())} NaN or infinite value(s)")
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        raise InputError(f"labels have {int(np.isnan(labels).sum())} NaN value(s)")
    try:
        classes, of = np.unique(labels, return_inverse=True)
    except TypeError as error:
        raise InputError(f"labels must all be of one kind, to be sorted: {error}") from error
    counts = np.bincount(of, minlength=len(classes))
    if len(classes) < ways:
        raise InputError(
            f"{ways}-way episodes need {ways} classes or more; labels hold {len(classes)}"
        )
    table = np.zeros((len(classes), counts.max()), dtype=np.int32)
    for c in range(len(classes)):
        table[c, : counts[c]] = np.flatnonzero(of == c)
    data = {"x": x, "table": table, "counts": counts.astype(np.int32)}
    one = _OneEpisode(int(ways), int(shots), int(queries), classes)
    one.check(data)
    return Sampled(one, data)


@dataclass(frozen=True)
class _OneEpisode:
    ways: int
    shots: int
    queries: int
    classes: np.ndarray = field(compare=False)  # named in refusals alone

    def check(self, data: Any) -> None:
        """Refuse classes with fewer examples than an episode takes of each."""
        counts = data["counts"]
        if (few := counts < self.shots + self.queries).any():
            raise InputError(
                f"{few.sum()} of {len(counts)} classes have fewer than shots + queries = "
                f"{self.shots} + {self.queries} examples: "
                f"{listing(self.classes[few].tolist(), 3)}, the smallest {counts.min()}; take "
                "fewer, or leave these classes out"
            )

    def __call__(self, data: Any, key: Any) -> Episode:
        pick, deal = jax.random.split(key)
        num_classes, width = data["table"].shape
        chosen = jax.random.permutation(pick, num_classes)[: self.ways]
        each = self.shots + self.queries
        chance = jax.random.uniform(deal, (self.ways, width))
        missing = jnp.arange(width) >= data["counts"][chosen][:, None]
        places = jax.lax.top_k(jnp.where(missing, -1.0, chance), each)[1]
        rows = jnp.take_along_axis(data["table"][chosen], places, axis=1)

        def part(index: Any) -> Any:
            x = data["x"][index.reshape(-1)]
            y = jnp.repeat(jnp.arange(self.ways), index.shape[1])
            return rows_of(x, y.astype(jnp.float32))

        return part(rows[:, : self.shots]), part(rows[:, self.shots :])


# ------------------------------------------------------------ a fixed set, split anew


def episodes_of_tasks(
    tasks: Tasks, shots: int | None, queries: int | None, query: float
) -> Sampled:
    """See :meth:`Episodes.from_tasks`."""
    _check_tasks(tasks)
    query = inputs.share("query", query)
    if shots is None and queries is not None:
        raise InputError("queries is given without shots; give both, or query as a share")
    if shots is not None:
        shots, queries = inputs.counts(shots=shots, queries=shots if queries is None else queries)
    one = _OneTask(shots, queries, float(query))
    sizes = tasks.sizes
    one.check({"sizes": sizes, "names": tasks.names})
    usable = np.flatnonzero(sizes >= 2)
    if not usable.size:
        raise InputError("no task has two rows, one for support and one for query")
    width, different = int(sizes.max()), np.unique(sizes[usable])
    if shots is None and len(different) == 1:  # all parts are as long, and none is filled up
        asked = _share(width, float(query))
        one = _OneTask(width - asked, asked, float(query))
    filled = tuple(different.tolist()) if one.shots is None else ()
    block = tasks.block(usable, width)
    data: dict[str, Any] = {
        "x": block.predictors, "y": block.outcome, "sizes": sizes[usable].astype(np.int32),
        "slots": block.slots,
    }  # fmt: skip
    # filled up, so that a task more compiles nothing; how many are drawn from is a number
    data = jax.tree.map(lambda values: filled_up(values, rung(len(usable)), 0), data)
    return Sampled(one, data | {"num_tasks": np.int32(len(usable))}, tasks.coef, filled)


def _check_tasks(tasks: Any) -> None:
    """Refuse what no episodes can be drawn from."""
    if not isinstance(tasks, Tasks):
        raise InputError(f"expected Tasks, found {type(tasks).__name__}")
    if tasks.sharding is not None:
        raise InputError(
            "episodes are drawn on one device, and these tasks are spread over several: use "
            "tasks.shard(None)"
        )
    if tasks.outcome is None:
        raise InputError(f"the tasks hold no outcome {tasks.labels.outcome!r} to learn from")
    extra = [*tasks.labels.shared, *tasks.labels.task_predictors]
    if extra:
        raise InputError(
            "methods on episodes learn the mean of theta and no effects that tasks share: they "
            f"would ignore {', '.join(map(repr, extra))}; fit the tasks all at once, or put the "
            "columns among the predictors"
        )


def _share(size: Any, query: float) -> Any:
    """Rows of the query part, of a task with so many."""
    if isinstance(size, int):
        return int(np.clip(np.floor(query * size + 0.5), 1, size - 1))
    return jnp.clip(jnp.floor(query * size + 0.5).astype(int), 1, size - 1)


@dataclass(frozen=True)
class _OneTask:
    shots: int | None
    queries: int | None
    query: float

    def check(self, data: Any) -> None:
        """Refuse tasks with fewer rows than both parts take."""
        if self.shots is None or self.queries is None:
            return
        need, sizes = self.shots + self.queries, data["sizes"][: data.get("num_tasks")]
        if (few := sizes < need).any():
            names = data.get("names", np.arange(len(sizes)))
            raise InputError(
                f"{few.sum()} of {len(sizes)} tasks have fewer than shots + queries = {need} "
                f"rows: {listing(names[few].tolist(), 3)}, the smallest {sizes.min()}"
            )

    def __call__(self, data: Any, key: Any) -> Episode:
        pick, deal = jax.random.split(key)
        j = jax.random.randint(pick, (), 0, data["num_tasks"])
        size, width = data["sizes"][j], data["y"].shape[1]
        chance = jnp.where(jnp.arange(width) < size, jax.random.uniform(deal, (width,)), 2.0)
        order = jnp.argsort(chance)
        x, y = data["x"][j][order], data["y"][j][order]
        slots = {name: values[j][order] for name, values in data["slots"].items()}

        def rows(places: slice, mask: Any = None) -> Task:
            carried = {name: values[places] for name, values in slots.items()}
            return rows_of(x[places], y[places], mask, carried)

        if self.shots is not None and self.queries is not None:
            return rows(slice(self.shots)), rows(slice(self.shots, self.shots + self.queries))
        asked, place, whole = _share(size, self.query), jnp.arange(width), slice(width)
        given = rows(whole, place < size - asked)
        return given, rows(whole, (place >= size - asked) & (place < size))


# ------------------------------------------------------------ batches from the host


@dataclass(frozen=True, eq=False)
class Streamed(Episodes):
    """Episodes that a Python generator yields."""

    make: Callable[[int], Iterator[Any]]

    def feed(self, seed: int | jax.Array, batch_size: int, start: int) -> Feed:
        """Batches from the ``start``-th on; the generator decides how many tasks they hold."""
        del batch_size
        feed = self._from_the_start(seed)
        for _ in range(start):
            try:
                feed.next()
            except StreamEnded as ended:
                raise InputError(
                    f"{ended}, but the run to be resumed has seen {start}: the same seed must "
                    "give the same batches"
                ) from ended
        return feed

    def _from_the_start(self, seed: int | jax.Array) -> _StreamedFeed:
        made = self.make(_as_int(seed))
        try:
            return _StreamedFeed(iter(made))
        except TypeError as error:
            raise InputError(
                f"make(seed) must return an iterator over batches, found {type(made).__name__}"
            ) from error

    def batch(self, num_tasks: int, seed: int | jax.Array) -> Episode:
        """(support, query) of ``num_tasks`` tasks on a leading axis, NumPy arrays."""
        feed, found, have = self._from_the_start(seed), [], 0
        while have < num_tasks:
            try:
                found.append(feed.next())
            except StreamEnded as error:
                raise InputError(
                    f"the generator stopped after {have} tasks; {num_tasks} were asked for"
                ) from error
            have += len(found[-1][0].outcome)
        both = jax.tree.map(lambda *parts: np.concatenate(parts)[:num_tasks], *found)
        return both


CHUNK, CHUNK_BYTES = 64, 1 << 28
"""Batches brought in from the host for one compiled call at most, and their bytes."""


def at_place(chunk: Any, place: Any, key: Any) -> Episode:
    """The batch that stands at this place of the chunk."""
    del key
    return jax.tree.map(lambda values: values[place], chunk)


@dataclass(eq=False)
class _StreamedFeed(Feed):
    iterator: Iterator[Any]
    seen: int = 0
    shapes: Any = field(default=None)
    most = CHUNK
    take = staticmethod(at_place)

    def next(self) -> Episode:
        """The next batch, checked against the first."""
        try:
            batch = next(self.iterator)
        except StopIteration:
            raise StreamEnded(f"the generator stopped after {self.seen} batches") from None
        xs, ys, xq, yq = arrays = self._arrays(batch)
        shapes = [a.shape for a in arrays]
        self._check_shapes(shapes)
        self._check_numbers(arrays)
        self.shapes, self.seen = shapes, self.seen + 1
        return _with_tasks(xs, ys), _with_tasks(xq, yq)

    def _arrays(self, batch: Any) -> list[np.ndarray]:
        """A batch as x and y of support, then of query."""
        try:
            (xs, ys), (xq, yq) = batch
            return [np.asarray(a) for a in (xs, ys, xq, yq)]
        except (TypeError, ValueError) as error:
            raise InputError(
                f"batch {self.seen} of the generator is no ((x, y), (x, y)) of support and query"
            ) from error

    def _check_shapes(self, shapes: list[tuple[int, ...]]) -> None:
        """Refuse parts that do not fit together, or are not as in the first batch."""
        for role, (x, y) in (("support", shapes[:2]), ("query", shapes[2:])):
            if len(y) != 2 or len(x) < 3 or x[:2] != y or y[0] != shapes[1][0]:
                raise InputError(
                    f"batch {self.seen} of the generator: {role} has x of shape {x} and y of shape "
                    f"{y}; expected (B, n, …) and (B, n) with the same B tasks in both parts"
                )
        if self.shapes is not None and shapes != self.shapes:
            raise InputError(
                f"the generator changed shape at batch {self.seen}: {shapes}, before {self.shapes} "
                "(x and y of support, x and y of query); every batch must have the same shapes"
            )

    def _check_numbers(self, arrays: list[np.ndarray]) -> None:
        """Refuse what is no number, NaN or infinite."""
        places = ("x of support", "y of support", "x of query", "y of query")
        for place, values in zip(places, arrays, strict=True):
            where = f"batch {self.seen} of the generator: {place}"
            if values.dtype.kind not in "biuf":
                raise InputError(f"{where} must be numbers, found {values.dtype}")
            if lost := int((~np.isfinite(values)).sum()):
                raise InputError(f"{where} has {lost} NaN or infinite value(s)")

    def chunk(self, count: int) -> tuple[Any, int]:
        batches: list[Episode] = [self.next()]
        size = sum(values.nbytes for values in jax.tree.leaves(batches[0]))
        width = max(1, min(CHUNK, CHUNK_BYTES // size))
        while len(batches) < min(count, width):
            try:
                batches.append(self.next())
            except StreamEnded:
                break
        filled = batches + [batches[-1]] * (width - len(batches))
        return jax.tree.map(lambda *parts: np.stack(parts), *filled), len(batches)


def _with_tasks(x: np.ndarray, y: np.ndarray) -> Task:
    num_tasks, n = y.shape
    full = np.ones((num_tasks, n), bool)
    return Task(x, np.zeros((num_tasks, n, 0)), np.zeros((num_tasks, 0)), y, {}, full)


def _as_int(seed: int | jax.Array) -> int:
    if isinstance(seed, int):
        return seed
    return int(np.asarray(jax.random.key_data(as_key(seed))).ravel()[-1])
