"""Intervals of θ that count what is not known of φ̂, and what is said of those that do not.

Rung (a): Morris's closed form. Rung (b): mixtures and delta methods in NumPy. Rung (d): coverage,
beside the table in ``benchmarks/coverage.py``.
"""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from assertions import close, monte_carlo, refuses
from scipy import stats

import hierbayes as hb
from hierbayes.meta import intervals as expected
from hierbayes.meta.intervals import morris

QUIET = dict(num_draws=1, num_chains=1)


def quietly(model, tasks, *args, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        return hb.empirical_bayes(model, tasks, *args, **arguments)


def normal_means(y, se=1.0):
    data = pd.DataFrame({"g": [f"t{k:02d}" for k in range(len(y))], "y": y, "se": se})
    return hb.from_formula("y ~ 1 + (1 | g)", data, known_se="se")


Y = np.array([-1.2, 0.3, 2.9, 1.1, -0.4, 4.0, 0.8])


@pytest.fixture(scope="module")
def means():
    return normal_means(Y, 1.1)


@pytest.fixture(scope="module")
def slopes():
    """Eleven tasks with slopes, a shared column, noise to be learned; τ̂ inside, correlation too."""
    rng = np.random.default_rng(12)
    g = np.repeat(np.arange(11), 8)
    x, z = rng.normal(size=(2, 88))
    theta = [1.0, -0.5] + rng.normal(size=(11, 2)) @ np.array([[0.9, 0.3], [0.0, 0.5]])
    y = theta[g, 0] + theta[g, 1] * x + 0.4 * z + 0.7 * rng.normal(size=88)
    data = pd.DataFrame({"g": g, "x": x, "z": z, "y": y})
    return hb.from_formula("y ~ 1 + x + z + (1 + x | g)", data)


@pytest.fixture(scope="module")
def mixed(slopes):
    return quietly(*slopes, intervals="bootstrap", num_bootstrap=60, num_draws=2000, seed=3)


# --------------------------------------------------------------------------- Morris


def test_morris_by_hand(means):
    """J = 7, V = 1.21: S = Σ (y − ȳ)² = 20.5971…, B̂ = (4/6) V / (S / 6)."""
    fit = quietly(*means, "reml", intervals="morris", num_draws=4000)
    v, squares = 1.21, ((Y - Y.mean()) ** 2).sum()
    b = 4 * v / squares
    assert v < squares / 6
    close(fit.phi["tau"][0] ** 2, squares / 6 - v, rtol=1e-7)
    close(fit.theta.values[:, 0], (1 - b) * Y + b * Y.mean())
    variance = v * (1 - 6 / 7 * b) + 0.5 * b**2 * (Y - Y.mean()) ** 2
    close(fit.adapted.sd.values[:, 0], np.sqrt(variance))
    assert fit.info["intervals"] == "morris"
    close(fit.summary("theta")["se"], np.sqrt(variance))
    close(fit.predict().sd, np.sqrt(variance + v))
    drawn = fit.datatree["posterior"]["theta"].values
    monte_carlo(drawn[:, :, 2, 0], float(fit.theta[2, 0]), float(np.sqrt(variance[2])))
    # his τ̂² is REML's whatever the fit's criterion, and never below zero
    close(quietly(*means, intervals="morris", **QUIET).theta.values, fit.theta.values)
    close(morris(np.array([1.0, 1.1, 0.9, 1.0, 1.0]), 1.0)[1], 1 - 0.8 * 0.5 + np.array(
        [0, 0.01, 0.01, 0, 0]) * 0.25)  # fmt: skip


def test_morris_of_tasks_with_several_rows():
    """Three rows with standard error √3 each are one with standard error 1."""
    data = pd.DataFrame({"g": np.repeat(np.arange(7), 3), "y": np.repeat(Y, 3), "se": np.sqrt(3.0)})
    data["y"] += np.tile([-0.5, 0.5, 0.0], 7)
    many = quietly(*hb.from_formula("y ~ 1 + (1 | g)", data, known_se="se"), intervals="morris",
                   **QUIET)  # fmt: skip
    one = quietly(*normal_means(Y), intervals="morris", **QUIET)
    close(many.theta.values, one.theta.values)
    close(many.adapted.sd.values, one.adapted.sd.values)


def test_morris_is_refused_elsewhere(slopes, means):
    with refuses("morris", "'Intercept', 'x'"):
        hb.empirical_bayes(*slopes, intervals="morris")
    with refuses("different variances", "bootstrap"):
        hb.empirical_bayes(*normal_means(Y, np.linspace(1, 2, 7)), intervals="morris")
    with refuses("3 tasks", "4"):
        hb.empirical_bayes(*normal_means(Y[:3]), intervals="morris")
    model, tasks = means
    with refuses("tasks without rows", "bootstrap"):
        hb.empirical_bayes(model, tasks.keep_rows(np.arange(7) < 5), intervals="morris")
    with refuses("3 tasks with rows", "4"):
        hb.empirical_bayes(model, tasks.keep_rows(np.arange(7) < 3), intervals="morris")
    data = pd.DataFrame({"g": np.repeat(np.arange(7), 3), "y": np.arange(21.0)})
    with refuses("not known"):
        hb.empirical_bayes(*hb.from_formula("y ~ 1 + (1 | g)", data), intervals="morris")
    with refuses("map", "reml"):
        hb.empirical_bayes(*means, "map", intervals="morris")


def test_other_refusals(means):
    with refuses("intervals", '"plain"', "'wide'"):
        hb.empirical_bayes(*means, intervals="wide")
    with refuses("num_bootstrap", "1"):
        hb.empirical_bayes(*means, intervals="bootstrap", num_bootstrap=1)
    with refuses("map", "bootstrap"):
        hb.empirical_bayes(*means, "map", intervals="bootstrap")
    with refuses("reml", "information"):
        hb.empirical_bayes(*means, "reml", intervals="kass-steffey")
    counts = pd.DataFrame({"g": np.repeat(np.arange(5), 3), "y": np.arange(15)})
    poisson = hb.from_formula("y ~ 1 + (1 | g)", counts, family="poisson")
    with refuses("Gaussian", "kass-steffey"):
        hb.empirical_bayes(*poisson, intervals="bootstrap")


# ------------------------------------------------------------------------ bootstrap


def dense_posterior(tasks, j, phi):
    """θ_j given D_j and φ, from precisions of rows."""
    rows = tasks.task_of_row == j
    x, y = tasks.predictors[rows], tasks.outcome[rows] - tasks.shared[rows] @ phi["beta"]
    prior = np.linalg.inv(phi["corr"] * np.outer(phi["tau"], phi["tau"]))
    covariance = np.linalg.inv(prior + x.T @ x / phi["sigma"] ** 2)
    return covariance @ (prior @ phi["mu"] + x.T @ y / phi["sigma"] ** 2), covariance


def test_bootstrap_is_the_mixture(slopes, mixed):
    _, tasks = slopes
    assert mixed.info["intervals"] == "bootstrap"
    assert {n: v.shape[0] for n, v in mixed.phi_bootstrap.items()} == dict.fromkeys(mixed.phi, 60)
    inside = [b for b in range(60) if abs(mixed.phi_bootstrap["corr"][b, 0, 1]) < 0.999
              and (mixed.phi_bootstrap["tau"][b] > 0).all()]  # fmt: skip
    assert len(inside) > 40
    phis = [{n: v[b] for n, v in mixed.phi_bootstrap.items()} for b in range(60)]
    for b in set(range(60)) - set(inside):  # at ±1, or without spread: by a limit
        eye = np.eye(2)
        phis[b]["tau"] = np.maximum(phis[b]["tau"], 1e-5)
        phis[b]["corr"] = phis[b]["corr"] * (1 - 1e-8) + 1e-8 * eye
    for j in (0, 7):
        each = [dense_posterior(tasks, j, phi) for phi in phis]
        centres = np.array([m for m, _ in each])
        covariance = np.mean([c for _, c in each], axis=0) + np.cov(centres.T, bias=True)
        close(mixed.theta.values[j], centres.mean(0), rtol=1e-5, atol=1e-6)
        close(mixed.adapted.covariance.values[j], covariance, rtol=1e-4, atol=1e-6)
        drawn = mixed.datatree["posterior"]["theta"].values[:, :, j]
        for k in range(2):
            sd = float(np.sqrt(covariance[k, k]))
            monte_carlo(drawn[..., k], float(centres[:, k].mean()), sd, share=0.05)
        rows = np.flatnonzero(tasks.task_of_row == j)[:2]
        found = np.exp(mixed.predict().log_density()[rows])
        for row, density in zip(rows, found, strict=True):
            x, total = tasks.predictors[row], 0.0
            for phi, (m, c) in zip(phis, each, strict=True):
                centre = x @ m + tasks.shared[row] @ phi["beta"]
                sd = np.sqrt(x @ c @ x + phi["sigma"] ** 2)
                total += stats.norm.pdf(tasks.outcome[row], centre, sd) / 60
            close(density, total, rtol=1e-4)
    plain = quietly(*slopes, **QUIET)
    assert (mixed.adapted.sd.values.mean(0) > plain.adapted.sd.values.mean(0)).all()
    close(mixed.phi["tau"], plain.phi["tau"], rtol=1e-12)


def test_bootstrap_of_new_tasks_is_the_mixture_too(slopes, mixed):
    """Adapting to the training rows as if new gives the training posterior again."""
    again = mixed.adapt(slopes[1])
    close(again.theta.values, mixed.theta.values, rtol=1e-10)
    close(again.covariance.values, mixed.adapted.covariance.values, rtol=1e-8, atol=1e-12)
    close(again.predict(slopes[1]).sd, mixed.predict().sd, rtol=1e-10)
    close(mixed.on(slopes[1]).theta.values, mixed.theta.values, rtol=1e-10)


@pytest.mark.slow
def test_bootstrap_refits_scatter_around_the_fit(slopes):
    """μ* and σ* have φ̂ as their centre and its standard errors as their spread.

    Within 4.5 standard errors of 400 refits; the spread to 15 %, of which 4 % are Monte Carlo.
    """
    fit = quietly(*slopes, intervals="bootstrap", num_bootstrap=400, **QUIET)
    for name in ("mu", "beta"):
        found, se = fit.phi_bootstrap[name], fit.standard_errors[name]
        assert (np.abs(found.mean(0) - fit.phi[name]) < 4.5 * se / 20).all()
        close(found.std(0), se, rtol=0.15)


def test_one_seed_one_mixture(means):
    a, b = (quietly(*means, intervals="bootstrap", seed=5, num_draws=3) for _ in range(2))
    close(a.theta.values, b.theta.values, rtol=0)
    close(a.theta_draws, b.theta_draws, rtol=0)
    other = quietly(*means, intervals="bootstrap", seed=6, **QUIET)
    assert np.abs(a.theta.values - other.theta.values).max() > 1e-6


@pytest.mark.parametrize("intervals", ["bootstrap", "morris", "kass-steffey"])
def test_saved_and_loaded(intervals, means, tmp_path):
    fit = quietly(*means, intervals=intervals, num_draws=4)
    fit.save(tmp_path / "fit.nc")
    again = hb.load(tmp_path / "fit.nc")
    assert again.info["intervals"] == intervals
    close(again.theta.values, fit.theta.values, rtol=0)
    close(again.adapted.sd.values, fit.adapted.sd.values, rtol=0)
    close(again.predict().log_density(), fit.predict().log_density(), rtol=1e-12)
    close(again.theta_draws, fit.theta_draws, rtol=0)
    if intervals == "bootstrap":
        assert again.info["num_bootstrap"] == 200
        assert list(again.phi_bootstrap) == list(fit.phi_bootstrap)
        close(again.phi_bootstrap["tau"], fit.phi_bootstrap["tau"], rtol=0)
    else:
        assert again.phi_bootstrap is None
        assert "num_bootstrap" not in again.info


# --------------------------------------------------------------------- Kass–Steffey


def test_kass_steffey_is_the_delta_method():
    """V_j + g I⁻¹ gᵀ for normal means, g and I by differences of m_j and of the log evidence."""
    y, se = Y, np.linspace(0.6, 1.4, 7)
    fit = quietly(*normal_means(y, se), intervals="kass-steffey", **QUIET)
    mu, tau = float(fit.phi["mu"][0]), float(fit.phi["tau"][0])
    assert tau > 0.5

    def loss(p):
        return -stats.norm.logpdf(y, p[0], np.sqrt(se**2 + p[1] ** 2)).sum()

    def means_at(p):
        return p[0] + p[1] ** 2 / (p[1] ** 2 + se**2) * (y - p[0])

    h, at, eye = 1e-3, np.array([mu, tau]), np.eye(2)
    information = np.array([[
        (loss(at + h * (a + b)) - loss(at + h * (a - b)) - loss(at - h * (a - b))
         + loss(at - h * (a + b))) / (4 * h * h) for a in eye] for b in eye])  # fmt: skip
    slope = np.stack([(means_at(at + h * a) - means_at(at - h * a)) / (2 * h) for a in eye])
    more = np.einsum("pj,pq,qj->j", slope, np.linalg.inv(information), slope)
    variance = tau**2 * se**2 / (tau**2 + se**2) + more
    # central differences with h = 1e-3 are right to h² = 1e-6
    close(fit.adapted.sd.values[:, 0], np.sqrt(variance), rtol=1e-5)
    close(fit.theta.values[:, 0], means_at(at), rtol=1e-9)
    # the same mechanism as the standard errors of an ordinary fit, and not counted twice
    plain = quietly(*normal_means(y, se), **QUIET)
    errors = hb.checks.theta_standard_errors(plain).values
    close(fit.adapted.sd.values, errors, rtol=1e-10)
    close(hb.checks.theta_standard_errors(fit).values, errors, rtol=1e-10)
    assert fit.on(fit.tasks).info["intervals"] == "plain"


@pytest.mark.slow
def test_kass_steffey_off_the_diagonal(slopes):
    """The covariance added is a whole matrix: xᵀ C x for predictions, positive semidefinite."""
    fit, plain = (quietly(*slopes, intervals=k, **QUIET) for k in ("kass-steffey", "plain"))
    more = fit.adapted.covariance.values - plain.adapted.covariance.values
    assert (np.linalg.eigvalsh(more) > -1e-12).all()
    assert np.abs(more[:, 0, 1]).max() > 1e-6
    errors = hb.checks.theta_standard_errors(plain).values
    close(fit.adapted.sd.values, errors, rtol=1e-10)


@pytest.mark.slow
def test_kass_steffey_of_counts():
    rng = np.random.default_rng(3)
    g = np.repeat(np.arange(12), 5)
    y = rng.poisson(np.exp(1.0 + 0.6 * rng.normal(size=12))[g])
    model, tasks = hb.from_formula(
        "y ~ 1 + (1 | g)", pd.DataFrame({"g": g, "y": y}), family="poisson"
    )
    fit, plain = (quietly(model, tasks, intervals=k, **QUIET) for k in ("kass-steffey", "plain"))
    close(fit.adapted.sd.values, hb.checks.theta_standard_errors(plain).values, rtol=1e-9)


def test_kass_steffey_at_the_boundary_says_what_it_leaves_out():
    """With τ̂ = 0 only μ's standard error is counted: 1 / √J."""
    y = np.array([0.1, -0.1, 0.2, 0.0, -0.2, 0.1, -0.1])
    with pytest.warns(hb.FitWarning, match="counts nothing of tau for 'Intercept'"):
        fit = hb.empirical_bayes(*normal_means(y), intervals="kass-steffey", **QUIET)
    assert fit.phi["tau"][0] == 0
    close(fit.adapted.sd.values[:, 0], np.full(7, 1 / np.sqrt(7)), rtol=1e-9)


# ---------------------------------------------------------------- expected coverage


def test_the_warning_tells_the_expected_coverage(means):
    """As simulated with 20,000 data sets by the public check: 400 are right to 0.03."""
    with pytest.warns(hb.FitWarning, match=r"expected to cover about \d\d % with these 7 tasks"):
        fit = hb.empirical_bayes(*means, **QUIET)
    found = expected.expected_coverage(fit.model, fit.tasks, fit.phi, reml=False)
    full = hb.checks.interval_coverage(fit, num_data_sets=20_000, seed=1)
    assert abs(found.coverage[0] - full.coverage.item()) < 0.06  # 3 standard errors of 0.02
    close(found.tau, fit.phi["tau"])
    said = [w for w in fit.warnings if "expected to cover" in w]
    assert f"{100 * found.coverage[0]:.0f} %" in said[0]


def test_at_zero_the_coverage_is_that_of_a_tau_which_is_not():
    """The τ that maximises (V + τ²)^(−J/2) exp(−S / (2 (V + τ²))) τ, by a dense grid.

    The package's grid has steps of 6 %.
    """
    y = np.array([0.3, -0.5, 0.8, 0.0, -0.9, 1.2, -0.7])
    with pytest.warns(hb.FitWarning, match="where the evidence times tau is largest"):
        fit = hb.empirical_bayes(*normal_means(y), **QUIET)
    assert fit.phi["tau"][0] == 0
    tau = np.linspace(1e-3, 5, 100_000)
    total, squares = 1 + tau**2, ((y - y.mean()) ** 2).sum()
    best = tau[np.argmax(-3.5 * np.log(total) - squares / (2 * total) + np.log(tau))]
    found = expected.expected_coverage(fit.model, fit.tasks, fit.phi, reml=False)
    close(found.tau, [best], rtol=0.04)
    assert found.coverage[0] < 0.6


def test_many_tasks_are_not_looked_at_and_good_coverage_is_not_spoken_of():
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", hb.FitWarning)
        fit = hb.empirical_bayes(*normal_means(4 * rng.normal(size=45)), **QUIET)  # 0.945
    assert expected.expected_coverage(fit.model, fit.tasks, fit.phi, reml=False) is not None
    far = quietly(*normal_means(3 * rng.normal(size=60)), **QUIET)
    assert expected.expected_coverage(far.model, far.tasks, far.phi, reml=False) is None
    near = normal_means(1.02 * rng.normal(size=60))
    fit = quietly(*near, **QUIET)
    found = expected.expected_coverage(fit.model, fit.tasks, fit.phi, reml=False)
    assert found is not None
    assert found.coverage[0] < 0.9
    counties = hb.from_formula("log_radon ~ 1 + floor + (1 | county)", hb.datasets.radon())
    fit = quietly(*counties, **QUIET)
    assert expected.expected_coverage(fit.model, fit.tasks, fit.phi, reml=False) is None


def test_near_zero_with_many_tasks():
    """τ̂ within two standard errors of zero is spoken of, whatever the number of tasks."""
    rows = hb.datasets.radon()
    with pytest.warns(hb.FitWarning, match=r"expected to cover .*floor\) with these 85 tasks"):
        hb.empirical_bayes(
            *hb.from_formula("log_radon ~ 1 + floor + (1 + floor | county)", rows), **QUIET
        )
    y = stats.norm.ppf((np.arange(600) + 0.5) / 600)
    near = normal_means(1.02 * y / y.std())  # τ̂² = 0.04, standard error √(2 / 600) = 0.06
    with pytest.warns(hb.FitWarning, match=r"expected to cover about \d\d % with these 600"):
        fit = hb.empirical_bayes(*near, **QUIET)
    assert 0.15 < fit.phi["tau"][0] < 0.25


def test_what_costs_much_is_said_without_a_figure(monkeypatch):
    """Of 100,000 tasks nothing is simulated; τ̂ far from zero is not spoken of."""
    monkeypatch.setattr(expected, "simulated", None)
    y = stats.norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    for scale, said in ((1.001, 1), (1.4, 0)):
        model, tasks = normal_means(scale * y / y.std())
        fit = quietly(model, tasks, **QUIET)
        found = [w for w in fit.warnings if "within two standard errors of 0" in w]
        assert len(found) == said
    wide = hb.Tasks.from_arrays(
        [(np.eye(8)[np.arange(20) % 8], np.arange(20.0) % 3) for _ in range(10)]
    )
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    phi = {"mu": np.zeros(8), "tau": np.ones(8), "corr": np.eye(8), "sigma": np.ones(())}
    (found,) = expected.remarks_on_coverage(model, wide, phi, reml=False)
    assert "only 10 tasks have rows" in found


def test_at_zero_rows_a_task_do_not_matter():
    """Tasks with one standard error of their means: n rows with n times the variance are one.

    σ is all but known from 8 × 30 rows on. Data sets differ, 400 of 8 tasks: 0.02 each.
    """
    means, found = np.array([0.3, -0.5, 0.8, 0.0, -0.9, 0.6, -0.4, 0.1]), []
    for n in (30, 300, 10_000):
        noise = stats.norm.ppf((np.arange(n) + 0.5) / n)
        y = means[:, None] + noise / noise.std() * np.sqrt(n)
        data = pd.DataFrame({"g": np.repeat(np.arange(8), n), "y": y.ravel()})
        fit = quietly(*hb.from_formula("y ~ 1 + (1 | g)", data), **QUIET)
        assert fit.phi["tau"][0] == 0
        found.append(expected.expected_coverage(fit.model, fit.tasks, fit.phi, reml=False))
    close([f.tau for f in found], [found[0].tau] * 3, rtol=0.1)  # steps of the grid are 6 %
    assert np.ptp([f.coverage[0] for f in found]) < 0.1
    assert max(f.coverage[0] for f in found) < 0.7


def test_no_figure_where_nothing_is_left_to_noise():
    data = pd.DataFrame({"g": np.repeat(np.arange(8), 4), "y": np.repeat(np.arange(8.0), 4)})
    fit = quietly(*hb.from_formula("y ~ 1 + (1 | g)", data), **QUIET)
    assert any("sigma is estimated as" in w for w in fit.warnings)
    assert not any("cover" in w for w in fit.warnings)


def test_wider_intervals_are_not_warned_of(means):
    for intervals in ("bootstrap", "morris"):
        fit = quietly(*means, intervals=intervals, **QUIET)
        assert not any("cover" in w for w in fit.warnings)
    with pytest.warns(hb.FitWarning, match="only 7 tasks have rows"):
        hb.empirical_bayes(*means, "map", **QUIET)


# -------------------------------------------------------------------------- coverage


def test_interval_coverage_of_normal_means():
    """J = 8, τ² = 1: ML 0.644, Morris 0.958 of methods' table; ± 4 standard errors and 0.01."""
    fit = quietly(*normal_means(np.arange(8.0)), **QUIET)
    found = hb.checks.interval_coverage(
        fit, ["plain", "morris"], phi={"mu": [0.0], "tau": [1.0]}, num_data_sets=4000
    )
    assert found.coverage.dims == ("intervals", "coef")
    for name, value in (("plain", 0.644), ("morris", 0.958)):
        one = found.sel(intervals=name)
        assert abs(one.coverage.item() - value) < 0.01 + 4 * one.standard_error.item()
    lower = hb.checks.interval_coverage(fit, ["morris"], level=0.5, num_data_sets=500)
    assert 0.4 < lower.coverage.item() < 0.65


def test_interval_coverage_refuses(means, slopes):
    zero = quietly(*normal_means(np.array([0.1, -0.1, 0.2, 0.0, -0.2, 0.1, -0.1])), **QUIET)
    with refuses("tau is 0 in this fit", "phi="):
        hb.checks.interval_coverage(zero)
    fit = quietly(*slopes, **QUIET)
    with refuses("morris", "'x'"):
        hb.checks.interval_coverage(fit, ["morris"])
    with refuses("'kass-steffey'"):
        hb.checks.interval_coverage(fit, ["kass-steffey"])
    with refuses("'nu'", "'mu'"):
        hb.checks.interval_coverage(fit, phi={"nu": 3})
    with refuses("tau", "(2,)"):
        hb.checks.interval_coverage(fit, phi={"tau": [1.0]})
    for name, value, words in (
        ("tau", [1.0, -0.1], "negative"),
        ("tau", [1.0, np.nan], "finite"),
        ("mu", [np.inf, 0.0], "finite"),
        ("sigma", 0.0, "positive"),
        ("corr", [[1.0, 0.5], [0.1, 1.0]], "symmetric"),
        ("corr", [[1.0, 0.5], [0.5, 2.0]], "diagonal"),
        ("corr", [[1.0, 1.1], [1.1, 1.0]], "semidefinite"),
    ):
        with refuses(f"phi['{name}'] must", words):
            hb.checks.interval_coverage(fit, phi={name: value})
    with refuses("tau is 0 in the phi given"):
        hb.checks.interval_coverage(fit, phi={"tau": [1.0, 0.0]})
    singular = {"corr": np.ones((2, 2))}
    assert hb.checks.interval_coverage(fit, phi=singular, num_data_sets=2).coverage.notnull().all()
    with refuses("map"):
        hb.checks.interval_coverage(quietly(*means, "map", **QUIET))
    with refuses("level"):
        hb.checks.interval_coverage(fit, level=95)


@pytest.mark.slow
@pytest.mark.parametrize("key", [(5, 1.0), (10, 0.5), (20, 0.1)])
def test_rows_of_the_coverage_table(key):
    """20,000 data sets a row; within 0.02 of what was simulated elsewhere from 4,000."""
    from benchmarks import coverage

    found = coverage.row(*key, num_sets=20_000, num_bootstrapped=0)
    for name, value in zip(coverage.COLUMNS, coverage.EXPECTED[key], strict=True):
        assert abs(found[name] - value) < 0.02, name


@pytest.mark.slow
def test_the_bootstrap_covers_far_better_than_plain_intervals_with_ten_tasks():
    """J = 10, τ² = 1 and tasks with slopes: plain 0.72 in the table, the bootstrap about 0.89."""
    fit = quietly(*normal_means(np.arange(10.0)), **QUIET)
    found = hb.checks.interval_coverage(
        fit, ["plain", "bootstrap", "morris"], phi={"tau": [1.0]}, num_data_sets=1000
    ).coverage.sel(coef="Intercept")
    plain, bootstrap, closed = found.values
    assert abs(plain - 0.72) < 0.05
    assert 0.85 < bootstrap < 0.96
    assert abs(closed - 0.951) < 0.02
