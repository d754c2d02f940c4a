r"""Rows of many tasks, alike ones added up, laid out so that work is in step with the data.

.. math::

    \log p(D_j \mid \theta, \varphi) = c_j + \sum_i w_{ij} \log p(y_{ij} \mid f_{ij}, \varphi),
    \qquad f_{ij} = o_{ij} + x_{ij}^\top \theta + z_{ij}^\top \beta

Rows of one task with the same columns are one row: sums of counts are sufficient where the
likelihood says so, copies are weights elsewhere. What is left stands in blocks of so many rows,
each of one task, so that no task is filled up to the size of another.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.likelihoods import Likelihood
from hierbayes.likelihoods.alike import groups, merged
from hierbayes.likelihoods.base import sum_by_task
from hierbayes.tasks import Task, Tasks
from hierbayes.tasks.kept import kept

WORTH_WHILE = 0.7
"""Share of the rows that patterns may be, for condensing to pay."""

TINY = np.finfo(float).tiny

SMALL = 40_000
"""Blocks × tasks up to which a product with ones and zeros is quicker than a scattered sum."""

SCATTER = 6.0
"""Cost of adding a block to its task, in rows."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "x",
        "z",
        "outcome",
        "slots",
        "weight",
        "block_of",
        "member",
        "task_predictors",
        "constant",
        "patterns",
        "pattern_of",
    ],
    meta_fields=["num_tasks"],
)
@dataclass(frozen=True)
class Rows:
    """``x`` (d, B, C), ``z`` (p, B, C), the rest (B, C): C blocks of B rows, the last axis longest.

    ``weight`` is zero in rows that fill up a block; ``block_of`` (C,) is the task of each block, or
    None where task j's only block is the j-th; ``member`` (J, C) says the same in ones and zeros,
    where that is small. ``constant`` (J,) is what adding up left out.
    ``patterns`` holds one row for every x of a task, where the likelihood needs no more once β is
    known, and ``pattern_of`` (B, C) the place of each row's own; None where that saves little.
    """

    x: Any
    z: Any
    outcome: Any
    slots: dict[str, Any]
    weight: Any
    block_of: Any
    member: Any
    task_predictors: Any
    constant: Any
    num_tasks: int
    patterns: Rows | None = None
    pattern_of: Any = None

    def under(self, likelihood: Likelihood, phi: dict[str, Any]) -> Rows:
        """The rows once φ is known: z β stands in the offset, what knows no θ in the constant."""
        offset = self.slots.get("offset", 0.0)
        if "beta" in phi:
            for i in range(len(self.z)):
                offset = offset + self.z[i] * phi["beta"][i]
        base = likelihood.base(phi, self.slots, self.outcome)
        constant = self.constant
        if base is not None:
            constant = constant + self.by_task(self._weighed(base))
        if self.patterns is None:
            slots = self.slots | {"offset": offset}
            return replace(self, z=self.z[:0], slots=slots, constant=constant)
        patterns = self.patterns
        constant = constant + self.by_task(self._weighed(self.outcome * offset))
        offset = jnp.where(self.weight > 0, offset + jnp.log(self.weight), -jnp.inf)
        largest = jax.lax.stop_gradient(offset.max())
        rates = jnp.exp(offset - largest)
        if self.pattern_of is None:  # all rows of a block have one x, and a task has one block
            sums = rates.sum(-2, keepdims=True)
        else:
            flat = jax.ops.segment_sum(
                rates.ravel(), self.pattern_of.ravel(), patterns.outcome.size
            )
            sums = flat.reshape(patterns.outcome.shape)
        exposure = largest + jnp.log(jnp.maximum(sums, TINY))
        # a pattern's kernel takes its counts at its own offset, which is not its rows'
        constant = constant - patterns.by_task(patterns._weighed(patterns.outcome * exposure))
        return replace(patterns, slots={"offset": exposure}, constant=constant)

    @property
    def moving(self) -> dict[str, Any]:
        """What of the rows depends on φ."""
        return {"offset": self.slots["offset"]}

    def moved(self, moving: dict[str, Any]) -> Rows:
        """The rows with that in its place."""
        return replace(self, slots=self.slots | moving)

    def own(self, values: jax.Array) -> jax.Array:
        """Of (…, J) values a task, each block's (…, C)."""
        if self.block_of is None:
            return values
        return values[..., self.block_of] if self.member is None else values @ self.member

    def by_task(self, values: jax.Array) -> jax.Array:
        """Sums (…, J) over each task's rows, of (…, B, C)."""
        blocks = values.sum(-2)
        if self.block_of is None:
            return blocks
        if self.member is not None:
            return blocks @ self.member.T
        summed = jax.ops.segment_sum(
            jnp.moveaxis(blocks, -1, 0), self.block_of, self.num_tasks, indices_are_sorted=True
        )
        return jnp.moveaxis(summed, 0, -1)

    @property
    def num_cells(self) -> int:
        """Rows that a density works on, those that fill up included."""
        return int(np.size(self.outcome))

    def location(self, theta: jax.Array) -> jax.Array:
        """f (B, C) of each row under its own task's θ (d, J), φ being known."""
        own = self.own(theta)
        f = self.slots["offset"]
        for x, t in zip(self.x, own, strict=True):
            f = f + x * t
        return f

    def log_likelihood(
        self, likelihood: Likelihood, theta: jax.Array, phi: dict[str, Any]
    ) -> jax.Array:
        """log p(D_j | θ_j, φ) − c_j of every task (J,), under θ (d, J), φ being known."""
        each = likelihood.kernel(self.location(theta), phi, self.slots, self.outcome)
        return self.by_task(self._weighed(each))

    def to_second_order(
        self, likelihood: Likelihood, theta: jax.Array, phi: dict[str, Any], *, damped: bool
    ) -> Curved:
        """The same with slope and curvature in θ; ``damped`` leaves out what bends upwards."""
        f = self.location(theta)
        value, first, second = map(
            self._weighed, likelihood.to_second_order(f, phi, self.slots, self.outcome)
        )
        if damped:
            second = jnp.minimum(second, 0.0)
        d = len(theta)
        slope = jnp.stack([self.by_task(first * self.x[k]) for k in range(d)])
        entry = {}
        for k in range(d):
            for m in range(k + 1):
                entry[k, m] = entry[m, k] = self.by_task(-second * self.x[k] * self.x[m])
        bent = jnp.stack([jnp.stack([entry[k, m] for m in range(d)]) for k in range(d)])
        return Curved(self.by_task(value), slope, bent)

    def _weighed(self, values: Any) -> jax.Array:
        # rows of weight zero lie at f = 0, where any family is finite; to choose would cost more
        return self.weight * values


