r"""K gradient steps with the spread of f that they imply, of tasks with any number of weights.

.. math::

    \operatorname{var} f(x) = s_0 \lVert J_x \rVert^2 + \sum_i (s_i - s_0) (J_x v_i)^2, \qquad
    J = \partial f / \partial\theta \text{ at } \theta_K

λ_i, v_i are the leading eigenpairs of the Gauss–Newton matrix Jᵀ J / σ², found from the n × n
matrix J Jᵀ; s₀ = Kη is the variance of the prior that K short steps imply. "implied": what K steps
leave, s_i = S_K(λ_i), exact where f is linear in θ. "laplace": s_i = 1 / (λ_i + 1 / s₀), Laplace's
approximation under N(φ, s₀ I).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.descent import Descent
from hierbayes.adaptation.gradient import GradientSteps
from hierbayes.adaptation.posterior import Linearised
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import arithmetic
from hierbayes.tasks import Task, Tasks


@dataclass(frozen=True)
class LinearisedSteps(GradientSteps):
    """K gradient steps, and how far f at new rows may lie from what they say.

    As :class:`GradientSteps`, plain steps only, and:

    Parameters
    ----------
    spread : "implied" or "laplace"
        The posterior of the equivalent prior, or Laplace's under N(φ, Kη I).
    """

    spread: Literal["implied", "laplace"] = "implied"
    name = "gradient steps with their implied posterior"

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Linearised:
        """θ_K of every task; its ``spread`` gives the variance of f at rows of these tasks.

        f's variance is in the units of ``sigma_query``: σ of the steps sets only the ratio of prior
        to noise, and ``sigma_query`` the scale of both.
        """
        adapted = super().__call__(model, tasks, phi)

        # a partial of a method, for a function made here could not be pickled
        spread = functools.partial(self._at_rows, model, tasks, dict(phi), adapted.mean)
        return Linearised(adapted.mean, spread, remarks=adapted.remarks)

    def _at_rows(
        self,
        model: HierarchicalModel,
        tasks: Tasks,
        phi: dict[str, Any],
        theta: np.ndarray,
        rows: Tasks,
        positions: np.ndarray,
    ) -> np.ndarray:
        """var f at rows of these tasks, the task of each by position."""
        support = tasks.take(positions)
        values = np.zeros(rows.num_rows)
        with arithmetic(model.likelihood.precision):
            for at, given, asked in _pairs(model, support, rows):
                found = np.asarray(
                    _variances(
                        self, model.without_encoder(), phi, theta[positions[at]],
                        given, asked,
                    )
                )  # fmt: skip
                for k, j in enumerate(at):
                    n = int(rows.sizes[j])
                    values[rows.starts[j] : rows.starts[j] + n] = found[k, :n]
        scale = float(phi["sigma_query"]) / float(phi["sigma"]) if "sigma_query" in phi else 1.0
        return scale**2 * values

    def variance(
        self, model: HierarchicalModel, phi: dict[str, Any], theta: Any, given: Task, asked: Task
    ) -> Any:
        """var f (m,) at the rows ``asked`` of one task that took its steps on ``given``."""
        jacobian = _whitened(model, phi, theta, given)
        return self._variance(phi, _jacobian(model, phi, theta, asked), jacobian, given)

    def log_shrinkage(
        self, model: HierarchicalModel, phi: dict[str, Any], theta: Any, given: Task, rows: Task
    ) -> Any:
        """½ log det(I + s₀ JᵀJ/σ²) of ``rows``: by how much they narrow N(φ, s₀ I).

        s₀ is that of the steps on ``given``.
        """
        jacobian = _whitened(model, phi, theta, rows)
        prior = self._flat(phi, given)[0]
        gram = jnp.eye(len(jacobian)) + prior * jacobian @ jacobian.T
        return jnp.log(jnp.diagonal(jnp.linalg.cholesky(gram))).sum()

    def _flat(self, phi: Any, rows: Task) -> tuple[Any, Any]:
        """(s₀, the step on the summed log likelihood)."""
        eta = phi["step_size"] if self.step_size is None else self.step_size
        share = jnp.maximum(rows.mask.sum(), 1) if self.loss == "mean" else 1.0
        return self.num_steps * eta / share, eta / share

    def _variance(self, phi: Any, asked: Any, jacobian: Any, given: Task) -> Any:
        prior, eta = self._flat(phi, given)
        values, vectors = jnp.linalg.eigh(jacobian @ jacobian.T)
        values = jnp.maximum(values, 0.0)
        # v_i = Jᵀ u_i / √λ_i, so that (J_x v_i)² = (J_x Jᵀ u_i)² / λ_i; nothing where λ_i = 0
        along = (asked @ jacobian.T @ vectors) ** 2
        fine = values > 1e-6 * jnp.maximum(values.max(), 1e-30)
        safe = jnp.where(fine, values, 1.0)
        if self.spread == "implied":
            left = Descent(self.num_steps, eta).responses(safe)[1]
        else:
            left = 1 / (safe + 1 / prior)
        kept = jnp.where(fine, (left - prior) / safe, 0.0)
        return jnp.maximum(prior * (asked**2).sum(1) + along @ kept, 0.0)


def _pairs(
    model: HierarchicalModel, support: Tasks, rows: Tasks
) -> Iterator[tuple[np.ndarray, Task, Task]]:
    """(positions, support, rows) of tasks side by side, in groups."""
    for at, asked in model.likelihood.blocks(rows):
        own = support.take(at)
        sizes = own.sizes
        one_group = np.ptp(sizes) == 0 or not model.likelihood.mixes_rows(own.predictors)
        for size in [sizes.max()] if one_group else np.unique(sizes):
            here = np.flatnonzero((sizes == size) | one_group)
            given = own.block(here, max(int(size), 1))
            yield at[here], given, jax.tree.map(lambda part, h=here: part[h], asked)


def _jacobian(model: HierarchicalModel, phi: Any, theta: Any, task: Task) -> Any:
    """∂f/∂θ (n, d) of one task's rows, zero in rows that fill up."""
    rows = jax.jacrev(lambda t: model.likelihood.location(t, phi, task))(theta)
    return jnp.where(task.mask[:, None], rows, 0.0)


def _whitened(model: HierarchicalModel, phi: Any, theta: Any, task: Task) -> Any:
    """W^½ J (n, d), with W the curvature of each row's log likelihood in f."""
    bend = model.likelihood.curvature_bound(phi, task.slots)
    return jnp.sqrt(bend) * _jacobian(model, phi, theta, task)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _variances(
    adaptation: LinearisedSteps, model: HierarchicalModel, phi: Any, thetas: Any, given: Task,
    asked: Task,
) -> Any:  # fmt: skip
    return jax.vmap(lambda t, g, a: adaptation.variance(model, phi, t, g, a))(thetas, given, asked)
