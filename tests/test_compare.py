"""Scores against hand computation; the table, the pictures and the report that hold them."""

from __future__ import annotations

import html.parser
import re

import matplotlib
import numpy as np
import pytest
from assertions import close, refuses
from scipy import stats

import hierbayes as hb
from hierbayes.checks import held_out_scores, leave_one_task_out, theta_differences
from hierbayes.checks.scores import mean_over_tasks
from hierbayes.fit import Prediction

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def fits(radon_no_pooling, radon_maml, radon_ml, radon_full, radon_complete_pooling):
    return {
        "no pooling": radon_no_pooling, "MAML": radon_maml, "empirical Bayes": radon_ml,
        "full Bayes": radon_full, "complete pooling": radon_complete_pooling,
    }  # fmt: skip


def simple_prediction(means, sds, y, sizes):
    arrays = [(np.ones((n, 1)), part) for n, part in zip(sizes, np.split(y, np.cumsum(sizes)[:-1]),
                                                         strict=True)]  # fmt: skip
    tasks = hb.Tasks.from_arrays(arrays)
    return Prediction("known task", tasks, stats.norm(means, sds), np.zeros(len(y), bool))


def test_scores_of_a_single_normal_by_hand():
    y = np.array([0.0, 1.0, -2.0, 0.5])
    means, sds = np.array([[0.0, 0.5, 0.0, 1.0]]), np.array([[1.0, 2.0, 1.0, 0.5]])
    scores = held_out_scores(simple_prediction(means, sds, y, [1, 3]))
    close(scores["log_density"], stats.norm.logpdf(y, means[0], sds[0]).mean(), rtol=1e-12)
    close(scores["rmse"], np.sqrt(((y - means[0]) ** 2).mean()), rtol=1e-12)
    inside = np.abs((y - means[0]) / sds[0]) < stats.norm.ppf(0.9)
    close(scores["coverage_80"], inside.mean(), rtol=1e-12)
    close(scores["width_95"], (2 * stats.norm.ppf(0.975) * sds[0]).mean(), rtol=1e-12)


def test_scores_of_a_mixture_by_quadrature():
    # two components: density, distribution and quantiles by direct evaluation of the mixture
    y = np.array([0.3, -1.0])
    means, sds = np.array([[0.0, -1.0], [2.0, 1.0]]), np.array([[1.0, 0.5], [0.5, 2.0]])
    prediction = simple_prediction(means, sds, y, [1, 1])
    close(prediction.log_density(), np.log(stats.norm.pdf(y, means, sds).mean(0)), rtol=1e-12)
    low, high = prediction.interval(0.8)
    # bisection stops at a millionth of the smallest sd, and a density is below one a unit
    close(stats.norm.cdf(low, means, sds).mean(0), [0.1, 0.1], atol=1e-6)
    close(stats.norm.cdf(high, means, sds).mean(0), [0.9, 0.9], atol=1e-6)
    draws = prediction.draws(20_000, seed=1)
    # standard error of a mean of 20,000 draws, five of them
    close(draws.mean(0), prediction.mean, atol=5 * prediction.sd.max() / np.sqrt(20_000))
    close(draws.std(0), prediction.sd, rtol=0.05)


def test_standard_errors_count_tasks_not_rows(rng):
    # rows within a task are copies: the error of the mean is that of the 40 tasks' values
    by_task = rng.normal(size=40)
    rows, task = np.repeat(by_task, 10), np.repeat(np.arange(40), 10)
    mean, se = mean_over_tasks(rows, task)
    close(mean, by_task.mean(), rtol=1e-12)
    close(se, by_task.std(ddof=1) / np.sqrt(40), rtol=1e-12)


def test_table_of_held_out_rows(radon, fits):
    _, test = radon.tasks.hold_out(0.2, seed=3)
    comparison = hb.compare(fits, test=test)
    table = comparison.table
    assert list(table.index) == list(fits)
    assert comparison.reference == "full Bayes"
    for label, fit in fits.items():
        log_density = fit.predict(test).log_density()
        close(table.loc[label, "log_density"], np.nanmean(log_density), rtol=1e-12)
        assert table.loc[label, "rows"] + table.loc[label, "left_out"] == test.num_rows
    gap = fits["MAML"].predict(test).log_density() - fits["full Bayes"].predict(test).log_density()
    close(table.loc["MAML", "difference"], gap.mean(), rtol=1e-12)
    assert np.isnan(table.loc["full Bayes", "difference"])
    assert table.loc["full Bayes", "theta_difference"] == 0
    close(table.loc["full Bayes", "theta_sd_ratio"], 1.0)
    assert np.isnan(table.loc["MAML", "theta_sd_ratio"])  # a point has no sd
    assert table.loc["complete pooling", "theta_sd_ratio"] == 0.0
    text = str(comparison)
    assert "full Bayes" in text
    assert "—" in text
    assert "nan" not in text.lower()


