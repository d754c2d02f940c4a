"""New tasks under a learned prior: as refitting would have it, as far as that can be known."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from assertions import close, refuses
from scipy import stats

import hierbayes as hb
from hierbayes.evidence import Integrated
from hierbayes.fit import AdaptedTasks
from hierbayes.fit.updating import largest_k, weigh
from hierbayes.tasks.joining import joined, not_among

SCHOOLS = hb.datasets.eight_schools()
HYPERPRIOR = hb.HyperPrior(mu=dist.Normal(0.0, 10.0), tau=dist.HalfNormal(10.0))


@pytest.fixture(scope="module")
def schools():
    model, tasks = hb.from_formula(
        "y ~ 1 + (1 | school)", SCHOOLS, known_se="se", hyperprior=HYPERPRIOR
    )
    return model, tasks


def fitted(model, tasks, **settings):
    return hb.full_bayes(model, tasks, **{"num_draws": 4000, "seed": 3, **settings})


@pytest.fixture(scope="module")
def without_a(schools):
    model, tasks = schools
    return fitted(model, tasks[list("BCDEFGH")])


def exact(tasks: hb.Tasks, weighed: hb.Tasks, name: str) -> tuple[float, float]:
    """Mean and sd of one school's θ given ``tasks``, φ given ``weighed``: quadrature over τ.

    Normal means with known noise: given τ the posterior of μ, and of θ given μ, are normal.
    """
    at = tasks.labels.position(name)
    y_a, se_a = tasks.outcome[at], tasks.slots["known_se"][at]
    tau, weight, centre, precision = given_tau(weighed)
    shrink = tau**2 / (tau**2 + se_a**2)
    mean = centre + shrink * (y_a - centre)
    second = (1 - shrink) ** 2 / precision + shrink * se_a**2 + mean**2
    average = (weight * mean).sum()
    return average, np.sqrt((weight * second).sum() - average**2)


def given_tau(weighed: hb.Tasks) -> tuple[np.ndarray, ...]:
    """τ on a grid, its posterior weights, and the mean and precision of μ given each."""
    y, se = weighed.outcome, weighed.slots["known_se"]
    tau = np.linspace(1e-3, 60.0, 6000)
    variance = se[:, None] ** 2 + tau**2
    precision = 1 / 10.0**2 + (1 / variance).sum(0)
    centre = (y[:, None] / variance).sum(0) / precision
    log_p = stats.halfnorm.logpdf(tau, scale=10.0) - 0.5 * np.log(precision)
    log_p += -0.5 * (np.log(variance) + y[:, None] ** 2 / variance).sum(0)
    log_p += 0.5 * centre**2 * precision
    weight = np.exp(log_p - log_p.max())
    return tau, weight / weight.sum(), centre, precision


def agree(found: AdaptedTasks, mean: float, sd: float, ess: float) -> None:
    """One θ within 4 standard errors of a mean of ``ess`` draws; its sd within four of its own."""
    assert abs(found.theta.values[0, 0] - mean) < 4 * sd / np.sqrt(ess)
    # the relative standard error of an sd of a law that is nearly normal
    assert abs(found.sd.values[0, 0] / sd - 1) < 4 / np.sqrt(2 * ess)


def test_adapting_to_a_held_out_school_is_refitting_with_it(schools, without_a):
    """16,000 draws next to independent; weights of effective size above half (k̂ below 0)."""
    _, tasks = schools
    found = without_a.adapt(tasks[["A"]])
    agree(found, *exact(tasks, tasks, "A"), ess=8000)
    assert "has learned" in found.remarks[0]
    assert found.pareto_k < largest_k(16_000)
    tau, weight, centre, precision = given_tau(tasks)
    for name, mean, second in (("mu", centre, centre**2 + 1 / precision), ("tau", tau, tau**2)):
        expected = (weight * mean).sum()
        sd = np.sqrt((weight * second).sum() - expected**2)
        assert abs(found.phis[name].mean() - expected) < 4 * sd / np.sqrt(8000)


def test_it_says_when_phi_has_not_learned_from_them(schools, without_a):
    model, tasks = schools
    left = without_a.adapt(tasks[["A"]], update_phi=False)
    agree(left, *exact(tasks, tasks[list("BCDEFGH")], "A"), ess=8000)
    assert "update_phi=False" in left.remarks[0]
    assert np.isnan(left.pareto_k)
    both = exact(tasks, tasks, "A"), exact(tasks, tasks[list("BCDEFGH")], "A")
    assert abs(both[0][0] - both[1][0]) > 1.0, "the two answers are different ones"
    point = hb.empirical_bayes(model, tasks[list("BCDEFGH")]).adapt(tasks[["A"]])
    assert "is not updated" in point.remarks[0]


def test_the_helper_tells_the_two_answers_apart(schools, without_a):
    """The control."""
    _, tasks = schools
    with pytest.raises(AssertionError):
        agree(without_a.adapt(tasks[["A"]], update_phi=False), *exact(tasks, tasks, "A"), ess=8000)


def test_weights_that_draws_cannot_carry_are_not_used(without_a, schools):
    """A school a thousand from all others, and 5,000 new schools."""
    _, tasks = schools
    far = replace(tasks[["A"]], outcome=np.array([1000.0]))
    with pytest.warns(hb.FitWarning, match="fit all tasks together"):
        found = without_a.adapt(far)
    assert "stays as learned from 7 tasks" in found.remarks[0]
    for name, values in without_a.phi_draws.items():
        np.testing.assert_array_equal(found.phis[name], values.reshape(-1, 1))
    rng = np.random.default_rng(0)
    many = hb.Tasks.from_arrays(
        [(np.ones((1, 1)), rng.normal(30.0, 20.0, 1)) for _ in range(5000)],
        coef=tasks.coef, known_se=[np.ones(1)] * 5000,
    )  # fmt: skip
    with pytest.warns(hb.FitWarning, match="more about phi"):
        assert without_a.adapt(many).theta.shape == (5000, 1)


# -------------------------------------------------------------------------- rows count once


def test_rows_that_were_learned_from_count_once(schools, without_a):
    _, tasks = schools
    again = without_a.adapt(tasks[["B", "C"]])
    assert "has learned from all of these rows before" in again.remarks[0]
    np.testing.assert_array_equal(again.phis["mu"], without_a.phi_draws["mu"].reshape(-1, 1))
    mixed = without_a.adapt(tasks[["B", "A"]], seed=5)
    alone = without_a.adapt(tasks[["A"]], seed=5)
    np.testing.assert_array_equal(mixed.phis["mu"], alone.phis["mu"])


@pytest.mark.slow
def test_what_new_rows_of_a_known_task_say_is_what_they_add(radon_rows):
    """Half of each county's rows first, the rest of three counties after: as fitting to both.

    Each side has some 4,000 draws or more, counted as 2,000 for what weights cost.
    """
    model, first, later = radon_rows
    fit = hb.full_bayes(model, first, num_draws=2000, seed=1)
    some = later.take([17, 25, 60])
    found = fit.adapt(some, after=fit.adapted)
    assert "has learned" in found.remarks[0]
    whole = hb.full_bayes(fit.model, joined(first, some), num_draws=2000, seed=2)
    error = whole.adapted.sd.values * np.sqrt(1 / 4000 + 1 / 2000)
    assert found.theta.shape == whole.theta.shape
    # 85 tasks: the largest of 85 normal deviations is below 4.5 in 99.9 % of cases
    assert (np.abs(found.theta.values - whole.theta.values) < 4.5 * error).all()


@pytest.mark.slow
@pytest.mark.parametrize("county", ["ANOKA", "COOK"])
def test_a_held_out_county_is_as_if_fitted_with_the_others(county):
    """52 houses and 2, of level and floor: 4,000 draws on either side, counted as 2,000."""
    model, tasks = hb.from_formula(
        "log_radon ~ 1 + floor + (1 + floor | county)", hb.datasets.radon()
    )
    others = tasks.take(np.flatnonzero(tasks.names != county))
    whole = hb.full_bayes(model, tasks, seed=1)
    fit = hb.full_bayes(whole.model, others, seed=2)
    found = fit.adapt(tasks[[county]])
    assert "has learned" in found.remarks[0]
    at = whole.tasks.labels.position(county)
    sd = whole.adapted.sd.values[at]
    error = sd * np.sqrt(2 / 2000)
    assert (np.abs(found.theta.values[0] - whole.theta.values[at]) < 4 * error).all()
    assert (np.abs(found.sd.values[0] / sd - 1) < 4 * np.sqrt(2 / 4000)).all()


@pytest.fixture(scope="module")
def radon_rows():
    model, tasks = hb.from_formula("log_radon ~ 1 + floor + (1 | county)", hb.datasets.radon())
    return model, *tasks.hold_out(0.5, seed=0)


def test_a_fit_that_was_carried_to_new_tasks_knows_what_phi_has_learned(schools, without_a):
    """Whichever way it went there, no row is weighed twice, and none is thought to be weighed."""
    _, tasks = schools
    both = without_a.on(tasks[["A"]], seed=3)
    assert both.learned_from.num_tasks == 8
    again = both.adapt(tasks[["A", "B", "C"]])
    assert "before" in again.remarks[0]
    np.testing.assert_array_equal(again.phis["mu"], both.phi_draws["mu"].reshape(-1, 1))
    left = without_a.on(tasks[["A"]], update_phi=False)
    assert left.learned_from.num_tasks == 7
    found = left.adapt(tasks[["A"]], seed=3)
    assert "too (Pareto" in found.remarks[0]
    np.testing.assert_array_equal(
        found.phis["mu"], without_a.adapt(tasks[["A"]], seed=3).phis["mu"]
    )
    far = quietly_on(without_a, replace(tasks[["A"]], outcome=np.array([1000.0])))
    assert far.learned_from.num_tasks == 7
    assert any("stays as learned" in said for said in far.warnings)
    for check in (hb.checks.leave_one_task_out, hb.checks.leave_one_row_out):
        with refuses("carried"):
            check(both)
    with refuses("carried", "hb.load(path).on(tasks)"):
        both.save("nowhere.nc")


def quietly_on(fit, tasks):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        return fit.on(tasks)


def test_namesakes_are_new_tasks(schools, without_a):
    """School B with other numbers than the fit's is another school; so are default names."""
    _, tasks = schools
    other = replace(tasks[["B"]], outcome=np.array([20.0]))
    named = replace(other, labels=replace(other.labels, names=np.array(["new"])))
    found, plain = without_a.adapt(other, seed=4), without_a.adapt(named, seed=4)
    np.testing.assert_array_equal(found.phis["tau"], plain.phis["tau"])
    close(found.theta.values, plain.theta.values, rtol=1e-12)
    assert "names of tasks that the fit knows" in found.remarks[0]
    assert "has learned" in found.remarks[1]


