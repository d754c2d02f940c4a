"""What one task's landscape looks like from φ: where steps lead, where MAP estimates lie."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.curvature import slopes
from hierbayes.adaptation.descent import Descent, Flow
from hierbayes.adaptation.discrepancy import measure
from hierbayes.adaptation.implied import FLAT, EquivalentPrior
from hierbayes.adaptation.newton import climb
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64, to_numpy
from hierbayes.tasks import Task, Tasks

IDENTIFIED = 1e-8
"""Curvature at the optimum, over the largest at φ, below which a direction has no optimum."""


class Trajectories(NamedTuple):
    """One task's way from φ.

    ``steps`` (K + 1, d): θ_0, …, θ_K. ``precisions`` (P,), falling from inf to 0, and
    ``estimates`` (P, d): the MAP estimates under N(φ, I / p). ``rungs`` (M, d): those at the
    precisions asked for. ``identified``: whether the task's rows determine the optimum at p = 0.
    """

    steps: np.ndarray
    precisions: np.ndarray
    estimates: np.ndarray
    rungs: np.ndarray
    identified: bool


def trajectories(
    model: HierarchicalModel,
    tasks: Tasks,
    phi: Mapping[str, np.ndarray],
    location: np.ndarray,
    method: Descent | Flow,
    curvature: np.ndarray,
    rungs: np.ndarray,
    num_points: int = 200,
) -> Trajectories:
    """From φ at ``location`` (d,), where the task's curvatures are ``curvature`` (d,)."""
    largest = max(float(curvature.max()), np.finfo(float).tiny)
    least = max(float(curvature.min()), 1e-4 * largest)
    between = np.geomspace(1e4 * largest, 1e-4 * least, num_points)
    precisions = np.concatenate([between, rungs, [0.0]])
    arguments = (model.without_encoder(), dict(phi), tasks.flat(), tasks.task_of_row)
    with float64():
        steps = _steps(*arguments, location, method)
        estimates, bend, converged = to_numpy(_estimates(*arguments, location, precisions))
    identified = bool(converged[-1] and np.linalg.eigvalsh(bend[-1])[0] > IDENTIFIED * largest)
    path = np.concatenate([location[None], estimates[:num_points], estimates[-1:]])
    return Trajectories(
        np.asarray(steps), np.concatenate([[np.inf], between, [0.0]]), path,
        estimates[num_points:-1], identified,
    )  # fmt: skip


def missed_by_steps(
    model: HierarchicalModel,
    tasks: Tasks,
    phi: Mapping[str, np.ndarray],
    prior: EquivalentPrior,
    steps: np.ndarray,
    marks: list[int],
) -> np.ndarray:
    """Nats by which θ_k misses the MAP estimate under its equivalent prior, for each k marked.

    NaN without a prior; zero where the likelihood is Gaussian.
    """
    if model.likelihood.gaussian_in_theta:
        return np.where([has_no_prior(prior, k) for k in marks], np.nan, 0.0)
    rows, location = (tasks.flat(), tasks.task_of_row), prior.location[None]
    vectors, curvature = prior.directions, prior.curvature
    hessian = (vectors * curvature @ vectors.T)[None]
    found = []
    for k in marks:
        with float64():
            left, moved = to_numpy(first_steps(prior, k).responses(curvature))
            precision = (vectors * (left / moved) @ vectors.T)[None]
            # θ_k stands for the linearised end too, of which nothing is asked here
            end = steps[k][None]
            measured = measure(
                model.without_encoder(), "ggn", dict(phi), *rows, location, end, end, hessian,
                precision,
            )  # fmt: skip
        found.append(np.nan if (left < -FLAT).any() else float(measured[0][0]))
    return np.array(found)


def first_steps(prior: EquivalentPrior, num_steps: int) -> Descent:
    """The method cut off after so many steps."""
    sizes: Any = prior.method.step_size  # type: ignore[union-attr]
    return Descent(num_steps, sizes if np.ndim(sizes) == 0 else sizes[:num_steps])


def has_no_prior(prior: EquivalentPrior, num_steps: int) -> bool:
    """Whether the first ``num_steps`` steps are no MAP estimate under any Gaussian prior."""
    with float64():
        left, _ = to_numpy(first_steps(prior, num_steps).responses(prior.curvature))
    return bool((left < -FLAT).any())


def log_likelihoods(
    model: HierarchicalModel, tasks: Tasks, phi: Mapping[str, np.ndarray], thetas: np.ndarray
) -> np.ndarray:
    """The task's log p(D | θ) at each of ``thetas`` (…, d)."""
    points = thetas.reshape(-1, thetas.shape[-1])
    with float64():
        values = _log_likelihoods(
            model.without_encoder(), dict(phi), tasks.flat(), tasks.task_of_row, points
        )
    return np.asarray(values).reshape(thetas.shape[:-1])


@functools.partial(jax.jit, static_argnums=0)
def _steps(
    model: HierarchicalModel, phi: Any, rows: Task, task_of_row: Any, location: Any, method: Any
) -> Any:
    def uphill(theta: Any) -> Any:
        return slopes(model, phi, rows, task_of_row, theta[None])[0]

    return method.path(uphill, jnp.asarray(location))


@functools.partial(jax.jit, static_argnums=0)
def _estimates(
    model: HierarchicalModel, phi: Any, rows: Task, task_of_row: Any, location: Any, precisions: Any
) -> Any:
    eye, start = jnp.eye(location.shape[-1]), jnp.zeros_like(location)[None]

    def one(precision: Any) -> Any:
        mode = climb(model, phi, rows, task_of_row, location[None], eye, precision * eye, start)
        return mode.theta[0], mode.curvature[0], mode.converged[0]

    return jax.vmap(one)(precisions)


@functools.partial(jax.jit, static_argnums=0)
def _log_likelihoods(
    model: HierarchicalModel, phi: Any, rows: Task, task_of_row: Any, thetas: Any
) -> Any:
    def one(theta: Any) -> Any:
        return model.likelihood.log_likelihood_of_rows(theta[None], phi, rows, task_of_row).sum()

    return jax.vmap(one)(thetas)
