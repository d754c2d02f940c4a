"""What a saved fit says, believed only as far as it is checked: a file may be a stranger's.

Every doubt is an InputError that names the field.

What a saved fit keeps of the columns that it was computed in, and back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, NoReturn

import numpy as np

from hierbayes import likelihoods, priors
from hierbayes.adaptation import (
    Conjugate,
    FlatPrior,
    GradientSteps,
    Laplace,
    LeastSquares,
    MaximumLikelihood,
    Normal,
    NotOffered,
    Point,
    Posterior,
    Proximal,
    Quadrature,
    ScaleMixture,
    WithShared,
)
from hierbayes.adaptation.linearised import LinearisedSteps
from hierbayes.adaptation.variational import Variational
from hierbayes.equivalence.implied_posterior import ImpliedPosterior
from hierbayes.errors import InputError, listing
from hierbayes.fit.learned import AFit, Learned
from hierbayes.fit.method import Method
from hierbayes.model import HierarchicalModel
from hierbayes.priors.column_map import ColumnMap
from hierbayes.priors.columns import Columns, from_plain, to_plain
from hierbayes.priors.serialise import hyperprior_from_plain, hyperprior_to_plain
from hierbayes.tasks import Labels, Tasks
from hierbayes.tasks.frames import as_names
from hierbayes.tasks.views import SLOTS

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
    phi, draws, errors, bootstrap = (
        _named(arrays, part) for part in ("phi", "draws", "se", "bootstrap")
    )
    theta = arrays.get(f"{PREFIX}theta")
    with field("phi"):
        check_phi(phi, outer.method, model, tasks, own)
        if {*at.phi(phi)} != {*outer.phi}:
            refuse(f"{tuple(phi)} are not those of the fit, {tuple(outer.phi)}")
    with field("draws"):
        check_draws(draws, theta, {}, phi, tasks, own)
        same = {*draws} == {*(outer.phi_draws or {})}
        if not same or (theta is None) != (outer.theta_draws is None):
            refuse(f"{tuple(draws)} are not those of the fit")
    _check_spread(errors, bootstrap, phi)
    inner = replace(
        outer, model=model, tasks=tasks, phi=phi, phi_draws=draws or None, theta_draws=theta,
        standard_errors=errors, phi_bootstrap=bootstrap or None,
        evidence=number(described, "evidence"), log_posterior=number(described, "log_posterior"),
    )  # fmt: skip
    return replace(outer, training=None, inner=inner, at=at)


def _named(arrays: Mapping[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    """The arrays of one part of the fit inside."""
    start = f"{PREFIX}{part}."
    return {n.removeprefix(start): v for n, v in arrays.items() if n.startswith(start)}


def _check_spread(
    errors: Mapping[str, np.ndarray],
    bootstrap: Mapping[str, np.ndarray],
    phi: Mapping[str, np.ndarray],
) -> None:
    """Refuse standard errors and bootstrap draws that are not of φ's shapes."""
    for name in errors:
        with field("standard_errors"):
            array(errors, name, phi[name].shape, finite=False)
    for name in bootstrap:
        with field("phi_bootstrap"):
            array(bootstrap, name, (len(bootstrap[name]), *phi[name].shape))


OPTIMISER = "an Optax optimiser"
"""What stands in the file for an inner optimiser, a function that no file can keep."""

