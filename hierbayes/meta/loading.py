"""From what a saved fit says to the fit, every part of it checked before it is believed."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hierbayes.adaptation import Adaptation, Posterior, ScaleMixture
from hierbayes.errors import InputError
from hierbayes.files import unsealed
from hierbayes.fit import hdf5
from hierbayes.fit.fit import Fit
from hierbayes.fit.method import METHODS, Derived, Method, named_methods
from hierbayes.fit.stored import (
    FORMAT,
    GROUP,
    KINDS,
    LIKELIHOODS,
    OPTIMISER,
    OWN,
    PRIORS,
    NeedsMore,
    array,
    as_tuples,
    check_draws,
    check_phi,
    columns_of,
    entry,
    field,
    made,
    names,
    number,
    read_tasks,
    read_training,
    with_inside,
)
from hierbayes.formula import FormulaEncoder
from hierbayes.likelihoods.neural import Neural
from hierbayes.model import HierarchicalModel
from hierbayes.priors.columns import Columns
from hierbayes.priors.hyperprior import HyperPrior
from hierbayes.priors.serialise import hyperprior_from_plain
from hierbayes.tasks import Tasks
from hierbayes.tasks.container import ColumnReader
from hierbayes.tasks.views import SLOTS

if TYPE_CHECKING:
    import optax

SECONDS = 20.0
"""How long HDF5 may take for a file without a checksum, and 0.1 s more for each MB."""


def load(
    path: Any,
    model: HierarchicalModel | None = None,
    inner_optimiser: optax.GradientTransformation | None = None,
    method: type[Method] | None = None,
) -> Fit:
    """Read a fit that :meth:`Fit.save` wrote.

    Parameters
    ----------
    path : path
    model : HierarchicalModel, optional
        The model, where it holds functions of the user's that no file can keep: a network.
    inner_optimiser : optax.GradientTransformation, optional
        The optimiser of the inner loop, where the fit had one.
    method : class, optional
        The class of the fit's method, where that is the user's own.

    Returns
    -------
    Fit
        Equal to the one saved: φ, θ, draws, data, model, method, warnings, the formula's
        transforms. An optimiser of the outer loop is not kept: ``fit.method`` says so when it is
        run again.

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
    text, arrays, whole = _read(path)
    try:
        with field("hierbayes.fit"):
            described = json.loads(text)
            if not isinstance(described, dict):
                raise InputError(f"expected an object, found {type(described).__name__}")
            version = entry(described, "format", int)
        if version > FORMAT:
            raise InputError(
                f"it was saved by a newer hierbayes (format {version}); upgrade to read it"
            )
        return rebuilt(described, arrays, model, inner_optimiser, version, whole=whole, kind=method)
    except NeedsMore as error:
        raise InputError(str(error)) from None
    except InputError as error:
        raise InputError(
            f"{str(path)!r} cannot be read as a fit: {error}; it is damaged, or was not written "
            "by Fit.save"
        ) from error


def _read(path: Any) -> tuple[str, hdf5.Arrays, bool]:
    """The JSON and the arrays of a file whose checksum is right, or that never had one; which."""
    shown = repr(str(path))
    if not Path(path).is_file():
        raise InputError(f"there is no file {shown}")
    data = Path(path).read_bytes()
    try:
        content = unsealed(data)
        if content is None:  # of an earlier format, or no fit at all
            hdf5.refuse_what_hangs(str(path), SECONDS + len(data) / 1e7)
        text, arrays = hdf5.read(data if content is None else content)
    except hdf5.Damaged as error:
        raise InputError(
            f"{shown} is not a NetCDF file, or damaged: {error}; take another copy"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{shown} is damaged, or was changed since it was saved: {error}; take another copy"
        ) from error
    if text is None:
        raise InputError(f"{shown} is not a fit saved by hierbayes")
    return text, arrays, content is not None


def rebuilt(
    described: dict[str, Any],
    arrays: hdf5.Arrays,
    model: HierarchicalModel | None,
    optimiser: Any,
    version: int,
    *,
    whole: bool,
    kind: type[Method] | None = None,
) -> Fit:
    """The fit of a file; an InputError that names the field where it cannot be one.

    ``whole``: the file is of a version that names every setting, as all with a checksum do;
    ``kind``: the user's class of method.
    """
    with field("method"):
        method = _method(described, kind, optimiser)
    own = arrays.get(GROUP, {})
    tasks = _tasks(described, arrays)
    phi, theirs = _prefixed(own, "phi."), model is not None
    if model is None:
        with field("model"):
            model = _model(described["model"], tasks, version, whole)
    elif isinstance(model.likelihood, Neural):
        _check_network(model, own)
    with field("phi"):
        check_phi(phi, method, model, tasks, theirs)
    draws, theta_draws = _draws(described, arrays, phi, method, tasks, whole=whole, theirs=theirs)
    with field("adaptation"):
        adaptation = _adaptation(entry(described, "adaptation", dict), optimiser, whole, method)
    errors, bootstrap = _standard_errors(own, phi), _bootstrap(own, phi)
    warnings = _warnings(described)
    by_point = not draws and isinstance(adaptation, ScaleMixture)  # made again, with its normals
    training = None if by_point else _training(own, tasks)
    outer = Fit(
        method, model, tasks, phi, adaptation, training,
        phi_draws=draws or None, theta_draws=theta_draws,
        sample_stats=arrays.get("sample_stats", {}), standard_errors=errors,
        evidence=number(described, "evidence"), no_evidence=entry(described, "no_evidence", str),
        log_posterior=number(described, "log_posterior"), warnings=warnings,
        info=entry(described, "info", dict), phi_bootstrap=bootstrap or None,
    )  # fmt: skip
    with field("inside"):  # files of before have no columns of their own
        inside = entry(described, "inside", (dict, type(None)), ... if whole else None)
        return with_inside(outer, inside, own, theirs)


