"""Kass and Steffey's standard errors of θ, and what is said of estimates at ±1.

Rung (a): normal means, by hand. Rung (b): differences of posterior means and of evidences; full
Bayes on a dense grid. The surgical data's full posterior is the reference folder's, by quadrature.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from assertions import close, refuses
from scipy import special, stats

import hierbayes as hb
from hierbayes.evidence import Integrated
from hierbayes.meta.better_evidence import observed_information, x_of
from hierbayes.meta.optimum import HELD, at_the_boundary, held_entries
from hierbayes.numerics import float64, to_numpy

QUIET = dict(num_draws=1, num_chains=1)


def test_normal_means_by_hand():
    """m_j = μ + B_j (y_j − μ), B_j = τ²/(τ² + V_j); I of (μ, τ) from Σ log N(y_j; μ, V_j + τ²)."""
    rng = np.random.default_rng(2)
    se = rng.uniform(0.5, 1.5, 20)
    y = 1.0 + 1.2 * rng.standard_normal(20) + se * rng.standard_normal(20)
    data = pd.DataFrame({"g": [f"t{i:02d}" for i in range(20)], "y": y, "se": se})
    fit = hb.empirical_bayes(*hb.from_formula("y ~ 1 + (1 | g)", data, known_se="se"), **QUIET)
    mu, tau = float(fit.phi["mu"][0]), float(fit.phi["tau"][0])
    assert tau > 0.3
    v = se**2
    s, e = v + tau**2, y - mu
    by_mu, by_tau = v / s, e * 2 * tau * v / s**2
    mixed = (2 * tau * e / s**2).sum()
    twice = (1 / s - e**2 / s**2 - 2 * tau**2 / s**2 + 4 * tau**2 * e**2 / s**3).sum()
    information = np.array([[(1 / s).sum(), mixed], [mixed, twice]])
    slopes = np.stack([by_mu, by_tau])
    more = np.einsum("ij,ik,kj->j", slopes, np.linalg.inv(information), slopes)
    found = hb.checks.theta_standard_errors(fit)
    assert found.dims == ("task", "coef")
    close(found.values[:, 0], np.sqrt(v * tau**2 / s + more), rtol=1e-7)
    table = fit.summary("theta", errors={"theta": found})
    close(table["se"], found.values[:, 0])
    close(fit.summary("theta")["se"], fit.adapted.sd.values[:, 0])


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(8)
    g, x = np.repeat(np.arange(25), 6), rng.normal(size=150)
    theta = rng.normal(size=(25, 2)) @ np.array([[0.8, 0.2], [0.0, 0.5]]) + [0.4, 0.2]
    y = rng.poisson(np.exp(theta[g, 0] + theta[g, 1] * x))
    data = pd.DataFrame({"g": g, "x": x, "y": y})
    return hb.from_formula("y ~ 1 + x + (1 + x | g)", data, family="poisson")


@pytest.mark.slow
@pytest.mark.parametrize("evidence", ["laplace", "quadrature"])
def test_against_differences_of_everything(evidence, counts):
    """∂m_j/∂φ and I by central differences with a step of 1e-3 of φ's vector: right to 1e-4.

    Differences move the five nodes along, where ours hold them: their own error is up to 1e-3.
    """
    model, tasks = counts
    fit = hb.empirical_bayes(model, tasks, evidence=evidence, **QUIET)
    phi = {name: np.asarray(value) for name, value in fit.phi.items()}
    assert abs(phi["corr"][0, 1]) < 0.999
    with float64():
        space = fit.model.space(tasks)
        v, h = x_of(space, phi), 1e-3
        named = jax.jit(space.phi)
        total = Integrated(fit.adaptation)

        def mean(v):
            at = to_numpy(named(jnp.asarray(v)))
            return fit.adaptation(fit.model, tasks, at).mean

        def value(v):
            return total(fit.model, tasks, to_numpy(named(jnp.asarray(v)))).sum()

        unit = h * np.eye(len(v))
        slopes = np.array([(mean(v + e) - mean(v - e)) / (2 * h) for e in unit])
        information = -np.array([
            [(value(v + a + b) - value(v + a - b) - value(v - a + b) + value(v - a - b))
             / (4 * h * h) for a in unit] for b in unit])  # fmt: skip
    inverse = np.linalg.inv(information)
    more = np.einsum("pjk,pq,qjk->jk", slopes, inverse, slopes)
    plain = fit.adapted.sd.values
    found = hb.checks.theta_standard_errors(fit).values
    close(found, np.sqrt(plain**2 + more), rtol=1e-4 if evidence == "laplace" else 1e-3)
    # negative control: the second term is more than ten times what is allowed
    assert np.abs(np.sqrt(plain**2 + more) / plain - 1).max() > 1e-2


@pytest.mark.slow
def test_surgical_is_nearer_to_its_full_posterior(shared):
    """Full Bayes by quadrature over φ: at every hospital wider than both, and nearer to these."""
    reference = json.loads((shared / "reference" / "surgical.json").read_text(encoding="utf-8"))
    r, n = reference["data"]["r"], reference["data"]["n"]
    data = pd.DataFrame({"hospital": [f"h{i:02d}" for i in range(12)], "r": r, "n": n})
    fit = hb.empirical_bayes(*hb.from_formula("p(r, n) ~ 1 + (1 | hospital)", data), **QUIET)
    params = reference["reference"]["params"]
    full = np.array([params[f"b[{i + 1}]"]["sd"] for i in range(12)])
    plain = fit.adapted.sd.values[:, 0]
    found = hb.checks.theta_standard_errors(fit).values[:, 0]
    assert (plain < found).all()
    assert (np.abs(found - full) < np.abs(plain - full)).all()


@pytest.mark.slow
def test_with_more_tasks_it_is_full_bayes():
    """100 tasks of 6 trials; φ's posterior under flat priors on a grid of μ and τ, θ's on another.

    2/J is allowed, the order of what is left out; the plain sds are farther off than that.
    """
    rng = np.random.default_rng(4)
    y = rng.binomial(6, special.expit(rng.normal(0.4, 1.0, 100)))
    data = pd.DataFrame({"g": [f"t{i:03d}" for i in range(100)], "y": y, "n": 6})
    fit = hb.empirical_bayes(*hb.from_formula("p(y, n) ~ 1 + (1 | g)", data), **QUIET)
    theta = np.linspace(-8, 8, 401)
    rows = stats.binom.logpmf(np.arange(7)[:, None], 6, special.expit(theta))
    log_phi, first, second = [], [], []
    for mu in np.linspace(-0.7, 1.5, 45):
        for tau in np.linspace(0.15, 3.0, 58):
            joint = np.exp(rows + stats.norm.logpdf(theta, mu, tau))
            total = joint.sum(1)
            log_phi.append(np.log(total)[y].sum())
            first.append(((joint @ theta) / total)[y])
            second.append(((joint @ theta**2) / total)[y])
    weight = np.exp(np.array(log_phi) - special.logsumexp(log_phi))
    mean = weight @ np.array(first)
    full = np.sqrt(weight @ np.array(second) - mean**2)
    found = hb.checks.theta_standard_errors(fit).values[:, 0]
    plain = fit.adapted.sd.values[:, 0]
    assert (found > plain).all()
    assert abs(np.log(found / full).mean()) < 0.02
    assert abs(np.log(plain / full).mean()) > 0.02


def test_at_the_boundary_mu_alone_adds():
    """τ̂ = 0: Var = 0 + 1/Σ n p (1 − p), the variance of a pooled logit, by hand."""
    data = pd.DataFrame({"g": list("abcdefghijkl"), "y": [3, 4] * 6, "n": 8})
    fit = hb.empirical_bayes(*hb.from_formula("p(y, n) ~ 1 + (1 | g)", data), **QUIET)
    assert float(fit.phi["tau"][0]) == 0.0
    p = 42 / 96
    found = hb.checks.theta_standard_errors(fit).values[:, 0]
    close(found, np.full(12, (96 * p * (1 - p)) ** -0.5), rtol=1e-5)


def test_other_fits_are_refused(radon_complete_pooling, radon_reml):
    with refuses("complete pooling", "observed information"):
        hb.checks.theta_standard_errors(radon_complete_pooling)
    with refuses('criterion="reml"', "full_bayes"):
        hb.checks.theta_standard_errors(radon_reml)


# ------------------------------------------------------------- correlations at ±1


@pytest.fixture(scope="module")
def aligned():
    """Intercepts and slopes of counts that move together: the correlation is estimated as 1."""
    rng = np.random.default_rng(0)
    g, x, u = np.repeat(np.arange(25), 6), rng.normal(size=150), rng.normal(size=25)
    y = rng.poisson(np.exp(0.2 + 0.8 * u[g] + (0.3 + 0.5 * u[g]) * x))
    return pd.DataFrame({"g": g, "x": x, "y": y})


@pytest.mark.slow
def test_correlations_at_their_end_are_said_and_held(aligned):
    fit = hb.empirical_bayes(
        *hb.from_formula("y ~ 1 + x + (1 + x | g)", aligned, family="poisson"),
        evidence="laplace", **QUIET,
    )  # fmt: skip
    assert fit.phi["corr"][0, 1] > 1 - 1e-8
    assert HELD in fit.warnings
    assert (fit.phi["tau"] > 0).all()
    assert np.isfinite(
        np.concatenate([fit.standard_errors["tau"], fit.standard_errors["mu"]])
    ).all()
    found = hb.checks.theta_standard_errors(fit).values
    assert (found > fit.adapted.sd.values).all()
    phi = {name: np.asarray(value) for name, value in fit.phi.items()}
    with float64():
        known = observed_information(fit.model, fit.tasks, phi, 1, with_hyperprior=False)
    corr = known.around.space.at["corr"]
    assert not known.inside[corr].any()
    assert known.inside.sum() == len(known.inside) - 1


@pytest.mark.slow
def test_correlations_inside_their_range_are_not(counts):
    model, tasks = counts
    assert HELD not in hb.empirical_bayes(model, tasks, evidence="laplace", **QUIET).warnings


def test_gaussian_tasks_are_told_the_same(aligned):
    data = aligned.assign(y=np.log1p(aligned["y"]))
    u = data.groupby("g")["y"].transform("mean")
    data["y"] = u + u * data["x"] + 0.1 * np.random.default_rng(1).standard_normal(len(data))
    fit = hb.empirical_bayes(*hb.from_formula("y ~ 1 + x + (1 + x | g)", data), **QUIET)
    assert fit.phi["corr"][0, 1] > 1 - 1e-8
    assert HELD in fit.warnings


@pytest.mark.parametrize(("rho", "expected"), [(1.0, True), (-1.0, True), (1 - 1e-9, True),
                                               (0.999, False)])  # fmt: skip
def test_where_the_boundary_is(rho, expected):
    corr = np.array([[1.0, rho], [rho, 1.0]])
    assert at_the_boundary(corr, [(0, 1)]) is expected
    assert not at_the_boundary(corr, [(0,), (1,)])


def test_a_pair_with_no_spread_in_it_has_no_correlation(counts):
    """τ = 0 of one: nothing depends on the pair's correlation, and nothing is said of it."""
    model, tasks = counts
    resolved = model.resolve(tasks)
    with float64():
        space = resolved.space(tasks)
    corr = np.array([[1.0, 0.3], [0.3, 1.0]])
    held, said = held_entries(space, {"tau": np.array([0.5, 0.0]), "corr": corr})
    assert held.sum() == 1
    assert said == []
    held, said = held_entries(space, {"tau": np.array([0.5, 0.2]), "corr": corr})
    assert not held.any()
    assert said == []
