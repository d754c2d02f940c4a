"""What one task's landscape looks like from φ: where steps lead, where MAP estimates lie."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.curvature import slopes
from hierbayes.adaptation.descent import Descent
from hierbayes.adaptation.discrepancy import measure
from hierbayes.adaptation.implied import FLAT, EquivalentPrior
from hierbayes.adaptation.mode import LogJoint, find_mode
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64, to_numpy
from hierbayes.rows import Whole
from hierbayes.tasks import Task, Tasks

IDENTIFIED = 1e-8
"""Curvature at the optimum, over the largest at φ, below which a direction has no optimum."""

NUM_ESTIMATES = 200


class Trajectories(NamedTuple):
    """One task's way from φ.

    ``steps`` (K + 1, d): θ_0, …, θ_K. ``estimates`` (P, d): the MAP estimates under N(φ, I/p), from
    p = ∞ at φ down to p = 0. ``rungs`` (M, d): those at p = 1/(Kη) for each K that is marked.
    ``missed`` (M,): nats by which θ_K misses the MAP estimate under its own equivalent prior, zero
    where the likelihood is Gaussian, NaN where no prior is. ``identified``: whether the task's rows
    determine the optimum at p = 0.
    """

    steps: np.ndarray
    estimates: np.ndarray
    rungs: np.ndarray
    missed: np.ndarray
    identified: bool


class Landscape:
    """The log likelihood of one task around φ, where gradient steps have their equivalent prior."""

    def __init__(
        self,
        model: HierarchicalModel,
        tasks: Tasks,
        phi: Mapping[str, np.ndarray],
        prior: EquivalentPrior,
    ) -> None:
        assert isinstance(prior.method, Descent)
        self.prior, self.num_steps = prior, prior.method.num_steps
        self.quadratic = model.likelihood.gaussian_in_theta
        self.rows = (model.without_encoder(), dict(phi), *model.likelihood.arrange(tasks))
        self.step_sizes = np.broadcast_to(np.asarray(prior.method.step_size), self.num_steps)
        # of the linearised task, along its directions; of the task itself where it is quadratic
        reached = (prior.posterior_mean - prior.location) @ prior.directions
        self.slope = reached / prior.moved
        self.largest = max(float(np.abs(prior.curvature).max()), np.finfo(float).tiny)

    def trajectories(self, marks: list[int]) -> Trajectories:
        """Steps, MAP estimates and what joins them at the numbers of steps in ``marks``."""
        steps, left, moved = self._steps()
        rungs = 1 / np.cumsum(self.step_sizes)[np.array(marks) - 1]
        least = max(float(self.prior.curvature.min()), 1e-4 * self.largest)
        between = np.geomspace(1e4 * self.largest, 1e-4 * least, NUM_ESTIMATES)
        found, identified = self._estimates(np.concatenate([between, rungs, [0.0]]))
        path = np.concatenate([self.prior.location[None], found[:NUM_ESTIMATES], found[-1:]])
        missed = np.array([self._missed(steps[k], left[k], moved[k]) for k in marks])
        return Trajectories(steps, path, found[NUM_ESTIMATES:-1], missed, identified)

    def log_likelihoods(self, thetas: np.ndarray) -> np.ndarray:
        """Log p(D | θ) at each of ``thetas`` (…, d), up to a constant."""
        if self.quadratic:
            away = (thetas - self.prior.location) @ self.prior.directions
            return away @ self.slope - 0.5 * away**2 @ self.prior.curvature
        with float64():
            values = _log_likelihoods(*self.rows, thetas.reshape(-1, thetas.shape[-1]))
        return np.asarray(values).reshape(thetas.shape[:-1])

    def _steps(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """θ_k, and what k steps leave of φ and move along each direction, each (K + 1, d)."""
        left, moved = [np.ones_like(self.slope)], [np.zeros_like(self.slope)]
        for eta in self.step_sizes:
            factor = 1 - eta * self.prior.curvature
            left.append(left[-1] * factor)
            moved.append(moved[-1] * factor + eta)
        responses = np.array(left), np.array(moved)
        if self.quadratic:
            along = responses[1] * self.slope
            return self.prior.location + along @ self.prior.directions.T, *responses
        with float64():
            steps = _steps(*self.rows, self.prior.location, self.prior.method)
        return np.asarray(steps), *responses

    def _estimates(self, precisions: np.ndarray) -> tuple[np.ndarray, bool]:
        """MAP estimates under N(φ, I/p), the last p being 0, and whether the last is identified."""
        if self.quadratic:
            curvature = self.prior.curvature + precisions[:, None]
            # nothing moves along a direction of which the rows say nothing, whatever p
            known = curvature > IDENTIFIED * self.largest
            along = np.where(known, self.slope / np.where(known, curvature, 1.0), 0.0)
            found = self.prior.location + along @ self.prior.directions.T
            return found, bool(known[-1].all())
        with float64():
            found, bend, converged = to_numpy(
                _estimates(*self.rows, self.prior.location, precisions)
            )
        least = np.linalg.eigvalsh(bend[-1])[0]
        return found, bool(converged[-1] and least > IDENTIFIED * self.largest)

    def _missed(self, theta: np.ndarray, left: np.ndarray, moved: np.ndarray) -> float:
        if (left < -FLAT).any():
            return np.nan
        if self.quadratic:
            return 0.0
        model, phi, rows, task_of_row = self.rows
        vectors = self.prior.directions
        hessian, precision = (
            (vectors * values @ vectors.T)[None] for values in (self.prior.curvature, left / moved)
        )
        # θ_k stands for the linearised end too, of which nothing is asked here
        end, location = theta[None], self.prior.location[None]
        with float64():
            measured = measure(
                model, "ggn", phi, rows, task_of_row, location, end, end, hessian, precision
            )
        return float(measured[0][0])


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
    eye, centre = jnp.eye(location.shape[-1]), location[:, None]

    def one(precision: Any) -> Any:
        penalty = (precision * eye)[:, :, None]
        tasks = LogJoint(model.likelihood, Whole.of(rows, task_of_row), phi, centre, eye, penalty)
        mode = find_mode(tasks, jnp.zeros_like(centre))
        return tasks.theta(mode.z)[:, 0], tasks.bend(mode.z).curvature[..., 0], mode.converged[0]

    return jax.vmap(one)(precisions)


@functools.partial(jax.jit, static_argnums=0)
def _log_likelihoods(
    model: HierarchicalModel, phi: Any, rows: Task, task_of_row: Any, thetas: Any
) -> Any:
    def one(theta: Any) -> Any:
        return model.likelihood.log_likelihood_of_rows(theta[None], phi, rows, task_of_row).sum()

    return jax.vmap(one)(thetas)
