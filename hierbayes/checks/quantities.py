r"""What is ranked in simulation-based calibration.

Parameters: μ, log τ, correlations, β, Γ, the likelihood's own, θ of the first and the last task.
And functions of parameters and data, since parameters alone do not tell a posterior from its prior
(Modrák et al. 2023):

.. math:: \sum_j \log p(D_j \mid \theta_j, \varphi), \quad \log p(D_1 \mid \theta_1, \varphi),
          \quad \sqrt{\tfrac1N \textstyle\sum_i (y_i - E[y_i \mid \theta, \varphi])^2}
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.likelihoods.base import sum_by_task
from hierbayes.likelihoods.student_t import StudentT
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.tasks import Tasks

LOG_LIKELIHOOD = "log likelihood"


def quantities(
    model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray], thetas: np.ndarray
) -> dict[str, np.ndarray]:
    """Every quantity by its label, (S,), at S values of φ and of θ (S, J, d)."""
    found = of_parameters(model, tasks, phis)
    first, last = ends(tasks)
    for j in dict.fromkeys((first, last)):
        for k, c in enumerate(tasks.coef):
            found[f"theta[{tasks.names[j]}, {c}]"] = thetas[:, j, k]
    found[f"theta · tau [{tasks.names[first]}, {tasks.coef[0]}]"] = (
        thetas[:, first, 0] * phis["tau"][:, 0]
    )
    return found | of_data(model, tasks, phis, thetas)


def of_parameters(
    model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Free entries of φ by label; of τ the logarithm."""
    shape = model.shape(tasks)
    found = {}
    for k, c in enumerate(shape.coef):
        if shape.free_mean[k]:
            found[f"mu[{c}]"] = phis["mu"][:, k]
    with np.errstate(divide="ignore"):
        for k, c in enumerate(shape.coef):
            found[f"log tau[{c}]"] = np.log(phis["tau"][:, k])
    for block in shape.blocks if "corr" in phis else ():
        for a in range(len(block)):
            for b in range(a + 1, len(block)):
                i, k = block[a], block[b]
                found[f"corr[{shape.coef[i]}, {shape.coef[k]}]"] = phis["corr"][:, i, k]
    for k, c in enumerate(shape.shared):
        found[f"beta[{c}]"] = phis["beta"][:, k]
    for k, w in enumerate(shape.task_predictors):
        for i, c in enumerate(shape.coef):
            found[f"gamma[{c}, {w}]"] = phis["gamma"][:, i, k]
    for name in shape.parameters:
        found[name] = np.reshape(phis[name], -1)
    return found


def of_data(
    model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray], thetas: np.ndarray
) -> dict[str, np.ndarray]:
    """Quantities that look at the outcomes too."""
    likelihood, (first, _) = model.likelihood, ends(tasks)
    with float64():
        by_task, f = _log_likelihoods(
            likelihood, tasks.num_tasks, *likelihood.arrange(tasks), thetas, phis
        )
        by_task, f = np.asarray(by_task), np.asarray(f)
    found = {
        LOG_LIKELIHOOD: by_task.sum(1),
        f"{LOG_LIKELIHOOD} of task {tasks.names[first]}": by_task[:, first],
    }
    if likelihood.has_location:
        mean = f
        if not (likelihood.gaussian_in_theta or isinstance(likelihood, StudentT)):
            own = {name: np.asarray(phis[name])[:, None] for name in likelihood.parameters()}
            mean = np.asarray(likelihood.predictive(f, 0.0, own, tasks.slots).mean())
        found["prediction error"] = np.sqrt(((tasks.outcome - mean) ** 2).mean(1))
    return found


def ends(tasks: Tasks) -> tuple[int, int]:
    """The first and the last task that have rows."""
    with_rows = np.flatnonzero(tasks.sizes > 0)
    return int(with_rows[0]), int(with_rows[-1])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _log_likelihoods(
    likelihood: Any, num_tasks: int, rows: Any, task_of_row: Any, thetas: Any, phis: Any
) -> tuple[jax.Array, jax.Array]:
    """log p(D_j | θ_j, φ) (S, J), and f (S, N) where there is one."""

    def at(theta: Any, phi: Any) -> tuple[Any, Any]:
        each = likelihood.log_likelihood_of_rows(theta, phi, rows, task_of_row)
        f = jnp.zeros(0)
        if likelihood.has_location:
            f = likelihood.locations(theta, phi, rows, task_of_row)
        return sum_by_task(each, task_of_row, num_tasks), f

    return jax.vmap(at)(thetas, phis)


def rank(
    draws: dict[str, np.ndarray], truth: dict[str, float], rng: np.random.Generator
) -> dict[str, int]:
    """How many of the L draws (L,) lie below the truth, by label; ties are broken at random."""
    ranks = {}
    for label, values in draws.items():
        below, ties = int((values < truth[label]).sum()), int((values == truth[label]).sum())
        ranks[label] = below + int(rng.integers(ties + 1))
    return ranks
