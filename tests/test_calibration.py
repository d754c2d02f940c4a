"""Simulation-based calibration of full Bayes, and samplers that it must catch.

Talts et al. (2018), arXiv 1804.06788: with φ from its prior, θ from p(θ | φ) and data from both,
the rank of each truth among its posterior draws is uniform. Modrák et al. (2023): quantities that
look at the data too, here Σ log p(D_j | θ_j, σ), since parameters alone do not tell the posterior
from the prior.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

import hierbayes as hb
from hierbayes.meta import collapsed_sampling
from hierbayes.meta.scales_of_phi import Coordinates

NUM_SIMULATIONS = 200
NUM_RANKED = 99
SIZES = (1, 2, 3, 3, 4, 5, 6, 8)

HYPERPRIOR = hb.HyperPrior(
    mu=dist.Normal(0.0, 1.0), tau=dist.HalfNormal(1.0), corr=2.0, sigma=dist.HalfNormal(1.0)
)
MODEL = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian(), HYPERPRIOR)
DESIGN = [
    np.column_stack([np.ones(n), np.random.default_rng([7, n, j]).normal(size=n)])
    for j, n in enumerate(SIZES)
]


def simulated(seed: int):
    """(φ and θ, tasks) from the prior, by NumPy alone."""
    rng = np.random.default_rng([11, seed])
    mu, tau = rng.normal(size=2), np.abs(rng.normal(size=2))
    corr = 2.0 * rng.beta(2.0, 2.0) - 1.0  # LKJ(2) of two: density proportional to 1 − ρ²
    sigma = abs(rng.normal())
    root = np.array([[tau[0], 0.0], [tau[1] * corr, tau[1] * np.sqrt(1 - corr**2)]])
    theta = mu + rng.normal(size=(len(SIZES), 2)) @ root.T
    outcomes = [x @ t + sigma * rng.normal(size=len(x)) for x, t in zip(DESIGN, theta, strict=True)]
    tasks = hb.Tasks.from_arrays(list(zip(DESIGN, outcomes, strict=True)))
    return dict(mu=mu, tau=tau, corr=corr, sigma=sigma, theta=theta), tasks


NAMES = ("mu0", "mu1", "tau0", "tau1", "corr", "sigma", "first0", "first1", "last0", "last1",
         "first0 tau0", "log likelihood")  # fmt: skip


def quantities(mu, tau, corr, sigma, theta, tasks):
    """What is ranked, (quantity, draw); draws lead in every argument."""
    means = [t @ x.T for x, t in zip(DESIGN, np.moveaxis(theta, 1, 0), strict=True)]
    rows = stats.norm(np.concatenate(means, axis=1), sigma[:, None]).logpdf(tasks.outcome)
    return np.stack([
        mu[:, 0], mu[:, 1], tau[:, 0], tau[:, 1], corr, sigma, theta[:, 0, 0], theta[:, 0, 1],
        theta[:, -1, 0], theta[:, -1, 1], theta[:, 0, 0] * tau[:, 0], rows.sum(1),
    ])  # fmt: skip


def full_bayes(tasks, seed):
    """99 draws, every tenth of 330 in three chains: next to independent."""
    fit = hb.full_bayes(MODEL, tasks, num_draws=330, num_chains=3, seed=seed, progress=False)
    kept = {n: v[:, ::10].reshape(NUM_RANKED, *v.shape[2:]) for n, v in fit.phi_draws.items()}
    theta = fit.theta_draws[:, ::10].reshape(NUM_RANKED, *fit.theta_draws.shape[2:])
    return kept | {"corr": kept["corr"][:, 1, 0], "theta": theta}


def ranks(sampler):
    """(quantity, simulation): how many of the 99 draws lie below the truth."""
    found = []
    for seed in range(NUM_SIMULATIONS):
        truth, tasks = simulated(seed)
        alone = {name: np.asarray(value)[None] for name, value in truth.items()}
        draws = quantities(**sampler(tasks, seed), tasks=tasks)
        found.append((draws < quantities(**alone, tasks=tasks)).sum(1))
    return np.array(found).T


def p_values(found):
    """Of uniform ranks, by 20 bins and by Kolmogorov's distance, the smaller one doubled."""
    jittered = (found + np.random.default_rng(0).random(found.shape)) / (NUM_RANKED + 1)
    values = []
    for row in jittered:
        bins = stats.chisquare(np.histogram(row, 20, (0, 1))[0]).pvalue
        values.append(min(1.0, 2 * min(bins, stats.kstest(row, "uniform").pvalue)))
    return dict(zip(NAMES, values, strict=True))


WRONG = 1e-6
"""p-value below which a sampler counts as wrong; twelve quantities pass by chance in 99.999 %."""


def without_jacobian(scales):
    """τ = u log(1 + eˣ) with the slope of τ in x forgotten."""

    @functools.wraps(scales)
    def forgetful(self, x, units, beliefs):
        found = scales(self, x, units, beliefs)
        d = self.num_coef
        slope = (jax.numpy.log(units.tau) + jax.nn.log_sigmoid(x[:d])).sum()
        return found._replace(log_density=found.log_density - slope)

    return forgetful


@pytest.mark.slow
def test_ranks_of_full_bayes_are_uniform():
    values = p_values(ranks(full_bayes))
    assert min(values.values()) > 1e-3, values  # 12 quantities: by chance in 1 % of seeds


@pytest.mark.slow
def test_a_forgotten_jacobian_is_caught(monkeypatch):
    monkeypatch.setattr(Coordinates, "scales", without_jacobian(Coordinates.scales))
    monkeypatch.setattr(collapsed_sampling, "LEAST_ACCEPTANCE", 0.0)  # NUTS would be as wrong
    jax.clear_caches()  # the right program is compiled already
    try:
        values = p_values(ranks(full_bayes))
    finally:
        monkeypatch.undo()
        jax.clear_caches()
    assert min(values["tau0"], values["tau1"]) < WRONG, values


@pytest.mark.slow
def test_one_draw_of_phi_for_all_of_theta_is_caught():
    """Empirical Bayes passed off as full Bayes: all draws at one φ, the first."""

    def plug_in(tasks, seed):
        draws = full_bayes(tasks, seed)
        fixed = {n: np.broadcast_to(v[:1], v.shape) for n, v in draws.items() if n != "theta"}
        return draws | fixed

    assert min(p_values(ranks(plug_in)).values()) < WRONG


@pytest.mark.slow
def test_the_prior_in_the_place_of_the_posterior_is_caught():
    """Parameters alone do not show it: their ranks are uniform. The data's likelihood does."""

    def prior(tasks, seed):
        draws = [simulated(10_000 + NUM_RANKED * seed + k)[0] for k in range(NUM_RANKED)]
        return {name: np.array([draw[name] for draw in draws]) for name in draws[0]}

    values = p_values(ranks(prior))
    assert values.pop("log likelihood") < WRONG
    assert min(values.values()) > 1e-3, values
