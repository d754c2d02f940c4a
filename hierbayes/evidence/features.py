r"""The exact evidence of linear tasks on features that are being learned.

.. math:: \log p(D_j \mid \varphi) = \log N\!\left(y_j;\; H_j \mu,\;
          H_j \Sigma H_j^\top + \sigma^2 I\right), \qquad H_j = h(X_j; \omega)

The n × n form: few-shot tasks have fewer rows than features, and H changes in every meta-step, so
that there are no statistics to keep. It agrees with :mod:`~hierbayes.adaptation.exact` on features
that are held still.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hierbayes.likelihoods import LastLayer
from hierbayes.model import HierarchicalModel
from hierbayes.statistics import design_and_variance
from hierbayes.tasks import Task


def log_evidence_on_features(
    model: HierarchicalModel, phi: dict[str, Any], rows: Task
) -> jax.Array:
    """log p(D_j | φ) of tasks on a leading axis, (J,); the algebra in the precision of μ."""
    likelihood = model.likelihood
    assert isinstance(likelihood, LastLayer)

    def of_one(task: Task) -> jax.Array:
        h = likelihood.features(phi, task.predictors).astype(phi["mu"].dtype)
        h = jnp.where(task.mask[:, None], h, 0.0)
        residual = jnp.where(task.mask, task.outcome - h @ phi["mu"], 0.0)
        # a row that only fills up is one of noise 1 and residual 0, and adds nothing
        noise = jnp.where(task.mask, phi["sigma"] ** 2, 1.0)
        _, variance = design_and_variance(h, model.prior.scale_tril(phi), noise)
        factor = jnp.linalg.cholesky(variance)
        white = jax.scipy.linalg.solve_triangular(factor, residual, lower=True)
        log_det = jnp.log(jnp.diagonal(factor)).sum()
        return -0.5 * (task.mask.sum() * jnp.log(2 * jnp.pi) + white @ white) - log_det

    return jax.vmap(of_one)(rows)
