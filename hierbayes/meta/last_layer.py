r"""Empirical Bayes of the last layer: features learned by maximising the exact evidence.

.. math:: \hat\varphi = \arg\max_{\omega, \mu, \Sigma, \sigma} \; \mathbb E_j
    \log N\!\left(y_j;\; H_j\mu,\; H_j \Sigma H_j^\top + \sigma^2 I\right), \quad
    H_j = h(X_j; \omega)

with all rows of a task, support and query: no split is needed where θ is integrated out.

The exact evidence of linear tasks on features that are being learned.

.. math:: \log p(D_j \mid \varphi) = \log N\!\left(y_j;\; H_j \mu,\;
          H_j \Sigma H_j^\top + \sigma^2 I\right), \qquad H_j = h(X_j; \omega)

The n × n form: few-shot tasks have fewer rows than features, and H changes in every meta-step, so
that there are no statistics to keep. It agrees with :mod:`~hierbayes.adaptation.exact` on features
that are held still.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation import Conjugate
from hierbayes.errors import InputError
from hierbayes.fit import Fit
from hierbayes.likelihoods import LastLayer
from hierbayes.meta.batches import Outer, Parameters, batches, rows_together
from hierbayes.meta.outer_loop import Run, WithOuterLoop
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


SMALLEST_SIGMA = 1e-3
"""σ as a share of the outcome's spread below which rows without noise are not followed."""


def maximise_evidence_of_features(
    method: WithOuterLoop, model: HierarchicalModel, tasks: Any, run: Run
) -> Fit:
    """φ̂ = (mu, tau, sigma, features) from a source of tasks, by stochastic ascent."""
    _check_prior(model)
    source = batches(method, model, tasks, run)
    model, sample = source.model, source.tasks
    outer = Outer(model, len(sample.coef))
    spread = float(np.std(sample.outcome)) or 1.0

    def start(key: Any) -> Parameters:
        parameters = outer.start(key)
        d = outer.num_coef
        return parameters | {
            "mu": jnp.zeros(d),
            "log_tau": jnp.full(d, np.log(spread / np.sqrt(d))),
            "log_sigma": jnp.log(jnp.asarray(0.3 * spread)),
        }

    described: dict[str, Any] = {"criterion": "ml", "evidence": "exact"}
    precision = "float64"
    floor = SMALLEST_SIGMA * spread
    found = source.ascend(outer, OnFeatures(outer), floor, described, start, precision)
    trained = found.more[-1]
    if float(jnp.exp(trained.parameters["log_sigma"])) <= floor:
        trained.parameters["log_sigma"] = jax.device_get(np.log(floor))
        found.warnings.append(
            f"sigma has reached the smallest that is followed, {floor:.2g} ({SMALLEST_SIGMA:g} of "
            "the outcome's spread): the features explain the rows almost without an error"
        )
    return source.fit(Conjugate(), found, described, precision=precision)


def _check_prior(model: HierarchicalModel) -> None:
    """Refuse priors other than an independent Gaussian."""
    model.require_gaussian_prior(
        "empirical_bayes on a learned last layer", "its evidence is that of a Gaussian prior",
        "use priors.Gaussian(correlated=False)",
    )  # fmt: skip
    if getattr(model.prior, "correlated", False):
        raise InputError(
            "the last layer's prior is independent: pass hb.priors.Gaussian(correlated=False). "
            "Nothing is lost: features are learned, and a rotation of them is a correlation"
        )


class OnFeatures(NamedTuple):
    """The exact evidence of all rows of a batch's tasks, a row."""

    outer: Outer

    def __call__(
        self, parameters: Parameters, support: Task, asked: Task, key: Any, given: Any
    ) -> Any:
        """Of every task (B,); ``given`` is the smallest σ that is followed."""
        del key
        phi = self.outer.phi(parameters, {})
        phi = phi | {"sigma": jnp.maximum(phi["sigma"], given)}
        rows = rows_together(support, asked)
        each = log_evidence_on_features(self.outer.model, phi, rows)
        return each / jnp.maximum(rows.mask.sum(-1), 1)
