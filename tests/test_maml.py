r"""MAML against closed forms: in Gaussian tasks everything but the step size is least squares.

K steps of size η from μ on the support rows of task j, with S = X_s, give

.. math:: \theta_j = A_j \mu + G_j (y_s - Z_s \beta), \qquad
          A_j = (I - \eta S^\top S / \sigma^2)^K, \quad
          G_j = \frac{\eta}{\sigma^2} \sum_{k<K} (I - \eta S^\top S/\sigma^2)^k S^\top

linear in (μ, β). With K and η fixed, maximising the query rows' normal density over
(μ, β, σ_query) is therefore ordinary least squares of y_q − X_q G_j y_s on
[X_q A_j, Z_q − X_q G_j Z_s], and σ_query the root mean square of its residuals. In normal means
with n support rows A_j = 1 − w, G_j y_s = w ȳ_j, w = 1 − (1 − ηn/σ²)^K.

L-BFGS stops at a gradient of 1e-10 in scaled parameters; where the objective is quadratic its
optimum is then right to 1e-8, with the step size learned to about 1e-6.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from references import assert_said, gradient
from scipy import stats
from simulated import by_task, explicit_steps, normal_means, regressions

import hierbayes as hb
from hierbayes.adaptation import GradientSteps
from hierbayes.evidence import Predictive
from hierbayes.numerics import float64

GAUSSIAN = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())


def linear_form(splits, num_steps, eta, sigma):
    """The regression of the docstring over all splits: (columns, outcome)."""
    columns, outcomes = [], []
    for support, query in splits:
        for (x_s, z_s, y_s), (x_q, z_q, y_q) in zip(by_task(support), by_task(query), strict=True):
            contraction = np.eye(x_s.shape[1]) - eta * x_s.T @ x_s / sigma**2
            powers = [np.linalg.matrix_power(contraction, k) for k in range(num_steps + 1)]
            gain = x_q @ sum(powers[:num_steps]) @ x_s.T * (eta / sigma**2)
            columns.append(np.hstack([x_q @ powers[num_steps], z_q - gain @ z_s]))
            outcomes.append(y_q - gain @ y_s)
    return np.concatenate(columns), np.concatenate(outcomes)


# --------------------------------------------------------------------- fixed step size


@functools.cache
def learned(num_steps, num_splits):
    """Of the ragged regressions; several tests look at it."""
    return hb.maml(*regressions(), num_steps, num_splits=num_splits, sigma=0.5, seed=7).inside


def test_optimum_is_least_squares():
    num_steps, num_splits = 5, 3
    found = learned(num_steps, num_splits)
    eta, tasks = found.info["step_size"], found.tasks  # in the columns that steps are taken in
    splits = [tasks.split(0.5, seed=7 + i) for i in range(num_splits)]
    columns, outcome = linear_form(splits, num_steps, eta, 0.5)
    best = np.linalg.lstsq(columns, outcome, rcond=None)[0]
    rms = np.sqrt(np.mean((outcome - columns @ best) ** 2))
    assert [*found.phi["mu"], *found.phi["beta"]] == pytest.approx(best, rel=1e-6)
    assert float(found.phi["sigma_query"]) == pytest.approx(rms, rel=1e-7)
    expected = stats.norm.logpdf(outcome, columns @ best, rms).sum() / num_splits
    assert found.info["query_log_density"] == pytest.approx(expected, rel=1e-10)
    assert set(found.phi) == {"mu", "beta", "sigma", "sigma_query"}
    assert found.warnings == ()


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 5])
def test_normal_means_with_equal_sizes(num_steps):
    """μ̂ = (v̄ − w ȳ) / (1 − w), with v the query rows and y the support rows."""
    tasks = normal_means(60, 8, 1.0, 0.9)
    eta = 0.03
    found = hb.maml(GAUSSIAN, tasks, num_steps, eta, sigma=0.9, seed=3)
    support, query = tasks.split(0.5, seed=3)
    w = 1 - (1 - eta * 4 / 0.81) ** num_steps
    y_bar = support.outcome.reshape(60, 4).mean(1)
    mu = (query.outcome.mean() - w * y_bar.mean()) / (1 - w)
    residual = query.outcome.reshape(60, 4) - ((1 - w) * mu + w * y_bar)[:, None]
    assert found.phi["mu"] == pytest.approx([mu], rel=1e-7)
    assert float(found.phi["sigma_query"]) == pytest.approx(np.sqrt((residual**2).mean()), rel=1e-8)
    assert float(found.phi["sigma"]) == 0.9


@pytest.mark.slow
def test_a_step_beyond_the_largest_curvature_is_said_to_overshoot(rng):
    tasks = hb.Tasks.from_arrays([(np.ones((4, 1)), rng.normal(size=4)) for _ in range(12)])
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    # σ = 1 and four rows: λ = 4, so 0.3 lies between 1/λ = 0.25 and 2/λ = 0.5
    with pytest.warns(hb.FitWarning, match="longer than 1/λ_max"):
        hb.maml(model, tasks, num_steps=1, step_size=0.3, sigma=1.0)


def test_one_row_tasks_only_ask():
    """A task of one row stays at μ in the inner loop; its row is a query row."""
    tasks = normal_means(40, [1, 2, 3, 7] * 10, 1.0, 0.8, seed=2)
    found = hb.maml(GAUSSIAN, tasks, 3, 0.05, sigma=0.8, seed=1)
    support, query = tasks.split(0.5, seed=1)
    n, m = support.sizes, query.sizes
    assert n[tasks.sizes == 1].max() == 0
    assert m[tasks.sizes == 1].min() == 1
    w = 1 - (1 - 0.05 * n / 0.64) ** 3
    y_bar = np.array([y.mean() if len(y) else 0.0 for _, _, y in by_task(support)])
    v_bar = np.array([y.mean() for _, _, y in by_task(query)])
    # least squares of the query rows on 1 − w_j, task j counting m_j times
    mu = (m * (1 - w)) @ (v_bar - w * y_bar) / (m @ (1 - w) ** 2)
    assert found.phi["mu"] == pytest.approx([mu], rel=1e-7)


def test_tasks_of_one_row_alone_are_refused():
    tasks = normal_means(10, 1, 1.0, 0.8)
    with pytest.raises(hb.InputError, match="no task has two rows"):
        hb.maml(GAUSSIAN, tasks, sigma=0.8)


# ------------------------------------------------------------------- learned step size


def test_learned_step_size_is_the_regression_slope():
    """w = S_vy / S_yy, whatever K: η follows from w = 1 − (1 − ηn/σ²)^K.

    η stays below 1/λ_max of all 8 rows, so that w < 1 − 0.5^K; the slope is 0.3 here.
    """
    num_steps = 5
    tasks = normal_means(300, 8, 0.45, 1.2, seed=6)
    found = hb.maml(GAUSSIAN, tasks, num_steps, learn_step_size=True, sigma=1.2, seed=2)
    support, query = tasks.split(0.5, seed=2)
    y, v = (part.outcome.reshape(300, 4).mean(1) for part in (support, query))
    w = np.cov(v, y)[0, 1] / np.var(y, ddof=1)
    assert 0.1 < w < 0.45
    eta = float(found.phi["step_size"])
    assert 1 - (1 - eta * 4 / 1.44) ** num_steps == pytest.approx(w, rel=1e-5)
    assert eta == found.info["step_size"]
    assert found.phi["mu"] == pytest.approx([(v.mean() - w * y.mean()) / (1 - w)], rel=1e-6)
    residual = query.outcome.reshape(300, 4) - (v.mean() + w * (y - y.mean()))[:, None]
    assert float(found.phi["sigma_query"]) == pytest.approx(np.sqrt((residual**2).mean()), rel=1e-8)


@pytest.mark.slow
def test_learned_step_size_stays_where_the_steps_are_a_map_estimate():
    """Tasks far apart want w → 1, but with K = 1 the cap 1/λ_max allows w < 4/8 only."""
    tasks = normal_means(50, 8, 10.0, 0.5, seed=8)
    found = hb.maml(GAUSSIAN, tasks, 1, learn_step_size=True, sigma=0.5)
    assert 0.99 < float(found.phi["step_size"]) * 8 / 0.25 <= 1


@pytest.mark.slow
def test_population_optimum_is_the_bayes_posterior():
    r"""At the optimum w* = τ²/(τ² + σ²/n): K steps shrink as the exact posterior does.

    With v = τ²(σ²/n)/(τ² + σ²/n) the posterior variance: σ_query² = σ² + v, implied prior
    precision (n/σ²)(1 − w)/w = 1/τ², implied posterior variance w σ²/n = v. ŵ is a regression
    slope, so Var ŵ = (v + σ²/m) / (J (τ² + σ²/n)), and four of its standard errors are allowed.
    """
    num_tasks, n, tau, sigma, mu = 20_000, 5, 0.8, 1.1, 1.5
    tasks = normal_means(num_tasks, 2 * n, tau, sigma, mu, seed=9)
    found = hb.maml(GAUSSIAN, tasks, 5, learn_step_size=True, sigma=sigma)
    noise = sigma**2 / n
    w_best = tau**2 / (tau**2 + noise)
    v = tau**2 * noise / (tau**2 + noise)
    w = 1 - (1 - float(found.phi["step_size"]) * n / sigma**2) ** 5
    w_error = np.sqrt((v + noise) / (num_tasks * (tau**2 + noise)))
    assert abs(w - w_best) < 4 * w_error
    # μ̂ = (v̄ − w ȳ)/(1 − w): the residual v − w y has variance v + σ²/m
    mu_error = np.sqrt((v + noise) / num_tasks) / (1 - w_best)
    assert abs(found.phi["mu"][0] - mu) < 4 * mu_error
    # a mean of 100,000 squares, of which the n of a task share the error of θ_j
    variance = sigma**2 + v
    spread = 2 * (variance**2 + (n - 1) * v**2) / (num_tasks * n)
    assert abs(float(found.phi["sigma_query"]) ** 2 - variance) < 4 * np.sqrt(spread)
    precision, slope = (n / sigma**2) * (1 - w) / w, n / sigma**2 / w_best**2
    assert abs(precision - tau**-2) < 4 * slope * w_error
    assert abs(w * noise - v) < 4 * noise * w_error
    # and these bands are narrow enough to tell σ_query from σ, and w from no shrinkage
    assert 4 * np.sqrt(spread) < 0.2 * v
    assert 4 * w_error < 0.1 * (1 - w_best)


# --------------------------------------------------------------------------- gradients


def test_meta_gradient_is_the_objectives_slope():
    """Second order: through the inner steps, in μ, β, σ, σ_query and the step size.

    Fourth-order differences with steps of 1e-3, of 1e-4 in the step size, which is 0.05, are right
    to about 1e-9.
    """
    num_steps = 5
    model, tasks = regressions()
    support, query = tasks.split(0.5, seed=1)
    evidence = Predictive(GradientSteps(num_steps, None))
    plain = model.without_encoder()

    def objective(v):
        phi = {"mu": v[:2], "beta": v[2:3], "sigma": v[3], "sigma_query": v[4], "step_size": v[5]}
        return evidence(plain, phi, support, query).sum()

    at = np.array([0.8, -0.5, 0.4, 0.9, 0.7, 0.05])
    with float64():
        value, slope = jax.jit(jax.value_and_grad(objective))(jnp.asarray(at))
        value, slope = float(value), np.asarray(slope)
        numerical = gradient(jax.jit(objective), at, [1e-3] * 5 + [1e-4])
    assert slope == pytest.approx(numerical, rel=1e-7)
    # the value itself, by the regression of this file's docstring
    columns, outcome = linear_form([(support, query)], num_steps, 0.05, 0.9)
    expected = stats.norm.logpdf(outcome, columns @ at[:3], 0.7).sum()
    assert value == pytest.approx(expected, rel=1e-10)
    # first-order MAML drops A_j from the gradient in μ: the comparison would notice
    flat = np.concatenate([x for x, _, _ in by_task(query)])
    first_order = flat.T @ (outcome - columns @ at[:3]) / 0.7**2
    assert np.abs(first_order / numerical[:2] - 1).max() > 0.01


# ---------------------------------------------------------------------------- adaptation


def test_theta_is_explicit_gradient_steps_on_all_rows():
    num_steps = 5
    found = learned(num_steps, 3)
    eta, tasks = found.info["step_size"], found.tasks
    for j, (x, z, y) in enumerate(by_task(tasks)):
        residual = y - z @ found.phi["beta"]
        theta = explicit_steps(found.phi["mu"], x, residual, 0.5, eta, num_steps)
        assert found.theta.values[j] == pytest.approx(theta, rel=1e-10)
    adapted = found.adapt(tasks[[3, 7]])
    assert adapted.theta.values == pytest.approx(found.theta.values[[3, 7]], rel=1e-10)


def test_auto_is_one_over_the_largest_curvature():
    """λ_max over all tasks, from all of a task's rows, not from its support rows."""
    found = learned(5, 3)
    tasks = found.tasks
    largest = max(np.linalg.eigvalsh(x.T @ x)[-1] for x, _, _ in by_task(tasks)) / 0.5**2
    assert found.info["step_size"] == pytest.approx(1 / largest, rel=1e-12)


