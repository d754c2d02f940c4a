r"""LLAMA's evidence: how well K steps predict the query rows, less what the posterior narrows.

.. math:: \log p(D_j^{\text{query}} \mid \hat\theta_j) - \frac{w}{2} \log\det\left(I + s_0
          \hat H_j\right), \qquad s_0 = K\eta

Ĥ_j is the Gauss–Newton matrix of the query rows at θ̂_j and N(φ, s₀ I) the prior that K short steps
imply: with w = 1 Laplace's approximation of the evidence, but for the distance of θ̂_j from φ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from hierbayes.adaptation.linearised import LinearisedSteps
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Task


@dataclass(frozen=True)
class LaplacePredictive:
    """Predictive evidence with Laplace's determinant, of tasks on a leading axis."""

    adaptation: LinearisedSteps
    weight: float = 1.0
    name = "predictive + Laplace"

    def of_tasks(
        self, model: HierarchicalModel, phi: dict[str, Any], support: Task, query: Task
    ) -> jax.Array:
        """The evidence of each task (J,)."""
        thetas = self.adaptation.steps(model, phi, support, None)
        scored = model.likelihood.plug_in(phi)
        rows = model.likelihood.log_likelihood_of_rows(thetas, scored, query, None)
        narrower = jax.vmap(
            lambda theta, given, asked: self.adaptation.log_shrinkage(
                model, phi, theta, given, asked
            )
        )(thetas, support, query)
        return rows.sum(-1) - self.weight * narrower
