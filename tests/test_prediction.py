"""Predictions as mixtures of any SciPy distribution, and which σ they use, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from assertions import close, refuses
from scipy import special, stats

import hierbayes as hb
from hierbayes.adaptation import Conjugate, GradientSteps, Laplace, Normal
from hierbayes.adaptation.step_length import curvatures
from hierbayes.fit import Prediction
from hierbayes.fit.method import Derived

GAUSSIAN = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())


def prediction(components: Any, outcome: Any, unidentified: Any = None) -> Prediction:
    """One row a task."""
    tasks = hb.Tasks.from_arrays([(np.ones((1, 1)), [y]) for y in outcome])
    blind = np.zeros(len(outcome), bool) if unidentified is None else np.array(unidentified)
    return Prediction("known task", tasks, components, blind)


# ----------------------------------------------------------------------------- discrete

CHANCE = np.array([[0.1, 0.6, 0.95], [0.3, 0.2, 0.85]])
COUNTS = stats.poisson(np.array([[0.4, 30.0, 3.0], [9.0, 31.0, 0.01]]))


def test_a_mixture_of_bernoullis_is_a_bernoulli():
    """Of the mean chance: 0.2, 0.4 and 0.9."""
    found = prediction(stats.bernoulli(CHANCE), [0, 1, 1])
    chance = np.array([0.2, 0.4, 0.9])
    assert found.discrete
    close(found.mean, chance, rtol=1e-12)
    close(found.sd, np.sqrt(chance * (1 - chance)), rtol=1e-12)
    close(found.log_density(), np.log([0.8, 0.4, 0.9]), rtol=1e-12)
    close(found.pit(), [0.8, 1.0, 1.0], rtol=1e-12)
    close(found.log_density(np.array([0.0, 2.0, 0.0]))[[0, 2]], np.log([0.8, 0.1]), rtol=1e-12)
    assert found.log_density(np.array([0.0, 2.0, 0.0]))[1] == -np.inf
    draws = found.draws(4000, seed=1)
    assert set(np.unique(draws)) == {0.0, 1.0}
    # five standard errors of a mean of 4,000
    close(draws.mean(0), chance, rtol=0, atol=5 * 0.5 / np.sqrt(4000))


@pytest.mark.parametrize("probability", [0.05, 0.15, 0.55, 0.7, 0.97])
def test_a_bernoulli_quantile_is_the_smallest_value_that_reaches_it(probability):
    found = prediction(stats.bernoulli(CHANCE), [0, 1, 1]).quantile(probability)
    close(found, (np.array([0.8, 0.6, 0.1]) < probability).astype(float), rtol=0)


@pytest.mark.parametrize("probability", [0.01, 0.2, 0.5, 0.9, 0.999])
def test_a_quantile_of_mixed_counts_is_the_smallest_value_that_reaches_it(probability):
    """By running through all counts up to 100."""
    cumulative = stats.poisson.cdf(np.arange(101)[:, None, None], *COUNTS.args).mean(1)
    found = prediction(COUNTS, [0, 1, 1]).quantile(probability)
    close(found, (cumulative < probability).sum(0).astype(float), rtol=0)


def test_an_interval_holds_at_least_its_probability():
    low, high = prediction(COUNTS, [0, 1, 1]).interval(0.8)
    mass = (COUNTS.cdf(high) - COUNTS.cdf(low - 1)).mean(0)
    assert (mass >= 0.8).all()
    inside = (COUNTS.cdf(high - 1) - COUNTS.cdf(low)).mean(0)
    assert (inside < 0.8).all()


def test_rows_that_need_an_unknown_coefficient_stay_open():
    found = prediction(stats.bernoulli(CHANCE), [0, 1, 1], [False, True, False])
    for values in (found.mean, found.sd, found.log_density(), found.quantile(0.5), found.draws(3)):
        assert np.isnan(values[..., 1]).all()
        assert np.isfinite(values[..., [0, 2]]).all()


# --------------------------------------------------------------------------- continuous


def test_normal_draws_are_mean_plus_sd_times_white_noise():
    means, sds = np.array([[0.0, 5.0], [10.0, -5.0]]), np.array([[1.0], [0.1]])
    found = prediction(stats.norm(means, sds), [0.0, 1.0])
    assert not found.discrete
    close(found.means, means, rtol=0)
    close(found.sds, np.broadcast_to(sds, (2, 2)), rtol=1e-15)
    draws = found.draws(500, seed=3)
    rng = np.random.default_rng(3)
    component = rng.integers(2, size=500)
    white = rng.standard_normal((500, 2))
    close(draws, means[component] + sds[component] * white, rtol=1e-14)


@pytest.mark.parametrize("probability", [0.0, 1.0, 1.5, -0.1, np.nan])
def test_what_is_no_probability_is_refused(probability):
    with refuses("between 0 and 1"):
        prediction(stats.norm(np.zeros((1, 1)), 1.0), [0.0]).quantile(probability)


# ---------------------------------------------------------------------- sigma, sigma_query


def test_sigma_query_stands_in_for_sigma_only_where_theta_is_estimated_as_a_point(rng):
    """It absorbs the variance of θ: where that is integrated out, σ² + xᵀ Cov x counts it once.

    At θ = μ, the population's, there is no such variance: σ alone.
    """
    tasks = hb.Tasks.from_arrays(
        [(np.column_stack([np.ones(5), rng.normal(size=5)]), rng.normal(size=5)) for _ in range(4)]
    )
    phi = {"mu": np.array([0.3, -0.2]), "tau": np.array([0.7, 0.4]), "sigma": np.array(0.5),
           "corr": np.eye(2), "sigma_query": np.array(0.8)}  # fmt: skip
    exact = hb.Fit(Derived("a method"), GAUSSIAN, tasks, phi, Conjugate())
    x = tasks.predictors
    close(exact.predict(target="new").sd, np.sqrt(0.25 + x**2 @ [0.49, 0.16]), rtol=1e-12)
    close(exact.predict(target="population").sd, np.full(20, 0.5), rtol=1e-12)
    covariance = exact.adapted.covariance.values[tasks.task_of_row]
    spread = np.einsum("ik,ikl,il->i", x, covariance, x)
    close(exact.predict().sd, np.sqrt(0.25 + spread), rtol=1e-12)
    point = replace(exact, adaptation=GradientSteps(2, 0.01))
    close(point.predict().sd, np.full(20, 0.8), rtol=1e-12)
    close(point.predict(target="new").sd, exact.predict(target="new").sd, rtol=1e-12)


def test_weights_divide_the_variance_in_float64(rng):
    columns = {"g": np.repeat([0, 1, 2], 4), "y": rng.normal(size=12), "w": rng.uniform(1, 9, 12)}
    tasks = hb.Tasks.from_dataframe(pd.DataFrame(columns), task="g", outcome="y", weight="w")
    fit = hb.complete_pooling(GAUSSIAN, tasks)
    expected = float(fit.phi["sigma"]) / np.sqrt(tasks.slots["weight"])
    close(fit.predict(target="new").sd, expected, rtol=1e-14)
    found = curvatures(GAUSSIAN, tasks, {"sigma": 0.7})[:, 0]
    close(found, tasks.slots["weight"].reshape(3, 4).sum(1) / 0.49, rtol=1e-13)


def test_curvatures_with_known_errors_are_those_of_the_errors_alone(schools):
    """1/se², whatever sigma_query is: it belongs to the query rows, not to the inner loop."""
    for phi in ({}, {"sigma_query": np.array(3.0)}):
        found = curvatures(schools.model, schools.tasks, phi)[:, 0]
        close(found, schools.data["se"].to_numpy(float) ** -2.0, rtol=1e-13)


def test_moments_of_theta_and_draws_of_sigma_make_one_component_a_draw(rng):
    """As full Bayes keeps them where draws of θ would be too many: variances are averaged."""
    tasks = hb.Tasks.from_arrays([(np.ones((3, 1)), rng.normal(size=3)) for _ in range(4)])
    training = Normal(rng.normal(size=(4, 1)), rng.uniform(0.1, 0.5, (4, 1, 1)))
    draws = {"mu": rng.normal(size=(2, 5, 1)), "tau": rng.uniform(size=(2, 5, 1)),
             "sigma": rng.uniform(0.5, 1.5, (2, 5))}  # fmt: skip
    phi = {name: value.mean(axis=(0, 1)) for name, value in draws.items()}
    fit = hb.Fit(hb.meta.FullBayes(), GAUSSIAN, tasks, phi, Conjugate(), training, phi_draws=draws)
    found = fit.predict()
    assert found.means.shape == (10, 12)
    close(found.mean, np.repeat(training.mean[:, 0], 3), rtol=1e-12)
    variance = (draws["sigma"] ** 2).mean() + np.repeat(training.covariance[:, 0, 0], 3)
    close(found.sd, np.sqrt(variance), rtol=1e-12)


# ------------------------------------------------------------------------- joint draws

NUM_DRAWS = 20_000


def covariance_agrees(found: Any, expected: np.ndarray) -> None:
    """Means, variances and covariances of draws of rows, within five of their standard errors.

    ``found`` is a Prediction, ``expected`` the joint covariance of its rows.
    """
    draws = found.draws(NUM_DRAWS, seed=1)
    centred = draws - found.mean
    sd = np.sqrt(np.diag(expected))
    close(sd, found.sd, rtol=1e-9)  # what is drawn jointly has the marginals that are stated
    assert (np.abs(centred.mean(0)) < 5 * sd / np.sqrt(NUM_DRAWS)).all(), "means"
    products = centred[:, :, None] * centred[:, None]
    error = products.std(0) / np.sqrt(NUM_DRAWS)
    assert (np.abs(products.mean(0) - expected) < 5 * error).all(), "covariances"


def same_task(tasks: hb.Tasks) -> np.ndarray:
    return tasks.task_of_row[:, None] == tasks.task_of_row[None]


@pytest.fixture
def few(rng):
    """Three tasks of 2 to 4 rows, two coefficients, and rows to be predicted of each."""
    arrays = [
        (np.column_stack([np.ones(n), rng.normal(size=n)]), rng.normal(size=n)) for n in (2, 4, 3)
    ]
    return hb.Tasks.from_arrays(arrays, shared=[rng.normal(size=(n, 1)) for n in (2, 4, 3)])


PHI = {"mu": np.array([0.3, -0.2]), "tau": np.array([0.9, 0.6]), "sigma": np.array(0.4),
       "corr": np.array([[1.0, 0.5], [0.5, 1.0]]), "beta": np.array([0.7])}  # fmt: skip
SIGMA = PHI["tau"][:, None] * PHI["corr"] * PHI["tau"]


def test_rows_of_a_known_task_share_its_theta(few):
    """Cov(y_i, y_k) = x_iᵀ C_j x_k within a task, σ² on the diagonal, nothing between tasks."""
    fit = hb.Fit(Derived("a method"), GAUSSIAN, few, PHI, Conjugate())
    x, c = few.predictors, fit.adapted.covariance.values[few.task_of_row]
    joint = np.einsum("ik,ikl,ml->im", x, c, x) * same_task(few) + 0.16 * np.eye(9)
    covariance_agrees(fit.predict(), joint)
    # a task's mean over its rows, against the closed form and against rows drawn alone
    rows = few.task_of_row == 1
    means = fit.predict().draws(NUM_DRAWS, seed=2)[:, rows].mean(1)
    expected = joint[np.ix_(rows, rows)].mean()
    assert abs(means.var() / expected - 1) < 5 * np.sqrt(2 / NUM_DRAWS)
    alone = np.diag(joint)[rows].sum() / rows.sum() ** 2
    assert abs(alone / expected - 1) > 20 * np.sqrt(2 / NUM_DRAWS), "the case that is meant"


def test_rows_drawn_alone_are_seen(few):
    """The control: without the joint, the same marginals fail."""
    fit = hb.Fit(Derived("a method"), GAUSSIAN, few, PHI, Conjugate())
    x, c = few.predictors, fit.adapted.covariance.values[few.task_of_row]
    joint = np.einsum("ik,ikl,ml->im", x, c, x) * same_task(few) + 0.16 * np.eye(9)
    with pytest.raises(AssertionError, match="covariances"):
        covariance_agrees(replace(fit.predict(), joint=None), joint)


def test_rows_of_a_new_task_share_a_draw_of_the_prior(few):
    fit = hb.Fit(Derived("a method"), GAUSSIAN, few, PHI, Conjugate())
    x = few.predictors
    joint = (x @ SIGMA @ x.T) * same_task(few) + 0.16 * np.eye(9)
    covariance_agrees(fit.predict(target="new"), joint)


def test_of_the_population_theta_is_the_centre_and_rows_are_independent(few):
    fit = hb.Fit(Derived("a method"), GAUSSIAN, few, PHI, Conjugate())
    covariance_agrees(fit.predict(target="population"), 0.16 * np.eye(9))


def over_draws(few: hb.Tasks, rng: np.random.Generator) -> hb.Fit:
    """Six draws of φ and of θ, far apart, as full Bayes keeps them."""
    draws = {
        "mu": rng.normal(size=(2, 3, 2)), "tau": rng.uniform(0.2, 1.0, (2, 3, 2)),
        "corr": np.broadcast_to(PHI["corr"], (2, 3, 2, 2)), "beta": rng.normal(size=(2, 3, 1)),
        "sigma": rng.uniform(0.3, 0.9, (2, 3)),
    }  # fmt: skip
    phi = {name: value.mean((0, 1)) for name, value in draws.items()}
    theta = rng.normal(size=(2, 3, 3, 2))
    return hb.Fit(hb.meta.FullBayes(), GAUSSIAN, few, phi, Conjugate(), None, draws, theta)


def test_under_full_bayes_a_draw_is_of_one_phi_in_all_rows(few, rng):
    """E[Cov | φ_s] + Cov(E | φ_s): tasks are correlated too, through the φ that they share."""
    fit = over_draws(few, rng)
    x, z, j = few.predictors, few.shared, few.task_of_row
    flat = {n: v.reshape(6, *v.shape[2:]) for n, v in fit.phi_draws.items()}
    noise = (flat["sigma"] ** 2).mean() * np.eye(9)
    fixed = flat["beta"] @ z.T
    known = np.einsum("sik,ik->si", fit.theta_draws.reshape(6, 3, 2)[:, j], x) + fixed
    covariance_agrees(fit.predict(), np.cov(known.T, bias=True) + noise)
    centre = flat["mu"] @ x.T + fixed
    spread = np.mean([
        x @ (t[:, None] * r * t) @ x.T for t, r in zip(flat["tau"], flat["corr"], strict=True)
    ], 0)  # fmt: skip
    expected = np.cov(centre.T, bias=True) + spread * same_task(few) + noise
    covariance_agrees(fit.predict(target="new"), expected)


def test_adapted_tasks_draw_jointly_too(few):
    fit = hb.Fit(Derived("a method"), GAUSSIAN, few, PHI, Conjugate())
    first, second = fit.adapt(few).predict(few), fit.predict()
    assert first.joint is not None
    np.testing.assert_array_equal(first.draws(50, seed=4), second.draws(50, seed=4))


@pytest.mark.parametrize("target", ["known", "new"])
def test_counts_of_a_task_share_its_theta(target, rng):
    """Log-normal rates: Cov(y_i, y_k) = e^{m_i + m_k + (v_i + v_k)/2} (e^{c_ik} − 1) within a task.

    c_ik = x_iᵀ C x_k, v its diagonal; and the mean on the diagonal. The posterior is normal by
    Laplace's approximation, and of a new task the prior is.
    """
    arrays = [
        (np.column_stack([np.ones(n), rng.normal(size=n)]), rng.poisson(3, n)) for n in (2, 3)
    ]
    tasks = hb.Tasks.from_arrays(arrays)
    model = hb.HierarchicalModel(hb.likelihoods.Poisson(), hb.priors.Gaussian())
    phi = {"mu": np.array([1.0, -0.2]), "tau": np.array([0.4, 0.3]), "corr": PHI["corr"]}
    fit = hb.Fit(Derived("a method"), model, tasks, phi, Laplace())
    x, j = tasks.predictors, tasks.task_of_row
    if target == "known":
        m, c = fit.adapted.theta.values[j], fit.adapted.covariance.values[j]
    else:
        m = np.broadcast_to(phi["mu"], (5, 2))
        c = np.broadcast_to(phi["tau"][:, None] * phi["corr"] * phi["tau"], (5, 2, 2))
    centre, among = (x * m).sum(1), np.einsum("ik,ikl,ml->im", x, c, x)
    mean = np.exp(centre + np.diag(among) / 2)
    joint = np.outer(mean, mean) * np.expm1(among) * same_task(tasks) + np.diag(mean)
    covariance_agrees(fit.predict(target=target), joint)


def test_shares_of_ones_in_a_task_spread_as_its_theta_does():
    """The mean of 40 rows of one task: E[p(1 − p)] / 40 + Var(p), by quadrature over f."""
    x = np.ones((40, 1))
    tasks = hb.Tasks.from_arrays([(x, np.arange(40) % 2), (x, np.arange(40) % 2)])
    model = hb.HierarchicalModel(hb.likelihoods.Bernoulli(), hb.priors.Gaussian())
    phi = {"mu": np.array([0.5]), "tau": np.array([1.2])}
    fit = hb.Fit(Derived("a method"), model, tasks, phi, Laplace())
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    p = special.expit(0.5 + 1.2 * nodes)
    weights = weights / weights.sum()
    first = weights @ p
    expected = weights @ (p * (1 - p)) / 40 + weights @ (p - first) ** 2
    shares = fit.predict(target="new").draws(NUM_DRAWS, seed=1)[:, :40].mean(1)
    squares = (shares - first) ** 2
    assert abs(squares.mean() - expected) < 5 * squares.std() / np.sqrt(NUM_DRAWS)


class Saturating(hb.likelihoods.Gaussian):
    """y ~ N(tanh(x θ + z β + offset), σ²): curved in θ, and whole as it stands."""

    gaussian_in_theta, linear = False, False

    def location(self, theta, phi, task):
        return jnp.tanh(super().location(theta, phi, task))


@pytest.mark.parametrize("target", ["known", "new", "population"])
def test_what_a_curved_likelihood_says_of_f_is_all_of_it(target):
    """Shared effects and offsets stand inside f already; each draw of φ has its own."""
    rng = np.random.default_rng(5)
    tasks = hb.Tasks.from_dataframe(
        pd.DataFrame({"who": list("aabbb"), "y": rng.normal(size=5), "z": rng.normal(size=5)}),
        task="who", outcome="y", predictors=[], shared=["z"],
    )  # fmt: skip
    tasks = replace(tasks, slots={"offset": rng.normal(size=5)})
    stated = hb.HyperPrior(sigma=dist.HalfNormal(1.0))
    model = hb.HierarchicalModel(Saturating(), hb.priors.Gaussian(), stated).resolve(tasks)
    lead = (2, 30)
    theta = rng.normal(size=(*lead, 2, 1))
    draws = {"mu": rng.normal(size=(*lead, 1)), "tau": np.full((*lead, 1), 1e-12),
             "beta": rng.normal(size=(*lead, 1)), "sigma": np.full(lead, 0.3)}  # fmt: skip
    phi = {name: value.mean((0, 1)) for name, value in draws.items()}
    fit = hb.Fit(hb.meta.FullBayes(), model, tasks, phi, Laplace(), None, draws, theta)
    known = np.broadcast_to(draws["mu"][:, :, None], theta.shape)
    level = (theta if target == "known" else known)[..., tasks.task_of_row, 0]
    f = np.tanh(level + draws["beta"] * tasks.shared[:, 0] + tasks.slots["offset"])
    # τ = 1e-12 moves a new task's θ by no more than that
    close(fit.predict(target=target).mean, f.mean((0, 1)), rtol=1e-10, atol=1e-11)


def test_a_component_without_a_mean_stands_at_its_median():
    """One of three with one degree of freedom: its centre takes part, its spread is endless."""
    found = prediction(
        stats.t(np.array([[1.0], [5.0], [9.0]]), np.array([[4.0], [1.0], [1.0]])), [0.0]
    )
    close(found.mean, [2.0], rtol=1e-12)
    assert found.sd[0] == np.inf
    assert np.isfinite(found.interval(0.9)).all()
