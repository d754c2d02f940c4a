"""What may be believed of φ: a NumPyro distribution, of the right support and the right size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints

from hierbayes import inputs
from hierbayes.errors import InputError, suggestion

OF_ARGUMENTS = ("mu", "tau", "corr", "beta", "gamma", "sigma")
"""Parameters of φ that have an argument of HyperPrior of their own."""

LEAST, MOST = 1e-6, 1e6
"""Concentrations of a prior on correlations beyond which densities are lost to rounding."""

NEGATIVE = -np.logspace(-300, 300, 1201)
"""Where a support without bounds of its own is asked whether it goes below zero."""


def read(name: str, given: Any) -> Any:
    """One argument of HyperPrior, checked as far as it can be without a model."""
    if name == "extra":
        return _read_extra({} if given is None else given)
    if name == "corr":
        return _read_corr(given)
    if isinstance(given, Mapping):
        if name == "sigma":
            raise InputError(
                "HyperPrior(sigma=…) takes one NumPyro distribution, since there is one sigma; "
                "found a mapping"
            )
        for coef in given:
            if not isinstance(coef, str):
                raise InputError(
                    f"HyperPrior({name}=…) maps names to distributions; found {inputs.shown(coef)} "
                    "as a name"
                )
        kept = {c: b for c, b in given.items() if b is not None}  # None is the default there too
        for coef, prior in kept.items():
            _check(name, f"{name}={{{coef!r}: …}}", prior)
        return kept
    if given is not None:
        _check(name, f"{name}=…", given)
    return given


def _read_extra(given: Any) -> dict[str, dist.Distribution]:
    inputs.mapping("HyperPrior(extra=…)", given, "a mapping from parameter to distribution")
    kept = {name: prior for name, prior in given.items() if prior is not None}
    for name, prior in kept.items():
        if name in OF_ARGUMENTS:
            raise InputError(
                f"HyperPrior(extra=…) names {name!r}, which has an argument of its own: "
                f"HyperPrior({name}=…)"
            )
        _check("extra", f"extra={{{name!r}: …}}", prior)
        _check_scalar(f"extra={{{name!r}: …}}", name, prior)
    return kept


def _read_corr(given: Any) -> Any:
    if given is None:
        return None
    if isinstance(given, dist.Distribution):
        _check("corr", "corr=…", given)
        if given.event_dim != 2 or given.batch_shape != ():
            raise InputError(
                "HyperPrior(corr=…) is a prior on one correlation matrix, LKJ for example; found "
                f"{type(given).__name__} over {given.shape()}"
            )
        return given
    try:
        concentration = inputs.positive("the LKJ concentration, HyperPrior(corr=…),", given)
    except InputError as error:
        raise InputError(f"{error}; or pass an LKJ distribution") from error
    if not LEAST <= concentration <= MOST:
        raise InputError(
            f"the LKJ concentration, HyperPrior(corr=…), must lie between {LEAST:g} and {MOST:g}, "
            f"found {concentration:g}"
        )
    return concentration


def _check(name: str, where: str, prior: Any) -> None:
    """Refuse what is no distribution, has impossible parameters, or the wrong support."""
    if not isinstance(prior, dist.Distribution):
        mapped = "" if name in ("sigma", "corr") else "a mapping from name to distribution, "
        found = type(prior).__name__
        if isinstance(prior, type):
            found = f"the class {prior.__name__} itself; give its parameters"
        raise InputError(
            f"HyperPrior({where}) takes a NumPyro distribution, {mapped}or None; found {found}"
        )
    if prior.is_discrete:
        raise InputError(
            f"HyperPrior({where}) must be continuous; {type(prior).__name__} is discrete"
        )
    _check_parameters(where, prior)
    if name in ("tau", "sigma"):
        refuse_negative(where, prior, "a standard deviation")
    if name == "sigma":
        _check_scalar(where, "sigma", prior)


def _check_scalar(where: str, name: str, prior: dist.Distribution) -> None:
    if prior.shape() != ():
        raise InputError(
            f"HyperPrior({where}) has shape {prior.shape()}, but {name} is one number: give a "
            "distribution of shape ()"
        )


def _check_parameters(where: str, prior: Any) -> None:
    """Refuse parameters that no such distribution has: NaN, or a scale that is not positive."""
    for name, constraint in prior.arg_constraints.items():
        value = getattr(prior, name, None)
        if not isinstance(value, (int, float, np.ndarray, np.generic)) and not hasattr(
            value, "__array__"
        ):
            continue
        numbers = np.asarray(value, dtype=float)
        bound = name in ("low", "high")
        finite = not np.isnan(numbers).any() if bound else np.isfinite(numbers).all()
        if not (finite and (bound or np.all(np.asarray(constraint(numbers))))):
            raise InputError(
                f"HyperPrior({where}) is {type(prior).__name__} with {name} = "
                f"{inputs.shown(numbers.tolist())}, which it cannot have"
            )
    if isinstance(getattr(prior, "base_dist", None), dist.Distribution):
        _check_parameters(where, prior.base_dist)


def refuse_negative(where: str, prior: dist.Distribution, what: str) -> None:
    """Refuse a prior of something positive that gives it negative values."""
    support: Any = prior.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if hasattr(support, "lower_bound"):
        below = bool(np.any(np.asarray(support.lower_bound) < 0))
    elif support is constraints.real or isinstance(support, type(constraints.real)):
        below = True
    else:
        shape = prior.shape()
        points = np.broadcast_to(NEGATIVE.reshape(-1, *(1,) * len(shape)), (len(NEGATIVE), *shape))
        below = bool(np.any(np.asarray(support(points))))
    if below:
        raise InputError(
            f"HyperPrior({where}) is a prior on {what}, but {type(prior).__name__} allows "
            "negative values; use HalfNormal, HalfCauchy, Gamma or a truncated distribution"
        )


def check_size(name: str, prior: Any, labels: Sequence[str], width: int | None = None) -> None:
    """Refuse names that the tasks have not, and vectors of another size than theirs.

    ``width`` is the length of what each name has, where that is a vector too. One that names
    nothing may stand idle, so that one HyperPrior serves several models.
    """
    if prior is None or not (labels or isinstance(prior, Mapping)):
        return
    if isinstance(prior, Mapping):
        for c in prior:
            if c not in labels:
                raise InputError(
                    f"HyperPrior({name}=…) names {c!r}, which has no {name}; "
                    f"{suggestion(c, list(labels))}"
                )
    size = len(labels) if width is None else width
    entries = prior if isinstance(prior, Mapping) else {None: prior}
    for c, each in entries.items():
        allowed = [()] if c is not None and width is None else [(), (size,)]
        if each.shape() not in allowed:
            where = name if c is None else f"{name}={{{c!r}: …}}"
            expected = " or ".join(map(str, allowed))
            raise InputError(
                f"HyperPrior({where}{'=…' if c is None else ''}) has shape {each.shape()}; "
                f"expected {expected}{'' if c is not None else f' for {_few(labels)}'}"
            )


def _few(labels: Sequence[str]) -> str:
    shown = ", ".join(labels[:12])
    return shown if len(labels) <= 12 else f"{shown} and {len(labels) - 12} more"
