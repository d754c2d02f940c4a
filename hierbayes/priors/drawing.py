r"""Draws from beliefs on φ, many at once.

Correlation matrices come by the onion: below the root of one of k rows goes the row
:math:`(\sqrt{y}\, u, \sqrt{1 - y})`, with y from a Beta distribution and u uniform on a sphere.
Reference: Lewandowski, Kurowicka and Joe (2009), Generating random correlation matrices based on
vines and extended onion method, Journal of Multivariate Analysis 100.
"""

from __future__ import annotations

import jax
import numpy as np
import numpyro.distributions as dist

from hierbayes.errors import InputError
from hierbayes.numerics import float64
from hierbayes.priors.assembled import Assembled


def draw(name: str, belief: dist.Distribution, num: int, rng: np.random.Generator) -> np.ndarray:
    """``num`` draws of the parameter ``name`` (num, …), in float64.

    Raises
    ------
    InputError
        Where the belief is improper, naming the parameter.
    """
    if isinstance(belief, Assembled):
        array = np.tile(np.asarray(belief.background), (num, *[1] * belief.background.ndim))
        for part, index in belief.parts:
            array[(slice(None), *index)] = draw(name, part, num, rng)
        return array
    if isinstance(belief, dist.LKJ):  # NumPyro's own takes seconds to compile
        return draw_correlations(belief.dimension, float(belief.concentration), num, rng)
    key = jax.random.key(int(rng.integers(2**63)))
    try:
        with float64():
            return np.asarray(belief.sample(key, (num,)), dtype=float)
    except NotImplementedError as error:
        raise InputError(
            f"the hyperprior on {name} is improper: nothing can be drawn from it. Give a proper "
            f"one, HyperPrior({name}=…), to simulate from the prior"
        ) from error


def draw_correlations(
    size: int, concentration: float, num: int, rng: np.random.Generator
) -> np.ndarray:
    r"""Correlation matrices (num, size, size) with density proportional to :math:`|R|^{\eta - 1}`.

    Each correlation by itself is 2 b − 1 with b ~ Beta(a, a), a = η + (size − 2) / 2.
    """
    root = np.zeros((num, size, size))
    root[:, 0, 0] = 1.0
    for k in range(1, size):
        square = rng.beta(0.5 * k, concentration + 0.5 * (size - 1 - k), num)
        direction = rng.standard_normal((num, k))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        root[:, k, :k] = np.sqrt(square)[:, None] * direction
        root[:, k, k] = np.sqrt(1.0 - square)
    found = np.einsum("nik,njk->nij", root, root)
    found[:, np.arange(size), np.arange(size)] = 1.0
    return found
