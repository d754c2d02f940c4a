"""Tasks that are not linear in θ: densities as they are, derivatives automatic."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.likelihoods import Likelihood
from hierbayes.likelihoods.base import sum_by_task
from hierbayes.numerics import UNROLL_UP_TO
from hierbayes.rows.blocks import Curved
from hierbayes.tasks import Task


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

    @classmethod
    def of(cls, rows: Task, task_of_row: Any) -> Whole:
        """Rows and the task of each, as they are arranged."""
        return cls(rows, task_of_row, rows.task_predictors, len(rows.task_predictors))

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

        def column(unit: jax.Array) -> jax.Array:
            along = jnp.broadcast_to(unit[:, None], theta.shape)
            return -jax.jvp(slopes, (theta,), (along,), has_aux=True)[1]

        d, (slope, value) = len(theta), slopes(theta)
        units = jnp.eye(d, dtype=theta.dtype)
        columns = map(column, units) if d <= UNROLL_UP_TO else jax.lax.map(column, units)
        bent = jnp.stack([*columns], axis=1)
        bent = 0.5 * (bent + jnp.swapaxes(bent, 0, 1))
        if damped:
            values, vectors = jnp.linalg.eigh(jnp.moveaxis(bent, -1, 0))
            turned = (vectors * jnp.abs(values)[:, None]) @ jnp.swapaxes(vectors, 1, 2)
            bent = jnp.moveaxis(turned, 0, -1)
        return Curved(value, slope, bent)
