"""A fit as one NetCDF file: ArviZ's groups, the data, and the model as JSON. Never pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hierbayes import likelihoods, priors
from hierbayes.adaptation import (
    Adaptation,
    Adapted,
    Conjugate,
    GradientSteps,
    Laplace,
    LeastSquares,
    MaximumLikelihood,
    MixedScales,
    NotOffered,
    Proximal,
    Quadrature,
)
from hierbayes.adaptation.implied_posterior import ImpliedPosterior
from hierbayes.adaptation.linearised import LinearisedSteps
from hierbayes.adaptation.variational import Variational
from hierbayes.errors import InputError
from hierbayes.files import whole_file
from hierbayes.fit.datatree import PREDICTIVE, build
from hierbayes.fit.fit import Fit
from hierbayes.fit.stored_inside import arrays_inside, inside_to_plain, with_inside
from hierbayes.formula import FormulaEncoder
from hierbayes.likelihoods.neural import Neural
from hierbayes.model import HierarchicalModel
from hierbayes.priors.columns import Columns, from_plain, to_plain
from hierbayes.priors.serialise import hyperprior_from_plain, hyperprior_to_plain
from hierbayes.tasks import Labels, Tasks
from hierbayes.tasks.frames import as_names
from hierbayes.tasks.reading import ColumnReader
from hierbayes.tasks.views import SLOTS

if TYPE_CHECKING:
    import optax

GROUP = "hierbayes"
KINDS = (
    Conjugate, GradientSteps, ImpliedPosterior, Laplace, LeastSquares, LinearisedSteps,
    MaximumLikelihood, MixedScales, NotOffered, Proximal, Quadrature, Variational,
)  # fmt: skip
LIKELIHOODS = (
    likelihoods.Bernoulli, likelihoods.Binomial, likelihoods.Gamma, likelihoods.Gaussian,
    likelihoods.NegativeBinomial, likelihoods.Poisson, likelihoods.StudentT,
)  # fmt: skip
PRIORS = (priors.Gaussian, priors.StudentT)
FORMAT = 3
"""3 names the prior; 2 names the likelihood; 1 knew the Gaussian one alone, by its ``known_se``."""


def save(fit: Fit, path: Any) -> None:
    """Write ``fit`` to ``path``, whole or not at all."""
    import xarray as xr

    if type(fit.adaptation) not in KINDS:
        raise InputError(
            f"a fit by {fit.method} cannot be saved whole; fit.datatree.to_netcdf(path) keeps its "
            "draws and estimates"
        )
    if fit.learned is not None:
        raise InputError(
            "this fit was carried to other tasks: save the one that learned phi, and ask "
            "hb.load(path).on(tasks) for this one again"
        )
    described, encoder_table = _describe(fit)
    # draws of data can be drawn again, and the same ones are
    read = fit.__dict__.get("datatree")
    tree = build(fit, with_predictive=False) if read is None else read.copy()
    for group in {*PREDICTIVE} & {*tree.children}:
        del tree[group]
    tree[GROUP] = xr.DataTree(_arrays(fit).assign_attrs(fit=json.dumps(described)))
    if encoder_table is not None:
        tree[f"{GROUP}/training"] = xr.DataTree(encoder_table)
    with whole_file(path) as temporary:
        tree.to_netcdf(temporary, engine="h5netcdf")


def load(
    path: Any,
    model: HierarchicalModel | None = None,
    inner_optimiser: optax.GradientTransformation | None = None,
) -> Fit:
    """Read a fit that :meth:`Fit.save` wrote.

    Parameters
    ----------
    path : path
    model : HierarchicalModel, optional
        The model, where it holds functions of the user's that no file can keep: a network.
    inner_optimiser : optax.GradientTransformation, optional
        The optimiser of the inner loop, where the fit had one.

    Returns
    -------
    Fit
        Equal to the one saved: φ, θ, draws, data, model, warnings, the formula's transforms.

    Examples
    --------
    >>> import tempfile, pathlib, hierbayes as hb
    >>> built, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
    ...                                known_se="se")
    >>> fit = hb.complete_pooling(built, tasks)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fit.save(pathlib.Path(folder) / "fit.nc")
    ...     again = hb.load(pathlib.Path(folder) / "fit.nc")
    >>> again.phi["mu"] == fit.phi["mu"]
    array([ True])
    """
    import xarray as xr

    if not Path(path).is_file():
        raise InputError(f"there is no file {str(path)!r}")
    try:
        with xr.open_datatree(path, engine="h5netcdf") as opened:
            tree = opened.load()
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not a NetCDF file: {error}") from error
    if GROUP not in tree.children or "fit" not in tree[GROUP].attrs:
        raise InputError(f"{str(path)!r} is not a fit saved by hierbayes")
    described = json.loads(tree[GROUP].attrs["fit"])
    if described["format"] > FORMAT:
        raise InputError(
            f"{str(path)!r} was saved by a newer hierbayes (format {described['format']}); "
            "upgrade to read it"
        )
    arrays = {str(name): value.values for name, value in tree[GROUP].data_vars.items()}
    encoder = _encoder(described["encoder"], tree)
    tasks = _tasks(tree, described["labels"], encoder)
    if model is not None and isinstance(model.likelihood, Neural):
        _check_network(model, arrays)
    training = None
    by_point = not described["phi_draws"]
    mixed = described["adaptation"]["kind"] == MixedScales.__name__
    if "training.mean" in arrays and not (mixed and by_point):  # made again, with its normals
        training = Adapted(
            arrays["training.mean"],
            arrays.get("training.covariance"),
            arrays.get("training.unidentified"),
            arrays.get("training.absorbed"),
            cross=arrays.get("training.cross"),
            of_shared=arrays.get("training.of_shared"),
        )
    draws = {}
    if "posterior" in tree.children:
        draws = {str(n): v.values for n, v in tree["posterior"].data_vars.items()}
    theta_draws = draws.pop("theta", None)
    stats = {}
    if "sample_stats" in tree.children:
        stats = {str(n): v.values for n, v in tree["sample_stats"].data_vars.items()}
    known = model or _model(described["model"], encoder)
    outer = Fit(
        described["method"],
        known,
        tasks,
        _prefixed(arrays, "phi."),
        _adaptation(described["adaptation"], inner_optimiser),
        training,
        phi_draws={name: draws[name] for name in described["phi_draws"]} or None,
        theta_draws=theta_draws,
        sample_stats=stats,
        standard_errors=_prefixed(arrays, "se."),
        evidence=described["evidence"],
        no_evidence=described["no_evidence"],
        log_posterior=described["log_posterior"],
        warnings=tuple(described["warnings"]),
        info=described["info"],
        phi_bootstrap=_prefixed(arrays, "bootstrap.") or None,
    )
    return with_inside(outer, described.get("inside"), arrays)


def _check_network(model: HierarchicalModel, arrays: dict[str, np.ndarray]) -> None:
    """Refuse a network that has other weights than those in the file."""
    assert isinstance(model.likelihood, Neural)
    weights = model.likelihood.weights
    kept = arrays.get("phi.features", arrays["phi.mu"])
    if kept.shape != (weights.size,):
        raise InputError(
            f"the file holds {kept.size} weights, but the model's network has {weights.size}; pass "
            "the model that was fitted"
        )


def _describe(fit: Fit) -> tuple[dict[str, Any], Any]:
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
        "method": fit.method,
        "model": model_json,
        "labels": {
            "coef": labels.coef,
            "shared": labels.shared,
            "task_predictors": labels.task_predictors,
            "task": labels.task,
            "outcome": labels.outcome,
        },
        "encoder": encoder_json,
        "adaptation": {"kind": type(adaptation).__name__, "settings": _settings(adaptation)},
        "phi_draws": list(fit.phi_draws or {}),
        "evidence": fit.evidence,
        "no_evidence": fit.no_evidence,
        "log_posterior": fit.log_posterior,
        "warnings": fit.warnings,
        "info": fit.info,
        "inside": inside_to_plain(fit),
    }
    return json.loads(json.dumps(described, default=_number)), table


OPTIMISER = "an Optax optimiser"
"""What stands in the file for an inner optimiser, a function that no file can keep."""


def _settings(adaptation: Adaptation) -> dict[str, Any]:
    settings = dict(vars(adaptation))
    if settings.get("optimiser") is not None:
        settings["optimiser"] = OPTIMISER
    return settings


def _number(value: Any) -> Any:
    return np.asarray(value).tolist()


def _arrays(fit: Fit) -> Any:
    """φ, standard errors and θ's moments, each array with dimensions of its own."""
    import xarray as xr

    arrays = {f"phi.{name}": value for name, value in fit.phi.items()}
    arrays |= {f"se.{name}": value for name, value in fit.standard_errors.items()}
    arrays |= {f"bootstrap.{name}": v for name, v in (fit.phi_bootstrap or {}).items()}
    arrays |= arrays_inside(fit)
    training = fit.inside.training
    if training is not None:
        moments = {n: v for n, v in vars(training).items() if isinstance(v, np.ndarray)}
        arrays |= {f"training.{name}": value for name, value in moments.items()}
    return xr.Dataset(
        {
            name: ([f"{name}.{axis}" for axis in range(np.ndim(value))], np.asarray(value))
            for name, value in arrays.items()
        }
    )


