"""Families that are not Gaussian: densities, sufficient sums, predictions, refusals.

Rung (a): SciPy's densities. Rung (b): finite differences, brute-force mixtures.
"""

from __future__ import annotations

import jax
import numpy as np
import pandas as pd
import pytest
from assertions import close, refuses
from scipy import special, stats

import hierbayes as hb
from hierbayes.numerics import float64
from hierbayes.rows import rows_of

LIKELIHOODS = {
    "Bernoulli": hb.likelihoods.Bernoulli(),
    "Binomial": hb.likelihoods.Binomial(),
    "Poisson": hb.likelihoods.Poisson(),
    "NegativeBinomial": hb.likelihoods.NegativeBinomial(),
    "StudentT": hb.likelihoods.StudentT(),
    "Gamma": hb.likelihoods.Gamma(),
}
PHI = {"concentration": 1.7, "shape": 2.3, "sigma": 0.8, "df": 3.5}
every_family = pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS.keys())


def expected(likelihood, f, trials):
    """SciPy's distribution around f."""
    mean = np.exp(f)
    k, a = PHI["concentration"], PHI["shape"]
    return {
        "Bernoulli": lambda: stats.bernoulli(special.expit(f)),
        "Binomial": lambda: stats.binom(trials, special.expit(f)),
        "Poisson": lambda: stats.poisson(mean),
        "NegativeBinomial": lambda: stats.nbinom(k, k / (k + mean)),
        "StudentT": lambda: stats.t(PHI["df"], f, PHI["sigma"]),
        "Gamma": lambda: stats.gamma(a, scale=mean / a),
    }[type(likelihood).__name__]()


def outcomes(likelihood, rng, f):
    trials = rng.integers(1, 30, len(f))
    y = np.asarray(expected(likelihood, f, trials).rvs(len(f), random_state=rng), float)
    return y, {"trials": trials.astype(float)} if isinstance(
        likelihood, hb.likelihoods.Binomial
    ) else {}


def log_density(d, y):
    return d.logpmf(y) if hasattr(d.dist, "pmf") else d.logpdf(y)


# 1e-10: SciPy's own logarithms of factorials are right to about that
@every_family
def test_log_densities_are_scipys(likelihood, rng):
    f = np.concatenate([rng.normal(size=40), [0.0, -8.0, 6.0]])
    y, slots = outcomes(likelihood, rng, f)
    with float64():
        found = np.asarray(jax.jit(lambda v: likelihood.family(v, PHI, slots).log_prob(y))(f))
    close(
        found, log_density(expected(likelihood, f, slots.get("trials")), y), rtol=1e-10, atol=1e-12
    )


@every_family
def test_slopes_are_differences_even_at_zero(likelihood, rng):
    f = np.array([0.0, -1.3, 2.1])
    y, slots = outcomes(likelihood, rng, f)
    with float64():
        of = jax.jit(lambda v: likelihood.family(v, PHI, slots).log_prob(y))
        slope = np.asarray(jax.jvp(of, (f,), (np.ones(3),))[1])
        h = 1e-5
        numerical = (np.asarray(of(f + h)) - np.asarray(of(f - h))) / (2 * h)
    close(slope, numerical, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["Bernoulli", "Binomial", "Poisson", "NegativeBinomial"])
@pytest.mark.parametrize("f", [-800.0, 800.0])
def test_extreme_predictors_give_no_nan(name, f):
    likelihood = LIKELIHOODS[name]
    slots = {"trials": np.array([5.0, 5.0])} if name == "Binomial" else {}
    with float64():
        of = jax.jit(lambda v: likelihood.family(v, PHI, slots).log_prob(np.array([0.0, 1.0])))
        value, slope = jax.jvp(of, (np.full(2, f),), (np.ones(2),))
    assert not np.isnan(value).any()
    assert not np.isnan(slope).any()


# ------------------------------------------------------------------ rows added up


LAYOUTS = {
    "a block each": ((8, 0, 1, 5, 3, 1, 7, 2), True),
    "large tasks cut": ((0, 90, 1, 1, 2, 1, 1, 1, 1, 30, 1, 2, 1), True),
}


