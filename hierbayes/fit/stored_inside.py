"""What a saved fit keeps of the columns that it was computed in, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from hierbayes.fit.fit import Fit
from hierbayes.priors.column_map import ColumnMap
from hierbayes.priors.columns import Columns, from_plain, to_plain
from hierbayes.priors.serialise import hyperprior_from_plain, hyperprior_to_plain

PREFIX = "inside."
"""Of the names of its arrays."""


def inside_to_plain(fit: Fit) -> dict[str, Any] | None:
    """All but arrays of the fit inside, as JSON has it; None where there is none."""
    if fit.inner is None or fit.at is None:
        return None
    return {
        "at": to_plain(fit.at),
        "hyperprior": hyperprior_to_plain(fit.inner.model.hyperprior),
        "evidence": fit.inner.evidence,
        "log_posterior": fit.inner.log_posterior,
    }


def arrays_inside(fit: Fit) -> dict[str, Any]:
    """φ, standard errors and draws of the fit inside, by name."""
    inner = fit.inner
    if inner is None:
        return {}
    parts: dict[str, Mapping[str, Any]] = {
        "phi": inner.phi, "se": inner.standard_errors, "bootstrap": inner.phi_bootstrap or {},
        "draws": inner.phi_draws or {},
    }  # fmt: skip
    found = {f"{PREFIX}{part}.{n}": v for part, values in parts.items() for n, v in values.items()}
    if inner.theta_draws is not None:
        found[f"{PREFIX}theta"] = inner.theta_draws
    return found


def with_inside(
    outer: Fit, described: Mapping[str, Any] | None, arrays: Mapping[str, np.ndarray]
) -> Fit:
    """The fit with the one inside, whose θ has the moments that were read for it."""
    if not described:
        return outer
    at = from_plain(ColumnMap, described["at"])
    model = replace(
        outer.model, hyperprior=hyperprior_from_plain(described["hyperprior"]), columns=Columns(),
        encoder=None,
    )  # fmt: skip

    def named(part: str) -> dict[str, np.ndarray]:
        start = f"{PREFIX}{part}."
        return {n.removeprefix(start): v for n, v in arrays.items() if n.startswith(start)}

    inner = replace(
        outer, model=model, tasks=at.tasks(outer.tasks), phi=named("phi"),
        phi_draws=named("draws") or None, theta_draws=arrays.get(f"{PREFIX}theta"),
        standard_errors=named("se"), phi_bootstrap=named("bootstrap") or None,
        evidence=described["evidence"], log_posterior=described["log_posterior"],
    )  # fmt: skip
    return replace(outer, training=None, inner=inner, at=at)
