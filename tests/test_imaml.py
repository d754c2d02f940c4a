r"""iMAML against closed forms: with λ fixed, Gaussian tasks make it least squares.

With Λ = diag(λ), S the support rows' design and H = SᵀS/σ² the MAP estimate under N(μ, Λ⁻¹) is

.. math:: \theta_j = A_j \mu + G_j (y_s - Z_s\beta), \qquad A_j = (H_j + \Lambda)^{-1}\Lambda,
          \quad G_j = (H_j + \Lambda)^{-1} S^\top/\sigma^2

linear in (μ, β): maximising the query rows' normal density over (μ, β, σ_query) is ordinary least
squares of y_q − X_q G_j y_s on [X_q A_j, Z_q − X_q G_j Z_s]. In normal means with n support rows
θ_j = (1 − w) μ + w ȳ_j with w = n / (n + λσ²), one to one in λ, so that learning λ too is the least
squares of the query means on the support means.

L-BFGS stops at a gradient of 1e-10 in scaled parameters: quadratic optima are right to 1e-8.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import close, finite_difference, gradient, refuses
from references import assert_said
from references import hessian as second_differences
from scipy import special, stats
from simulated import by_task, normal_means, regressions

import hierbayes as hb
from hierbayes.adaptation import Conjugate, LeastSquares, Proximal
from hierbayes.checks import leave_one_task_out
from hierbayes.evidence import Predictive
from hierbayes.numerics import float64

GAUSSIAN = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
BERNOULLI = hb.HierarchicalModel(hb.likelihoods.Bernoulli(), hb.priors.Gaussian(correlated=False))


def logistic_tasks(num_tasks=12, seed=5):
    """Ragged tasks of 1 to 9 rows, one shared column, one task predictor."""
    rng = np.random.default_rng(seed)
    arrays, shared = [], []
    w = rng.normal(size=(num_tasks, 1))
    for j, n in enumerate(rng.integers(1, 10, num_tasks)):
        x = np.column_stack([np.ones(n), rng.normal(size=n)])
        z = rng.normal(size=(n, 1))
        theta = np.array([0.4, -0.6]) + 0.5 * w[j] + rng.normal(size=2)
        arrays.append((x, (rng.random(n) < special.expit(x @ theta + 0.5 * z[:, 0])) * 1.0))
        shared.append(z)
    return hb.Tasks.from_arrays(arrays, shared=shared, task_predictors=w)


LOGISTIC = np.array([0.3, -0.5, 0.4, 0.2, -0.1, -0.3, 0.5])


def as_phi(v, exp):
    """μ (2), β (1), Γ (2, 1), log τ (2)."""
    return {"mu": v[:2], "beta": v[2:3], "gamma": v[3:5].reshape(2, 1), "tau": exp(v[5:7])}


def logistic_mode(x, y, offset, location, tau):
    """The MAP estimate of one logistic task, by Newton's method to rounding."""
    theta = location
    for _ in range(20):
        p = special.expit(x @ theta + offset)
        slope = x.T @ (y - p) - (theta - location) / tau**2
        if np.abs(slope).max() < 1e-13:
            return theta
        theta = theta + np.linalg.solve((x.T * (p * (1 - p))) @ x + np.diag(tau**-2), slope)
    raise AssertionError(f"Newton's method leaves a slope of {slope}")


def query_density(v, support, query):
    """Σ log p(query | θ*), written out."""
    phi, total = as_phi(v, np.exp), 0.0
    for j, ((x, z, y), (x_q, z_q, y_q)) in enumerate(
        zip(by_task(support), by_task(query), strict=True)
    ):
        location = phi["mu"] + phi["gamma"] @ support.task_predictors[j]
        theta = logistic_mode(x, y, z @ phi["beta"], location, phi["tau"])
        f = x_q @ theta + z_q @ phi["beta"]
        total += (y_q * f - np.logaddexp(0, f)).sum()
    return total


# ------------------------------------------------------------------- the MAP estimate


