"""A prior as a normal: exactly where it is one, otherwise the nearest that is of use."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpyro.distributions as dist

from hierbayes.numerics import float64
from hierbayes.phi.assembled import Assembled


class AsNormal(NamedTuple):
    """``location`` and ``precision`` of every entry; ``exact`` says whether the prior is that.

    Precision 0 is flat. What is not exact is meant for proposals, which are then weighted.
    """

    location: np.ndarray
    precision: np.ndarray
    exact: bool


def as_normal(prior: dist.Distribution) -> AsNormal:
    """Independent normals and flat priors as they are; any other by its moments, or flat."""
    if isinstance(prior, Assembled):
        location, precision = np.array(prior.background), np.zeros(prior.event_shape)
        exact = True
        for part, index in prior.parts:
            found = as_normal(part)
            location[index], precision[index] = found.location, found.precision
            exact = exact and found.exact
        return AsNormal(location, precision, exact)
    core = _core(prior)
    shape = prior.shape()
    if isinstance(core, dist.ImproperUniform) and core.support in (
        dist.constraints.real, dist.constraints.real_vector,
    ):  # fmt: skip
        return AsNormal(np.zeros(shape), np.zeros(shape), True)
    if type(core) is dist.Normal:
        location, scale = np.asarray(core.loc), np.asarray(core.scale)
        return AsNormal(
            np.broadcast_to(location, shape).astype(float),
            np.broadcast_to(1.0 / scale.astype(float) ** 2, shape),
            True,
        )
    location, variance = _moments(prior)
    known = np.isfinite(location) & np.isfinite(variance) & (variance > 0)
    return AsNormal(
        np.where(known, location, 0.0), np.where(known, 1.0 / np.where(known, variance, 1.0), 0.0),
        False,
    )  # fmt: skip


def improper(prior: dist.Distribution) -> bool:
    """True where a prior, or a part of it, has no normalising constant."""
    if isinstance(prior, Assembled):
        return any(improper(part) for part, _ in prior.parts)
    return isinstance(_core(prior), dist.ImproperUniform)


def _core(prior: dist.Distribution) -> Any:
    """What is repeated to make this prior."""
    core: Any = prior
    while isinstance(core, (dist.Independent, dist.ExpandedDistribution)):
        core = core.base_dist
    return core


def _moments(prior: dist.Distribution) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of every entry; NaN where the distribution does not know them."""
    unknown = np.full(prior.shape(), np.nan)
    try:
        with float64():
            mean, variance = np.asarray(prior.mean, float), np.asarray(prior.variance, float)
    except NotImplementedError:
        return unknown, unknown
    return np.broadcast_to(mean, prior.shape()), np.broadcast_to(variance, prior.shape())
