"""Fits in ArviZ's schema: an ``xarray.DataTree`` with ArviZ's groups and names.

``posterior`` holds draws with (chain, draw) dimensions; point estimates stand in
``point_estimate``, never as a fake chain of one draw.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hierbayes.fit import predictive
from hierbayes.fit.learned import Learned
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.tasks import Task, Tasks

LARGEST_LOG_LIKELIHOOD = 10_000_000
"""Draws × rows up to which the DataTree holds ``log_likelihood`` unasked (80 MB)."""

PREDICTIVE = ("posterior_predictive", "prior", "prior_predictive")
"""Groups that can be drawn again, and are in no file."""


def build(fit: Learned, *, with_predictive: bool = True) -> Any:
    """The fit as a DataTree."""
    import xarray as xr

    groups: dict[str, Any] = {}
    draws = _draws(fit)
    attrs = {"inference_library": "hierbayes", "method": fit.method.name}
    if draws:
        posterior = dataset(draws, fit.tasks, dims(fit), ("chain", "draw"))
        groups["posterior"] = posterior.assign_attrs(attrs)
        if fit.sample_stats:
            groups["sample_stats"] = dataset(fit.sample_stats, fit.tasks, {}, ("chain", "draw"))
        num_draws = np.prod(next(iter(draws.values())).shape[:2])
        if "theta" in draws and num_draws * fit.tasks.num_rows <= LARGEST_LOG_LIKELIHOOD:
            groups["log_likelihood"] = log_likelihood(fit.inside, _draws(fit.inside))
    if fit.phi_draws is None or fit.theta_draws is None:
        groups["point_estimate"] = _point_estimate(fit).assign_attrs(attrs)
    outcome = fit.tasks.outcome
    if fit.model.likelihood.discrete:
        outcome = outcome.astype(np.int64)
    groups["observed_data"] = xr.Dataset({"y": _by_row(outcome, fit.tasks)})
    groups["constant_data"] = _constant_data(fit.tasks)
    left_out: dict[str, str] = {}
    if with_predictive:
        found, left_out = _predictive(fit)
        groups |= found
    tree = xr.DataTree.from_dict(groups)
    tree.attrs.update(left_out)
    return tree


def _predictive(fit: Learned) -> tuple[dict[str, Any], dict[str, str]]:
    """The predictive groups, and why those are left out that are not there."""
    import xarray as xr

    groups: dict[str, Any] = {}
    left_out = {}
    y, why = predictive.posterior_predictive(fit.inside)
    if y is None:
        left_out["no_posterior_predictive"] = why
    else:
        coords = {"chain": np.arange(y.shape[0]), "draw": np.arange(y.shape[1])}
        rows = _by_row(y, fit.tasks, ("chain", "draw"))
        groups["posterior_predictive"] = xr.Dataset({"y": rows}, coords=coords)
    drawn, why = predictive.prior_predictive(fit.inside)
    if drawn is not None and fit.at is not None:
        beta = drawn.get("beta")
        theta = fit.at.theta(drawn["theta"], None if beta is None else beta[:, None])
        drawn = fit.at.phi(drawn) | {"theta": theta}
    if drawn is None:
        left_out["no_prior_predictive"] = why
    else:
        coords = {"chain": np.arange(1), "draw": np.arange(len(drawn["y"]))}
        rows = _by_row(drawn.pop("y")[None], fit.tasks, ("chain", "draw"))
        groups["prior_predictive"] = xr.Dataset({"y": rows}, coords=coords)
        chained = {name: value[None] for name, value in drawn.items()}
        groups["prior"] = dataset(chained, fit.tasks, dims(fit), ("chain", "draw"))
    return groups, left_out


def _draws(fit: Learned) -> dict[str, np.ndarray]:
    if fit.theta_draws is not None:
        return {**(fit.phi_draws or {}), "theta": fit.theta_draws}
    return dict(fit.phi_draws or {})


def _point_estimate(fit: Learned) -> Any:
    adapted = fit.adapted
    values = {**fit.phi, "theta": adapted.posterior.mean}
    named = dims(fit)
    tree = dataset(values, fit.tasks, named)
    for name, se in fit.standard_errors.items():
        tree[f"{name}_se"] = (named.get(name, ()), np.asarray(se))
    if adapted.covariance is not None:
        tree["theta_sd"] = adapted.sd
        if fit.theta_draws is None:
            tree["theta_covariance"] = adapted.covariance
    if not adapted.posterior.has_prior:
        tree["theta_identified"] = adapted.sd.notnull()
    return tree


Dims = Mapping[str, tuple[str, ...]]
"""Names of the dimensions of each part of φ."""


def dims(fit: Learned) -> Dims:
    """Those of a fit's φ."""
    parts = [*fit.model.parts(fit.tasks), *fit.adaptation.parts(fit.phi)]
    return {p.name: p.dims for p in parts}


