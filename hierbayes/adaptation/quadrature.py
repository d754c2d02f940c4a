r"""The posterior of a task that is not Gaussian, by quadrature around its mode.

.. math::

    z_j^* = \arg\max_z \Psi_j(z), \qquad
    \Psi_j(z) = \log p(D_j \mid m_j + L z, \varphi) - \tfrac12 \lVert z \rVert^2, \qquad
    E[g(\theta_j) \mid D_j, \varphi] \approx \textstyle\sum_q \pi_{jq}\, g(m_j + L z_{jq})

with Σ = L Lᵀ, z_q = z* + U t_q, A⁻¹ = U Uᵀ for A = −∇²Ψ_j(z*), and
π_q ∝ w̄_q exp(Ψ_j(z_q) + ½ |t_q|²) from the nodes t and weights w̄ of Gauss and Hermite. Whitened by
L, A ≥ I for log-concave families: τ → 0 is an ordinary point.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.base import Adaptation, Adapted
from hierbayes.errors import announce, listing
from hierbayes.likelihoods import Likelihood
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import (
    as_rng,
    cholesky,
    float64,
    matmul,
    matvec,
    solve_lower,
    solve_upper,
)
from hierbayes.priors import Prior
from hierbayes.rows import Curved, Rows, Whole, rows_of
from hierbayes.tasks import Tasks

MAX_STEPS = 60
"""Of Newton's method; damped, a log-concave task takes five to ten."""

NEAR = 1e-9
"""What a Newton step may still add to Ψ_j where the climb ends: two more follow, undamped."""


MOST_NODES = {1: 61, 2: 31**2, 3: 13**3}
"""Rows of a rule, by the number of dimensions."""


class Climbed(NamedTuple):
    """``z`` (d, J) and whether Newton's method has ended there, (J,)."""

    z: jax.Array
    converged: jax.Array


DEGREES_OF_FREEDOM, STEPS = 8.0, 12
"""Of the proposals of θ, and how many a draw."""

LEAST_MOVES = 0.3
"""Share of these proposals that a chain must accept for a draw to have forgotten its start."""

ROWS_AT_ONCE = 200_000
"""Draws × rows that are worked on together."""


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


class Rule(NamedTuple):
    """``count`` nodes ``places`` (Q, d) and log w̄ + ½ |t|² (Q,); rows beyond ``count`` are empty.

    One shape for all numbers of nodes of as many dimensions, so that one program serves them all.
    """

    places: Any
    log_weights: Any
    count: Any


@functools.lru_cache(maxsize=64)
def grid(num_nodes: int, dimensions: int) -> Rule:
    """The product of Gauss and Hermite's nodes, none left out: posteriors reach into corners."""
    t, w = np.polynomial.hermite_e.hermegauss(num_nodes)
    w = np.log(w / np.sqrt(2 * np.pi))
    index = np.array(list(itertools.product(range(num_nodes), repeat=dimensions)))
    places, count = t[index], len(index)
    size = max(count, MOST_NODES.get(dimensions, count))
    padded = np.zeros((size, dimensions)), np.zeros(size)
    padded[0][:count] = places
    padded[1][:count] = w[index].sum(1) + 0.5 * (places**2).sum(1)
    return Rule(*padded, count)


def rule_of(num_nodes: int, dimensions: int) -> Rule | None:
    """The rule with so many nodes a dimension; None for one, which is Laplace's approximation."""
    return None if num_nodes == 1 else grid(num_nodes, dimensions)


class Stand(NamedTuple):
    """Modes z* (d, J), the roots of A_j (d, d, J) and Ψ_j(z*) (J,), around which nodes stand."""

    z: jax.Array
    factor: jax.Array
    base: jax.Array

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


class Nodes(NamedTuple):
    """Nodes z (Q, d, J) and the log of π_q before it is normalised (Q, J)."""

    z: jax.Array
    log_weight: jax.Array


def around(tasks: Whitened, start: jax.Array, num_nodes: int) -> Nodes:
    """The nodes around every mode, with their weights."""
    stand = at_modes(tasks, climb(tasks, start).z)
    rule = grid(num_nodes, len(start))

    def node(at: Any) -> tuple[jax.Array, jax.Array]:
        place, log_weight = at
        moved = stand.node(place)
        return moved, tasks.value(moved) + log_weight

    kept = (rule.places[: rule.count], rule.log_weights[: rule.count])
    return Nodes(*jax.lax.map(node, jax.tree.map(jnp.asarray, kept)))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _moments(
    model: HierarchicalModel, rows: Rows | Whole, phi: dict[str, Any], num_nodes: int
) -> tuple[jax.Array, jax.Array]:
    tasks = Whitened.at(model.likelihood, model.prior, rows, phi)
    nodes = around(tasks, jnp.zeros_like(tasks.location), num_nodes)
    weight = jax.nn.softmax(nodes.log_weight, axis=0)
    mean = jnp.einsum("qj,qkj->kj", weight, nodes.z)
    centred = nodes.z - mean
    spread = jnp.einsum("qj,qkj,qmj->kmj", weight, centred, centred)
    root = tasks.root
    return tasks.theta(mean).T, jnp.einsum("ak,kmj,bm->jab", root, spread, root)


