r"""Reptile against its fixed point, which is linear in φ where the tasks are Gaussian.

K steps of size η on ½‖y_j − Z_jβ − X_jθ‖²/σ² from m_j = μ + Γ w_j move θ by

.. math:: \Delta_j = S_j X_j^\top (y_j - Z_j\beta - X_j m_j)/\sigma^2, \qquad
          S_j = \eta \sum_{k<K} (I - \eta H_j)^k, \quad S_j H_j = W_j = I - (I - \eta H_j)^K

so that without β and Γ the fixed point solves Σ_j W_j (θ̂_j − μ) = 0 with θ̂_j any least squares of
task j (W_j vanishes where they differ). With them the conditions are Σ_j Δ_j (1, w_j) = 0 and
Σ_j Z_jᵀ(y_j − Z_jβ − X_j(m_j + Δ_j)) = 0, solved here as one linear system.
"""

import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from assertions import close, refuses
from references import assert_said
from scipy import special, stats
from simulated import by_task, explicit_steps, normal_means, regressions

import hierbayes as hb
from hierbayes.checks import leave_one_task_out
from hierbayes.meta.fixed_point import follow
from hierbayes.numerics import float64

GAUSSIAN = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())


def steps_and_weights(x, eta, num_steps, sigma):
    """(S_j, W_j) of one task."""
    contraction = np.eye(x.shape[1]) - eta * x.T @ x / sigma**2
    powers = [np.linalg.matrix_power(contraction, k) for k in range(num_steps + 1)]
    return eta * sum(powers[:-1]), np.eye(x.shape[1]) - powers[-1]


def fixed_point(tasks, eta, num_steps, sigma):
    """(μ, Γ, β) by the linear system of the docstring, assembled column by column."""
    d, q, p = 2, tasks.task_predictors.shape[1], tasks.shared.shape[1]

    def conditions(v):
        mu, gamma, beta = v[:d], v[d : d + d * q].reshape(d, q), v[d + d * q :]
        moves, shared = np.zeros((d, 1 + q)), np.zeros(p)
        for j, (x, z, y) in enumerate(by_task(tasks)):
            w = np.concatenate([[1.0], tasks.task_predictors[j]])
            start = mu + gamma @ w[1:]
            theta = explicit_steps(start, x, y - z @ beta, sigma, eta, num_steps)
            moves += np.outer(theta - start, w)
            shared += z.T @ (y - z @ beta - x @ theta)
        return np.concatenate([moves.ravel(), shared])

    at_zero = conditions(np.zeros(d + d * q + p))
    columns = [conditions(e) - at_zero for e in np.eye(d + d * q + p)]
    found = np.linalg.solve(np.array(columns).T, -at_zero)
    return found[:d], found[d : d + d * q].reshape(d, q), found[d + d * q :]


# ------------------------------------------------------------------------ closed forms


def test_the_fixed_point_is_a_weighted_mean_of_least_squares(small):
    """Ragged tasks, one without rows, one of one row: minimum-norm least squares; T11."""
    num_steps = 5
    found = hb.reptile(small.model, small.tasks, num_steps, sigma=0.6, tolerance=1e-14).inside
    eta, tasks = found.info["step_size"], found.tasks  # in the columns that steps are taken in
    weights, targets = np.zeros((2, 2)), np.zeros(2)
    for x, _, y in by_task(tasks):
        w = steps_and_weights(x, eta, num_steps, 0.6)[1]
        weights, targets = weights + w, targets + w @ np.linalg.pinv(x) @ y
    close(found.phi["mu"], np.linalg.solve(weights, targets), rtol=1e-10)
    assert set(found.phi) == {"mu", "sigma", "sigma_query"}
    # the weights matter: the plain mean of the estimates lies elsewhere
    plain = np.mean([np.linalg.pinv(x) @ y for x, _, y in by_task(tasks) if len(y)], axis=0)
    assert np.abs(found.phi["mu"] - plain).max() > 0.05


