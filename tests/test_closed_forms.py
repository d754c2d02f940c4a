r"""MAML against type-II maximum likelihood in normal means, where both have closed forms.

y_ij ~ N(θ_j, s²), θ_j ~ N(μ, τ²), n support and m query rows a task, N = n + m. K steps reach
θ_j = φ + w (ȳ_j − φ), w = 1 − (1 − ηn/s²)^K, and the query rows' expected squared error is

.. math:: s^2 + (1 - w)^2 [\tau^2 + (\mu - \varphi)^2] + w^2 s^2 / n
          = s^2 + v + (w - w^*)^2 (\tau^2 + s^2 / n) + (1 - w)^2 (\mu - \varphi)^2

least at φ = μ and w* = τ²/(τ² + s²/n), the shrinkage of the exact posterior, whose variance is
v = w* s²/n. In a sample MAML regresses query means v̄_j on support means ȳ_j: ŵ = S_vy / S_yy,
φ̂ = (v̄ − ŵ ȳ)/(1 − ŵ). Type-II ML takes all rows: φ̂ their mean, τ̂² = max(0, S − s²/N) with S the
variance of the tasks' means. Of J tasks, as J → ∞, by the delta method,

.. math:: \frac{\operatorname{Var} \hat w_{\text{MAML}}}{\operatorname{Var} \hat w_{\text{EB}}}
          = \frac{w + n/m}{2(1 - w)} \left(\frac{\tau^2 + s^2/n}{\tau^2 + s^2/N}\right)^2, \qquad
          \frac{\operatorname{Var} \hat\varphi_{\text{MAML}}}
               {\operatorname{Var} \hat\varphi_{\text{EB}}}
          = \frac{(\tau^2 + s^2/n)(w + n/m)}{(1 - w)(\tau^2 + s^2/N)}

Tasks are built below whose sample moments are the population's, so that the population's optimum
is the sample's and can be compared exactly. Learned step sizes are right to about 1e-6.
"""

import numpy as np
import pandas as pd
import pytest
from assertions import close
from scipy import stats
from simulated import by_task

import hierbayes as hb

GAUSSIAN = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
N_SUPPORT = N_QUERY = 4
MU, TAU, S = 1.5, 0.8, np.sqrt(3.84)
BEST = TAU**2 / (TAU**2 + S**2 / N_SUPPORT)  # 0.4: one step within (0, 1/λ_max) reaches 0.5
V = BEST * S**2 / N_SUPPORT
SPLIT = 11


def ridge(num_steps, w=BEST):
    """η of every (K, η) that shrinks by w."""
    return S**2 / N_SUPPORT * -np.expm1(np.log1p(-w) / num_steps)


def exact_moments(num_tasks=40, seed=3):
    """Tasks whose split has the moments of the population, and no others.

    Support means have mean μ and variance τ² + s²/n; query means regress on them with slope w*
    and residual variance v + s²/m; rows vary within support and query parts by s².
    """
    rng = np.random.default_rng(seed)
    size = N_SUPPORT + N_QUERY
    white = rng.standard_normal((num_tasks, 2))
    white = np.linalg.qr(np.column_stack([np.ones(num_tasks), white]))[0][:, 1:] * num_tasks**0.5
    y_bar = MU + np.sqrt(TAU**2 + S**2 / N_SUPPORT) * white[:, 0]
    v_bar = MU + BEST * (y_bar - MU) + np.sqrt(V + S**2 / N_QUERY) * white[:, 1]
    # which rows the split will take is known once their number is
    index = [np.arange(size) + size * j for j in range(num_tasks)]
    numbered = hb.Tasks.from_arrays([(np.ones((size, 1)), i.astype(float)) for i in index])
    outcome = np.zeros(num_tasks * size)
    for part, means in zip(numbered.split(0.5, seed=SPLIT), (y_bar, v_bar), strict=True):
        rows = part.outcome.astype(int).reshape(num_tasks, -1)
        around = rng.standard_normal(rows.shape)
        around -= around.mean(1, keepdims=True)
        around *= np.sqrt(num_tasks * (rows.shape[1] - 1) * S**2 / (around**2).sum())
        outcome[rows] = means[:, None] + around
    return hb.Tasks.from_arrays([(np.ones((size, 1)), outcome[i]) for i in index])


