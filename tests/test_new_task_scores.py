"""Tasks never seen, and differences between scores, against hand computation.

Rung (a): normal densities of query given support. Rung (b): SciPy's quadrature of θ, dense normal
densities draw by draw. Rung (c): totals, orders and labels that must not matter.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from assertions import close, refuses
from conftest import QUICK, Problem, quietly
from scipy import integrate, special, stats
from simulated import normal_means

import hierbayes as hb
from hierbayes.checks import new_task_scores, score_differences
from hierbayes.checks.differences import score

MODEL = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())


def named(tasks, prefix):
    names = np.array([f"{prefix}{j}" for j in range(tasks.num_tasks)])
    return replace(tasks, labels=replace(tasks.labels, names=names))


@pytest.fixture(scope="module")
def seen():
    return Problem(MODEL, named(normal_means(25, 4, tau=1.0, sigma=0.7, seed=1), "old "))


@pytest.fixture(scope="module")
def unseen():
    return named(normal_means(12, [1, 2, 3, 4, 5, 6, 7, 8, 3, 3, 2, 2], 1.0, 0.7, seed=2), "new ")


@pytest.fixture(scope="module")
def fits(seen):
    return {
        "EB": quietly(hb.empirical_bayes, seen), "full": quietly(hb.full_bayes, seen, **QUICK),
        "MAML": quietly(hb.maml, seen, num_steps=3), "none": quietly(hb.no_pooling, seen),
    }  # fmt: skip


def normal(y, mu, tau, sigma):
    """log N(y; μ 1, τ² 1 1ᵀ + σ² I)."""
    cover = tau**2 + sigma**2 * np.eye(len(y))
    return stats.multivariate_normal.logpdf(y, np.full(len(y), mu), cover) if len(y) else 0.0


def of(tasks, name):
    j = tasks.names.tolist().index(name)
    return tasks.outcome[tasks.starts[j] : tasks.starts[j + 1]]


def by_hand(support, query, mu, tau, sigma):
    """log p(query_j | support_j, φ) of every task of the query with rows."""
    found = []
    for name, size in zip(query.names.tolist(), query.sizes, strict=True):
        if size:
            s, q = of(support, name), of(query, name)
            both = normal(np.concatenate([s, q]), mu, tau, sigma)
            found.append(both - normal(s, mu, tau, sigma))
    return np.array(found)


def test_joint_densities_at_a_point_are_normal_conditionals(fits, unseen):
    support, query = unseen.split(0.5, seed=0)
    assert (support.sizes == 0).any()  # a one-row task is query alone: its prior predicts it
    phi = fits["EB"].phi
    expected = by_hand(support, query, phi["mu"][0], phi["tau"][0], float(phi["sigma"]))
    table = new_task_scores(fits["EB"], support, query)
    row = table.loc["empirical Bayes"]
    close(row["joint"], expected.mean(), rtol=1e-9)
    close(row["joint_se"], expected.std(ddof=1) / np.sqrt(len(expected)), rtol=1e-9)
    assert row["tasks"] == 12
    assert row["rows"] == query.num_rows
    assert row["difference"] == row["joint_difference"] == 0
    # a row alone: N(m_j, v_j + σ²) at its task's posterior
    close(row["log_density"], fits["EB"].adapt(support).predict(query).log_density().mean())


def test_under_full_bayes_the_support_weighs_the_draws_of_phi(fits, unseen):
    support, query = unseen.split(0.5, seed=0)
    draws = fits["full"].phi_draws
    flat = [draws[name].reshape(-1) for name in ("mu", "tau", "sigma")]
    both, given = [], []
    for mu, tau, sigma in zip(*flat, strict=True):
        parts = [(of(support, n), of(query, n)) for n in query.names.tolist()]
        both.append([normal(np.concatenate(p), mu, tau, sigma) for p in parts])
        given.append([normal(s, mu, tau, sigma) for s, _ in parts])
    expected = special.logsumexp(both, axis=0) - special.logsumexp(given, axis=0)
    table = new_task_scores({"full": fits["full"]}, support, query)
    close(table.loc["full", "joint"], expected.mean(), rtol=1e-9)
    # the control: draws of φ weighted alike give another number
    alike = special.logsumexp(np.array(both) - np.array(given), axis=0) - np.log(len(both))
    assert abs(alike.mean() - expected.mean()) > 1e-6


def test_differences_have_standard_errors_over_tasks(fits, unseen):
    support, query = unseen.split(0.5, seed=0)
    table = new_task_scores(fits, support, query, reference="EB")
    assert table.attrs["reference"] == "EB"
    predictions = {n: f.adapt(support).predict(query) for n, f in fits.items()}
    gap = predictions["MAML"].log_density() - predictions["EB"].log_density()
    totals = np.bincount(query.task_of_row, gap)
    mean = gap.mean()
    se = np.sqrt(12 / 11 * ((totals - mean * query.sizes) ** 2).sum()) / query.num_rows
    close(table.loc["MAML", "difference"], mean, rtol=1e-9)
    close(table.loc["MAML", "difference_se"], se, rtol=1e-9)
    # MAML predicts rows independently of one another at θ̂_j: a product
    of_tasks = np.bincount(query.task_of_row, predictions["MAML"].log_density())
    close(table.loc["MAML", "joint"], of_tasks.mean(), rtol=1e-9)
    assert np.isnan(table.loc["none", "joint"])
    # without pooling a task without support has no parameters
    alone = (support.sizes == 0)[query.task_of_row].sum()
    assert table.loc["none", "left_out"] == alone > 0
    away = (query.outcome - predictions["EB"].mean) ** 2
    close(table.loc["EB", "rmse"], np.sqrt(away.mean()), rtol=1e-12)
    best = new_task_scores(fits, support, query)
    assert (best["difference"].dropna() <= 1e-12).all() or best.attrs["reference"] == "none"


def test_tasks_are_matched_by_name_in_any_order(fits, unseen):
    support, query = unseen.split(0.5, seed=0)
    table = new_task_scores(fits["EB"], support, query)
    turned = support.take(np.arange(support.num_tasks)[::-1])
    close(new_task_scores(fits["EB"], turned, query).values, table.values)
    # a task that the support does not know is one without rows there
    fewer = support.take(np.flatnonzero(support.sizes > 0))
    close(new_task_scores(fits["EB"], fewer, query).values, table.values)


def test_tasks_without_a_query_row_are_named_and_left_out(fits, unseen):
    support, query = unseen.hold_out(0.5, seed=0)  # a one-row task is support alone
    with pytest.warns(hb.FitWarning, match="1 task.*no query row.*'new 0'"):
        table = new_task_scores(fits["EB"], support, query)
    assert table["tasks"].tolist() == [11]


def test_what_cannot_be_scored_is_refused(fits, unseen, radon_ml):
    support, query = unseen.split(0.5, seed=0)
    with refuses("no task has a query row"):
        new_task_scores(fits["EB"], support, query.keep_rows(np.zeros(query.num_rows, bool)))
    with refuses("no task of the query has a support row", "'new 0'", "'other 0'"):
        new_task_scores(fits["EB"], named(support, "other "), query)
    with refuses("coef", "Intercept"):
        new_task_scores({"EB": fits["EB"], "radon": radon_ml}, support, query)
    with refuses("expected a fit"):
        new_task_scores({}, support, query)
    with refuses("reference", "'best'"):
        new_task_scores(fits, support, query, reference="best")
    with refuses("query holds no outcome"):
        new_task_scores(fits["EB"], support, replace(query, outcome=None))


@pytest.mark.slow
def test_joint_densities_of_counts_are_integrals(rng):
    """Poisson tasks with one coefficient: SciPy's adaptive quadrature over θ, 1e-8 relative."""
    arrays = [(np.ones((5, 1)), rng.poisson(np.exp(rng.normal(1, 0.6)), 5)) for _ in range(10)]
    tasks = named(hb.Tasks.from_arrays(arrays), "t")
    model = hb.HierarchicalModel(hb.likelihoods.Poisson(), hb.priors.Gaussian())
    fit = quietly(hb.empirical_bayes, Problem(model, tasks.take(range(7))))
    mu, tau = float(fit.phi["mu"][0]), float(fit.phi["tau"][0])
    assert tau > 0.1
    new = tasks.take([7, 8, 9])
    support, query = new.split(0.4, seed=1)

    def evidence(y):
        def density(z):
            return np.exp(
                stats.poisson.logpmf(y, np.exp(mu + tau * z)).sum() + stats.norm.logpdf(z)
            )

        return np.log(integrate.quad(density, -8, 8, points=[0.0], epsrel=1e-10)[0])

    expected = [
        evidence(np.concatenate([of(support, n), of(query, n)])) - evidence(of(support, n))
        for n in new.names.tolist()
    ]
    found = new_task_scores(fit, support, query)
    # quadrature of the fit itself is right to its estimated error
    error = max(1e-6, 10 * fit.info["evidence_error"])
    close(found["joint"].iloc[0], np.mean(expected), atol=error)


