"""A family's own parameters, each on a line without bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from hierbayes.errors import InputError


class Line(NamedTuple):
    """φ = ``at``(v), its ``inverse``, its ``slope`` dφ/dv as a function of φ, and a first φ."""

    at: Callable[[Any], Any]
    inverse: Callable[[Any], Any]
    slope: Callable[[Any], Any]
    start: float


LINES = {
    "positive": Line(jnp.exp, jnp.log, lambda value: value, 1.0),
    "real": Line(lambda v: v, lambda value: value, lambda value: 1.0 + 0.0 * value, 0.0),
    "unit": Line(
        jax.nn.sigmoid, lambda value: jnp.log(value) - jnp.log1p(-value),
        lambda value: value * (1.0 - value), 0.5,
    ),
}  # fmt: skip

SUPPORTS = [
    (constraints.positive, "positive"), (constraints.softplus_positive, "positive"),
    (constraints.nonnegative, "positive"), (constraints.real, "real"),
    (constraints.unit_interval, "unit"),
]  # fmt: skip


def lines_of(
    names: tuple[str, ...], beliefs: Mapping[str, dist.Distribution]
) -> tuple[tuple[str, str], ...]:
    """(name, key of :data:`LINES`) of each parameter, by the support of its prior."""
    found = []
    for name in names:
        belief = beliefs[name]
        support: Any = belief.support
        kinds = [kind for known, kind in SUPPORTS if support is known or support == known]
        if belief.shape() != () or not kinds:
            raise InputError(
                f"the prior of {name!r} has support {support!r} and shape {belief.shape()}: here "
                "parameters beside mu, tau, corr, beta and gamma are single numbers that are real, "
                'positive or between 0 and 1; full_bayes(method="nuts") takes others'
            )
        found.append((name, kinds[0]))
    return tuple(found)
