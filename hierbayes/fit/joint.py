r"""Draws of outcomes, those of one task under one draw of its θ.

.. math:: s \sim \text{uniform}, \qquad \theta_j \mid \varphi_s, \qquad
          y_{ij} \mid \theta_j, \varphi_s \quad\text{for every row } i \text{ of task } j
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hierbayes.adaptation.posterior import Thetas
from hierbayes.model import HierarchicalModel
from hierbayes.simulation import linear_location, outcomes_at
from hierbayes.tasks import Tasks


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
        return outcomes_at(self.model.likelihood, f, phis, self.rows, rng)


def _chosen(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Positions along the first axis, of which a single value serves all."""
    return at if len(values) > 1 else np.zeros_like(at)
