"""Tasks and rows left out, against integrals over φ on a grid and against refits.

Rung (a): dense normal algebra. Rung (b): p(φ | D without a part) by Gauss–Legendre quadrature over
(μ, τ) (eight schools, normal means of known noise). Rung (d): importance sampling and refits, in
units of the Monte Carlo error that they report; that error is of importance-weighted means, known
to a tenth or so, hence four of them and never less than 1e-3.
"""

from __future__ import annotations

import sys
import warnings

import arviz_stats
import numpy as np
import pandas as pd
import pytest
from assertions import close, refuses
from conftest import Problem, quietly
from scipy import special, stats

import hierbayes as hb
from hierbayes.adaptation import Laplace
from hierbayes.checks import leave_one_row_out, leave_one_task_out
from hierbayes.checks.leave_out import (
    evidence_of,
    leave_one_out,
    relative_efficiency,
    without_each_row,
)

ENOUGH = dict(num_draws=1000, num_chains=4, seed=1, progress=False)


def agree(found, expected, error, k=4.0):
    """|found − expected| ≤ k reported errors, of which none may be large enough to hide a fault."""
    found, expected, error = map(np.asarray, (found, expected, error))
    assert np.isfinite(found).all()
    assert (error < 0.1).all(), f"a Monte Carlo error of {error.max():.2g} says nothing"
    away = np.abs(found - expected) / np.maximum(error, 1e-3 / k)
    assert (away <= k).all(), f"{away.max():.1f} Monte Carlo errors away"


def test_agreement_has_teeth():
    agree([1.0], [1.02], [0.01])
    for found, expected, error in [([1.0], [1.05], [0.01]), ([1.0], [1.0], [0.5])]:
        with pytest.raises(AssertionError):
            agree(found, expected, error)


class Grid:
    """p(μ, τ | D) of normal means with known noise, on 400 × 200 Gauss–Legendre nodes."""

    def __init__(self, fit: hb.Fit):
        self.tasks = fit.tasks
        hyperpriors = fit.model.phi_distributions(fit.tasks)
        y = fit.tasks.outcome
        span = 8 * float(np.ptp(y))
        mu, mu_weight = self.nodes(y.mean() - span, y.mean() + span, 400)
        # τ = exp(t): nodes where the posterior is, near zero and far out alike
        t, t_weight = self.nodes(np.log(1e-4 * span), np.log(span), 200)
        self.mu, self.tau = np.meshgrid(mu, np.exp(t), indexing="ij")
        prior = (
            np.asarray(hyperpriors["mu"].log_prob(mu[:, None])).reshape(len(mu), -1).sum(1)[:, None]
        )
        of_tau = (
            np.asarray(hyperpriors["tau"].log_prob(np.exp(t)[:, None])).reshape(len(t), -1).sum(1)
        )
        self.log_weight = prior + of_tau + t + np.log(mu_weight)[:, None] + np.log(t_weight)[None]

    @staticmethod
    def nodes(low, high, count):
        x, weight = special.roots_legendre(count)
        return low + (high - low) * (x + 1) / 2, weight * (high - low) / 2

    def of_task(self, j, keep=None):
        """log p(y_j | μ, τ) on the grid, of the rows to be kept: N(μ 1, τ² 1 1ᵀ + diag se²)."""
        tasks = self.tasks
        rows = np.arange(tasks.starts[j], tasks.starts[j + 1])
        rows = rows if keep is None else rows[keep[rows]]
        y, v = tasks.outcome[rows], tasks.slots["known_se"][rows] ** 2
        weight = (1 / v).sum()  # by the matrix determinant lemma and Woodbury's identity
        away = y[:, None, None] - self.mu
        squares = (away**2 / v[:, None, None]).sum(0)
        pulled = (away / v[:, None, None]).sum(0)
        spread = self.tau**2 / (1 + self.tau**2 * weight)
        log_det = np.log(v).sum() + np.log1p(self.tau**2 * weight)
        return -0.5 * (len(y) * np.log(2 * np.pi) + log_det + squares - spread * pulled**2)

    def log_evidence(self, *parts):
        return special.logsumexp(self.log_weight + sum(parts))


@pytest.fixture(scope="module")
def eight(schools):
    return quietly(hb.full_bayes, schools, **ENOUGH)


