r"""Least squares in each task alone: the limit τ → ∞ of the exact posterior.

.. math:: \hat\theta_j = X_j^{+}(y_j - Z_j\beta), \qquad
          \operatorname{Cov} = \sigma^2 (X_j^\top X_j)^{+}

Where a task's design lacks rank the estimate is the one of minimum norm, and the directions that
nothing determines are marked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hierbayes.adaptation.base import Adaptation
from hierbayes.adaptation.posterior import FlatPrior
from hierbayes.model import HierarchicalModel
from hierbayes.statistics import Statistics, statistics
from hierbayes.tasks import Tasks

RANK_TOLERANCE = 1e-10
"""Singular values below this share of a task's largest column norm count as zero."""


@dataclass(frozen=True)
class LeastSquares(Adaptation):
    """A(D; φ) = the task's own least squares; of φ it takes only ``beta`` and ``sigma``."""

    name = "least squares"
    has_prior: ClassVar[bool] = False

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> FlatPrior:
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
        return FlatPrior(mean, covariance, blind, np.zeros(mean.shape, bool))


def design_svd(stats: Statistics) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(U, s, Vᵀ) of each task's design triangle, singular values of rank zero set to zero."""
    d = stats.num_coef
    x = np.moveaxis(np.asarray(stats.x[:d]), -1, 0)
    left, values, right = np.linalg.svd(x)
    cut = RANK_TOLERANCE * np.linalg.norm(x, axis=(1, 2))
    return left, np.where(values > cut[:, None], values, 0.0), right


@dataclass(frozen=True)
class Within:
    """The shared effects and the noise, from what tasks say when each has its own θ_j.

    ``beta`` (p,) of minimum norm; ``identified`` (p,) of bool; ``absorbed`` (J, d) of bool: the
    coefficients of a task that could hold the effect of an unidentified shared column instead;
    ``sigma`` on ``num_free`` degrees of freedom, NaN where there are none.
    """

    beta: np.ndarray
    identified: np.ndarray
    absorbed: np.ndarray
    sigma: float
    num_free: int


def within_tasks(stats: Statistics) -> Within:
    """Least squares of what is left of [Z y] when each task's own X_j is projected out."""
    d, p = stats.num_coef, stats.z.shape[1]
    left, values, right = design_svd(stats)
    rest = np.moveaxis(np.concatenate([stats.z, stats.y[:, None]], axis=1), -1, 0)
    outside = np.einsum("jki,jkl->jil", left, rest[:, :d]) * (values == 0)[:, :, None]
    rows = np.concatenate([outside.reshape(-1, p + 1), rest[:, d:].reshape(-1, p + 1)])
    z, y = rows[:, :p], rows[:, p]
    norms = np.linalg.norm(np.asarray(stats.z), axis=(0, 2))
    scaled = z / np.where(norms > 0, norms, 1.0)
    u, s, vt = np.linalg.svd(scaled, full_matrices=False)
    keep = s > RANK_TOLERANCE
    beta = vt[keep].T @ ((u[:, keep].T @ y) / s[keep]) / np.where(norms > 0, norms, 1.0)
    blind = np.eye(p) - vt[keep].T @ vt[keep]
    inverse = np.where(values > 0, 1.0 / np.where(values > 0, values, 1.0), 0.0)
    # a null direction of β, shifted into θ_j: X⁺ Z times that direction
    directions = rest[:, :d, :p] @ (blind / np.where(norms > 0, norms, 1.0)[:, None])
    pieces = (right, inverse, left, directions)
    shifted = np.einsum("jki,jk,jlk,jlq->jiq", *pieces, optimize=True)
    absorbed = np.abs(shifted).max(axis=2, initial=0.0) > 1e-8
    num_free = round(float(np.sum(stats.num_rows))) - int((values > 0).sum()) - int(keep.sum())
    squares = float(((y - z @ beta) ** 2).sum())
    # what is left of y by rounding alone is no noise
    rounding = (1e-13 * np.linalg.norm(stats.y)) ** 2
    squares = 0.0 if squares < rounding else squares
    sigma = np.sqrt(squares / num_free) if num_free > 0 else np.nan
    return Within(beta, np.abs(np.diag(blind)) < 1e-8, absorbed, float(sigma), num_free)