def _prefixed(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}


def _tasks(tree: Any, described: dict[str, Any], encoder: Any) -> Tasks:
    data = tree["constant_data"]
    num_rows, names = len(data["row"]), as_names(data["task"].values.tolist())

    def matrix(name: str, length: int) -> np.ndarray:
        return data[name].values if name in data else np.zeros((length, 0))

    labels = Labels(
        names,
        tuple(described["coef"]),
        tuple(described["shared"]),
        tuple(described["task_predictors"]),
        described["task"],
        described["outcome"],
        encoder,
    )
    return Tasks(
        data["predictors"].values,
        matrix("shared_predictors", num_rows),
        matrix("task_predictors", len(names)),
        tree["observed_data"]["y"].values.astype(np.float64),
        {slot: data[slot].values for slot in SLOTS if slot in data},
        data["starts"].values,
        data["row"].values,
        labels,
    )


def _encoder(described: dict[str, Any] | None, tree: Any) -> Any:
    if described is None:
        return None
    if "reader" in described:
        return ColumnReader(**{k: _tuples(v) for k, v in described["reader"].items()})
    return FormulaEncoder.from_plain(described, tree[f"{GROUP}/training"].to_dataset())


def _model(described: dict[str, Any] | None, encoder: Any) -> HierarchicalModel:
    if described is None:
        raise InputError("this fit's model holds functions: pass it, hb.load(path, model=…)")
    settings = {"known_se": described["known_se"]} if "known_se" in described else {}
    likelihood = described.get("likelihood", {"kind": "Gaussian", "settings": settings})
    kinds = {kind.__name__: kind for kind in LIKELIHOODS}
    return HierarchicalModel(
        kinds[likelihood["kind"]](**likelihood["settings"]),
        _prior(described),
        hyperprior_from_plain(described["hyperprior"]),
        encoder,
        from_plain(Columns, described["columns"]) if described.get("columns") else None,
    )


def _prior(described: dict[str, Any]) -> priors.Prior:
    """The prior of tasks; up to format 2 a Gaussian one, which had no name."""
    names = ("correlated", "zero_mean")
    prior = described.get("prior", {"kind": "Gaussian"})
    settings = prior.get("settings", {name: described.get(name) for name in names})
    kinds = {kind.__name__: kind for kind in PRIORS}
    return kinds[prior["kind"]](**{name: _tuples(value) for name, value in settings.items()})


def _adaptation(described: dict[str, Any], optimiser: Any) -> Adaptation:
    kinds = {kind.__name__: kind for kind in KINDS}
    settings = described["settings"]
    if settings.get("optimiser") == OPTIMISER:
        if optimiser is None:
            raise InputError(
                "this fit's inner loop had an Optax optimiser: pass it, "
                "hb.load(path, …, inner_optimiser=…)"
            )
        settings = {**settings, "optimiser": optimiser}
    return kinds[described["kind"]](**settings)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
