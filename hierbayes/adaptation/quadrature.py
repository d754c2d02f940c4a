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
from hierbayes.adaptation.draws_of_theta import LEAST_MOVES, draws_given
from hierbayes.adaptation.whitened import Whitened, at_modes, climb
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