@pytest.fixture(scope="module")
def wild():
    """Eight tasks, one of them five standard deviations off: without it τ is another."""
    y = [0.3, -0.5, 0.1, 0.6, 5.0, -0.2, 0.9, -0.4]
    tasks = hb.Tasks.from_arrays(
        [(np.ones((1, 1)), [v]) for v in y], names=list("abcdefgh"), known_se=[[1.0]] * 8
    )
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(known_se=True), hb.priors.Gaussian())
    return quietly(hb.full_bayes, Problem(model, tasks), **ENOUGH)


# ------------------------------------------------------------------------ tasks


def exact_by_task(fit):
    grid = Grid(fit)
    each = [grid.of_task(j) for j in range(fit.tasks.num_tasks)]
    whole = grid.log_evidence(*each)
    others = [grid.log_evidence(*each[:j], *each[j + 1 :]) for j in range(len(each))]
    return whole - np.array(others)


def test_tasks_left_out_by_importance_are_integrals_on_a_grid(eight):
    found = leave_one_task_out(eight)
    assert (found["pareto_k"] < found["good_k"]).all()
    assert not found["refitted"].any()
    agree(found["log_density"], exact_by_task(eight), found["error"])
    # the control: without weights the tasks' own densities are averaged, which is more
    own = evidence_of(eight, eight.tasks)
    plain = special.logsumexp(own, axis=0) - np.log(len(own))
    with pytest.raises(AssertionError):
        agree(plain, exact_by_task(eight), found["error"])


@pytest.mark.slow
def test_every_task_refitted_agrees_with_importance(eight, schools):
    """T18: brute force, a fit without each school, same settings."""
    from hierbayes.checks.leave_out import _averaged, _refits

    found = leave_one_task_out(eight)
    for j, without in _refits(eight, range(8)):
        assert without.info["num_draws"] == 1000
        assert without.tasks.num_tasks == 7
        for name, hyperprior in eight.model.hyperprior.distributions(
            eight.model.shape(schools.tasks)
        ).items():  # resolved to all eight schools, and so it stays
            again = without.model.hyperprior.distributions(without.model.shape(without.tasks))[name]
            close(hyperprior.log_prob(np.ones(1)), again.log_prob(np.ones(1)))
        value, error = _averaged(without, schools.tasks.take([j]))
        agree(value, found["log_density"][j], np.hypot(error, found["error"][j]))


def test_only_tasks_with_a_high_k_are_refitted(wild):
    with pytest.warns(hb.FitWarning, match=r"'e'.*Pareto k above.*refit=True"):
        rough = leave_one_task_out(wild)
    high = rough["pareto_k"] > rough["good_k"]
    assert high.tolist() == [False] * 4 + [True] + [False] * 3
    found = leave_one_task_out(wild, refit=True)
    np.testing.assert_array_equal(found["refitted"], high)
    close(found["log_density"][~high], rough["log_density"][~high])
    agree(found["log_density"], exact_by_task(wild), found["error"])


def test_what_cannot_be_refitted_is_said(wild, monkeypatch):

    def refused(*_, **__):
        raise hb.InputError("not without e")

    monkeypatch.setattr(hb.meta.FullBayes, "__call__", refused)
    with pytest.warns(hb.FitWarning, match="refused: not without e"):
        found = leave_one_task_out(wild, refit=True)
    assert not found["refitted"].any()


def test_empirical_bayes_is_refitted_by_hand(small):
    fit = quietly(hb.empirical_bayes, small)
    found = leave_one_task_out(fit)
    held = small.tasks.sizes > 0
    np.testing.assert_array_equal(found["refitted"], held)
    assert np.isnan(found["log_density"][~held]).all()
    for j in (0, 5):
        rest = Problem(fit.model, small.tasks.take(np.delete(np.arange(9), j)))
        phi = quietly(hb.empirical_bayes, rest).phi
        close(found["log_density"][j], dense(small.tasks.take([j]), phi)[0], rtol=1e-8)


# ------------------------------------------------------------------------- rows


