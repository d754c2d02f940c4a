r"""Draws of θ_j given φ where the posterior is not Gaussian: short independence chains.

.. math:: \theta' \sim t_8(\theta_j^*, A_j^{-1}), \qquad
          \Pr(\text{accept}) = \min\left(1, \frac{w(\theta')}{w(\theta)}\right), \qquad
          w = \frac{p(D_j, \theta \mid \varphi)}{t_8(\theta)}

After K steps from a draw of the t a chain is off by about E[(1 − w̄ / max(w, w̄))^K] in total
variation: a first batch, whose chains are long, tells how many steps the others need. Reference:
Smith and Tierney (1996), Exact transition probabilities for the independence Metropolis sampler.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from hierbayes.adaptation.mode import LogJoint, damped_newton
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import cholesky, float64, one_behind, solve_upper
from hierbayes.rows import Rows, Whole
from hierbayes.sharding import on_device
from hierbayes.tasks import Tasks

DEGREES_OF_FREEDOM = 8.0

MOST_STEPS, LEAST_STEPS = 12, 3
"""Of a chain."""

OFF = 1e-3
"""Total variation, averaged over φ, that a chain's last state may be off in any task."""

LEAST_MOVES = 0.3
"""Share of proposals that a chain must accept for a draw to have forgotten its start."""

ROWS_AT_ONCE = 200_000
"""Draws × rows that are worked on together."""


@functools.partial(jax.jit, static_argnums=0)
def _chains(
    model: HierarchicalModel, rows: Rows | Whole, phis: dict[str, Any], white: Any, stretch: Any,
    log_uniform: Any, count: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """After ``count`` steps, of each φ and task: θ (S, d, J), moves (S, J), log w (S, K, J).

    Proposals are t around the mode, from ``white`` (S, K, d, J) and ``stretch`` (S, K, J).
    """

    def at(phi: dict[str, Any]) -> LogJoint:
        return LogJoint.at(model, phi, rows)

    middle = at(jax.tree.map(lambda values: values.mean(0), phis))
    near = damped_newton(middle, jnp.zeros_like(middle.location))
    t = DEGREES_OF_FREEDOM

    def one(phi: dict[str, Any], n: Any, s: Any, u: Any) -> tuple[Any, ...]:
        tasks = at(phi)
        z = damped_newton(tasks, near)
        factor = cholesky(tasks.bend(z).curvature)
        d, num_tasks = z.shape

        def step(k: Any, state: Any) -> Any:
            current, weight, moved, weights = state
            noise = n[k] * s[k]
            trial = z + solve_upper(factor, noise)
            log_q = -0.5 * (t + d) * jnp.log1p((noise**2).sum(0) / t)
            trial_weight = tasks.value(trial) - log_q
            goes = u[k] < trial_weight - weight
            return (
                jnp.where(goes, trial, current), jnp.where(goes, trial_weight, weight),
                moved + goes, weights.at[k].set(trial_weight),
            )  # fmt: skip

        zero = jnp.zeros(num_tasks)
        first = (z, zero - jnp.inf, zero, jnp.zeros((len(n), num_tasks)))
        last, _, moved, weights = jax.lax.fori_loop(0, count, step, first)
        return tasks.theta(last), moved, weights

    return jax.vmap(one)(phis, white, stretch, log_uniform)


def steps_needed(log_weights: np.ndarray) -> int:
    """The fewest steps after which no task is off by more than ``OFF``, from log w (S, K, J)."""
    mean = special.logsumexp(log_weights, axis=1, keepdims=True) - np.log(log_weights.shape[1])
    excess = log_weights - mean
    share = np.exp(excess) / log_weights.shape[1]
    stays = -np.expm1(-np.maximum(excess, 0.0))
    for count in range(LEAST_STEPS, MOST_STEPS):
        if (share * stays**count).sum(1).mean(0).max(initial=0.0) < OFF:
            return count
    return MOST_STEPS


def draws_given(
    model: HierarchicalModel,
    rows: Rows | Whole,
    phis: dict[str, np.ndarray],
    tasks: Tasks,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """One θ of every task for each of the S values of φ, (S, d, J), and the share of moves (J,)."""
    size, d, num_tasks = len(next(iter(phis.values()))), len(tasks.coef), tasks.num_tasks
    cells = max(rows.num_cells, num_tasks)
    most = int(np.clip(ROWS_AT_ONCE // cells, 1, size))
    theta, moved = np.empty((size, d, num_tasks)), np.zeros(num_tasks)
    starts = [min(start, size - most) for start in range(0, size, most)]
    steps = MOST_STEPS

    def begun(start: int) -> tuple[int, int, Any]:
        shape, own = (most, MOST_STEPS, rows.num_tasks), slice(num_tasks)
        white, (stretch, uniform) = np.ones((*shape[:2], d, shape[2])), np.ones((2, *shape))
        white[:, :steps, :, own] = rng.standard_normal((most, steps, d, num_tasks))
        chi2 = rng.chisquare(DEGREES_OF_FREEDOM, (most, steps, num_tasks))
        stretch[:, :steps, own] = np.sqrt(DEGREES_OF_FREEDOM / chi2)
        uniform[:, :steps, own] = np.log(rng.random((most, steps, num_tasks)))
        some = {name: value[start : start + most] for name, value in phis.items()}
        return start, steps, _chains(model, rows, some, white, stretch, uniform, steps)

    with float64():
        rows = on_device(rows)
        first = begun(starts[0])
        if len(starts) > 1:
            steps = steps_needed(np.asarray(first[2][2])[..., :num_tasks])
        later = (begun(start) for start in starts[1:])
        for start, count, (found, moves, _) in one_behind(itertools.chain([first], later)):
            theta[start : start + most] = np.asarray(found)[..., :num_tasks]
            share = (np.asarray(moves).mean(0) - 1) / (count - 1) / len(starts)
            moved += share[:num_tasks]
    return theta, moved
