"""What a saved fit keeps of the columns that it was computed in, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from hierbayes.fit.learned import AFit, Learned
from hierbayes.fit.stored import (
    array,
    check_draws,
    check_phi,
    entry,
    field,
    names,
    number,
    refuse,
)
from hierbayes.priors.column_map import ColumnMap
from hierbayes.priors.columns import Columns, from_plain, to_plain
from hierbayes.priors.serialise import hyperprior_from_plain, hyperprior_to_plain
from hierbayes.tasks import Tasks

PREFIX = "inside."
"""Of the names of its arrays."""


def inside_to_plain(fit: Learned) -> dict[str, Any] | None:
    """All but arrays of the fit inside, as JSON has it; None where there is none."""
    if fit.inner is None or fit.at is None:
        return None
    return {
        "at": to_plain(fit.at),
        "hyperprior": hyperprior_to_plain(fit.inner.model.hyperprior),
        "evidence": fit.inner.evidence,
        "log_posterior": fit.inner.log_posterior,
    }


def arrays_inside(fit: Learned) -> dict[str, Any]:
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


def columns_of(kind: type, plain: Mapping[str, Any], tasks: Tasks) -> Any:
    """``Columns`` or ``ColumnMap`` from what the file says, refused where it is not of these tasks.

    Each column has a mean, its rest and a positive sd; the intercepts are columns by position.
    """
    labels = tasks.labels
    known = {"varying": tasks.coef, "shared": labels.shared,
             "task_predictors": labels.task_predictors}  # fmt: skip
    for name, of in known.items():
        values = entry(plain, name, list)
        with field(name):
            lying = np.array(values, dtype=float).reshape(-1, 3)
            if kind is Columns and not values:
                continue  # of a model whose columns are left as they are
            if len(lying) != len(of) or not np.isfinite(lying).all() or (lying[:, 2] <= 0).any():
                refuse(f"expected mean, rest and sd of {len(of)} column(s), found {values!r:.60}")
    for name, of in (("intercept", tasks.coef), ("shared_intercept", labels.shared)):
        at = entry(plain, name, (list, type(None)))
        with field(name):
            fine = at is None or (
                len(at) == 2 and at[0] in range(len(of)) and np.isfinite(at[1]) and at[1] != 0
            )
            if not fine:
                refuse(f"expected a column's place and its value, found {at!r:.60}")
    if kind is Columns:
        names(plain, "stated")
    return from_plain(kind, plain)


def with_inside(
    outer: AFit, described: Mapping[str, Any] | None, arrays: Mapping[str, np.ndarray], own: bool
) -> AFit:
    """The fit with the one inside, whose θ has the moments that were read for it.

    ``own``: the model is the user's, not the file's.
    """
    if not described:
        return outer
    with field("at"):
        at = columns_of(ColumnMap, entry(described, "at", dict), outer.tasks)
    with field("hyperprior"):
        believed = hyperprior_from_plain(entry(described, "hyperprior", dict))
    model = replace(outer.model, hyperprior=believed, columns=Columns(), encoder=None)
    tasks = at.tasks(outer.tasks)

    def named(part: str) -> dict[str, np.ndarray]:
        start = f"{PREFIX}{part}."
        return {n.removeprefix(start): v for n, v in arrays.items() if n.startswith(start)}

    phi, draws, theta = named("phi"), named("draws"), arrays.get(f"{PREFIX}theta")
    with field("phi"):
        check_phi(phi, outer.method, model, tasks, own)
        if {*at.phi(phi)} != {*outer.phi}:
            refuse(f"{tuple(phi)} are not those of the fit, {tuple(outer.phi)}")
    with field("draws"):
        check_draws(draws, theta, {}, phi, tasks, own)
        same = {*draws} == {*(outer.phi_draws or {})}
        if not same or (theta is None) != (outer.theta_draws is None):
            refuse(f"{tuple(draws)} are not those of the fit")
    errors, bootstrap = named("se"), named("bootstrap")
    for name in errors:
        with field("standard_errors"):
            array(errors, name, phi[name].shape, finite=False)
    for name in bootstrap:
        with field("phi_bootstrap"):
            array(bootstrap, name, (len(bootstrap[name]), *phi[name].shape))
    inner = replace(
        outer, model=model, tasks=tasks, phi=phi, phi_draws=draws or None, theta_draws=theta,
        standard_errors=errors, phi_bootstrap=bootstrap or None,
        evidence=number(described, "evidence"), log_posterior=number(described, "log_posterior"),
    )  # fmt: skip
    return replace(outer, training=None, inner=inner, at=at)
