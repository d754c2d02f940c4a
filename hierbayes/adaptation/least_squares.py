r"""Least squares in each task alone: the limit τ → ∞ of the exact posterior.

.. math:: \hat\theta_j = X_j^{+}(y_j - Z_j\beta), \qquad
          \operatorname{Cov} = \sigma^2 (X_j^\top X_j)^{+}

Where a task's design lacks rank the estimate is the one of minimum norm, and the directions that
nothing determines are marked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hierbayes.adaptation.base import Adaptation, Adapted
from hierbayes.model import HierarchicalModel
from hierbayes.statistics import Statistics, statistics
from hierbayes.tasks import Tasks

RANK_TOLERANCE = 1e-10
"""Singular values below this share of a task's largest column norm count as zero."""


@dataclass(frozen=True)
class LeastSquares(Adaptation):
    """A(D; φ) = the task's own least squares; of φ it takes only ``beta`` and ``sigma``."""

    name = "least squares"

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Adapted:
        """Minimum-norm estimates, their covariances, and the unidentified directions."""
        del model
        stats = statistics(tasks)
        d = stats.num_coef
        y = stats.y[:d]
        if "beta" in phi:
            y = y - np.einsum("mpj,p->mj", stats.z[:d], phi["beta"])
        left, values, right = design_svd(stats)
        inverse = np.where(values > 0, 1.0 / np.where(values > 0, values, 1.0), 0.0)
        mean = np.einsum("jki,jk,jlk,lj->ji", right, inverse, left, y, optimize=True)
        variance = float(phi.get("sigma", 1.0)) ** 2
        covariance = variance * np.einsum("jki,jk,jkl->jil", right, inverse**2, right)
        blind = np.einsum("jki,jk,jkl->jil", right, (values == 0).astype(float), right)
        return Adapted(mean, covariance, blind)


def design_svd(stats: Statistics) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(U, s, Vᵀ) of each task's design triangle, singular values of rank zero set to zero."""
    d = stats.num_coef
    x = np.moveaxis(np.asarray(stats.x[:d]), -1, 0)
    left, values, right = np.linalg.svd(x)
    cut = RANK_TOLERANCE * np.linalg.norm(x, axis=(1, 2))
    return left, np.where(values > cut[:, None], values, 0.0), right