def tasks_with_predictors():
    """Rank-deficient tasks too, with a shared column and a predictor of each task."""
    rng = np.random.default_rng(2)
    frame = regressions()[1].to_dataframe()
    frame = frame.drop(columns="Intercept").assign(level=lambda d: rng.normal(2.0, 1.0, 30)[d["g"]])
    return hb.Tasks.from_dataframe(
        frame, task="g", outcome="y", predictors=["x"], shared=["z"], task_predictors=["level"]
    )


def test_shared_effects_and_task_predictors_are_part_of_it():
    """The system's condition number is below 1e4."""
    tasks = tasks_with_predictors()
    found = hb.reptile(GAUSSIAN, tasks, 3, sigma=0.5, tolerance=1e-13).inside
    mu, gamma, beta = fixed_point(found.tasks, found.info["step_size"], 3, 0.5)
    close(found.phi["mu"], mu, rtol=1e-9)
    close(found.phi["gamma"], gamma, rtol=1e-9)
    close(found.phi["beta"], beta, rtol=1e-9)
    assert found.warnings == ()


@pytest.mark.slow
def test_steps_of_length_one_have_the_same_fixed_point_and_need_many_more():
    tasks = tasks_with_predictors()
    found = hb.reptile(GAUSSIAN, tasks, 3, sigma=0.5, tolerance=1e-13).inside
    slow = hb.reptile(
        GAUSSIAN, tasks, 3, sigma=0.5, optimiser=optax.sgd(1.0), num_meta_steps=20_000
    ).inside
    assert slow.warnings == ()
    assert slow.info["outer_steps"] > 5 * found.info["outer_steps"]
    for name in ("mu", "gamma", "beta"):
        close(slow.phi[name], found.phi[name], rtol=1e-6)


@pytest.mark.slow
def test_a_mean_that_is_pinned_stays():
    """``(x | g)`` without a fixed x: μ_x = 0, and Σ_j Δ_j = 0 in the intercept alone."""
    _, tasks = regressions()
    frame = tasks.to_dataframe().drop(columns="Intercept")
    model, tasks = hb.from_formula("y ~ 1 + z + (1 + x | g)", frame)
    found = hb.reptile(model, tasks, 2, sigma=0.5, tolerance=1e-13).inside
    tasks = found.tasks
    assert found.phi["mu"][1] == 0
    moves, shared = np.zeros(2), 0.0
    for x, z, y in by_task(tasks):
        residual = y - z @ found.phi["beta"]
        theta = explicit_steps(found.phi["mu"], x, residual, 0.5, found.info["step_size"], 2)
        moves += theta - found.phi["mu"]
        shared += z.T @ (residual - x @ theta)
    close(moves[0], 0.0, atol=1e-9)
    close(shared, [0.0], atol=1e-9)
    assert abs(moves[1]) > 0.1


def test_known_standard_errors_set_the_weights(schools):
    """W_j = 1 − (1 − η/s_j²)^K with η the smallest s²; one row a task, so no ``sigma_query``."""
    with pytest.warns(hb.FitWarning, match="no task has two rows"):
        found = hb.reptile(schools.model, schools.tasks, 4)
    variance = schools.tasks.slots["known_se"] ** 2
    weight = 1 - (1 - variance.min() / variance) ** 4
    close(found.phi["mu"], [weight @ schools.tasks.outcome / weight.sum()], rtol=1e-10)
    assert set(found.phi) == {"mu"}
    assert_said(found.warnings, "sigma_query", "too narrow")


