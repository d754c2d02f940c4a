"""Bad input is refused before any computation, and the message names what is wrong.

One table: what is done, and the words that the InputError must mention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpyro.distributions as dist
import optax
import pandas as pd
import pytest
from assertions import refuses

import hierbayes as hb


def frame(**columns: Any) -> pd.DataFrame:
    """Twelve sound rows in four towns, with some columns replaced."""
    x = np.array([0.3, 1.2, -0.4, 2.2, 0.9, -1.1, 0.1, 1.7, -0.6, 0.4, 2.0, -0.2])
    sound = {
        "y": np.sin(np.arange(12.0)), "x": x, "z": x**2, "se": np.linspace(1, 2, 12),
        "size": np.repeat([1.0, 2.0, 3.0, 5.0], 3), "town": np.repeat(list("abcd"), 3),
    }  # fmt: skip
    return pd.DataFrame(sound | columns)


def spoiled(column: str, row: int, value: Any) -> pd.DataFrame:
    data = frame()
    data[column] = data[column].astype(object) if isinstance(value, str) else data[column]
    data.loc[row, column] = value
    return data


def read(data: Any = None, **arguments: Any) -> hb.Tasks:
    settings: dict[str, Any] = dict(task="town", outcome="y", predictors=["x"]) | arguments
    return hb.Tasks.from_dataframe(frame() if data is None else data, **settings)


def formula(text: str, data: Any = None, **arguments: Any) -> Any:
    return hb.from_formula(text, frame() if data is None else data, **arguments)


def model(**arguments: Any) -> hb.HierarchicalModel:
    likelihood = hb.likelihoods.Gaussian(known_se=arguments.pop("known_se", False))
    prior = hb.priors.Gaussian(**arguments.pop("prior", {}))
    return hb.HierarchicalModel(likelihood, prior, hb.HyperPrior(**arguments))


def fit(how: Any = hb.empirical_bayes, m: Any = None, t: Any = None, **arguments: Any) -> Any:
    return how(model() if m is None else m, read() if t is None else t, **arguments)


def learned() -> hb.Fit:
    return hb.complete_pooling(model(), read())


def one_row_tasks() -> hb.Tasks:
    return read(frame(town=list("abcdefghijkl")))


one_task = frame(town="only")
learners = [hb.empirical_bayes, hb.full_bayes, hb.maml]
Case = tuple[str, Callable[[], Any], tuple[str, ...]]

DATA: list[Case] = [
    ("NaN in a predictor", lambda: read(spoiled("x", 4, np.nan)), ("1 in column 'x'", "NaN")),
    ("NaN in the outcome", lambda: read(spoiled("y", 4, np.nan)), ("1 in column 'y'", "drop")),
    ("None as task", lambda: read(spoiled("town", 4, None)), ("1 in column 'town'",)),
    ("infinite values", lambda: read(spoiled("x", 4, np.inf)), ("'x'", "1 infinite", "row 4")),
    ("infinite, though NaN may be dropped", lambda: read(spoiled("x", 4, -np.inf), missing="drop"),
     ("'x'", "1 infinite")),
    ("NaN through a formula", lambda: formula("y ~ x + (1 | town)", spoiled("x", 4, np.nan)),
     ("1 in column 'x'", "NaN")),
    ("infinity through a formula", lambda: formula("y ~ x + (1 | town)", spoiled("x", 4, np.inf)),
     ("'x'", "infinite")),
    ("nothing but NaN", lambda: read(frame(x=np.nan), missing="drop"), ("no complete row", "'x'")),
    ("missing: unknown word", lambda: read(missing="ignore"), ("missing", "'ignore'")),
    ("no such predictor", lambda: read(predictors=["xx"]), ("'xx'", "'x'")),
    ("no such task column", lambda: read(task="twon"), ("'twon'", "'town'")),
    ("no such outcome", lambda: read(outcome="Y"), ("'Y'", "outcome")),
    ("no such column in a formula", lambda: formula("y ~ flor + (1 | town)"), ("'flor'", "known")),
    ("no such grouping column", lambda: formula("y ~ 1 + (1 | twon)"), ("'twon'", "'town'")),
    ("strings as predictor", lambda: read(spoiled("x", 4, "n/a")), ("'x'", "numbers", "n/a")),
    ("a name as predictor", lambda: read(predictors=["town"]), ("'town'", "strings", "'a'")),
    ("strings of numbers", lambda: formula("y ~ x + (1 | town)", frame(x=list("012345678901"))),
     ("'x'", "strings where numbers belong")),
    ("dates as predictor", lambda: read(frame(x=pd.date_range("2020", periods=12))),
     ("'x'", "numbers")),
    ("no rows", lambda: read(frame().iloc[:0]), ("no rows",)),
    ("no DataFrame", lambda: read([1, 2, 3]), ("DataFrame", "list")),
    ("a dict", lambda: formula("y ~ 1 + (1 | town)", {"y": [1.0]}), ("DataFrame", "dict")),
    ("columns of one name", lambda: read(pd.concat([frame(), frame()[["x"]]], axis=1)),
     ("'x'", "same name")),
    ("no varying coefficient", lambda: read(predictors=[], intercept=False), ("intercept",)),
    ("task predictor varies", lambda: read(task_predictors=["z"]), ("'z'", "varies", "'a'")),
    ("task predictor varies in a formula",
     lambda: formula("y ~ 1 + (1 | town)", task_predictors=["z"]), ("'z'", "varies", "'a'")),
    ("known_se of zero", lambda: read(spoiled("se", 4, 0.0), known_se="se"),
     ("known_se", "positive", "'b'")),
    ("negative known_se", lambda: formula("y ~ (1 | town)", spoiled("se", 4, -1.0), known_se="se"),
     ("known_se", "positive", "-1", "'b'")),
    ("weight of zero", lambda: read(spoiled("z", 4, 0.0), weight="z"),
     ("weight", "positive", "'b'")),
]  # fmt: skip

FORMULAS: list[Case] = [
    ("two grouping factors", lambda: formula("y ~ 1 + (1 | town) + (1 | size)"),
     ("'town'", "'size'")),
    ("nested groups", lambda: formula("y ~ 1 + (1 | town/size)"), ("nested",)),
    ("no bar", lambda: formula("y ~ x"), ("grouping bar",)),
    ("no tilde", lambda: formula("y"), ("~",)),
    ("a family not known", lambda: formula("y ~ 1 + (1 | town)", family="binomal"),
     ("'binomal'", "'binomial'")),
    ("unseen category", lambda: formula("y ~ town + (1 | size)")[1].encode(frame(town="z")),
     ("'z'",)),
]  # fmt: skip

DESIGN: list[Case] = [
    ("constant beside an intercept", lambda: fit(t=read(frame(x=2.0))),
     ("'x'", "constant", "'Intercept'")),
    ("a predictor twice", lambda: fit(t=read(frame(z=frame().x), predictors=["x", "z"])),
     ("'z'", "'x'")),
    ("a predictor varying and shared", lambda: fit(t=read(shared=["x"])),
     ("'x'", "linear combination")),
    ("a linear combination", lambda: fit(t=read(frame(z=2 * frame().x - 1), shared=["z"])),
     ("'z'", "linear combination", "'x'")),
    ("zero in every row", lambda: fit(t=read(frame(x=0.0))), ("'x'", "zero in every row")),
    ("fewer rows than predictors", lambda: fit(t=read(frame().iloc[[0, 3]], predictors=["x", "z"])),
     ("2 rows", "3 predictors")),
    ("no outcome to fit", lambda: fit(t=read().encode(frame().drop(columns="y"))),
     ("outcome", "'y'")),
    ("tasks without rows", lambda: fit(t=hb.Tasks.from_arrays([(np.ones((0, 1)), [])] * 3)),
     ("no rows",)),
    ("known_se, but Gaussian()", lambda: fit(t=read(known_se="se")), ("Gaussian(known_se=True)",)),
    ("Gaussian(known_se=True), but none", lambda: fit(m=model(known_se=True)), ("known_se",)),
    ("a DataFrame without a formula", lambda: fit(t=frame()),
     ("Tasks", "DataFrame", "from_formula")),
    *[(f"{method.__name__} of one task", lambda method=method: fit(method, t=read(one_task)),
      ("one task", "1 task"))
      for method in learners],
    *[(f"{method.__name__} of one task with rows",
       lambda method=method: fit(method, t=read().keep_rows(read().task_of_row == 2)),
      ("one task", "4 task"))
      for method in learners],
    *[(f"{method.__name__} of a constant", lambda method=method: fit(method, t=read(frame(x=2.0))),
      ("'x'", "constant"))
      for method in [*learners, hb.no_pooling, hb.complete_pooling]],
]  # fmt: skip

SETTINGS: list[Case] = [
    ("criterion", lambda: fit(criterion="mle"), ("criterion", "'mle'", '"ml"')),
    ("evidence", lambda: fit(evidence="laplce"), ("evidence", "'laplce'")),
    ("full_bayes method", lambda: fit(hb.full_bayes, method="hmc"), ("method", "'hmc'", "nuts")),
    ("full_bayes num_draws=0", lambda: fit(hb.full_bayes, num_draws=0), ("num_draws", "0")),
    ("full_bayes num_chains=0", lambda: fit(hb.full_bayes, num_chains=0), ("num_chains", "0")),
    ("full_bayes num_draws=1.5", lambda: fit(hb.full_bayes, num_draws=1.5), ("num_draws", "1.5")),
    ("full_bayes num_warmup=-1", lambda: fit(hb.full_bayes, num_warmup=-1), ("num_warmup", "-1")),
    ("full_bayes target_accept=1.5", lambda: fit(hb.full_bayes, target_accept=1.5),
     ("target_accept", "1.5")),
    ("empirical_bayes num_draws=0", lambda: fit(num_draws=0), ("num_draws", "0")),
    ("empirical_bayes num_chains=0", lambda: fit(num_chains=0), ("num_chains", "0")),
    ("maml num_steps=0", lambda: fit(hb.maml, num_steps=0), ("num_steps", "0")),
    ("maml num_splits=0", lambda: fit(hb.maml, num_splits=0), ("num_splits", "0")),
    ("maml num_meta_steps=0", lambda: fit(hb.maml, num_meta_steps=0), ("num_meta_steps", "0")),
    ("maml step_size<0", lambda: fit(hb.maml, step_size=-0.1), ("step_size", "-0.1", "positive")),
    ("maml step_size=nan", lambda: fit(hb.maml, step_size=np.nan), ("step_size", "nan")),
    ("maml step_size: a word", lambda: fit(hb.maml, step_size="automatic"),
     ("step_size", "'automatic'")),
    ("maml diverging", lambda: fit(hb.maml, step_size=1e3),
     ("step_size", "4 of 4 tasks", "'b'", "2/λ_max")),
    ("maml query=1", lambda: fit(hb.maml, query=1.0), ("between 0 and 1", "1.0")),
    ("maml, one row a task", lambda: fit(hb.maml, t=one_row_tasks(), sigma=1.0),
     ("no task has two rows",)),
    ("maml, sigma from one row a task", lambda: fit(hb.maml, t=one_row_tasks()), ("sigma",)),
    ("maml sigma<0", lambda: fit(hb.maml, sigma=-1.0), ("sigma", "-1")),
    ("no_pooling sigma=0", lambda: fit(hb.no_pooling, sigma=0.0), ("sigma", "0")),
    ("maml optimiser", lambda: fit(hb.maml, optimiser=optax.adam), ("optimiser",)),
    ("predict: unknown target", lambda: learned().predict(target="future"), ("target", "'future'")),
    ("predict: unknown task", lambda: learned().predict(read(frame(town="z"))), ("'z'", "adapt")),
    ("predict new without learning", lambda: fit(hb.no_pooling).predict(target="new"),
     ("no pooling",)),
    ("adapt without outcome", lambda: learned().adapt(read().encode(frame().drop(columns="y"))),
     ("outcome", "'y'")),
    ("adapt to other columns", lambda: learned().adapt(read(predictors=["x", "z"])), ("'z'",)),
    ("predict other columns", lambda: learned().predict(read(predictors=["z"])),
     ("'z'",)),
    ("select an unknown task", lambda: read()["atown"], ("'atown'",)),
    ("log_likelihood without draws", lambda: learned().log_likelihood(), ("draws",)),
    ("log_likelihood by column", lambda: learned().log_likelihood(by="column"), ("by", "'column'")),
]  # fmt: skip

normal = dist.Normal(0, 1)
PRIORS: list[Case] = [
    ("a float as prior", lambda: hb.HyperPrior(mu=1.0), ("mu", "float", "NumPyro distribution")),
    ("a float in a mapping", lambda: hb.HyperPrior(tau={"x": 1.0}), ("tau",)),
    ("a float in extra", lambda: hb.HyperPrior(extra={"nu": 1.0}), ("extra", "distribution")),
    ("a negative concentration", lambda: hb.HyperPrior(corr=-1.0), ("concentration", "-1")),
    ("an unknown coefficient", lambda: fit(m=model(mu={"floor": normal})), ("'floor'", "mu")),
    ("a coefficient of another part", lambda: fit(m=model(beta={"x": normal})), ("'x'", "beta")),
    ("a vector too long", lambda: fit(hb.full_bayes, m=model(mu=dist.Normal(np.ones(3)))),
     ("mu", "(3,)", "(2,)")),
    ("an LKJ of the wrong size", lambda: fit(hb.full_bayes, m=model(corr=dist.LKJ(3, 1.0))),
     ("corr", "(3, 3)")),
    ("a group of unknown coefficients", lambda: fit(m=model(prior=dict(correlated=[["x", "q"]]))),
     ("'q'", "correlated")),
    ("a coefficient in two groups", lambda: fit(m=model(prior=dict(correlated=[["x"], ["x"]]))),
     ("two groups",)),
    ("zero mean of an unknown one", lambda: fit(m=model(prior=dict(zero_mean=["q"]))),
     ("'q'", "zero_mean")),
]  # fmt: skip


def counted(y: Any = None, family: str = "poisson", outcome: str = "y", **arguments: Any) -> Any:
    """A sound count of twelve rows, some columns replaced, fitted by complete pooling."""
    sound = [3, 0, 1, 5, 2, 2, 0, 1, 4, 2, 6, 1] if y is None else y
    columns = {k: v for k, v in arguments.items() if not isinstance(v, str)}
    named = {k: v for k, v in arguments.items() if isinstance(v, str)}
    data = frame(y=sound, n=[9.0] * 12, time=[2.0] * 12).assign(**columns)
    m, t = formula(f"{outcome} ~ x + (1 | town)", data, family=family, **named)
    return hb.complete_pooling(m, t)


def at(
    row: int, value: float, otherwise: Any = (3, 0, 1, 5, 2, 2, 0, 1, 4, 2, 6, 1)
) -> list[float]:
    """Sound values with one replaced."""
    values = [float(v) for v in otherwise]
    values[row] = value
    return values


NINES, TWOS = [9.0] * 12, [2.0] * 12
OF_TRIALS: dict[str, Any] = dict(family="binomial", outcome="p(y, n)")
ZERO_ONE = [0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0]
FAMILIES: list[Case] = [
    ("a count below zero", lambda: counted(at(4, -2)),
     ("'y'", "counts", "1 row", "-2", "'b'", "leave")),
    ("half a count", lambda: counted(at(4, 0.5)), ("'y'", "counts", "0.5", "'b'")),
    ("half a count, negative binomial", lambda: counted(at(4, 0.5), "negative_binomial"),
     ("'y'", "counts", "0.5", "'b'")),
    ("successes above trials", lambda: counted(at(4, 12), **OF_TRIALS),
     ("'y'", "exceed trials", "12 of 9", "'b'", "correct")),
    ("successes below zero", lambda: counted(at(4, -1), **OF_TRIALS), ("'y'", "-1", "'b'")),
    ("trials of zero", lambda: counted(n=at(4, 0, NINES), **OF_TRIALS),
     ("trials", "positive", "'b'")),
    ("trials below zero", lambda: counted(n=at(4, -3, NINES), **OF_TRIALS),
     ("trials", "positive", "-3", "'b'")),
    ("trials not whole", lambda: counted(n=at(4, 8.5, NINES), **OF_TRIALS),
     ("trials are whole", "2 of 8.5", "'b'")),
    ("trials of NaN", lambda: counted(n=at(4, np.nan, NINES), **OF_TRIALS), ("'n'", "NaN")),
    ("a third value", lambda: counted(at(4, 2, ZERO_ONE), "bernoulli"),
     ("'y'", "0 and 1", "2 in task 'b'", "binomial")),
    ("an exposure of zero", lambda: counted(time=at(4, 0, TWOS), exposure="time"),
     ("'time'", "above zero", "1 row", "row 4", "leave")),
    ("an exposure below zero", lambda: counted(time=at(4, -5, TWOS), exposure="time"),
     ("'time'", "above zero", "-5")),
    ("an exposure of NaN", lambda: counted(time=at(4, np.nan, TWOS), exposure="time"),
     ("'time'", "NaN")),
    ("an amount of zero", lambda: counted(at(4, 0, TWOS), "gamma"),
     ("'y'", "above zero", "'b'", "Bernoulli")),
    ("an amount below zero", lambda: counted(at(4, -1, TWOS), "gamma"),
     ("'y'", "above zero", "-1")),
    ("an offset of NaN", lambda: counted(time=at(4, np.nan, TWOS), offset="time"),
     ("'time'", "NaN")),
    ("an infinite offset", lambda: counted(time=at(4, np.inf, TWOS), offset="time"),
     ("'time'", "infinite")),
    *[(f"an offset whose exponential overflows, {family}",
       lambda family=family: counted(at(4, 1.0), family, time=at(4, 800, TWOS), offset="time"),
       ("offset", "800", "'b'", "log(exposure)"))
      for family in ("poisson", "negative_binomial")],
    ("nothing counted", lambda: counted(np.zeros(12)), ("'y'", "0 in every row")),
    ("every trial succeeds", lambda: counted(NINES, **OF_TRIALS), ("'y'", "9 in every row")),
    ("a sigma for counts", lambda: hb.maml(
        hb.HierarchicalModel(hb.likelihoods.Poisson(), hb.priors.Gaussian()),
        read(frame(y=at(0, 3))), sigma=1.0), ("Poisson", "no sigma")),
    ("a column that separates zeros and ones",
     lambda: counted((frame().x > 0.5).astype(float), "bernoulli"),
     ("complete_pooling", "separates", "full_bayes")),
]  # fmt: skip


def test_sound_counts_are_accepted():
    """The control: what every case of families spoils is fitted without complaint."""
    for found in (
        counted(), counted(**OF_TRIALS), counted(ZERO_ONE, "bernoulli"),
        counted(at(1, 2.5, TWOS), "gamma"), counted(exposure="time"), counted(offset="time"),
        counted([3.0] * 12, "poisson", time=np.arange(1.0, 13.0), exposure="time"),
    ):  # fmt: skip
        assert np.isfinite(found.log_evidence)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        pytest.param(action, words, id=name)
        for name, action, words in [*DATA, *FORMULAS, *DESIGN, *SETTINGS, *PRIORS, *FAMILIES]
    ],
)
def test_bad_input_is_refused_by_name(action, words):
    with refuses(*words):
        action()


def test_the_sound_frame_is_accepted():
    """The control: what every case above spoils is fitted without complaint."""
    assert read().num_tasks == 4
    assert np.isfinite(learned().log_evidence)
    assert hb.no_pooling(model(), read()).theta.shape == (4, 2)
