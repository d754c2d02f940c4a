"""Empirical and full Bayes of counts and successes, against surgical, lme4 and Stan.

Surgical: 12 hospitals, binomial; quadrature over all of it (no Monte-Carlo error). Peregrine
falcons: 40 years of counts, Poisson; 20,000 draws of Stan's NUTS, whose own errors are added to
ours. Where the folder of reference answers is absent these tests skip.
"""

from __future__ import annotations

import json

import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray as xr
from assertions import close
from numpyro.distributions.transforms import PowerTransform
from references import assert_agreement

import hierbayes as hb


@pytest.fixture(scope="module")
def surgical(shared):
    return json.loads((shared / "reference" / "surgical.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def falcons(shared):
    return json.loads((shared / "reference" / "glmm_poisson.json").read_text(encoding="utf-8"))


def hospitals(reference):
    r, n = reference["data"]["r"], reference["data"]["n"]
    return pd.DataFrame({"hospital": [f"h{i:02d}" for i in range(len(r))], "r": r, "n": n})


@pytest.mark.slow
# four digits, as lme4 prints and stops: its optimum lies 4e-5 below ours in the log likelihood
def test_laplace_is_lme4s(surgical, shared):
    fits = json.loads((shared / "reference" / "lme4_fits.json").read_text(encoding="utf-8"))
    expected = fits["surgical_laplace"]
    fit = hb.empirical_bayes(
        *hb.from_formula("p(r, n) ~ 1 + (1 | hospital)", hospitals(surgical)), evidence="laplace"
    )
    close(fit.phi["mu"], [expected["fixef"]["(Intercept)"]], rtol=1e-4)
    close(fit.phi["tau"], [expected["varcorr"][0]["sdcor"]], rtol=1e-4)
    close(fit.log_evidence, expected["logLik"], rtol=2e-6)
    close(fit.standard_errors["mu"], [expected["fixef_se"]["(Intercept)"]], rtol=5e-3)


# 1e-4: five nodes stop where the summed log evidence is known to 1e-3
def test_quadrature_is_exact(surgical):
    expected = surgical["type2_ml"]
    fit = hb.empirical_bayes(*hb.from_formula("p(r, n) ~ 1 + (1 | hospital)", hospitals(surgical)))
    assert fit.info["evidence"] == "quadrature"
    close(fit.phi["mu"], [expected["mu"]], rtol=1e-4)
    close(fit.phi["tau"], [expected["sigma"]], rtol=1e-4)
    close(fit.log_evidence, expected["log_marginal_likelihood"], rtol=1e-5)
    close(fit.theta.values[:, 0], expected["b_mean"], rtol=1e-4)
    sd = np.sqrt(np.asarray(fit.adapted.covariance)[:, 0, 0])
    close(sd, expected["b_sd"], rtol=1e-3)


@pytest.mark.slow
def test_full_bayes_of_surgical_is_its_quadrature(surgical):
    """μ ~ N(0, 1000), σ² ~ InverseGamma(0.001, 0.001)."""
    variance = dist.InverseGamma(0.001, 0.001)
    prior = hb.HyperPrior(
        mu=dist.Normal(0.0, 1000.0), tau=dist.TransformedDistribution(variance, PowerTransform(0.5))
    )
    model, tasks = hb.from_formula(
        "p(r, n) ~ 1 + (1 | hospital)", hospitals(surgical), hyperprior=prior
    )
    fit = hb.full_bayes(model, tasks, num_draws=10_000, seed=0, progress=False)
    assert fit.info["sampler"] == "independence"
    params = surgical["reference"]["params"]
    b = [params[f"b[{i + 1}]"] for i in range(12)]
    expected = {
        "mu": {key: np.array([params["mu"][key]]) for key in ("mean", "sd")},
        "tau": {key: np.array([params["sigma"][key]]) for key in ("mean", "sd")},
        "theta": {key: np.array([[p[key]] for p in b]) for key in ("mean", "sd")},
    }
    assert_agreement(fit.datatree["posterior"].to_dataset(), expected)
    evidence = surgical["reference"]["log_marginal_likelihood"]
    assert abs(fit.log_evidence - evidence) < 4 * fit.info["log_evidence_se"] + 1e-3


@pytest.mark.slow
def test_full_bayes_of_falcons_is_stans(falcons):
    """log mean = α + β₁ y + β₂ y² + β₃ y³ + ε_t, ε_t ~ N(0, σ), σ ~ U(0, 5)."""
    years = np.array(falcons["data"]["year"])
    frame = pd.DataFrame({
        "t": [f"t{i:02d}" for i in range(len(years))], "y1": years, "y2": years**2,
        "y3": years**3, "count": falcons["data"]["C"],
    })  # fmt: skip
    model, tasks = hb.from_formula(
        "count ~ 1 + y1 + y2 + y3 + (1 | t)", frame, family="poisson",
        hyperprior=hb.HyperPrior(
            mu=dist.Uniform(-20.0, 20.0), beta=dist.Uniform(-10.0, 10.0), tau=dist.Uniform(0.0, 5.0)
        ),
    )  # fmt: skip
    fit = hb.full_bayes(model, tasks, num_draws=10_000, seed=0, progress=False)
    params = falcons["reference"]["params"]
    posterior = fit.datatree["posterior"].to_dataset()
    ours = {"alpha": posterior["mu"].values[..., 0], "sigma": posterior["tau"].values[..., 0]}
    ours |= {f"beta{i + 1}": posterior["beta"].values[..., i] for i in range(3)}
    for name, draws in ours.items():
        expected = params[name]
        ess = float(hb_ess(draws))
        error = np.hypot(draws.std() / np.sqrt(ess), expected["se_mean"])
        assert abs(draws.mean() - expected["mean"]) < 4 * error, name
        close(draws.std(), expected["sd"], rtol=0.05)


def hb_ess(draws):
    import arviz_stats

    return arviz_stats.ess(draws, method="mean")


@pytest.mark.slow
def test_collapsed_is_joint_nuts_with_correlated_slopes():
    """400 rows in 25 tasks; means within four standard errors of both, sds within 15 %."""
    rng = np.random.default_rng(5)
    task = np.repeat(np.arange(25), 16)
    x = rng.normal(size=400)
    theta = np.array([-0.5, 0.8]) + rng.normal(size=(25, 2)) @ np.array([[0.9, 0.3], [0.0, 0.6]])
    y = rng.random(400) < 1 / (1 + np.exp(-(theta[task, 0] + theta[task, 1] * x)))
    frame = pd.DataFrame({"g": task, "x": x, "y": y.astype(float)})
    model, tasks = hb.from_formula("y ~ 1 + x + (1 + x | g)", frame, family="bernoulli")
    fits = {
        m: hb.full_bayes(model, tasks, m, num_draws=800, num_warmup=500, seed=1, progress=False)
        for m in ("collapsed", "nuts")
    }
    draws = {m: fit.datatree["posterior"].to_dataset() for m, fit in fits.items()}
    for name in ("mu", "tau", "corr", "theta"):
        a, b = (xr.DataArray(draws[m][name]) for m in ("collapsed", "nuts"))
        flat = [v.values.reshape(*v.shape[:2], -1) for v in (a, b)]
        for i in range(flat[0].shape[-1]):
            one, two = (v[..., i] for v in flat)
            if one.std() < 1e-9:
                continue
            error = np.hypot(*(v.std() / np.sqrt(hb_ess(v)) for v in (one, two)))
            assert abs(one.mean() - two.mean()) < 4.5 * error, (name, i)
            close(one.std(), two.std(), rtol=0.15)
