"""Tails of τ under few tasks, and under tasks that are known next to exactly.

Rung (b): the posterior of τ on a grid. Of Gaussian tasks with known standard errors μ is integrated
out by the normal's algebra; of counts every θ_j by Gauss and Legendre over ± 8 of its standard
errors, and μ on a grid. Quantiles of τ are compared by the share of draws below them, in standard
errors of an effective sample size: heavy tails have no standard deviation to speak of.
"""

from __future__ import annotations

import arviz_stats
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from scipy import special, stats

import hierbayes as hb
from hierbayes.meta.collapsed_sampling import Fitted, Proposal, pareto_k, run_chains, tail_share

SHARES = np.array([0.05, 0.5, 0.9, 0.975, 0.99])


def quantiles(tau, log_density):
    """Quantiles of a density on an uneven grid of τ."""
    mass = np.exp(log_density - log_density.max()) * np.gradient(tau)
    upto = (np.cumsum(mass) - 0.5 * mass) / mass.sum()
    return np.interp(SHARES, upto, tau)


def quantiles_of_normals(y, se, prior):
    """μ ~ N(0, 10²) integrated out, τ on a grid."""
    tau = np.concatenate([np.linspace(1e-6, 0.5, 500)[:-1], np.geomspace(0.5, 1e6, 8000)])
    variance = se**2 + tau[:, None] ** 2
    precision = (1 / variance).sum(1) + 0.01
    mean = (y / variance).sum(1) / precision
    fit = -0.5 * (np.log(variance) + y**2 / variance).sum(1)
    fit += 0.5 * precision * mean**2 - 0.5 * np.log(precision)
    return quantiles(tau, fit + prior(tau))


def quantiles_of_counts(counts, centre, prior):
    """μ ~ N(centre, 5²); a count's likelihood in θ is narrow, and next to normal."""
    node, weight = special.roots_legendre(24)
    mu = np.log(counts).mean() + 0.1 * np.sinh(np.linspace(-7, 7, 301))
    tau = np.concatenate([np.linspace(0.01, 0.1, 15)[:-1], np.geomspace(0.1, 300, 200)])
    total = np.zeros((len(tau), len(mu)))
    for y in counts:
        away = 8 * node / np.sqrt(y)
        like = y * (away - np.expm1(away)) + np.log(weight)
        white = (np.log(y) + away - mu[:, None]) / tau[:, None, None]
        total += special.logsumexp(like - 0.5 * white**2, axis=2) - np.log(tau)[:, None]
    total += stats.norm(centre, 5).logpdf(mu) + np.log(np.gradient(mu))
    return quantiles(tau, special.logsumexp(total, axis=1) + prior(tau))


def below(draws, expected):
    """Shares of draws (chain, draw) below the quantiles, less what they should be, in errors."""
    away = []
    for share, at in zip(SHARES, expected, strict=True):
        under = (draws <= at).astype(float)
        ess = float(arviz_stats.ess(under, method="mean"))
        assert ess > 200
        error = np.sqrt(share * (1 - share) / min(ess, draws.size))
        away.append((under.mean() - share) / error)
    return np.array(away)


def agrees(fits, expected):
    """No quantile of any seed is 4 standard errors off, and none 2.5 on average over seeds."""
    away = np.array([below(np.asarray(f.phi_draws["tau"])[..., 0], expected) for f in fits])
    assert (np.abs(away) < 4).all(), away
    assert (np.abs(away.mean(0)) * np.sqrt(len(away)) < 3.5).all(), away


BELIEFS = {
    "half-normal": (dist.HalfNormal(20.0), stats.halfnorm(scale=20.0).logpdf),
    "half-Cauchy": (dist.HalfCauchy(5.0), stats.halfcauchy(scale=5.0).logpdf),
}


@pytest.mark.parametrize(
    ("num_tasks", "hyperprior"),
    [
        (3, "half-Cauchy"),
        (5, "half-normal"),
        pytest.param(3, "half-normal", marks=pytest.mark.slow),
    ],
)
def test_few_tasks_with_known_errors(num_tasks, hyperprior):
    rng = np.random.default_rng(num_tasks)
    se = np.exp(rng.normal(0, 0.5, num_tasks))
    y = rng.normal(0, 2, num_tasks) + se * rng.normal(size=num_tasks)
    prior, log_prior = BELIEFS[hyperprior]
    model, tasks = hb.from_formula(
        "y ~ 1 + (1 | g)", pd.DataFrame({"g": np.arange(num_tasks), "y": y, "se": se}),
        known_se="se", hyperprior=hb.HyperPrior(mu=dist.Normal(0, 10), tau=prior),
    )  # fmt: skip
    fits = [hb.full_bayes(model, tasks, num_draws=2000, seed=seed) for seed in range(4)]
    agrees(fits, quantiles_of_normals(y, se, log_prior))
    assert all(np.isfinite(fit.info["pareto_k"]) for fit in fits)


