"""LLAMA, ABML, NUTS over weights, implied posteriors: each against algebra that is exact for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import close
from scipy import stats

import hierbayes as hb
from hierbayes.adaptation import GradientSteps
from hierbayes.adaptation.linearised import LinearisedSteps
from hierbayes.adaptation.variational import Variational, divergence, expected
from hierbayes.evidence import Predictive
from hierbayes.fit.method import Derived
from hierbayes.meta.abml import log_hyperprior
from hierbayes.numerics import float64

PRIOR = hb.priors.Gaussian(correlated=False)


def line(dtype="float64"):
    """A network that is linear in its weights: everything about it is known."""
    start = {"slope": jnp.zeros(2), "level": jnp.zeros(())}
    likelihood = hb.likelihoods.Network(
        lambda p, x: x @ p["slope"] + p["level"], start, dtype=dtype
    )
    return hb.HierarchicalModel(likelihood, PRIOR)


def columns(x):
    """The design of :func:`line`: leaves come in the order of their names, level first."""
    return np.column_stack([np.ones(len(x)), x])


def tanh_network(hidden=4):
    likelihood = hb.likelihoods.Network.mlp([1, hidden, 1], activation=jnp.tanh, dtype="float64")
    return hb.HierarchicalModel(likelihood, PRIOR)


def some_tasks(sizes=(5, 5, 5), width=2, seed=0):
    rng = np.random.default_rng(seed)
    return hb.Tasks.from_arrays([(rng.normal(size=(n, width)), rng.normal(size=n)) for n in sizes])


PHI = {"mu": np.array([0.3, -0.2, 0.5]), "sigma": np.asarray(0.7)}


def fitted(model, adaptation, phi, tasks):
    return hb.Fit(Derived("by hand"), model, model.tasks(tasks), phi, adaptation)


# ------------------------------------------------------- the spread of linearised steps


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 5])
def test_the_implied_variance_is_exact_where_f_is_linear(num_steps):
    """var f = xᵀ Σ_K x with Σ_K = Σ_k η (I − ηH)^k, by its recursion in NumPy; ragged tasks."""
    model, tasks, eta = line(), some_tasks((5, 2, 4)), 0.02
    fit = fitted(model, LinearisedSteps(num_steps, eta), PHI, tasks)
    rng = np.random.default_rng(5)
    new = hb.Tasks.from_arrays([(rng.normal(size=(n, 2)), np.zeros(n)) for n in (5, 1, 4)])
    seen = fit.predict(new)
    for j, (low, high) in enumerate(zip(tasks.starts[:-1], tasks.starts[1:], strict=True)):
        x = columns(tasks.predictors[low:high])
        hessian = x.T @ x / PHI["sigma"] ** 2
        covariance = np.zeros((3, 3))
        for _ in range(num_steps):
            covariance = covariance + eta * (np.eye(3) - hessian @ covariance)
        rows = slice(new.starts[j], new.starts[j + 1])
        at = columns(new.predictors[rows])
        variance = np.einsum("ij,jk,ik->i", at, covariance, at)
        close(seen.sd[rows] ** 2, variance + PHI["sigma"] ** 2, rtol=1e-8)


@pytest.mark.slow
def test_the_implied_variance_is_that_of_the_equivalent_prior():
    model, tasks = line(), some_tasks()
    fit = fitted(model, LinearisedSteps(4, 0.01), PHI, tasks)
    implied = hb.equivalent_prior(model, tasks, PHI, num_steps=4, step_size=0.01)
    at = columns(tasks.predictors[:5])
    variance = np.einsum("ij,jk,ik->i", at, implied.posterior_covariance[0], at)
    close(fit.predict(tasks).sd[:5] ** 2, variance + PHI["sigma"] ** 2, rtol=1e-8)


def test_laplaces_variance_is_the_dense_posterior_under_the_flat_prior():
    model, tasks, eta = line(), some_tasks(), 0.05
    fit = fitted(model, LinearisedSteps(3, eta, spread="laplace"), PHI, tasks)
    seen = fit.predict(tasks)
    x = columns(tasks.predictors[:5])
    posterior = np.linalg.inv(x.T @ x / PHI["sigma"] ** 2 + np.eye(3) / (3 * eta))
    variance = np.einsum("ij,jk,ik->i", x, posterior, x)
    close(seen.sd[:5] ** 2, variance + PHI["sigma"] ** 2, rtol=1e-8)


def test_sigma_query_scales_noise_and_uncertainty_alike_and_is_at_its_maximum():
    model = tanh_network()
    tasks, query = some_tasks(width=1), some_tasks(width=1, seed=9)
    rng = np.random.default_rng(2)
    phi = {"mu": rng.normal(size=13), "sigma": np.asarray(0.7), "sigma_query": np.asarray(1.0)}
    fit = dataclasses.replace(
        fitted(model, GradientSteps(2, 0.02), phi, tasks), info={"num_steps": 2}
    )
    learned = hb.meta.implied_posterior(fit, tasks, query)
    best = float(learned.phi["sigma_query"])

    def total(scale):
        changed = dataclasses.replace(learned, phi={**learned.phi, "sigma_query": scale})
        return changed.adapt(tasks).predict(query).log_density().sum()

    assert total(np.asarray(best)) > max(total(np.asarray(best * f)) for f in (0.99, 1.01))
    ratio = learned.adapt(tasks).predict(query).sd / best
    assert (ratio > 1).all()
    close(learned.theta.values, fit.theta.values, rtol=1e-12)


def test_log_shrinkage_is_half_the_dense_log_determinant():
    model, tasks = line(), some_tasks()
    steps = LinearisedSteps(3, 0.05)
    task = jax.tree.map(lambda v: v[0], tasks.block(np.arange(3), 5))
    with float64():
        shrinkage = jax.jit(lambda theta: steps.log_shrinkage(model, PHI, theta, task, task))
        found = float(shrinkage(jnp.asarray(PHI["mu"])))
    x = columns(tasks.predictors[:5])
    dense = np.linalg.slogdet(np.eye(3) + 0.15 * x.T @ x / PHI["sigma"] ** 2)[1]
    close(found, 0.5 * dense, rtol=1e-10)


@pytest.mark.slow
def test_llamas_evidence_is_that_of_maml_less_the_weighted_determinant():
    model, tasks = line(), some_tasks()
    block = tasks.block(np.arange(3), 5)
    steps = LinearisedSteps(3, 0.05)
    with float64():
        value = {
            w: np.asarray(
                jax.jit(lambda phi, w=w: Predictive(steps, w).of_tasks(model, phi, block, block))(
                    PHI
                )
            )
            for w in (0.0, 1.0, 0.25)
        }
    assert (value[0.0] > value[1.0]).all()
    close(value[0.25], 0.75 * value[0.0] + 0.25 * value[1.0], rtol=1e-10)


# ------------------------------------------------------------------------------ ABML


def test_the_divergence_of_q_is_scipys_sum_over_weights():
    rng = np.random.default_rng(1)
    mean, log_sd = rng.normal(size=4), rng.normal(size=4)
    phi = {"mu": rng.normal(size=4), "tau": rng.uniform(0.5, 2, 4)}
    with float64():
        found = float(jax.jit(divergence)((mean, log_sd), phi))
    draws = mean + np.exp(log_sd) * np.random.default_rng(3).standard_normal((200_000, 4))
    q = stats.norm(mean, np.exp(log_sd)).logpdf(draws)
    p = stats.norm(phi["mu"], phi["tau"]).logpdf(draws)
    each = (q - p).sum(1)
    assert abs(found - each.mean()) < 4 * each.std() / np.sqrt(len(each))
    closed = np.log(phi["tau"]) - log_sd - 0.5
    closed = closed + (np.exp(2 * log_sd) + (mean - phi["mu"]) ** 2) / (2 * phi["tau"] ** 2)
    close(found, closed.sum(), rtol=1e-12)


def test_many_variational_steps_reach_the_exact_posterior_of_independent_weights():
    """Orthogonal columns make the posterior of a linear task diagonal, so that q can be it.

    Antithetic noise of unit variance makes the expectation of a quadratic exact, and with it the
    optimum: means and deviations to 1e-6 after 5,000 steps.
    """
    model = line()
    x = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    y = np.array([1.0, 0.2, -0.4, 0.9])
    task = hb.Tasks.from_arrays([(x, y)]).block(np.arange(1), 4)
    task = jax.tree.map(lambda v: v[0], task)
    phi = PHI | {"tau": np.array([0.5, 1.0, 2.0])}
    signs = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], float)
    noise = jnp.asarray(np.concatenate([signs, -signs]))
    with float64():

        def bound(q):
            return expected(model, phi, task, q, noise) - divergence(q, phi)

        start = (jnp.asarray(phi["mu"]), jnp.log(jnp.asarray(phi["tau"])))
        climb = hb.adaptation.Descent(5_000, 0.01).run
        mean, log_sd = jax.jit(lambda s: climb(jax.grad(bound), s))(start)
    design = columns(x)
    precision = design.T @ design / phi["sigma"] ** 2 + np.diag(phi["tau"] ** -2.0)
    pulled = design.T @ y / phi["sigma"] ** 2 + phi["mu"] / phi["tau"] ** 2
    close(mean, np.linalg.solve(precision, pulled), rtol=1e-6)
    close(np.exp(log_sd), np.diag(precision) ** -0.5, rtol=1e-6)


def test_a_task_without_rows_keeps_the_prior_and_its_draws_have_its_spread():
    model = line()
    phi = PHI | {"tau": np.array([0.5, 1.0, 2.0])}
    tasks = hb.Tasks.from_arrays([(np.zeros((0, 2)), np.zeros(0)), (np.ones((2, 2)), np.zeros(2))])
    adapted = Variational(3, 0.01)(model, model.tasks(tasks), phi)
    close(adapted.mean[0], phi["mu"])
    spread = adapted.sample[:, 0].std(0) / phi["tau"]
    # 100 draws: the se of a deviation is 7 %
    assert (np.abs(spread - 1) < 4 * 0.07).all()


def test_the_hyperprior_is_scipys():
    phi = {"mu": np.array([0.3, -1.0]), "tau": np.array([0.5, 2.0])}
    expected_value = stats.norm.logpdf(phi["mu"]).sum()
    expected_value += stats.gamma(2.0, scale=1 / 0.5).logpdf(phi["tau"] ** -2.0).sum()
    with float64():
        found = float(jax.jit(lambda phi: log_hyperprior(phi, (2.0, 0.5)))(phi))
    close(found, expected_value, rtol=1e-10)


# ------------------------------------------------------------------------------ NUTS


@pytest.mark.slow
def test_nuts_over_weights_finds_the_conjugate_posterior_of_a_linear_network():
    model, tasks = line(), some_tasks((6, 3))
    phi = PHI | {"tau": np.array([0.5, 1.0, 2.0])}
    fit = fitted(model, GradientSteps(1, 0.01), phi, tasks)
    sampled = hb.meta.nuts(fit, tasks, num_draws=1000, num_chains=4, seed=1, progress=False)
    assert sampled.theta_draws.shape == (4, 1000, 2, 3)
    for j, (low, high) in enumerate(zip(tasks.starts[:-1], tasks.starts[1:], strict=True)):
        x = columns(tasks.predictors[low:high])
        precision = x.T @ x / phi["sigma"] ** 2 + np.diag(phi["tau"] ** -2.0)
        pulled = x.T @ tasks.outcome[low:high] / phi["sigma"] ** 2 + phi["mu"] / phi["tau"] ** 2
        mean, sd = np.linalg.solve(precision, pulled), np.sqrt(np.diag(np.linalg.inv(precision)))
        draws = sampled.theta_draws[:, :, j].reshape(-1, 3)
        # at least 1,000 effective draws of 4,000
        assert (np.abs(draws.mean(0) - mean) < 4 * sd / np.sqrt(1000)).all()
        assert (np.abs(draws.std(0) / sd - 1) < 4 * 0.7 / np.sqrt(1000)).all()
    low, high = sampled.predict(tasks).interval(0.9)
    assert (low < high).all()


def test_nuts_says_what_it_needs():
    fit = fitted(line(), GradientSteps(1, 0.01), PHI, some_tasks())
    with pytest.raises(hb.InputError, match="pass tau="):
        hb.meta.nuts(fit, some_tasks())
    with pytest.raises(hb.InputError, match="tau must be positive"):
        hb.meta.nuts(fit, some_tasks(), tau=-1.0)


# ----------------------------------------------------------------------- equivalence


@pytest.mark.slow
def test_meta_sgd_implies_the_precision_of_its_inverse_step_sizes_less_the_curvature():
    """One step with B = diag(α): P = diag(1/α) − H exactly (methods.md 1.1)."""
    model, tasks = line(), some_tasks()
    alpha = np.array([0.01, 0.02, 0.03])
    phi = PHI | {"step_size": alpha}
    fit = fitted(model, GradientSteps(1), phi, tasks)
    fit = dataclasses.replace(fit, info={"num_steps": 1})
    implied = hb.equivalent_prior(model, tasks, fit)
    x = columns(tasks.predictors[:5])
    close(implied.precision[0], np.diag(1 / alpha) - x.T @ x / PHI["sigma"] ** 2, rtol=1e-9)
    close(implied.posterior_mean, fit.theta.values, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_without_matrices_a_network_has_the_same_equivalent_prior_as_with_them(loss):
    model, tasks = tanh_network(), some_tasks(width=1)
    phi = {"mu": np.random.default_rng(4).normal(size=13), "sigma": np.asarray(0.7)}
    settings = {"num_steps": 4, "step_size": 0.01, "loss": loss}
    dense = hb.equivalent_prior(model, tasks, phi, **settings)
    products = hb.equivalent_prior(model, tasks, phi, rank=5, **settings)
    close(products.posterior_mean, dense.posterior_mean, rtol=1e-9)
    vector = np.arange(13.0)
    close(products.precision_times(vector), dense.precision @ vector, rtol=1e-6, atol=1e-6)
    close(
        products.posterior_covariance_times(vector), dense.posterior_covariance @ vector,
        rtol=1e-7, atol=1e-9,
    )  # fmt: skip
    close(products.validity.missed, dense.validity.missed, rtol=1e-4, atol=1e-9)


def test_the_mean_loss_without_matrices_is_for_tasks_of_one_size():
    model = tanh_network()
    phi = {"mu": np.zeros(13), "sigma": np.asarray(0.7)}
    with pytest.raises(hb.InputError, match="tasks of one size, found 3 to 5 rows"):
        hb.equivalent_prior(model, some_tasks((5, 3), width=1), phi, 2, 0.01, loss="mean", rank=2)


@pytest.mark.slow
def test_steps_beyond_twice_the_way_are_judged_and_not_refused_where_f_is_not_linear():
    model, tasks = tanh_network(), some_tasks(width=1)
    phi = {"mu": np.random.default_rng(4).normal(size=13), "sigma": np.asarray(0.1)}
    with pytest.warns(hb.FitWarning, match="exceeds 2/λ_max"):
        judged = hb.equivalent_prior(model, tasks, phi, num_steps=1, step_size=0.02, rank=5)
    assert set(judged.status) == {"no prior"}
    linear = hb.HierarchicalModel(hb.likelihoods.Gaussian(), PRIOR)
    phi = {"mu": np.zeros(2), "sigma": np.asarray(0.7)}
    with pytest.raises(hb.InputError, match="must stay below 2/λ_max"):
        hb.equivalent_prior(linear, some_tasks(), phi, num_steps=1, step_size=2.0)


@pytest.mark.slow
def test_anil_is_exactly_a_map_estimate_on_its_features():
    """θ is the last layer alone, so that the task is linear and nothing is approximated."""
    likelihood = hb.likelihoods.LastLayer.mlp([1, 4], activation=jnp.tanh, dtype="float64")
    model = hb.HierarchicalModel(likelihood, PRIOR)
    episodes = hb.datasets.sinusoids(6)
    fit = hb.maml(model, episodes, 3, 0.05, num_meta_steps=20, batch_size=5)
    support, _ = episodes.draw(4, seed=1)
    implied = hb.equivalent_prior(model, support, fit)
    close(implied.posterior_mean, fit.adapt(support).theta.values, rtol=1e-9)
    assert not np.any(implied.validity.missed)
    assert set(implied.status) == {"proper"}


@pytest.mark.slow
def test_imamls_estimates_are_of_the_shared_prior_already():
    model = tanh_network()
    fit = hb.imaml(
        model, hb.datasets.sinusoids(5), prior_precision=4.0, num_steps=5, num_meta_steps=10,
        batch_size=4,
    )  # fmt: skip
    close(fit.phi["tau"], np.full(13, 0.5))
    close(fit.prior.variance, np.full(13, 0.25), rtol=1e-6)
    with pytest.raises(hb.InputError, match=r"fit\.prior"):
        hb.equivalent_prior(model, hb.datasets.sinusoids(5).draw(1)[0], fit)
