"""equivalent_prior from outside: what it takes, what it refuses, what it returns."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import optax
import pandas as pd
import pytest
from assertions import close, monte_carlo, refuses

import hierbayes as hb
from hierbayes.adaptation import Descent, Flow
from hierbayes.equivalence.validity import described

GAUSSIAN = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
BERNOULLI = hb.HierarchicalModel(hb.likelihoods.Bernoulli(), hb.priors.Gaussian())
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 3)), RNG.normal(size=12)
TASKS = hb.Tasks.from_arrays([(X[:6], Y[:6]), (X[6:7], Y[6:7]), (X[7:], Y[7:])], names=list("abc"))
PHI = np.zeros(3)


def asked(model=GAUSSIAN, tasks=TASKS, phi=PHI, num_steps=2, step_size=0.05, sigma=0.8, **more):
    return hb.equivalent_prior(model, tasks, phi, num_steps, step_size, sigma=sigma, **more)


# ------------------------------------------------------------------------------ bad input

EYES = np.array([np.eye(3)] * 3)
BAD = {
    "negative step": (dict(step_size=-0.1), ("step_size must be positive", "-0.1")),
    "zero step": (dict(step_size=0.0), ("step_size must be positive",)),
    "NaN step": (dict(step_size=np.nan), ("step_size must be positive", "nan")),
    "infinite step": (dict(step_size=np.inf), ("step_size must be positive", "inf")),
    "no step size": (dict(step_size=None), ("pass step_size",)),
    "step in words": (dict(step_size="auto"), ("step_size must be a positive number", "auto")),
    "one step negative": (dict(step_size=[0.1, -0.1]), ("step_size must be positive",)),
    "too few steps": (dict(num_steps=3, step_size=[0.1, 0.1]), ("2 values for 3 steps",)),
    "no steps": (dict(num_steps=0), ("num_steps", "positive integer", "0")),
    "half a step": (dict(num_steps=1.5), ("num_steps", "1.5")),
    "steps left out": (dict(num_steps=None), ("num_steps", "time=")),
    "φ not finite": (dict(phi=[0.0, np.nan, 0.0]), ("phi's mu is not finite",)),
    "φ too short": (dict(phi=np.zeros(2)), ("phi's mu has shape (2,)", "(3,)", "x0, x1, x2")),
    "φ in words": (dict(phi="zero"), ("phi's mu is not a number",)),
    "φ without mu": (dict(phi={"tau": 1.0}), ("no 'mu'", "'tau'")),
    "no sigma": (dict(sigma=None), ("'sigma'", "sigma=")),
    "negative sigma": (dict(sigma=-1.0), ("sigma must be positive", "-1")),
    "zero sigma": (dict(sigma=0.0), ("sigma must be positive",)),
    "sigma not finite": (dict(sigma=np.nan), ("sigma is not finite",)),
    "momentum of one": (dict(momentum=1.0), ("momentum must lie in [0, 1)",)),
    "negative momentum": (dict(momentum=-0.1), ("momentum must lie in [0, 1)",)),
    "momentum not finite": (dict(momentum=np.nan), ("momentum must lie in [0, 1)",)),
    "momentum in words": (dict(momentum="much"), ("momentum must be a number", "much")),
    "Nesterov alone": (dict(nesterov=True), ("nesterov=True needs a momentum",)),
    "flow with steps": (dict(time=1.0), ("time is for gradient flow",)),
    "flow with momentum": (
        dict(time=1.0, num_steps=None, step_size=None, momentum=0.1), ("time is for",)),
    "flow with Nesterov": (
        dict(time=1.0, num_steps=None, step_size=None, nesterov=True), ("time is for",)),
    "negative time": (
        dict(time=-1.0, num_steps=None, step_size=None), ("time must be positive",)),
    "null": (dict(null="zero"), ("null must be", "'zero'")),
    "curvature": (dict(curvature="fisher"), ("curvature must be", "'fisher'")),
    "B indefinite": (
        dict(preconditioner=np.diag([1.0, -2.0, 1.0])), ("not positive definite", "-2")),
    "B of one task indefinite": (
        dict(preconditioner=EYES * np.array([1.0, -3.0, 1.0])[:, None, None]),
        ("not positive definite for task 'b'", "-3")),
    "B asymmetric": (dict(preconditioner=np.eye(3) + np.eye(3, k=1)), ("not symmetric",)),
    "B not finite": (dict(preconditioner=[1.0, np.nan, 1.0]), ("preconditioner is not finite",)),
    "B of the wrong shape": (dict(preconditioner=np.eye(2)), ("shape (2, 2)", "(3, 3, 3)")),
    "B in words": (dict(preconditioner="Fisher"), ("preconditioner is not an array",)),
    "B ragged": (dict(preconditioner=[[1.0, 2.0], [1.0]]), ("preconditioner is not an array",)),
    "B one a step": (dict(preconditioner=[np.eye(3)] * 2), ("shape (2, 3, 3)", "(3, 3, 3)")),
    "Adam": (dict(step_size=optax.adam(0.1)), ("Optax optimiser", "depend on the data")),
    "no tasks": (dict(tasks=[X, Y]), ("expected Tasks", "list")),
    "ones and zeros wanted": (dict(model=BERNOULLI), ("outcomes of 0 and 1",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case):
    arguments, words = BAD[case]
    with refuses(*words):
        asked(**arguments)


def test_the_same_call_with_good_input_is_not_refused():
    """The control of the table above."""
    assert asked().messages == ()


def test_tasks_without_an_outcome_or_shared_effects_are_refused(radon):
    rows = radon.tasks.encode(radon.data.drop(columns="log_radon").head(20))
    phi = {"mu": [1.3, -0.6], "beta": [0.7], "sigma": 0.8}
    with refuses("no outcome", "log_radon"):
        hb.equivalent_prior(radon.model, rows, phi, 2, 0.001)
    with refuses("'beta'", "beta="):
        hb.equivalent_prior(radon.model, radon.tasks, [1.3, -0.6], 2, 0.001, sigma=0.8)
    with refuses("beta has shape (2,)", "(1,)"):
        hb.equivalent_prior(radon.model, radon.tasks, phi | {"beta": [1.0, 2.0]}, 2, 0.001)


def test_known_standard_errors_must_be_there():
    known = hb.HierarchicalModel(hb.likelihoods.Gaussian(known_se=True), hb.priors.Gaussian())
    with refuses("standard error"):
        asked(known)


# -------------------------------------------------------------------------------- results


def test_one_task_by_name_and_as_a_pair():
    many = asked(num_steps=3)
    taken, alone = many["c"], asked(num_steps=3, tasks=(X[7:], Y[7:]))
    for one in (taken, alone):
        for name in ("posterior_mean", "location", "curvature", "filter", "shrinkage", "strength",
                     "effective_parameters", "precision", "covariance",
                     "posterior_covariance"):  # fmt: skip
            whole = getattr(many, name)[2]
            close(getattr(one, name), whole, rtol=1e-11, atol=1e-13)
        assert one.status == "proper"
        assert one.table.shape == (1, many.table.shape[1])
        assert one.table["rows"].tolist() == [5]
        assert "1 task(s), 1 proper" in str(one)
        assert one.validity.missed == 0.0
    assert taken.table.index.tolist() == ["c"]
    assert taken["c"] is taken
    with refuses("no task is named 'd'"):
        many["d"]
    with refuses("no task is named 'a'"):
        taken["a"]


def test_table_has_a_row_a_task():
    found = asked(num_steps=3)
    table = found.table
    assert table.index.tolist() == ["a", "b", "c"]
    assert table["rows"].tolist() == [6, 1, 5]
    close(table["largest_curvature"], found.curvature.max(1))
    close(table["weakest_precision"], found.strength.min(1))
    close(table["strongest_precision"], found.strength.max(1))
    close(table["least_shrinkage"], found.shrinkage.min(1))
    close(table["most_shrinkage"], found.shrinkage.max(1))
    close(table["effective_parameters"], found.shrinkage.sum(1))
    close(table[["missed", "linearisation", "curvature_drift", "predictive_kl"]], np.zeros((3, 4)))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Descent(1, 0.05), "1 step of 0.05"),
        (Descent(2, np.array([0.05, 0.01])), "2 steps of 0.01 to 0.05"),
        (Descent(2, 0.05, 0.5), "2 steps of 0.05 with momentum 0.5"),
        (Descent(2, 0.05, 0.5, nesterov=True), "2 steps of 0.05 with Nesterov momentum 0.5"),
        (Flow(0.2), "gradient flow for a time of 0.2"),
    ],
)
def test_methods_in_words(method, words):
    assert described(method) == words


def test_draws_are_of_the_implied_posterior():
    """4,000 independent draws: mean within 4 standard errors, sd within 10 %, correlations too."""
    found = asked(num_steps=3)
    draws = found.draws(4000, seed=3)
    assert draws.shape == (4000, 3, 3)
    sds = np.sqrt(np.diagonal(found.posterior_covariance, axis1=1, axis2=2))
    for j in range(3):
        for k in range(3):
            monte_carlo(draws[:, j, k].reshape(4, 1000), found.posterior_mean[j, k], sds[j, k])
        scale = np.outer(sds[j], sds[j])
        # an entry's standard error is at most √2 / √4000 = 0.022 of the scale
        close(np.cov(draws[:, j].T) / scale, found.posterior_covariance[j] / scale, atol=0.09)
    close(found.draws(4000, seed=3), draws)
    assert np.abs(found.draws(10, seed=4) - draws[:10]).max() > 0.01
    assert found["a"].draws(7).shape == (7, 3)


@pytest.mark.slow
def test_flow_is_the_limit_of_short_steps():
    """θ and P of K = 1,000 steps of t / K: within O(1/K), and ten times nearer than K = 100."""
    limit = asked(num_steps=None, step_size=None, time=0.3)
    near, nearer = (asked(num_steps=k, step_size=0.3 / k) for k in (100, 1000))
    for name in ("posterior_mean", "precision", "posterior_covariance"):
        first, second = (np.abs(getattr(f, name) - getattr(limit, name)) for f in (near, nearer))
        assert first.max() > 1e-5
        close(first.max() / second.max(), 10.0, rtol=0.03)


# ------------------------------------------------------------------------- fits and frames


@pytest.mark.slow
def test_maml_steps_from_its_own_phi(radon, radon_maml):
    """fit.theta are K steps from φ on all rows: the implied posterior's means, DataFrame or not."""
    info = radon_maml.info
    arguments = (radon_maml.phi, info["num_steps"], info["step_size"])
    own = {"preconditioner": info["preconditioner"]}  # the step is one in scaled columns
    frame = hb.equivalent_prior(radon.model, radon.data, *arguments, **own)
    tasks = hb.equivalent_prior(radon.model, radon.tasks, *arguments, **own)
    close(frame.posterior_mean, radon_maml.theta, rtol=1e-9, atol=1e-11)
    close(tasks.precision, frame.precision)
    assert frame.table.index.tolist() == radon.tasks.names.tolist()
    county = frame["ST LOUIS"]
    close(county.posterior_mean, radon_maml.theta.sel(task="ST LOUIS"), rtol=1e-9)


