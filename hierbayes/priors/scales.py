"""The units in which default priors, starting values and tolerances are stated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hierbayes.likelihoods import Likelihood
from hierbayes.tasks import Tasks
from hierbayes.tasks.kept import kept


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
        if not likelihood.linear:  # what θ's entries multiply, if anything, is not known
            ones = np.full(len(tasks.coef), spread)
            shared, w = (
                np.ones(np.shape(part)[1]) for part in (tasks.shared, tasks.task_predictors)
            )
            return cls(spread, np.zeros(len(ones)), ones, ones, shared, w)
        sd, mean = _spread_and_mean(tasks)
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


@kept
def _spread_and_mean(tasks: Tasks) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviation and mean of every column, (d + p,)."""
    columns = [*tasks.predictors.T, *tasks.shared.T]
    # a copy side by side is summed faster, and more exactly, than a column with gaps
    moments = [(c.std(), c.mean()) for c in map(np.ascontiguousarray, columns)]
    sd, mean = np.array(moments).reshape(-1, 2).T
    return sd, mean
