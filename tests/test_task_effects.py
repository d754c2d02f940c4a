"""Standardised effects of tasks: exact under the model, and telling where it is wrong.

Rung (a): dense normal algebra. Rung (d): simulated tasks at a known φ, with Kolmogorov and
Smirnov's test; p-values that are uniform, tails and outliers that are found.
"""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from assertions import close, refuses
from conftest import Problem, quietly
from scipy import stats

import hierbayes as hb
from hierbayes.adaptation import Laplace
from hierbayes.checks import task_effects
from hierbayes.checks.task_effects import far, shape_test
from hierbayes.fit.method import Derived
from hierbayes.plots.task_effects import simultaneous_band

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODEL = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
PHI = {
    "mu": np.array([1.0, -0.5]), "tau": np.array([0.8, 0.4]),
    "corr": np.array([[1.0, -0.4], [-0.4, 1.0]]), "sigma": np.array(0.6),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


def at(fit, phi):
    """The fit with another φ, as if it had been learned."""
    return replace(fit, phi=phi, training=None, theta_draws=None)


def levels(theta, rng, rows=10, sigma=1.0):
    tasks = hb.Tasks.from_arrays(
        [(np.ones((rows, 1)), t + sigma * rng.normal(size=rows)) for t in theta],
        names=[f"t{j}" for j in range(len(theta))], coef=["level"],
    )  # fmt: skip
    return Problem(MODEL, tasks)


def test_effects_are_dense_algebra(small):
    """m − μ = Σ Xᵀ W⁻¹ (y − X μ) and Cov(m) = Σ Xᵀ W⁻¹ X Σ with W = X Σ Xᵀ + σ² I."""
    fit = at(quietly(hb.empirical_bayes, small).inside, PHI)
    found = task_effects(fit)
    prior = np.outer(PHI["tau"], PHI["tau"]) * PHI["corr"]
    for j, (_, task) in enumerate(fit.tasks):
        x, y = task.predictors, task.outcome
        if not len(y):
            assert np.isnan(found.z[j]).all()
            continue
        gain = prior @ x.T @ np.linalg.inv(x @ prior @ x.T + 0.36 * np.eye(len(y)))
        variance = np.diag(gain @ x @ prior)
        close(found.z[j], gain @ (y - x @ PHI["mu"]) / np.sqrt(variance), rtol=1e-9)
        close(found.information[j], variance / PHI["tau"] ** 2, rtol=1e-9)
        # and they are what the fit's own posterior says
        close(fit.adapted.posterior.mean[j] - PHI["mu"], gain @ (y - x @ PHI["mu"]), atol=1e-10)
    assert any("1 of 9 tasks say nothing about 'x'" in remark for remark in found.remarks)


def test_effects_are_standard_normal_under_the_model(rng):
    """3000 ragged tasks, some of one row or of rank one, simulated at φ.

    Kolmogorov and Smirnov's p-value is uniform under the model: below 1e-3 in one seed of 1000.
    """
    arrays = []
    root = PHI["tau"][:, None] * np.linalg.cholesky(PHI["corr"])
    for j in range(3000):
        n = 1 + j % 8
        x = np.column_stack([np.ones(n), rng.normal(size=n) if j % 3 else np.full(n, 0.5)])
        theta = PHI["mu"] + root @ rng.normal(size=2)
        arrays.append((x, x @ theta + 0.6 * rng.normal(size=n)))
    tasks = hb.Tasks.from_arrays(arrays)
    fit = quietly(hb.empirical_bayes, Problem(MODEL, tasks), num_draws=1, num_chains=1)
    z = task_effects(at(fit, PHI)).z.values
    for column in z.T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
        assert stats.kstest(column[::24], "norm").pvalue > 1e-3  # the tasks of one row
    # the control: too narrow a prior is seen
    wrong = task_effects(at(fit, PHI | {"tau": 0.8 * PHI["tau"]})).z.values
    assert stats.kstest(wrong[:, 0], "norm").pvalue < 1e-6


@pytest.mark.slow
def test_p_values_are_uniform_though_phi_is_learned(rng):
    """150 sets of 30 Gaussian tasks, φ̂ learned from each: balanced, so that the test is exact.

    An outlier is named in 5 % of the sets: 150 of them allow up to 7.5 + 4 √7.1 = 18.
    """
    p_values, named = [], 0
    for _ in range(150):
        fit = quietly(
            hb.empirical_bayes, levels(rng.normal(size=30), rng, 5), num_draws=1, num_chains=1
        )
        found = task_effects(fit)
        p_values.append(float(found.p_value[0]))
        named += bool(found.outliers["level"])
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3
    assert named <= 18


def test_heavy_tails_are_found_and_a_student_prior_suggested(rng):
    fit = quietly(hb.empirical_bayes, levels(rng.standard_t(2, 120), rng))
    found = task_effects(fit)
    assert float(found.p_value.sel(coef="level")) < 1e-3
    assert any("StudentT" in remark and "heavy" in remark for remark in found.remarks)
    # the control: Gaussian tasks of the same number, nothing to say
    assert (
        task_effects(quietly(hb.empirical_bayes, levels(rng.normal(size=120), rng))).remarks == ()
    )


def test_two_kinds_of_tasks_and_skewed_ones_are_told_apart(rng):
    kinds = np.repeat([-2.0, 2.0], 60) + 0.3 * rng.normal(size=120)
    found = task_effects(quietly(hb.empirical_bayes, levels(kinds, rng)))
    assert any("light" in remark and "task predictor" in remark for remark in found.remarks)
    found = task_effects(quietly(hb.empirical_bayes, levels(rng.exponential(2.0, 120), rng)))
    assert any("skewed (+" in remark for remark in found.remarks)


def test_one_outlying_task_is_named(rng):
    theta = rng.normal(size=40)
    theta[17] = 7.0
    found = task_effects(quietly(hb.empirical_bayes, levels(theta, rng)))
    assert found.outliers == {"level": ("t17",)}
    (said,) = found.remarks  # and nothing of heavy tails, which the others do not have
    assert "'t17'" in said
    assert "other tasks look Gaussian" in said
    assert "t17" in str(found)


def test_beside_an_outlier_the_shape_of_the_others_is_told(rng):
    kinds = np.repeat([-2.0, 2.0], 60) + 0.3 * rng.normal(size=120)
    kinds[3] = 12.0
    found = task_effects(quietly(hb.empirical_bayes, levels(kinds, rng)))
    assert found.outliers == {"level": ("t3",)}
    assert "do not look Gaussian either" in found.remarks[0]
    assert "light" in found.remarks[1]


def test_the_bound_of_outliers_is_grubbs(rng):
    """Of 8 normal numbers the farthest is beyond 2.126 deviations in 5 % (Grubbs 1969, table 1)."""
    z = rng.normal(size=(40_000, 8))
    share = np.mean([len(far(row)) > 0 for row in z[:4000]])
    assert abs(share - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 4000)
    away = np.abs(z - z.mean(1, keepdims=True)).max(1) / z.std(1, ddof=1)
    assert abs((away > 2.126).mean() - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 40_000)


def test_many_tasks_are_tested_too(rng):
    z = rng.normal(size=20_000)
    statistic, p_value = shape_test(z)
    close([statistic, p_value], stats.normaltest(z))
    assert shape_test(rng.standard_t(5, 20_000))[1] < 1e-6
    assert np.isnan(shape_test(np.array([1.0, 2.0, np.nan, 3.0]))).all()


def test_under_full_bayes_phi_is_its_posterior_mean(schools_full):
    found = task_effects(schools_full)
    point = at(replace(schools_full, phi_draws=None), dict(schools_full.phi))
    close(found.z.values, task_effects(point).z.values)
    assert found.z.dims == ("task", "coef")


def test_what_has_no_effects_is_said_or_refused(schools, radon_maml, radon_imaml, rng):
    fit = quietly(hb.empirical_bayes, schools, criterion="ml")
    assert fit.phi["tau"] == 0
    found = task_effects(fit)
    assert np.isnan(found.z).all()
    assert np.isnan(found.p_value).all()
    assert any("tau is 0 for 'Intercept'" in remark for remark in found.remarks)
    for other in (radon_maml, radon_imaml):
        with refuses(other.method.name, "learns no spread"):
            task_effects(other)
    counts = hb.Tasks.from_arrays([(np.ones((4, 1)), rng.poisson(3, 4) * 1.0) for _ in range(6)])
    model = hb.HierarchicalModel(hb.likelihoods.Poisson(), hb.priors.Gaussian())
    point = {"mu": np.array([1.0]), "tau": np.array([0.5])}
    with refuses("Poisson"):
        task_effects(hb.Fit(Derived("a method"), model, counts, point, Laplace()))
    with refuses("too few"):
        hb.plots.task_effects(fit)
    with refuses("'floor'", "Intercept"):
        hb.plots.task_effects(fit, "floor")


# ----------------------------------------------------------------------- pictures


def inside(n, rng, repetitions):
    ranks, low, high = simultaneous_band(n)
    x = np.sort(rng.normal(size=(repetitions, n)), axis=1)
    x = (x - x.mean(1, keepdims=True)) / x.std(1, ddof=1, keepdims=True)
    return ((x[:, ranks] >= low) & (x[:, ranks] <= high)).all(1).mean()


@pytest.mark.parametrize("n", [8, 60, 2000])
def test_bands_hold_95_percent_of_gaussian_samples(n, rng):
    """Four errors, of 3000 repetitions and of the 10,000 samples that the band is made of.

    And one percent more: bounds are fitted to these samples, accidents included.
    """
    allowed = 4 * np.sqrt(0.05 * 0.95 * (1 / 3000 + 1 / 10_000)) + 0.01
    assert abs(inside(n, rng, 3000) - 0.95) < allowed


def test_picture_draws_every_task_and_names_the_outlier(rng):
    theta = rng.normal(size=40)
    theta[17] = 7.0
    fit = quietly(hb.empirical_bayes, levels(theta, rng))
    _, ax = plt.subplots()
    assert hb.plots.task_effects(fit, ax=ax) is ax
    assert len(ax.collections[1].get_offsets()) == 40
    assert [text.get_text() for text in ax.texts] == ["t17"]
    assert "level" in ax.get_ylabel()
    ax.figure.canvas.draw()
    drawn = hb.plots.task_effects(task_effects(fit), "level", names=0)
    assert not drawn.texts


def test_picture_of_gaussian_tasks_names_nobody(radon_ml):
    ax = hb.plots.task_effects(radon_ml, "floor")
    assert not ax.texts
    assert "floor: 85 tasks" in ax.get_title(loc="left")
