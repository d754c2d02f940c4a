"""Quadrature where few rows meet a wide prior, at φ̂ and over draws of φ.

Rung (b): integrals over θ by the trapezium rule on a grid as fine as the narrower of likelihood and
prior; the posterior of (μ, τ) on a grid; SciPy's maximum of the dense evidence.
"""

from __future__ import annotations

import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from assertions import close, monte_carlo
from scipy import integrate, optimize, special, stats
from test_quadrature import binomials, found

import hierbayes as hb
from hierbayes.adaptation.quadrature import Quadrature
from hierbayes.meta.by_quadrature import finer, spread


def dense_binomial(successes, trials, mu, tau):
    """log p(D_j | μ, τ), on 250,001 places of z over ± 25 prior standard deviations."""
    z = np.linspace(-25, 25, 250_001)
    f = mu + tau * z
    log = successes * f - trials * np.logaddexp(0, f) - 0.5 * z**2
    whole = integrate.trapezoid(np.exp(log - log.max()), x=z)
    choose = stats.binom(trials, 0.5).logpmf(successes) + trials * np.log(2)
    return log.max() + np.log(whole) - 0.5 * np.log(2 * np.pi) + choose


@pytest.mark.parametrize(
    "tau", [0.5, 25.0, *(pytest.param(t, marks=pytest.mark.slow) for t in (5.0, 100.0))]
)
@pytest.mark.parametrize(
    ("trials", "successes"), [(1, (0, 1, 0)), (5, (0, 2, 5)), (5000, (0, 2500, 5000))]
)
def test_rays_integrate_what_is_one_sided(trials, successes, tau):
    """1e-5 with 20 nodes a side and 1e-6 with 30: Gauss and Legendre's error in a steep flank."""
    tasks, likelihood = binomials(trials, np.array(successes, float)), hb.likelihoods.Binomial()
    phi = {"mu": np.array([3.0]), "tau": np.array([tau])}
    expected = [dense_binomial(k, trials, 3.0, tau) for k in successes]
    close(found(likelihood, tasks, phi, 40).log_evidence, expected, rtol=0, atol=1e-5)
    close(found(likelihood, tasks, phi, 60).log_evidence, expected, rtol=0, atol=1e-6)


def test_a_grid_around_the_mode_does_not():
    """Negative control: the sixty-one nodes that were the most there was."""
    tasks, likelihood = binomials(1, np.array([0.0, 1.0])), hb.likelihoods.Binomial()
    phi = {"mu": np.array([3.0]), "tau": np.array([25.0])}
    expected = [dense_binomial(k, 1, 3.0, 25.0) for k in (0, 1)]
    off = found(likelihood, tasks, phi, 61).log_evidence - expected
    assert np.abs(off).max() > 1e-3


def separated(rng, num_tasks, d):
    """Tasks of three rows, most of them all zeros or all ones."""
    x = np.concatenate([np.ones((num_tasks, 3, 1)), rng.normal(size=(num_tasks, 3, d - 1))], -1)
    level = 10 * rng.normal(size=(num_tasks, 1))
    y = (rng.random((num_tasks, 3)) < special.expit(level)).astype(float)
    return hb.Tasks.from_arrays(list(zip(x, y, strict=True))), x, y


@pytest.mark.slow
@pytest.mark.parametrize(("d", "num_nodes", "error"), [(2, 40, 2e-3), (3, 20, 2e-2)])
def test_rays_in_more_dimensions(d, num_nodes, error, rng):
    """Against a million draws from the prior, three of their standard errors or ``error``."""
    tasks, x, y = separated(rng, 4, d)
    phi = {"mu": np.full(d, 0.5), "tau": np.linspace(8.0, 4.0, d), "corr": np.eye(d)}
    values = found(hb.likelihoods.Bernoulli(), tasks, phi, num_nodes).log_evidence
    z = stats.norm.ppf(stats.qmc.Sobol(d, seed=0).random_base2(20))
    theta = phi["mu"] + phi["tau"] * np.clip(z, -8, 8)
    for j in range(4):
        f = theta @ x[j].T
        like = np.exp(-np.logaddexp(0, np.where(y[j] == 1, -f, f)).sum(1))
        monte = 3 * like.std() / like.mean() / np.sqrt(len(like))
        assert abs(values[j] - np.log(like.mean())) < error + monte


def test_moments_on_rays_are_those_of_a_grid():
    tasks = binomials(1, np.array([1.0]))
    model = hb.HierarchicalModel(hb.likelihoods.Binomial(), hb.priors.Gaussian(correlated=False))
    phi = {"mu": np.array([1.0]), "tau": np.array([20.0])}
    adapted = Quadrature(40)(model, tasks, phi)
    z = np.linspace(-10, 10, 200_001)
    weight = special.expit(1 + 20 * z) * np.exp(-0.5 * z**2)
    mean = weight @ (1 + 20 * z) / weight.sum()
    close(adapted.mean[0, 0], mean, rtol=1e-5)
    close(adapted.covariance[0, 0, 0], weight @ (1 + 20 * z - mean) ** 2 / weight.sum(), rtol=1e-5)