# -------------------------------------------------------------------- differences


def test_differences_by_hand(rng):
    tasks = normal_means(6, [1, 4, 2, 3, 5, 2], 1.0, 1.0)
    a, b = rng.normal(size=(2, tasks.num_rows))
    table = score_differences({"a": a, "b": b}, tasks, reference="b")
    totals = np.bincount(tasks.task_of_row, a - b)
    mean = (a - b).mean()
    se = np.sqrt(6 / 5 * ((totals - mean * tasks.sizes) ** 2).sum()) / tasks.num_rows
    close(table.loc["a", ["difference", "difference_se"]], [mean, se], rtol=1e-12)
    close(table.loc["b", ["log_density", "difference"]], [b.mean(), 0.0])
    # the same from totals by task, which is what leave_one_task_out gives
    by_task = {"a": np.bincount(tasks.task_of_row, a), "b": np.bincount(tasks.task_of_row, b)}
    close(score_differences(by_task, tasks, reference="b").values, table.values, rtol=1e-9)
    whole = score_differences(by_task, tasks, per="task", reference="b").loc["a"]
    close(6 * whole["difference"], (a - b).sum(), rtol=1e-9)
    close(whole["difference_se"], totals.std(ddof=1) / np.sqrt(6), rtol=1e-9)


def test_rows_that_are_copies_are_no_evidence(rng):
    """Ten copies of each row of a task: the error stays, where rows as units would divide it."""
    once, often = normal_means(40, 1, 1.0, 1.0), normal_means(40, 10, 1.0, 1.0)
    a, b = rng.normal(size=(2, 40))
    few = score_differences({"a": a, "b": b}, once, reference="b")
    many = score_differences({"a": np.repeat(a, 10), "b": np.repeat(b, 10)}, often, reference="b")
    close(many.loc["a", "difference_se"], few.loc["a", "difference_se"], rtol=1e-12)
    naive = np.repeat(a - b, 10).std(ddof=1) / np.sqrt(400)
    assert naive < 0.4 * many.loc["a", "difference_se"]


