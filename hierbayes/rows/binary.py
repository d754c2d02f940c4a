r"""Zeros and ones in blocks of one x each: an exponential a block in place of one a row.

.. math::

    \sum_{i \in \text{block}} \log p(y_i \mid o_i + g) = \sum_i y_i o_i + g \sum_i y_i
        - \log \prod_i (1 + e^{o_i} e^g), \qquad g = x^\top \theta

Beyond f = 40 a factor stands still and f − 40 is added: what is left out is e⁻⁴⁰. A block has at
most sixteen rows, so that no product overflows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from hierbayes.likelihoods import Likelihood
from hierbayes.rows.blocks import AS_PYTREE, Curved, Rows

MOST_ROWS = 16

FAR = 40.0

LARGEST, LARGEST_OFFSET = 500.0, 200.0
"""Of a block's g and a row's o: their exponentials are finite, and so is e^o e^g."""


@jax.custom_jvp
def log_factors(odds: Any) -> jax.Array:
    """log Π_i (1 + min(t_i, e⁴⁰)) over the first axis."""
    return jnp.log(jnp.prod(1.0 + jnp.minimum(odds, jnp.exp(FAR)), axis=0))


@log_factors.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (odds,), (moved,) = primals, tangents
    capped = jnp.minimum(odds, jnp.exp(FAR))
    share = jnp.where(odds < jnp.exp(FAR), 1.0 / (1.0 + capped), 0.0)
    return log_factors(odds), (share * moved).sum(0)


@functools.partial(jax.tree_util.register_dataclass, **AS_PYTREE)
@dataclass(frozen=True)
class BinaryRows(Rows):
    """As :class:`Rows`, with ``x`` (d, 1, C) and no weights but zero and one.

    Once φ is known ``slots`` holds o as ``offset`` (B, C), e^o as ``odds``, zero where nothing is
    weighed, and Σ y o and Σ y of each block as ``tally`` and ``ones`` (C,).
    """

    def under(self, likelihood: Likelihood, phi: dict[str, Any]) -> BinaryRows:
        """The rows once φ is known."""
        del likelihood
        offset = self.slots.get("offset", 0.0) + jnp.zeros(self.outcome.shape)
        if "beta" in phi:
            for i in range(len(self.z)):
                offset = offset + self.z[i] * phi["beta"][i]
        counted = self.weight * self.outcome
        slots = {
            "offset": offset,
            "odds": self.weight * jnp.exp(jnp.minimum(offset, LARGEST_OFFSET)),
            "tally": (counted * offset).sum(0),
            "ones": counted.sum(0),
        }
        return replace(self, z=self.z[:0], slots=slots)

    @property
    def moving(self) -> dict[str, Any]:
        """What of the rows depends on φ."""
        return {name: self.slots[name] for name in ("offset", "odds", "tally")}

    def _level(self, theta: jax.Array) -> jax.Array:
        """g = xᵀθ of each block (C,)."""
        own, g = self.own(theta), 0.0
        for x, t in zip(self.x[:, 0], own, strict=True):
            g = g + x * t
        return jnp.asarray(g)

    def _value(self, g: jax.Array, odds: jax.Array) -> jax.Array:
        """The log likelihood of each block (C,)."""
        beyond = (self.weight * jnp.maximum(self.slots["offset"] + g - FAR, 0.0)).sum(0)
        return self.slots["tally"] + self.slots["ones"] * g - log_factors(odds) - beyond

    def log_likelihood(
        self, likelihood: Likelihood, theta: jax.Array, phi: dict[str, Any]
    ) -> jax.Array:
        """log p(D_j | θ_j, φ) of every task (J,), under θ (d, J), φ being known."""
        del likelihood, phi
        g = self._level(theta)
        return self.by_task(self._value(g, self._odds(g))[None])

    def _odds(self, g: jax.Array) -> jax.Array:
        """e^f of each row (B, C), zero where nothing is weighed."""
        return self.slots["odds"] * jnp.exp(jnp.minimum(g, LARGEST))

    def to_second_order(
        self, likelihood: Likelihood, theta: jax.Array, phi: dict[str, Any], *, damped: bool
    ) -> Curved:
        """The same with slope and curvature in θ, which nowhere bends upwards."""
        del likelihood, phi, damped
        g = self._level(theta)
        odds = self._odds(g)
        capped = jnp.minimum(odds, jnp.exp(FAR))
        rest = 1.0 / (1.0 + capped)
        chance = capped * rest
        first, bend = self.slots["ones"] - chance.sum(0), (chance * rest).sum(0)
        return self.in_theta(self._value(g, odds)[None], first[None], bend[None])