def test_gaussian_map_is_the_posterior_mean_and_reaches_both_limits(small):
    """λ → ∞ gives φ, λ → 0 least squares, of minimum norm around φ: off by about λ/H or H/λ."""
    phi = {"mu": np.array([0.5, -1.0]), "tau": np.array([0.7, 0.3]), "sigma": np.array(0.6)}
    found = Proximal()(small.model, small.tasks, phi)
    close(found.mean, Conjugate()(small.model, small.tasks, phi).mean, rtol=1e-9)
    assert found.covariance is None
    tight = Proximal()(small.model, small.tasks, phi | {"tau": np.full(2, 1e-6)}).mean
    close(tight, np.tile(phi["mu"], (9, 1)), rtol=1e-8)
    loose = Proximal()(small.model, small.tasks, phi | {"tau": np.full(2, 1e5)}).mean
    full_rank = [0, 2, 4, 5, 6, 7, 8]
    alone = LeastSquares()(small.model, small.tasks, {"sigma": phi["sigma"]})
    assert alone.identified[full_rank].all()
    close(loose[full_rank], alone.mean[full_rank], rtol=1e-6)


@pytest.mark.slow
def test_logistic_map_and_its_slope():
    """Against modes and density written out, by differences; and against unrolled Newton steps.

    Differences of a sum of 30 terms of order one are right to about 1e-10 of the slope. The climb
    ends within 1e-10 of the mode, one more step makes the value exact, and the slope is right to
    the former; the unrolled iteration has converged to rounding.
    """
    tasks = logistic_tasks()
    support, query = tasks.split(0.5, seed=1)
    evidence = Predictive(Proximal())

    def objective(v):
        return evidence(BERNOULLI, as_phi(v, jnp.exp), support, query).sum()

    s, q = (part.block(np.arange(12), int(part.sizes.max())) for part in (support, query))

    def unrolled(v):
        phi = as_phi(v, jnp.exp)
        location = phi["mu"] + s.task_predictors @ phi["gamma"].T

        def newton(theta, _):
            p = jax.nn.sigmoid(
                jnp.einsum("jnk,jk->jn", s.predictors, theta) + s.shared @ phi["beta"]
            )
            slope = jnp.einsum("jnk,jn->jk", s.predictors, s.mask * (s.outcome - p))
            slope = slope - (theta - location) / phi["tau"] ** 2
            weight = s.mask * p * (1 - p)
            bend = jnp.einsum("jnk,jn,jnl->jkl", s.predictors, weight, s.predictors)
            bend = bend + jnp.diag(1 / phi["tau"] ** 2)
            return theta + jnp.linalg.solve(bend, slope[..., None])[..., 0], None

        theta = jax.lax.scan(newton, location, None, length=12)[0]
        f = jnp.einsum("jnk,jk->jn", q.predictors, theta) + q.shared @ phi["beta"]
        return (q.mask * (q.outcome * f - jnp.logaddexp(0, f))).sum()

    with float64():
        at = jnp.asarray(LOGISTIC)
        value, slope = map(np.asarray, jax.jit(jax.value_and_grad(objective))(at))
        path_value, path_slope = map(np.asarray, jax.jit(jax.value_and_grad(unrolled))(at))
    close(value, query_density(LOGISTIC, support, query), rtol=1e-12)
    close(value, path_value, rtol=1e-13)
    close(slope, path_slope, rtol=1e-9)
    gradient(lambda v: query_density(v, support, query), LOGISTIC, slope, rtol=1e-8)
    assert (np.abs(slope) > 1e-3).all(), "every part of φ is tried"


@pytest.mark.slow
def test_gaussian_map_has_right_second_derivatives():
    """Nothing is held constant in the closed form; differences of values are right to 1e-6."""
    model, tasks = regressions(num_tasks=8)
    support, query = tasks.split(0.5, seed=1)
    evidence, plain = Predictive(Proximal()), model.without_encoder()

    def objective(v):
        phi = {"mu": v[:2], "tau": jnp.exp(v[2:4]), "beta": v[4:5], "sigma": jnp.exp(v[5])}
        return evidence(plain, phi | {"sigma_query": 0.8}, support, query).sum()

    at = np.array([0.8, -0.5, -0.2, -0.7, 0.4, -0.4])
    with float64():
        exact = np.asarray(jax.jit(jax.hessian(objective))(jnp.asarray(at)))
        numerical = second_differences(jax.jit(objective), at, 1e-2)
    close(exact, numerical, rtol=1e-5, atol=1e-6 * np.abs(numerical).max())


