"""N-way K-shot episodes from labelled examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes import inputs
from hierbayes.errors import InputError, listing
from hierbayes.tasks.episodes import Episode, Sampled, rows_of


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
    classes: np.ndarray

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