def _tasks(described: dict[str, Any], arrays: hdf5.Arrays) -> Tasks:
    """The tasks of the file, with the encoder that read them, whose coefficients must be theirs."""
    with field("encoder"):
        encoder = _encoder(
            entry(described, "encoder", (dict, type(None))), arrays.get(f"{GROUP}/training", {})
        )
    tasks = read_tasks(arrays, entry(described, "labels", dict), encoder)
    if isinstance(encoder, FormulaEncoder):
        with field("labels"):
            coef = [n for i in range(len(encoder.parts.bars)) for n in encoder._names(2 + i)]
            named = (tuple(coef), encoder.task_predictors)
            if (tasks.coef, tasks.labels.task_predictors) != named:
                raise InputError(f"{tasks.coef} are not the formula's coefficients, {coef}")
    elif encoder is None and f"{GROUP}/training" in arrays:
        raise InputError("encoder: there is none, but columns that it has learned from")
    return tasks


def _draws(
    described: dict[str, Any],
    arrays: hdf5.Arrays,
    phi: dict[str, np.ndarray],
    method: Method,
    tasks: Tasks,
    *,
    whole: bool,
    theirs: bool,
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The draws of φ by name, and those of θ, where there are any."""
    draws = dict(arrays.get("posterior", {}))
    theta_draws, stats = draws.pop("theta", None), arrays.get("sample_stats", {})
    drawn = names(described, "phi_draws")
    if whole and entry(described, "theta_draws", bool) != (theta_draws is not None):
        raise InputError("posterior.theta: it is missing, or was never there")
    with field("phi_draws"):
        of_phi = {n: draws[n] for n in drawn}
        check_draws(of_phi, theta_draws, stats, phi, tasks, theirs)
        if not {*drawn} <= {*phi} or {*drawn} != {*draws}:
            raise InputError(f"{drawn} are not those in phi and the posterior, {tuple(draws)}")
        if method.draws_phi and not drawn:
            raise InputError(f"{method} has draws of phi, and there are none")
    return of_phi, theta_draws


def _standard_errors(
    own: dict[str, np.ndarray], phi: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Standard errors by name of φ, of which some may be NaN."""
    errors = _prefixed(own, "se.")
    for name in errors:
        with field("standard_errors"):
            array(errors, name, np.shape(phi[name]), finite=False)
    return errors


def _bootstrap(own: dict[str, np.ndarray], phi: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Bootstrap replicates by name of φ, as many of each."""
    bootstrap = _prefixed(own, "bootstrap.")
    for name in bootstrap:
        with field("phi_bootstrap"):
            size = len(next(iter(bootstrap.values())))
            array(bootstrap, name, (size, *np.shape(phi[name])))
    return bootstrap


def _training(own: dict[str, np.ndarray], tasks: Tasks) -> Posterior | None:
    """What the training tasks concluded, where the file has it."""
    with field("training"):
        return read_training(_prefixed(own, "training."), tasks)


def _warnings(described: dict[str, Any]) -> tuple[str, ...]:
    """The sentences of the fit."""
    warnings = entry(described, "warnings", list)
    with field("warnings"):
        if not all(isinstance(w, str) for w in warnings):
            raise InputError("expected sentences")
    return tuple(warnings)


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


def _prefixed(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}


def _encoder(described: dict[str, Any] | None, columns: dict[str, np.ndarray]) -> Any:
    if described is None:
        return None
    if "reader" in described:
        plain = {"kind": "ColumnReader", "settings": described["reader"]}
        return made(plain, [ColumnReader], tuples=True, whole=True)
    import xarray as xr

    for name in ("task_predictors", "outcome_columns", "columns"):
        names(described, name)
    for slot in entry(described, "slots", list):
        if not (isinstance(slot, list) and len(slot) == 2 and slot[0] in (*SLOTS, "exposure")):
            raise InputError(f"slots: expected a slot and its column, found {slot!r:.60}")
    if not {*entry(described, "categories", dict)} <= {*described["columns"]}:
        raise InputError("categories: some are of no column")

    training = {name: ("training_row", values) for name, values in columns.items()}
    return FormulaEncoder.from_plain(described, xr.Dataset(training))


def _model(described: Any, tasks: Tasks, version: int, whole: bool) -> HierarchicalModel:
    if described is None:
        raise NeedsMore("this fit's model holds functions: pass it, hb.load(path, model=…)")
    old: dict[str, Any] = {"kind": "Gaussian"}  # up to formats 1 and 2 it had no name
    with field("likelihood"):
        if version < 2:
            described = {
                "likelihood": old | {"settings": _some(described, "known_se")},
                **described,
            }
        likelihood = made(described["likelihood"], LIKELIHOODS, whole=whole)
    with field("prior"):
        if version < 3:
            settings = _some(described, "correlated", "zero_mean")
            described = {"prior": old | {"settings": settings}, **described}
        prior = made(described["prior"], PRIORS, tuples=True, whole=whole)
    with field("hyperprior"):
        hyperpriors = entry(described, "hyperprior", dict)
        for f in fields(HyperPrior) if whole else ():
            entry(hyperpriors, f.name, (dict, int, float, type(None)))
        hyperprior = hyperprior_from_plain(hyperpriors)
    with field("columns"):
        lying = entry(described, "columns", (dict, type(None)), ... if whole else None)
        columns = None if lying is None else columns_of(Columns, lying, tasks)
    model = HierarchicalModel(likelihood, prior, hyperprior, tasks.labels.encoder, columns)
    if tasks.predictors.shape[1:] != (len(tasks.coef),):
        raise InputError(f"{len(tasks.coef)} coefficients, predictors {tasks.predictors.shape}")
    likelihood.check(tasks)
    shape = model.shape(tasks)
    with field("hyperprior"):
        if hyperprior.is_resolved(shape):
            hyperprior.distributions(shape)
    return model


def _some(described: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: described[name] for name in names if name in described}


def _method(described: dict[str, Any], own: type[Method] | None, optimiser: Any) -> Method:
    """The method that the file names, of the package's or the user's own, with its settings."""
    told = entry(described, "method", (dict, str))
    if isinstance(told, str):  # up to format 3 a name, its settings among what the fit tells
        return _of_before(told, described, optimiser)
    name, settings = entry(told, "kind", str), entry(told, "settings", dict)
    if own is None and name not in METHODS:
        raise NeedsMore(f"this fit's method is one of yours: pass it, hb.load(path, method={name})")
    if own is not None and name != own.__name__:
        raise NeedsMore(f"this fit's method is {name}, and {own.__name__} was passed")
    kind = METHODS[name] if own is None else own
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    if missing := sorted({*known} ^ {*settings}):
        with field(f"settings.{missing[0]}"):
            raise InputError(f"{name} has no such setting, or it is missing")
    given = {n: _setting(n, value, optimiser) for n, value in settings.items()}
    return kind(**given)


def _setting(name: str, value: Any, optimiser: Any) -> Any:
    if value != OPTIMISER:
        return as_tuples(value)
    if name == "inner_optimiser":
        if optimiser is None:
            raise NeedsMore(INNER_OPTIMISER)
        return optimiser
    return _unkept()


def _unkept() -> Any:
    """An optimiser that says, when it is asked to begin, that it was not kept."""
    import optax

    def begin(params: Any) -> Any:
        raise InputError(
            "the outer optimiser of this fit was not kept by its file: fit again with "
            "dataclasses.replace(fit.method, optimiser=…)"
        )

    return optax.GradientTransformation(begin, optax.identity().update)


def _of_before(name: str, described: dict[str, Any], optimiser: Any) -> Method:
    """The method of a file that has its name alone, with those of its settings that a fit tells."""
    kind = named_methods().get(name)
    if kind is None:
        return Derived(name)
    info = entry(described, "info", dict)
    known = {f.name for f in fields(kind)} & {*info}  # type: ignore[arg-type]
    given = {n: as_tuples(info[n]) for n in known if info[n] is not None}
    if given.get("evidence") == "exact":
        given["evidence"] = "auto"
    if name in ("MAML", "Reptile") and entry(described, "inside", (dict, type(None)), None):
        given["step_size"] = "auto"  # what the fit tells is one of scaled columns
    if optimiser is not None and "step_size" not in given and name in ("MAML", "iMAML", "Reptile"):
        given["inner_optimiser"] = optimiser
    return kind(**given)


INNER_OPTIMISER = (
    "this fit's inner loop had an Optax optimiser: pass it, hb.load(path, …, inner_optimiser=…)"
)


def _adaptation(
    described: dict[str, Any], optimiser: Any, whole: bool, method: Method
) -> Adaptation:
    if described.get("kind") == OWN and type(method).__name__ not in METHODS:
        return method.adaptation()  # type: ignore[attr-defined]
    adaptation = made(described, KINDS, whole=whole)
    if getattr(adaptation, "optimiser", None) == OPTIMISER:
        if optimiser is None:
            raise NeedsMore(INNER_OPTIMISER)
        return replace(adaptation, optimiser=optimiser)
    return adaptation
