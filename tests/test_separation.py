"""Tasks whose own likelihood has no maximum: which they are, and what is said of them.

Rung (b): the linear programmes that no_pooling solves, task by task.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from assertions import refuses
from scipy import optimize
from simulated import normal_means

import hierbayes as hb
from hierbayes.adaptation import separation
from hierbayes.adaptation.unpooled import perfectly_explained

BERNOULLI, POISSON = hb.likelihoods.Bernoulli(), hb.likelihoods.Poisson()
GAUSSIAN = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())


def many(rng, d, outcomes):
    """Small tasks of all kinds: few values or many, far from zero, of other units, no intercept."""
    parts = []
    for j in range(120):
        n = int(rng.integers(1, 9))
        columns = [np.ones(n)]
        for _ in range(d - 1):
            few = rng.integers(-1, 2, n) if j % 2 else rng.normal(size=n)
            columns.append(few * (1e5 if j % 3 == 0 else 1.0) + (2000 if j % 5 == 0 else 0))
        if j % 7 == 0:
            columns[0] = rng.integers(-1, 2, n)
        parts.append((np.column_stack(columns).astype(float), outcomes(n).astype(float)))
    return hb.Tasks.from_arrays(parts)


def by_programmes(tasks, likelihood):
    up, down = likelihood.endless(tasks)
    found = []
    for a, b in zip(tasks.starts[:-1], tasks.starts[1:], strict=True):
        one = np.zeros(b - a, int)
        found.append(perfectly_explained(tasks.predictors[a:b], one, 1, up[a:b], down[a:b]).any())
    return np.array(found)


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("likelihood", [BERNOULLI, POISSON], ids=["Bernoulli", "Poisson"])
def test_the_same_tasks_as_by_linear_programmes(d, likelihood, rng):
    outcomes = (lambda n: rng.integers(0, 2, n)) if likelihood is BERNOULLI else (
        lambda n: rng.poisson(0.4, n))  # fmt: skip
    tasks = many(rng, d, outcomes)
    expected = by_programmes(tasks, likelihood)
    assert 10 < expected.sum() < 110  # both kinds are there
    np.testing.assert_array_equal(separation.separated(tasks, likelihood).tasks, expected)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [([0, 1, 2, 3], [0, 0, 1, 1], True), ([0, 1, 1, 3], [0, 0, 1, 1], True),  # quasi-complete
     ([0, 2, 1, 3], [0, 0, 1, 1], False), ([1, 1, 1, 1], [0, 0, 1, 1], False),
     ([1, 1, 1, 2], [0, 1, 0, 1], True), ([0, 1, 2, 3], [1, 1, 1, 1], True)],
)  # fmt: skip
def test_separation_by_a_slope(x, y, expected):
    rows = np.column_stack([np.ones(4), x])
    tasks = hb.Tasks.from_arrays([(rows, np.array(y, float))] * 2)
    assert separation.separated(tasks, BERNOULLI).tasks.tolist() == [expected] * 2


def test_up_to_two_coefficients_take_no_programme(monkeypatch, rng):
    """100,000 tasks would take minutes of them."""

    def none(*_, **__):
        raise AssertionError("a linear programme")

    monkeypatch.setattr(optimize, "linprog", none)
    for d in (1, 2):
        separation.separated(many(rng, d, lambda n: rng.integers(0, 2, n)), BERNOULLI)
    with pytest.raises(AssertionError, match="programme"):  # the control
        separation.separated(many(rng, 3, lambda n: rng.integers(0, 2, n)), BERNOULLI)


def test_beyond_a_few_hundred_it_says_what_was_looked_at(monkeypatch, rng):
    monkeypatch.setattr(separation, "MOST_PROGRAMMES", 5)
    tasks = many(rng, 3, lambda n: rng.integers(0, 2, n))
    found = separation.separated(tasks, BERNOULLI)
    assert found.unchecked > 5
    (said,) = separation.remark(tasks, BERNOULLI)
    assert f"looked at in 5 tasks; in {found.unchecked} more only each predictor" in said


@pytest.fixture(scope="module")
def wards():
    y, n = [0, 3, 8, 2, 0, 5, 8, 1], 8
    return hb.from_formula(
        "p(y, n) ~ 1 + (1 | g)", pd.DataFrame({"g": list("abcdefgh"), "y": y, "n": n})
    )


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(
            lambda m, t: hb.empirical_bayes(m, t, num_draws=1, num_chains=1), id="empirical Bayes"
        ),
        pytest.param(
            lambda m, t: hb.full_bayes(m, t, num_draws=200, num_chains=2, progress=False),
            id="full Bayes", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_the_fits_say_so_without_a_warning(wards, method):
    fit = method(*wards)
    (said,) = fit.info["remarks"]
    assert said.startswith("4 of 8 tasks have outcomes that are all alike")
    assert "('a', 'c', 'e' and 1 more)" in said
    assert "held by the prior alone" in said
    assert not [w for w in fit.warnings if "prior alone" in w]
    assert np.isfinite(fit.theta.values).all()


def test_counts_are_told_in_their_words():
    data = pd.DataFrame({"g": list("aabbccdd"), "y": [0, 0, 1, 2, 3, 0, 4, 1]})
    _, tasks = hb.from_formula("y ~ 1 + (1 | g)", data, family="poisson")
    (said,) = separation.remark(tasks, POISSON)
    assert said.startswith("1 of 4 tasks have outcomes that are all zero")
    assert "'a'" in said


def test_nothing_is_said_where_nothing_is(radon_ml):
    assert tuple(radon_ml.info["remarks"]) == ()
    ones = np.ones((2, 1))
    tasks = hb.Tasks.from_arrays([(ones, np.array([0.0, 1.0]))] * 3)
    assert separation.remark(tasks, BERNOULLI) == ()
    assert separation.remark(tasks, hb.likelihoods.Gaussian()) == ()


# ------------------------------------------------------- other words that were missing


@pytest.mark.parametrize("learned", [True, pytest.param("coef", marks=pytest.mark.slow)])
def test_a_learned_step_of_nothing_is_said(learned):
    """Rows of a task that sum to zero: what some say of the others is wrong, so no step is best."""
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(200):
        noise = rng.normal(size=6)
        parts.append((np.ones((6, 1)), 1.0 + noise - noise.mean()))
    fit = hb.maml(GAUSSIAN, hb.Tasks.from_arrays(parts), 3, learn_step_size=learned, progress=False)
    assert np.max(fit.phi["step_size"]) < 1e-6
    assert any("the tasks are not adapted at all" in said for said in fit.warnings)


def test_a_learned_step_of_something_is_not():
    tasks = normal_means(200, 6, 1.0, 0.5, seed=3)
    fit = hb.maml(GAUSSIAN, tasks, 3, learn_step_size=True, progress=False)
    assert not any("not adapted" in said for said in fit.warnings)


def test_no_pooling_points_at_empirical_bayes_where_that_helps():
    rows = np.column_stack([np.ones(2), [0.0, 1.0]])
    rng = np.random.default_rng(0)
    tasks = hb.Tasks.from_arrays([(rows, rng.normal(size=2)) for _ in range(9)])
    with refuses("sigma cannot be estimated within tasks", "empirical_bayes"):
        hb.no_pooling(GAUSSIAN, tasks)