def dense(tasks, phi):
    """log p(D_j | φ) by SciPy's normal density with the dense covariance of all rows."""
    sigma = phi.get("sigma", 1.0)
    corr = phi.get("corr", np.eye(len(tasks.coef)))
    prior = np.outer(phi["tau"], phi["tau"]) * corr
    values = []
    for j in range(tasks.num_tasks):
        rows = slice(tasks.starts[j], tasks.starts[j + 1])
        x, y = tasks.predictors[rows], tasks.outcome[rows].copy()
        noise = np.full(len(y), float(sigma) ** 2)
        y -= tasks.shared[rows] @ phi["beta"] if "beta" in phi else 0.0
        if "known_se" in tasks.slots:
            noise = tasks.slots["known_se"][rows] ** 2
        if "weight" in tasks.slots:
            noise = noise / tasks.slots["weight"][rows]
        y -= tasks.slots["offset"][rows] if "offset" in tasks.slots else 0.0
        cover = x @ prior @ x.T + np.diag(noise)
        values.append(stats.multivariate_normal.logpdf(y, x @ phi["mu"], cover) if len(y) else 0.0)
    return np.array(values)


def with_extras(tasks, rng):
    from dataclasses import replace

    shared = rng.normal(size=(tasks.num_rows, 1))
    slots = {
        "offset": rng.normal(size=tasks.num_rows), "weight": rng.uniform(0.5, 2, tasks.num_rows)
    }  # fmt: skip
    labels = replace(tasks.labels, shared=("z",))
    return replace(tasks, shared=shared, slots=slots, labels=labels)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("most", [None, 1, 5])
def test_a_row_given_the_others_is_a_difference_of_evidences(small, rng, extras, most):
    """log p(D_j | φ) − log p(D_j without i | φ), dense; rounding of ten digits is what is left."""
    tasks = with_extras(small.tasks, rng) if extras else small.tasks
    phis = {
        "mu": rng.normal(size=(3, 2)), "tau": np.array([[0.5, 1.2], [2.0, 0.0], [0.3, 0.1]]),
        "corr": np.array([[[1, r], [r, 1]] for r in (0.3, 0.0, -0.8)]),
        "sigma": np.array([0.4, 1.0, 2.0]),
    }  # fmt: skip
    if extras:
        phis["beta"] = rng.normal(size=(3, 1))
    parts = list(without_each_row(small.model, tasks, phis, most))
    covered = np.concatenate([np.arange(tasks.num_rows)[here] for here, _ in parts])
    np.testing.assert_array_equal(covered, np.arange(tasks.num_rows))
    found = np.concatenate([values for _, values in parts], axis=1)
    expected = np.zeros_like(found)
    for s in range(3):
        phi = {name: value[s] for name, value in phis.items()}
        whole = dense(tasks, phi)
        for i, j in enumerate(tasks.task_of_row):
            keep = np.arange(tasks.num_rows) != i
            expected[s, i] = whole[j] - dense(tasks.keep_rows(keep).take([j]), phi)[0]
    close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.fixture(scope="module")
def ragged():
    """Twelve tasks of one to five rows with known noise."""
    rng = np.random.default_rng(4)
    sizes = [1, 2, 3, 5, 4, 2, 2, 1, 3, 1, 2, 4]
    arrays, errors = [], []
    for n in sizes:
        se = rng.uniform(0.5, 1.5, n)
        arrays.append((np.ones((n, 1)), rng.normal(0, 1.5) + se * rng.normal(size=n)))
        errors.append(se)
    tasks = hb.Tasks.from_arrays(arrays, names=list("abcdefghijkl"), known_se=errors)
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(known_se=True), hb.priors.Gaussian())
    return Problem(model, tasks)


@pytest.fixture(scope="module")
def of_ragged(ragged):
    return quietly(hb.full_bayes, ragged, **ENOUGH)


def test_rows_left_out_are_integrals_on_a_grid(ragged, of_ragged):
    fit, tasks, grid = of_ragged, ragged.tasks, Grid(of_ragged)
    each = [grid.of_task(j) for j in range(tasks.num_tasks)]
    whole = grid.log_evidence(*each)
    expected = []
    for i, j in enumerate(tasks.task_of_row):
        keep = np.arange(tasks.num_rows) != i
        expected.append(whole - grid.log_evidence(*each[:j], grid.of_task(j, keep), *each[j + 1 :]))
    found = leave_one_row_out(fit)
    agree(found["log_density"], expected, found["error"])
    assert float(found["pareto_k"].max()) < found["good_k"]
    assert "integrated out exactly" in found["given"]
    np.testing.assert_array_equal(found["log_density"]["row"], tasks.rows)
    names = tasks.names[tasks.task_of_row]
    np.testing.assert_array_equal(found["log_density"]["row_task"], names)
    close(found["mean"], found["log_density"].values.mean())
    # the control: a row that its own task's posterior has seen is predicted better
    draws = fit.theta_draws.reshape(-1, 12)[:, tasks.task_of_row]
    own = stats.norm.logpdf(tasks.outcome, draws, tasks.slots["known_se"])
    with pytest.raises(AssertionError):
        agree(special.logsumexp(own, 0) - np.log(len(own)), expected, found["error"])


