r"""log p(D_j | φ) of any tasks under the φ that a fit has learned, θ_j integrated out.

Exact of Gaussian tasks; of others it is that of the fit: quadrature with its nodes, else with nodes
enough for up to three coefficients, and Laplace's approximation beyond.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from hierbayes.adaptation import Quadrature
from hierbayes.evidence.exact import log_evidence
from hierbayes.fit import Fit
from hierbayes.meta.without_one import WithoutOne
from hierbayes.numerics import float64
from hierbayes.priors import Prior
from hierbayes.sharding import gathered
from hierbayes.statistics import Statistics, placed_statistics
from hierbayes.tasks import Tasks


def phis_of(fit: Fit) -> dict[str, np.ndarray]:
    """φ with one leading axis over all draws, or over the single point."""
    if fit.phi_draws is None:
        return {name: np.asarray(value)[None] for name, value in fit.phi.items()}
    return {name: v.reshape(-1, *v.shape[2:]) for name, v in fit.phi_draws.items()}


def evidence_of(fit: Fit, tasks: Tasks) -> np.ndarray:
    """log p(D_j | φ_s) of every φ of the fit and every task, (S, J); zero of tasks without rows."""
    phis = phis_of(fit)
    if not tasks.num_rows:
        return np.zeros((len(next(iter(phis.values()))), tasks.num_tasks))
    if not fit.model.likelihood.gaussian_in_theta:
        found = integrated(fit, tasks)
        with float64():
            return np.where(tasks.sizes > 0, found.over_draws(phis), 0.0)
    if fit.phi_draws is None:
        tasks = fit.model.likelihood.design(tasks, {k: np.asarray(v) for k, v in fit.phi.items()})
    with float64():
        values = _over_draws(placed_statistics(tasks), fit.model.prior, phis)
        return gathered(values, tasks.num_tasks, axis=1)


def integrated(fit: Fit, tasks: Tasks) -> WithoutOne:
    """The evidence of tasks that are not Gaussian, as the fit has it."""
    nodes = 1 if fit.info.get("evidence") == "laplace" else None
    if isinstance(fit.adaptation, Quadrature):
        nodes = fit.adaptation.num_nodes
    return WithoutOne(fit.model, tasks, nodes)


@functools.partial(jax.jit, static_argnums=1)
def _over_draws(stats: Statistics, prior: Prior, phis: dict[str, Any]) -> Any:
    return jax.lax.map(lambda phi: log_evidence(stats, prior, phi), phis, batch_size=64)
