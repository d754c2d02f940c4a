r"""ψ = (τ, R, σ) as a vector without bounds, in which its posterior is close to normal.

.. math:: \tau_c = u_c \log(1 + e^{x_c}), \qquad R = C C^\top \text{ with } C \text{ from } \tanh,
          \qquad \sigma = s\, e^{x}

A standard deviation is a straight line of x where it is large beside its unit u, and a logarithm
where it is small, so that τ → 0 lies at −∞, in a tail that is no heavier than an exponential one
of width u. The unit of choice is therefore the posterior's own standard deviation of τ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions.transforms import CorrCholeskyTransform, CorrMatrixCholeskyTransform

from hierbayes.priors.assembled import Assembled
from hierbayes.priors.hyperprior import Shape

Beliefs = dict[str, dist.Distribution]


class Units(NamedTuple):
    """``tau`` (d,) and ``sigma`` (): the sizes in which x is of order one."""

    tau: Any
    sigma: Any


class Scales(NamedTuple):
    """``phi`` by name (tau, corr, sigma), the root L of Σ, and log p(ψ) |dψ/dx|."""

    phi: dict[str, Any]
    root: Any
    sigma: Any
    log_density: Any


@dataclass(frozen=True)
class Coordinates:
    """Where each part of ψ stands in the vector x; hashable, so that programs compile once."""

    num_coef: int
    blocks: tuple[tuple[int, ...], ...]
    noise: bool

    @classmethod
    def of(cls, shape: Shape) -> Coordinates:
        """The coordinates of a prior's shape."""
        blocks = tuple(b for b in shape.blocks if len(b) > 1)
        return cls(len(shape.coef), blocks, "sigma" in shape.parameters)

    @property
    def sizes(self) -> list[int]:
        """Entries of x for each correlated block."""
        return [len(b) * (len(b) - 1) // 2 for b in self.blocks]

    @property
    def size(self) -> int:
        """Length of x."""
        return self.num_coef + sum(self.sizes) + int(self.noise)

    def scales(self, x: jax.Array, units: Units, beliefs: Beliefs) -> Scales:
        """ψ at x, and its density in x."""
        d = self.num_coef
        tau = units.tau * jax.nn.softplus(x[:d])
        total = _log_prob(beliefs["tau"], tau)
        total = total + (jnp.log(units.tau) + jax.nn.log_sigmoid(x[:d])).sum()
        phi, at = {"tau": tau}, d
        unit_root = jnp.eye(d)
        parts = _parts(beliefs["corr"]) if self.blocks else []
        for block, size, belief in zip(self.blocks, self.sizes, parts, strict=True):
            flat = x[at : at + size]
            factor = jnp.asarray(CorrCholeskyTransform()(flat))
            total = total + CorrCholeskyTransform().log_abs_det_jacobian(flat, factor)
            total = total + _log_prob_of_factor(belief, factor)
            unit_root = unit_root.at[np.ix_(block, block)].set(factor)
            at += size
        if self.blocks:
            phi["corr"] = unit_root @ unit_root.T
        sigma = jnp.ones(())
        if self.noise:
            sigma = units.sigma * jnp.exp(x[at])
            total = total + _log_prob(beliefs["sigma"], sigma) + jnp.log(sigma)
            phi["sigma"] = sigma
        return Scales(phi, tau[:, None] * unit_root, sigma, total)

    def vector(self, tau: Any, sigma: Any, units: Units) -> np.ndarray:
        """x at τ and σ, without correlations."""
        x = np.zeros(self.size)
        x[: self.num_coef] = inverse_softplus(np.asarray(tau) / units.tau)
        if self.noise:
            x[-1] = np.log(sigma / units.sigma)
        return x

    def rescaled(self, x: np.ndarray, units: Units, new: Units) -> np.ndarray:
        """The same ψ in other units of τ; ``x`` (…, size)."""
        moved = np.array(x)
        tau = units.tau * np.logaddexp(0.0, x[..., : self.num_coef])
        moved[..., : self.num_coef] = inverse_softplus(tau / new.tau)
        if self.noise:
            moved[..., -1] += np.log(units.sigma / new.sigma)
        return moved


def inverse_softplus(value: Any) -> Any:
    """x with log(1 + eˣ) = value."""
    return value + np.log(-np.expm1(-value))


def _parts(belief: dist.Distribution) -> list[dist.Distribution]:
    return [p for p, _ in belief.parts] if isinstance(belief, Assembled) else [belief]


def _log_prob(belief: dist.Distribution, value: Any) -> jax.Array:
    """The log density, −∞ outside the support, which NumPyro does not look at by itself."""
    support: Any = belief.support
    inside = jnp.all(support(value))
    return jnp.where(inside, jnp.sum(jnp.asarray(belief.log_prob(value))), -jnp.inf)


def _log_prob_of_factor(belief: dist.Distribution, factor: jax.Array) -> jax.Array:
    """The log density of R = C Cᵀ as one of the entries of C below its diagonal."""
    if isinstance(belief, dist.LKJ):  # needs no factorisation
        over_factors = dist.LKJCholesky(belief.dimension, belief.concentration)
        return jnp.asarray(over_factors.log_prob(factor))
    to_factor: Any = CorrMatrixCholeskyTransform()
    corr = factor @ factor.T
    return jnp.asarray(belief.log_prob(corr)) - to_factor.log_abs_det_jacobian(corr, factor)


def fixed_by_name(
    free_mean: tuple[bool, ...], num_shared: int, num_task_predictors: int, b: jax.Array
) -> dict[str, jax.Array]:
    """The fixed effects b = (μ_free, Γ, β) by name; pinned means are zero."""
    d, count = len(free_mean), sum(free_mean)
    named = {"mu": jnp.zeros(d).at[np.flatnonzero(free_mean)].set(b[:count])}
    if num_task_predictors:
        named["gamma"] = b[count : count + d * num_task_predictors].reshape(d, num_task_predictors)
    if num_shared:
        named["beta"] = b[len(b) - num_shared :]
    return named
