r"""The learned prior of a fit.

.. math:: p(\theta_\text{new} \mid D_{1..J}, w) = \int p(\theta_\text{new} \mid \varphi, w)
          \, p(\varphi \mid D_{1..J})\, d\varphi
"""

from __future__ import annotations

import numpy as np

from hierbayes.adaptation import GradientSteps
from hierbayes.fit.adapted import phis_of, prior_locations
from hierbayes.fit.learned import Learned
from hierbayes.fit.outward import prior_outward
from hierbayes.numerics import float64
from hierbayes.priors import LearnedPrior, StudentT


def learned_prior(fit: Learned) -> LearnedPrior:
    """The prior of a new task, where no task predictors move its mean."""
    if fit.tasks.labels.task_predictors:
        raise AttributeError(
            "the prior's mean depends on task predictors: use fit.prior_for(new_tasks)"
        )
    return learned_priors(fit, np.zeros((1, 0)))[0]


def learned_priors(fit: Learned, w: np.ndarray) -> list[LearnedPrior]:
    """The prior of new tasks with task predictors ``w`` (J, q), one for each.

    A mixture over draws of φ, or one normal (or Student-t) at φ̂; independent entries where θ is a
    network's weights.
    """
    if fit.inner is not None and fit.at is not None:
        inner, at = fit.inner, fit.at
        level = np.array([c.mean for c in at.task_predictors])
        rest = np.array([c.rest for c in at.task_predictors])
        moved = (w - level - rest) / np.array([c.sd for c in at.task_predictors])
        phis = phis_of(inner.phi, inner.phi_draws)
        return [prior_outward(prior, at, phis) for prior in learned_priors(inner, moved)]
    if "tau" not in fit.phi:
        raise AttributeError(
            f"{fit.method} learns no prior that all tasks share; the prior that gradient "
            "steps imply depends on each task's own curvature: ask for it with "
            "hb.equivalent_prior(fit.model, fit.tasks, fit)"
            if isinstance(fit.adaptation, GradientSteps)
            else f"{fit.method} learns no prior"
        )
    coef, likelihood = fit.tasks.coef, fit.model.likelihood
    if not likelihood.linear and likelihood.has_location:
        mu = np.asarray(fit.phi["mu"])
        tau = np.broadcast_to(fit.phi["tau"], mu.shape)
        return [LearnedPrior(coef, mu[None], tau[None])] * len(w)
    phis = phis_of(fit.phi, fit.phi_draws)
    location = prior_locations(fit.model, phis, w)
    with float64():
        roots = np.asarray(fit.model.prior.scale_tril(phis))
    df = fit.model.prior.df if isinstance(fit.model.prior, StudentT) else None
    return [LearnedPrior(coef, location[:, j], roots, df=df) for j in range(len(w))]