def test_errors_of_differences_are_those_of_repetitions(rng):
    """2000 sets of 30 ragged tasks whose rows share an effect.

    The errors' mean square against the variance of the means, whose own relative error is
    √(2/2000) = 3 %; five of them.
    """
    sizes = rng.integers(1, 9, 30)
    tasks = normal_means(30, sizes, 1.0, 1.0)
    found = []
    for _ in range(2000):
        gap = rng.normal(size=30)[tasks.task_of_row] + rng.normal(size=tasks.num_rows)
        found.append(score(gap, tasks, "row")[:2])
    means, errors = np.array(found).T
    # the residuals of a mean over few unequal tasks are a little small: 1 − Σ n_j² / (Σ n_j)²
    close((errors**2).mean(), means.var(), rtol=5 * np.sqrt(2 / 2000))


def test_what_one_fit_cannot_score_is_left_out_of_its_difference(rng):
    tasks = normal_means(5, 2, 1.0, 1.0)
    a, b = rng.normal(size=(2, 10))
    a[3] = np.nan
    table = score_differences({"a": a, "b": b, "none": np.full(10, np.nan)}, tasks, reference="b")
    close(table.loc["a", "difference"], np.nanmean(a - b), rtol=1e-12)
    assert table["rows"].tolist() == [9, 10, 0]
    assert table["tasks"].tolist() == [5, 5, 0]
    assert np.isnan(table.loc["none", "log_density"])


def test_bad_scores_are_refused(rng):
    tasks = normal_means(5, 2, 1.0, 1.0)
    row, task = rng.normal(size=10), rng.normal(size=5)
    with refuses("no scores"):
        score_differences({}, tasks)
    with refuses("'a'", "(7,)", "10 rows or 5 tasks"):
        score_differences({"a": row[:7]}, tasks)
    with refuses("by row and by task"):
        score_differences({"a": row, "b": task}, tasks)
    with refuses("reference 'c'"):
        score_differences({"a": row}, tasks, reference="c")
    with refuses("per", "mean"):
        score_differences({"a": row}, tasks, per="mean")
    with refuses("by", "county"):
        score_differences({"a": row}, tasks, by="county")
    with refuses("all are NaN"):
        score_differences({"a": np.full(10, np.nan)}, tasks)
    uneven = normal_means(4, [0, 1, 1, 2], 1.0, 1.0)
    with refuses("as many rows as tasks", 'by="row"'):
        score_differences({"a": rng.normal(size=4)}, uneven)
    score_differences({"a": rng.normal(size=4)}, uneven, by="task")


def test_compare_on_new_tasks_says_the_same(fits, unseen):
    """compare(test=, support=) and new_task_scores are one mechanism."""
    support, query = unseen.split(0.5, seed=0)
    some = {label: fits[label] for label in ("EB", "MAML")}
    table = hb.compare(some, query, support=support, reference="EB").table
    ours = new_task_scores(some, support, query, reference="EB")
    for column in ("log_density", "log_density_se", "rmse", "rmse_se"):
        close(table[column], ours[column], rtol=1e-12)
    close(table.loc["MAML", "difference"], ours.loc["MAML", "difference"], rtol=1e-9)
    close(table.loc["MAML", "difference_se"], ours.loc["MAML", "difference_se"], rtol=1e-9)


def test_an_impossible_row_costs_its_fit_everything():
    """A density of zero is a score, not the lack of one."""
    tasks = hb.Tasks.from_arrays([(np.ones((2, 1)), [0.0, 1.0])] * 3)
    scores = {"a": -np.ones(6), "b": np.array([-0.5, -0.5, -np.inf, -0.5, -0.5, -0.5])}
    table = hb.checks.score_differences(scores, tasks, by="row")
    assert table.attrs["reference"] == "a"
    assert table.loc["b", "log_density"] == -np.inf
    assert table.loc["b", "difference"] == -np.inf
    assert table.loc["b", "rows"] == 6