# ------------------------------------------------------------------------- λ as given


def linear_form(splits, precision, sigma):
    """The regression of this file's docstring over all splits: (columns, outcome)."""
    columns, outcomes = [], []
    for support, query in splits:
        for (x_s, z_s, y_s), (x_q, z_q, y_q) in zip(by_task(support), by_task(query), strict=True):
            inverse = np.linalg.inv(x_s.T @ x_s / sigma**2 + np.diag(precision))
            gain = x_q @ inverse @ x_s.T / sigma**2
            columns.append(np.hstack([x_q @ inverse @ np.diag(precision), z_q - gain @ z_s]))
            outcomes.append(y_q - gain @ y_s)
    return np.concatenate(columns), np.concatenate(outcomes)


def test_optimum_is_least_squares():
    """Ragged tasks, some without support rows or of rank one; two splits; a λ a coefficient."""
    model, tasks = regressions()
    found = hb.imaml(model, tasks, prior_precision=[2.0, 5.0], num_splits=2, sigma=0.5, seed=7)
    splits = [tasks.split(0.5, seed=7 + i) for i in range(2)]
    columns, outcome = linear_form(splits, [2.0, 5.0], 0.5)
    best = np.linalg.lstsq(columns, outcome, rcond=None)[0]
    rms = np.sqrt(np.mean((outcome - columns @ best) ** 2))
    close([*found.phi["mu"], *found.phi["beta"]], best, rtol=1e-6)
    close(found.phi["sigma_query"], rms, rtol=1e-7)
    expected = stats.norm.logpdf(outcome, columns @ best, rms).sum() / 2
    close(found.info["query_log_density"], expected, rtol=1e-10)
    assert set(found.phi) == {"mu", "beta", "tau", "sigma", "sigma_query"}
    close(found.phi["tau"], [1 / np.sqrt(2), 1 / np.sqrt(5)], rtol=1e-15)
    assert found.info["prior_precision"] == [2.0, 5.0]
    assert found.warnings == ()
    # θ is the MAP estimate from all rows, under the prior that the fit hands out
    exact = Conjugate()(found.model, tasks, dict(found.phi))
    close(found.theta.values, exact.mean, rtol=1e-9)
    close(found.adapt(tasks[[3, 7]]).theta.values, exact.mean[[3, 7]], rtol=1e-9)
    close(found.prior.mean, found.phi["mu"], rtol=1e-6)
    close(found.prior.covariance_matrix, np.diag([0.5, 0.2]), rtol=1e-6)
    new = found.predict(target="new")
    close(new.sd**2, 0.25 + tasks.predictors**2 @ [0.5, 0.2], rtol=1e-12)
    close(found.predict(target="population").sd, np.full(tasks.num_rows, 0.5), rtol=1e-12)
    close(found.predict().sd, np.full(tasks.num_rows, rms), rtol=1e-7)


# ------------------------------------------------------------------------ λ as learned


@pytest.mark.slow
def test_normal_means_are_the_regression_of_query_means_on_support_means():
    """w = S_vy / S_yy, λ = (n/σ²)(1 − w)/w, μ̂ = (v̄ − w ȳ)/(1 − w); found: w right to 7e-9."""
    tasks = normal_means(300, 8, 0.45, 1.2, seed=6)
    found = hb.imaml(GAUSSIAN, tasks, sigma=1.2, seed=2)
    support, query = tasks.split(0.5, seed=2)
    y, v = (part.outcome.reshape(300, 4).mean(1) for part in (support, query))
    w = np.cov(v, y)[0, 1] / np.var(y, ddof=1)
    assert 0.1 < w < 0.6
    close(found.phi["tau"] ** -2, [4 / 1.44 * (1 - w) / w], rtol=1e-6)
    close(found.phi["mu"], [(v.mean() - w * y.mean()) / (1 - w)], rtol=1e-7)
    residual = query.outcome.reshape(300, 4) - (v.mean() + w * (y - y.mean()))[:, None]
    close(found.phi["sigma_query"], np.sqrt((residual**2).mean()), rtol=1e-8)
    assert found.info["prior_precision"] == "learn"
    assert found.warnings == ()