@pytest.mark.slow
def test_one_outer_step_of_one_inner_step_is_gradient_ascent():
    """K = 1: Δ_μ = η/J Σ_j ∇ log p(D_j | μ), joint training's gradient."""
    model, tasks = regressions()
    settings = dict(sigma=0.5, optimiser=optax.sgd(1.0), num_meta_steps=1)
    with pytest.warns(hb.FitWarning, match="has not converged after 1 outer step"):
        found = hb.reptile(model, tasks, 1, **settings).inside
    model, tasks = found.model, found.tasks
    start = model.scales(tasks).mu_location  # β starts at zero
    slope = tasks.predictors.T @ (tasks.outcome - tasks.predictors @ start) / 0.25
    expected = start + found.info["step_size"] * slope / tasks.num_tasks
    close(found.phi["mu"], expected, rtol=1e-12)
    residual = tasks.outcome.copy()
    for j, (x, _, y) in enumerate(by_task(tasks)):
        theta = explicit_steps(start, x, y, 0.5, found.info["step_size"], 1)
        residual[tasks.starts[j] : tasks.starts[j + 1]] -= x @ theta
    z = tasks.shared[:, 0]
    close(found.phi["beta"], [z @ residual / (z @ z)], rtol=1e-12)


# ------------------------------------------------------------------------- predictions


def test_sigma_query_is_the_deviation_of_query_rows():
    """Given φ the best σ_query is the root mean square of y_q − x_qᵀθ^K(support) − z_qᵀβ."""
    model, tasks = regressions()
    found = hb.reptile(model, tasks, 5, sigma=0.5, seed=3, query=0.4).inside
    tasks = found.tasks
    support, query = tasks.split(0.4, seed=3)
    errors = []
    for (x, z, y), (x_q, z_q, y_q) in zip(by_task(support), by_task(query), strict=True):
        residual = y - z @ found.phi["beta"]
        theta = explicit_steps(found.phi["mu"], x, residual, 0.5, found.info["step_size"], 5)
        errors.append(y_q - x_q @ theta - z_q @ found.phi["beta"])
    errors = np.concatenate(errors)
    rms = np.sqrt(np.mean(errors**2))
    close(found.phi["sigma_query"], rms, rtol=1e-7)
    close(found.info["query_log_density"], stats.norm.logpdf(errors, 0, rms).sum(), rtol=1e-9)
    for j, (x, z, y) in enumerate(by_task(tasks)):
        residual = y - z @ found.phi["beta"]
        theta = explicit_steps(found.phi["mu"], x, residual, 0.5, found.info["step_size"], 5)
        close(found.theta.values[j], theta, rtol=1e-10)
    close(found.predict().sd, np.full(tasks.num_rows, rms), rtol=1e-7)
    with pytest.raises(AttributeError, match=r"learns no prior .* ask .* hb\.equivalent_prior"):
        _ = found.prior


def test_logistic_tasks_go_nowhere_on_average():
    """At the fixed point K explicit steps average to zero and β has no slope; to 1e-9."""
    rng = np.random.default_rng(4)
    task = np.repeat(np.arange(15), rng.integers(1, 9, 15))
    x, z = rng.normal(size=(2, task.size))
    f = 0.5 + rng.normal(size=15)[task] + x + 0.6 * z
    y = (rng.random(task.size) < special.expit(f)).astype(float)
    frame = pd.DataFrame({"g": task, "x": x, "z": z, "y": y})
    tasks = hb.Tasks.from_dataframe(frame, task="g", outcome="y", predictors=["x"], shared=["z"])
    model = hb.HierarchicalModel(hb.likelihoods.Bernoulli(), hb.priors.Gaussian())
    found = hb.reptile(model, tasks, 4).inside
    tasks = found.tasks
    assert found.warnings == ()
    assert set(found.phi) == {"mu", "beta"}
    moves, slope = np.zeros(2), 0.0
    for x_j, z_j, y_j in by_task(tasks):
        theta = found.phi["mu"]
        for _ in range(4):
            p = special.expit(x_j @ theta + z_j @ found.phi["beta"])
            theta = theta + found.info["step_size"] * x_j.T @ (y_j - p)
        moves += theta - found.phi["mu"]
        slope += z_j.T @ (y_j - special.expit(x_j @ theta + z_j @ found.phi["beta"]))
    close(moves / 15, [0, 0], atol=1e-9)
    close(slope, [0.0], atol=1e-8)
    assert np.abs(found.theta.values - found.phi["mu"]).max() > 0.1