def some_tasks(likelihood, rng, sizes, *, weighted):
    """Ragged tasks with columns of few values, so that many rows are alike."""
    present = np.maximum(sizes, 1)  # the row of a task that is to have none goes below
    n = present.sum()
    frame = pd.DataFrame({
        "g": np.repeat(np.arange(len(sizes)), present),
        "x": rng.integers(0, 2, n).astype(float), "z": rng.integers(0, 3, n) * 0.7,
        "offset": rng.choice([0.0, 0.4], n), "weight": rng.choice([1.0, 2.5], n),
    })  # fmt: skip
    f = rng.normal(size=n)
    frame["y"], slots = outcomes(likelihood, rng, f)
    columns = {"offset": "offset"} | ({"weight": "weight"} if weighted else {})
    if slots:
        frame["trials"] = slots["trials"]
        columns["trials"] = "trials"
    tasks = hb.Tasks.from_dataframe(
        frame, task="g", outcome="y", predictors=["x"], shared=["z"], **columns
    )
    return tasks.keep_rows(np.asarray(sizes)[tasks.task_of_row] > 0)


@pytest.mark.parametrize(
    ("name", "sizes", "weighted"),
    [
        pytest.param(name, *LAYOUTS[layout], id=f"{name}, {layout}")
        for name in LIKELIHOODS for layout in LAYOUTS
    ]
    # without weights zeros and ones, and counts of a Poisson, are added up in ways of their own
    + [
        pytest.param(name, sizes, False, id=f"{name}, {sum(sizes)} rows without weights")
        for name in ("Bernoulli", "Poisson") for sizes in ((8, 0, 1, 5, 3, 1, 7, 2), (30, 12, 20))
    ],
)  # fmt: skip
def test_added_up_rows_say_what_all_rows_say(name, sizes, weighted, rng):
    likelihood = LIKELIHOODS[name]
    tasks = some_tasks(likelihood, rng, sizes, weighted=weighted)
    flat, of_row = likelihood.arrange(tasks)
    rows = rows_of(tasks, likelihood)

    @jax.jit
    def row_by_row(theta, phi):
        return likelihood.log_likelihood_of_rows(theta, phi, flat, of_row)

    @jax.jit
    def added_up(rows, theta, phi):
        known = rows.under(likelihood, phi)
        return known.log_likelihood(likelihood, theta.T, phi) + known.constant

    with float64():
        for _ in range(10):
            theta = rng.normal(size=(tasks.num_tasks, 2))
            phi = PHI | {"beta": rng.normal(size=1)}
            whole = np.bincount(of_row, np.asarray(row_by_row(theta, phi)), tasks.num_tasks)
            found = np.asarray(added_up(rows, theta, phi))
            close(found, whole, rtol=1e-10, atol=1e-10)


def test_work_follows_the_observations():
    """One task of 4,096 distinct rows beside 999 of one: cells stay near the rows."""
    rng = np.random.default_rng(0)
    sizes = np.array([4096] + [1] * 999)
    tasks = hb.Tasks.from_arrays(
        [(rng.normal(size=(n, 1)), rng.integers(0, 9, n).astype(float)) for n in sizes]
    )
    rows = rows_of(tasks, hb.likelihoods.Poisson())
    assert np.size(rows.outcome) < 3 * sizes.sum()


def test_counts_of_one_pattern_are_one_row():
    rng = np.random.default_rng(0)
    tasks = hb.Tasks.from_arrays(
        [(np.ones((n, 1)), rng.poisson(3.0, n).astype(float)) for n in (5, 80, 1)]
    )
    assert rows_of(tasks, hb.likelihoods.Poisson()).outcome.shape == (1, 3)


# ---------------------------------------------------------------------- predictions


@every_family
def test_predictions_average_over_a_normal_predictor(likelihood, rng):
    """Against 400,000 draws of f: five standard errors of the brute-force mean."""
    f, sd = np.array([[0.3, -0.8]]), np.array([[0.7, 1.1]])
    y, slots = outcomes(likelihood, rng, f[0])
    found = likelihood.predictive(f, sd**2, PHI, slots)
    draws = f + sd * rng.standard_normal((400_000, 2))
    trials = slots.get("trials")
    density = np.exp(log_density(expected(likelihood, draws, trials), y))
    of = found.logpmf if likelihood.discrete else found.logpdf
    error = density.std(0) / np.sqrt(len(draws))
    assert (np.abs(np.exp(of(y))[0] - density.mean(0)) < 5 * error + 1e-9).all()
    middle = found.ppf(0.5)
    assert (found.cdf(middle) >= 0.5 - 1e-6).all()


# ------------------------------------------------------------------------ formulas


def wards(**columns):
    return pd.DataFrame({"ward": list("aabbcc"), "days": [1.0, 2, 3, 4, 5, 6]} | columns)


