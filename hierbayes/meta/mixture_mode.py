r"""φ̂ of Gaussian tasks under a Student-t prior, by type-II maximum likelihood or MAP.

.. math:: \hat\varphi = \arg\max_\varphi \sum_j \log \int p(D_j \mid \tau / \sqrt\lambda, \varphi)\,
          p(\lambda)\, d\lambda \left[+ \log p(\varphi)\right]

over (μ, Γ, β, τ, unconstrained correlations, log σ), with slopes by automatic differentiation.
Several starts: beside the Gaussian prior's φ̂ one with less spread, for where a few tasks alone are
what makes that large.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.evidence.exact import log_evidence
from hierbayes.meta.layout_of_phi import Layout, along_phi, belief_in, phi_at
from hierbayes.meta.marginal import maximise_likelihood
from hierbayes.meta.optimum import Optimum, curvature
from hierbayes.meta.posterior_mode import finite, off_the_boundary, pinned
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64, to_numpy
from hierbayes.priors import Gaussian, Prior, StudentT
from hierbayes.statistics import Statistics, placed_statistics
from hierbayes.tasks import Tasks


@functools.partial(jax.jit, static_argnums=0)
def _value_and_slope(prior: Prior, layout: Layout, vector: Any, stats: Statistics) -> Any:
    return jax.value_and_grad(lambda v: -log_evidence(stats, prior, layout.phi(v)).sum())(vector)


def maximise_mixture(resolved: HierarchicalModel, tasks: Tasks, *, with_belief: bool) -> Optimum:
    """φ̂ by "ml", or by "map" with the hyperprior's density; standard errors from the Hessian."""
    prior = resolved.prior
    assert isinstance(prior, StudentT)
    normal = replace(resolved, prior=Gaussian(prior.correlated, prior.zero_mean))
    start = maximise_likelihood(normal, tasks, reml=False).phi
    with float64():
        stats = jax.tree.map(jnp.asarray, placed_statistics(tasks))
        beliefs = resolved.phi_distributions(tasks)
        layout = Layout.of(resolved.shape(tasks), resolved.scales(tasks), beliefs)
        belief = belief_in(layout, beliefs) if with_belief else None

        def value_and_slope(v: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = _value_and_slope(prior, layout, v, stats)
            if belief is not None:
                more, tilt = belief(v)
                value, slope = value - more, slope - tilt
            return finite(float(value), np.asarray(slope))

        starts = [layout.vector(start | {"tau": share * start["tau"]}, floor)
                  for share, floor in ((0.7, 0.5), (0.3, 0.1))]  # fmt: skip
        pooled = layout.vector(start | {"tau": 0 * start["tau"]}, 0.0)
        best = off_the_boundary(value_and_slope, starts, layout, [pooled])
        inside = best.x > layout.lower
        errors_at = curvature(value_and_slope, best.x, inside)
        phi = to_numpy(phi_at(layout, best.x))
        errors = layout.errors(inside, errors_at, phi)
        along = along_phi(layout, best.x, inside, errors_at)
        evidence = -float(_value_and_slope(prior, layout, best.x, stats)[0])
        posterior = None if belief is None else evidence + float(belief(best.x)[0])
    warnings = [best.problem] if best.problem else []
    if np.isnan(errors["tau"]).any():
        warnings.append(
            "standard errors of tau are NaN where the estimate lies at tau = 0 or the criterion is "
            "not concave there"
        )
    return Optimum(pinned(phi, layout.shape), evidence, errors, warnings, posterior, along)
