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
from hierbayes.meta.posterior_mode import finite, off_the_boundary
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.phi.space import Space, belief_in
from hierbayes.rows import Rows, Whole, rows_of
from hierbayes.tasks import Tasks

SHRUNK = 1e-3
"""Share of the identity in the correlations that a search sets out from, for none to be ±1."""


@functools.partial(jax.jit, static_argnums=(0, 6))
def _sum(
    model: HierarchicalModel, space: Space, vector: Any, rows: Rows | Whole, start: Any,
    counted: Any, num_nodes: int,
) -> Any:  # fmt: skip
    def minus(v: Any) -> Any:
        values, _ = of_tasks(model, space.phi(v), rows, start, counted, num_nodes)
        return -values.sum()

    return jax.value_and_grad(minus)(vector)


class WithoutOne:
    """The summed evidence of all tasks but some, from what a fit to all of them has found."""

    def __init__(self, model: HierarchicalModel, tasks: Tasks, num_nodes: int | None):
        self.model, self.plain, self.tasks = model, model.without_encoder(), tasks
        self.num_nodes = NODES.get(len(tasks.coef), 1) if num_nodes is None else num_nodes
        self.rows = rows_of(tasks, model.likelihood)
        self.space = model.space(tasks)
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
            begin = self.space.x(known, shrunk=SHRUNK)
            beliefs = self.model.phi_distributions(self.tasks)
            belief = belief_in(self.space, beliefs) if with_belief else None
            for j in np.flatnonzero(self.tasks.sizes > 0):
                counted = self.every.copy()
                counted[j] = False
                given = (self.rows, self.start, counted, self.num_nodes)

                def value_and_slope(v: np.ndarray, given: Any = given) -> Any:
                    value, slope = _sum(self.plain, self.space, v, *given)
                    if belief is not None:
                        more, tilt = belief(v)
                        value, slope = value - more, slope - tilt
                    return finite(float(value), np.asarray(slope))

                x = off_the_boundary(value_and_slope, [begin], self.space).x
                scores[j] = self.of_tasks(self.space.phi(jnp.asarray(x)))[j]
        return scores