MOST = {"num_steps": 1_000_000, "num_nodes": 1_000, "num_samples": 100_000}
"""What a setting may be at most: beyond, a file would keep its reader computing for ever."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "loss": ("sum", "mean"),
    "derivative": ("unrolled", "rematerialised", "first-order", "implicit"),
    "spread": ("implied", "laplace"),
    "optimiser": (None, OPTIMISER),
    "proximal": (True, False),
    "known_se": (True, False),
    "intercept": (True, False),
}

OWN = "the method's own"
"""What stands in the file for an adaptation of the user's, which the user's method has."""

GROUP = "hierbayes"
KINDS = (
    Conjugate, GradientSteps, ImpliedPosterior, Laplace, LeastSquares, LinearisedSteps,
    MaximumLikelihood, ScaleMixture, NotOffered, Proximal, Quadrature, Variational,
)  # fmt: skip
LIKELIHOODS = (
    likelihoods.Bernoulli, likelihoods.Binomial, likelihoods.Gamma, likelihoods.Gaussian,
    likelihoods.NegativeBinomial, likelihoods.Poisson, likelihoods.StudentT,
)  # fmt: skip
PRIORS = (priors.Gaussian, priors.StudentT)

FORMAT = 4
"""4 holds the method's settings, of which there was a name before; 3 names the prior; 2 names the
likelihood; 1 knew the Gaussian one alone, by its ``known_se``."""


class NeedsMore(InputError):
    """What the file cannot hold, and the user has."""


@contextmanager
def field(name: str) -> Iterator[None]:
    """Whatever goes wrong inside is wrong with this field of the file."""
    try:
        yield
    except NeedsMore:
        raise
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # a stranger's file raises whatever it likes
        raise InputError(f"{name}: {type(error).__name__}: {error}") from error


def refuse(problem: str) -> NoReturn:
    """Say what is wrong with the field."""
    raise InputError(problem)


def entry(
    described: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any = ...
) -> Any:
    """An entry of a mapping, of this kind; the default, where there is one, if it is missing."""
    with field(name):
        if name not in described:
            if default is not ...:
                return default
            refuse("it is missing")
        value = described[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            refuse(f"found {type(value).__name__}, {_short(value)}")
    return value


def number(described: Mapping[str, Any], name: str) -> float | None:
    """A finite number, or None."""
    value = entry(described, name, (int, float, type(None)))
    if value is not None and not math.isfinite(value):
        with field(name):
            refuse(f"expected a finite number, found {value}")
    return value


def names(described: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A list of different strings."""
    value = entry(described, name, list)
    with field(name):
        if not all(isinstance(v, str) for v in value):
            refuse(f"expected strings, found {_short(value)}")
        if len(set(value)) < len(value):
            refuse(f"a name stands twice in {listing(value)}")
    return tuple(value)


def made(described: Any, kinds: Sequence[type], *, tuples: bool = False, whole: bool) -> Any:
    """One of these dataclasses from its name and its settings, ``whole``: each of them."""
    if not isinstance(described, dict):
        refuse(f"expected a kind and its settings, found {_short(described)}")
    kind = entry(described, "kind", str)
    known = {k.__name__: k for k in kinds}
    if kind not in known:
        with field("kind"):
            refuse(f"{kind!r} is not known here: {listing(sorted(known), 12)}")
    settings = entry(described, "settings", dict)
    own = {f.name for f in fields(known[kind])}
    if whole and (missing := sorted(own - {*settings})):
        with field(f"settings.{missing[0]}"):
            refuse("it is missing")
    for name, value in settings.items():
        with field(f"settings.{name}"):
            if name not in own:
                refuse(f"{kind} has no such setting")
            _check_setting(name, value)
    return known[kind](**{n: as_tuples(v) if tuples else v for n, v in settings.items()})


def _check_setting(name: str, value: Any) -> None:
    if name in CHOICES:
        if not any(value is c or (isinstance(c, str) and value == c) for c in CHOICES[name]):
            refuse(f"expected one of {CHOICES[name]}, found {_short(value)}")
    elif name in MOST:
        if not _is_number(value, int) or not 0 <= value <= MOST[name]:
            refuse(f"expected a whole number of at most {MOST[name]}, found {_short(value)}")
    elif name == "correlated":
        if not isinstance(value, bool):
            for group in value:
                _check_names(group)
    elif name in ("zero_mean", "predictors", "shared", "task_predictors"):
        _check_names(value)
    elif name in ("reason", "task", "outcome"):
        if not isinstance(value, str):
            refuse(f"expected a string, found {_short(value)}")
    elif name == "slots":
        for pair in value:
            _check_names(pair)
            if len(pair) != 2 or pair[0] not in (*SLOTS, "exposure"):
                refuse(f"expected a slot and its column, found {_short(pair)}")
    else:  # step_size, df and other numbers, one or one a coefficient
        for one in value if isinstance(value, list) else [value]:
            if one is not None and not (_is_number(one, float) and math.isfinite(one)):
                refuse(f"expected a finite number, found {_short(one)}")
            if name == "df" and one is not None and not one > 0:
                refuse(f"expected a positive number, found {_short(one)}")