@pytest.mark.slow
def test_a_task_left_out_is_scored_at_phi_of_the_others():
    model, tasks = regressions()
    tasks = tasks.take(np.flatnonzero(tasks.sizes >= 6)[:4])
    place = np.arange(tasks.num_rows) - np.repeat(tasks.starts[:-1], tasks.sizes)
    tasks = tasks.keep_rows(place < 6)  # three tasks of six rows, whichever is left out
    found = hb.reptile(model, tasks, 2, 0.002, sigma=0.5, seed=1)
    scores = leave_one_task_out(found)["log_density"]
    for j, (x, z, y) in enumerate(by_task(tasks)):
        rest = tasks.take(np.delete(np.arange(4), j))
        phi = hb.reptile(model, rest, 2, 0.002, sigma=0.5, seed=1).phi
        rows = stats.norm.logpdf(y, x @ phi["mu"] + z @ phi["beta"], phi["sigma_query"])
        close(scores[j], rows.sum(), rtol=1e-8)
    comparison = hb.compare({"steps": found})
    assert_said(comparison.notes, "steps", "before any step", "Reptile learns no distribution")


# ---------------------------------------------------------------------- the iteration


def rotation(rate, angle):
    """Δ(v) = M(v* − v) with eigenvalues rate · exp(± i angle), and v* = (1, −2)."""
    m = rate * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return lambda v: jnp.asarray(m) @ (jnp.array([1.0, -2.0]) - v)


def run(direction, optimiser=None, num_steps=50, start=(0.0, 0.0)):
    with float64():
        found = follow(direction, np.array(start), optimiser, num_steps, 1e-12, False, "it")
        return found.x, found


@pytest.mark.parametrize(("rate", "angle"), [(1e-4, 0.0), (0.5, 1.5), (1.9, 0.1), (40.0, 2.0)])
def test_linear_directions_end_after_a_step_for_each_parameter(rate, angle):
    """Two parameters: three directions determine the fixed point, the rest is rounding.

    Full steps alone would creep (1e-4), or diverge (40, or an angle beyond 90°).
    """
    v, found = run(rotation(rate, angle))
    close(v, [1.0, -2.0], rtol=1e-11 / min(rate, 1))
    assert found.taken <= 6
    assert found.warnings == []


def test_an_iteration_that_has_not_ended_or_diverges_is_said():
    v, found = run(rotation(1e-4, 0.0), optax.sgd(1.0))
    assert_said(found.warnings, "not converged after 50 outer steps", "num_meta_steps")
    close(v, np.array([1.0, -2.0]) * (1 - (1 - 1e-4) ** 50), rtol=1e-9)
    _, found = run(rotation(40.0, 0.0), optax.sgd(1.0))
    assert_said(found.warnings, "diverged")
    _, found = run(lambda v: v * jnp.nan)
    assert_said(found.warnings, "diverged")
    # no fixed point at all: the direction is never shorter than one
    _, found = run(lambda v: 1 + v**2)
    assert_said(found.warnings, "not converged after 50 outer steps")


def test_what_reptile_refuses():
    tasks = normal_means(10, 4, 1.0, 0.8)
    with refuses("diverge in 10 of 10 tasks"):
        hb.reptile(GAUSSIAN, tasks, step_size=1.0, sigma=0.8)
    with refuses("step_size", "auto"):
        hb.reptile(GAUSSIAN, tasks, step_size="automatic")
    with refuses("num_steps"):
        hb.reptile(GAUSSIAN, tasks, 0)
    with refuses("tolerance"):
        hb.reptile(GAUSSIAN, tasks, tolerance=0.0)
    with refuses("optimiser"):
        hb.reptile(GAUSSIAN, tasks, optimiser=0.1)
    with refuses("one task"):
        hb.reptile(GAUSSIAN, normal_means(1, 9, 1.0, 0.8))
    # between 1/λ_max = 0.16 and 2/λ_max it answers, and says so
    with pytest.warns(hb.FitWarning, match="longer than 1/λ_max"):
        hb.reptile(GAUSSIAN, tasks, 1, 0.2, sigma=0.8)