@functools.partial(jax.jit, static_argnums=0)
def _draws(
    model: HierarchicalModel, rows: Rows | Whole, phis: dict[str, Any], starts: Any, white: Any,
    stretch: Any, log_uniform: Any,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The last state (S, d, J) of a chain for each φ and task, and the share of moves (S, J).

    Proposals are t around the mode, from ``white`` (S, K, d, J) and ``stretch`` (S, K, J).
    """

    def at(phi: dict[str, Any]) -> Whitened:
        return Whitened.at(model.likelihood, model.prior, rows, phi)

    middle = climb(at(jax.tree.map(lambda values: values.mean(0), phis)), starts).z

    def one(phi: dict[str, Any], n: Any, s: Any, u: Any) -> tuple[jax.Array, jax.Array]:
        tasks = at(phi)
        z = climb(tasks, middle).z
        factor = cholesky(tasks.bend(z).curvature)
        d = len(z)

        def step(state: Any, given: Any) -> tuple[Any, None]:
            current, weight, moved = state
            noise = given[0] * given[1]
            trial = z + solve_upper(factor, noise)
            log_q = (
                -0.5 * (DEGREES_OF_FREEDOM + d) * jnp.log1p((noise**2).sum(0) / DEGREES_OF_FREEDOM)
            )
            trial_weight = tasks.value(trial) - log_q
            goes = given[2] < trial_weight - weight
            return (
                jnp.where(goes, trial, current), jnp.where(goes, trial_weight, weight),
                moved + goes,
            ), None  # fmt: skip

        first = (z, jnp.full(z.shape[1], -jnp.inf), jnp.zeros(z.shape[1]))
        (last, _, moved), _ = jax.lax.scan(step, first, (n, s, u))
        return tasks.theta(last), (moved - 1) / (len(n) - 1)

    return jax.vmap(one)(phis, white, stretch, log_uniform)


@dataclass(frozen=True)
class Quadrature(Adaptation):
    """A(D; φ) = the posterior mean and covariance of θ by quadrature, ``num_nodes`` a dimension."""

    num_nodes: int = 15
    name = "posterior by quadrature"

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Adapted:
        """Posterior means and covariances."""
        plain = model.without_encoder()
        with float64():
            found = _moments(plain, rows_of(tasks, plain.likelihood), dict(phi), self.num_nodes)
            mean, covariance = (np.asarray(part) for part in found)
        return Adapted(mean, covariance)

    def moments(
        self, model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean (J, d) and covariance (J, d, d), averaged over the values of φ."""
        size = len(next(iter(phis.values())))
        first = second = np.zeros(())
        for i in range(size):
            one = self(model, tasks, {name: value[i] for name, value in phis.items()})
            first = first + one.mean / size
            square = one.covariance + one.mean[:, :, None] * one.mean[:, None]
            second = second + square / size
        return first, second - first[:, :, None] * first[:, None]

    def draws(
        self, model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray], key: Any
    ) -> np.ndarray:
        """Draws (S, J, d), one for each of the S values of φ, by short independence chains.

        A chain of so many steps from a t around the mode forgets its start but for (1 − 1/m)^K, m
        the largest of its weights beside their mean: next to one where Laplace's normal is near.
        """
        rng, plain = as_rng(key), model.without_encoder()
        rows = rows_of(tasks, plain.likelihood)
        size, d, num_tasks = len(next(iter(phis.values()))), len(tasks.coef), tasks.num_tasks
        cells = max(rows.num_cells, num_tasks)
        most = int(np.clip(ROWS_AT_ONCE // cells, 1, size))
        theta, moved = np.empty((size, d, num_tasks)), np.zeros(num_tasks)
        starts = [min(start, size - most) for start in range(0, size, most)]
        with float64():
            zero = np.zeros((d, num_tasks))
            for start in starts:
                some = {name: value[start : start + most] for name, value in phis.items()}
                shape = (most, STEPS, num_tasks)
                white = rng.standard_normal((most, STEPS, d, num_tasks))
                stretch = np.sqrt(DEGREES_OF_FREEDOM / rng.chisquare(DEGREES_OF_FREEDOM, shape))
                uniform = np.log(rng.random(shape))
                found, share = _draws(plain, rows, some, zero, white, stretch, uniform)
                theta[start : start + most] = found
                moved += np.asarray(share).mean(0) / len(starts)
        stuck = moved < LEAST_MOVES
        if stuck.any():
            announce([
                f"draws of theta are rough for {stuck.sum()} of {num_tasks} tasks "
                f"({listing(tasks.names[stuck].tolist(), 3)}): their posteriors are far from "
                'normal; full_bayes(method="nuts") samples them jointly'
            ])  # fmt: skip
        return np.swapaxes(theta, 1, 2)