@pytest.mark.slow
def test_phi_of_empirical_bayes(radon, radon_ml):
    """The steps start at its mu, with its sigma and beta; tau and corr play no part."""
    found = hb.equivalent_prior(radon.model, radon.tasks, radon_ml.phi, 3, 0.001)
    mu, sigma, beta = (radon_ml.phi[name] for name in ("mu", "sigma", "beta"))
    again = hb.equivalent_prior(
        radon.model, radon.tasks, np.asarray(mu), 3, 0.001, sigma=float(sigma), beta=beta
    )
    close(found.posterior_mean, again.posterior_mean)
    close(found.location, np.tile(np.asarray(mu), (85, 1)))
    other = hb.equivalent_prior(radon.model, radon.tasks, radon_ml.phi, 3, 0.001, sigma=2.0)
    assert np.abs(other.posterior_mean - found.posterior_mean).max() > 1e-3


@pytest.mark.slow
def test_coefficients_without_a_free_mean_start_at_zero():
    """y ~ 1 + (1 + x | g): the slope of x has μ ≡ 0, and steps start there."""
    rng = np.random.default_rng(2)
    frame = pd.DataFrame({"g": np.repeat(list("abcdef"), 5), "x": rng.normal(size=30)})
    frame["y"] = 1.0 + 0.5 * frame["x"] + rng.normal(size=30)
    model, tasks = hb.from_formula("y ~ 1 + (1 + x | g)", frame)
    fit = hb.empirical_bayes(model, tasks)
    found = hb.equivalent_prior(model, frame, fit.phi, 2, 0.01)
    close(found.location[:, 1], np.zeros(6))
    close(found.location[:, 0], np.full(6, float(fit.phi["mu"][0])))


