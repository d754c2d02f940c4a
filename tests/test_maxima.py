"""Every search for a maximum ends at one, or says that it has not.

Right numbers are profiles on fine grids, written out with NumPy and SciPy here, where tasks differ
much in precision and the evidence has several maxima.
"""

from __future__ import annotations

import functools
import warnings

import jax
import numpy as np
import pandas as pd
import pytest
from scipy import integrate, optimize, special, stats

import hierbayes as hb
from hierbayes.errors import InputError
from hierbayes.meta.first_look import look, sample_of
from hierbayes.meta.many_data_sets import maximise_many, of_outcomes

GRID = np.r_[0.0, 10.0 ** np.linspace(-12, 4, 2001)]


def fitted(model_and_tasks, *given, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        return hb.empirical_bayes(*model_and_tasks, *given, num_draws=1, num_chains=1, **settings)


def profile_of_means(y, se, *, reml=False):
    """The log evidence of y_j ~ N(μ, se_j² + τ²), μ maximised or integrated out, on the grid."""
    w = 1 / (se**2 + GRID[:, None])
    mu = (w * y).sum(1) / w.sum(1)
    value = -0.5 * (np.log(2 * np.pi / w) + w * (y - mu[:, None]) ** 2).sum(1)
    return value + 0.5 * (np.log(2 * np.pi) - np.log(w.sum(1))) * reml


def profile_of_slopes(x, y, g, weight, grid):
    """y_ij = (μ + u_j) x_ij + e_ij / √w_ij with σ and μ maximised out, at each τ/σ."""
    x, y, scale = x * np.sqrt(weight), y * np.sqrt(weight), 0.5 * np.log(weight).sum()
    xx, best = np.bincount(g, x * x), []
    for ratio in grid:
        h = ratio / (1 + ratio * xx)
        xy = np.bincount(g, x * y)
        mu = (xy.sum() - (h * xx * xy).sum()) / (xx.sum() - (h * xx**2).sum())
        r = y - mu * x
        squares = r @ r - (h * np.bincount(g, x * r) ** 2).sum()
        n = len(y)
        log_det = np.log1p(ratio * xx).sum()
        best.append(-0.5 * (n * np.log(2 * np.pi * squares / n) + n + log_det) + scale)
    return max(best)


def studies(y, se):
    frame = pd.DataFrame({"study": np.arange(len(y)), "y": y, "se": se})
    return hb.from_formula("y ~ 1 + (1 | study)", frame, known_se="se")


ONE_PRECISE = [0.0, 0.9, -0.8, 0.7, 1.1, -0.6]


@pytest.mark.parametrize("reml", [False, True])
@pytest.mark.parametrize("precise", [1e-1, 1e-2, 5e-3, 1e-4, 1e-6])
def test_one_precise_study(precise, reml):
    """The grid is so fine that its best lies 1e-4 nats below the maximum at most."""
    y, se = np.array(ONE_PRECISE), np.array([precise, *[0.3] * 5])
    found = fitted(studies(y, se), "reml" if reml else "ml")
    values = profile_of_means(y, se, reml=reml)
    assert found.log_evidence == pytest.approx(values.max(), abs=1e-4)
    assert found.phi["tau"][0] ** 2 == pytest.approx(GRID[values.argmax()], rel=0.02)


def test_one_precise_study_by_other_criteria():
    """MAP, and the bootstrap's refits, end no lower than ML's τ or zero would stand."""
    y, se = np.array(ONE_PRECISE), np.array([5e-3, *[0.3] * 5])
    model, tasks = studies(y, se)
    ml, at_mode = fitted((model, tasks)), fitted((model, tasks), "map")
    assert at_mode.phi["tau"][0] > ml.phi["tau"][0] > 0.5  # the density rises with τ
    rng = np.random.default_rng(0)
    outcomes = np.stack([y, *(rng.normal(0, np.hypot(0.6, se)) for _ in range(40))])
    many = maximise_many(of_outcomes(tasks, outcomes), model.shape(tasks), reml=False)
    best = [profile_of_means(row, se).max() for row in outcomes]
    assert (many.log_evidence >= np.array(best) - 1e-4).all()


@pytest.mark.parametrize("larger", [30.0, 1e3, 1e5])
def test_one_task_with_a_large_predictor(larger):
    rng = np.random.default_rng(18)
    g = np.repeat(np.arange(11), 6)
    x = rng.normal(size=66) * np.where(g == 0, larger, 1.0)
    y = (1 + 1.2 * rng.normal(size=11))[g] * x + rng.normal(size=66)
    found = fitted(hb.from_formula("y ~ 0 + x + (0 + x | g)", pd.DataFrame(dict(g=g, x=x, y=y))))
    best = profile_of_slopes(x, y, g, np.ones(66), 10.0 ** np.linspace(-12, 4, 1001))
    assert found.log_evidence >= best - 1e-6


def test_one_row_of_large_weight():
    rng = np.random.default_rng(3)
    g = np.repeat(np.arange(8), 4)
    weight = np.where(np.arange(32) == 0, 1e4, 1.0)
    y = rng.normal(0, 1.5, 8)[g] + rng.normal(size=32) / np.sqrt(weight)
    frame = pd.DataFrame(dict(g=g, y=y, weight=weight))
    found = fitted(hb.from_formula("y ~ 1 + (1 | g)", frame, weight="weight"))
    grid = np.r_[0.0, 10.0 ** np.linspace(-10, 5, 1001)]
    assert found.log_evidence >= profile_of_slopes(np.ones(32), y, g, weight, grid) - 1e-6


@pytest.mark.slow
def test_hostile_studies():
    """Precisions over five orders of magnitude, three studies or twelve."""
    rng = np.random.default_rng(5)
    for _ in range(25):
        num = int(rng.choice((3, 12)))
        se = 0.3 * 10 ** rng.uniform(-5, 0, num)
        y = rng.normal(0, 10 ** rng.uniform(-2, 1), num) + se * rng.normal(size=num)
        reml = bool(rng.integers(2))
        found = fitted(studies(y, se), "reml" if reml else "ml")
        assert found.log_evidence >= profile_of_means(y, se, reml=reml).max() - 1e-5


@pytest.mark.slow
def test_correlated_slopes_are_no_worse_than_any_smaller_model():
    """Of nested models the larger is at least as likely: τ = 0, no correlation, one τ alone."""
    rng = np.random.default_rng(2)
    for scale in (1.0, 300.0):
        g = np.repeat(np.arange(9), 5)
        x = rng.normal(size=45) * np.where(g == 1, scale, 1.0)
        y = rng.normal(size=9)[g] + rng.normal(size=9)[g] * x + 0.5 * rng.normal(size=45)
        frame = pd.DataFrame(dict(g=g, x=x, y=y))
        found = {
            bar: fitted(hb.from_formula(f"y ~ 1 + x + ({bar})", frame)).log_evidence
            for bar in ("1 + x | g", "1 + x || g", "1 | g", "0 + x | g")
        }
        assert found["1 + x | g"] >= max(found.values()) - 1e-6
        assert found["1 + x || g"] >= max(found["1 | g"], found["0 + x | g"]) - 1e-6


# -------------------------------------------------------- without a closed form


def log_marginal(log_density, mu, tau, rows_of):
    """Σ_j log ∫ exp(log_density(f)_j) N(f; μ, τ²) df by a fine trapezium rule around each mode."""
    total = 0.0
    for rows in rows_of:

        def joint(f, rows=rows):
            return log_density(np.atleast_1d(f), rows) + stats.norm(mu, tau).logpdf(f)

        edge = (mu - 12 * tau, mu + 12 * tau)
        coarse = np.linspace(*edge, 4001)
        at = coarse[np.argmax(joint(coarse))]
        step = coarse[1] - coarse[0]
        peak = optimize.minimize_scalar(
            lambda f: -joint(f)[0], bounds=(at - step, at + step), method="bounded",
            options={"xatol": 1e-13},
        ).x  # fmt: skip
        h = 1e-4 * step
        bend = (2 * joint(peak) - joint(peak + h) - joint(peak - h))[0] / h**2
        width = 1 / np.sqrt(max(bend, 1 / tau**2))
        f = peak + width * np.linspace(-12, 12, 2001)
        values = joint(f)
        top = values.max()
        total += top + np.log(integrate.trapezoid(np.exp(values - top), f))
    return total


@pytest.mark.parametrize(
    ("evidence", "size"),
    [("quadrature", 1e9), *(pytest.param(*cell, marks=pytest.mark.slow)
                            for cell in (("quadrature", 1e7), ("laplace", 1e7), ("laplace", 1e9)))],
)  # fmt: skip
def test_large_counts(evidence, size):
    """So many that a task's rate is known: τ̂ is the standard deviation of the tasks' log means.

    What the counts leave open of a log rate, 1 / √(5 · 1e7), is 1e-4 of τ, and its square 1e-8.
    """
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(20), 5)
    y = rng.poisson(size * np.exp(0.1 * rng.normal(size=20)[g])).astype(float)
    found = fitted(
        hb.from_formula("y ~ 1 + (1 | g)", pd.DataFrame(dict(g=g, y=y)), family="poisson"),
        evidence=evidence,
    )
    means = np.log(np.bincount(g, y) / 5)
    assert found.phi["tau"][0] == pytest.approx(means.std(), rel=1e-4)
    assert found.phi["mu"][0] == pytest.approx(means.mean(), abs=1e-4)
    assert found.standard_errors["tau"][0] == pytest.approx(means.std() / np.sqrt(40), rel=1e-3)


