"""Full Bayes against posteriors known by quadrature, jointly sampled and with θ integrated out.

The references have no Monte-Carlo error (``references/README.md``). Every mean must lie within
four of the draws' own standard errors and every sd within 5 %, and the draws must be many enough
to know each sd to 1.25 %: ``DRAWS`` has about twice as many as that took, because the error of an
sd is itself known to some 10 % only. Seeds are fixed.
"""

from typing import Any, NamedTuple

import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from references import assert_agreement, load

import hierbayes as hb

FLAT = dist.ImproperUniform(constraints.real, (), ())
FLAT_POSITIVE = dist.ImproperUniform(constraints.positive, (), ())


class Case(NamedTuple):
    """A model, its tasks, and the posterior's means and sds by hierbayes's names."""

    model: hb.HierarchicalModel
    tasks: hb.Tasks
    expected: dict[str, dict[str, Any]]


def together(*parts: dict[str, Any]) -> dict[str, Any]:
    """Several parameters of a reference as one array; the coefficients are the last axis."""
    return {key: np.stack([p[key] for p in parts], axis=-1) for key in ("mean", "sd")}


def schools(which: str, hyperprior: hb.HyperPrior) -> Case:
    model, tasks = hb.from_formula(
        "y ~ 1 + (1 | school)",
        hb.datasets.eight_schools(),
        known_se="se",
        hyperprior=hyperprior,
    )
    reference = load("eight_schools")[which]
    return Case(model, tasks, {name: reference[name] for name in ("mu", "tau", "theta")})


def eight_schools() -> Case:
    """y_j ~ N(θ_j, se_j), θ_j ~ N(μ, τ), μ ~ N(0, 5), τ ~ half-Cauchy(5)."""
    return schools("half_cauchy", hb.HyperPrior(mu=dist.Normal(0, 5), tau=dist.HalfCauchy(5)))


def eight_schools_flat() -> Case:
    """The same with p(μ) and p(τ) flat, as Rubin (1981) had it."""
    return schools("flat", hb.HyperPrior(mu=FLAT, tau=FLAT_POSITIVE))


def rats() -> Case:
    """Independent intercepts (at day 22) and slopes; flat priors on the three scales."""
    model, tasks = hb.from_formula(
        "weight ~ 1 + I(day - 22) + (1 + I(day - 22) || rat)",
        hb.datasets.rats(),
        hyperprior=hb.HyperPrior(mu=dist.Normal(0, 100), tau=FLAT_POSITIVE, sigma=FLAT_POSITIVE),
    )
    r = load("rats")
    return Case(model, tasks, {
        "mu": together(r["mu_alpha"], r["mu_beta"]),
        "tau": together(r["sigma_alpha"], r["sigma_beta"]),
        "sigma": r["sigma_y"],
        "theta": together(r["alpha"], r["beta"]),
    })  # fmt: skip


def posteriordb_radon() -> Any:
    """posteriordb's outcome: zero counts stay zero activity, and 0.1 is added to all."""
    return hb.datasets.radon().assign(y=lambda d: np.log(d["activity"] + 0.1))


def radon_partially_pooled() -> Case:
    """A mean a county; μ ~ N(0, 10), τ and σ half-normal(1)."""
    model, tasks = hb.from_formula(
        "y ~ 1 + (1 | county)",
        posteriordb_radon(),
        hyperprior=hb.HyperPrior(
            mu=dist.Normal(0, 10), tau=dist.HalfNormal(1), sigma=dist.HalfNormal(1)
        ),
    )
    r = load("radon_partially_pooled")
    names = {"mu": "mu_alpha", "tau": "sigma_alpha", "sigma": "sigma_y", "theta": "alpha"}
    return Case(model, tasks, {ours: r[theirs] for ours, theirs in names.items()})


def radon_hierarchical_intercept() -> Case:
    """The same with shared effects of the county's uranium and the floor, β ~ N(0, 10)."""
    r = load("radon_hierarchical_intercept")
    frame = posteriordb_radon()
    uranium = dict(zip(frame["county"].unique(), r["log_uppm"], strict=True))
    model, tasks = hb.from_formula(
        "y ~ 1 + log_uppm + floor + (1 | county)",
        frame.assign(log_uppm=frame["county"].map(uranium)),
        hyperprior=hb.HyperPrior(
            mu=dist.Normal(0, 10), beta=dist.Normal(0, 10), tau=dist.HalfNormal(1),
            sigma=dist.HalfNormal(1),
        ),
    )  # fmt: skip
    assert tasks.labels.shared == ("log_uppm", "floor")
    names = {
        "mu": "mu_alpha", "beta": "beta", "tau": "sigma_alpha", "sigma": "sigma_y",
        "theta": "alpha",
    }  # fmt: skip
    return Case(model, tasks, {ours: r[theirs] for ours, theirs in names.items()})


# Draws a chain, of four chains. τ of eight schools has a heavy tail.
DRAWS = {
    (eight_schools, "collapsed"): 12_000,
    (eight_schools, "nuts"): 12_000,
    (eight_schools_flat, "collapsed"): 40_000,
    (rats, "collapsed"): 5_000,
    (radon_partially_pooled, "collapsed"): 5_000,
    (radon_hierarchical_intercept, "collapsed"): 7_000,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "method"), list(DRAWS), ids=lambda v: v if isinstance(v, str) else v.__name__
)
def test_posterior_is_the_reference(case, method):
    model, tasks, expected = case()
    fit = hb.full_bayes(
        model, tasks, method, num_draws=DRAWS[case, method], seed=0,
        # the funnel of eight schools needs short steps
        target_accept=0.99 if case is eight_schools else 0.9, progress=False,
    )  # fmt: skip
    assert fit.warnings == ()  # no divergences, R̂ below 1.01, effective sizes large
    posterior = fit.datatree["posterior"].to_dataset()
    assert {str(name) for name in posterior.data_vars} == set(expected)
    assert_agreement(posterior, expected)
    # the point values are the draws' means
    for name, values in fit.phi.items():
        assert values == pytest.approx(posterior[name].mean(("chain", "draw")).values, rel=1e-10)


@pytest.mark.slow
def test_rats_by_nuts_with_few_draws():
    """Joint sampling of two coefficients a task: means alone, of which few draws are enough."""
    model, tasks, expected = rats()
    fit = hb.full_bayes(model, tasks, "nuts", num_draws=800, num_warmup=500, seed=0, progress=False)
    assert_agreement(fit.datatree["posterior"].to_dataset(), expected, sds=False)


def test_eight_schools_with_few_draws():
    """The same comparison in seconds: 8,000 draws, means only."""
    model, tasks, expected = eight_schools()
    fit = hb.full_bayes(model, tasks, "collapsed", num_draws=2_000, seed=0, progress=False)
    assert_agreement(fit.datatree["posterior"].to_dataset(), expected, sds=False)
    assert fit.theta.values[:, 0] == pytest.approx(
        fit.datatree["posterior"]["theta"].mean(("chain", "draw")).values[:, 0], rel=1e-10
    )
