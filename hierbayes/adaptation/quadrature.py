r"""The posterior of a task that is not Gaussian, by quadrature around its mode.

.. math::

    z_j^* = \arg\max_z \Psi_j(z), \qquad
    \Psi_j(z) = \log p(D_j \mid m_j + L z, \varphi) - \tfrac12 \lVert z \rVert^2, \qquad
    E[g(\theta_j) \mid D_j, \varphi] \approx \textstyle\sum_q \pi_{jq}\, g(m_j + L z_{jq})

with Σ = L Lᵀ, z_q = z* + U t_q, A⁻¹ = U Uᵀ for A = −∇²Ψ_j(z*), and
π_q ∝ w̄_q exp(Ψ_j(z_q) + ½ |t_q|²) from the nodes t and weights w̄ of Gauss and Hermite. Whitened by
L, A ≥ I for log-concave families: τ → 0 is an ordinary point.

Where few rows meet a wide prior the posterior is one-sided, a step of the likelihood times the
prior's tail, and no grid as wide as the mode's curvature says covers both. There nodes stand on
rays from the mode, r on each by Gauss and Legendre from the mode to where Ψ_j has fallen by 20:

.. math:: \int e^{\Psi_j} = |U_j| \int_{\lVert u \rVert = 1} \int_0^{r_j(u)}
          e^{\Psi_j(z^* + r U_j u)}\, r^{d-1}\, dr\, du

References: Pinheiro and Bates (1995), Journal of Computational and Graphical Statistics 4(1);
Naylor and Smith (1982), Applied Statistics 31(3).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.base import Integrable, TaskMoments
from hierbayes.adaptation.draws_of_theta import LEAST_MOVES, draws_given
from hierbayes.adaptation.mode import LogJoint, Mode, damped_newton, mode_near
from hierbayes.errors import announce, listing
from hierbayes.likelihoods import Likelihood
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import as_rng
from hierbayes.rows import Rows, Whole, rows_of
from hierbayes.sharding import rung
from hierbayes.tasks import Tasks

MOST_NODES = {1: 61, 2: 31**2, 3: 13**3}
"""Rows of a rule, by the number of dimensions."""


ALONG = {2: 20, 3: 12}
"""Nodes of a ray, by the number of dimensions; of one dimension half of all."""

FALLEN = 20.0
"""By how much Ψ_j has fallen where a ray ends: beyond lies e⁻²⁰ of the integral."""

HALVINGS = 12
"""Of the logarithm of a ray's length, to half a per cent."""


class Nodes(Protocol):
    """``count`` nodes around the modes of all tasks."""

    @property
    def count(self) -> Any:
        """How many there are."""
        ...

    def node(self, stand: Mode, q: Any) -> tuple[jax.Array, Any]:
        """The q-th node z (d, J) and its log weight."""
        ...


class Rule(NamedTuple):
    """``count`` nodes ``places`` (Q, d) and log w̄ + ½ |t|² (Q,); rows beyond ``count`` are empty.

    One shape for all numbers of nodes of as many dimensions, so that one program serves them all.
    """

    places: Any
    log_weights: Any
    count: Any

    def around(self, tasks: LogJoint, z: jax.Array) -> Mode:
        """Where the nodes stand, from where a climb has ended."""
        return mode_near(tasks, z)

    def node(self, stand: Mode, q: Any) -> tuple[jax.Array, Any]:
        """The q-th node z (d, J) and its log weight."""
        return stand.node(jnp.asarray(self.places)[q]), jnp.asarray(self.log_weights)[q]


class Rays(NamedTuple):
    """``count`` nodes on rays from the mode: u (K, d), of each node its ray and its r (Q,).

    r is a share of where its ray ends, in (0, 1).
    """

    directions: Any
    ray: Any
    radius: Any
    log_weights: Any
    count: Any

    def around(self, tasks: LogJoint, z: jax.Array) -> Mode:
        """Where the nodes stand: the modes, and how far each ray goes, (K, J)."""
        stand = mode_near(tasks, z)
        far = jnp.sqrt(2 * FALLEN)
        if (
            not tasks.likelihood.concave_in_theta
        ):  # then −∇²Ψ ≥ I does not hold, and the prior's tail does
            far = 2 * far + jnp.sqrt((stand.z**2).sum(0))

        def reach(direction: Any) -> jax.Array:
            along = stand.node(direction) - stand.z
            most = jnp.log(far) - 0.5 * jnp.log((along**2).sum(0))

            def halve(_: Any, ends: Any) -> Any:
                low, high = ends
                middle = 0.5 * (low + high)
                value = tasks.value(stand.z + jnp.exp(middle) * along)
                within = value > stand.base - FALLEN
                return jnp.where(within, middle, low), jnp.where(within, high, middle)

            least = jnp.full_like(most, jnp.log(1e-2))
            return jnp.exp(jax.lax.fori_loop(0, HALVINGS, halve, (least, most))[1])

        return stand._replace(reach=jax.lax.map(reach, jnp.asarray(self.directions)))

    def node(self, stand: Mode, q: Any) -> tuple[jax.Array, Any]:
        """The q-th node z (d, J) and its log weight (J,)."""
        directions, ray = jnp.asarray(self.directions), jnp.asarray(self.ray)[q]
        reach = stand.reach[ray]
        along = stand.node(directions[ray]) - stand.z
        z = stand.z + jnp.asarray(self.radius)[q] * reach * along
        return z, jnp.asarray(self.log_weights)[q] + directions.shape[1] * jnp.log(reach)


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