@pytest.mark.slow
def test_gamma_outcomes_with_little_spread():
    """A coefficient of variation of 0.1 %: log outcomes are normal, but for 1e-3 of σ."""
    rng = np.random.default_rng(1)
    g = np.repeat(np.arange(12), 6)
    y = np.exp(3 + 0.2 * rng.normal(size=12)[g]) * rng.gamma(1e6, size=72) / 1e6
    frame = pd.DataFrame(dict(g=g, y=y, log=np.log(y)))
    found = fitted(hb.from_formula("y ~ 1 + (1 | g)", frame, family="gamma"))
    normal = fitted(hb.from_formula("log ~ 1 + (1 | g)", frame))
    assert found.phi["tau"][0] == pytest.approx(normal.phi["tau"][0], rel=1e-3)
    assert float(found.phi["shape"]) ** -0.5 == pytest.approx(float(normal.phi["sigma"]), rel=1e-2)
    assert np.isfinite(found.standard_errors["tau"]).all()


@pytest.mark.slow
def test_one_large_binomial():
    """One n of 20,000 among small ones: the best of a grid of τ with μ by SciPy, or better."""
    n = np.array([20000.0, 3, 5, 4, 6, 2])
    y = np.array([9000.0, 2, 0, 4, 3, 1])
    frame = pd.DataFrame(dict(g=np.arange(6), y=y, n=n))
    model_and_tasks = hb.from_formula("p(y, n) ~ 1 + (1 | g)", frame)
    found = fitted(model_and_tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        pooled = hb.complete_pooling(*model_and_tasks)
    assert found.log_evidence >= pooled.log_evidence - 1e-6

    def log_density(f, rows):
        j = rows
        ways = special.gammaln(n[j] + 1) - special.gammaln(y[j] + 1)
        ways -= special.gammaln(n[j] - y[j] + 1)
        return ways + y[j] * f - n[j] * np.logaddexp(0.0, f)

    best = max(
        -optimize.minimize_scalar(
            lambda mu, tau=tau: -log_marginal(log_density, mu, tau, range(6)),
            bounds=(-1.5, 1.0), method="bounded", options={"xatol": 1e-3},
        ).fun
        for tau in (0.1, 0.3, 0.6)
    )  # fmt: skip
    assert found.log_evidence >= best - 1e-4


def test_densities_of_large_counts_are_exact():
    """Against closed forms at the maximum, log p = −½ log 2πy − 1/12y, and SciPy's elsewhere."""

    @functools.partial(jax.jit, static_argnums=0)
    def log_prob(likelihood, f, phi, y):
        return likelihood.family(f, phi, {}).log_prob(y)

    with hb.numerics.float64():
        at_peak = log_prob(hb.likelihoods.Poisson(), np.log([1e9, 3.0]), {}, np.array([1e9, 3.0]))
    assert at_peak[0] == pytest.approx(-0.5 * np.log(2 * np.pi * 1e9) - 1 / 12e9, abs=1e-12)
    assert at_peak[1] == pytest.approx(stats.poisson(3.0).logpmf(3), abs=1e-13)
    y, f = np.array([0.0, 1, 7, 300]), np.array([-1.0, 0.4, 2.5, 5.5])
    for size in (0.4, 3.0, 200.0):
        with hb.numerics.float64():
            counts, amounts = hb.likelihoods.NegativeBinomial(), hb.likelihoods.Gamma()
            found = (
                log_prob(counts, f, {"concentration": size}, y),
                log_prob(amounts, f, {"shape": size}, y + 0.5),
            )
        mean = np.exp(f)
        exact = stats.nbinom(size, size / (size + mean)).logpmf(y)
        assert found[0] == pytest.approx(exact, rel=1e-10)
        assert found[1] == pytest.approx(
            stats.gamma(size, scale=mean / size).logpdf(y + 0.5), 1e-10
        )


# -------------------------------------------------------- nothing to maximise


@pytest.mark.slow
def test_groups_that_are_all_or_nothing_have_no_maximum():
    frame = pd.DataFrame(dict(g=np.arange(8), n=10, y=[0, 0, 0, 0, 10, 10, 10, 10]))
    model, tasks = hb.from_formula("p(y, n) ~ 1 + (1 | g)", frame)
    with pytest.raises(InputError, match=r"no maximum.*tau goes to infinity"):
        fitted((model, tasks))
    mixed = frame.assign(y=[0, 0, 0, 3, 10, 10, 10, 10])
    found = fitted(hb.from_formula("p(y, n) ~ 1 + (1 | g)", mixed))
    assert np.isfinite(found.phi["tau"]).all()


@pytest.mark.slow
def test_a_shared_column_that_separates_is_named():
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(12), 8)
    x = rng.normal(size=96)
    frame = pd.DataFrame(dict(g=g, x=x, y=(x > 0.1).astype(float)))
    with pytest.warns(hb.FitWarning, match="'x' runs to infinity"):
        hb.empirical_bayes(*hb.from_formula("y ~ 1 + x + (1 | g)", frame, family="bernoulli"))