TASKS = exact_moments()
SUPPORT, QUERY = TASKS.split(0.5, seed=SPLIT)


def maml(num_steps, step_size="auto", **more):
    return hb.maml(GAUSSIAN, TASKS, num_steps, step_size, sigma=S, seed=SPLIT, **more)


# ------------------------------------------------------------------------ T7: exact


def test_the_tasks_have_the_moments_that_they_were_built_for():
    """Of everything below: slope, means and variances to rounding."""
    y, v = (part.outcome.reshape(-1, 4) for part in (SUPPORT, QUERY))
    covariance = np.cov(y.mean(1), v.mean(1), ddof=0)
    # Cov(ȳ, v̄) = w* (τ² + s²/n) = τ²: the two parts share θ_j alone
    expected = TAU**2 + np.diag([S**2 / N_SUPPORT, S**2 / N_QUERY])
    close(covariance, expected, rtol=1e-12)
    close([y.mean(), v.mean()], [MU, MU], rtol=1e-12)
    close([y.var(1, ddof=1).mean(), v.var(1, ddof=1).mean()], [S**2, S**2], rtol=1e-12)


@pytest.fixture(scope="module")
def type_two():
    """Empirical Bayes of the support rows: balanced, so that ML is the method of moments."""
    return hb.empirical_bayes(GAUSSIAN, SUPPORT, criterion="ml", num_draws=10)


def test_type_two_maximum_likelihood_finds_the_population(type_two):
    close(type_two.phi["mu"], [MU], rtol=1e-7)
    close(type_two.phi["tau"], [TAU], rtol=1e-7)
    close(type_two.phi["sigma"], S, rtol=1e-7)
    close(type_two.adapted.posterior.covariance.ravel(), np.full(40, V), rtol=1e-7)