@functools.lru_cache(maxsize=64)
def rays(num_nodes: int, dimensions: int) -> Rays:
    """Rays from the mode: of one dimension two; of two ``num_nodes``; of three a sphere's."""
    if dimensions == 1:
        directions, shares = np.array([[1.0], [-1.0]]), np.ones(2)
        along = num_nodes // 2
    else:
        angle = 2 * np.pi * (np.arange(num_nodes) + 0.5) / num_nodes
        directions = np.column_stack([np.cos(angle), np.sin(angle)])
        shares = np.full(num_nodes, 2 * np.pi / num_nodes)
        along = ALONG[dimensions]
        if dimensions == 3:
            height, w = np.polynomial.legendre.leggauss(num_nodes // 2)
            level = np.sqrt(1 - height**2)
            circle = level[:, None, None] * directions
            up = np.broadcast_to(height[:, None, None], (*circle.shape[:2], 1))
            directions = np.concatenate([circle, up], -1).reshape(-1, 3)
            shares = np.outer(w, shares).ravel()
    r, w = np.polynomial.legendre.leggauss(along)
    r, w = 0.5 * (r + 1), 0.5 * w
    ray = np.repeat(np.arange(len(shares)), along)
    radius = np.tile(r, len(shares))
    weights = np.outer(shares, w * r ** (dimensions - 1)).ravel()
    log_weights = np.log(weights) - 0.5 * dimensions * np.log(2 * np.pi)
    count = len(ray)
    more = max(0, MOST_NODES[1] - 1 - count) if dimensions == 1 else 0
    ray, radius, log_weights = (np.pad(a, (0, more)) for a in (ray, radius, log_weights))
    return Rays(directions, ray, radius, log_weights, count)


def nodes_of(num_nodes: int, dimensions: int) -> Rule | Rays:
    """The rule with so many nodes a dimension.

    An odd number is that of Gauss and Hermite's around the mode, an even one means rays from it.
    """
    return grid(num_nodes, dimensions) if num_nodes % 2 else rays(num_nodes, dimensions)


class ByNodes(NamedTuple):
    """The posterior of every task by the nodes of ``rule`` around ``mode``, where they are held.

    The integral does not depend on where its nodes stand: its slope is the mean over them of the
    slope of log p(D_j, z | φ).
    """

    tasks: LogJoint
    mode: Mode
    rule: Nodes

    @classmethod
    def at(
        cls, model: HierarchicalModel, phi: dict[str, Any], rows: Rows | Whole, rule: Rule | Rays,
        start: Any = None,
    ) -> ByNodes:  # fmt: skip
        """Under φ, with the modes climbed from ``start``, or from the prior's location."""
        held = LogJoint.at(model, *jax.lax.stop_gradient((phi, rows)))
        start = jnp.zeros_like(held.location) if start is None else start
        near = jax.lax.stop_gradient(damped_newton(held, start))
        tasks = LogJoint.at(model, phi, rows)
        return cls(tasks, rule.around(held, near), rule)

    @property
    def log_normaliser(self) -> jax.Array:
        """log p(D_j | φ) (J,)."""
        tasks, rule = self.tasks, jax.tree.map(jnp.asarray, self.rule)
        found: Any = _log_sum(tasks.likelihood, _moving(tasks), tasks.rows, self.mode, rule)
        return self.mode.log_integral + found + tasks.rows.constant

    @property
    def start(self) -> jax.Array:
        """z* (d, J)."""
        return self.mode.z

    @property
    def converged(self) -> jax.Array:
        """Whether Newton's method has ended on a mode, (J,) of bool."""
        return self.mode.converged

    def around_mode(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """log ∫ exp Ψ_j (J,) less Laplace's, E[z − z*] (d, J) and E[(z − z*)(z − z*)ᵀ] (d, d, J).

        Differentiable forwards, in one pass.
        """
        mode = self.mode

        def add(q: Any, sums: Any) -> Any:
            z, log_weight = self.rule.node(mode, q)
            weight, away = jnp.exp(self.tasks.value(z) - mode.base + log_weight), z - mode.z
            square = weight * away[:, None] * away[None]
            return sums[0] + weight, sums[1] + weight * away, sums[2] + square

        d, num_tasks = mode.z.shape
        zero = jnp.zeros(num_tasks), jnp.zeros((d, num_tasks)), jnp.zeros((d, d, num_tasks))
        total, first, second = jax.lax.fori_loop(0, self.rule.count, add, zero)
        return jnp.log(total), first / total, second / total

    def moments(self) -> TaskMoments:
        """Mean and covariance of every θ_j."""
        gain, away, square = self.around_mode()
        spread, root = square - away[:, None] * away[None], self.tasks.root
        mean = self.tasks.theta(self.mode.z + away).T
        covariance = jnp.einsum("ak,kmj,bm->jab", root, spread, root)
        evidence = self.mode.log_integral + gain + self.tasks.rows.constant
        return TaskMoments(mean, covariance, evidence, self.mode.converged, self.mode.definite)


# what of a LogJoint depends on φ: rows that moved, φ, m and L
Moving = tuple[dict[str, Any], dict[str, Any], jax.Array, jax.Array]


def _moving(tasks: LogJoint) -> Moving:
    return tasks.rows.moving, tasks.phi, tasks.location, tasks.root


def _values(likelihood: Likelihood, moving: Moving, rows: Rows | Whole, z: jax.Array) -> jax.Array:
    moved, phi, location, root = moving
    return LogJoint(likelihood, rows.moved(moved), phi, location, root).value(z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sum(
    likelihood: Likelihood, moving: Moving, rows: Rows | Whole, stand: Mode, rule: Nodes
) -> jax.Array:
    """log Σ_q w̄_q exp(Ψ_j(z_q) − Ψ_j(z*) + ½ |t_q|²) of every task (J,), node after node."""

    def more(q: Any, total: jax.Array) -> jax.Array:
        z, log_weight = rule.node(stand, q)
        value = _values(likelihood, moving, rows, z)
        return total + jnp.exp(value - stand.base + log_weight)

    return jnp.log(jax.lax.fori_loop(0, rule.count, more, jnp.zeros_like(stand.base)))


def _forward(likelihood: Likelihood, *given: Any) -> tuple[jax.Array, Any]:
    value: Any = _log_sum(likelihood, *given)
    return value, (given, value)


def _backward(likelihood: Likelihood, kept: Any, slope: jax.Array) -> Any:
    (moving, rows, stand, rule), found = kept

    def more(q: Any, total: Any) -> Any:
        z, log_weight = rule.node(stand, q)
        value, pull = jax.vjp(lambda m: _values(likelihood, m, rows, z), moving)
        share = jnp.exp(value - stand.base + log_weight - found)
        return jax.tree.map(jnp.add, total, pull(slope * share)[0])

    none = jax.tree.map(jnp.zeros_like, moving)
    return jax.lax.fori_loop(0, rule.count, more, none), None, None, None


_log_sum.defvjp(_forward, _backward)


class RowsAndRule(NamedTuple):
    """The data, and the nodes of the integral over θ."""

    rows: Rows | Whole
    rule: Rule | Rays

    @property
    def num_cells(self) -> int:
        """Rows that a density works on."""
        return self.rows.num_cells


@dataclass(frozen=True)
class Quadrature(Integrable):
    """A(D; φ) = the posterior mean and covariance of θ by quadrature, ``num_nodes`` a dimension."""

    num_nodes: int = 15
    name = "posterior by quadrature"

    def lay_out(self, model: HierarchicalModel, tasks: Tasks) -> RowsAndRule:
        """Rows, alike ones added up, and the nodes."""
        rule = nodes_of(self.num_nodes, len(tasks.coef))
        return RowsAndRule(rows_of(tasks, model.likelihood), rule)

    def begin(self, tasks: Tasks) -> np.ndarray:
        """The prior's location."""
        return np.zeros((len(tasks.coef), rung(tasks.num_tasks)))

    @staticmethod
    def given(
        model: HierarchicalModel, phi: dict[str, Any], data: RowsAndRule, start: Any = None
    ) -> ByNodes:
        """The posterior of every task."""
        return ByNodes.at(model, phi, *data, start)

    def draws(
        self, model: HierarchicalModel, tasks: Tasks, phis: dict[str, np.ndarray], key: Any
    ) -> np.ndarray:
        """Draws (S, J, d), one for each of the S values of φ; see :func:`draws_given`."""
        plain = model.without_encoder()
        rows = rows_of(tasks, plain.likelihood)
        theta, moved = draws_given(plain, rows, phis, tasks, as_rng(key))
        if (stuck := moved < LEAST_MOVES).any():
            announce([
                f"draws of theta are rough for {stuck.sum()} of {len(stuck)} tasks "
                f"({listing(tasks.names[stuck].tolist(), 3)}): their posteriors are far from "
                'normal; full_bayes(method="nuts") samples them jointly'
            ])  # fmt: skip
        return np.swapaxes(theta, 1, 2)