def test_noise_is_the_pooled_within_task_estimate():
    """Least squares of y on one X_j a task and the shared column, all at once."""
    model, tasks = regressions()
    blocks = np.zeros((tasks.num_rows, 2 * tasks.num_tasks + 1))
    for j in range(tasks.num_tasks):
        own = slice(tasks.starts[j], tasks.starts[j + 1])
        blocks[own, 2 * j : 2 * j + 2] = tasks.predictors[own]
    blocks[:, -1] = tasks.shared[:, 0]
    best, _, rank, _ = np.linalg.lstsq(blocks, tasks.outcome, rcond=1e-10)
    squares = ((tasks.outcome - blocks @ best) ** 2).sum()
    expected = np.sqrt(squares / (tasks.num_rows - rank))
    found = hb.maml(model, tasks, 1)
    assert float(found.phi["sigma"]) == pytest.approx(expected, rel=1e-10)


def test_a_step_too_long_is_refused_and_the_task_named():
    """On radon a step of 0.1 diverges in 19 of 85 counties, most in the one with most rows.

    σ is the pooled within-county estimate, 0.747; λ_max = λ_max(XᵀX)/σ² > 20 in 19 counties.
    """
    frame = hb.datasets.radon()
    model, tasks = hb.from_formula("log_radon ~ 1 + floor + (1 + floor | county)", frame)
    sigma = 0.746708233896621
    curvature = np.array([np.linalg.eigvalsh(x.T @ x)[-1] for x, _, _ in by_task(tasks)]) / sigma**2
    assert (0.1 * curvature > 2).sum() == 19
    worst = tasks.names[int(np.argmax(curvature))]
    with pytest.raises(hb.InputError, match=rf"diverge in 19 of 85 tasks, most in '{worst}'"):
        hb.maml(model, tasks, step_size=0.1)
    fitted = hb.maml(model, tasks, 1, sigma=sigma)
    # the bound counts again for tasks that come later: ten times the rows of the largest
    largest = frame[frame["county"] == worst]
    with pytest.raises(hb.InputError, match="diverge in 1 of 1 tasks"):
        fitted.adapt(pd.concat([largest] * 10))