@pytest.mark.parametrize("num_steps", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_the_optimum_of_maml_is_the_bayes_posterior(num_steps, type_two):
    """φ* = μ, w* = Bayes shrinkage, σ_q² = s² + v; prior 1/τ² and posterior those of type-II ML."""
    found = maml(num_steps, learn_step_size=True)
    eta = float(found.phi["step_size"])
    assert eta == pytest.approx(ridge(num_steps), rel=1e-7)
    if num_steps == 1:
        assert eta == pytest.approx(V, rel=1e-7)  # one step is as long as the posterior is wide
    close(found.phi["mu"], [MU], rtol=1e-7)
    close(found.phi["sigma_query"] ** 2, S**2 + V, rtol=1e-7)
    implied = hb.equivalent_prior(GAUSSIAN, SUPPORT, found.phi, num_steps, eta)
    close(implied.precision.ravel(), np.full(40, TAU**-2), rtol=1e-7)
    close(implied.shrinkage.ravel(), np.full(40, BEST), rtol=1e-7)
    close(implied.posterior_covariance.ravel(), np.full(40, V), rtol=1e-7)
    close(implied.posterior_mean, type_two.theta.values, rtol=1e-7)
    close(implied.posterior_covariance, type_two.adapted.posterior.covariance, rtol=1e-7)
    # neither no pooling nor complete pooling would do
    y_bar = SUPPORT.outcome.reshape(-1, 4).mean(1)
    assert np.abs(implied.posterior_mean[:, 0] - y_bar).max() > 0.5
    assert np.ptp(implied.posterior_mean) > 1


@pytest.mark.slow
def test_every_number_of_steps_on_the_ridge_is_the_same_optimum():
    """(K, η) is not identified: μ, σ_q, the query rows' density and θ_K are the same for all K.

    With w 5 % smaller the log density is lower by N_q (0.05 w*)² (τ² + s²/n) / (2 (s² + v)), to
    first order.
    """
    fits = {k: maml(k, ridge(k)) for k in (2, 20)}
    rows = QUERY.num_rows
    best = -0.5 * rows * (np.log(2 * np.pi * (S**2 + V)) + 1)
    for k, found in fits.items():
        close(found.phi["mu"], [MU], rtol=1e-8)
        close(found.phi["sigma_query"] ** 2, S**2 + V, rtol=1e-8)
        assert found.info["query_log_density"] == pytest.approx(best, rel=1e-10)
        implied = hb.equivalent_prior(GAUSSIAN, SUPPORT, found.phi, k, ridge(k))
        close(implied.posterior_covariance.ravel(), np.full(40, V), rtol=1e-9)
    beside = maml(20, ridge(20, 0.95 * BEST))
    least = rows * (0.05 * BEST) ** 2 * (TAU**2 + S**2 / N_SUPPORT) / (2 * (S**2 + V))
    assert best - beside.info["query_log_density"] == pytest.approx(least, rel=0.01)


def test_off_the_optimum_the_error_is_the_expected_one():
    """φ* = μ for any w ≠ 1, and σ_q² = s² + (1 − w)²τ² + w² s²/n."""
    w = 0.8
    found = maml(20, ridge(20, w))
    close(found.phi["mu"], [MU], rtol=1e-7)
    expected = S**2 + (1 - w) ** 2 * TAU**2 + w**2 * S**2 / N_SUPPORT
    close(found.phi["sigma_query"] ** 2, expected, rtol=1e-8)
    assert expected > S**2 + V + 0.02


def test_gradient_flow_has_the_same_optimum(type_two):
    """t* = (s²/n) log(1 + n τ²/s²)."""
    time = S**2 / N_SUPPORT * np.log1p(N_SUPPORT * TAU**2 / S**2)
    implied = hb.equivalent_prior(GAUSSIAN, SUPPORT, [MU], time=time, sigma=S)
    close(implied.precision.ravel(), np.full(40, TAU**-2), rtol=1e-12)
    close(implied.posterior_covariance.ravel(), np.full(40, V), rtol=1e-12)
    close(implied.posterior_mean, type_two.theta.values, rtol=1e-7)


def test_imaml_learns_the_precision_of_type_two_maximum_likelihood():
    found = hb.imaml(GAUSSIAN, TASKS, sigma=S, seed=SPLIT)
    close(found.phi["mu"], [MU], rtol=1e-7)
    close(found.phi["tau"], [TAU], rtol=1e-7)
    close(found.phi["sigma_query"] ** 2, S**2 + V, rtol=1e-7)


# ----------------------------------------------------------------- T8, T9: in samples


def maml_estimates(mean_y, mean_v, s_yy, s_vy):
    """(w, φ) of the regression of query on support means, w within [0, 1)."""
    w = np.clip(s_vy / s_yy, 0, 1 - 1e-9)
    return w, (mean_v - w * mean_y) / (1 - w)


def type_two_estimates(mean_y, mean_v, s_yy, s_vy, s_vv, n, m, s):
    """(τ², φ) from all n + m rows, s known; S are variances over tasks (divisor J)."""
    mean = (n * mean_y + m * mean_v) / (n + m)
    variance = (n**2 * s_yy + 2 * n * m * s_vy + m**2 * s_vv) / (n + m) ** 2
    return np.maximum(variance - s**2 / (n + m), 0.0), mean


def moments(y_bar, v_bar):
    (s_yy, s_vy), (_, s_vv) = np.cov(y_bar, v_bar, ddof=0)
    return y_bar.mean(), v_bar.mean(), s_yy, s_vy, s_vv


def sampled(seed, num_tasks=120, rows=10, s=1.2, tau=0.9):
    """One sample as a DataFrame with known standard errors."""
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(num_tasks), rows)
    y = MU + tau * rng.standard_normal(num_tasks)[task] + s * rng.standard_normal(task.size)
    return pd.DataFrame({"task": task, "y": y, "se": s})


