r"""Generalised linear families: one outcome distribution around a linear predictor.

.. math:: y_{ij} \sim \text{family}(f_{ij}, \varphi), \qquad
          f_{ij} = o_{ij} + x_{ij}^\top\theta_j + z_{ij}^\top\beta
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.errors import InputError, listing
from hierbayes.likelihoods.base import Likelihood
from hierbayes.tasks import Task, Tasks


class GeneralisedLinear(Likelihood):
    """What the families share: weights, and the refusal of outcomes that they do not have."""

    refused: tuple[str, ...] = ("known_se", "trials")
    """Slots that the family would ignore."""

    def log_likelihood(self, theta: Any, phi: dict[str, Any], task: Task) -> jax.Array:
        """log p(y_i | x_i, θ, φ) of each row (n,), times the row's weight."""
        rows = self.distribution(theta, phi, task).log_prob(task.outcome)
        return jnp.where(task.mask, rows * task.slots.get("weight", 1.0), 0.0)

    def check(self, tasks: Tasks) -> None:
        """Refuse outcomes outside the family's support, and columns that would be ignored."""
        self._refuse_slots(tasks, self.refused)
        if tasks.outcome is not None:
            self._check_outcome(tasks)

    def _check_outcome(self, tasks: Tasks) -> None:
        """Refuse outcomes outside the family's support."""

    def _refuse_rows(self, tasks: Tasks, bad: np.ndarray, takes: str) -> None:
        """Say of rows where ``bad`` (N,) what the family takes in their place."""
        odd = np.flatnonzero(bad)
        if odd.size:
            task = tasks.names[tasks.task_of_row[odd[0]]]
            raise InputError(
                f"the {type(self).__name__} likelihood takes {takes}; {odd.size} row(s) hold "
                f"others, the first {tasks.outcome[odd[0]]:g} in task {listing([task])}"
            )

    def _refuse_non_counts(self, tasks: Tasks) -> None:
        y = tasks.outcome
        self._refuse_rows(tasks, (y < 0) | (y != np.floor(y)), "counts 0, 1, 2, …")


def mean_offset(tasks: Tasks) -> float:
    """The mean of the offsets, zero without."""
    return float(np.mean(tasks.slots.get("offset", 0.0)))
