r"""MAML's φ with the Gaussian that its steps imply: the same estimates, with intervals.

.. math:: y \mid x \sim N\!\left(f(x; \theta_K),\; s^2 \left[1 + \operatorname{var} f(x) / \sigma^2
          \right]\right)

The steps fix the ratio of prior to noise alone: with σ scaled, and the prior with it, θ_K stays
where it is. The scale s is learned from rows of tasks that φ has not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from hierbayes.adaptation import GradientSteps
from hierbayes.adaptation.linearised import LinearisedSteps
from hierbayes.errors import InputError, NotApplicable
from hierbayes.fit import Fit
from hierbayes.fit.adapted import AdaptedTasks
from hierbayes.fit.fit import check_fit
from hierbayes.fit.method import Derived
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Tasks


def implied_posterior(fit: Fit, support: Tasks, query: Tasks) -> Fit:
    r"""A fit whose tasks keep, beside θ_K, the posterior that K gradient steps imply.

    .. math:: \theta \mid D \approx N(\theta_K, \Sigma_K), \qquad
              \Sigma_K = \sum_i S_K(\lambda_i) v_i v_i^\top

    Exact where f is linear in θ; elsewhere of f linearised at θ_K, with the Gauss–Newton matrix.

    Parameters
    ----------
    fit : Fit
        Of gradient steps: ``hb.maml``, first-order MAML, ``hb.reptile``, of a network.
    support, query : Tasks
        Rows of tasks that φ was not learned from, ``episodes.draw(500)`` for example. The scale of
        noise and prior, ``sigma_query``, is where the query rows are most likely.

    Returns
    -------
    Fit
        The same φ but for ``sigma_query``.

    Examples
    --------
    >>> import hierbayes as hb
    >>> network = hb.likelihoods.Network.mlp([1, 8, 1])
    >>> model = hb.HierarchicalModel(network, hb.priors.Gaussian(correlated=False))
    >>> episodes = hb.datasets.sinusoids(5)
    >>> fit = hb.maml(model, episodes, num_steps=1, num_meta_steps=20, batch_size=5)
    >>> hb.meta.implied_posterior(fit, *episodes.draw(20)).method.name
    'MAML, implied posterior'
    """
    check_fit(fit)
    steps = fit.adaptation
    plain = isinstance(steps, GradientSteps) and steps.optimiser is None and not steps.proximal
    if not plain or np.ndim(fit.phi.get("step_size", 0.0)):
        raise NotApplicable(
            f"{fit.method} does not take plain gradient steps of one size, which an implied "
            "posterior needs"
        )
    if fit.model.likelihood.linear or "sigma" not in fit.phi:
        raise NotApplicable(
            "implied_posterior is for networks with Gaussian outcomes; for linear tasks "
            "hb.equivalence_report and hb.equivalent_prior have the exact one"
        )
    for part in (support, query):
        if not isinstance(part, Tasks) or part.outcome is None:
            raise InputError("support and query must be Tasks with outcomes")
    assert isinstance(steps, GradientSteps)
    bands = LinearisedSteps(steps.num_steps, steps.step_size, steps.loss, spread="implied")
    support, query = fit.model.tasks(support), fit.model.tasks(query)
    phi = {**fit.phi, **scale_of(bands)(fit.model, dict(fit.phi), support, query)}
    method = Derived(f"{fit.method}, implied posterior")
    return replace(fit, method=method, adaptation=bands, phi=phi, training=None)


def scale_of(
    adaptation: LinearisedSteps,
) -> Callable[[HierarchicalModel, dict[str, Any], Tasks, Tasks], dict[str, Any]]:
    """``sigma_query`` at its maximum: the scale s of N(f, s² (1 + var f / σ²)) at query rows."""

    def learn(
        model: HierarchicalModel, phi: dict[str, Any], support: Tasks, query: Tasks
    ) -> dict[str, Any]:
        unit = phi | {"sigma_query": np.asarray(1.0)}
        phis = {name: np.asarray(value)[None] for name, value in unit.items()}
        adapted = AdaptedTasks(model, support, phis, adaptation(model, support, unit))
        seen = adapted.predict(query)
        known = np.isfinite(seen.mean) & np.isfinite(seen.sd)
        ratio = ((query.outcome - seen.mean) / seen.sd)[known]
        # the maximum of Σ log N(y; f, s² v) in s
        return {"sigma_query": np.sqrt(np.mean(ratio**2))}

    return learn
