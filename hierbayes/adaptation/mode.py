r"""Every task's log joint density at one φ, and its mode, by damped Newton steps, all at once.

.. math::

    \Psi_j(z) = \log p(D_j \mid m_j + L z, \varphi) - \tfrac12 z^\top Q z, \qquad
    z_j^* = \arg\max_z \Psi_j(z)

With Q = I and Σ = L Lᵀ the mode is the MAP estimate under N(m, Σ). Whitened by L, −∇²Ψ_j ≥ I for
log-concave families: τ → 0 is an ordinary point. With L = I and Q = P it is the MAP estimate under
any precision, with Q = 0 the maximum of the likelihood.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.errors import listing
from hierbayes.likelihoods import Likelihood
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import cholesky, log_diagonal_sum, matmul, matvec, solve_lower, solve_upper
from hierbayes.rows import Curved, Rows, Whole

MAX_STEPS = 60
"""Of Newton's method; damped, a log-concave task takes five to ten."""

NEAR = 1e-9
"""What a Newton step may still add to Ψ_j where the climb ends: two more follow, undamped."""

ACCEPTED = 1e-10
"""The same at the mode, above which it is said not to have been reached."""


class LogJoint(NamedTuple):
    """Every Ψ_j at one φ: m_j (d, J), L (d, d) or (d, d, J), Q (d, d, J) or None, which is I."""

    likelihood: Likelihood
    rows: Rows | Whole
    phi: dict[str, Any]
    location: jax.Array
    root: Any
    penalty: Any = None

    @classmethod
    def at(cls, model: HierarchicalModel, phi: dict[str, Any], rows: Rows | Whole) -> LogJoint:
        """Under the prior at φ."""
        location, likelihood = model.prior.location(phi, rows.task_predictors).T, model.likelihood
        root = model.prior.scale_tril(phi)
        return cls(likelihood, rows.under(likelihood, phi), phi, location, root)

    @property
    def roots(self) -> Any:
        """L (d, d, J) or (d, d, 1)."""
        return self.root if jnp.ndim(self.root) == 3 else self.root[:, :, None]

    def theta(self, z: jax.Array) -> jax.Array:
        """θ_j = m_j + L z_j, (d, J)."""
        return self.location + matvec(self.roots, z)

    def _pulled(self, z: jax.Array) -> jax.Array:
        """Q z."""
        return z if self.penalty is None else matvec(self.penalty, z)

    def value(self, z: jax.Array) -> jax.Array:
        """Ψ_j (J,)."""
        fit = self.rows.log_likelihood(self.likelihood, self.theta(z), self.phi)
        return fit - 0.5 * (z * self._pulled(z)).sum(0)

    def bend(self, z: jax.Array, *, damped: bool = False) -> Curved:
        """Ψ_j to second order at z; ``damped`` where a step has to climb from afar."""
        at = self.rows.to_second_order(self.likelihood, self.theta(z), self.phi, damped=damped)
        up, pulled = jnp.swapaxes(self.roots, 0, 1), self._pulled(z)
        penalty = jnp.eye(len(z))[:, :, None] if self.penalty is None else self.penalty
        return Curved(
            at.value - 0.5 * (z * pulled).sum(0),
            matvec(up, at.slope) - pulled,
            matmul(matmul(up, at.curvature), self.roots) + penalty,
        )


class Mode(NamedTuple):
    """z* (d, J), the root of A_j = −∇²Ψ_j there (d, d, J), Ψ_j (J,), and what is left to gain (J,).

    The root is NaN where Ψ_j bends upwards. ``reach`` (K, J) says how far rays from the modes go,
    where nodes of a quadrature stand on such.
    """

    z: jax.Array
    factor: jax.Array
    base: jax.Array
    gain: jax.Array
    reach: Any = None

    def node(self, place: jax.Array) -> jax.Array:
        """z* + U t (d, J), with A⁻¹ = U Uᵀ."""
        wide = jnp.broadcast_to(place[:, None], self.z.shape)
        return self.z + solve_upper(self.factor, wide)

    @property
    def converged(self) -> jax.Array:
        """Whether Newton's method has ended on a maximum, (J,) of bool."""
        return self.gain < ACCEPTED

    @property
    def definite(self) -> jax.Array:
        """Whether Ψ_j bends downwards there, (J,) of bool."""
        return jnp.isfinite(self.factor[-1, -1])

    @property
    def log_integral(self) -> jax.Array:
        """Laplace's approximation of log ∫ exp Ψ_j(z) dz / (2π)^{d/2}, (J,)."""
        return self.base - log_diagonal_sum(self.factor)