# ----------------------------------------------------------------- fits, units of the loss


def test_a_fit_brings_its_phi_and_its_steps(small):
    """The step that MAML took, and its K, unless others are given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        fit = hb.maml(small.model, small.tasks, 3, 0.01)
        found = hb.equivalent_prior(small.model, small.tasks, fit)
        given = hb.equivalent_prior(small.model, small.tasks, fit.phi, 3, 0.01)
        other = hb.equivalent_prior(small.model, small.tasks, fit, 2)
        at = {k: v for k, v in fit.phi.items() if k != "sigma_query"}
        learned = dataclasses.replace(fit, phi=at | {"step_size": np.asarray(0.02)})
        own = hb.equivalent_prior(small.model, small.tasks, learned)
    close(found.precision, given.precision, rtol=0)
    close(found.posterior_mean, fit.theta.values, rtol=1e-10)
    assert described(other.method) == "2 steps of 0.01"
    assert described(own.method) == "3 steps of 0.02"


@pytest.mark.slow
def test_the_best_steps_can_be_passed_on(small):
    """``settings``: whole K where there is one, the time of gradient flow where that is best."""
    phi = {"mu": np.zeros(2), "tau": np.ones(2), "sigma": 0.6}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        steps = hb.equivalent_steps(small.model, small.tasks, phi, num_steps=[2])
        hb.equivalent_prior(small.model, small.tasks, phi, **steps.settings)
        one = dataclasses.replace(steps, num_steps=2, step_size=0.001)
        implied = hb.equivalent_prior(small.model, small.tasks, phi, **one.settings)
    assert described(implied.method) == "2 steps of 0.001"
    assert set(steps.settings) in ({"time"}, {"num_steps", "step_size"})


@pytest.mark.slow
def test_steps_on_the_mean_loss_are_steps_over_n():
    """Each task as if alone with η / n: all shrink alike where rows are alike (methods.md 2.1)."""
    tasks = hb.Tasks.from_arrays([(np.ones((n, 1)), np.arange(float(n))) for n in (5, 6, 8)])
    mean = hb.equivalent_prior(GAUSSIAN, tasks, [0.0], 5, 0.1, sigma=1.0, loss="mean")
    for j, n in enumerate((5, 6, 8)):
        task = tasks.take([j])
        alone = hb.equivalent_prior(GAUSSIAN, task, [0.0], 5, 0.1 / n, sigma=1.0)
        close(mean.precision[j], alone.precision[0], rtol=1e-11)
        close(mean.posterior_mean[j], alone.posterior_mean[0], rtol=1e-11)
    close(mean.shrinkage[:, 0], np.full(3, 1 - 0.9**5), rtol=1e-12)
    assert (np.diff(mean.precision[:, 0, 0]) > 0).all()  # tighter with more rows
    close(mean.strength[:, 0], mean.precision[:, 0, 0], rtol=1e-12)
    close(mean.table["largest_curvature"], [5.0, 6.0, 8.0], rtol=1e-12)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (dict(loss="median"), ("loss", "median")),
        (dict(loss="mean", rank=2), ("mean", "step_size")),
        (dict(phi={"mu": PHI, "beta": np.ones(1)}), ("beta", "shared columns")),
        (dict(beta=[99.0]), ("beta", "shared columns")),
        (dict(phi={"mu": PHI, "gamma": np.ones((3, 1))}), ("gamma", "task predictors")),
    ],
)
def test_what_would_be_ignored_is_refused(more, words):
    with refuses(*words):
        asked(**more)


def test_sigma_is_refused_where_a_likelihood_has_none():
    tasks = hb.Tasks.from_arrays([(np.ones((3, 1)), [0.0, 1.0, 1.0])])
    with refuses("sigma", "no place"):
        hb.equivalent_prior(BERNOULLI, tasks, [0.0], 2, 0.1, sigma=1.0)


def test_a_mapping_without_gamma_is_refused_beside_task_predictors():
    tasks = hb.Tasks.from_arrays(
        [(np.ones((2, 1)), np.ones(2))] * 2, task_predictors=np.array([[0.0], [1.0]])
    )
    with refuses("gamma"):
        hb.equivalent_prior(GAUSSIAN, tasks, {"mu": np.zeros(1), "sigma": 1.0}, 2, 0.1)
