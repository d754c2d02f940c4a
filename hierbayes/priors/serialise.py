"""Distributions as plain data and back: what a saved fit says of its hyperprior. Never pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints, transforms

from hierbayes.errors import InputError, listing
from hierbayes.priors.hyperprior import HyperPrior

_SUPPORTS = {
    "real": constraints.real,
    "positive": constraints.positive,
    "nonnegative": constraints.nonnegative,
    "unit_interval": constraints.unit_interval,
}


def hyperprior_to_plain(hyperprior: HyperPrior) -> dict[str, Any]:
    """A hyperprior as nested dictionaries, lists, strings and numbers."""
    return {f.name: _plain(getattr(hyperprior, f.name)) for f in fields(hyperprior)}


def hyperprior_from_plain(plain: Mapping[str, Any]) -> HyperPrior:
    """The inverse of :func:`hyperprior_to_plain`."""
    return HyperPrior(**{name: _restored(value) for name, value in plain.items()})


def _plain(prior: Any) -> Any:
    if prior is None or isinstance(prior, (int, float)):
        return prior
    if isinstance(prior, Mapping):
        return {"mapping": {name: _plain(value) for name, value in prior.items()}}
    kind = type(prior).__name__
    if isinstance(prior, dist.ImproperUniform):
        support = next((n for n, c in _SUPPORTS.items() if c is _innermost(prior.support)), None)
        if support is not None:
            shapes = [list(prior.batch_shape), list(prior.event_shape)]
            return {"kind": kind, "support": support, "shapes": shapes}
    elif isinstance(prior, dist.ExpandedDistribution):
        base = _plain(prior.base_dist)
        return {"kind": kind, "base": base, "batch_shape": list(prior.batch_shape)}
    elif isinstance(prior, dist.Independent):
        depth = prior.reinterpreted_batch_ndims
        return {"kind": kind, "base": _plain(prior.base_dist), "depth": depth}
    elif isinstance(prior, dist.LKJ):
        concentration = _numbers(prior.concentration)
        return {"kind": kind, "dimension": prior.dimension, "concentration": concentration}
    elif isinstance(prior, dist.FoldedDistribution):
        return {"kind": kind, "base": _plain(prior.base_dist)}
    elif type(prior) is dist.TransformedDistribution:
        steps = [_plain_transform(t) for t in prior.transforms]
        return {"kind": kind, "base": _plain(prior.base_dist), "transforms": steps}
    elif kind in ("LeftTruncatedDistribution", "RightTruncatedDistribution",
                  "TwoSidedTruncatedDistribution"):  # fmt: skip
        bounds = {b: _numbers(getattr(prior, b)) for b in ("low", "high") if hasattr(prior, b)}
        return {"kind": kind, "base": _plain(prior.base_dist), "bounds": bounds}
    elif getattr(dist, kind, None) is type(prior):
        parameters = {name: _numbers(getattr(prior, name)) for name in prior.arg_constraints}
        try:
            getattr(dist, kind)(**{k: np.asarray(v) for k, v in parameters.items()})
        except TypeError:
            pass
        else:
            return {"kind": kind, "parameters": parameters}
    raise InputError(
        f"a hyperprior of type {kind} cannot be written to a file, and so neither can the fit; "
        "use a plain distribution of numpyro.distributions, or save fit.datatree alone"
    )


MOST_NUMBERS = 1_000_000
"""Entries of a prior up to which it is read: a file may be a stranger's."""


def _restored(plain: Any) -> Any:
    if plain is None or (isinstance(plain, (int, float)) and not isinstance(plain, bool)):
        return plain
    if not isinstance(plain, Mapping):
        raise InputError(f"expected a distribution, found {type(plain).__name__}")
    if "mapping" in plain:
        return {name: _restored(value) for name, value in plain["mapping"].items()}
    prior = _distribution(plain)
    if not isinstance(prior, dist.Distribution):
        raise InputError(f"{plain.get('kind')!r} is no distribution")
    return prior


def _distribution(plain: Mapping[str, Any]) -> Any:
    kind = plain["kind"]
    shapes = [
        plain.get("batch_shape", []),
        *plain.get("shapes", []),
        [plain.get("dimension", 1)] * 2,
    ]
    for shape in shapes:
        if not all(isinstance(n, int) and n >= 0 for n in shape) or math.prod(shape) > MOST_NUMBERS:
            raise InputError(f"{kind} of shape {shape} is no prior about this model")
    if kind == "ImproperUniform":
        batch, event = plain["shapes"]
        return dist.ImproperUniform(_SUPPORTS[plain["support"]], tuple(batch), tuple(event))
    if kind == "ExpandedDistribution":
        return _restored(plain["base"]).expand(plain["batch_shape"])
    if kind == "Independent":
        return _restored(plain["base"]).to_event(plain["depth"])
    if kind == "LKJ":
        return dist.LKJ(plain["dimension"], concentration=plain["concentration"])
    if kind == "FoldedDistribution":
        return dist.FoldedDistribution(_restored(plain["base"]))
    if kind == "TransformedDistribution":
        steps = []
        for name, arguments in plain["transforms"]:
            if name not in _TRANSFORMS:
                raise InputError(f"the transform {name!r} is not known here")
            steps.append(getattr(transforms, name)(**_finite(arguments)))
        return dist.TransformedDistribution(_restored(plain["base"]), steps)
    if "bounds" in plain:
        bounds: Any = _finite(plain["bounds"])
        if not {*bounds} <= {"low", "high"}:
            raise InputError(f"a truncated distribution has no bound {listing([*bounds])}")
        return dist.TruncatedDistribution(_restored(plain["base"]), **bounds)
    made = getattr(dist, kind, None)
    if not (isinstance(made, type) and issubclass(made, dist.Distribution)):
        raise InputError(f"{kind!r} is no distribution of numpyro.distributions")
    parameters = _finite(plain["parameters"])
    if {*parameters} != {*made.arg_constraints}:
        raise InputError(f"{kind} takes {', '.join(made.arg_constraints)}")
    return made(**parameters, validate_args=True)


def _finite(parameters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    found = {name: np.asarray(value) for name, value in parameters.items()}
    for name, value in found.items():
        if value.dtype.kind not in "fiu" or np.isnan(value).any() or not value.size:
            raise InputError(f"{name} must be numbers, found {parameters[name]!r:.60}")
    return found


_TRANSFORMS = {
    "PowerTransform": ["exponent"], "AffineTransform": ["loc", "scale"], "ExpTransform": [],
}  # fmt: skip


def _plain_transform(transform: Any) -> list[Any]:
    name = type(transform).__name__
    if name not in _TRANSFORMS:
        raise InputError(f"a hyperprior transformed by {name} cannot be written to a file")
    return [name, {a: _numbers(getattr(transform, a)) for a in _TRANSFORMS[name]}]


def _innermost(support: Any) -> Any:
    return getattr(support, "base_constraint", support)


def _numbers(value: Any) -> Any:
    return np.asarray(value, dtype=float).tolist()
