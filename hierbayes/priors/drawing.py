"""Draws from beliefs about φ, by NumPy where it knows them: nothing is compiled for a few draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist

from hierbayes.numerics import float64
from hierbayes.priors.assembled import Assembled

_KNOWN: dict[type, Callable[[Any, np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    dist.Normal: lambda b, rng, n: rng.normal(b.loc, b.scale, n),
    dist.HalfNormal: lambda b, rng, n: np.abs(rng.normal(0.0, b.scale, n)),
    dist.Cauchy: lambda b, rng, n: b.loc + b.scale * rng.standard_cauchy(n),
    dist.HalfCauchy: lambda b, rng, n: np.abs(b.scale * rng.standard_cauchy(n)),
    dist.Exponential: lambda b, rng, n: rng.exponential(1.0, n) / b.rate,
    dist.Gamma: lambda b, rng, n: rng.gamma(b.concentration, 1.0, n) / b.rate,
    dist.InverseGamma: lambda b, rng, n: b.rate / rng.gamma(b.concentration, 1.0, n),
    dist.LogNormal: lambda b, rng, n: rng.lognormal(b.loc, b.scale, n),
    dist.Uniform: lambda b, rng, n: rng.uniform(b.low, b.high, n),
}


def draw_belief(belief: dist.Distribution, num_draws: int, rng: np.random.Generator) -> np.ndarray:
    """Draws (num_draws, …) of one name of φ, float64."""
    return _drawn(belief, (num_draws,), rng)


def _drawn(belief: Any, lead: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if isinstance(belief, Assembled):
        whole = np.broadcast_to(belief.background, (*lead, *belief.background.shape)).copy()
        for part, index in belief.parts:
            whole[(..., *index)] = _drawn(part, lead, rng)
        return whole
    if isinstance(belief, dist.Independent):
        return _drawn(belief.base_dist, lead, rng)
    if isinstance(belief, dist.ExpandedDistribution) and not belief.base_dist.batch_shape:
        return _drawn(belief.base_dist, (*lead, *belief.batch_shape), rng)
    if type(belief) is dist.LKJ and not belief.batch_shape:
        return draw_correlations(belief.dimension, float(belief.concentration), lead, rng)
    if type(belief) in _KNOWN:
        by_numpy = _Numbers(belief)
        return np.asarray(_KNOWN[type(belief)](by_numpy, rng, (*lead, *belief.batch_shape)))
    with float64():
        return np.asarray(belief.sample(jax.random.key(int(rng.integers(2**31))), lead), float)


class _Numbers:
    """A distribution's parameters as NumPy float64."""

    def __init__(self, belief: Any):
        self.belief = belief

    def __getattr__(self, name: str) -> np.ndarray:
        return np.asarray(getattr(self.belief, name), float)


def draw_correlations(
    size: int, concentration: float, lead: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    r"""Correlation matrices (…, d, d) with density proportional to \|R\|^(η − 1), by the onion.

    Row k of the Cholesky factor is (√y u, √(1 − y)) with u uniform on the sphere of dimension k and
    y ~ Beta(k/2, η + (d − 1 − k)/2).

    References
    ----------
    Lewandowski, Kurowicka and Joe (2009), Generating random correlation matrices based on vines and
    extended onion method, Journal of Multivariate Analysis 100(9), section 3.2.
    """
    factor = np.zeros((*lead, size, size))
    factor[..., 0, 0] = 1.0
    for k in range(1, size):
        direction = rng.standard_normal((*lead, k))
        direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
        y = rng.beta(k / 2, concentration + (size - 1 - k) / 2, lead)
        factor[..., k, :k] = np.sqrt(y)[..., None] * direction
        factor[..., k, k] = np.sqrt(1 - y)
    found = factor @ np.swapaxes(factor, -1, -2)
    diagonal = np.arange(size)
    found[..., diagonal, diagonal] = 1.0
    return found