def test_rows_in_pieces_are_the_same_rows(of_ragged, monkeypatch):
    whole = leave_one_row_out(of_ragged)
    monkeypatch.setattr("hierbayes.checks.leave_out.NUMBERS_AT_ONCE", 4000 * 4)
    pieces = leave_one_row_out(of_ragged)
    close(pieces["log_density"].values, whole["log_density"].values, rtol=1e-12)
    close(pieces["pareto_k"].values, whole["pareto_k"].values, rtol=1e-9)


@pytest.mark.slow
def test_rows_of_large_tasks_agree_with_conditional_importance(rng):
    """Where a task has 40 rows the conditional weights are good too, and ask the same question."""
    arrays = []
    for _ in range(6):
        x = np.column_stack([np.ones(40), rng.normal(size=40)])
        arrays.append((x, x @ rng.normal(size=2) + rng.normal(size=40)))
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    fit = quietly(hb.full_bayes, Problem(model, hb.Tasks.from_arrays(arrays)), **ENOUGH)
    found = leave_one_row_out(fit)
    conditional = fit.log_likelihood()["y"].values
    other = leave_one_out(conditional, relative_efficiency(fit.phi_draws))
    assert other.pareto_k.max() < other.good_k
    error = np.hypot(found["error"].values, other.error)
    agree(found["log_density"].values, other.log_density, error)
    # φ alone is left to the weights, so both their shape and their error are smaller
    assert float(found["pareto_k"].max()) < other.pareto_k.max()
    assert float(found["error"].mean()) < 0.5 * other.error.mean()
    tree_error = arviz_stats.loo(fit.datatree, pointwise=True)
    close(other.log_density, tree_error.elpd_i.values, atol=1e-3)


def test_at_a_point_rows_are_dense_conditionals(small):
    fit = quietly(hb.empirical_bayes, small)
    found = leave_one_row_out(fit)
    assert "pareto_k" not in found
    assert "phi-hat" in found["given"]
    whole = dense(small.tasks, fit.phi)
    for i in (0, 4, 11, 20):
        j = small.tasks.task_of_row[i]
        rest = small.tasks.keep_rows(np.arange(small.tasks.num_rows) != i).take([j])
        close(found["log_density"].values[i], whole[j] - dense(rest, fit.phi)[0], rtol=1e-9)


@pytest.mark.slow
def test_rows_left_out_agree_with_refits(small):
    """σ unknown: fits without each of four rows, p(y_i | D_j without i, φ) averaged over draws."""
    fit = quietly(hb.full_bayes, small, **ENOUGH)
    found = leave_one_row_out(fit)
    for i in (0, 4, 11, 20):
        j = small.tasks.task_of_row[i]
        rest = small.tasks.keep_rows(np.arange(small.tasks.num_rows) != i)
        refit = quietly(hb.full_bayes, Problem(fit.model, rest), **ENOUGH | {"seed": i})
        values = evidence_of(refit, small.tasks.take([j])) - evidence_of(refit, rest.take([j]))
        mean = special.logsumexp(values[:, 0]) - np.log(len(values))
        size = len(values) * relative_efficiency(refit.phi_draws)
        error = np.exp(values[:, 0] - mean).std() / np.sqrt(size)
        agree(found["log_density"].values[i], mean, np.hypot(error, found["error"].values[i]))


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(6)
    arrays = [
        (np.ones((n, 1)), rng.poisson(np.exp(rng.normal(1.0, 0.7)), n).astype(float))
        for n in (12, 0, 15, 9, 20)
    ]
    model = hb.HierarchicalModel(hb.likelihoods.Poisson(), hb.priors.Gaussian())
    return Problem(model, hb.Tasks.from_arrays(arrays, names=list("abcde")))