# ------------------------------------------------------------------------------ one by one


@pytest.mark.parametrize(
    "learn", [hb.empirical_bayes, pytest.param(hb.imaml, marks=pytest.mark.slow)]
)
def test_the_order_in_which_rows_arrive_does_not_matter(learn, radon_rows):
    """Where the posterior is exact: in four parts, and all at once."""
    model, first, _ = radon_rows
    fit = quietly_fit(learn, model, first)
    new = hb.Tasks.from_dataframe(_sites(), task="who", outcome="y", predictors=[], shared=["x"])
    new = replace(new, labels=replace(new.labels, coef=first.coef, shared=first.labels.shared))
    parts = [new.keep_rows(np.arange(new.num_rows) % 4 == k) for k in (2, 0, 3, 1)]
    found = None
    for part in parts:
        found = fit.adapt(part, after=found)
    whole = fit.adapt(new)
    order = [whole.tasks.labels.position(name) for name in found.tasks.names.tolist()]
    close(found.theta.values, whole.theta.values[order], rtol=1e-11)
    if whole.covariance is not None:
        close(found.covariance.values, whole.covariance.values[order], rtol=1e-11)


def quietly_fit(learn, model, tasks):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        return learn(model, tasks)


def _sites():
    rng = np.random.default_rng(4)
    return pd.DataFrame({"who": rng.integers(0, 5, 40), "x": rng.integers(0, 2, 40) * 1.0,
                         "y": rng.normal(1.0, 1.0, 40)})  # fmt: skip