def test_steps_between_one_and_two_over_the_curvature_are_said():
    tasks = normal_means(20, 4, 1.0, 1.0)
    found = hb.maml(GAUSSIAN, tasks, 1, step_size=0.3, sigma=1.0)  # 1/λ_max = 1/4
    assert_said(found.warnings, "longer than 1/λ_max", "0.25")
    assert not hb.maml(GAUSSIAN, tasks, 1, step_size=0.25, sigma=1.0).warnings
    with pytest.raises(hb.InputError, match="diverge"):
        hb.maml(GAUSSIAN, tasks, 1, step_size=0.501, sigma=1.0)


# -------------------------------------------------------------------- outer optimisation


@pytest.mark.slow
def test_adam_reaches_the_same_optimum():
    """With a rate that falls to zero; 1e-4 is what 2,000 steps reach, L-BFGS's 1e-8 beside it."""
    model, tasks = regressions()
    default = hb.maml(model, tasks, 3, sigma=0.5)
    adam = hb.maml(
        model, tasks, 3, sigma=0.5, num_meta_steps=2_000,
        optimiser=optax.adam(optax.cosine_decay_schedule(0.05, 2_000)),
    )  # fmt: skip
    for name in ("mu", "beta", "sigma_query"):
        assert adam.phi[name] == pytest.approx(default.phi[name], rel=1e-4)
    assert adam.info["query_log_density"] == pytest.approx(
        default.info["query_log_density"], rel=1e-8
    )
    assert adam.info["query_log_density"] <= default.info["query_log_density"] + 1e-9