@pytest.mark.parametrize(
    "family",
    [
        "gaussian",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("poisson", "bernoulli", "gamma")),
    ],
)
@pytest.mark.parametrize("alike", [False, True])
def test_without_fixed_effects(family, alike):
    """``y ~ 0 + (1 | g)`` has no columns beside the tasks' own, whether τ̂ is zero or not."""
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(20), 6)
    u = 0.0 * g if alike else rng.normal(size=20)[g]
    y = {
        "gaussian": u + rng.normal(size=120), "poisson": rng.poisson(np.exp(u)),
        "bernoulli": rng.integers(0, 2, 120), "gamma": np.exp(u) * rng.gamma(4.0, 0.25, 120),
    }[family]  # fmt: skip
    frame = pd.DataFrame(dict(g=g, y=np.asarray(y, float)))
    model, tasks = hb.from_formula("y ~ 0 + (1 | g)", frame, family=family)
    criteria = ["ml", "map"] + ["reml"] * (family == "gaussian")
    for criterion in criteria:
        found = fitted((model, tasks), criterion)
        assert found.phi["mu"].tolist() == [0.0]
        assert np.isfinite(found.log_evidence)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        assert np.isfinite(hb.complete_pooling(model, tasks).log_evidence)
        hb.no_pooling(model, tasks)
    if family == "gaussian":
        found = fitted((model, tasks))
        same = g[:, None] == g

        def minus(p):
            covariance = np.exp(p[0]) * np.eye(120) + np.exp(p[1]) * same
            return -stats.multivariate_normal(np.zeros(120), covariance).logpdf(y)

        best = optimize.minimize(minus, [0.0, -1.0], method="Nelder-Mead")
        assert found.log_evidence >= -best.fun - 1e-6


