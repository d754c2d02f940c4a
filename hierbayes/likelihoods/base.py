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
        """The distribution of the outcomes (n,) of one task."""

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