def test_too_few_outer_steps_are_said():
    model, tasks = regressions()
    stopped = hb.maml(model, tasks, 5, num_splits=3, sigma=0.5, seed=7, num_meta_steps=2)
    assert_said(stopped.warnings, "has not converged", "num_meta_steps")


@pytest.mark.slow
def test_the_seed_decides_the_split_and_nothing_else_does():
    tasks = normal_means(30, 6, 1.0, 0.7)
    first, again, other = (hb.maml(GAUSSIAN, tasks, 2, seed=seed) for seed in (5, 5, 6))
    assert first.phi["mu"].tolist() == again.phi["mu"].tolist()
    assert first.theta.values.tolist() == again.theta.values.tolist()
    assert first.phi["mu"].tolist() != other.phi["mu"].tolist()


def test_steps_that_forget_phi_are_said_to(rng):
    # equal tasks: 1/λ_max is λ_max's own step, so half the rows shrink the distance to least
    # squares by 1 − 1/2 a step, and five steps leave 1/32 of phi in theta
    tasks = hb.Tasks.from_arrays([(np.ones((6, 1)), rng.normal(size=6)) for _ in range(12)])
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    with pytest.warns(hb.FitWarning, match=r"3\.1% of phi is left"):
        hb.maml(model, tasks, num_steps=5)


@pytest.mark.slow
def test_adam_inside_leaves_tasks_without_support_rows_where_they_start():
    """Adam has no derivative at a slope of zero, which is that of a task without rows.

    A one-row task is query-only: φ is learned with it, and it does not turn φ to NaN.
    """
    model, tasks = hb.from_formula("y ~ 1 + x + (1 + x | g)", _with_a_lonely_row())
    fit = hb.maml(
        model, tasks, num_steps=2, inner_optimiser=optax.adam(0.1),
        num_meta_steps=20, optimiser=optax.sgd(1e-3), progress=False,
    )  # fmt: skip
    assert all(np.isfinite(value).all() for value in fit.phi.values())
    empty = hb.Tasks.from_arrays([(np.zeros((0, 2)), np.zeros(0))], coef=tasks.coef)
    np.testing.assert_allclose(fit.adapt(empty).theta.values[0], fit.phi["mu"], rtol=1e-12)


def _with_a_lonely_row():
    rng = np.random.default_rng(8)
    group = np.repeat(list("abcde"), [6, 5, 7, 6, 1])
    x = rng.normal(size=len(group))
    return pd.DataFrame({"g": group, "x": x, "y": 1.0 + x + rng.normal(size=len(group))})
