"""φ̂ of many data sets of one design: the same as one at a time, and the statistics that they have.

Rung (a): normal means have τ̂² in closed form. Rung (b): :func:`empirical_bayes` one at a time,
differences of the loss, dense moments of simulated statistics.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from assertions import close

import hierbayes as hb
from hierbayes.evidence.many import ManyProblems
from hierbayes.evidence.profile import profile, profile_problem
from hierbayes.meta.many_data_sets import (
    maximise_many,
    of_outcomes,
    prior_roots,
    simulated,
    simulated_at,
)
from hierbayes.meta.marginal import maximise_likelihood, positions
from hierbayes.numerics import float64
from hierbayes.statistics import row_scale, statistics

SETS = 6


def ragged(num_tasks, num_coef, seed, *, level=False):
    """Tasks of 0 to 9 rows with weights, a shared column and, if asked, a task predictor."""
    rng = np.random.default_rng(seed)
    sizes = np.append(rng.integers(1, 10, num_tasks - 1), 0)
    g = np.repeat(np.arange(num_tasks), sizes)
    x = rng.normal(size=(len(g), num_coef - 1))
    data = pd.DataFrame({"g": [f"t{k:02d}" for k in g], "z": rng.normal(size=len(g))})
    data["w"] = rng.uniform(0.5, 2.0, len(g))
    data["level"] = rng.normal(size=num_tasks)[g]
    names = [f"x{k}" for k in range(num_coef - 1)]
    data[names] = x
    data["y"] = 1.0 + rng.normal(size=len(g)) + rng.normal(size=num_tasks)[g]
    tasks = hb.Tasks.from_dataframe(
        data, task="g", outcome="y", predictors=names, shared=["z"], intercept=True,
        task_predictors=["level"] if level else [], weight="w",
    )  # fmt: skip
    return hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian()), tasks


def schools():
    data = hb.datasets.eight_schools()
    return hb.from_formula("y ~ 1 + (1 | school)", data, known_se="se")


def outcomes(tasks, phi, count, seed):
    """Rows drawn under φ: (B, N)."""
    rng = np.random.default_rng(seed)
    d = len(tasks.coef)
    root = np.linalg.cholesky(phi.get("corr", np.eye(d))) * phi["tau"][:, None]
    theta = phi["mu"] + rng.standard_normal((count, tasks.num_tasks, d)) @ root.T
    y = np.einsum("bik,ik->bi", theta[:, tasks.task_of_row], tasks.predictors)
    if "beta" in phi:
        y = y + tasks.shared @ phi["beta"]
    noise = rng.standard_normal(y.shape) / row_scale(tasks)
    return y + phi.get("sigma", 1.0) * noise


CASES = {
    "schools": (schools(), {"mu": np.array([8.0]), "tau": np.array([6.0])}),
    "intercepts": (
        ragged(9, 1, 3, level=True),
        {"mu": np.ones(1), "tau": np.array([0.5]), "beta": np.ones(1), "sigma": 1.0},
    ),
    "slopes": (
        ragged(14, 2, 4),
        {
            "mu": np.ones(2), "tau": np.array([0.8, 0.3]), "beta": np.ones(1), "sigma": 1.0,
            "corr": np.array([[1.0, 0.4], [0.4, 1.0]]),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("criterion", ["ml", "reml"])
@pytest.mark.parametrize("case", CASES)
def test_as_one_at_a_time(case, criterion):
    """Both end at the same maximum: φ to 1e-5 of its unit, the evidence to 1e-8.

    A standard deviation that one search sets to zero, where it makes no difference of 1e-7 to the
    evidence, the other may leave at 1e-4 of its unit.
    """
    (model, tasks), phi = CASES[case]
    y = outcomes(tasks, phi, SETS, 5)
    many = maximise_many(of_outcomes(tasks, y), model.shape(tasks), reml=criterion == "reml")
    assert many.converged.all()
    zeros = 0
    for b in range(SETS):
        one = replace(tasks, outcome=y[b])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hb.FitWarning)
            fit = hb.empirical_bayes(model, one, criterion, num_draws=1, num_chains=1)
        close(many.log_evidence[b], fit.log_evidence, rtol=1e-8)
        assert set(many.phi) == set(fit.phi)
        for name, value in fit.phi.items():
            if name == "corr" and (fit.phi["tau"] == 0).any():
                continue
            unit = float(y.std())
            close(many.phi[name][b], value, rtol=1e-5, atol=1e-5 * unit)
        zeros += int((fit.phi["tau"] == 0).any())
        close(many.mean[b], fit.theta.values, rtol=1e-5, atol=1e-5 * unit)
        close(many.sd[b], fit.adapted.sd.values, rtol=1e-4, atol=1e-4 * unit)
    if case == "schools":
        assert 0 < zeros < SETS, "the boundary is among the cases, and is not all of them"


@pytest.mark.parametrize(
    ("num_coef", "reml", "known_noise"),
    [
        (1, False, True), (2, False, False), (5, True, False),
        *(pytest.param(*cell, marks=pytest.mark.slow)
          for cell in ((1, True, False), (2, True, True), (3, True, False))),
    ],
)  # fmt: skip
def test_loss_and_its_derivatives(num_coef, reml, known_noise):
    """The value is that of :func:`profile`; slopes and curvature by fourth-order differences.

    A step h of 1e-3 leaves h⁴ = 1e-12 and rounding of 1e-16 / h = 1e-13 of the loss, a few hundred.
    Above four coefficients LAPACK factorises.
    """
    model, tasks = ragged(12, num_coef, 7)
    shape, rng = model.shape(tasks), np.random.default_rng(1)
    phi = {"mu": np.ones(num_coef), "tau": np.ones(num_coef), "beta": np.ones(1), "sigma": 1.0}
    stats, _ = simulated(tasks, phi | {"corr": np.eye(num_coef)}, 3, rng)
    problem = profile_problem(stats, shape, reml=reml, known_noise=known_noise)
    many = ManyProblems.of(problem)
    rows, columns = positions(shape.blocks)

    def root(x):
        made = np.zeros((num_coef, num_coef, x.shape[1]))
        made[rows, columns] = x
        return made

    x = 0.5 * rng.standard_normal((len(rows), 3)) + (rows == columns)[:, None]
    found = many.profiles(root(x), rows, columns)
    with float64():
        for b in range(3):
            one = profile_problem(
                replace(stats, y=stats.y[..., b]), shape, reml=reml, known_noise=known_noise
            )
            there = profile(one, jnp.asarray(root(x)[..., b]))
            close(-found.loss[b], float(there.log_evidence), rtol=1e-11)
            close(found.sigma[b], float(there.sigma), rtol=1e-10)
            close(many.fixed_effects(found.effects)[:, b], there.fixed, rtol=1e-8, atol=1e-9)
    h = 1e-3
    for k in range(len(rows)):
        step = np.zeros_like(x)
        step[k] = h
        at = [many.profiles(root(x + i * step), rows, columns) for i in (-2, -1, 1, 2)]
        slope = (at[0].loss - 8 * at[1].loss + 8 * at[2].loss - at[3].loss) / (12 * h)
        bend = (at[0].slope - 8 * at[1].slope + 8 * at[2].slope - at[3].slope) / (12 * h)
        close(found.slope[k], slope, rtol=1e-7, atol=1e-8)
        close(found.hessian[k], bend, rtol=1e-7, atol=1e-8)


@pytest.mark.slow
def test_five_correlated_coefficients_as_one_at_a_time():
    """Above four coefficients LAPACK factorises: the same maximum, tolerances as above."""
    model, tasks = ragged(30, 5, 8)
    root = 0.7 * np.eye(5) + 0.1
    corr = root @ root.T
    corr /= np.sqrt(np.outer(np.diag(corr), np.diag(corr)))
    phi = {"mu": np.ones(5), "tau": np.full(5, 1.5), "beta": np.ones(1), "sigma": 0.5, "corr": corr}
    y = outcomes(tasks, phi, 3, 5)
    many = maximise_many(of_outcomes(tasks, y), model.shape(tasks), reml=False)
    assert many.converged.all()
    for b in range(3):
        one = maximise_likelihood(model.resolve(tasks), replace(tasks, outcome=y[b]), reml=False)
        close(many.log_evidence[b], one.log_evidence, rtol=1e-8)
        for name, value in one.phi.items():
            close(many.phi[name][b], value, rtol=1e-4, atol=1e-5)


def test_normal_means_in_closed_form():
    """τ̂² = max(0, S / J − V) of ML, S / (J − 1) − V of REML; zero in P(χ²_9 < 10 / 2) = 0.166."""
    from scipy import stats as distributions

    data = pd.DataFrame({"g": np.arange(10), "y": 0.0, "se": 1.0})
    data.loc[0, "y"] = 1.0
    model, tasks = hb.from_formula("y ~ 1 + (1 | g)", data, known_se="se")
    phi, num_sets = {"mu": np.zeros(1), "tau": np.ones(1)}, 4000
    drawn, _ = simulated(tasks, phi, num_sets, np.random.default_rng(3))
    y = drawn.y[0] / drawn.x[0, 0][:, None]
    squares = ((y - y.mean(0)) ** 2).sum(0)
    for reml in (False, True):
        many = maximise_many(drawn, model.shape(tasks), reml=reml)
        close(many.phi["tau"][:, 0] ** 2, np.maximum(0, squares / (10 - reml) - 1), atol=1e-9)
        close(many.phi["mu"][:, 0], y.mean(0), rtol=1e-9, atol=1e-12)
        share = distributions.chi2(9).cdf((10 - reml) / 2)
        error = np.sqrt(share * (1 - share) / num_sets)
        assert abs((many.phi["tau"] == 0).mean() - share) < 4 * error


def test_no_search_ends_on_a_saddle():
    """Of 300 data sets with few tasks none has a better maximum that other starts find.

    A column of Λ next to zero, correlations of ±1, is stationary whether it is a maximum or not.
    """
    (model, tasks), phi = CASES["slopes"]
    drawn = of_outcomes(tasks, outcomes(tasks, phi, 300, 20))
    for reml in (False, True):
        found = maximise_many(drawn, model.shape(tasks), reml=reml)
        slanted = [np.array([[a, 0.0], [b, c]]) for a, b, c in [(1, 0.5, 0.5), (0.1, -0.5, 0.5)]]
        more = maximise_many(drawn, model.shape(tasks), reml=reml, starts=(0.05, 3.0, *slanted))
        assert (more.log_evidence - found.log_evidence).max() < 1e-7
        singular = np.abs(found.phi["corr"][:, 0, 1]) > 0.9999
        assert 0.02 < singular.mean() < 0.8, "some, and not all, do end at the boundary"


def test_statistics_of_outcomes_keep_what_rows_say():
    """Inner products of the columns with y, and of y with itself, are those of the scaled rows."""
    model, tasks = ragged(7, 2, 9)
    del model
    y = np.random.default_rng(0).normal(size=(3, tasks.num_rows))
    found, scale = of_outcomes(tasks, y), row_scale(tasks)
    for j in range(tasks.num_tasks):
        some = tasks.task_of_row == j
        x, own = tasks.predictors[some] * scale[some, None], (y[:, some] * scale[some]).T
        close(found.x[:, :, j].T @ found.x[:, :, j], x.T @ x, rtol=1e-10, atol=1e-12)
        close(found.x[:, :, j].T @ found.y[:, j], x.T @ own, rtol=1e-10, atol=1e-12)
        close((found.y[:, j] ** 2).sum(0), (own**2).sum(0), rtol=1e-10, atol=1e-12)


def test_simulated_statistics_have_the_moments_of_simulated_rows():
    """Of every task E yᵀy = ‖R m‖² + tr RΣRᵀ + n σ², and Rᵀy has mean RᵀR m.

    Within 4.5 standard errors of 20,000 data sets, over 14 tasks of 0 to 9 rows.
    """
    (_, tasks), phi = CASES["slopes"]
    drawn, theta = simulated(tasks, phi, 20_000, np.random.default_rng(6))
    stats = statistics(tasks)
    covariance = phi["corr"] * np.outer(phi["tau"], phi["tau"])
    for k in range(2):
        close(theta[..., k].mean(), phi["mu"][k], atol=4 * phi["tau"][k] / np.sqrt(280_000))
    for j in range(tasks.num_tasks):
        x, z = stats.x[:, :, j], stats.z[:, :, j]
        centre = x @ phi["mu"] + z @ phi["beta"]
        squares = (drawn.y[:, j] ** 2).sum(0)
        expected = centre @ centre + np.trace(x @ covariance @ x.T) + tasks.sizes[j]
        assert abs(squares.mean() - expected) <= 4 * squares.std() / np.sqrt(20_000) + 1e-12
        moved = x.T @ (drawn.y[:, j] - centre[:, None])
        assert (np.abs(moved.mean(1)) <= 4.5 * moved.std(1) / np.sqrt(20_000) + 1e-12).all()


def test_each_data_set_under_its_own_phi():
    (_, tasks), phi = CASES["slopes"]
    two = {n: np.stack([np.asarray(v), np.asarray(v)]) for n, v in phi.items()}
    two["mu"] = np.array([[0.0, 0.0], [1000.0, 0.0]])
    _, theta = simulated_at(tasks, two, np.random.default_rng(0))
    assert abs(theta[0, :, 0].mean()) < 10
    assert abs(theta[1, :, 0].mean() - 1000) < 10


def test_roots_of_the_prior_without_compiling():
    """Lower, L Lᵀ = diag(τ) R diag(τ), as the prior's own; correlations of 1 and τ = 0 included."""
    corr = np.stack([np.eye(2), [[1.0, 0.6], [0.6, 1.0]], np.ones((2, 2))])
    phis = {"tau": np.array([[1.0, 2.0], [0.5, 0.0], [3.0, 1.0]]), "corr": corr}
    root = prior_roots(phis)
    covariance = corr * phis["tau"][:, :, None] * phis["tau"][:, None]
    close(root @ np.swapaxes(root, 1, 2), covariance, atol=1e-14)
    assert (root[:, 0, 1] == 0).all()
    with float64():
        close(root, hb.priors.Gaussian().scale_tril(phis), rtol=1e-9, atol=1e-7)
    alone = prior_roots({"tau": phis["tau"]})
    close(alone @ np.swapaxes(alone, 1, 2), np.eye(2) * phis["tau"][:, None] ** 2)
