"""Without a family an outcome that is probably no Gaussian one is fitted as such, with a word."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

import hierbayes as hb
from hierbayes.errors import FitWarning

RNG = np.random.default_rng(5)
TASK = np.repeat(np.arange(12), 8)


def hints(outcome, formula="y ~ 1 + (1 | g)", **options) -> list[str]:
    rows = pd.DataFrame({"g": TASK, "y": outcome, "n": 30, "se": 1.0})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FitWarning)
        model, _ = hb.from_formula(formula, rows, **options)
    if "family" not in options and not formula.startswith("p("):
        assert isinstance(model.likelihood, hb.likelihoods.Gaussian), "a hint changes no fit"
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("outcome", "family"),
    [
        (RNG.integers(2, size=96), "bernoulli"),
        (RNG.random(96) < 0.3, "bernoulli"),
        (RNG.integers(2, size=96).astype(float), "bernoulli"),
        (RNG.poisson(0.5, size=96), "poisson"),
        (RNG.poisson(3, size=96), "poisson"),
        (1 + RNG.poisson(7, size=96), "poisson"),  # no zero among them
        (RNG.poisson(np.exp(1 + RNG.normal(size=12)[TASK])), "negative_binomial"),
        (RNG.poisson(RNG.gamma(0.5, 200, size=96)), "negative_binomial"),
    ],
)
def test_the_family_that_is_probably_meant_is_named(outcome, family):
    (said,) = hints(outcome)
    assert f'family="{family}"' in said
    assert "'y'" in said
    assert hints(outcome, family="gaussian") == []
    assert hints(outcome, family=hb.likelihoods.Gaussian()) == []
    assert hints(outcome, known_se="se") == []
    if family != "bernoulli":
        assert hints(outcome, family="poisson") == []


@pytest.mark.parametrize(
    "outcome",
    [
        RNG.normal(size=96),
        np.round(RNG.normal(0, 10, size=96)),  # as of eight schools: differences
        np.round(RNG.normal(120, 15, size=96)),  # blood pressures
        np.round(RNG.normal(70, 9, size=96)),  # pulses
        np.round(RNG.normal(300, 60, size=96)),  # reaction times
        np.round(RNG.lognormal(10, 1, size=96)),  # incomes
        np.clip(np.round(RNG.normal(3.4, 1.1, size=96)), 1, 5),  # ratings from 1 to 5
        RNG.integers(1, 3, size=96),  # codes of two categories
        RNG.poisson(3, size=96) / 2,
        -RNG.poisson(3, size=96),
    ],
)
def test_measurements_in_whole_units_are_no_counts(outcome):
    assert hints(outcome) == []


def test_successes_of_trials_need_no_hint():
    assert hints(RNG.binomial(30, 0.2, size=96), "p(y, n) ~ 1 + (1 | g)") == []


@pytest.mark.parametrize("name", ["radon", "rats", "sleepstudy", "eight_schools"])
def test_data_that_ship_need_no_hint(name):
    from hierbayes.datasets import CATALOGUE

    known = CATALOGUE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FitWarning)
        hb.from_formula(known.formula, known.load(), known_se=known.known_se)
