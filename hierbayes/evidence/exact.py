r"""The evidence of a Gaussian task, θ_j integrated out exactly.

.. math::

    \log p(D_j \mid \varphi) = -\tfrac12\left[ n_j \log 2\pi + (n_j - d)\log\sigma^2 + \log|V_j|
        + a_j^\top V_j^{-1} a_j + \lVert b_j\rVert^2/\sigma^2 \right] + \sum_i \log s_{ij}

with V_j = σ² I + R_j Σ R_jᵀ of size d × d, a_j and b_j the two parts of the residual at the prior
mean (see :mod:`hierbayes.statistics`) and s the scale of each row. The cost does not depend on the
number of rows, and nothing cancels: every term is a sum of squares. Under a Student-t prior one
integral is left (see :mod:`~hierbayes.evidence.mixed_scales`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.conjugate import collapse
from hierbayes.evidence.mixed_scales import log_mixed_evidence
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64, log_diagonal_sum, solve_lower
from hierbayes.priors import Prior, StudentT
from hierbayes.sharding import gathered
from hierbayes.statistics import Statistics, placed_statistics
from hierbayes.tasks import Tasks


def log_evidence(stats: Statistics, prior: Prior, phi: dict[str, Any]) -> jax.Array:
    """log p(D_j | φ) of every task, (J,), with all constants; under a Student-t prior too."""
    if isinstance(prior, StudentT):
        return log_mixed_evidence(stats, prior, phi)
    c = collapse(stats, prior, phi)
    d = stats.num_coef
    white = solve_lower(c.factor, c.moved)
    squares = (white**2).sum(0) + (c.left**2).sum(0) / c.noise_variance
    log_det = 2 * log_diagonal_sum(c.factor) + (stats.num_rows - d) * jnp.log(c.noise_variance)
    return -0.5 * (stats.num_rows * jnp.log(2 * jnp.pi) + log_det + squares) + stats.log_scale


_log_evidence = functools.partial(jax.jit, static_argnums=1)(log_evidence)


@dataclass(frozen=True)
class Exact:
    """log ∫ p(D_j | θ, φ) p(θ | φ) dθ of Gaussian tasks: in closed form under a Gaussian prior."""

    name = "exact"

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> np.ndarray:
        """The log evidence of each task, (J,)."""
        linear = model.likelihood.design(tasks, phi)
        with float64():
            found = _log_evidence(placed_statistics(linear), model.prior, dict(phi))
            return gathered(found, tasks.num_tasks)
