r"""Rows of many tasks, laid out so that work is in step with the data.

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

TINY = np.finfo(float).tiny


AS_PYTREE = {
    "data_fields": [
        "x", "z", "outcome", "slots", "weight", "block_of", "member", "task_predictors", "constant",
        "patterns", "pattern_of",
    ],
    "meta_fields": ["num_tasks"],
}  # fmt: skip
"""What of :class:`Rows` are numbers, and what decides a compiled program."""


@functools.partial(jax.tree_util.register_dataclass, **AS_PYTREE)
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
        counted = self if self.patterns is None else self.patterns
        base = likelihood.base(phi, counted.slots, counted.outcome)
        constant = self.constant
        if base is not None:
            constant = constant + counted.by_task(counted._weighed(base))
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
        slots = patterns.slots | {"offset": exposure}
        return replace(patterns, slots=slots, constant=constant)

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
        return self.in_theta(value, first, -second)

    def in_theta(self, value: jax.Array, slope: jax.Array, bend: jax.Array) -> Curved:
        """To second order in θ what is so in f, each (B, C) or (1, C), ``bend`` downwards."""
        d = len(self.x)
        entry = {}
        for k in range(d):
            for m in range(k + 1):
                entry[k, m] = entry[m, k] = self.by_task(bend * self.x[k] * self.x[m])
        return Curved(
            self.by_task(value),
            jnp.stack([self.by_task(slope * self.x[k]) for k in range(d)]),
            jnp.stack([jnp.stack([entry[k, m] for m in range(d)]) for k in range(d)]),
        )

    def _weighed(self, values: Any) -> jax.Array:
        # rows of weight zero lie at f = 0, where any family is finite; to choose would cost more
        return self.weight * values


class Curved(NamedTuple):
    """log p(D_j | θ_j, φ) (J,), its slope (d, J) and minus its curvature (d, d, J)."""

    value: jax.Array
    slope: jax.Array
    curvature: jax.Array
