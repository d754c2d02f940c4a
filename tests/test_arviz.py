"""ArviZ's own functions take ``fit.datatree`` as it is, in ArviZ 0.8 and 1.x alike."""

from __future__ import annotations

from typing import Any

import arviz_stats
import matplotlib
import numpy as np
import pytest
from assertions import close
from scipy import special, stats

matplotlib.use("Agg")

# The shared fits are 200 draws long: ArviZ rightly says that some Pareto k are high.
few_draws = pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")


def test_summary_names_what_it_summarises(radon_full):
    table: Any = arviz_stats.summary(radon_full.datatree, var_names=["mu", "tau", "beta", "sigma"])
    names = ["mu[Intercept]", "mu[floor]", "tau[Intercept]", "tau[floor]", "beta[log_uranium]",
             "sigma"]  # fmt: skip
    assert list(table.index) == names
    theta: Any = arviz_stats.summary(radon_full.datatree, var_names=["theta"])
    assert "theta[AITKIN, Intercept]" in theta.index


def test_our_summary_judges_correlations_but_not_their_diagonal(radon_full):
    table = radon_full.summary()
    pairs = [name for name in table.index if name.startswith("corr")]
    assert pairs == ["corr[Intercept, floor]"]
    assert np.isfinite(table.loc[pairs, "r_hat"].astype(float)).all()


@few_draws
def test_loo_by_hand(radon_full):
    tree = radon_full.datatree
    found: Any = arviz_stats.loo(tree, pointwise=True)
    # log likelihood of one row from the draws themselves
    posterior, row = tree["posterior"], 5
    x, z = radon_full.tasks.predictors[row], radon_full.tasks.shared[row]
    theta = posterior["theta"].isel(task=radon_full.tasks.task_of_row[row]).values
    mean = theta @ x + posterior["beta"].values @ z
    expected = stats.norm.logpdf(radon_full.tasks.outcome[row], mean, posterior["sigma"].values)
    close(tree["log_likelihood"]["y"].isel(row=row).values, expected, rtol=1e-12)
    # a well-behaved row (k < 0.5): PSIS is plain importance sampling but for its smoothed tail
    assert found.pareto_k.values[row] < 0.5
    plain = np.log(expected.size) - special.logsumexp(-expected)
    close(found.elpd_i.values[row], plain, atol=0.02)


# ArviZ 0.8 itself calls what pandas 4 will change
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@few_draws
def test_compare_ranks_fits(radon_full, radon_ml):
    fits = {"full Bayes": radon_full.datatree, "empirical Bayes": radon_ml.datatree}
    table: Any = arviz_stats.compare(fits)
    assert set(table.index) == set(fits)


@pytest.mark.parametrize("name", ["radon_full", "radon_ml"])
def test_plot_forest_draws(name, request):
    import arviz_plots
    import matplotlib.pyplot as plt

    fit = request.getfixturevalue(name)
    collection = arviz_plots.plot_forest(
        fit.datatree,
        var_names=["theta"],
        coords={"task": fit.tasks.names[:5]},
        backend="matplotlib",
    )
    assert collection is not None
    plt.close("all")


def test_point_estimates_are_no_chain(radon_maml, radon_ml):
    assert "posterior" not in radon_maml.datatree.children
    estimate = radon_maml.datatree["point_estimate"]
    assert "chain" not in estimate.dims
    assert estimate["mu"].dims == ("coef",)
    # draws of theta given phi-hat are honest draws: four chains of a normal
    posterior = radon_ml.datatree["posterior"]
    assert list(posterior.data_vars) == ["theta"]
    assert posterior.sizes["chain"] == 4


def test_log_likelihood_by_task_sums_rows(radon_full):
    by_task = radon_full.log_likelihood(by="task")["y"]
    rows = radon_full.log_likelihood()["y"]
    first = rows.isel(row=slice(radon_full.tasks.starts[3], radon_full.tasks.starts[4])).sum("row")
    # sums of at most 116 terms of order one, by differences of a running sum over 919
    close(by_task.isel(task=3).values, first.values, rtol=1e-9)