class Curved(NamedTuple):
    """log p(D_j | θ_j, φ) (J,), its slope (d, J) and minus its curvature (d, d, J)."""

    value: jax.Array
    slope: jax.Array
    curvature: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "task_of_row", "task_predictors"],
    meta_fields=["num_tasks"],
)
@dataclass(frozen=True)
class Whole:
    """Tasks as a likelihood arranges them itself; see :meth:`Likelihood.arrange`."""

    rows: Task
    task_of_row: Any
    task_predictors: Any
    num_tasks: int
    constant = 0.0

    def under(self, likelihood: Likelihood, phi: dict[str, Any]) -> Whole:
        """The same."""
        del likelihood, phi
        return self

    @property
    def moving(self) -> dict[str, Any]:
        """Nothing of the rows depends on φ."""
        return {}

    def moved(self, moving: dict[str, Any]) -> Whole:
        """The same."""
        del moving
        return self

    @property
    def num_cells(self) -> int:
        """Rows that a density works on, those that fill up included."""
        return int(np.size(self.rows.outcome))

    def log_likelihood(
        self, likelihood: Likelihood, theta: jax.Array, phi: dict[str, Any]
    ) -> jax.Array:
        """log p(D_j | θ_j, φ) of every task (J,), under θ (d, J)."""
        each = likelihood.log_likelihood_of_rows(theta.T, phi, self.rows, self.task_of_row)
        return sum_by_task(each, self.task_of_row, self.num_tasks)

    def to_second_order(
        self, likelihood: Likelihood, theta: jax.Array, phi: dict[str, Any], *, damped: bool
    ) -> Curved:
        """The same with slope and curvature in θ; ``damped`` turns what bends upwards over.

        A row moves its own task's θ only, so d products with all tasks at once give every matrix.
        """

        def total(t: jax.Array) -> tuple[jax.Array, jax.Array]:
            each = self.log_likelihood(likelihood, t, phi)
            return each.sum(), each

        def slopes(t: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.grad(total, has_aux=True)(t)

        d = len(theta)
        columns = []
        slope, value = slopes(theta)
        for k in range(d):
            unit = jnp.zeros_like(theta).at[k].set(1.0)
            columns.append(-jax.jvp(slopes, (theta,), (unit,), has_aux=True)[1])
        bent = jnp.stack(columns, axis=1)
        bent = 0.5 * (bent + jnp.swapaxes(bent, 0, 1))
        if damped:
            values, vectors = jnp.linalg.eigh(jnp.moveaxis(bent, -1, 0))
            turned = (vectors * jnp.abs(values)[:, None]) @ jnp.swapaxes(vectors, 1, 2)
            bent = jnp.moveaxis(turned, 0, -1)
        return Curved(value, slope, bent)


def rows_of(tasks: Tasks, likelihood: Likelihood) -> Rows | Whole:
    """The tasks' rows: alike ones added up where f is linear in θ, as arranged elsewhere."""
    if likelihood.linear:
        return added_up(tasks, likelihood)
    rows, task_of_row = likelihood.arrange(tasks)
    return Whole(rows, task_of_row, tasks.task_predictors, tasks.num_tasks)


@kept
def added_up(tasks: Tasks, likelihood: Likelihood) -> Rows:
    """The tasks' rows, alike ones added up."""
    added = likelihood.add_up(tasks)
    laid = _laid_out(added.tasks, added.weight, added.constant)
    if not likelihood.condenses:
        return laid
    found = groups(added.tasks, [*added.tasks.predictors.T])
    if len(found.first) > WORTH_WHILE * added.tasks.num_rows:
        return laid
    counts = found.sum(added.weight * added.tasks.outcome)
    together = merged(added.tasks, found, counts)
    patterns = _laid_out(together, np.ones(together.num_rows), added.constant)
    one_each = laid.block_of is None and len(found.first) == tasks.num_tasks
    where = None
    if not one_each:
        place = np.zeros(laid.outcome.shape, int)
        own = np.ravel_multi_index(_places(together)[:2], patterns.outcome.shape)
        rows = _places(added.tasks)
        place[rows[0], rows[1]] = own[found.of_row]
        where = place
    return replace(laid, patterns=patterns, pattern_of=where)


class Places(NamedTuple):
    """Where each row stands: ``within`` its ``block``; ``shape`` of all blocks; task of a block."""

    within: np.ndarray
    block: np.ndarray
    shape: tuple[int, int]
    block_of: np.ndarray


def _places(tasks: Tasks) -> Places:
    sizes, task_of_row = tasks.sizes, tasks.task_of_row
    height = _height(sizes)
    blocks_of_task = np.maximum(1, -(-sizes // height))
    first_block = np.concatenate([[0], np.cumsum(blocks_of_task)])
    within = np.arange(tasks.num_rows) - tasks.starts[task_of_row]
    return Places(
        within % height, first_block[task_of_row] + within // height,
        (height, int(first_block[-1])), np.repeat(np.arange(tasks.num_tasks), blocks_of_task),
    )  # fmt: skip


def _laid_out(tasks: Tasks, weight: np.ndarray, constant: np.ndarray) -> Rows:
    """Rows in blocks."""
    within, block, shape, block_of = _places(tasks)

    def laid_out(values: Any, fill: float) -> np.ndarray:
        values = np.asarray(values, float)
        out = np.full((*values.shape[1:], *shape), fill)
        out[..., within, block] = np.moveaxis(values, 0, -1)
        return out

    # what fills a block up has an outcome that exists, and weight zero at f = 0
    counted = weight > 0

    def first(values: np.ndarray) -> float:
        return float(values[0]) if len(values) else 1.0

    slots = {name: laid_out(v, first(v)) for name, v in tasks.slots.items()}
    if "offset" in slots:
        slots["offset"] = laid_out(np.where(counted, tasks.slots["offset"], 0.0), 0.0)
    one_each = shape[1] == tasks.num_tasks
    small = not one_each and shape[1] * tasks.num_tasks <= SMALL
    return Rows(
        laid_out(tasks.predictors * counted[:, None], 0.0),
        laid_out(tasks.shared * counted[:, None], 0.0),
        laid_out(tasks.outcome, first(tasks.outcome)),
        slots,
        laid_out(weight, 0.0),
        None if one_each else block_of,
        1.0 * (block_of == np.arange(tasks.num_tasks)[:, None]) if small else None,
        tasks.task_predictors, constant, tasks.num_tasks,
    )  # fmt: skip


def _height(sizes: np.ndarray) -> int:
    """Rows of a block, for the least work."""
    largest = int(sizes.max(initial=1))
    best, least = largest, np.inf
    for height in sorted({2**k for k in range(12) if 2**k < largest} | {max(largest, 1)}):
        count = int(np.maximum(1, -(-sizes // height)).sum())
        work = height * count + SCATTER * count * (count > len(sizes))
        if work < least:
            best, least = height, work
    return best
