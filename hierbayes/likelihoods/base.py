"""What every likelihood of the package answers."""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from hierbayes.tasks import Task, Tasks


class Likelihood(abc.ABC):
    """p(y | x, θ, φ), row by row; subclasses write one task, the package maps over tasks."""

    gaussian_in_theta: bool = False
    """True where log p(D_j | θ, φ) is quadratic in θ: the evidence is then exact."""

    @abc.abstractmethod
    def distribution(self, theta: Any, phi: dict[str, Any], task: Task) -> dist.Distribution:
        """The distribution of the outcomes (n,), under one θ (d,) or each row's own θ (n, d)."""

    @abc.abstractmethod
    def check(self, tasks: Tasks) -> None:
        """Refuse tasks that this likelihood cannot describe."""

    def parameters(self) -> tuple[str, ...]:
        """Names of the likelihood's own parameters in φ."""
        return ()

    def log_likelihood(self, theta: Any, phi: dict[str, Any], task: Task) -> jax.Array:
        """log p(y_i | x_i, θ, φ) of each row (n,), zero in rows that fill up a bucket."""
        rows = self.distribution(theta, phi, task).log_prob(task.outcome)
        return jnp.where(task.mask, rows, 0.0)

    def log_likelihood_of_rows(
        self, thetas: Any, phi: dict[str, Any], rows: Task, task_of_row: Any
    ) -> jax.Array:
        """log p(y_i | x_i, θ_j(i), φ) of flat rows (N,), each under its own task's θ.

        ``thetas`` (J, …) is a pytree with tasks on the leading axis. No row is padded; the slope
        in ``thetas`` is each task's own.
        """
        own = jax.tree.map(lambda theta: theta[task_of_row], thetas)
        return self.log_likelihood(own, phi, rows)
