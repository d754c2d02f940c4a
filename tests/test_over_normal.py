"""Predictions of new rows, f being normal around a prior's mean: against dense integration.

The right value is a trapezium sum over 20,001 points, laid anew between the points where the
integrand has fallen by e^−60, so that it is fine wherever the integrand is large.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from assertions import close
from scipy import special, stats

import hierbayes as hb
from hierbayes.likelihoods import Bernoulli, Binomial, Gamma, NegativeBinomial, Poisson, StudentT

pytestmark = pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")


def dense(log_p: Any, m: float, s: float, also: Any = ()) -> float:
    """log ∫ p(y | f) N(f; m, s²) df."""
    f = np.concatenate([np.linspace(m - 40 * s - 60, m + 40 * s + 60, 10_001),
                        m + s * np.linspace(-40, 40, 10_001), np.asarray(also)])  # fmt: skip
    f = np.unique(f)
    for _ in range(60):
        height = log_p(f) - 0.5 * ((f - m) / s) ** 2
        held = np.flatnonzero(height > height.max() - 60)
        if len(held) > 5_000:
            break
        f = np.linspace(f[max(held[0] - 1, 0)], f[min(held[-1] + 1, len(f) - 1)], 20_001)
    height = log_p(f) - 0.5 * ((f - m) / s) ** 2
    p = np.exp(height - height.max())
    area = (0.5 * (p[1:] + p[:-1]) * np.diff(f)).sum()
    return float(height.max() + np.log(area) - np.log(s) - 0.5 * np.log(2 * np.pi))


def one(likelihood: Any, m: float, s: float, phi: Any = None, slots: Any = None) -> Any:
    phi = {name: np.array([[value]]) for name, value in (phi or {}).items()}
    slots = {name: np.array([value]) for name, value in (slots or {}).items()}
    return likelihood.predictive(np.array([[m]]), np.array([[s**2]]), phi, slots)


def right(found: Any, expected: float) -> None:
    """To 1e-7, of log densities beyond one relative to them: log Γ of 1e6 keeps as much."""
    close(found[0, 0], expected, rtol=1e-7, atol=1e-7)


SPREADS = (1e-6, 0.05, 0.6, 30.0)


@pytest.mark.parametrize("s", SPREADS)
@pytest.mark.parametrize("y", [0.0, 1.0, 300.0, 4e4, 1e6])
def test_counts_from_one_to_a_million(y, s):
    near = np.log(max(y, 0.5))
    for m in (near, near - 6 * s, near + 1.0, 5.0):
        found = one(Poisson(), m, s).logpmf(np.array([y]))
        right(
            found,
            dense(lambda f: y * f - np.exp(np.minimum(f, 700)) - special.gammaln(y + 1), m, s),
        )
    for size in (0.05, 1e3):
        base = -special.betaln(y + 1, size) - np.log(y + size)

        def log_p(f: Any, size: float = size, base: float = base) -> Any:
            odds = f - np.log(size)
            return base + y * odds - (y + size) * np.logaddexp(0.0, odds)

        found = one(NegativeBinomial(), near + s, s, {"concentration": size}).logpmf(np.array([y]))
        right(found, dense(log_p, near + s, s))


@pytest.mark.parametrize("s", SPREADS)
@pytest.mark.parametrize("trials", [1.0, 20.0, 5e3, 1e5])
def test_successes_of_many_trials(trials, s):
    for share in (0.0, 0.01, 1.0):
        y = np.floor(share * trials)
        ways = -special.betaln(trials - y + 1, y + 1) - np.log(trials + 1)
        for m in (-8.0, 0.0, float(special.logit((y + 0.5) / (trials + 1)))):
            found = one(Binomial(), m, s, slots={"trials": trials}).logpmf(np.array([y]))
            right(
                found, dense(lambda f, y=y, w=ways: w + y * f - trials * np.logaddexp(0, f), m, s)
            )
    for m in (-8.0, 0.3):
        chance = one(Bernoulli(), m, s).mean()
        close(chance[0, 0], np.exp(dense(lambda f: -np.logaddexp(0, -f), m, s)), rtol=1e-8)


@pytest.mark.parametrize("s", SPREADS)
@pytest.mark.parametrize("variation", [1e-3, 0.03, 1.0])
def test_amounts_of_any_variation(variation, s):
    a = variation**-2
    for y, m in ((3.0, 1.0), (1e6, np.log(1e6)), (0.01, -4.0 - s)):
        base = a * np.log(a) + (a - 1) * np.log(y) - special.gammaln(a)

        def log_p(f: Any, y: float = y, base: float = base) -> Any:
            return base - a * (f + y * np.exp(np.minimum(-f, 600)))

        right(one(Gamma(), m, s, {"shape": a}).logpdf(np.array([y])), dense(log_p, m, s))


@pytest.mark.parametrize("s", SPREADS)
@pytest.mark.parametrize(("sigma", "df"), [(1e-5, 4.0), (0.01, 1.0), (1.0, 30.0), (1.0, 1e4)])
def test_a_heavy_tail_may_have_two_modes(sigma, df, s):
    constant = special.gammaln((df + 1) / 2) - special.gammaln(df / 2)
    constant -= 0.5 * np.log(np.pi * df) + np.log(sigma)
    for r in (0.0, 3 * sigma, 8.0 * (s + sigma), 30.0):
        reach = np.arcsinh((80 * s + r) / sigma)
        also = 2 + r + sigma * np.sinh(np.linspace(-1, 1, 200_001) * reach)

        def log_p(f: Any, r: float = r) -> Any:
            return constant - (df + 1) / 2 * np.log1p(((2 + r - f) / sigma) ** 2 / df)

        found = one(StudentT(), 2.0, s, {"sigma": sigma, "df": df}).logpdf(np.array([2 + r]))
        # the points about y are as fine as these digits, where the two modes lie far apart
        close(found[0, 0], dense(log_p, 2.0, s, also), rtol=2e-6, atol=2e-6)


Z = np.linspace(-9, 9, 20_001)
W = np.exp(-0.5 * Z**2) / np.exp(-0.5 * Z**2).sum()
FAMILIES = {
    "Poisson": (Poisson(), {}, {}, lambda f: stats.poisson(np.exp(f))),
    "binomial": (Binomial(), {}, {"trials": 5e3}, lambda f: stats.binom(5000, special.expit(f))),
    "negative binomial": (NegativeBinomial(), {"concentration": 2.5}, {},
                          lambda f: stats.nbinom(2.5, 2.5 / (2.5 + np.exp(f)))),
    "gamma": (Gamma(), {"shape": 1e4}, {}, lambda f: stats.gamma(1e4, scale=np.exp(f) / 1e4)),
    "t": (StudentT(), {"sigma": 0.01, "df": 3.0}, {}, lambda f: stats.t(3.0, f, 0.01)),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("s", [1e-3, 0.6, 3.0, 40.0])
def test_quantiles_and_chances(name, s):
    """By 20,001 nodes of f: to 3e-4, which is the weight of the heaviest of them."""
    likelihood, phi, slots, at = FAMILIES[name]
    for m in (-3.0, 9.5):
        found = one(likelihood, m, s, phi, slots)
        for p in (0.025, 0.975):
            y = found.quantile(p)
            assert np.isfinite(y).all()
            if s > 5 and name != "t":
                continue  # rates that SciPy's own functions do not know
            upto = (W * at(m + s * Z).cdf(y)).sum()
            close(found.cdf(y)[0, 0], upto, rtol=0, atol=4e-4)
            assert upto > p - 4e-4
            below = y - 1 if likelihood.discrete else y * (1 - 1e-6)
            assert (W * at(m + s * Z).cdf(below)).sum() < p + 4e-4


def test_moments_are_those_of_many_draws():
    """Against 400,000 draws; five standard errors."""
    rng = np.random.default_rng(4)
    for likelihood, phi, slots, at in FAMILIES.values():
        if isinstance(likelihood, StudentT):
            continue  # of three degrees of freedom the squares have no variance
        found = one(likelihood, 1.0, 0.4, phi, slots)
        y = at(1.0 + 0.4 * rng.standard_normal(400_000)).rvs(random_state=rng)
        squares = (y - y.mean()) ** 2
        assert abs(found.mean()[0, 0] - y.mean()) < 5 * y.std() / np.sqrt(len(y))
        assert abs(found.var()[0, 0] - y.var()) < 5 * squares.std() / np.sqrt(len(y))


def test_intervals_of_counts_are_those_of_their_own_draws():
    """A mixture of draws of φ in some of which the rate is beyond what SciPy's ppf knows."""
    rng = np.random.default_rng(2)
    m, s = rng.normal(1.0, 1.0, (200, 1)), np.exp(rng.normal(0.8, 0.6, (200, 1)))
    components = Poisson().predictive(m, s**2, {}, {})
    tasks = hb.Tasks.from_arrays([(np.ones((1, 1)), [3.0])])
    found = hb.fit.Prediction("new task", tasks, components, np.zeros(1, bool))
    f = m + s * rng.standard_normal((200, 2000))
    y = rng.poisson(np.exp(np.minimum(f, 34.0)))
    low, high = found.interval(0.8)[:, 0]
    # the share of 400,000 draws, to five standard errors
    assert (y < low).mean() < 0.1 < (y <= low).mean() + 0.003
    assert abs((y <= high).mean() - 0.9) < 5 * np.sqrt(0.09 / y.size) + (y == high).mean()
    frame = found.to_dataframe()
    assert not frame.isna().any().any()


