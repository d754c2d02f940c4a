"""Tasks that a Python generator yields: batches from the host, checked one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from hierbayes.errors import InputError
from hierbayes.numerics import as_key
from hierbayes.tasks.episodes import Episode, Episodes, Feed, StreamEnded
from hierbayes.tasks.views import Task


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


@dataclass(eq=False)
class _StreamedFeed(Feed):
    iterator: Iterator[Any]
    seen: int = 0
    shapes: Any = field(default=None)
    most = CHUNK

    def next(self) -> Episode:
        """The next batch, checked against the first."""
        try:
            batch = next(self.iterator)
        except StopIteration:
            raise StreamEnded(f"the generator stopped after {self.seen} batches") from None
        try:
            (xs, ys), (xq, yq) = batch
            arrays = [np.asarray(a) for a in (xs, ys, xq, yq)]
        except (TypeError, ValueError) as error:
            raise InputError(
                f"batch {self.seen} of the generator is no ((x, y), (x, y)) of support and query"
            ) from error
        shapes = [a.shape for a in arrays]
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
        places = ("x of support", "y of support", "x of query", "y of query")
        for place, values in zip(places, arrays, strict=True):
            where = f"batch {self.seen} of the generator: {place}"
            if values.dtype.kind not in "biuf":
                raise InputError(f"{where} must be numbers, found {values.dtype}")
            if lost := int((~np.isfinite(values)).sum()):
                raise InputError(f"{where} has {lost} NaN or infinite value(s)")
        self.shapes, self.seen = shapes, self.seen + 1
        xs, ys, xq, yq = arrays
        return _with_tasks(xs, ys), _with_tasks(xq, yq)

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

    def take(self, chunk: Any, place: Any, key: Any) -> Episode:
        del key
        return jax.tree.map(lambda values: values[place], chunk)


def _with_tasks(x: np.ndarray, y: np.ndarray) -> Task:
    num_tasks, n = y.shape
    full = np.ones((num_tasks, n), bool)
    return Task(x, np.zeros((num_tasks, n, 0)), np.zeros((num_tasks, 0)), y, {}, full)


def _as_int(seed: int | jax.Array) -> int:
    if isinstance(seed, int):
        return seed
    return int(np.asarray(jax.random.key_data(as_key(seed))).ravel()[-1])
