r"""Draws of outcomes, those of one task under one draw of its θ.

.. math:: s \sim \text{uniform}, \qquad \theta_j \mid \varphi_s, \qquad
          y_{ij} \mid \theta_j, \varphi_s \quad\text{for every row } i \text{ of task } j
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hierbayes.likelihoods import Likelihood
from hierbayes.likelihoods.categorical import ClassProbabilities
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.tasks import Tasks

LARGEST_RATE = 1e15
"""Of counts that are drawn: beyond, no whole number of 64 bits holds them."""

Thetas = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""θ (n, J, d) of n draws of φ, given by their positions (n,)."""


@dataclass(frozen=True)
class JointDraws:
    """Joint predictive draws of rows, where f is linear in θ.

    ``thetas`` draws θ of the tasks of ``rows`` for each of some of the ``size`` draws of φ.
    """

    model: HierarchicalModel
    rows: Tasks
    phis: dict[str, np.ndarray]
    size: int
    thetas: Thetas

    def __call__(self, num_draws: int, rng: np.random.Generator) -> np.ndarray:
        """Draws (num_draws, N), rows task by task."""
        at = rng.integers(self.size, size=num_draws)
        thetas = self.thetas(at, rng)
        used = {n: np.asarray(v) for n, v in self.phis.items() if n == "beta" or np.ndim(v) == 1}
        phis = {name: value[_chosen(value, at)] for name, value in used.items()}
        f = linear_location(thetas, phis, self.rows)
        return draw_outcomes(self.model.likelihood, f, phis, self.rows, rng)


def _chosen(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Positions along the first axis, of which a single value serves all."""
    return at if len(values) > 1 else np.zeros_like(at)


def linear_location(thetas: np.ndarray, phis: dict[str, np.ndarray], rows: Tasks) -> np.ndarray:
    """f (S, N) = x θ_j + z β + offset of S draws of θ (S, J, d) and φ."""
    f = np.zeros((len(thetas), rows.num_rows))
    for k in range(rows.predictors.shape[1]):  # one coefficient at a time: S N numbers
        f += thetas[:, rows.task_of_row, k] * rows.predictors[:, k]
    if "beta" in phis:
        f += phis["beta"] @ rows.shared.T
    return f + rows.slots.get("offset", 0.0)


def draw_outcomes(
    likelihood: Likelihood,
    f: np.ndarray,
    phis: dict[str, np.ndarray],
    rows: Tasks,
    rng: np.random.Generator,
) -> np.ndarray:
    """One outcome for every draw of f (S, N, …) and of φ, (S, N); counts as integers.

    Rates of counts are held below 1e15.
    """
    phi = {name: np.asarray(v)[:, None] for name, v in phis.items() if np.ndim(v) == 1}
    if likelihood.log_link and likelihood.discrete:
        f = np.minimum(f, np.log(LARGEST_RATE))
    with float64():
        frozen = likelihood.predictive(f, 0.0, phi, rows.slots)
    if isinstance(frozen, ClassProbabilities):
        return draw_classes(frozen.probabilities, rng)
    drawn = np.asarray(frozen.rvs(size=f.shape[:2], random_state=rng))
    return drawn.astype(np.int64) if likelihood.discrete else drawn


def draw_classes(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A class for each of some distributions (…, C)."""
    below = probabilities.cumsum(-1)[..., :-1]
    return (rng.random((*probabilities.shape[:-1], 1)) > below).sum(-1)
