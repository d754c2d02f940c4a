"""Simulated φ, θ and data have the moments that the model says, under every family.

Rung (a): closed forms of normal, LKJ and family moments. Rung (d): tolerances in the draws' own
standard errors; 4.5 of them, which some hundred comparisons pass by chance in 99.9 %.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from assertions import refuses
from numpyro.distributions import constraints
from scipy import special, stats

import hierbayes as hb
from hierbayes.simulation import (
    draw,
    draw_correlations,
    draw_outcomes,
    draw_phi,
    draw_theta,
    simulate,
)

MANY = 4000
L = hb.likelihoods


def averages(values: Any, expected: Any, k: float = 4.5) -> None:
    """The mean over the first axis is ``expected`` within k of its standard errors."""
    values = np.asarray(values, dtype=float)
    error = values.std(0, ddof=1) / np.sqrt(len(values))
    away = np.abs(values.mean(0) - expected)
    worst = (away / np.where(error > 0, error, 1e-12)).max()
    assert worst <= k, f"off by {worst:.1f} standard errors"


def test_the_assertion_sees_a_wrong_mean(rng):
    """The control: half a standard deviation is 32 standard errors of 4,000 draws."""
    draws = rng.normal(size=(MANY, 3))
    averages(draws, 0.0)
    with pytest.raises(AssertionError, match="standard errors"):
        averages(draws, [0.0, 0.0, 0.5])
    with pytest.raises(AssertionError, match="standard errors"):
        averages(np.ones((10, 1)), 1.1)


# ------------------------------------------------------------------------- phi


def log_constant(size: int, concentration: float) -> float:
    """log ∫ |R|^(η − 1) dR, by vines: Lewandowski, Kurowicka and Joe (2009), equation 17."""
    left = size - np.arange(1, size)
    a = concentration + (left - 1) / 2
    return float((left * ((2 * a - 1) * np.log(2) + special.betaln(a, a))).sum())


@pytest.mark.parametrize(("size", "concentration"), [(2, 2.0), (3, 0.7), (5, 3.0)])
def test_correlations_follow_lkj(size, concentration, rng):
    """Each correlation is 2 Beta(a, a) − 1; E|R| is a ratio of constants; signs are free."""
    found = draw_correlations(size, concentration, (MANY,), rng)
    a = concentration + (size - 2) / 2
    for i, j in zip(*np.triu_indices(size, 1), strict=True):
        # at most 10 comparisons: by chance below 1e-4 in 0.1 % of seeds
        assert stats.kstest((found[:, i, j] + 1) / 2, stats.beta(a, a).cdf).pvalue > 1e-4
    ratio = np.exp(log_constant(size, concentration + 1) - log_constant(size, concentration))
    averages(np.linalg.det(found), ratio, k=4.5)
    if size > 2:
        averages(found[:, 0, 1] * found[:, 0, 2] * found[:, 1, 2] ** 2, 0.0)
    assert np.array_equal(np.diagonal(found, axis1=1, axis2=2), np.ones((MANY, size)))


def test_a_wrong_concentration_is_seen(rng):
    """The control."""
    found = draw_correlations(3, 1.0, (MANY,), rng)
    with pytest.raises(AssertionError, match="standard errors"):
        averages(np.linalg.det(found), np.exp(log_constant(3, 3.0) - log_constant(3, 2.0)))
    assert stats.kstest((found[:, 0, 1] + 1) / 2, stats.beta(2.5, 2.5).cdf).pvalue < 1e-6


def test_phi_has_the_moments_of_its_hyperprior(rng):
    """Hyperpriors of several kinds in one array, pinned means, blocks of correlations, Γ and β."""
    x = [np.column_stack([np.ones(4), rng.normal(size=(4, 2))]) for _ in range(6)]
    tasks = hb.Tasks.from_arrays(
        [(a, rng.normal(size=4)) for a in x], coef=["a", "b", "c"],
        shared=[rng.normal(size=(4, 1)) for _ in x], task_predictors=rng.normal(size=(6, 2)),
    )  # fmt: skip
    hyperprior = hb.HyperPrior(
        mu={"a": dist.Normal(1.0, 2.0), "c": dist.Laplace(-1.0, 0.5)}, tau=dist.HalfNormal(2.0),
        corr=1.5, beta=dist.Normal(3.0, 1.0), gamma=dist.Normal(0.0, 0.3),
        sigma=dist.Gamma(3.0, 2.0),
    )  # fmt: skip
    prior = hb.priors.Gaussian(correlated=[("a", "c")], zero_mean=["b"])
    model = hb.HierarchicalModel(L.Gaussian(), prior, hyperprior)
    phi = draw_phi(model, tasks, MANY, rng)
    assert {name: value.shape[1:] for name, value in phi.items()} == {
        "mu": (3,), "tau": (3,), "corr": (3, 3), "beta": (1,), "gamma": (3, 2), "sigma": (),
    }  # fmt: skip
    averages(phi["mu"][:, [0, 2]], [1.0, -1.0])
    averages((phi["mu"][:, [0, 2]] - [1.0, -1.0]) ** 2, [4.0, 0.5])
    assert (phi["mu"][:, 1] == 0).all()
    averages(phi["tau"], 2.0 * np.sqrt(2 / np.pi))
    assert stats.kstest((phi["corr"][:, 0, 2] + 1) / 2, stats.beta(1.5, 1.5).cdf).pvalue > 1e-4
    assert (phi["corr"][:, 0, 1] == 0).all()
    assert (phi["corr"][:, 1, 2] == 0).all()
    averages(phi["beta"], 3.0)
    averages(phi["gamma"] ** 2, 0.09)
    averages(np.stack([phi["sigma"], phi["sigma"] ** 2], 1), [1.5, 3.0])  # shape 3, rate 2
    assert all(value.dtype == np.float64 for value in phi.values())


@pytest.mark.parametrize("name", ["mu", "tau", "sigma"])
def test_an_improper_hyperprior_is_refused_by_name(name, small):
    support = constraints.real if name == "mu" else constraints.positive
    flat = dist.ImproperUniform(support, (), ())
    model = replace(small.model, hyperprior=hb.HyperPrior(**{name: flat}))
    with refuses(f"hyperprior on {name} is improper", f"HyperPrior({name}=…)"):
        simulate(model, small.tasks)
    with refuses(f"hyperprior on {name} is improper"):
        hb.check_calibration(model, small.tasks, 5)


def test_a_part_of_an_assembled_belief_may_be_what_is_improper(small, rng):
    flat = dist.ImproperUniform(constraints.real, (), ())
    model = replace(small.model, hyperprior=hb.HyperPrior(mu={"x": flat}))
    hyperprior = model.phi_distributions(small.tasks)["mu"]
    with refuses("hyperprior on mu is improper"):
        draw("mu", hyperprior, 3, rng)


# ----------------------------------------------------------------------- theta


def test_theta_has_the_moments_of_its_prior(rng):
    """θ_j ~ N(μ + Γ w_j, diag(τ) R diag(τ))."""
    w = rng.normal(size=(3, 1))
    tasks = hb.Tasks.from_arrays([(np.ones((2, 2)), np.zeros(2))] * 3, task_predictors=w)
    phi = {
        "mu": np.array([1.0, -2.0]), "tau": np.array([0.5, 2.0]), "gamma": np.array([[0.3], [1.0]]),
        "corr": np.array([[1.0, -0.6], [-0.6, 1.0]]), "sigma": np.array(1.0),
    }  # fmt: skip
    model = hb.HierarchicalModel(L.Gaussian(), hb.priors.Gaussian())
    theta = draw_theta(model, tasks, {n: np.tile(v, (MANY, *[1] * v.ndim))
                                      for n, v in phi.items()}, rng)  # fmt: skip
    mean = phi["mu"] + w * phi["gamma"][:, 0]
    averages(theta, mean)
    centred = theta - mean
    averages(np.einsum("sjk,sjl->sjkl", centred, centred), [[0.25, -0.6], [-0.6, 4.0]])
    averages(centred[:, 0, 0] * centred[:, 1, 0], 0.0)  # tasks are independent


# -------------------------------------------------------------------- outcomes

PHI = {"concentration": 3.0, "shape": 2.5, "sigma": 0.5, "df": 7.0}
FAMILIES: dict[str, Any] = {
    "gaussian": L.Gaussian(), "known_se": L.Gaussian(known_se=True), "bernoulli": L.Bernoulli(),
    "binomial": L.Binomial(), "poisson": L.Poisson(), "student": L.StudentT(),
    "student 4": L.StudentT(df=4.0), "negative binomial": L.NegativeBinomial(), "gamma": L.Gamma(),
}  # fmt: skip
TRIALS = np.array([1.0, 5.0, 2.0, 9.0, 3.0, 4.0, 7.0])


def mean_and_variance(family: str, f: np.ndarray, slots: dict[str, Any]) -> tuple[Any, Any]:
    """In closed form."""
    p, m = special.expit(f), np.exp(f)
    sigma2, df = PHI["sigma"] ** 2, 4.0 if family == "student 4" else PHI["df"]
    weight, se = slots.get("weight", 1.0), slots.get("known_se", 1.0)
    return {
        "gaussian": (f, sigma2 / weight),
        "known_se": (f, se**2 / weight),
        "bernoulli": (p, p * (1 - p)),
        "binomial": (TRIALS * p, TRIALS * p * (1 - p)),
        "poisson": (m, m),
        "negative binomial": (m, m + m**2 / PHI["concentration"]),
        "student": (f, sigma2 * df / (df - 2)),
        "student 4": (f, sigma2 * df / (df - 2)),
        "gamma": (m, m**2 / PHI["shape"]),
    }[family]


def tasks_for(family: str) -> hb.Tasks:
    """Seven rows in three tasks, one of them empty, with a shared column and an offset."""
    rng = np.random.default_rng(5)
    sizes = [3, 0, 4]
    tasks = hb.Tasks.from_arrays(
        [(np.column_stack([np.ones(n), rng.normal(size=n)]), np.arange(n) % 2.0) for n in sizes],
        shared=[rng.normal(size=(n, 1)) for n in sizes],
    )
    slots = {"offset": rng.normal(0.0, 0.3, 7)}
    if family in ("gaussian", "known_se"):
        slots["weight"] = rng.uniform(0.5, 4.0, 7)
    if family == "known_se":
        slots["known_se"] = rng.uniform(0.5, 2.0, 7)
    if family == "binomial":
        slots["trials"] = TRIALS
    outcome = tasks.outcome + (1.0 if family == "gamma" else 0.0)
    return replace(tasks, slots=slots, outcome=outcome)


@pytest.mark.parametrize("family", FAMILIES)
def test_outcomes_have_the_moments_of_their_family(family, rng):
    """At given θ and φ; fourth moments of a t of four degrees are not, so its scale is asked."""
    tasks, likelihood = tasks_for(family), FAMILIES[family]
    model = hb.HierarchicalModel(likelihood, hb.priors.Gaussian())
    theta = np.array([[0.4, -0.5], [9.0, 9.0], [-0.6, 0.3]])
    beta, own = np.array([0.7]), likelihood.parameters()
    phi = {"beta": np.tile(beta, (MANY, 1))} | {n: np.full(MANY, PHI[n]) for n in own}
    y = draw_outcomes(model, tasks, phi, np.tile(theta, (MANY, 1, 1)), rng)
    f = (tasks.predictors * theta[tasks.task_of_row]).sum(1) + tasks.shared @ beta
    mean, variance = mean_and_variance(family, f + tasks.slots["offset"], tasks.slots)
    averages(y, mean)
    if family == "student 4":
        averages(np.abs(y - mean) < 0.5 * stats.t(4).ppf(0.75), 0.5)
    else:
        averages((y - mean) ** 2, variance)


@pytest.mark.parametrize("family", FAMILIES)
def test_simulated_data_pass_the_models_own_check_and_share_the_rest(family):
    tasks = tasks_for(family)
    slots = {name: np.tile(v, 12) for name, v in tasks.slots.items()}
    many = replace(
        tasks, predictors=np.tile(tasks.predictors, (12, 1)), shared=np.tile(tasks.shared, (12, 1)),
        outcome=np.tile(tasks.outcome, 12), slots=slots, rows=np.arange(84),
        task_predictors=np.zeros((36, 0)),
        starts=np.concatenate([[0], np.cumsum(np.tile([3, 0, 4], 12))]),
        labels=replace(tasks.labels, names=np.arange(36)),
    )  # fmt: skip
    model = hb.HierarchicalModel(FAMILIES[family], hb.priors.Gaussian())
    phi, theta, simulated = simulate(model, many, seed=4)
    model.check(simulated, learns_prior=True)
    assert simulated.predictors is many.predictors
    assert simulated.slots is many.slots
    assert simulated.labels is many.labels
    assert theta.shape == (36, 2)
    assert set(phi) == set(model.phi_distributions(many))
    assert not np.array_equal(simulated.outcome, many.outcome)
    again = simulate(model, many, seed=4)
    assert np.array_equal(simulated.outcome, again.tasks.outcome)
    assert not np.array_equal(simulated.outcome, simulate(model, many, seed=5).tasks.outcome)


def test_a_program_is_simulated_row_by_row(rng):
    """Means of a log-normal decay, e^(m + s²/2), at given θ; ragged tasks."""

    def decay(theta: Any, phi: Any, task: Any) -> None:
        level = theta[0] - jnp.exp(theta[1]) * task.predictors[:, 0]
        numpyro.sample("y", dist.LogNormal(level, phi["noise"]), obs=task.outcome)

    sizes = (2, 5, 3)
    tasks = hb.Tasks.from_arrays(
        [(np.arange(1.0, n + 1)[:, None], np.ones(n) + np.arange(n)) for n in sizes]
    )
    model = hb.HierarchicalModel(
        L.from_numpyro(decay, theta=["level", "rate"]), hb.priors.Gaussian(correlated=False),
        hb.HyperPrior(extra={"noise": dist.HalfNormal(1.0)}),
    )  # fmt: skip
    tasks = model.tasks(tasks)
    theta = rng.normal(0.0, 0.3, (3, 2))
    y = draw_outcomes(
        model, tasks, {"noise": np.full(MANY, 0.4)}, np.tile(theta, (MANY, 1, 1)), rng
    )
    own = theta[tasks.task_of_row]
    level = own[:, 0] - np.exp(own[:, 1]) * tasks.predictors[:, 0]
    averages(y, np.exp(level + 0.08))
    averages((np.log(y) - level) ** 2, 0.16)
    model.check(simulate(model, tasks, seed=1).tasks, learns_prior=True)


# -------------------------------------------------------------------- refusals


def test_a_network_is_refused():
    line = L.Network.mlp([1, 4, 1])
    model = hb.HierarchicalModel(line, hb.priors.Gaussian(correlated=False))
    tasks = hb.Tasks.from_arrays([(np.ones((3, 1)), np.arange(3.0))] * 4)
    with refuses("Network", "nothing to draw its weights from"):
        simulate(model, tasks)


def test_weights_that_are_no_distribution_are_refused():
    tasks = tasks_for("poisson")
    model = hb.HierarchicalModel(L.Poisson(), hb.priors.Gaussian())
    weighted = replace(tasks, slots={**tasks.slots, "weight": np.full(7, 2.0)})
    with refuses("weights of a Poisson likelihood", "2.0"):
        simulate(model, weighted)
    assert simulate(model, replace(tasks, slots={"weight": np.ones(7)}), 1).theta.shape == (3, 2)


def test_rates_that_no_count_follows_are_refused(rng):
    tasks = tasks_for("poisson")
    wide = hb.HyperPrior(mu=dist.Normal(60.0, 0.1))
    model = hb.HierarchicalModel(L.Poisson(), hb.priors.Gaussian(), wide)
    with refuses("rates beyond 1e15"):
        simulate(model, tasks)
    phi = {"beta": np.zeros((1, 1))}
    y = draw_outcomes(model, tasks, phi, np.array([[[40.0, 0.0], [0.0, 0.0], [0.0, 0.0]]]), rng)
    assert np.isinf(y[0, :3]).all()
    assert np.isfinite(y[0, 3:]).all()


def test_open_priors_need_an_outcome_to_be_scaled_to(small):
    with refuses("default priors are scaled to the outcome"):
        simulate(small.model, replace(small.tasks, outcome=None))
    resolved = small.model.resolve(small.tasks)
    found = simulate(resolved, replace(small.tasks, outcome=None), seed=2)
    assert np.isfinite(found.tasks.outcome).all()
