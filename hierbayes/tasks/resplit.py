"""Episodes from a fixed set of tasks: some of them at random, their rows split anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes import inputs
from hierbayes.errors import InputError, listing
from hierbayes.tasks.container import Tasks
from hierbayes.tasks.episodes import Episode, Sampled, rows_of


def episodes_of_tasks(
    tasks: Tasks, shots: int | None, queries: int | None, query: float
) -> Sampled:
    """See :meth:`Episodes.from_tasks`."""
    if not isinstance(tasks, Tasks):
        raise InputError(f"expected Tasks, found {type(tasks).__name__}")
    if tasks.sharding is not None:
        raise InputError(
            "episodes are drawn on one device, and these tasks are spread over several: use "
            "tasks.shard(None)"
        )
    if tasks.outcome is None:
        raise InputError(f"the tasks hold no outcome {tasks.labels.outcome!r} to learn from")
    extra = [*tasks.labels.shared, *tasks.labels.task_predictors, *tasks.slots]
    if extra:
        raise InputError(
            f"episodes hold x and y alone and would ignore {', '.join(map(repr, extra))}"
        )
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
    data = {"x": block.predictors, "y": block.outcome, "sizes": sizes[usable].astype(np.int32)}
    return Sampled(one, data, tasks.coef, filled)


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
        need, sizes = self.shots + self.queries, data["sizes"]
        if (few := sizes < need).any():
            names = data.get("names", np.arange(len(sizes)))
            raise InputError(
                f"{few.sum()} of {len(sizes)} tasks have fewer than shots + queries = {need} "
                f"rows: {listing(names[few].tolist(), 3)}, the smallest {sizes.min()}"
            )

    def __call__(self, data: Any, key: Any) -> Episode:
        pick, deal = jax.random.split(key)
        j = jax.random.randint(pick, (), 0, len(data["sizes"]))
        size, width = data["sizes"][j], data["y"].shape[1]
        chance = jnp.where(jnp.arange(width) < size, jax.random.uniform(deal, (width,)), 2.0)
        order = jnp.argsort(chance)
        x, y = data["x"][j][order], data["y"][j][order]
        if self.shots is not None and self.queries is not None:
            end = self.shots + self.queries
            return (
                rows_of(x[: self.shots], y[: self.shots]),
                rows_of(x[self.shots : end], y[self.shots : end]),
            )
        asked = _share(size, self.query)
        place = jnp.arange(width)
        return rows_of(x, y, place < size - asked), rows_of(
            x, y, (place >= size - asked) & (place < size)
        )
