"""A fit as one NetCDF file: ArviZ's groups, the data, and the model as JSON. Never pickle."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import numpy as np
import optax

from hierbayes.adaptation import (
    Adaptation,
)
from hierbayes.errors import InputError
from hierbayes.files import MARK, checked_place, sealed, write_whole
from hierbayes.fit import hdf5
from hierbayes.fit.datatree import PREDICTIVE, build
from hierbayes.fit.learned import Learned
from hierbayes.fit.method import METHODS, Method
from hierbayes.fit.stored import (
    FORMAT,
    GROUP,
    KINDS,
    LIKELIHOODS,
    OPTIMISER,
    OWN,
    PRIORS,
    arrays_inside,
    inside_to_plain,
)
from hierbayes.formula import FormulaEncoder
from hierbayes.priors.columns import to_plain
from hierbayes.priors.serialise import hyperprior_to_plain
from hierbayes.tasks.container import ColumnReader


def save(fit: Learned, path: Any) -> None:
    """Write ``fit`` to ``path``, whole or not at all."""
    import xarray as xr

    if type(fit.adaptation) not in KINDS and not _of_the_users_method(fit):
        raise InputError(
            f"a fit by {fit.method} cannot be saved whole; fit.datatree.to_netcdf(path) keeps its "
            "draws and estimates"
        )
    if fit.learned is not None:
        raise InputError(
            "this fit was carried to other tasks: save the one that learned phi, and ask "
            "hb.load(path).on(tasks) for this one again"
        )
    checked_place(path)
    described, encoder_table = _describe(fit)
    # draws of data can be drawn again, and the same ones are
    read = fit.__dict__.get("datatree")
    tree = build(fit, with_predictive=False) if read is None else read.copy()
    for group in {*PREDICTIVE} & {*tree.children}:
        del tree[group]
    tree[GROUP] = xr.DataTree(_arrays(fit).assign_attrs(fit=json.dumps(described)))
    if encoder_table is not None:
        tree[f"{GROUP}/training"] = xr.DataTree(encoder_table)
    # in memory, for HDF5 is C code that dies where a disk is full
    memory = tree.to_netcdf(None, engine="h5netcdf")
    write_whole(path, sealed(hdf5.marked(bytes(memory), MARK)))


def _describe(fit: Learned) -> tuple[dict[str, Any], Any]:
    """Everything but arrays as JSON, and the encoder's training columns as a Dataset."""
    model, labels = fit.model, fit.tasks.labels
    likelihood, prior = model.likelihood, model.prior
    if type(likelihood) not in LIKELIHOODS or type(prior) not in PRIORS:
        model_json = None
    else:
        model_json = {
            "likelihood": {"kind": type(likelihood).__name__, "settings": vars(likelihood)},
            "prior": {"kind": type(prior).__name__, "settings": vars(prior)},
            "hyperprior": hyperprior_to_plain(model.hyperprior),
            "columns": None if model.columns is None else to_plain(model.columns),
        }
    encoder, table = model.encoder or labels.encoder, None
    encoder_json: dict[str, Any] | None = None
    if isinstance(encoder, FormulaEncoder):
        encoder_json, table = encoder.to_plain()
    elif isinstance(encoder, ColumnReader):
        encoder_json = {"reader": vars(encoder)}
    adaptation = fit.adaptation
    described = {
        "format": FORMAT,
        "method": _method(fit.method),
        "model": model_json,
        "labels": {
            "coef": labels.coef,
            "shared": labels.shared,
            "task_predictors": labels.task_predictors,
            "task": labels.task,
            "outcome": labels.outcome,
        },
        "encoder": encoder_json,
        "adaptation": {"kind": type(adaptation).__name__, "settings": _settings(adaptation)}
        if type(adaptation) in KINDS
        else {"kind": OWN, "settings": {}},
        "phi_draws": list(fit.phi_draws or {}),
        "theta_draws": fit.theta_draws is not None,
        "evidence": fit.evidence,
        "no_evidence": fit.no_evidence,
        "log_posterior": fit.log_posterior,
        "warnings": fit.warnings,
        "info": fit.info,
        "inside": inside_to_plain(fit),
    }
    return json.loads(json.dumps(described, default=_number)), table


def _of_the_users_method(fit: Learned) -> bool:
    """Whether the adaptation is a user's own, which the user's method gives again."""
    own = getattr(fit.method, "adaptation", None)
    return type(fit.method).__name__ not in METHODS and own is not None and fit.adaptation == own()


def _method(method: Method) -> dict[str, Any]:
    """The method's class and settings; an optimiser is a function that no file can keep."""
    settings: dict[str, Any] = {}
    for f in fields(method):  # type: ignore[arg-type]
        value = getattr(method, f.name)
        settings[f.name] = OPTIMISER if isinstance(value, optax.GradientTransformation) else value
        try:
            json.dumps(settings[f.name], default=_number)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{method.name} cannot be saved: its setting {f.name!r} is "
                f"{type(value).__name__}, which no file keeps"
            ) from error
    return {"kind": type(method).__name__, "settings": settings}


def _settings(adaptation: Adaptation) -> dict[str, Any]:
    settings = dict(vars(adaptation))
    if settings.get("optimiser") is not None:
        settings["optimiser"] = OPTIMISER
    return settings


def _number(value: Any) -> Any:
    return np.asarray(value).tolist()


def _arrays(fit: Learned) -> Any:
    """φ, standard errors and θ's moments, each array with dimensions of its own."""
    import xarray as xr

    arrays = {f"phi.{name}": value for name, value in fit.phi.items()}
    arrays |= {f"se.{name}": value for name, value in fit.standard_errors.items()}
    arrays |= {f"bootstrap.{name}": v for name, v in (fit.phi_bootstrap or {}).items()}
    arrays |= arrays_inside(fit)
    training = fit.inside.training
    if training is not None:
        told = {"spread": "covariance", "blind": "unidentified"}
        moments = {n: v for n, v in vars(training).items() if isinstance(v, np.ndarray) and v.size}
        arrays |= {f"training.{told.get(name, name)}": value for name, value in moments.items()}
    return xr.Dataset(
        {
            name: ([f"{name}.{axis}" for axis in range(np.ndim(value))], np.asarray(value))
            for name, value in arrays.items()
        }
    )
