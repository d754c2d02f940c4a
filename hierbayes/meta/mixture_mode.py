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
from hierbayes.meta.marginal import maximise_likelihood
from hierbayes.meta.optimum import Optimum, curvature
from hierbayes.meta.posterior_mode import finite, off_the_boundary
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64, to_numpy
from hierbayes.phi.space import Space, at_an_end, belief_in, phi_at, standard_errors
from hierbayes.priors import Gaussian, Prior, StudentT
from hierbayes.statistics import Statistics, placed_statistics
from hierbayes.tasks import Tasks


@functools.partial(jax.jit, static_argnums=0)
def _value_and_slope(prior: Prior, space: Space, vector: Any, stats: Statistics) -> Any:
    return jax.value_and_grad(lambda v: -log_evidence(stats, prior, space.phi(v)).sum())(vector)


def maximise_mixture(resolved: HierarchicalModel, tasks: Tasks, *, with_belief: bool) -> Optimum:
    """φ̂ by "ml", or by "map" with the hyperprior's density; standard errors from the Hessian."""
    prior = resolved.prior
    assert isinstance(prior, StudentT)
    normal = replace(resolved, prior=Gaussian(prior.correlated, prior.zero_mean))
    start = maximise_likelihood(normal, tasks, reml=False).phi
    with float64():
        stats = jax.tree.map(jnp.asarray, placed_statistics(tasks))
        beliefs = resolved.phi_distributions(tasks)
        space = resolved.space(tasks)
        belief = belief_in(space, beliefs) if with_belief else None

        def value_and_slope(v: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = _value_and_slope(prior, space, v, stats)
            if belief is not None:
                more, tilt = belief(v)
                value, slope = value - more, slope - tilt
            return finite(float(value), np.asarray(slope))

        starts = [space.near(start | {"tau": share * start["tau"]}, floor)
                  for share, floor in ((0.7, 0.05), (0.3, 0.01))]  # fmt: skip
        pooled = space.near(start | {"tau": 0 * start["tau"]})
        best = off_the_boundary(value_and_slope, starts, space, [pooled])
        inside, ends = space.inside(best.x), at_an_end(space, best.x)
        errors_at = curvature(value_and_slope, best.x, inside)
        phi = to_numpy(phi_at(space, best.x))
        along = space.along(best.x, inside, errors_at)
        errors = standard_errors(along)
        evidence = -float(_value_and_slope(prior, space, best.x, stats)[0])
        posterior = None if belief is None else evidence + float(belief(best.x)[0])
    warnings = [*([best.problem] if best.problem else []), *ends]
    if np.isnan(errors["tau"]).any():
        warnings.append(
            "standard errors of tau are NaN where the estimate lies at tau = 0 or the criterion is "
            "not concave there"
        )
    return Optimum(phi, evidence, errors, warnings, posterior, along)
