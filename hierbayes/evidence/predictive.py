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
import numpy as np

from hierbayes.adaptation.gradient import GradientSteps
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Task, Tasks


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


def paired_blocks(support: Tasks, query: Tasks) -> list[tuple[Task, Task]]:
    """Support and query rows of the same tasks side by side, in buckets of like sizes.

    Each part is filled up to its own power of two; tasks without query rows have no evidence and
    are left out; a task without support rows stays at φ.
    """
    widths = np.stack([_width(support.sizes), _width(query.sizes)], axis=1)
    pairs = []
    for a, b in np.unique(widths[widths[:, 1] > 0], axis=0):
        positions = np.flatnonzero((widths == (a, b)).all(axis=1))
        pairs.append((support.block(positions, int(a)), query.block(positions, int(b))))
    return pairs


def _width(sizes: np.ndarray) -> np.ndarray:
    return np.where(sizes > 0, 2 ** np.ceil(np.log2(np.maximum(sizes, 1))), 0).astype(int)