@pytest.mark.slow
def test_the_methods_are_the_estimators_that_are_simulated():
    """hb.maml is the regression, whatever K; hb.empirical_bayes the moments of all rows."""
    seed = 0
    frame = sampled(seed)
    known, tasks = hb.from_formula("y ~ 1 + (1 | task)", frame, known_se="se")
    support, query = tasks.split(0.5, seed=seed)
    y_bar, v_bar = (part.outcome.reshape(-1, 5).mean(1) for part in (support, query))
    found = moments(y_bar, v_bar)
    w, phi = maml_estimates(*found[:4])
    assert 0.5 < w < 0.9
    model, plain = hb.from_formula("y ~ 1 + (1 | task)", frame)
    learned = hb.maml(model, plain, 5, learn_step_size=True, sigma=1.2, seed=seed)
    eta = float(learned.phi["step_size"])
    assert 1 - (1 - eta * 5 / 1.44) ** 5 == pytest.approx(w, rel=1e-5)
    close(learned.phi["mu"], [phi], rtol=1e-5)
    variance, mean = type_two_estimates(*found, n=5, m=5, s=1.2)
    type_two = hb.empirical_bayes(known, tasks, criterion="ml", num_draws=10)
    close(type_two.phi["tau"] ** 2, [variance], rtol=1e-6)
    close(type_two.phi["mu"], [mean], rtol=1e-8)
    # two estimators of one φ, not one
    assert abs(phi - mean) > 1e-3


@pytest.mark.slow
def test_a_regression_on_parts_of_unequal_size():
    """T8 with three support and five query rows: ŵ and φ̂ of least squares of v̄_j on ȳ_j."""
    tasks = hb.Tasks.from_arrays([
        (np.ones((8, 1)), part["y"].to_numpy()) for _, part in sampled(7, 40, 8).groupby("task")
    ])  # fmt: skip
    found = hb.maml(GAUSSIAN, tasks, 2, learn_step_size=True, sigma=1.2, seed=5, query=0.625)
    support, query = tasks.split(0.625, seed=5)
    assert set(support.sizes) == {3}
    y_bar, v_bar = ([y.mean() for _, _, y in by_task(part)] for part in (support, query))
    line = stats.linregress(y_bar, v_bar)
    # two steps of at most 1/λ_max reach 1 − (1 − 3/8)² = 0.61
    assert 0.2 < line.slope < 0.6
    eta = float(found.phi["step_size"])
    assert 1 - (1 - eta * 3 / 1.44) ** 2 == pytest.approx(line.slope, rel=1e-5)
    close(found.phi["mu"], [line.intercept / (1 - line.slope)], rtol=1e-5)


EFFICIENCY = {
    # (n = m, τ²): theory for w, φ; simulation of 3,000 samples of J = 2,000 tasks for w, φ
    (5, 0.2): (2.67, 4.00, 2.68, 4.01),
    (10, 1.0): (11.5, 22.0, 11.6, 22.3),
    (5, 0.05): (2.08, 2.50, 2.01, 2.45),
}
"""methods.md, section 2.8, with s = 1."""


def theory(n, m, variance):
    """The two ratios of this file's docstring, s = 1."""
    w = variance / (variance + 1 / n)
    narrow, wide = variance + 1 / (n + m), variance + 1 / n
    of_w = (w + n / m) / (2 * (1 - w)) * (wide / narrow) ** 2
    return of_w, wide * (w + n / m) / ((1 - w) * narrow)


