"""Collapsed full Bayes where tasks are known far better than the prior is: τ ≫ σ, heavy tails.

Rung (b): the evidence of a location under a t likelihood by SciPy and the trapezium rule, and the
posterior of τ given every θ by NumPy on a grid.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from assertions import close
from scipy import stats

import hierbayes as hb
from hierbayes.meta.by_evidence import phi_and_density
from hierbayes.meta.by_quadrature import ByQuadrature
from hierbayes.meta.collapsed_sampling import Located, locate
from hierbayes.numerics import float64

SIZES = (12, 14, 15, 16, 18, 20, 22, 24)
STUDENT = hb.HierarchicalModel(
    hb.likelihoods.StudentT(df=4.0), hb.priors.Gaussian(),
    hb.HyperPrior(
        mu=dist.Normal(0.0, 1.0), tau=dist.HalfNormal(1.0), sigma=dist.HalfNormal(1.0)
    ),
)  # fmt: skip
COUNTS = hb.HierarchicalModel(
    hb.likelihoods.Poisson(), hb.priors.Gaussian(),
    hb.HyperPrior(mu=dist.Normal(9.0, 2.0), tau=dist.HalfNormal(1.0)),
)  # fmt: skip


def heavy() -> hb.Tasks:
    """τ = 0.79, σ = 0.012: a mode is as wide as a hundredth of what lies between modes."""
    rng = np.random.default_rng(9)
    theta = rng.normal(-0.5, 0.79, len(SIZES))
    outcomes = [t + 0.012 * rng.standard_t(4, n) for t, n in zip(theta, SIZES, strict=True)]
    return hb.Tasks.from_arrays([(np.ones((len(y), 1)), y) for y in outcomes])


def large() -> hb.Tasks:
    """Counts of ten thousand: log-concave, and as narrow."""
    rng = np.random.default_rng(3)
    counts = [rng.poisson(np.exp(t), 4) for t in rng.normal(9.0, 0.8, 8)]
    return hb.Tasks.from_arrays([(np.ones((4, 1)), 1.0 * y) for y in counts])


def evidence(tasks: hb.Tasks, phi: dict[str, Any]) -> float:
    """Σ_j log p(D_j | φ) by the trapezium rule, its places dense around every row."""
    mu, tau = float(phi["mu"][0]), float(phi["tau"][0])
    total, start = 0.0, 0
    for size in tasks.sizes:
        y = tasks.outcome[start : start + size, None]
        start += size
        wide = mu + tau * np.linspace(-9.0, 9.0, 2001)
        if "sigma" in phi:
            sigma = float(phi["sigma"])
            near = (y + sigma * np.sinh(np.linspace(-12.0, 12.0, 401))).ravel()
            places = np.unique(np.concatenate([wide, near]))
            log_p = stats.t.logpdf(y, 4.0, places, sigma).sum(0)
        else:
            near = np.log(y.mean()) + np.linspace(-12.0, 12.0, 4001) / np.sqrt(y.sum())
            places = np.unique(np.concatenate([wide, near]))
            log_p = stats.poisson.logpmf(y, np.exp(places)).sum(0)
        log_p = log_p + stats.norm.logpdf(places, mu, tau)
        total += log_p.max() + np.log(np.trapezoid(np.exp(log_p - log_p.max()), places))
    return total


def ready(model: hb.HierarchicalModel, tasks: hb.Tasks) -> tuple[ByQuadrature, Located]:
    """The density as the sampler has it."""
    target = ByQuadrature(model.resolve(tasks), tasks)
    located = locate(target)
    target.prepare(located.units, located.mode)
    return target, located


def along_every_direction(located: Located) -> np.ndarray:
    """Points from −3 to 3 posterior standard deviations along log τ, σ and μ, one by one."""
    spread = np.sqrt(np.diag(located.root @ located.root.T))
    moves = np.linspace(-3.0, 3.0, 9)[:, None, None] * np.diag(spread)
    return (located.mode + moves).reshape(-1, len(spread))


@pytest.mark.parametrize(("model", "data"), [(STUDENT, heavy), (COUNTS, large)])
def test_what_the_sampler_goes_by_is_the_exact_density(model, data):
    """But for a constant: quadrature to 0.01, which its nodes were chosen for; Laplace's to 0.02.

    A task of n rows adds to Laplace's error a part of order 1/n that changes with σ alone.
    """
    tasks = data()
    with float64():
        target, located = ready(model, tasks)
        xs = along_every_direction(located)
        dear = target.points(located.units, xs, xs[:, :0])
        rough = target.points(located.units, xs, xs[:, :0], rough=True)
        around = target.data.within(located.units).around
        of_phi = jax.jit(lambda x: phi_and_density(target.made, around, x)[1])
        exact = [
            float(of_phi(x)) + evidence(tasks, {name: value[i] for name, value in dear.phi.items()})
            for i, x in enumerate(xs)
        ]
    assert np.ptp(exact) > 10.0  # there is something to follow
    close(dear.log_density - dear.log_density[4], np.array(exact) - exact[4], atol=0.01)
    close(rough.log_density - rough.log_density[4], np.array(exact) - exact[4], atol=0.02)


@pytest.mark.slow
def test_points_that_newton_does_not_reach_have_the_density_itself():
    """Modes held in z, as if nothing were known of how they move: two steps lead nowhere."""
    tasks = heavy()
    with float64():
        target, located = ready(STUDENT, tasks)
        target.data = target.data._replace(known=None)
        xs = along_every_direction(located)
        dear = target.points(located.units, xs, xs[:, :0]).log_density
        rough = target.points(located.units, xs, xs[:, :0], rough=True).log_density
    assert np.isfinite(rough).all()
    assert (rough == dear).sum() > len(xs) / 3  # τ's and μ's, but for the mode itself
    assert np.abs(rough - dear).max() < 0.1  # Laplace's error where Newton's method has ended


@pytest.mark.slow
def test_the_posterior_of_tau_is_that_of_tasks_known_exactly():
    """μ and τ given θ_j, the tasks' medians, right to 0.005: by NumPy alone, on a grid.

    σ = 0.012 beside τ changes τ's posterior by (0.005 / 0.8)² of itself; within four standard
    errors of 2,000 draws, of which at least one in three counts; a normal sd has half that error.
    """
    tasks = heavy()
    theta = np.array([np.median(part) for part in np.split(tasks.outcome, np.cumsum(SIZES)[:-1])])
    tau = np.linspace(0.1, 5.0, 2000)
    mu = np.linspace(-4.0, 4.0, 801)[:, None]
    log_p = stats.norm.logpdf(theta[:, None, None], mu, tau).sum(0) - 0.5 * (tau**2 + mu**2)
    p = np.exp(log_p - log_p.max()).sum(0)
    p /= p.sum()
    mean = p @ np.log(tau)
    sd = np.sqrt(p @ np.log(tau) ** 2 - mean**2)
    fit = hb.full_bayes(STUDENT, tasks, num_draws=500, seed=0, progress=False)
    assert fit.phi_draws is not None
    found = np.log(fit.phi_draws["tau"]).ravel()
    error = sd / np.sqrt(len(found) / 3)
    assert abs(found.mean() - mean) < 4 * error
    assert abs(found.std() / sd - 1) < 4 / np.sqrt(len(found) / 3)
    assert 0.2 < sd < 0.4  # eight tasks: the standard error of a log sd is about 1 / √14
