r"""log p(D_j | φ), θ_j integrated out: the normaliser of what tasks conclude.

.. math:: \log p(D_j \mid \varphi) = \log \int p(D_j \mid \theta, \varphi)\,
          p(\theta \mid \varphi)\, d\theta

Exact of Gaussian tasks; of others by quadrature around the mode, and by Laplace's approximation in
many dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from hierbayes.adaptation import Conjugate, Integrable, Laplace, Quadrature, ScaleMixture
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.sharding import gathered
from hierbayes.tasks import Tasks

NODES = {1: 15, 2: 9, 3: 5}
"""Nodes a dimension where none are asked for; Laplace's approximation beyond."""

MOST_AT_ONCE, ROWS_AT_ONCE = 64, 200_000
"""Draws of φ, and draws × rows, that are worked on together."""


def by_nodes(num_nodes: int) -> Laplace | Quadrature:
    """The adaptation with so many nodes a dimension; one is Laplace's approximation."""
    return Laplace() if num_nodes == 1 else Quadrature(num_nodes)


def integral_of(model: HierarchicalModel, num_coef: int) -> Integrable:
    """How θ of so many coefficients is integrated out, as well as that can be done."""
    if model.likelihood.gaussian_in_theta:
        return Conjugate() if model.prior.gaussian else ScaleMixture()
    model.require_gaussian_prior(
        "the evidence of tasks that are not Gaussian (for leave_one_task_out, for adapt)",
        "it is not offered there", "take priors.Gaussian()",
    )  # fmt: skip
    return by_nodes(NODES.get(num_coef, 1))


@dataclass(frozen=True)
class Integrated:
    """log ∫ p(D_j | θ, φ) p(θ | φ) dθ, the normaliser of an adaptation's posterior.

    Parameters
    ----------
    adaptation : Integrable, optional
        How θ is integrated out; by default as well as that can be done: in closed form of Gaussian
        tasks (but for one integral under a Student-t prior), by quadrature of others with up to
        three coefficients, by Laplace's approximation beyond.

    Examples
    --------
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
    ...                                known_se="se")
    >>> evidence = hb.evidence.Integrated()(model, tasks, {"mu": [8.0], "tau": [5.0]})
    >>> evidence.shape
    (8,)
    """

    adaptation: Integrable | None = None
    name = "integrated"

    def by(self, model: HierarchicalModel, tasks: Tasks) -> Integrable:
        """The adaptation whose normaliser it is."""
        return self.adaptation or integral_of(model, len(tasks.coef))

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> np.ndarray:
        """The log evidence of each task, (J,)."""
        tasks = model.likelihood.design(tasks, phi)
        phis = {name: np.asarray(value)[None] for name, value in phi.items()}
        return self.over(model, tasks, phis)[0]

    def over(
        self, model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray]
    ) -> np.ndarray:
        """log p(D_j | φ_s) of every draw and task (S, J); draws of φ on its first axis.

        What draws of φ are weighed by: when new tasks arrive, and when one is left out.
        """
        how, plain = self.by(model, tasks), model.without_encoder()
        with float64():
            data = how.lay_out(plain, tasks)
            together = max(getattr(data, "num_cells", tasks.num_tasks), 1)
            batch = int(np.clip(ROWS_AT_ONCE // together, 1, MOST_AT_ONCE))
            found = _over(how.given, plain, dict(phis), data, batch)
            return gathered(found, tasks.num_tasks, axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _over(
    given: Callable[..., Any], model: HierarchicalModel, phis: dict[str, Any], data: Any, batch: int
) -> jax.Array:
    return jax.lax.map(lambda phi: given(model, phi, data).log_normaliser, phis, batch_size=batch)
