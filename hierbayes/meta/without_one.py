r"""φ̂ without one task, where the evidence is an integral without a closed form.

.. math:: \hat\varphi_{-j} = \arg\max_\varphi \sum_{i \ne j} \log \hat p(D_i \mid \varphi)
          \left[+ \log p(\varphi)\right]

One program serves all tasks: the sum leaves one of them out, and starts from the fit to all.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.evidence.over_draws import NODES, of_tasks
from hierbayes.meta.layout_of_phi import Layout, belief_in
from hierbayes.meta.posterior_mode import finite, off_the_boundary
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.rows import Rows, Whole, rows_of
from hierbayes.tasks import Tasks


@functools.partial(jax.jit, static_argnums=(0, 6))
def _sum(
    model: HierarchicalModel, layout: Layout, vector: Any, rows: Rows | Whole, start: Any,
    counted: Any, num_nodes: int,
) -> Any:  # fmt: skip
    def minus(v: Any) -> Any:
        values, _ = of_tasks(model, layout.phi(v), rows, start, counted, num_nodes)
        return -values.sum()

    return jax.value_and_grad(minus)(vector)


class WithoutOne:
    """The summed evidence of all tasks but some, from what a fit to all of them has found."""

    def __init__(self, model: HierarchicalModel, tasks: Tasks, num_nodes: int | None):
        self.model, self.plain, self.tasks = model, model.without_encoder(), tasks
        self.num_nodes = NODES.get(len(tasks.coef), 1) if num_nodes is None else num_nodes
        self.rows = rows_of(tasks, model.likelihood)
        self.layout = Layout.of(
            model.shape(tasks), model.scales(tasks), model.phi_distributions(tasks)
        )
        self.every = np.ones(tasks.num_tasks, bool)
        self.start = np.zeros((len(tasks.coef), tasks.num_tasks))

    def of_tasks(self, phi: dict[str, Any]) -> np.ndarray:
        """log p̂(D_j | φ) of each task (J,); use it in float64."""
        found = of_tasks(self.plain, phi, self.rows, self.start, self.every, self.num_nodes)
        return np.asarray(found[0])

    def scores(self, phi: dict[str, np.ndarray], *, with_belief: bool) -> np.ndarray:
        """log p̂(D_j | φ̂_{−j}) of each task with rows (J,), NaN of the others."""
        scores = np.full(self.tasks.num_tasks, np.nan)
        known = {name: np.asarray(value) for name, value in phi.items()}
        with float64():
            begin = self.layout.vector(known, 0.0) + self._correlations(known)
            beliefs = self.model.phi_distributions(self.tasks)
            belief = belief_in(self.layout, beliefs) if with_belief else None
            for j in np.flatnonzero(self.tasks.sizes > 0):
                counted = self.every.copy()
                counted[j] = False
                given = (self.rows, self.start, counted, self.num_nodes)

                def value_and_slope(v: np.ndarray, given: Any = given) -> Any:
                    value, slope = _sum(self.plain, self.layout, v, *given)
                    if belief is not None:
                        more, tilt = belief(v)
                        value, slope = value - more, slope - tilt
                    return finite(float(value), np.asarray(slope))

                x = off_the_boundary(value_and_slope, [begin], self.layout).x
                scores[j] = self.of_tasks(self.layout.phi(jnp.asarray(x)))[j]
        return scores

    def _correlations(self, phi: dict[str, np.ndarray]) -> np.ndarray:
        """The vector's part that :meth:`Layout.vector` leaves at zero: correlations as they are."""
        v, layout = np.zeros(self.layout.size), self.layout
        if not layout.blocks or "corr" not in phi:
            return v
        from numpyro.distributions.transforms import CorrCholeskyTransform

        parts = []
        for b in layout.blocks:
            corr = 0.999 * phi["corr"][np.ix_(b, b)] + 0.001 * np.eye(len(b))
            parts.append(np.asarray(CorrCholeskyTransform()._inverse(np.linalg.cholesky(corr))))
        v[layout.at["corr"]] = np.concatenate(parts)
        return v
