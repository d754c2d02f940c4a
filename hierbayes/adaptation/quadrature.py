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
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation.base import Adaptation
from hierbayes.adaptation.draws_of_theta import LEAST_MOVES, draws_given
from hierbayes.adaptation.posterior import Normal
from hierbayes.adaptation.whitened import Stand, Whitened, at_modes, climb
from hierbayes.errors import announce, listing
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import (
    as_rng,
    float64,
)
from hierbayes.rows import Rows, Whole, rows_of
from hierbayes.tasks import Tasks

MOST_NODES = {1: 61, 2: 31**2, 3: 13**3}
"""Rows of a rule, by the number of dimensions."""


ALONG = {2: 20, 3: 12}
"""Nodes of a ray, by the number of dimensions; of one dimension half of all."""

FALLEN = 20.0
"""By how much Ψ_j has fallen where a ray ends: beyond lies e⁻²⁰ of the integral."""

HALVINGS = 12
"""Of the logarithm of a ray's length, to half a per cent."""


class Rule(NamedTuple):
    """``count`` nodes ``places`` (Q, d) and log w̄ + ½ |t|² (Q,); rows beyond ``count`` are empty.

    One shape for all numbers of nodes of as many dimensions, so that one program serves them all.
    """

    places: Any
    log_weights: Any
    count: Any

    def around(self, tasks: Whitened, z: jax.Array) -> Stand:
        """Where the nodes stand, from where a climb has ended."""
        return at_modes(tasks, z)

    def node(self, stand: Stand, q: Any) -> tuple[jax.Array, Any]:
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

    def around(self, tasks: Whitened, z: jax.Array) -> Stand:
        """Where the nodes stand: the modes, and how far each ray goes, (K, J)."""
        stand = at_modes(tasks, z)
        far = jnp.sqrt(2 * FALLEN)
        if (
            not tasks.likelihood.log_concave
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

    def node(self, stand: Stand, q: Any) -> tuple[jax.Array, Any]:
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


def rule_of(num_nodes: int, dimensions: int) -> Rule | Rays | None:
    """:func:`nodes_of`; None for one node, which is Laplace's approximation."""
    return None if num_nodes == 1 else nodes_of(num_nodes, dimensions)


class Nodes(NamedTuple):
    """Nodes z (Q, d, J) and the log of π_q before it is normalised (Q, J)."""

    z: jax.Array
    log_weight: jax.Array


def around(tasks: Whitened, start: jax.Array, num_nodes: int) -> Nodes:
    """The nodes around every mode, with their weights."""
    rule = nodes_of(num_nodes, len(start))
    stand = rule.around(tasks, climb(tasks, start).z)

    def node(q: Any) -> tuple[jax.Array, jax.Array]:
        moved, log_weight = rule.node(stand, q)
        return moved, tasks.value(moved) + log_weight

    return Nodes(*jax.lax.map(node, jnp.arange(rule.count)))


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


@dataclass(frozen=True)
class Quadrature(Adaptation):
    """A(D; φ) = the posterior mean and covariance of θ by quadrature, ``num_nodes`` a dimension."""

    num_nodes: int = 15
    name = "posterior by quadrature"

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Normal:
        """Posterior means and covariances."""
        plain = model.without_encoder()
        with float64():
            found = _moments(plain, rows_of(tasks, plain.likelihood), dict(phi), self.num_nodes)
            mean, covariance = (np.asarray(part) for part in found)
        return Normal(mean, covariance)

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
