r"""What a fit's own model says of data: draws of the training rows, before and after learning.

.. math:: y^\text{rep} \sim p(y \mid \theta_s, \varphi_s), \qquad
          (\theta_s, \varphi_s) \sim p(\theta, \varphi \mid D)
          \quad\text{or}\quad p(\theta, \varphi)

The groups ``posterior_predictive``, ``prior`` and ``prior_predictive`` of a DataTree.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hierbayes.errors import listing
from hierbayes.fit.adapted import locations, locations_by_draw, phis_of
from hierbayes.fit.learned import Learned
from hierbayes.model import HierarchicalModel
from hierbayes.priors.normality import improper
from hierbayes.simulation import draw_phi, draw_theta, linear_location, outcomes_at
from hierbayes.tasks import Tasks

LARGEST_PREDICTIVE = 10_000_000
"""Draws × rows up to which the DataTree holds predictive draws (80 MB)."""

NUM_PRIOR_DRAWS = 500

DRAWN_AT_ONCE = 2_000_000
"""Outcomes that are drawn together."""

# streams of their own: the noise must not repeat the numbers that made the draws of θ
POSTERIOR_STREAM, PRIOR_STREAM = (1, 0x5052), (2, 0x5052)


def posterior_predictive(fit: Learned) -> tuple[np.ndarray | None, str]:
    """Outcomes (chain, draw, N) under every posterior draw of θ and φ; else None and why not."""
    if fit.theta_draws is None:
        return None, f"{fit.method} holds no posterior draws of theta"
    chains, draws, *_ = fit.theta_draws.shape
    if chains * draws * fit.tasks.num_rows > LARGEST_PREDICTIVE:
        return None, _too_large(chains * draws, fit.tasks)
    thetas = fit.theta_draws.reshape(chains * draws, *fit.theta_draws.shape[2:])
    rng = np.random.default_rng(POSTERIOR_STREAM)
    found = _outcomes(fit.model, fit.tasks, thetas, phis_of(fit.phi, fit.phi_draws), rng)
    return found.reshape(chains, draws, -1), ""


def prior_predictive(fit: Learned) -> tuple[dict[str, np.ndarray] | None, str]:
    """φ, ``theta`` and ``y`` by name, a draw on the first axis; else None and why not."""
    if fit.phi_draws is None:
        return None, f"{fit.method} finds a point φ: only full Bayes draws from p(φ)"
    sites = fit.model.phi_distributions(fit.tasks)
    if open_ := [name for name, hyperprior in sites.items() if improper(hyperprior)]:
        return None, f"the hyperprior on {listing(open_)} is improper: nothing can be drawn from it"
    tasks = fit.tasks
    if NUM_PRIOR_DRAWS * max(tasks.num_rows, tasks.num_tasks * len(tasks.coef)) > (
        LARGEST_PREDICTIVE
    ):
        return None, _too_large(NUM_PRIOR_DRAWS, tasks)
    rng = np.random.default_rng(PRIOR_STREAM)
    return _prior_draws(fit.model, tasks, NUM_PRIOR_DRAWS, rng), ""


def _too_large(num_draws: int, tasks: Tasks) -> str:
    return (
        f"{num_draws} draws of {tasks.num_rows} rows of {tasks.num_tasks} tasks are more than "
        f"{LARGEST_PREDICTIVE} numbers; fit.predict draws of some rows"
    )


def _prior_draws(
    model: HierarchicalModel, tasks: Tasks, num_draws: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """φ, ``theta`` (S, J, d) and ``y`` (S, N), drawn from the model before any data."""
    phis = draw_phi(model, tasks, num_draws, rng)
    thetas = draw_theta(model, tasks, phis, rng)
    return {**phis, "theta": thetas, "y": _outcomes(model, tasks, thetas, phis, rng)}


def _outcomes(
    model: HierarchicalModel,
    tasks: Tasks,
    thetas: np.ndarray,
    phis: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> np.ndarray:
    """One outcome a row (S, N) under each of S draws of θ (S, J, d) and of φ, or of one φ."""
    step = max(1, DRAWN_AT_ONCE // max(tasks.num_rows, 1))
    parts = []
    for start in range(0, len(thetas), step):
        some = slice(start, start + step)
        own = {n: v[some] if len(v) > 1 else v for n, v in phis.items()}
        parts.append(_drawn(model, tasks, thetas[some], own, rng))
    return np.concatenate(parts)


def _drawn(
    model: HierarchicalModel,
    tasks: Tasks,
    thetas: np.ndarray,
    phis: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> np.ndarray:
    likelihood: Any = model.likelihood
    if not likelihood.has_location:
        found = likelihood.outcomes(thetas, phis, tasks).drawn(np.arange(len(thetas)), rng)
        return found.astype(np.int64) if likelihood.discrete else found
    first = {name: value[0] for name, value in phis.items()}
    if likelihood.linear:
        rows = likelihood.design(tasks, first)
        f = linear_location(thetas, phis, rows)
    elif all(len(value) == 1 for value in phis.values()):
        f = locations(model, thetas, first, tasks)
    else:
        f = locations_by_draw(model, thetas, phis, tasks)
    return outcomes_at(likelihood, f, phis, tasks, rng)
