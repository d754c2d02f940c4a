"""Priors that would be ignored, or that allow what cannot be, are refused by name."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from assertions import refuses
from numpyro.distributions import transforms

import hierbayes as hb


@cache
def tasks() -> hb.Tasks:
    rng = np.random.default_rng(0)
    return hb.Tasks.from_arrays([(rng.normal(size=(5, 2)), rng.normal(size=5)) for _ in range(4)])


def hyperpriors(likelihood: Any = None, **stated: Any) -> dict[str, Any]:
    """p(φ) by name under a HyperPrior."""
    model = hb.HierarchicalModel(
        likelihood or hb.likelihoods.Gaussian(), hb.priors.Gaussian(), hb.HyperPrior(**stated)
    )
    return model.phi_distributions(tasks())


HALF = dist.HalfNormal(1.0)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"extra": {"sigma": HALF}}, ("'sigma'", "HyperPrior(sigma=…)")),
        ({"extra": {"tau": HALF}}, ("'tau'", "HyperPrior(tau=…)")),
        ({"extra": {"sgima": HALF}}, ("'sgima'", "no parameter of the Gaussian")),
        ({"tau": dist.Normal(0.0, 1.0)}, ("tau", "Normal", "negative")),
        ({"sigma": dist.Normal(0.0, 1.0)}, ("sigma", "Normal", "negative")),
        ({"tau": dist.Uniform(-0.1, 2.0)}, ("tau", "negative")),
        ({"tau": dist.Uniform(-3.0, -2.9)}, ("tau", "negative")),
        ({"tau": {"x1": dist.Cauchy(0.0, 1.0)}}, ("tau", "'x1'", "negative")),
        ({"tau": dist.TruncatedNormal(0.0, 1.0, low=-1e-3)}, ("tau", "negative")),
        ({"tau": dist.Poisson(3.0)}, ("tau", "discrete")),
        ({"tau": dist.Normal(np.zeros(2), 1.0).to_event(1)}, ("tau", "negative")),
        ({"sigma": {"sigma": HALF}}, ("sigma", "mapping")),
        ({"sigma": dist.HalfNormal(np.ones(3))}, ("sigma", "(3,)")),
        ({"corr": {"a": dist.LKJ(2, 1.0)}}, ("corr", "LKJ")),
        ({"corr": dist.Normal(0.0, 1.0)}, ("corr", "correlation matrix")),
        ({"corr": dist.LKJ(3, 1.0)}, ("corr", "(3, 3)")),
        ({"corr": float("nan")}, ("corr", "nan")),
        ({"corr": True}, ("corr", "True")),
        ({"mu": dist.Normal(np.zeros(3), 1.0)}, ("mu", "(3,)")),
        ({"mu": {"x0": dist.Normal(np.zeros(2), 1.0)}}, ("mu", "'x0'", "(2,)")),
        ({"mu": {1: dist.Normal(0.0, 1.0)}}, ("mu", "1")),
        ({"mu": dist.Normal}, ("mu", "class Normal")),
        ({"mu": dist.Normal(np.nan, 1.0, validate_args=False)}, ("mu", "loc", "nan")),
        ({"extra": 3}, ("extra", "3")),
    ],
)
def test_a_prior_that_cannot_be_is_refused_by_name(stated, words):
    with refuses(*words):
        hyperpriors(**stated)


def test_a_name_stands_beside_others_that_are_all_there():
    every = {"mu": dist.Normal(0, 1), "tau": HALF, "sigma": HALF, "corr": 1.0}
    with refuses("'y'", "no mu"):
        hyperpriors(**(every | {"mu": dict.fromkeys(["x0", "x1", "y"], dist.Normal(0.0, 1.0))}))


def test_own_parameters_of_a_family_are_positive_and_known():
    counts = hb.likelihoods.NegativeBinomial()
    with refuses("'concentration'", "negative"):
        hyperpriors(counts, extra={"concentration": dist.Normal(0.0, 1.0)})
    with refuses("'shape'", "known: 'concentration'"):
        hyperpriors(counts, extra={"shape": HALF})
    with refuses("'df'", "StudentT"):
        hyperpriors(hb.likelihoods.StudentT(df=4.0), extra={"df": HALF})


def test_none_is_the_default_wherever_it_stands():
    def densities(found: dict[str, Any]) -> dict[str, float]:
        parts = {n: b for n, b in found.items() if n != "corr"}
        return jax.tree.map(
            float, jax.jit(lambda: {n: b.log_prob(b.mean).sum() for n, b in parts.items()})()
        )

    plain = hyperpriors()
    for stated in ({"mu": {"x0": None}}, {"extra": None}, {"extra": {"nu": None}}, {"sigma": None}):
        found = hyperpriors(**stated)
        assert densities(found) == densities(plain)


def test_priors_of_what_is_positive_are_taken():
    """The standard deviation of a variance, truncation at zero, and vectors of the right size."""
    variance = dist.TransformedDistribution(
        dist.InverseGamma(1.0, 1.0), transforms.PowerTransform(0.5)
    )
    for tau in (variance, dist.TruncatedNormal(1.0, 1.0, low=0.0), dist.HalfNormal(np.ones(2)),
                dist.Gamma(2.0, 1.0), dist.ImproperUniform(dist.constraints.positive, (), ()),
                {"x0": dist.HalfCauchy(1.0)}):  # fmt: skip
        assert hyperpriors(tau=tau)["tau"].event_shape == (2,)
    assert float(hyperpriors(corr=np.float32(3.0))["corr"].concentration) == 3.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"likelihood": hb.likelihoods.Gaussian}, ("likelihood", "class Gaussian")),
        ({"likelihood": "gaussian"}, ("likelihood", "'gaussian'")),
        ({"prior": hb.likelihoods.Gaussian()}, ("prior", "Gaussian(known_se=False)")),
        ({"prior": None}, ("prior", "None")),
        ({"hyperprior": {"mu": HALF}}, ("hyperprior", "HyperPrior")),
    ],
)
def test_a_model_of_the_wrong_parts_is_refused_by_name(arguments, words):
    sound = {"likelihood": hb.likelihoods.Gaussian(), "prior": hb.priors.Gaussian()}
    with refuses(*words):
        hb.HierarchicalModel(**(sound | arguments))


@pytest.mark.parametrize("given", [3, "Intercept", ["Intercept", "x"], None])
def test_groups_of_correlated_coefficients_are_groups(given):
    with refuses("correlated"):
        hb.priors.Gaussian(correlated=given)
