r"""K gradient steps from φ.

.. math:: \theta^0 = \mu + \Gamma w_j, \qquad
          \theta^{k+1} = \theta^k + \eta\, \nabla_\theta \log p(D_j \mid \theta^k, \varphi)

Step sizes are in units of the **sum** of the log likelihood over a task's rows, so that more rows
mean longer steps. Beyond η = 2/λ_max, with λ_max the largest curvature of a task's log likelihood,
the steps diverge; where the curvature depends on θ, λ_max is a bound and they can diverge.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from hierbayes.adaptation.base import Adapted, PointAdaptation
from hierbayes.adaptation.curvature import slopes
from hierbayes.adaptation.descent import Descent
from hierbayes.errors import InputError
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.tasks import Task, Tasks


@dataclass(frozen=True)
class GradientSteps(PointAdaptation):
    """A(D; φ) = K gradient steps from the prior's location, with the step size η of φ or fixed.

    Parameters
    ----------
    num_steps : int
        K, the number of steps.
    step_size : float or None
        η in sum-of-log-likelihood units; None takes ``phi["step_size"]``.
    """

    num_steps: int
    step_size: float | None = None
    name = "gradient steps"

    def steps(
        self, model: HierarchicalModel, phi: dict[str, Any], rows: Task, task_of_row: Any
    ) -> Any:
        """θ_K of every task (J, …), differentiable in φ; θ may be any pytree."""
        eta = phi["step_size"] if self.step_size is None else self.step_size
        start = model.prior.location(phi, rows.task_predictors)
        return Descent(self.num_steps, eta).run(
            lambda thetas: slopes(model, phi, rows, task_of_row, thetas), start
        )

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Adapted:
        """θ_K of every task, a point; a step size too long for a task is refused, naming it."""
        eta = float(phi["step_size"]) if self.step_size is None else self.step_size
        check_step_size(eta, model, tasks, phi)
        with float64():
            theta = _steps(
                self, model.without_encoder(), dict(phi), tasks.flat(), tasks.task_of_row
            )
            return Adapted(np.asarray(theta))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _steps(
    adaptation: GradientSteps,
    model: HierarchicalModel,
    phi: dict[str, Any],
    rows: Task,
    of_row: Any,
) -> Any:
    return adaptation.steps(model, phi, rows, of_row)


def curvatures(model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> np.ndarray:
    """Eigenvalues of each task's −∇² log p(D_j | θ), ascending, (J, d); zero without rows.

    Exact for Gaussian tasks; elsewhere of XᵀCX with the bounds C on each row's curvature, which no
    θ exceeds.
    """
    with float64():
        bound = np.asarray(model.likelihood.curvature_bound(phi, tasks.slots))
    scaled = tasks.predictors * np.sqrt(np.broadcast_to(bound, tasks.num_rows))[:, None]
    grams = np.zeros((tasks.num_tasks, scaled.shape[1], scaled.shape[1]))
    np.add.at(grams, tasks.task_of_row, scaled[:, :, None] * scaled[:, None, :])
    return np.linalg.eigvalsh(grams)


def largest_curvature(model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> np.ndarray:
    """λ_max of each task, (J,); a bound where the curvature depends on θ."""
    return curvatures(model, tasks, phi)[:, -1]


def check_step_size(
    step_size: float, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]
) -> None:
    """Refuse a step size at which some task's gradient steps diverge, or can diverge."""
    if not (np.isfinite(step_size) and step_size > 0):
        raise InputError(f"step_size must be positive, found {step_size}")
    curvature = largest_curvature(model, tasks, phi)
    product = step_size * curvature
    if (bad := product > 2).any():
        worst = int(np.argmax(product))
        certain = "makes" if model.likelihood.gaussian_in_theta else "can make"
        raise InputError(
            f"step_size={step_size:.3g} {certain} gradient steps diverge in {bad.sum()} of "
            f"{tasks.num_tasks} tasks, most in {tasks.names.tolist()[worst]!r} "
            f"({tasks.sizes[worst]} rows), where it must stay below 2/λ_max = "
            f"{2 / curvature[worst]:.3g}; step sizes are in sum-of-log-likelihood units, "
            'and "auto" takes 1/λ_max over all tasks'
        )
