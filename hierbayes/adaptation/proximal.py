r"""The MAP estimate of every task under the prior, differentiable in φ.

.. math::

    \theta_j^* = \arg\max_\theta \left[\log p(D_j \mid \theta, \varphi)
        + \log N(\theta;\, \mu + \Gamma w_j,\, \Sigma(\varphi))\right]

With Σ = λ⁻¹ I this is iMAML's inner problem, the negative log likelihood plus λ/2 ‖θ − φ‖². In
whitened coordinates θ = m + L z, with Ψ the bracket and A = −∇²Ψ, one Newton step

.. math:: z^\dagger = z^* + A^{-1}\, \nabla_z \Psi(z^*, \varphi), \qquad
          \frac{dz^\dagger}{d\varphi} = A^{-1}\, \partial_\varphi \nabla_z \Psi(z^*, \varphi)

with z* and A held constant leaves z* where it is and has the slope of the implicit function
theorem. Its second derivative is not that of z*. Where the likelihood is Gaussian in θ one step
from z = 0 is the mode in closed form, and nothing is held constant: every derivative is right.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hierbayes.adaptation.base import PointAdaptation
from hierbayes.adaptation.laplace import AtMode
from hierbayes.adaptation.mode import LogJoint, newton_step, trouble
from hierbayes.adaptation.posterior import Point
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.rows import Whole
from hierbayes.sharding import gathered
from hierbayes.tasks import Task, Tasks
from hierbayes.tasks.layout import on_devices


@dataclass(frozen=True)
class Proximal(PointAdaptation):
    """A(D; φ) = the mode of p(θ | D, φ), a point."""

    name = "MAP"

    def steps(
        self, model: HierarchicalModel, phi: dict[str, Any], rows: Task, task_of_row: Any
    ) -> jax.Array:
        """θ* of every task (J, d), differentiable in φ: once, or ever where Gaussian in θ."""
        return _adapt(model, phi, rows, task_of_row)[0]

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Point:
        """θ* of every task; ``remarks`` name those where Newton's method has not reached it."""
        plain = model.without_encoder()
        with float64():
            rows = on_devices(model.likelihood.arrange(tasks), tasks)
            theta, *went = gathered(_points(plain, dict(phi), *rows), tasks.num_tasks)
        return Point(theta, remarks=trouble(tasks.names, *went))


def _adapt(model: HierarchicalModel, phi: dict[str, Any], rows: Task, of_row: Any) -> Any:
    """θ* (J, d), and whether Newton's method converged, on a maximum, (J,) each."""
    whole = Whole.of(rows, of_row)
    if not model.likelihood.gaussian_in_theta:
        found = AtMode.at(model, phi, whole)
        mode = found.mode
        return found.tasks.theta(mode.z).T, mode.converged, mode.definite
    tasks = LogJoint.at(model, phi, whole)
    at = tasks.bend(jnp.zeros_like(tasks.location))
    z, fine = newton_step(at.curvature, at.slope)[0], jnp.ones(whole.num_tasks, bool)
    return tasks.theta(z).T, fine, fine


@functools.partial(jax.jit, static_argnums=0)
def _points(model: HierarchicalModel, phi: dict[str, Any], rows: Task, of_row: Any) -> Any:
    return _adapt(model, phi, rows, of_row)
