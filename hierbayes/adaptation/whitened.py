r"""Every task's log posterior in whitened coordinates, and its mode.

.. math::

    \Psi_j(z) = \log p(D_j \mid m_j + L z, \varphi) - \tfrac12 \lVert z \rVert^2, \qquad
    \Sigma = L L^\top, \qquad z_j^* = \arg\max_z \Psi_j(z)

Whitened by L, −∇²Ψ_j ≥ I for log-concave families: τ → 0 is an ordinary point.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hierbayes.likelihoods import Likelihood
from hierbayes.numerics import cholesky, matmul, matvec, solve_lower, solve_upper
from hierbayes.priors import Prior
from hierbayes.rows import Curved, Rows, Whole

MAX_STEPS = 60
"""Of Newton's method; damped, a log-concave task takes five to ten."""

NEAR = 1e-9
"""What a Newton step may still add to Ψ_j where the climb ends: two more follow, undamped."""


class Climbed(NamedTuple):
    """``z`` (d, J) and whether Newton's method has ended there, (J,)."""

    z: jax.Array
    converged: jax.Array


class Whitened(NamedTuple):
    """Every Ψ_j at one φ: m_j (d, J), L (d, d)."""

    likelihood: Likelihood
    rows: Rows | Whole
    phi: dict[str, Any]
    location: jax.Array
    root: jax.Array

    @classmethod
    def at(
        cls, likelihood: Likelihood, prior: Prior, rows: Rows | Whole, phi: dict[str, Any]
    ) -> Whitened:
        """The tasks at φ."""
        location = prior.location(phi, rows.task_predictors).T
        return cls(likelihood, rows.under(likelihood, phi), phi, location, prior.scale_tril(phi))

    def theta(self, z: jax.Array) -> jax.Array:
        """θ_j = m_j + L z_j, (d, J)."""
        return self.location + matvec(self.root[:, :, None], z)

    def value(self, z: jax.Array) -> jax.Array:
        """Ψ_j (J,)."""
        fit = self.rows.log_likelihood(self.likelihood, self.theta(z), self.phi)
        return fit - 0.5 * (z**2).sum(0)

    def bend(self, z: jax.Array, *, damped: bool = False) -> Curved:
        """Ψ_j to second order at z; ``damped`` where a step has to climb from afar."""
        at = self.rows.to_second_order(self.likelihood, self.theta(z), self.phi, damped=damped)
        root = self.root[:, :, None]
        up = jnp.swapaxes(root, 0, 1)
        return Curved(
            at.value - 0.5 * (z**2).sum(0),
            matvec(up, at.slope) - z,
            matmul(matmul(up, at.curvature), root) + jnp.eye(len(z))[:, :, None],
        )


def newton_step(curvature: jax.Array, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Newton step and what it would add to Ψ_j."""
    factor = cholesky(curvature)
    white = solve_lower(factor, slope)
    return solve_upper(factor, white), 0.5 * (white**2).sum(0)


def climb(tasks: Whitened, start: jax.Array) -> Climbed:
    """The mode of every Ψ_j from ``start`` (d, J), by Newton steps halved until they rise."""
    num_tasks = start.shape[1]

    def body(state: Any) -> Any:
        z, share, _, _, count = state
        at = tasks.bend(z, damped=not tasks.likelihood.log_concave)
        step, gain = newton_step(at.curvature, at.slope)
        going = gain > NEAR
        trial = z + share * step
        # where the value cannot tell, the step is right
        rises = tasks.value(trial) >= at.value - 1e-9 * (1 + jnp.abs(at.value))
        z = jnp.where(going & rises, trial, z)
        share = jnp.where(rises, jnp.minimum(1.0, 2 * share), 0.5 * share)
        # a shortened step may leave much to gain, a whole one squares what was left
        done = ~going | (rises & (share >= 1.0) & (gain < 1e-4))
        return z, share, done, gain, count + 1

    def unfinished(state: Any) -> Any:
        return ~state[2].all() & (state[4] < MAX_STEPS)

    ones = jnp.ones(num_tasks)
    state = (start, ones, jnp.zeros(num_tasks, bool), jnp.inf * ones, 0)
    z, _, done, _, _ = jax.lax.while_loop(unfinished, body, state)
    return Climbed(z, done)


class Stand(NamedTuple):
    """Modes z* (d, J), the roots of A_j (d, d, J) and Ψ_j(z*) (J,), around which nodes stand.

    ``reach`` (K, J) says how far rays from the modes go, where nodes stand on such.
    """

    z: jax.Array
    factor: jax.Array
    base: jax.Array
    reach: Any = None

    def node(self, place: jax.Array) -> jax.Array:
        """z* + U t (d, J)."""
        wide = jnp.broadcast_to(place[:, None], self.z.shape)
        return self.z + solve_upper(self.factor, wide)


def after_newton(tasks: Whitened, z: jax.Array) -> jax.Array:
    """Two undamped Newton steps from where a climb has ended."""
    for _ in range(2):
        at = tasks.bend(z)
        z = z + newton_step(at.curvature, at.slope)[0]
    return z


def at_modes(tasks: Whitened, z: jax.Array) -> Stand:
    """Where nodes stand, from where a climb has ended."""
    z = after_newton(tasks, z)
    at = tasks.bend(z)
    return Stand(z, cholesky(at.curvature), at.value)
