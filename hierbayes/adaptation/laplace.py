r"""The Laplace posterior of every task: a normal at the mode, as wide as the curvature there says.

.. math::

    z_j^* = \arg\max_z \left[\log p(D_j \mid m_j + L z, \varphi) - \tfrac12 \lVert z \rVert^2
        \right], \qquad
    \theta_j \mid D_j, \varphi \approx N\!\left(m_j + L z_j^*,\; L A_j^{-1} L^\top\right), \quad
    A_j = I + L^\top H_j L

with Σ = L Lᵀ, prior mean m_j and H_j = −∇² log p(D_j | θ) at the mode. Its normaliser is Laplace's
approximation of the evidence,

.. math:: \log p(D_j \mid \varphi) \approx \log p(D_j \mid \theta_j^*, \varphi)
          - \tfrac12 \lVert z_j^* \rVert^2 - \tfrac12 \log |A_j|

Exact where the likelihood is Gaussian in θ. L may be singular: in a direction with τ = 0 the
posterior is a point.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.base import Integrable, TaskMoments
from hierbayes.adaptation.mode import LogJoint, Mode, damped_newton, mode_near, trouble
from hierbayes.errors import announce
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64, matmul, solve_upper
from hierbayes.rows import Rows, Whole, rows_of
from hierbayes.sharding import gathered, rung
from hierbayes.tasks import Tasks
from hierbayes.tasks.layout import on_devices

ROWS_AT_ONCE = 4_000_000
"""Rows × values of φ that a batch of draws holds at most."""


class AtMode(NamedTuple):
    """The normal at the mode of every task; ``near`` (d, J), held, is where a climb has ended."""

    tasks: LogJoint
    near: jax.Array

    @classmethod
    def at(
        cls, model: HierarchicalModel, phi: dict[str, Any], rows: Rows | Whole, start: Any = None
    ) -> AtMode:
        """Under φ, climbed from ``start`` or from the prior's location."""
        held = LogJoint.at(model, *jax.lax.stop_gradient((phi, rows)))
        start = jnp.zeros_like(held.location) if start is None else start
        near = jax.lax.stop_gradient(damped_newton(held, start))
        return cls(LogJoint.at(model, phi, rows), near)

    @property
    def mode(self) -> Mode:
        """z*, differentiable in φ to second order."""
        return mode_near(self.tasks, self.near)

    @property
    def log_normaliser(self) -> jax.Array:
        """Laplace's approximation of log p(D_j | φ) (J,), right to second order in φ."""
        return self.mode.log_integral + self.tasks.rows.constant

    @property
    def start(self) -> jax.Array:
        """z* (d, J)."""
        return jax.lax.stop_gradient(self.mode.z)

    @property
    def converged(self) -> jax.Array:
        """Whether Newton's method has ended on a mode, (J,) of bool."""
        return self.mode.converged

    def mean_and_root(self) -> tuple[jax.Array, jax.Array]:
        """Means (d, J) and root covariances C (d, d, J), with C Cᵀ the covariance."""
        mode, d = self.mode, len(self.near)
        units = jnp.broadcast_to(jnp.eye(d)[:, :, None], mode.factor.shape)
        root = matmul(self.tasks.roots, solve_upper(mode.factor, units))
        return self.tasks.theta(mode.z), root

    def moments(self) -> TaskMoments:
        """Mode and covariance of every θ_j; NaN where the curvature is not positive."""
        (mean, root), mode = self.mean_and_root(), self.mode
        covariance = jnp.einsum("ikj,lkj->jil", root, root)
        return TaskMoments(mean.T, covariance, self.log_normaliser, mode.converged, mode.definite)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _draws(
    model: HierarchicalModel,
    phis: dict[str, Any],
    rows: Rows | Whole,
    key: jax.Array,
    batch: int,
    num_tasks: int,
) -> Any:
    """A draw a value of φ; beyond ``num_tasks`` stand tasks that only fill up the devices."""

    def one(inputs: Any) -> Any:
        phi, k = inputs
        found = AtMode.at(model, phi, rows)
        (mean, root), mode = found.mean_and_root(), found.mode
        d, size = mean.shape
        white = jax.random.normal(k, (num_tasks, d), mean.dtype)
        white = jnp.pad(white, ((0, size - num_tasks), (0, 0)))
        draw = mean.T + jnp.einsum("klj,jl->jk", root, white)
        return draw, mode.converged, mode.definite

    keys = jax.random.split(key, jax.tree.leaves(phis)[0].shape[0])
    return jax.lax.map(one, (phis, keys), batch_size=batch)


@dataclass(frozen=True)
class Laplace(Integrable):
    """A(D; φ) ≈ p(θ | D, φ): the normal at the mode; exact where log p(D | θ) is quadratic."""

    name = "Laplace posterior"

    def lay_out(self, model: HierarchicalModel, tasks: Tasks) -> Rows | Whole:
        """Rows, alike ones added up; spread over devices as they are."""
        if tasks.sharding is None:
            return rows_of(tasks, model.likelihood)
        return Whole.of(*on_devices(model.likelihood.arrange(tasks), tasks))

    def begin(self, tasks: Tasks) -> np.ndarray:
        """The prior's location."""
        return np.zeros((len(tasks.coef), rung(tasks.num_tasks)))

    @staticmethod
    def given(
        model: HierarchicalModel, phi: dict[str, Any], data: Rows | Whole, start: Any = None
    ) -> AtMode:
        """The normal of every task."""
        return AtMode.at(model, phi, data, start)

    def draws(
        self, model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray], key: jax.Array
    ) -> np.ndarray:
        """Draws (S, J, d) from the normal at the mode, one for each of the S values of φ."""
        batch = int(np.clip(ROWS_AT_ONCE // max(tasks.num_rows, 1), 1, 64))
        plain, count = model.without_encoder(), tasks.num_tasks
        with float64():
            found = _draws(plain, dict(phis), self.lay_out(plain, tasks), key, batch, count)
            draws, *went = gathered(found, count, axis=1)
        announce(trouble(tasks.names, *went))
        return draws
