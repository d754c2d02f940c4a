r"""Rows of tasks that a fit has not seen: of a new one, drawn from the prior, or of the population.

.. math:: p(y \mid x) = \frac1S \sum_s \int p(y \mid x, \theta, \varphi_s)\,
          p(\theta \mid \varphi_s)\, d\theta

The population holds θ at the prior's centre.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np

from hierbayes.adaptation.posterior import quadratic
from hierbayes.errors import InputError
from hierbayes.fit.adapted import (
    POINT_DRAWS,
    finish,
    locations,
    locations_by_draw,
    outcomes,
    phis_of,
    prior_locations,
)
from hierbayes.fit.learned import Learned
from hierbayes.fit.prediction import Prediction
from hierbayes.numerics import float64, to_numpy
from hierbayes.priors import Prior
from hierbayes.tasks import Tasks

Unseen = Literal["new", "population"]
TITLES = {"new": "new task", "population": "population"}


def predict_unseen(fit: Learned, rows: Tasks, target: Unseen) -> Prediction:
    """Predictive distributions of rows of new tasks, or at the prior's centre."""
    if not fit.adaptation.has_prior:
        raise InputError("no pooling learns nothing about tasks that it has not seen")
    if not fit.model.likelihood.has_location:
        return _by_outcomes(fit, rows, target)
    if not fit.model.likelihood.linear:
        return _by_locations(fit, rows, target)
    return _in_closed_form(fit, rows, target)


def _in_closed_form(fit: Learned, rows: Tasks, target: Unseen) -> Prediction:
    """Where f is linear in θ, whose mean and covariance are all that is asked of it."""
    rows = fit.model.likelihood.design(rows, {k: np.asarray(v) for k, v in fit.phi.items()})
    prior, phis = fit.model.prior, _phis(fit)
    with float64():
        location = prior_locations(fit.model, phis, rows.task_predictors)
        means = np.einsum("sik,ik->si", location[:, rows.task_of_row], rows.predictors)
        variance: Any = 0.0 if "tau" in phis else None
        thetas = None
        if target == "new" and "tau" in phis:
            covariance = to_numpy(prior.covariance(phis))
            variance = quadratic(rows.predictors[None], covariance[:, None])
            variance = _widths(prior, len(means))[:, None] * variance
            means = np.broadcast_to(means, variance.shape)
            root = to_numpy(prior.scale_tril(phis))
            thetas = functools.partial(_of_new_tasks, prior, location, root)
    return finish(TITLES[target], fit.model, rows, phis, means, variance, thetas=thetas)


def _of_new_tasks(
    prior: Prior,
    location: np.ndarray,
    root: np.ndarray,
    at: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """One θ for every new task (n, J, d), from its prior under the draws of φ at ``at``."""
    at = at % len(root)  # one point may stand for many components
    white = prior.noncentred_draws(rng, (len(at), *location.shape[1:]))
    return location[at] + np.einsum("nkl,njl->njk", root[at], white, optimize=True)


def _widths(prior: Prior, size: int) -> np.ndarray:
    """What Σ is multiplied by in each of ``size`` draws, or in draws made of one point."""
    if prior.gaussian:
        return np.ones(1)
    widths = prior.variance_factors(POINT_DRAWS if size == 1 else size)
    return np.random.default_rng(0).permutation(widths)  # not by the order of chains


def _by_locations(fit: Learned, rows: Tasks, target: Unseen) -> Prediction:
    """Where f is not linear in θ: from draws of θ, one for each draw of φ or around its point."""
    if fit.phi_draws is not None:
        phis = _phis(fit)
        thetas = _around(fit, phis, rows, drawn=target == "new")
        means = locations_by_draw(fit.model, thetas, phis, rows)
        return finish(TITLES[target], fit.model, rows, phis, means, 0.0)
    mu = np.asarray(fit.phi["mu"])
    thetas = np.broadcast_to(mu, (1, rows.num_tasks, len(mu)))
    drawn = target == "new" and "tau" in fit.phi
    if drawn:
        white = np.random.default_rng(0).standard_normal((POINT_DRAWS, *thetas.shape[1:]))
        # where sigma only sets the units of steps, sigma_query scales the prior with the noise
        scaled = "sigma_query" in fit.phi
        unit = float(fit.phi["sigma_query"] / fit.phi["sigma"]) if scaled else 1.0
        thetas = mu + np.asarray(fit.phi["tau"]) * unit * white
    means = locations(fit.model, thetas, dict(fit.phi), rows)
    return finish(TITLES[target], fit.model, rows, _phis(fit), means, 0.0 if drawn else None)


def _by_outcomes(fit: Learned, rows: Tasks, target: Unseen) -> Prediction:
    """Where the likelihood knows no f: from draws of θ, or at the prior's centre."""
    phis = _phis(fit)
    drawn = target == "new" and "tau" in phis
    if drawn and fit.phi_draws is None:
        phis = {name: np.repeat(value, POINT_DRAWS, axis=0) for name, value in phis.items()}
    thetas = _around(fit, phis, rows, drawn=drawn)
    return outcomes(TITLES[target], fit.model, rows, thetas, phis)


def _around(fit: Learned, phis: dict[str, np.ndarray], rows: Tasks, *, drawn: bool) -> np.ndarray:
    """θ of new tasks (S, J, d): the prior's centre under each φ, or a draw around it."""
    centres = prior_locations(fit.model, phis, rows.task_predictors)
    if not drawn:
        return centres
    with float64():
        root = np.asarray(fit.model.prior.scale_tril(phis))
    white = fit.model.prior.noncentred_draws(np.random.default_rng(0), centres.shape)
    return centres + np.einsum("skl,sjl->sjk", root, white)


def _phis(fit: Learned) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in phis_of(fit.phi, fit.phi_draws).items()}