def dataset(values: dict[str, Any], tasks: Tasks, dims: Dims, lead: tuple[str, ...] = ()) -> Any:
    """Arrays by name as a Dataset with labelled dimensions; numbers where ``dims`` has no name.

    θ stands first. ArviZ's summary stacks values in the order in which the Dataset meets its
    dimensions, and labels them in each variable's own: after μ (coef) it would turn θ (task, coef)
    round.
    """
    import xarray as xr

    named = {**dims, "theta": ("task", "coef")}
    coords: dict[str, Any] = {d: list(labels) for d, labels in tasks.labels.by_dim.items()}
    coords["task"] = tasks.names
    variables = {}
    for name in sorted(values, key=lambda name: name != "theta"):
        value = np.asarray(values[name])
        unnamed = tuple(f"{name}_dim_{i}" for i in range(value.ndim - len(lead)))
        variables[name] = ((*lead, *named.get(name, unnamed)), value)
    used = {d for over, _ in variables.values() for d in over}
    for axis, dim in enumerate(lead):
        first = next(iter(variables.values()), None)
        if first is not None:
            coords[dim] = np.arange(first[1].shape[axis])
    return xr.Dataset(variables, coords={d: c for d, c in coords.items() if d in used})


def correlation_pairs(corr: Any) -> dict[str, Any]:
    """The correlations above the diagonal as one variable a pair."""
    names = corr["coef"].values.tolist()
    return {
        f"corr[{a}, {b}]": corr.sel(coef=a, coef_bis=b, drop=True)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }


def log_likelihood(fit: Learned, draws: dict[str, np.ndarray], by: str = "row") -> Any:
    """Log p(y_i | θ, φ) of every draw, (chain, draw, row); ``by="task"`` sums within tasks."""
    import xarray as xr

    tasks, theta = fit.tasks, draws["theta"]
    lead = theta.shape[:2]
    phis = {
        name: draws[name] if name in draws else np.broadcast_to(value, (*lead, *np.shape(value)))
        for name, value in fit.phi.items()
    }
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in phis.items()}
    with float64():
        by_row = _log_likelihood(
            fit.model.without_encoder(), theta.reshape(-1, *theta.shape[2:]), flat,
            *fit.model.likelihood.arrange(tasks),
        )  # fmt: skip
        values = np.asarray(by_row)
        if values.ndim > 2:  # tasks side by side, filled up
            values = values[:, fit.model.likelihood.arrange(tasks)[0].mask]
        values = values.reshape(*lead, tasks.num_rows)
    coords = {"chain": np.arange(theta.shape[0]), "draw": np.arange(theta.shape[1])}
    if by == "task":
        upto = np.concatenate([np.zeros((*theta.shape[:2], 1)), values.cumsum(axis=-1)], axis=-1)
        cut = np.diff(upto[..., tasks.starts], axis=-1)
        data = xr.DataArray(cut, dims=("chain", "draw", "task"))
        return xr.Dataset({"y": data}, coords={**coords, "task": tasks.names})
    rows = _by_row(values, tasks, ("chain", "draw"))
    return xr.Dataset({"y": rows}, coords=coords)


@functools.partial(jax.jit, static_argnums=0)
def _log_likelihood(
    model: HierarchicalModel, thetas: Any, phis: dict[str, Any], rows: Task, task_of_row: Any
) -> jax.Array:
    """Log p(y_i | θ, φ) of S draws of (φ, θ), (S, N)."""

    def one(draw: Any) -> jax.Array:
        theta, phi = draw
        return model.likelihood.log_likelihood_of_rows(theta, phi, rows, task_of_row)

    return jax.lax.map(one, (thetas, phis), batch_size=64)


def _by_row(values: Any, tasks: Tasks, lead: tuple[str, ...] = ()) -> Any:
    import xarray as xr

    coords = {"row": tasks.rows, "row_task": ("row", tasks.names[tasks.task_of_row])}
    return xr.DataArray(values, dims=(*lead, "row"), coords=coords)


def _constant_data(tasks: Tasks) -> Any:
    import xarray as xr

    variables: dict[str, Any] = {
        "predictors": (_columns(tasks), tasks.predictors),
        "task_of_row": ("row", tasks.task_of_row),
        "starts": ("boundary", tasks.starts),
    }
    coords: dict[str, Any] = {"row": tasks.rows, "task": tasks.names}
    if _columns(tasks)[1:] == ("coef",):
        coords["coef"] = list(tasks.coef)
    if tasks.labels.shared:
        variables["shared_predictors"] = (("row", "shared"), tasks.shared)
        coords["shared"] = list(tasks.labels.shared)
    if tasks.labels.task_predictors:
        variables["task_predictors"] = (("task", "task_predictor"), tasks.task_predictors)
        coords["task_predictor"] = list(tasks.labels.task_predictors)
    variables |= {name: ("row", values) for name, values in tasks.slots.items()}
    return xr.Dataset(variables, coords=coords)


def _columns(tasks: Tasks) -> tuple[str, ...]:
    """Dimensions of the predictors: θ's coefficients, unless a network stands between."""
    x = np.shape(tasks.predictors)
    if len(x) == 2 and x[1] == len(tasks.coef):
        return ("row", "coef")
    return ("row", *(f"x_dim_{i}" for i in range(len(x) - 1)))
