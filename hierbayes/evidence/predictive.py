r"""MAML's evidence: how well the adapted θ_j predicts rows that it has not seen.

.. math:: \log p(D_j^{\text{query}} \mid \hat\theta_j,\, \sigma_{\text{query}}), \qquad
          \hat\theta_j = A(D_j^{\text{support}}; \varphi)

The support rows set the inner loop's units by σ; the query rows are scored with the plug-in
predictive deviation ``sigma_query``, which absorbs the posterior variance of θ_j.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from hierbayes.adaptation.gradient import GradientSteps
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Task


@dataclass(frozen=True)
class Predictive:
    """Predictive evidence after an adaptation."""

    adaptation: GradientSteps
    name = "predictive"

    def one(
        self, model: HierarchicalModel, phi: dict[str, Any], support: Task, query: Task
    ) -> jax.Array:
        """log p(D^query | A(D^support; φ), φ) of one task."""
        theta = self.adaptation.adapt_one(model.likelihood, model.prior, phi, support)
        scored = phi | {"sigma": phi["sigma_query"]}
        return model.likelihood.log_likelihood(theta, scored, query).sum()