def test_full_bayes_one_by_one_is_full_bayes_at_once(schools, without_a):
    """B to H fitted, then A, then a ninth: the same weights on the same draws as both at once."""
    _, tasks = schools
    both = tasks[["A", "B"]]
    both = replace(both, outcome=np.array([28.0, 12.0]), labels=replace(
        both.labels, names=np.array(["A", "I"])))  # fmt: skip
    steps = without_a.adapt(both[["I"]], after=without_a.adapt(both[["A"]]), seed=9)
    at_once = without_a.adapt(both, seed=9)
    assert "has learned" in at_once.remarks[0]
    np.testing.assert_array_equal(steps.phis["tau"], at_once.phis["tau"])
    close(steps.theta.values, at_once.theta.values, rtol=1e-12)


# ------------------------------------------------------------------------------ other methods


def test_the_implied_posterior_of_new_tasks_is_that_of_the_equivalent_prior(radon_rows):
    model, first, later = radon_rows
    fit = quietly_fit(hb.maml, model, first)
    new = later.take(np.flatnonzero(later.sizes > 1))
    found = fit.adapt(new, implied=True)
    implied = hb.equivalent_prior(fit.model, new, fit)
    close(found.theta.values, fit.adapt(new).theta.values, rtol=1e-9)
    close(found.covariance.values, implied.posterior_covariance, rtol=1e-12)
    rows = found.predict(new)
    x = np.ones((new.num_rows, 1))
    spread = np.einsum("ij,ijk,ik->i", x, found.covariance.values[new.task_of_row], x)
    close(rows.sd, np.sqrt(fit.phi["sigma"] ** 2 + spread), rtol=1e-9)
    with refuses("implied=True", "empirical Bayes"):
        quietly_fit(hb.empirical_bayes, model, first).adapt(new, implied=True)