def test_known_rates_beyond_scipys_quantiles():
    """A Poisson of rate 1e21 is normal to 1e-10: its sd is 3e-11 of it."""
    tasks = hb.Tasks.from_arrays([(np.ones((1, 1)), [3.0])])
    found = hb.fit.Prediction(
        "known task", tasks, stats.poisson([[1e21], [1e21]]), np.zeros(1, bool)
    )
    close(found.interval(0.95)[:, 0], [1e21, 1e21], rtol=1e-9)


def test_a_new_task_at_a_point_phi():
    rng = np.random.default_rng(3)
    task = np.repeat(range(20), 5)
    y = rng.poisson(np.exp(rng.normal(9.5, 0.6, 20)[task]))
    frame = pd.DataFrame({"g": [f"t{k}" for k in task], "y": y})
    fit = hb.empirical_bayes(*hb.from_formula("y ~ 1 + (1 | g)", frame, family="poisson"))
    found = fit.predict(pd.DataFrame({"g": ["new"], "y": [40_000]}), target="new").log_density()
    m, s = float(fit.phi["mu"][0]), float(fit.phi["tau"][0])
    log_p = lambda f: 4e4 * f - np.exp(np.minimum(f, 700)) - special.gammaln(4e4 + 1)  # noqa: E731
    close(found[0], dense(log_p, m, s), rtol=1e-8)
