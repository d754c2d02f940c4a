"""The units in which default priors, starting values and tolerances are stated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hierbayes.likelihoods import Likelihood
from hierbayes.tasks import Tasks


@dataclass(frozen=True)
class Scales:
    """Natural units of what θ says of the rows and of every coefficient, from the data.

    ``spread`` of f; ``mu_location`` (d,) and ``mu`` (d,): where μ may lie; ``coef`` (d,),
    ``shared`` (p,) and ``task_predictors`` (q,): one unit of each.
    """

    spread: float
    mu_location: np.ndarray
    mu: np.ndarray
    coef: np.ndarray
    shared: np.ndarray
    task_predictors: np.ndarray

    @classmethod
    def of(cls, tasks: Tasks, likelihood: Likelihood) -> Scales:
        """The spread of f by the likelihood's units, divided by each predictor's."""
        level, spread = likelihood.units(tasks)
        columns = np.column_stack([tasks.predictors, tasks.shared])
        sd, mean = columns.std(axis=0), columns.mean(axis=0)
        constant = sd <= 1e-12 * np.maximum(np.abs(mean), 1e-300)
        scale = spread / np.where(constant, 1.0, sd)
        at_origin = np.hypot(spread, np.linalg.norm(np.where(constant, 0.0, scale * mean)))
        scale = np.where(constant, at_origin / np.where(mean == 0, 1.0, np.abs(mean)), scale)
        location = np.where(constant & (mean != 0), level / np.where(mean == 0, 1.0, mean), 0.0)
        d = tasks.predictors.shape[1]
        w_sd, w_mean = tasks.task_predictors.std(axis=0), tasks.task_predictors.mean(axis=0)
        w_sd = np.where(w_sd > 0, w_sd, 1.0)
        at_zero = np.sqrt(1 + ((w_mean / w_sd) ** 2).sum())
        return cls(spread, location[:d], scale[:d] * at_zero, scale[:d], scale[d:], w_sd)