def test_a_task_without_rows_gets_the_prior(schools, without_a):
    model, tasks = schools
    empty = hb.Tasks.from_arrays(
        [(np.zeros((0, 1)), np.zeros(0))], coef=tasks.coef, known_se=[np.zeros(0)]
    )
    found = without_a.adapt(empty)
    mu, tau = (without_a.phi_draws[name].ravel() for name in ("mu", "tau"))
    sd = np.sqrt(mu.var() + (tau**2).mean())
    assert abs(found.theta.values[0, 0] - mu.mean()) < 4 * sd / np.sqrt(len(mu))
    assert found.remarks == ()
    point = quietly_fit(hb.empirical_bayes, model, tasks).adapt(empty)
    close(point.theta.values[0], model_phi(model, tasks)["mu"], rtol=1e-10)


def model_phi(model, tasks):
    return quietly_fit(hb.empirical_bayes, model, tasks).phi


@pytest.mark.slow
def test_counts_are_weighed_by_their_quadrature_evidence():
    """φ after new counts, against fitting all: means within 4 standard errors of both."""
    rng = np.random.default_rng(12)
    rate = np.exp(rng.normal(1.0, 0.5, 14))
    data = pd.DataFrame({"who": np.repeat(np.arange(14), 3), "y": rng.poisson(np.repeat(rate, 3))})
    model, tasks = hb.from_formula("y ~ 1 + (1 | who)", data, family="poisson")
    fit = hb.full_bayes(model, tasks.take(range(12)), num_draws=1000, seed=2)
    found = fit.adapt(tasks.take([12, 13]))
    assert "has learned" in found.remarks[0]
    whole = hb.full_bayes(fit.model, tasks, num_draws=1000, seed=3)
    for name in ("mu", "tau"):
        sd = whole.phi_draws[name].std()
        # the smaller of two effective sizes is taken to be 1,000 of 4,000
        assert abs(found.phis[name].mean() - whole.phi[name][0]) < 4 * sd * np.sqrt(2 / 1000)
    sd = whole.adapted.sd.values[12:]
    assert (np.abs(found.theta.values - whole.theta.values[12:]) < 4 * sd * np.sqrt(2 / 1000)).all()


def test_a_fit_on_other_tasks_holds_their_draws(schools, without_a):
    _, tasks = schools
    other = without_a.on(tasks[["A"]], seed=4)
    new = without_a.adapt(tasks[["A"]], seed=4)
    close(other.theta.values, new.theta.values, rtol=1e-12)
    posterior = other.datatree["posterior"]
    assert posterior["theta"].shape == (4, 4000, 1, 1)
    assert posterior["task"].values.tolist() == ["A"]
    close(other.phi["mu"], new.phis["mu"].mean(0), rtol=1e-12)
    with pytest.raises(AttributeError, match="learned from other tasks"):
        _ = other.log_evidence


def test_moments_take_the_place_of_draws_of_very_many_new_tasks(schools, without_a, monkeypatch):
    from hierbayes.fit import adapting

    _, tasks = schools
    drawn = without_a.adapt(tasks[["A"]])
    monkeypatch.setattr(adapting, "LARGEST_THETA", 10)
    found = without_a.adapt(tasks[["A"]])
    assert found.draws is None
    assert without_a.on(tasks[["A"]]).theta.shape == (1, 1)
    agree(drawn, found.theta.values[0, 0], found.sd.values[0, 0], ess=8000)