def test_successes_of_trials():
    frame = wards(r=[0, 1, 2, 0, 3, 1], n=[4, 4, 5, 6, 7, 3])
    model, tasks = hb.from_formula("p(r, n) ~ 1 + days + (1 | ward)", frame)
    assert model.likelihood == hb.likelihoods.Binomial()
    assert tasks.slots["trials"].tolist() == frame["n"].tolist()
    again = model.tasks(frame)
    assert again.slots["trials"].tolist() == frame["n"].tolist()


def test_exposure_is_an_offset_of_its_log():
    frame = wards(y=[3.0, 1, 0, 2, 5, 1])
    _, tasks = hb.from_formula("y ~ 1 + (1 | ward)", frame, family="poisson", exposure="days")
    close(tasks.slots["offset"], np.log(frame["days"]), rtol=1e-15)


REFUSED = {
    "a count below zero": ("y", [3.0, -1, 0, 2, 5, 1], "poisson", ("counts", "-1")),
    "half a count": ("y", [3.0, 1, 0.5, 2, 5, 1], "negative_binomial", ("counts", "0.5")),
    "a third value": ("y", [0.0, 1, 2, 1, 0, 1], "bernoulli", ("0 and 1", "2")),
    "no amount": ("y", [3.0, 1, 0.0, 2, 5, 1], "gamma", ("above zero", "0")),
    "no trials": ("y", [0.0, 1, 1, 1, 0, 1], "binomial", ("p(successes, trials)",)),
    "a family misspelt": ("y", [0.0, 1, 1, 1, 0, 1], "poison", ("poison", "poisson")),
}


@pytest.mark.parametrize(("column", "values", "family", "words"), REFUSED.values(), ids=REFUSED)
def test_bad_outcomes_are_refused(column, values, family, words):
    frame = wards(**{column: values})
    with refuses(*words):
        model, tasks = hb.from_formula("y ~ 1 + (1 | ward)", frame, family=family)
        hb.empirical_bayes(model, tasks)


def test_more_successes_than_trials_are_refused():
    frame = wards(r=[0, 9, 2, 0, 3, 1], n=[4, 4, 5, 6, 7, 3])
    model, tasks = hb.from_formula("p(r, n) ~ 1 + (1 | ward)", frame)
    with refuses("exceed trials", "9 of 4", "a"):
        hb.empirical_bayes(model, tasks)


def test_an_exposure_of_zero_is_refused():
    frame = wards(y=[3.0, 1, 0, 2, 5, 1])
    frame.loc[2, "days"] = 0.0
    with refuses("days", "above zero"):
        hb.from_formula("y ~ 1 + (1 | ward)", frame, family="poisson", exposure="days")


# ------------------------------------------------------------------ what has no answer


def test_an_exposure_needs_a_log_link():
    frame = pd.DataFrame({"y": [0.0, 1.0, 1.0, 0.0], "days": 2.0, "ward": [0, 0, 1, 1]})
    for family in ("bernoulli", "gaussian"):
        with pytest.raises(ValueError, match="no log link"):
            hb.from_formula("y ~ 1 + (1 | ward)", frame, family=family, exposure="days")


@pytest.mark.slow
def test_a_shared_column_that_separates_is_said():
    rng = np.random.default_rng(0)
    z = np.tile([0.0, 1.0], 60)
    frame = pd.DataFrame(
        {"g": np.repeat(np.arange(12), 10), "z": z, "y": z * (rng.random(120) < 2)}
    )
    model, tasks = hb.from_formula("y ~ 1 + z + (1 | g)", frame, family="bernoulli")
    with pytest.warns(hb.FitWarning, match="beta for 'z' runs to infinity"):
        hb.empirical_bayes(model, tasks, num_draws=1)


@pytest.mark.parametrize("name", ["NegativeBinomial", "Gamma", "StudentT"])
def test_episodes_learn_the_parameters_of_a_family(name, rng):
    """As a fixed set of the same tasks does: those of the inner loop, and those of query rows."""
    likelihood = LIKELIHOODS[name]
    tasks = hb.Tasks.from_arrays([
        (rng.normal(size=(12, 1)), outcomes(likelihood, rng, np.zeros(12))[0]) for _ in range(6)
    ])  # fmt: skip
    model = hb.HierarchicalModel(likelihood, hb.priors.Gaussian())
    episodes = hb.Episodes.from_tasks(tasks, shots=5, queries=5)
    fit = hb.maml(model, episodes, num_meta_steps=2, progress=False)
    assert {"mu", *likelihood.parameters()} <= set(fit.phi)
    assert all(np.isfinite(value).all() for value in fit.phi.values())