@pytest.mark.slow
def test_counts_of_a_hundred_thousand():
    """Every θ_j is known, so that μ is a funnel as wide as τ: the chart has it straight."""
    num_tasks, scale = 3, 2.0
    rng = np.random.default_rng(num_tasks)
    centre = np.log(1e5)
    counts = rng.poisson(np.exp(centre + 0.3 * rng.normal(size=num_tasks))).astype(float)
    model, tasks = hb.from_formula(
        "y ~ 1 + (1 | g)", pd.DataFrame({"g": np.arange(num_tasks), "y": counts}),
        family="poisson",
        hyperprior=hb.HyperPrior(mu=dist.Normal(centre, 5), tau=dist.HalfNormal(scale)),
    )  # fmt: skip
    fits = [hb.full_bayes(model, tasks, num_draws=2000, seed=seed) for seed in range(3)]
    expected = quantiles_of_counts(counts, centre, stats.halfnorm(scale=scale).logpdf)
    agrees(fits, expected)


def test_grids_are_caught_out_by_another_belief():
    """Negative control: quantiles under a half-normal of a third of the width."""
    rng = np.random.default_rng(3)
    draws = stats.halfnorm(scale=3.0).rvs((4, 2000), random_state=rng)
    tau = np.linspace(1e-3, 30, 20_000)
    agrees([type("F", (), {"phi_draws": {"tau": draws[..., None]}})()],
           quantiles(tau, stats.halfnorm(scale=3.0).logpdf(tau)))  # fmt: skip
    with pytest.raises(AssertionError):
        agrees([type("F", (), {"phi_draws": {"tau": draws[..., None]}})()],
               quantiles(tau, stats.halfnorm(scale=2.7).logpdf(tau)))  # fmt: skip


# ------------------------------------------------------------------- what tells of a tail


@pytest.mark.parametrize("shape", [0.3, 0.7, 1.2])
def test_the_shape_of_a_pareto_tail_is_found(shape):
    """Over 20,000 draws the 424 largest: a standard error of (1 + k) / √424, and three of them."""
    weights = stats.pareto(1 / shape).rvs(20_000, random_state=1)
    assert abs(pareto_k(np.log(weights)) - shape) < 3 * (1 + shape) / np.sqrt(424)


def test_even_weights_have_no_tail():
    rng = np.random.default_rng(0)
    assert pareto_k(rng.uniform(0, 1, 5000)) == -1.0  # at most e^½ of their mean
    bounded = np.log(rng.beta(0.2, 1.0, 20_000))  # at most six times their mean
    assert pareto_k(bounded) < 0.1


def test_effective_draws_in_the_tails():
    """Independent draws; and each draw kept nine times over, which leaves a ninth of them."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4, 2000, 2))
    assert tail_share(draws) > 0.8
    share = tail_share(np.repeat(draws, 9, axis=1)[:, :2000])
    assert 0.7 / 9 < share < 1.3 / 9


def test_a_part_that_reaches_far_bounds_weights(rng):
    """A target like 1 / x³ under a proposal like 1 / x⁶, of which a tenth is like 1 / x²."""

    def weigh(points):
        return stats.t(2.0).logpdf(points[:, 0]), {}

    def chains(far):
        proposal = Proposal(np.zeros(1), np.eye(1), far=far)
        nowhere = Fitted(proposal, np.zeros((1, 1)), np.zeros(1), {}, np.zeros(1), 1.0)
        return run_chains(weigh, nowhere, rng, num_draws=5000, num_chains=4, every=1)

    light, heavy = chains(0.0), chains(0.1)
    assert light.acceptance > 0.85  # which says nothing of the tail
    assert light.pareto_k > 0.35 > heavy.pareto_k
    share = np.mean(np.abs(heavy.points) > stats.t(2.0).ppf(0.9975))
    assert abs(share - 0.005) < 4 * np.sqrt(0.005 / 20_000 / 0.7)
    assert abs(heavy.log_normaliser) < 4 * heavy.log_normaliser_se