@pytest.mark.slow
def test_the_population_optimum_is_the_true_prior():
    """λ* = 1/τ², φ* = μ, σ_query² = σ² + the posterior variance; within four standard errors.

    ŵ is a regression slope: Var ŵ = (v + σ²/m) / (J (τ² + σ²/n)), v the posterior variance, and
    λ = (n/σ²)(1 − w)/w has slope (n/σ²)/w².
    """
    num_tasks, n, tau, sigma, mu = 20_000, 5, 0.8, 1.1, 1.5
    tasks = normal_means(num_tasks, 2 * n, tau, sigma, mu, seed=9)
    found = hb.imaml(GAUSSIAN, tasks, sigma=sigma)
    noise = sigma**2 / n
    w = tau**2 / (tau**2 + noise)
    v = tau**2 * noise / (tau**2 + noise)
    w_error = np.sqrt((v + noise) / (num_tasks * (tau**2 + noise)))
    error = w_error / (noise * w**2)
    assert abs(found.phi["tau"][0] ** -2 - tau**-2) < 4 * error
    assert 4 * error < 0.1 * tau**-2
    mu_error = np.sqrt((v + noise) / num_tasks) / (1 - w)
    assert abs(found.phi["mu"][0] - mu) < 4 * mu_error
    variance = sigma**2 + v
    spread = np.sqrt(2 * (variance**2 + (n - 1) * v**2) / (num_tasks * n))
    assert abs(float(found.phi["sigma_query"]) ** 2 - variance) < 4 * spread


@pytest.mark.slow
def test_unequal_sizes_cost_nothing():
    r"""The risk at the learned λ is Bayes': Σ (τ² + σ²/n_j)(w_j − w_j*)² / Σ v_j below 1e-3.

    Support sizes 5, 10 and 20 in equal parts, τ = σ = 1, where the best five gradient steps have
    an excess of 3 % (of 4 % with ηλ_max ≤ 1). Around the optimum the excess is quadratic in log λ,
    with a coefficient Σ w_j(1 − w_j) v_j / Σ v_j below 1/4; from 6,000 tasks log λ has a standard
    error near 0.03.
    """
    tasks = normal_means(6_000, [10, 20, 40] * 2_000, 1.0, 1.0, seed=1)
    found = hb.imaml(GAUSSIAN, tasks, sigma=1.0, seed=4)
    n = np.array([5.0, 10.0, 20.0])
    w, best = n / (n + found.phi["tau"][0] ** -2), n / (n + 1)
    excess = ((1 + 1 / n) * (w - best) ** 2).sum() / (1 / (n + 1)).sum()
    assert excess < 1e-3
    # and no adaptation, w = 0, would cost far more
    assert ((1 + 1 / n) * best**2).sum() / (1 / (n + 1)).sum() > 1


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "tau", "words"), [(0, 0.1, "no width"), (19, 5.0, "no end")])
def test_a_learned_prior_without_width_or_end_is_said(seed, tau, words):
    """Where ŵ ≤ 0 the best λ is infinite, where ŵ ≥ 1 it is 0; both splits were looked for."""
    tasks = normal_means(40, 8, tau, 1.0, seed=seed)
    support, query = tasks.split(0.5, seed=seed)
    y, v = (part.outcome.reshape(40, 4).mean(1) for part in (support, query))
    w = np.cov(v, y)[0, 1] / np.var(y, ddof=1)
    assert w <= 0 if words == "no width" else w >= 1
    with pytest.warns(hb.FitWarning, match="the learned prior of 'x0'"):
        found = hb.imaml(GAUSSIAN, tasks, sigma=1.0, seed=seed)
    assert_said(found.warnings, words)