def simulate(n, m, variance, num_tasks, count, rng):
    """Errors of (w, φ) by MAML and by type-II ML, in ``count`` samples of ``num_tasks`` tasks.

    All that the estimators read are means and covariance of the tasks' (ȳ_j, v̄_j), which are
    jointly normal: a normal mean, and a Wishart matrix by Bartlett's decomposition.
    """
    covariance = variance + np.diag([1 / n, 1 / m])
    root = np.linalg.cholesky(covariance)
    means = rng.standard_normal((count, 2)) @ root.T / np.sqrt(num_tasks)
    bartlett = np.zeros((count, 2, 2))
    bartlett[:, 0, 0] = np.sqrt(rng.chisquare(num_tasks - 1, count))
    bartlett[:, 1, 1] = np.sqrt(rng.chisquare(num_tasks - 2, count))
    bartlett[:, 1, 0] = rng.standard_normal(count)
    half = root @ bartlett
    scatter = half @ np.swapaxes(half, 1, 2) / num_tasks
    found = (*means.T, scatter[:, 0, 0], scatter[:, 1, 0], scatter[:, 1, 1])
    w, phi = maml_estimates(*found[:4])
    tau_squared, mean = type_two_estimates(*found, n=n, m=m, s=1.0)
    return (w, phi), (tau_squared / (tau_squared + 1 / n), mean)


def variance_ratio(first, second):
    """Var(first) / Var(second) and the standard error of its logarithm, by the delta method."""
    squares = [(x - x.mean()) ** 2 for x in (first, second)]
    shares = [square / square.mean() for square in squares]
    error = (shares[0] - shares[1]).std() / np.sqrt(len(first))
    return squares[0].mean() / squares[1].mean(), error


def test_the_standard_error_of_a_variance_ratio_is_right(rng):
    """The helper itself: 400 ratios of correlated samples spread as their errors say, to 15 %."""
    pairs = rng.standard_normal((400, 2, 500))
    pairs[:, 1] = 0.6 * pairs[:, 0] + 0.8 * pairs[:, 1]
    found = np.array([variance_ratio(*pair) for pair in pairs])
    assert np.log(found[:, 0]).std() == pytest.approx(found[:, 1].mean(), rel=0.15)


@pytest.mark.parametrize("case", EFFICIENCY, ids=str)
def test_relative_efficiency_is_the_theorys(case, rng):
    """A million tasks, where terms of order 1/J are nothing; 200,000 samples: errors of 0.4 %."""
    n, variance = case
    expected = theory(n, n, variance)
    for value, printed in zip(expected, EFFICIENCY[case][:2], strict=True):
        assert value == pytest.approx(printed, rel=0.005)  # three digits
    for first, second, value in zip(
        *simulate(n, n, variance, 1_000_000, 200_000, rng), expected, strict=True
    ):
        ratio, error = variance_ratio(first, second)
        assert abs(np.log(ratio / value)) < 4 * error
        assert error < 0.005


@pytest.mark.parametrize("case", EFFICIENCY, ids=str)
def test_relative_efficiency_of_two_thousand_tasks(case, rng):
    """Against the numbers simulated before, with their own errors, those of 3,000 samples."""
    n, variance = case
    for first, second, printed in zip(
        *simulate(n, n, variance, 2_000, 100_000, rng), EFFICIENCY[case][2:], strict=True
    ):
        ratio, error = variance_ratio(first, second)
        theirs = error * np.sqrt(len(first) / 3_000)
        assert abs(np.log(ratio / printed)) < 4 * np.hypot(error, theirs)
        assert theirs < 0.04


def test_relative_efficiency_with_unequal_parts(rng):
    """n/m in the formulas: two support rows, eight query rows, and the other way round."""
    for n, m in ((2, 8), (8, 2)):
        for first, second, value in zip(
            *simulate(n, m, 0.5, 1_000_000, 200_000, rng), theory(n, m, 0.5), strict=True
        ):
            ratio, error = variance_ratio(first, second)
            assert abs(np.log(ratio / value)) < 4 * error
    # the parts' sizes matter: the formulas for n and m exchanged would be noticed
    assert abs(np.log(theory(2, 8, 0.5)[1] / theory(8, 2, 0.5)[1])) > 0.5
