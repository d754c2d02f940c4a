r"""The Laplace posterior of every task: a normal at the mode, as wide as the curvature there says.

.. math::

    z_j^* = \arg\max_z \left[\log p(D_j \mid m_j + L z, \varphi) - \tfrac12 \lVert z \rVert^2
        \right], \qquad
    \theta_j \mid D_j, \varphi \approx N\!\left(m_j + L z_j^*,\; L A_j^{-1} L^\top\right), \quad
    A_j = I + L^\top H_j L

with Σ = L Lᵀ, prior mean m_j and H_j = −∇² log p(D_j | θ) at the mode. Exact where the likelihood
is Gaussian in θ. L may be singular: in a direction with τ = 0 the posterior is a point.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.base import Adaptation
from hierbayes.adaptation.newton import Mode, climb, trouble
from hierbayes.adaptation.posterior import Normal
from hierbayes.errors import announce
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.sharding import gathered
from hierbayes.tasks import Task, Tasks
from hierbayes.tasks.layout import on_devices

ROWS_AT_ONCE = 4_000_000
"""Rows × values of φ that a batch of draws holds at most."""


class Posterior(NamedTuple):
    """Means (J, d), root covariances C (J, d, d) with C Cᵀ the covariance, and how it went (J,)."""

    mean: jax.Array
    root: jax.Array
    converged: jax.Array
    definite: jax.Array


def mode(model: HierarchicalModel, phi: dict[str, Any], rows: Task, task_of_row: Any) -> Mode:
    """The mode of every task's posterior in whitened coordinates, from the prior's location."""
    location = model.prior.location(phi, rows.task_predictors)
    root = model.prior.scale_tril(phi)
    start = jnp.zeros_like(location)
    identity = jnp.eye(location.shape[-1], dtype=location.dtype)
    return climb(model, phi, rows, task_of_row, location, root, identity, start)


def posterior(
    model: HierarchicalModel, phi: dict[str, Any], rows: Task, task_of_row: Any
) -> Posterior:
    """Mode and root covariance of every task; NaN where the curvature is not positive."""
    found = mode(model, phi, rows, task_of_row)
    values, vectors = jnp.linalg.eigh(found.curvature)
    definite = found.definite[:, None, None]
    values = jnp.where(definite[..., 0], values, 1.0)
    white = vectors / jnp.sqrt(values)[:, None, :]
    root = jnp.einsum("kl,jlm->jkm", model.prior.scale_tril(phi), white)
    return Posterior(
        found.theta, jnp.where(definite, root, jnp.nan), found.converged, found.definite
    )


@functools.partial(jax.jit, static_argnums=0)
def _posterior(model: HierarchicalModel, phi: dict[str, Any], rows: Task, of_row: Any) -> Any:
    found = posterior(model, phi, rows, of_row)
    return found._replace(root=_square(found.root))


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _draws(
    model: HierarchicalModel,
    phis: dict[str, Any],
    rows: Task,
    of_row: Any,
    key: jax.Array,
    batch: int,
    num_tasks: int,
) -> Any:
    """A draw a value of φ; beyond ``num_tasks`` stand tasks that only fill up the devices."""

    def one(inputs: Any) -> Any:
        phi, k = inputs
        found = posterior(model, phi, rows, of_row)
        size = len(found.mean)
        white = jax.random.normal(k, (num_tasks, found.mean.shape[1]), found.mean.dtype)
        white = jnp.pad(white, ((0, size - num_tasks), (0, 0)))
        draw = found.mean + jnp.einsum("jkl,jl->jk", found.root, white)
        return draw, found.converged, found.definite

    keys = jax.random.split(key, jax.tree.leaves(phis)[0].shape[0])
    return jax.lax.map(one, (phis, keys), batch_size=batch)


@functools.partial(jax.jit, static_argnums=0)
def _moments(model: HierarchicalModel, phis: dict[str, Any], rows: Task, of_row: Any) -> Any:
    """Mean and covariance of every θ_j over the S values of φ, without keeping draws."""

    def add(sums: Any, phi: dict[str, Any]) -> tuple[Any, None]:
        found = posterior(model, phi, rows, of_row)
        second = _square(found.root) + found.mean[:, :, None] * found.mean[:, None]
        return (
            sums[0] + found.mean, sums[1] + second,
            sums[2] & found.converged, sums[3] & found.definite,
        ), None  # fmt: skip

    num_tasks, d = rows.task_predictors.shape[0], phis["mu"].shape[-1]
    fine = jnp.ones(num_tasks, bool)
    zero = (jnp.zeros((num_tasks, d)), jnp.zeros((num_tasks, d, d)), fine, fine)
    (first, second, converged, definite), _ = jax.lax.scan(add, zero, phis)
    size = jax.tree.leaves(phis)[0].shape[0]
    mean = first / size
    return mean, second / size - mean[:, :, None] * mean[:, None], converged, definite


def _square(root: jax.Array) -> jax.Array:
    return jnp.einsum("jkl,jml->jkm", root, root)


@dataclass(frozen=True)
class Laplace(Adaptation):
    """A(D; φ) ≈ p(θ | D, φ): the normal at the mode; exact where log p(D | θ) is quadratic."""

    name = "Laplace posterior"

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Normal:
        """Modes and covariances; ``remarks`` name the tasks where no mode was reached."""
        with float64():
            rows = on_devices(model.likelihood.arrange(tasks), tasks)
            mean, covariance, converged, definite = gathered(
                _posterior(model.without_encoder(), dict(phi), *rows), tasks.num_tasks
            )
        return Normal(mean, covariance, remarks=trouble(tasks.names, converged, definite))

    def draws(
        self, model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray], key: jax.Array
    ) -> np.ndarray:
        """Draws (S, J, d) from the normal at the mode, one for each of the S values of φ."""
        batch = int(np.clip(ROWS_AT_ONCE // max(tasks.num_rows, 1), 1, 64))
        plain = model.without_encoder()
        with float64():
            rows, count = on_devices(model.likelihood.arrange(tasks), tasks), tasks.num_tasks
            found = _draws(plain, dict(phis), *rows, key, batch, count)
            draws, *went = gathered(found, count, axis=1)
        announce(trouble(tasks.names, *went))
        return draws

    def moments(
        self, model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean (J, d) and covariance (J, d, d), averaged over the values of φ."""
        plain = model.without_encoder()
        with float64():
            rows = on_devices(model.likelihood.arrange(tasks), tasks)
            mean, covariance, *went = gathered(_moments(plain, dict(phis), *rows), tasks.num_tasks)
        announce(trouble(tasks.names, *went))
        return mean, covariance