# -------------------------------------------------------- what it costs


@pytest.mark.slow
def test_the_simulation_of_coverage_is_left_out_where_it_would_cost_more_than_the_fit():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(600, 60)), columns=[f"v{i}" for i in range(60)])
    columns = " + ".join(frame)
    frame = frame.assign(g=rng.integers(0, 150, 600), y=rng.normal(size=600))
    with pytest.warns(hb.FitWarning, match="interval_coverage simulates"):
        hb.empirical_bayes(*hb.from_formula(f"y ~ {columns} + (1 | g)", frame))


def test_the_first_look_does_not_depend_on_a_predictors_origin_or_unit():
    from hierbayes.evidence.profile import profile_problem
    from hierbayes.statistics import statistics

    rng = np.random.default_rng(1)
    g = np.repeat(np.arange(12), 6)
    x = rng.normal(size=72)
    y = rng.normal(size=12)[g] + rng.normal(size=12)[g] * x + rng.normal(size=72)
    seen = []
    for moved in (x, 1e4 * x, x + 300.0):
        frame = pd.DataFrame(dict(g=g, x=moved, y=y))
        model, tasks = hb.from_formula("y ~ 1 + x + (1 + x | g)", frame)
        shape = model.shape(tasks)
        problem = profile_problem(statistics(tasks), shape, reml=False, known_noise=False)
        seen.append(float(look(sample_of(problem)[0], shape.blocks).loss[0]))
    assert seen[1] == pytest.approx(seen[0], abs=1e-6)
    assert seen[2] == pytest.approx(seen[0], abs=0.5)  # its grid is turned, not the same
