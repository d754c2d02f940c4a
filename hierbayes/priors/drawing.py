r"""Draws from beliefs about φ, by NumPy where it knows them: nothing is compiled for a few draws.

Correlation matrices come by the onion: below the root of one of k rows goes the row
:math:`(\sqrt{y}\, u, \sqrt{1 - y})`, with y from a Beta distribution and u uniform on a sphere.
Reference: Lewandowski, Kurowicka and Joe (2009), Generating random correlation matrices based on
vines and extended onion method, Journal of Multivariate Analysis 100.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist

from hierbayes.errors import InputError
from hierbayes.numerics import float64, standard_promotion
from hierbayes.phi.assembled import Assembled

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


@standard_promotion()
def draw(name: str, belief: dist.Distribution, num: int, rng: np.random.Generator) -> np.ndarray:
    """``num`` draws of the parameter ``name`` (num, …), in float64.

    Raises
    ------
    InputError
        Where the belief is improper, naming the parameter.
    """
    try:
        return _drawn(belief, (num,), rng)
    except NotImplementedError as error:
        raise InputError(
            f"the hyperprior on {name} is improper: nothing can be drawn from it. Give a proper "
            f"one, HyperPrior({name}=…), to simulate from the prior"
        ) from error


def _drawn(belief: Any, lead: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if isinstance(belief, Assembled):
        whole = np.broadcast_to(belief.background, (*lead, *belief.background.shape)).copy()
        for part, index in belief.parts:
            whole[(slice(None),) * len(lead) + tuple(index)] = _drawn(part, lead, rng)
        return whole
    if isinstance(belief, dist.Independent):
        return _drawn(belief.base_dist, lead, rng)
    if isinstance(belief, dist.ExpandedDistribution) and not belief.base_dist.batch_shape:
        return _drawn(belief.base_dist, (*lead, *belief.batch_shape), rng)
    if type(belief) is dist.LKJ and not belief.batch_shape:  # NumPyro's takes seconds to compile
        return draw_correlations(belief.dimension, float(belief.concentration), lead, rng)
    if type(belief) in _KNOWN:
        shape = (*lead, *belief.batch_shape)
        return np.asarray(_KNOWN[type(belief)](_Numbers(belief), rng, shape), float)
    with float64():
        return np.asarray(belief.sample(jax.random.key(int(rng.integers(2**63))), lead), float)


class _Numbers:
    """A distribution's parameters as NumPy float64."""

    def __init__(self, belief: Any):
        self.belief = belief

    def __getattr__(self, name: str) -> np.ndarray:
        return np.asarray(getattr(self.belief, name), float)


def draw_correlations(
    size: int, concentration: float, lead: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    r"""Correlation matrices (…, size, size) with density proportional to :math:`|R|^{\eta - 1}`.

    Each correlation by itself is 2 b − 1 with b ~ Beta(a, a), a = η + (size − 2) / 2.
    """
    root = np.zeros((*lead, size, size))
    root[..., 0, 0] = 1.0
    for k in range(1, size):
        square = rng.beta(0.5 * k, concentration + 0.5 * (size - 1 - k), lead)
        direction = rng.standard_normal((*lead, k))
        direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
        root[..., k, :k] = np.sqrt(square)[..., None] * direction
        root[..., k, k] = np.sqrt(1.0 - square)
    found = root @ np.swapaxes(root, -1, -2)
    found[..., np.arange(size), np.arange(size)] = 1.0
    return found
