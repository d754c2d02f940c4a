r"""The mode of every task's penalised log likelihood, by damped Newton steps, all tasks at once.

.. math:: z_j^* = \arg\max_z \Psi_j(z), \qquad
          \Psi_j(z) = \log p(D_j \mid m_j + L z, \varphi) - \tfrac12 z^\top Q z

With Q = I and Σ = L Lᵀ this is the MAP estimate under N(m, Σ), well conditioned as Σ → 0; with
L = I and Q = P the one under any precision P. A step is halved until Ψ_j rises: undamped Newton
diverges on rare events.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.curvature import Kind, curvatures_at, slopes
from hierbayes.errors import listing
from hierbayes.likelihoods.base import sum_by_task
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Task

MAX_STEPS = 100
HALVINGS = 40
TOLERANCE = 1e-20
"""A Newton step that would raise Ψ_j by less than this, over 1 + |Ψ_j|, ends the climb."""

ACCEPTED = 1e-10
"""The same at the point reached, above which the climb is said not to have converged."""


class Mode(NamedTuple):
    """Where every task's climb ended.

    ``theta`` (J, d), ``z`` (J, d); ``curvature`` (J, d, d) of −Ψ_j in z; ``gain`` (J,): what one
    more Newton step would add to Ψ_j; ``definite`` (J,): whether the curvature is positive there.
    """

    theta: jax.Array
    z: jax.Array
    curvature: jax.Array
    gain: jax.Array
    definite: jax.Array

    @property
    def converged(self) -> jax.Array:
        """(J,) of bool."""
        return self.definite & (self.gain < ACCEPTED)


def climb(
    model: HierarchicalModel,
    phi: dict[str, Any],
    rows: Task,
    task_of_row: Any,
    location: jax.Array,
    root: Any,
    penalty: Any,
    start: jax.Array,
    kind: Kind = "hessian",
) -> Mode:
    """The mode of Ψ_j from ``start`` z (J, d); L and Q are (d, d), or (J, d, d), one a task."""
    num_tasks, d = location.shape
    root = jnp.broadcast_to(root, (num_tasks, d, d))
    penalty = jnp.broadcast_to(penalty, (num_tasks, d, d))

    def theta_of(z: jax.Array) -> jax.Array:
        return location + jnp.einsum("jkl,jl->jk", root, z)

    def value(z: jax.Array) -> jax.Array:
        each = model.likelihood.log_likelihood_of_rows(theta_of(z), phi, rows, task_of_row)
        fit = sum_by_task(each, task_of_row, num_tasks)
        return fit - 0.5 * jnp.einsum("jk,jkl,jl->j", z, penalty, z)

    def newton(z: jax.Array) -> Any:
        theta = theta_of(z)
        slope = jnp.einsum("jkl,jk->jl", root, slopes(model, phi, rows, task_of_row, theta))
        slope = slope - jnp.einsum("jkl,jl->jk", penalty, z)
        bend = curvatures_at(model, phi, rows, task_of_row, theta, kind)
        bend = jnp.einsum("jki,jkl,jlm->jim", root, bend, root) + penalty
        values, vectors = jnp.linalg.eigh(bend)
        # where the surface bends upwards a step along |λ| still climbs
        floor = 1e-12 * jnp.abs(values).max(-1, keepdims=True) + 1e-300
        along = jnp.einsum("jkl,jk->jl", vectors, slope)
        scaled = along / jnp.maximum(jnp.abs(values), floor)
        gain = 0.5 * (along * scaled).sum(-1)
        return jnp.einsum("jkl,jl->jk", vectors, scaled), gain, bend, values[:, 0] > 0

    def body(state: Any) -> Any:
        z, count, *_ = state
        step, gain, bend, definite = newton(z)
        before = value(z)
        going = gain > TOLERANCE * (1 + jnp.abs(before))

        def halve(search: Any) -> Any:
            share, falling, halvings = search
            share = jnp.where(falling, 0.5 * share, share)
            after = value(z + share[:, None] * step)
            rises = after >= before - 1e-14 * (1 + jnp.abs(before))
            return share, going & ~rises, halvings + 1

        def falls(search: Any) -> Any:
            return search[1].any() & (search[2] <= HALVINGS)

        # twice the step, halved before it is first tried
        share, *_ = jax.lax.while_loop(falls, halve, (jnp.full(num_tasks, 2.0), going, 0))
        z = jnp.where(going[:, None], z + share[:, None] * step, z)
        return z, count + 1, going.any(), gain, bend, definite

    def unfinished(state: Any) -> Any:
        return state[2] & (state[1] < MAX_STEPS)

    unknown = (jnp.full(num_tasks, jnp.inf), penalty, jnp.zeros(num_tasks, bool))
    state = (start, 0, jnp.asarray(True), *unknown)
    z, _, _, gain, bend, definite = jax.lax.while_loop(unfinished, body, state)
    return Mode(theta_of(z), z, bend, gain, definite)


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