def newton_step(curvature: jax.Array, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Newton step and what it would add to Ψ_j."""
    factor = cholesky(curvature)
    white = solve_lower(factor, slope)
    return solve_upper(factor, white), 0.5 * (white**2).sum(0)


def damped_newton(tasks: LogJoint, start: jax.Array) -> jax.Array:
    """Near the mode of every Ψ_j, z (d, J), by Newton steps halved until they rise."""
    num_tasks, concave = start.shape[1], tasks.likelihood.concave_in_theta

    def body(state: Any) -> Any:
        z, share, _, count = state
        at = tasks.bend(z, damped=not concave)
        step, gain = newton_step(at.curvature, at.slope)
        going = gain > NEAR
        trial = z + share * step
        # where the value cannot tell, the step is right
        rises = tasks.value(trial) >= at.value - 1e-9 * (1 + jnp.abs(at.value))
        z = jnp.where(going & rises, trial, z)
        share = jnp.where(rises, jnp.minimum(1.0, 2 * share), 0.5 * share)
        # a shortened step may leave much to gain, a whole one squares what was left
        done = ~going | (concave & rises & (share >= 1.0) & (gain < 1e-4))
        return z, share, done, count + 1

    def unfinished(state: Any) -> Any:
        return ~state[2].all() & (state[3] < MAX_STEPS)

    state = (start, jnp.ones(num_tasks), jnp.zeros(num_tasks, bool), 0)
    return jax.lax.while_loop(unfinished, body, state)[0]


def after_newton(tasks: LogJoint, z: jax.Array) -> jax.Array:
    """Two undamped Newton steps from where a climb has ended.

    Each doubles the order to which the mode depends on φ as it should: from a z that is held they
    make its first two derivatives right.
    """

    def step(z: jax.Array, _: None) -> tuple[jax.Array, None]:
        at = tasks.bend(z)
        move = newton_step(at.curvature, at.slope)[0]
        return z + jnp.where(jnp.isfinite(move), move, 0.0), None

    return jax.lax.scan(step, z, None, 2)[0]


def mode_near(tasks: LogJoint, z: jax.Array) -> Mode:
    """The mode, from where a climb has ended; differentiable in φ, with z held."""
    z = after_newton(tasks, z)
    at = tasks.bend(z)
    factor = cholesky(at.curvature)
    return Mode(z, factor, at.value, 0.5 * (solve_lower(factor, at.slope) ** 2).sum(0))


def find_mode(tasks: LogJoint, start: jax.Array) -> Mode:
    """The mode of every Ψ_j from ``start`` z (d, J)."""
    return mode_near(tasks, damped_newton(tasks, start))


def trouble(names: np.ndarray, converged: Any, definite: Any) -> tuple[str, ...]:
    """What to say of tasks whose climb has not ended on a maximum; a task's axis is the last."""
    bent = ~np.asarray(definite).reshape(-1, len(names)).all(0)
    stopped = ~np.asarray(converged).reshape(-1, len(names)).all(0) & ~bent
    remarks = []
    if stopped.any():
        remarks.append(
            f"Newton's method has not converged in {stopped.sum()} of {len(names)} tasks "
            f"({listing(names[stopped].tolist(), 3)}): their theta is not yet the mode"
        )
    if bent.any():
        remarks.append(
            f"the log posterior of {bent.sum()} of {len(names)} tasks "
            f"({listing(names[bent].tolist(), 3)}) is not concave where Newton's method ended: "
            "no maximum was found there, and no covariance exists"
        )
    return tuple(remarks)