@pytest.mark.slow
def test_the_maximum_where_tau_is_large(rng):
    """Eight trials a task and τ = 25: SciPy's maximum of the dense evidence.

    1e-3 of τ: the maximum is flat, and an evidence right to 1e-5 has it to a thousandth.
    """
    y = rng.binomial(8, special.expit(2 + 25 * rng.normal(size=80)))
    model, tasks = hb.from_formula(
        "p(y, n) ~ 1 + (1 | g)", pd.DataFrame({"g": np.arange(80), "y": y, "n": 8})
    )
    fit = hb.empirical_bayes(model, tasks)
    assert 0 <= fit.info["evidence_error"] < 1e-3
    counts, times = np.unique(y, return_counts=True)
    z = np.linspace(-9, 9, 9001)
    prior = np.log(np.gradient(z)) - 0.5 * z**2 - 0.5 * np.log(2 * np.pi)

    def minus(v):
        f = v[0] + np.exp(v[1]) * z
        like = counts[:, None] * f - 8 * np.logaddexp(0, f) + prior
        return -times @ special.logsumexp(like, axis=1)

    near = [fit.phi["mu"][0], np.log(fit.phi["tau"][0])]
    best = optimize.minimize(minus, near, method="Nelder-Mead", options={"fatol": 1e-9})
    close(fit.phi["tau"][0], np.exp(best.x[1]), rtol=1e-3)
    choose = (stats.binom(8, 0.5).logpmf(counts) + 8 * np.log(2)) @ times
    close(fit.log_evidence, choose - best.fun, rtol=0, atol=1e-3)


def test_every_number_of_nodes_is_held_against_another():
    assert [finer(n, 1) for n in (5, 31, 61, 40, 60)] == [13, 61, 40, 60, 40]
    assert [finer(n, 2) for n in (5, 31, 40)] == [13, 40, 56]
    assert [finer(n, 3) for n in (3, 13, 20)] == [9, 20, 28]


def test_the_error_is_what_varies_over_draws():
    """A constant cancels; what no rule can say is not zero."""
    exact = np.array([-10.0, -11.0, -30.0])
    assert spread(exact + 5.0, exact) < 1e-12
    close(spread(exact + np.array([0.0, 0.0, 0.3]), exact), 0.3)
    assert spread(np.array([0.0, np.nan]), np.array([0.0, 1.0])) == np.inf
    assert spread(np.array([0.0, -np.inf]), np.array([0.0, -np.inf])) == 0.0


# ----------------------------------------------------------------------- full Bayes


def single_answers(num_tasks, ones, scale):
    """One row a task; E τ, its sd and 97.5 % point on a grid of (μ, τ)."""
    y = np.repeat([1.0, 0.0], [ones, num_tasks - ones])
    tau, mu = np.linspace(1e-3, 6 * scale, 250), np.linspace(-40, 40, 401)
    z = np.linspace(-9, 9, 401)  # sums of a logistic curve as steep as 30 z err by 1e-6
    weight = np.exp(-0.5 * z**2) / np.exp(-0.5 * z**2).sum()
    chance = np.stack([special.expit(mu[:, None] + t * z) @ weight for t in tau])
    # the chance of a zero at μ is that of a one at −μ
    log = ones * np.log(chance) + (num_tasks - ones) * np.log(chance[:, ::-1])
    log += stats.norm(0, 10).logpdf(mu) + stats.halfnorm(scale=scale).logpdf(tau)[:, None]
    mass = np.exp(log - log.max()).sum(1)
    mass /= mass.sum()
    mean = mass @ tau
    upto = np.cumsum(mass) - 0.5 * mass
    return y, mean, np.sqrt(mass @ (tau - mean) ** 2), np.interp(0.975, upto, tau)


@pytest.mark.slow
def test_wide_beliefs_and_single_answers():
    """τ is hardly known, and large: five nodes at the mode would have it at half of what it is."""
    y, mean, sd, far = single_answers(60, 24, 5.0)
    model, tasks = hb.from_formula(
        "y ~ 1 + (1 | g)", pd.DataFrame({"g": np.arange(60), "y": y}), family="bernoulli",
        hyperprior=hb.HyperPrior(mu=dist.Normal(0, 10), tau=dist.HalfNormal(5.0)),
    )  # fmt: skip
    fit = hb.full_bayes(model, tasks, num_draws=600, seed=0)
    tau = np.asarray(fit.phi_draws["tau"])[..., 0]
    monte_carlo(tau, mean, sd, least_ess=1000)
    monte_carlo((tau <= far).astype(float), 0.975, np.sqrt(0.975 * 0.025), share=0.3)
    assert fit.info["sampler"] == "independence"
    assert fit.info["num_nodes"] % 2 == 0  # rays
    assert 0 < fit.info["evidence_error"] < 0.05


def two_clusters():
    """Rows of one task in two places far apart, under a t: two modes of its θ."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(m, 0.3, 8) for m in (0.0, 1.0, -1.0, 0.5)]
    rows.append(np.concatenate([rng.normal(-4, 0.3, 4), rng.normal(4, 0.3, 4)]))
    frame = pd.concat([pd.DataFrame({"g": f"t{j}", "y": y}) for j, y in enumerate(rows)])
    return hb.from_formula(
        "y ~ 1 + (1 | g)", frame, family="student_t",
        hyperprior=hb.HyperPrior(
            mu=dist.Normal(0, 3), tau=dist.HalfNormal(2.0), sigma=dist.HalfNormal(1.0),
            extra={"df": dist.Gamma(4.0, 1.0)},
        ),
    )  # fmt: skip


@pytest.mark.slow
def test_two_modes_are_found_and_said():
    model, tasks = two_clusters()
    with pytest.warns(hb.FitWarning, match=r"t4.*more than one mode.*method=\"nuts\""):
        hb.full_bayes(model, tasks, method="collapsed", num_draws=100, num_chains=2)


@pytest.mark.slow
def test_two_modes_go_by_nuts():
    model, tasks = two_clusters()
    with pytest.warns(hb.FitWarning, match="more than one mode"):
        fit = hb.full_bayes(model, tasks, num_draws=50, num_warmup=50, num_chains=2)
    assert fit.info["method"] == "nuts"