# --------------------------------------------------------------------- logistic tasks


@pytest.mark.slow
def test_logistic_tasks_end_at_a_maximum():
    """At the optimum the slope of the density written out vanishes, in every part of φ.

    L-BFGS stops where the slope a row is below 1e-10 in scaled parameters, or cannot be told from
    rounding; there are about 100 query rows. A tenth of a unit away the slope is of order one.
    """
    tasks = logistic_tasks(40, seed=8)
    found = hb.imaml(BERNOULLI, tasks, prior_precision=1.5, seed=3)
    assert set(found.phi) == {"mu", "tau", "beta", "gamma"}
    support, query = tasks.split(0.5, seed=3)
    phi = found.phi
    at = np.concatenate([phi["mu"], phi["beta"], phi["gamma"][:, 0], np.log(phi["tau"])])

    def density(free):
        return query_density(np.concatenate([free, at[5:]]), support, query)

    close(finite_difference(density, at[:5]), np.zeros(5), atol=1e-5)
    assert np.abs(finite_difference(density, at[:5] + 0.1)).max() > 0.1
    close(found.info["query_log_density"], density(at[:5]), rtol=1e-10)
    for j, (x, z, y) in enumerate(by_task(tasks)):
        location = phi["mu"] + phi["gamma"] @ tasks.task_predictors[j]
        mode = logistic_mode(x, y, z @ phi["beta"], location, phi["tau"])
        close(found.theta.values[j], mode, rtol=1e-8, atol=1e-9)
    assert found.predict(target="new").mean.shape == (tasks.num_rows,)


# -------------------------------------------------------------------- leave one task out


@pytest.mark.slow
def test_a_task_left_out_is_scored_by_the_evidence_under_the_prior_of_the_others():
    """log N(y_j; Xμ, σ²I + X diag(τ²) Xᵀ): σ there, not sigma_query, and rows not independent."""
    model, tasks = regressions()
    tasks = tasks.take(np.flatnonzero(tasks.sizes >= 6)[:4])
    place = np.arange(tasks.num_rows) - np.repeat(tasks.starts[:-1], tasks.sizes)
    tasks = tasks.keep_rows(place < 6)  # three tasks of six rows, whichever is left out
    found = hb.imaml(model, tasks, prior_precision=[2.0, 5.0], sigma=0.5, seed=1)
    scores = leave_one_task_out(found)["log_density"]
    for j, (x, z, y) in enumerate(by_task(tasks)):
        rest = tasks.take(np.delete(np.arange(4), j))
        phi = hb.imaml(model, rest, prior_precision=[2.0, 5.0], sigma=0.5, seed=1).phi
        covariance = 0.25 * np.eye(len(y)) + x @ np.diag([0.5, 0.2]) @ x.T
        mean = x @ phi["mu"] + z @ phi["beta"]
        close(scores[j], stats.multivariate_normal.logpdf(y, mean, covariance), rtol=1e-8)


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "precision", [0.0, -1.0, np.inf, np.nan, "auto", [1.0], [1.0, 2.0, 3.0], None, [[1.0, 2.0]]]
)
def test_a_precision_that_is_none_is_refused(precision):
    model, tasks = regressions(num_tasks=6)
    with refuses("prior_precision", "'Intercept', 'x'"):
        hb.imaml(model, tasks, prior_precision=precision)


def test_what_cannot_be_learned_is_refused():
    with refuses("iMAML", "no task has two rows"):
        hb.imaml(GAUSSIAN, normal_means(10, 1, 1.0, 0.8), sigma=0.8)
    with refuses("sigma", "Bernoulli"):
        hb.imaml(BERNOULLI, logistic_tasks(), sigma=1.0)
    with refuses("one task"):
        hb.imaml(GAUSSIAN, normal_means(1, 9, 1.0, 0.8))
    with refuses("optimiser"):
        hb.imaml(GAUSSIAN, normal_means(5, 4, 1.0, 0.8), optimiser="adam")
