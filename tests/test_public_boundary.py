"""Whatever is passed: a finite answer, a FitWarning with a reason, or a refusal by name.

Every argument of every public door, one at a time, gets what does not belong there; the others
are sound. What comes back is finite where it is numbers, and what is refused is refused by an
InputError (or a TypeError) that names the argument.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hierbayes as hb

# ------------------------------------------------------------------ sound things


def frame() -> pd.DataFrame:
    """Six tasks of four rows, a predictor, a standard error, a covariate of tasks."""
    rng = np.random.default_rng(0)
    g = np.repeat(list("abcdef"), 4)
    x = rng.normal(size=24)
    return pd.DataFrame({
        "g": g, "x": x, "z": rng.normal(size=24), "se": 1.0 + rng.random(24),
        "w": np.repeat(rng.normal(size=6), 4),
        "y": rng.normal(size=6).repeat(4) + x + rng.normal(size=24),
    })  # fmt: skip


@cache
def tasks() -> hb.Tasks:
    return hb.Tasks.from_dataframe(frame(), task="g", outcome="y", predictors=["x"])


@cache
def model() -> hb.HierarchicalModel:
    return hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian(correlated=False))


@cache
def point() -> hb.Fit:
    return hb.empirical_bayes(model(), tasks(), "reml", num_draws=5, num_chains=1)


@cache
def sampled() -> hb.Fit:
    return hb.full_bayes(model(), tasks(), num_draws=20, num_chains=2, seed=1)


@cache
def steps() -> hb.Fit:
    return hb.maml(model(), tasks(), num_meta_steps=5, progress=False)


@cache
def episodes() -> Any:
    return hb.datasets.sinusoids(shots=3)


def pair(**arguments: Any) -> Any:
    arrays = [(np.ones((2, 2)) * [[1.0, j]], np.array([1.0, 2.0 + j])) for j in range(3)]
    return hb.Tasks.from_arrays(**({"arrays": arrays} | arguments))


# ------------------------------------------------------------------------ doors


@dataclass(frozen=True)
class Door:
    """A public function with sound arguments; ``words`` are other names of an argument."""

    call: Callable[..., Any]
    arguments: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]]


def door(call: Callable[..., Any], *arguments: str, **words: Any) -> Door:
    return Door(call, arguments, {k: (v,) if isinstance(v, str) else v for k, v in words.items()})


def with_hyperprior(**hyperpriors: Any) -> Any:
    made = hb.HierarchicalModel(
        hb.likelihoods.Gaussian(), hb.priors.Gaussian(), hb.HyperPrior(**hyperpriors)
    )
    return made.phi_distributions(tasks())


FITTED: dict[str, Any] = {"model": model, "tasks": tasks}


def fitting(method: Callable[..., Any], **sound: Any) -> Callable[..., Any]:
    """The method on sound tasks, unless told otherwise."""

    def call(**given: Any) -> Any:
        arguments = {"model": model(), "tasks": tasks()} | sound | given
        return method(arguments.pop("model"), arguments.pop("tasks"), **arguments)

    return call


TASKS = ("tasks", "Tasks", "DataFrame", "task ", "task(", "outcome")
PHI = ("mu", "tau", "corr", "beta", "gamma", "sigma", "extra")
LOOP = ("num_steps", "step_size", "query", "sigma", "num_meta_steps", "seed", "optimiser")


@cache
def doors() -> dict[str, Door]:
    new = frame().assign(g="new")
    read = dict(task="g", outcome="y", predictors=["x"])
    return {
        "HyperPrior": door(with_hyperprior, *PHI, corr=("corr", "concentration")),
        "HierarchicalModel": door(
            lambda **k: hb.HierarchicalModel(**(
                {"likelihood": hb.likelihoods.Gaussian(), "prior": hb.priors.Gaussian()} | k
            )),
            "likelihood", "prior", "hyperprior",
        ),
        "priors.Gaussian": door(hb.priors.Gaussian, "correlated", "zero_mean"),
        "priors.StudentT": door(hb.priors.StudentT, "df", "correlated", "zero_mean"),
        "likelihoods.Gaussian": door(hb.likelihoods.Gaussian, "known_se"),
        "likelihoods.StudentT": door(hb.likelihoods.StudentT, "df"),
        "likelihoods.Categorical": door(hb.likelihoods.Categorical, "num_classes"),
        "Network.mlp": door(
            lambda **k: hb.likelihoods.Network.mlp(**({"sizes": [1, 4, 1]} | k)).weights.size,
            "sizes", "outcome", "dtype", outcome=("outcome", "likelihood", "family"),
        ),
        "from_dataframe": door(
            lambda **k: hb.Tasks.from_dataframe(k.pop("data", frame()), **(read | k)),
            "data", "task", "outcome", "predictors", "shared", "task_predictors", "intercept",
            "known_se", "offset", "weight", "trials", "missing",
            data=("DataFrame", "column"), predictors=("predictor", "column"),
            shared=("predictor", "column"), task_predictors=("predictor", "column"),
            known_se=("known_se", "column"), offset=("offset", "column"),
            weight=("weight", "column"), trials=("trials", "column"),
        ),
        "from_arrays": door(
            pair, "arrays", "names", "coef", "shared", "known_se", "task_predictors",
            arrays=("arrays", "X of", "y of"), names=("names", "name"),
        ),
        "take": door(lambda positions: tasks().take(positions), "positions",
                     positions=("position",)),
        "keep_rows": door(lambda keep: tasks().keep_rows(keep), "keep"),
        "getitem": door(lambda names: tasks()[names], "names", names="named"),
        "split": door(tasks().split, "query", "seed"),
        "hold_out": door(tasks().hold_out, "fraction", "seed"),
        "encode": door(lambda **k: tasks().encode(**({"data": new} | k)), "data", "missing",
                       data=("DataFrame", "column")),
        "replace": door(
            tasks().replace, "outcome", "predictors", "shared", "task_predictors", "known_se",
            "offset", "weight", "trials",
        ),
        "to_dataframe": door(lambda outcome: tasks().replace(outcome=outcome).to_dataframe(),
                             "outcome"),
        "draw": door(lambda **k: episodes().draw(**({"num_tasks": 2} | k)), "num_tasks", "seed"),
        "from_tasks": door(
            lambda **k: hb.Episodes.from_tasks(**({"tasks": tasks()} | k)),
            "tasks", "shots", "queries", "query", tasks=TASKS,
        ),
        "full_bayes": door(
            fitting(hb.full_bayes, num_draws=20, num_chains=2), "model", "tasks", "method",
            "num_draws", "num_chains", "seed", "num_warmup", "target_accept", "progress",
            tasks=TASKS,
        ),
        "empirical_bayes": door(
            fitting(hb.empirical_bayes, num_draws=5, num_chains=1), "model", "tasks",
            "criterion", "evidence", "intervals", "num_bootstrap", "num_draws", "num_chains",
            "seed", tasks=TASKS,
        ),
        "maml": door(
            fitting(hb.maml, num_meta_steps=5), "model", "tasks", *LOOP, "learn_step_size", "loss",
            "derivative", "inner_optimiser", "num_splits", "progress", tasks=TASKS,
        ),
        "imaml": door(
            fitting(hb.imaml, num_meta_steps=5), "model", "tasks", *LOOP, "prior_precision",
            "num_splits", "loss", "derivative", tasks=TASKS,
        ),
        "reptile": door(
            fitting(hb.reptile, num_meta_steps=5), "model", "tasks", *LOOP, "tolerance", "loss",
            "inner_optimiser", tasks=TASKS,
        ),
        "no_pooling": door(fitting(hb.no_pooling), "model", "tasks", "sigma", tasks=TASKS),
        "complete_pooling": door(fitting(hb.complete_pooling), "model", "tasks", tasks=TASKS),
        "simulate": door(
            lambda **k: hb.simulation.simulate(**({"model": model(), "tasks_like": tasks()} | k)),
            "model", "tasks_like", "seed", tasks_like=TASKS,
        ),
        "compare": door(
            lambda **k: hb.compare(**({"fits": {"a": point()}, "test": tasks()} | k)).table,
            "fits", "test", "support", "reference", fits=("fit",), test=TASKS, support=TASKS,
        ),
        "check_calibration": door(
            lambda **k: hb.check_calibration(**(
                {"model": model(), "tasks_like": tasks(), "num_simulations": 2,
                 "methods": "empirical bayes"} | k
            )),
            "model", "tasks_like", "num_simulations", "num_draws", "level",
            "seed", "progress", tasks_like=TASKS, methods=("method",),
        ),
        "equivalent_prior": door(
            lambda **k: hb.equivalent_prior(**(
                {"model": model(), "task": tasks(), "phi": {"mu": [0.0, 0.0], "sigma": 1.0},
                 "num_steps": 2, "step_size": 0.01} | k
            )),
            "model", "task", "phi", "num_steps", "step_size", "sigma", "beta", "preconditioner",
            "momentum", "nesterov", "time", "null", "curvature", "loss", "rank",
            step_size=("step_size", "steps of"), task=(*TASKS, "task"), time=("time", "num_steps"),
        ),
        "equivalent_steps": door(
            lambda **k: hb.equivalent_steps(**(
                {"model": model(), "tasks": tasks(), "phi": dict(point().phi)} | k
            )),
            "model", "tasks", "phi", "precision", "num_steps", "preconditioner", "sigma", "beta",
            "criterion", "overshoot", "curvature", tasks=(*TASKS, "task"),
        ),
        "adapt": door(
            lambda **k: sampled().adapt(k.pop("new_tasks", tasks()), **k).theta,
            "new_tasks", "after", "update_phi", "implied", "seed", new_tasks=TASKS,
        ),
        "on": door(
            lambda **k: sampled().on(k.pop("tasks", tasks()), **k).theta,
            "tasks", "update_phi", "seed", tasks=TASKS,
        ),
        "predict": door(
            lambda **k: point().predict(**k).mean, "data", "target", data=TASKS,
        ),
        "interval": door(lambda **k: point().predict().interval(**k), "probability"),
        "quantile": door(lambda **k: point().predict().quantile(**k), "probability"),
        "draws": door(lambda **k: point().predict().draws(**k), "num_draws", "seed"),
        "log_density": door(lambda **k: point().predict().log_density(**k), "outcome"),
        "pit": door(lambda **k: point().predict().pit(**k), "outcome"),
        "log_likelihood": door(lambda by: sampled().log_likelihood(by), "by"),
        "prior.draws": door(lambda **k: point().prior.draws(**({"num_draws": 3} | k)),
                            "num_draws", "seed"),
        "leave_one_row_out": door(hb.checks.leave_one_row_out, "fit"),
        "leave_one_task_out": door(
            lambda **k: hb.checks.leave_one_task_out(**({"fit": point()} | k)), "fit", "refit",
        ),
        "task_effects": door(hb.checks.task_effects, "fit"),
        "laplace_check": door(
            lambda **k: hb.checks.laplace_check(**({"fit": point()} | k)), "fit", "seed",
            seed=("seed", "Gaussian"),
        ),
        "theta_standard_errors": door(hb.checks.theta_standard_errors, "fit"),
        "held_out_scores": door(hb.checks.held_out_scores, "prediction"),
        "theta_differences": door(
            lambda **k: hb.checks.theta_differences(**({"fit": point(), "reference": point()} | k)),
            "fit", "reference",
        ),
        "interval_coverage": door(
            lambda **k: hb.checks.interval_coverage(**(
                {"fit": point(), "num_data_sets": 3, "phi": {"tau": [1.0, 1.0]}} | k
            )),
            "fit", "intervals", "phi", "level", "num_data_sets", "num_bootstrap", "seed",
        ),
        "new_task_scores": door(
            lambda **k: hb.checks.new_task_scores(**(
                {"fits": point(), "support": tasks(), "query": tasks()} | k
            )),
            "fits", "support", "query", "reference", fits=("fit",), support=TASKS, query=TASKS,
        ),
        "score_differences": door(
            lambda **k: hb.checks.score_differences(**(
                {"scores": {"a": np.zeros(24)}, "tasks": tasks()} | k
            )),
            "scores", "tasks", "reference", "per", "by",
        ),
    }  # fmt: skip


# ----------------------------------------------------------------- strange values


def strange() -> dict[str, Callable[[], Any]]:
    """What does not belong, or belongs in an unusual dress; made anew each time."""
    read_only = np.arange(24.0)
    read_only.flags.writeable = False
    columns = pd.MultiIndex.from_product([["x", "y"], [1, 2]])
    return {
        "nan": lambda: float("nan"), "inf": lambda: float("inf"), "-inf": lambda: -float("inf"),
        "-1": lambda: -1, "0": lambda: 0, "0.0": lambda: 0.0, "3.0": lambda: 3.0,
        "1e308": lambda: 1e308, "10**400": lambda: 10**400, "1e-320": lambda: 1e-320,
        "True": lambda: True, "'x'": lambda: "x", "'1'": lambda: "1", "''": lambda: "",
        "b'x'": lambda: b"x", "None": lambda: None, "1j": lambda: 1j, "...": lambda: ...,
        "date": lambda: datetime.datetime(2020, 1, 1), "NaT": lambda: pd.NaT,
        "NA": lambda: pd.NA, "datetime64": lambda: np.datetime64("2020"),
        "int8": lambda: np.int8(3), "uint64": lambda: np.uint64(2**63 + 1),
        "float16": lambda: np.float16(0.5), "0-d": lambda: np.array(2), "0-d nan": lambda:
        np.array(np.nan), "jax": lambda: jax.numpy.arange(3), "key": lambda: jax.random.key(0),
        "keys": lambda: jax.random.split(jax.random.key(0), 2),
        "[]": list, "()": tuple, "{}": dict, "set": lambda: {1, 2}, "range": lambda: range(3),
        "object": object, "type": lambda: dict, "function": lambda: len,
        "generator": lambda: iter([1, 2]), "ragged": lambda: [[1], [1, 2]],
        "['x', 'x']": lambda: ["x", "x"], "['x', None]": lambda: ["x", None],
        "{'x': None}": lambda: {"x": None}, "{'a': 1}": lambda: {"a": 1}, "{1: 2}": lambda: {1: 2},
        "(N,)": lambda: np.arange(24.0), "(N, 1)": lambda: np.ones((24, 1)),
        "(N, N)": lambda: np.ones((24, 24)), "(2,)": lambda: np.array([0.5, 0.5]),
        "[-1]": lambda: [-1], "[0, 0]": lambda: [0, 0], "[99]": lambda: [99],
        "[0.5]": lambda: [0.5], "[True, False]": lambda: [True, False],
        "(N,) nan": lambda: np.full(24, np.nan), "(N,) huge": lambda: np.full(24, 1e300),
        "(N,) float16": lambda: np.arange(24, dtype=np.float16),
        "(N,) float32": lambda: np.arange(24, dtype=np.float32),
        "(N,) int8": lambda: np.arange(24, dtype=np.int8),
        "(N,) uint64": lambda: np.arange(24, dtype=np.uint64),
        "(N,) bool": lambda: np.arange(24) % 2 == 0, "(N,) text": lambda: np.array(["1"] * 24),
        "(N,) object": lambda: np.array([*range(23), "x"], dtype=object),
        "(N,) numbers as objects": lambda: np.array(range(24), dtype=object),
        "(N,) complex": lambda: np.ones(24, complex),
        "(N,) dates": lambda: np.array(["2020-01-01"] * 24, "M8[D]"),
        "(N,) masked": lambda: np.ma.masked_array(np.arange(24.0), np.arange(24) == 3),
        "(N,) read-only": lambda: read_only, "(N,) strided": lambda: np.arange(48.0)[::2],
        "(N,) Int64": lambda: pd.array([1] * 23 + [None], dtype="Int64"),
        "Series": lambda: pd.Series(np.arange(24.0), index=[0] * 24),
        "polars": lambda: pl.DataFrame({"x": [1.0]}), "pandas": lambda: pd.DataFrame({"x": [1.0]}),
        "empty frame": lambda: pd.DataFrame(), "no rows": lambda: frame().iloc[:0],
        "duplicate columns": lambda: pd.concat([frame(), frame()[["x"]]], axis=1),
        "MultiIndex": lambda: pd.DataFrame(np.ones((2, 4)), columns=columns),
        "duplicate index": lambda: frame().set_index(pd.Index([0] * 24)),
        "polars frame": lambda: pl.DataFrame({c: frame()[c].tolist() for c in frame()}),
        "float32 frame": lambda: frame().astype({"x": "float32", "y": "float16"}),
        "nullable frame": lambda: frame().convert_dtypes(),
        "one task": lambda: tasks().take([0]), "no task": lambda: tasks().take([]),
        "no outcome": lambda: tasks().replace(outcome=None), "other tasks": pair,
        "Normal": lambda: dist.Normal(0.0, 1.0), "HalfNormal": lambda: dist.HalfNormal(1.0),
        "Normal class": lambda: dist.Normal, "Poisson": lambda: dist.Poisson(1.0),
        "nan loc": lambda: dist.Normal(np.nan, 1.0, validate_args=False),
        "vector of 3": lambda: dist.HalfNormal(np.ones(3)), "LKJ 3": lambda: dist.LKJ(3, 1.0),
        "Uniform(-1, 1)": lambda: dist.Uniform(-1.0, 1.0),
        "{'x': Normal}": lambda: {"x": dist.Normal(0.0, 1.0)},
        "{'sgima': …}": lambda: {"sgima": dist.HalfNormal(1.0)},
        "{'sigma': …}": lambda: {"sigma": dist.HalfNormal(1.0)},
        "fit": point, "other fit": steps, "model": model, "tasks": tasks,
        "prediction": lambda: point().predict(),
    }  # fmt: skip


# ----------------------------------------------------------------------- verdict


def fault_of(place: Door, argument: str, value: Any) -> str | None:
    """What is wrong with what comes of it; None where nothing is."""
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", hb.FitWarning)
    try:
        found = place.call(**{argument: value})
    except hb.InputError as refusal:
        words = (*place.words.get(argument, ()), argument)
        if isinstance(value, hb.Fit):  # a fit goes by the name of its method
            words = (*words, value.method.name, "Gaussian tasks")
        named = any(word in str(refusal) for word in words)
        return None if named else f"InputError does not name it: {refusal}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if (lost := _lost(found)) is None else f"not finite: {lost}"


def _lost(found: Any) -> str | None:
    """Which numbers of a result are not finite, where they should be."""
    if isinstance(found, hb.Fit):
        names = [n for n, v in found.phi.items() if not np.isfinite(np.asarray(v)).all()]
        if not np.isfinite(found.theta.values).all():
            names.append("theta")
        return ", ".join(names) if names and not found.warnings else None
    if isinstance(found, hb.Tasks):
        arrays = [found.predictors, found.shared, found.task_predictors, *found.slots.values()]
        arrays += [] if found.outcome is None else [found.outcome]
        sound = all(np.isfinite(a).all() for a in arrays)
        sound &= found.starts[-1] == found.num_rows == len(found.predictors)
        sound &= len(set(found.names.tolist())) == found.num_tasks
        return None if sound else "tasks that do not fit together"
    if isinstance(found, tuple):
        return next((lost for each in found if (lost := _lost(each)) is not None), None)
    if isinstance(found, np.ndarray) and found.dtype.kind == "f":
        return None if np.isfinite(found).all() else "numbers"
    return None


# ------------------------------------------------------------------------- tests

TRIES = [
    (name, argument, label)
    for name, place in doors().items()
    for argument in place.arguments
    for label in strange()
]

LONG = {"full_bayes", "maml", "imaml", "reptile", "empirical_bayes", "check_calibration"}
"""Doors behind which every sound value costs a fit: they get a share of the tries."""


def refuse_fault(name: str, argument: str, value: Any, label: str) -> None:
    with warnings.catch_warnings():
        fault = fault_of(doors()[name], argument, value)
    assert fault is None, f"{name}({argument}={label}): {fault}"


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(st.sampled_from([t for t in TRIES if t[0] not in LONG]))
def test_a_strange_argument_is_answered_or_refused_by_name(attempt):
    name, argument, label = attempt
    refuse_fault(name, argument, strange()[label](), label)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(st.sampled_from([t for t in TRIES if t[0] in LONG]))
def test_a_strange_argument_of_a_fit_is_answered_or_refused_by_name(attempt):
    name, argument, label = attempt
    refuse_fault(name, argument, strange()[label](), label)


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(),
    st.binary(), st.dates(), st.decimals(), st.lists(st.floats(), max_size=3),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(), st.floats(), max_size=2),
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(st.sampled_from([t[:2] for t in TRIES if t[0] not in LONG]), ANYTHING)
def test_anything_at_all_is_answered_or_refused_by_name(place, value):
    refuse_fault(*place, value, repr(value))


def test_the_verdict_tells_a_refusal_by_name_from_an_internal_error():
    nameless = door(lambda share: tasks().split(query=share), "share")
    assert "does not name it" in str(fault_of(nameless, "share", -1.0))
    broken = door(lambda query: query.missing, "query")
    assert "AttributeError" in str(fault_of(broken, "query", 1))
    lost = door(lambda query: np.array([np.nan]), "query")
    assert "not finite" in str(fault_of(lost, "query", 1))