# ------------------------------------------------------------------------------ its parts


def test_weighing_turns_draws_of_one_law_into_draws_of_another():
    """N(0, 1) into N(1/2, 1) by weights exp(x / 2): effective size exp(−1/4) of 20,000."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=20_000)
    found = weigh(0.5 * x, rng)
    assert found.sound
    chosen = x[found.chosen]
    error = np.sqrt(np.exp(0.25) / 20_000)
    assert abs(chosen.mean() - 0.5) < 4 * error
    assert abs(chosen.std() - 1.0) < 4 * error
    assert not weigh(30.0 * x, rng).sound
    for wrong in (np.nan, np.inf):
        bent = 0.5 * x
        bent[777] = wrong
        assert not weigh(bent, rng).sound
    even = weigh(np.zeros(7), rng)
    assert even.sound
    np.testing.assert_array_equal(even.chosen, np.arange(7))


def test_evidence_over_draws_is_the_evidence_of_each(radon_rows):
    """Against dense normal densities of whole tasks."""
    model, first, _ = radon_rows
    phis = {"mu": np.array([[1.0], [1.4]]), "tau": np.array([[0.3], [0.0]]),
            "beta": np.array([[-0.6], [-0.2]]), "sigma": np.array([0.8, 0.7])}  # fmt: skip
    found = Integrated().over(model, first, phis)
    for s in range(2):
        for j in (0, 30, 84):
            rows = slice(first.starts[j], first.starts[j + 1])
            n = rows.stop - rows.start
            mean = phis["mu"][s] + first.shared[rows] @ phis["beta"][s]
            spread = phis["sigma"][s] ** 2 * np.eye(n) + phis["tau"][s] ** 2 * np.ones((n, n))
            expected = stats.multivariate_normal(mean, spread).logpdf(first.outcome[rows])
            close(found[s, j], expected, rtol=1e-9)


def tasks_of(names, sizes, start=0.0, **more):
    values = [np.arange(n) + start for n in sizes]
    return hb.Tasks.from_arrays([(np.ones((n, 1)), v) for n, v in zip(sizes, values, strict=True)],
                                names=names, **more)  # fmt: skip


def test_joined_tasks_keep_their_rows_together():
    both = joined(tasks_of(["a", "b", "c"], [2, 0, 1]), tasks_of(["d", "b", "a"], [1, 2, 1], 10.0))
    assert both.names.tolist() == ["a", "b", "c", "d"]
    assert both.sizes.tolist() == [3, 2, 1, 1]
    assert both.outcome.tolist() == [0.0, 1.0, 10.0, 10.0, 11.0, 0.0, 10.0]
    assert len(set(both.rows.tolist())) == both.num_rows
    numbered = joined(tasks_of([1, 2], [1, 1]), tasks_of([2, 3], [1, 1]))
    assert numbered.names.tolist() == [1, 2, 3]


def test_rows_are_matched_one_for_one():
    """The same number twice among the new rows, once among the known: one of them is new."""
    known = tasks_of(["a", "b"], [2, 2])
    rows = hb.Tasks.from_arrays(
        [(np.ones((3, 1)), [1.0, 1.0, 5.0]), (np.ones((1, 1)), [0.0]), (np.ones((1, 1)), [0.0])],
        names=["a", "c", "b"],
    )
    new = not_among(rows, known)
    assert new.sizes.tolist() == [2, 1, 0]
    assert new.outcome.tolist() == [1.0, 5.0, 0.0]
    assert not_among(rows, tasks_of(["a", "c"], [0, 0])).num_rows == rows.num_rows


def test_parts_that_do_not_fit_are_refused(schools, without_a):
    _, tasks = schools
    with refuses("after", "Fit"):
        without_a.adapt(tasks[["A"]], after=without_a)
    with refuses("outcome"):
        joined(tasks, replace(tasks, outcome=None))
    with refuses("'known_se'"):
        joined(tasks, replace(tasks, slots={}))
    moved = replace(tasks_of(["a"], [2]), task_predictors=np.array([[1.0]]))
    with refuses("'a'", "task predictors"):
        joined(moved, replace(moved, task_predictors=np.array([[2.0]])))
