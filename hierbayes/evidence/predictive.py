r"""The evidence of MAML and iMAML: how well the adapted θ_j predicts rows that it has not seen.

.. math:: \log p(D_j^{\text{query}} \mid \hat\theta_j,\, \sigma_{\text{query}}), \qquad
          \hat\theta_j = A(D_j^{\text{support}}; \varphi)

The support rows set the inner loop's units by σ; the query rows are scored with the plug-in
predictive deviation ``sigma_query``, which absorbs the posterior variance of θ_j. A likelihood
without a noise of its own (Bernoulli) scores them at θ̂_j as it is.

LLAMA's evidence is that less what the posterior narrows,

.. math:: - \frac{w}{2} \log\det\left(I + s_0 \hat H_j\right), \qquad s_0 = K\eta

Ĥ_j is the Gauss–Newton matrix of the query rows at θ̂_j and N(φ, s₀ I) the prior that K short steps
imply: with w = 1 Laplace's approximation of the evidence, but for the distance of θ̂_j from φ.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax

from hierbayes.adaptation.base import PointAdaptation
from hierbayes.adaptation.linearised import LinearisedSteps
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Task, Tasks
from hierbayes.tasks.layout import dealt, on_devices


@dataclass(frozen=True)
class Predictive:
    """Predictive evidence after an adaptation; with ``determinant`` w > 0 LLAMA's.

    The determinant is that of :class:`~hierbayes.adaptation.linearised.LinearisedSteps`.
    """

    adaptation: PointAdaptation
    determinant: float = 0.0
    name = "predictive"

    def __call__(
        self, model: HierarchicalModel, phi: dict[str, Any], support: Tasks, query: Tasks
    ) -> jax.Array:
        """Log p(y^query | A(D^support; φ), φ) of every query row."""
        return self.of_rows(model, phi, *self.arrange(model, support, query))

    def arrange(self, model: HierarchicalModel, support: Tasks, query: Tasks) -> Any:
        """Both parts of the same tasks as :meth:`of_rows` takes them, on their devices."""
        order = dealt(support, support.sizes + query.sizes)
        rows = on_devices(self.adaptation.arrange(model, support), support, order)
        return rows, on_devices(model.likelihood.arrange(query), query, order)

    def of_rows(
        self,
        model: HierarchicalModel,
        phi: dict[str, Any],
        support: tuple[Task, Any],
        query: tuple[Task, Any],
    ) -> jax.Array:
        """Log p(y^query | A(D^support; φ), φ) of every query row, zero where a row fills up.

        Rows lie as :meth:`Likelihood.arrange` has them.
        """
        thetas = self.adaptation.steps(model, phi, *support)
        return model.likelihood.log_likelihood_of_rows(
            thetas, model.likelihood.plug_in(phi), *query
        )

    def of_tasks(
        self, model: HierarchicalModel, phi: dict[str, Any], support: Task, query: Task
    ) -> jax.Array:
        """The evidence of each task (J,), of tasks side by side on a leading axis."""
        steps = self.adaptation
        thetas = steps.steps(model, phi, support, None)
        scored = model.likelihood.plug_in(phi)
        rows = model.likelihood.log_likelihood_of_rows(thetas, scored, query, None).sum(-1)
        if not self.determinant:
            return rows
        assert isinstance(steps, LinearisedSteps)
        shrinkage = functools.partial(steps.log_shrinkage, model, phi)
        return rows - self.determinant * jax.vmap(shrinkage)(thetas, support, query)