def test_rows_of_counts_are_conditional_importance(counts, monkeypatch):
    # draws like those of a posterior: what was learned does not matter here
    tasks = counts.tasks
    totals = np.bincount(tasks.task_of_row, tasks.outcome, minlength=5)
    near = np.log((totals + 1) / (tasks.sizes + 1))[:, None]
    draws = near + 0.15 * np.random.default_rng(3).normal(size=(4, 500, 5, 1))
    point = {"mu": np.array([1.0]), "tau": np.array([0.5])}
    fit = hb.Fit(hb.meta.EmpiricalBayes(), counts.model, tasks, point, Laplace(), theta_draws=draws)
    found = leave_one_row_out(fit)
    expected = arviz_stats.loo(fit.datatree, pointwise=True, reff=1.0)
    close(found["log_density"].values, expected.elpd_i.values, rtol=1e-9)
    close(found["pareto_k"].values, expected.pareto_k.values, rtol=1e-9)
    assert "phi-hat" in found["given"]
    monkeypatch.setattr(sys.modules[leave_one_row_out.__module__], "NUMBERS_AT_ONCE", 2000 * 13)
    close(leave_one_row_out(fit)["log_density"].values, found["log_density"].values, rtol=1e-9)


@pytest.mark.slow
def test_where_tasks_are_identical_there_is_nothing_to_weigh():
    """Draws of θ are one point where τ̂ = 0: every row has the density of that point."""
    rows = np.array([0.0, 1.0, 2.0])
    tasks = hb.Tasks.from_arrays([(np.ones((3, 1)), rows)] * 3)
    model = hb.HierarchicalModel(hb.likelihoods.Poisson(), hb.priors.Gaussian())
    fit = quietly(hb.empirical_bayes, Problem(model, tasks))
    assert fit.phi["tau"] == 0
    found = leave_one_row_out(fit)
    close(found["log_density"].values, stats.poisson.logpmf(np.tile(rows, 3), 1.0), rtol=1e-6)
    assert (found["error"] == 0).all()


@pytest.mark.slow
def test_rows_that_weights_cannot_leave_out_are_counted():
    """One count of 40 in a task of its own: the posterior of its θ is of that row alone."""
    tasks = hb.Tasks.from_arrays(
        [(np.ones((1, 1)), [v]) for v in (1.0, 40.0, 2.0, 0.0, 3.0, 9.0)], names=list("abcdef")
    )
    model = hb.HierarchicalModel(hb.likelihoods.Poisson(), hb.priors.Gaussian())
    fit = quietly(hb.empirical_bayes, Problem(model, tasks))
    with pytest.warns(hb.FitWarning, match=r"rows \(of .*'b'.*Pareto k above"):
        leave_one_row_out(fit)


def test_methods_without_a_posterior_are_refused(radon_maml, radon_imaml, radon_no_pooling):
    for fit in (radon_maml, radon_imaml, radon_no_pooling):
        with refuses(fit.method.name, "posterior of theta"):
            leave_one_row_out(fit)


def test_scores_of_rows_say_nothing_where_they_are_sound(radon_ml):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = leave_one_row_out(radon_ml)
    assert np.isfinite(found["log_density"]).all()
    assert 0 < found["se"] < 0.1


def test_a_draw_without_a_number_is_not_passed_over():
    """One NaN among 2,000 draws of a unit, and the unit has no score."""
    from hierbayes.checks.leave_out import leave_one_out

    values = np.random.default_rng(0).normal(size=(4, 500, 3))
    values[1, 7, 0] = np.nan
    values[:, :, 2] = -1.5
    found = leave_one_out(values, 1.0)
    for part in (found.log_density, found.pareto_k, found.error):
        assert np.isnan(part[0])
        assert np.isfinite(part[1:]).all()
    assert found.log_density[2] == -1.5


@pytest.mark.slow
def test_a_refit_integrates_as_the_fit_did():
    rng = np.random.default_rng(1)
    model, tasks = hb.from_formula(
        "y ~ 1 + (1 | g)",
        pd.DataFrame({"g": np.repeat(np.arange(12), 8), "y": rng.integers(0, 2, 96)}),
        family="bernoulli",
    )
    fit = hb.empirical_bayes(model, tasks, evidence="laplace")
    assert fit.info["evidence"] == "laplace"
    # as many tasks, and the fit's programs serve; quadrature is what it would take by itself
    again = fit.method(fit.inside.model, fit.inside.tasks.take(range(12)))
    assert again.info["evidence"] == "laplace"
