r"""ABML's adaptation: K gradient steps on the parameters of a normal q(θ), from the prior's own.

.. math::

    q_j = N(m_j, \operatorname{diag} s_j^2), \quad (m, \log s)^{k+1} = (m, \log s)^k
    - \frac{\eta}{n_j} \nabla \left[ -\mathbb E_q \log p(D_j \mid \theta)
    + \mathrm{KL}(q \,\Vert\, N(\mu, \operatorname{diag} \tau^2)) \right]

starting at (μ, log τ). Expectations are means over a few draws μ + s ε, the same ε in every step.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.base import Adaptation
from hierbayes.adaptation.descent import Descent
from hierbayes.adaptation.posterior import Draws
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import arithmetic
from hierbayes.tasks import Task, Tasks

PREDICTIVE_DRAWS = 100
"""Draws of θ from q by which an adapted task predicts."""


@dataclass(frozen=True)
class Variational(Adaptation):
    """A(D; φ) = the normal q that K steps reach.

    Parameters
    ----------
    num_steps : int
        K.
    step_size : float
        η on the objective divided by the number of rows.
    num_samples : int
        Draws by which an expectation under q is taken in the steps.
    """

    num_steps: int
    step_size: float
    num_samples: int = 5
    name = "variational steps"

    def steps(
        self, model: HierarchicalModel, phi: dict[str, Any], rows: Task, keys: Any
    ) -> tuple[Any, Any]:
        """(m, log s), each (J, d), of tasks on a leading axis, a key each; differentiable in φ."""
        return jax.vmap(lambda task, k: self._of_one(model, phi, task, k))(rows, keys)

    def _of_one(
        self, model: HierarchicalModel, phi: dict[str, Any], task: Task, key: Any
    ) -> tuple[Any, Any]:
        start = (phi["mu"], jnp.log(phi["tau"]))
        noise = jax.random.normal(key, (self.num_samples, phi["mu"].shape[0]), phi["mu"].dtype)
        count = jnp.maximum(task.mask.sum(), 1)

        def objective(q: Any) -> Any:
            return (expected(model, phi, task, q, noise) - divergence(q, phi)) / count

        return Descent(self.num_steps, self.step_size).run(jax.grad(objective), start)

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Draws:
        """Means of q and draws from it."""
        mean = np.array(np.broadcast_to(phi["mu"], (tasks.num_tasks, len(phi["mu"]))), float)
        log_sd = np.array(np.broadcast_to(np.log(phi["tau"]), mean.shape))
        with arithmetic(model.likelihood.precision):
            for positions, block in model.likelihood.blocks(tasks):
                found = _steps(self, model.without_encoder(), dict(phi), block)
                mean[positions], log_sd[positions] = (np.asarray(part) for part in found)
        white = np.random.default_rng(0).standard_normal((PREDICTIVE_DRAWS, 1, mean.shape[1]))
        sample = np.empty((PREDICTIVE_DRAWS, *mean.shape), dtype=model.likelihood.precision)
        for place, one in enumerate(white):
            sample[place] = mean + np.exp(log_sd) * one
        return Draws(mean, sample)


def expected(
    model: HierarchicalModel, phi: dict[str, Any], task: Task, q: tuple[Any, Any], noise: Any
) -> Any:
    """E_q log p(D | θ) of one task, the mean over m + s ε for the rows ε of ``noise`` (S, d)."""
    mean, log_sd = q
    values = jax.vmap(
        lambda e: model.likelihood.log_likelihood(mean + jnp.exp(log_sd) * e, phi, task).sum()
    )(noise)
    return values.mean()


def divergence(q: tuple[Any, Any], phi: dict[str, Any]) -> Any:
    """KL(q ‖ N(μ, diag τ²)) of one task."""
    mean, log_sd = q
    log_ratio = log_sd - jnp.log(phi["tau"])
    squared = ((mean - phi["mu"]) / phi["tau"]) ** 2
    return 0.5 * (jnp.exp(2 * log_ratio) + squared - 1).sum() - log_ratio.sum()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _steps(adaptation: Variational, model: HierarchicalModel, phi: Any, rows: Task) -> Any:
    # one key for all: what a task concludes does not depend on its place among others
    keys = jax.random.wrap_key_data(
        jnp.broadcast_to(jax.random.key_data(jax.random.key(0)), (rows.mask.shape[0], 2))
    )
    return adaptation.steps(model, phi, rows, keys)