def _check_names(value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        refuse(f"expected a list of names, found {_short(value)}")


def _is_number(value: Any, kind: type) -> bool:
    kinds = (int,) if kind is int else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool)


# ---------------------------------------------------------------------- arrays


def array(
    arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int | None, ...] | None = None,
    *, finite: bool = True, whole: bool = False,
) -> np.ndarray:  # fmt: skip
    """An array of numbers of this shape; None stands for any length."""
    with field(name):
        if name not in arrays:
            refuse("it is missing")
        values = arrays[name]
        if values.dtype.kind not in ("iu" if whole else "iufb"):
            refuse(f"expected {'whole ' if whole else ''}numbers, found {values.dtype}")
        if shape is not None and not _fits(values.shape, shape):
            refuse(f"expected the shape {_shown(shape)}, found {values.shape}")
        if finite and values.dtype.kind == "f" and not np.isfinite(values).all():
            refuse(f"{(~np.isfinite(values)).sum()} value(s) are NaN or infinite")
    return values


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(found) == len(wanted) and all(
        w is None or f == w for f, w in zip(found, wanted, strict=True)
    )


def _shown(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("…" if n is None else str(n) for n in shape) + ")"


def read_tasks(
    arrays: Mapping[str, Mapping[str, np.ndarray]], described: dict[str, Any], encoder: Any
) -> Tasks:
    """The tasks of the file; refused where their parts do not fit together."""
    with field("labels"):
        coef, shared = names(described, "coef"), names(described, "shared")
        level = names(described, "task_predictors")
        named = entry(described, "task", str), entry(described, "outcome", str)
    with field("constant_data"):
        data = arrays.get("constant_data", {})
        outcome = array(arrays.get("observed_data", {}), "y", (None,))
        num_rows = len(outcome)
        with field("task"):
            task_names = as_names(data["task"].tolist())
        num_tasks = len(task_names)
        x = array(data, "predictors")
        if x.ndim < 2 or len(x) != num_rows:
            raise InputError(f"predictors: {x.shape} do not fit {num_rows} outcomes")
        tasks = Tasks(
            x,
            _columns(data, "shared_predictors", shared, num_rows),
            _columns(data, "task_predictors", level, num_tasks),
            outcome.astype(np.float64),
            {slot: array(data, slot, (num_rows,)) for slot in SLOTS if slot in data},
            array(data, "starts", (num_tasks + 1,), whole=True),
            array(data, "row", (num_rows,), whole=True),
            Labels(task_names, coef, shared, level, *named, encoder),
        )
    _check_tasks(tasks)
    return tasks


def _columns(
    data: Mapping[str, np.ndarray], name: str, said: tuple[str, ...], count: int
) -> np.ndarray:
    """The values (count, …) of the columns that the labels name; none where they name none."""
    if said:
        return array(data, name, (count, len(said)))
    if name in data:
        raise InputError(f"{name}: the labels name no such columns")
    return np.zeros((count, 0))


def _check_tasks(tasks: Tasks) -> None:
    """Refuse tasks whose parts do not fit together."""
    rows, count = tasks.num_rows, tasks.num_tasks
    with field("constant_data.starts"):
        steps = np.diff(tasks.starts)
        if tasks.starts[0] != 0 or tasks.starts[-1] != rows or (steps < 0).any():
            refuse(f"they do not cut {rows} rows into {count} tasks")
    with field("constant_data.row"):
        if rows and (int(tasks.rows.min()) < 0 or len(np.unique(tasks.rows)) < rows):
            refuse("row numbers are negative, or stand twice")
    with field("constant_data.task"):
        if len({*map(str, tasks.names.tolist())}) < count:
            refuse("task names stand twice")
    for name in ("known_se", "weight", "trials"):
        with field(f"constant_data.{name}"):
            if name in tasks.slots and not (tasks.slots[name] > 0).all():
                refuse("it must be positive")


def check_phi(
    phi: Mapping[str, np.ndarray], method: Method, model: HierarchicalModel, tasks: Tasks, own: bool
) -> None:
    """Refuse a φ that is not this model's; ``own``: the model is the user's, not the file's."""
    parts = {p.name: p for p in model.parts(tasks)}
    for name in phi:
        if own and name != "corr":
            array(phi, name)
        elif name == "step_size":
            array(phi, name, () if phi[name].ndim == 0 else parts["mu"].shape)
        elif name == "corr":  # a model of the user's may have none
            array(phi, name, parts["mu"].shape * 2)
        else:
            array(phi, name, parts[name].shape if name in parts else ())
    for name in ("tau", "sigma", "sigma_query"):
        with field(name):
            if name in phi and (phi[name] < 0).any():
                refuse("a standard deviation is negative")
    if "corr" in phi:
        with field("corr"):
            corr = phi["corr"]
            unit = np.allclose(np.diag(corr), 1.0) and np.allclose(corr, corr.T)
            if not unit or (np.linalg.eigvalsh(corr) < -1e-6).any():
                refuse("it is no correlation matrix")
    if method.learns_all and not own:
        for name in parts:
            with field(name):
                if name not in phi:
                    refuse("it is missing")


def check_draws(
    draws: Mapping[str, np.ndarray], theta: np.ndarray | None, stats: Mapping[str, np.ndarray],
    phi: Mapping[str, np.ndarray], tasks: Tasks, own: bool,
) -> None:  # fmt: skip
    """Refuse draws of other shapes than φ's and θ's, or of different numbers."""
    known = {name: np.shape(value) for name, value in phi.items()}
    if theta is not None:
        draws, known = {**draws, "theta": theta}, {**known, "theta": theta.shape[2:]}
        count, d = tasks.num_tasks, theta.shape[-1:] if own else (len(tasks.coef),)
        if theta.ndim != 4 or theta.shape[2:] != (count, *d):
            with field("posterior.theta"):
                refuse(f"{theta.shape} are no draws (chain, draw) of {count} tasks")
    lead: tuple[int, ...] | None = None
    for where, some in (("posterior", draws), ("sample_stats", stats)):
        for name, values in some.items():
            with field(f"{where}.{name}"):
                if values.ndim < 2 or 0 in values.shape[:2]:
                    refuse(f"{values.shape} are no draws")
                lead = lead or values.shape[:2]
                rest = known.get(name, ()) if where == "posterior" else ()
                if values.dtype.kind not in "biuf" or values.shape != (*lead, *rest):
                    refuse(f"expected numbers of shape {(*lead, *rest)}, found {values.shape}")
                if where == "posterior" and not np.isfinite(values).all():
                    refuse("some draws are NaN or infinite")


def read_training(moments: dict[str, np.ndarray], tasks: Tasks) -> Posterior | None:
    """What the training tasks concluded, where the file has it."""
    if not moments:
        return None
    mean = array(moments, "mean", (tasks.num_tasks, None))
    count, d = mean.shape
    p = len(tasks.labels.shared)
    square = {
        "covariance": (count, d, d), "unidentified": (count, d, d), "absorbed": (count, d),
        "cross": (count, d, p), "of_shared": (p, p), "log_normaliser": (count,),
    }  # fmt: skip
    for name, shape in square.items():
        if name in moments:
            array(moments, name, shape, finite=False)
    if "covariance" not in moments:
        return Point(mean)
    spread, evidence = moments["covariance"], moments.get("log_normaliser")
    if "cross" in moments and "of_shared" in moments:
        more = moments["cross"], moments["of_shared"]
        return WithShared(mean, spread, *more, log_normaliser=evidence)
    if "unidentified" in moments:
        absorbed = moments.get("absorbed", np.zeros(mean.shape, bool))
        return FlatPrior(mean, spread, moments["unidentified"], absorbed)
    return Normal(mean, spread, log_normaliser=evidence)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def as_tuples(value: Any) -> Any:
    """JSON's lists as the tuples that settings are."""
    return tuple(as_tuples(v) for v in value) if isinstance(value, list) else value