def test_rows_that_no_pooling_cannot_predict_are_left_out_and_counted(radon):
    # train on basements and one first-floor house, which keeps the column alive over all tasks
    # together: in every other county the floor's coefficient is unknown
    upstairs = radon.tasks.predictors[:, 1] == 1
    keep = ~upstairs
    first = int(np.flatnonzero(upstairs)[0])
    keep[first] = True
    train, test = radon.tasks.keep_rows(keep), radon.tasks.keep_rows(~keep)
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    prediction = hb.no_pooling(model, train).predict(test)
    elsewhere = test.task_of_row != radon.tasks.task_of_row[first]
    np.testing.assert_array_equal(prediction.unidentified, elsewhere)
    scores = held_out_scores(prediction)
    assert scores["left_out"] == prediction.unidentified.sum()


def test_differences_of_theta_by_hand(radon_ml, radon_full):
    values = theta_differences(radon_ml, radon_full)
    sd = radon_full.adapted.draws.std(0, ddof=1)
    gap = np.abs(radon_ml.theta.values - radon_full.adapted.draws.mean(0)) / sd
    close(values["theta_difference"], gap.mean(), rtol=1e-9)
    ratio = np.exp(np.log(radon_ml.adapted.sd.values / sd).mean())
    close(values["theta_sd_ratio"], ratio, rtol=1e-9)


@pytest.mark.slow
def test_leave_one_task_out_is_refitting_by_hand(schools):
    model, tasks = schools.model, schools.tasks
    fit = hb.empirical_bayes(model, tasks, "map")
    found = leave_one_task_out(fit)["log_density"]
    y, se = tasks.outcome, tasks.slots["known_se"]
    for j in (0, 5):
        rest = hb.empirical_bayes(fit.model, tasks.take(np.delete(np.arange(8), j)), "map")
        mu, tau = rest.phi["mu"][0], rest.phi["tau"][0]
        close(found[j], stats.norm.logpdf(y[j], mu, np.hypot(tau, se[j])), rtol=1e-9)


def test_without_held_out_rows_tasks_are_left_out(schools, schools_full):
    fits = {
        "full Bayes": schools_full, "no pooling": hb.no_pooling(schools.model, schools.tasks),
        "complete pooling": hb.complete_pooling(schools.model, schools.tasks),
        "MAML": "no task has two rows",
    }  # fmt: skip
    comparison = hb.compare(fits)
    table = comparison.table
    # complete pooling without school A: the weighted mean of the others, whose own error counts not
    assert np.isfinite(table.loc[["full Bayes", "complete pooling"], "log_density"]).all()
    assert np.isnan(table.loc["MAML"]).all()
    assert np.isnan(table.loc["no pooling", "log_density"])
    assert any(note.startswith("MAML: no task") for note in comparison.notes)


@pytest.mark.slow
def test_importance_agrees_with_refits_of_full_bayes(schools, schools_full):
    # leave school A out by a refit with its own draws: log p(y_A | others), averaged over phi
    rest = schools.tasks.take(np.arange(1, 8))
    refit = hb.full_bayes(schools_full.model, rest, num_draws=500, num_warmup=300, seed=2,
                          progress=False)  # fmt: skip
    mu, tau = refit.phi_draws["mu"][..., 0].ravel(), refit.phi_draws["tau"][..., 0].ravel()
    density = stats.norm.pdf(28.0, mu, np.hypot(tau, 15.0))
    exact, error = np.log(density.mean()), density.std() / density.mean() / np.sqrt(200)
    found = leave_one_task_out(schools_full)["log_density"][0]
    # both sides are means of at least 100 effective draws (QUICK holds 200 in all): five errors
    assert abs(found - exact) < 5 * np.hypot(error, error)


def test_what_cannot_be_compared_is_refused(radon_ml, schools_full):
    with refuses("different tasks"):
        hb.compare({"a": radon_ml, "b": schools_full})
    with refuses("takes fits", "'a'"):
        hb.compare({"a": 3.0})
    with refuses("no fit"):
        hb.compare({"MAML": "none"})
    with refuses("reference", "b"):
        hb.compare({"a": radon_ml}, reference="b")


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]


def test_report_needs_nothing_else(radon, fits, tmp_path):
    _, test = radon.tasks.hold_out(0.2, seed=3)
    hb.compare(fits, test=test).report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert reader.sources
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert "script" not in reader.tags
    assert "AITKIN" in page
    assert "full Bayes" in page
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert cells
    assert not [cell for cell in cells if re.match(r"-?(nan|inf)", cell, re.IGNORECASE)]


def test_plots_draw_on_given_axes_and_return_them(fits):
    figure, axes = plt.subplots(1, 3)
    assert hb.plots.shrinkage(fits, coef="floor", ax=axes[0]) is axes[0]
    assert hb.plots.learned_prior(fits, ax=axes[1]) is axes[1]
    assert hb.plots.forest(fits, ax=axes[2]) is axes[2]
    assert len(axes[0].lines) == 85  # a line a task
    assert [t.get_text() for t in axes[0].get_xticklabels()] == list(fits)
    assert len(axes[2].get_yticks()) == 30  # max_tasks
    figure.canvas.draw()


def test_plots_refuse_an_unknown_coefficient(fits):
    with refuses("flor", "floor"):
        hb.plots.shrinkage(fits, coef="flor")


def test_comparison_draws_itself(radon, fits):
    _, test = radon.tasks.hold_out(0.2, seed=3)
    axes = hb.compare(fits, test=test).plot(coef="floor")
    assert len(axes) == 3
    axes[0].figure.canvas.draw()
