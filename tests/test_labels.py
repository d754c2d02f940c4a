"""Every label of every table stands beside the value that has its name.

The right value is the one that xarray selects by name, which knows nothing of the order in which a
table is written.
"""

from __future__ import annotations

import itertools
import time
import warnings
from typing import Any

import arviz_base
import arviz_stats
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from assertions import close, refuses

import hierbayes as hb
from hierbayes.adaptation import Laplace

pytestmark = [
    pytest.mark.filterwarnings("ignore::hierbayes.FitWarning"),
    # ArviZ's R-hat of the diagonal of correlations, and of drawn outcomes, which are constants
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
SAMPLE = ("chain", "draw")


def data(names: list[Any] | None = None, rows: int = 6, kind: str = "gaussian") -> pd.DataFrame:
    """Tasks whose intercepts and slopes are all different, by a unit and more."""
    rng = np.random.default_rng(3)
    named = names or ["Bill", "Ann", "Zoe", "Carl", "Eve"]
    task = np.repeat(np.arange(len(named)), rows)
    x, z = rng.normal(size=(2, len(task)))
    f = 3.0 * task + (10.0 - 2.0 * task) * x + 0.5 * z
    y = f + 0.1 * rng.normal(size=len(task))
    if kind == "poisson":
        y = rng.poisson(np.exp(0.1 * f))
    w = np.array([0.3, -1.0, 0.8, 0.1, -0.2, 1.1, 0.5])[task % 7]
    return pd.DataFrame({"y": y, "x": x, "z": z, "w": w, "who": [named[t] for t in task]})


FORMULA = "y ~ 1 + x + z + (1 + x | who)"


def expected(values: Any) -> dict[tuple[str, ...], float]:
    """What stands at every combination of coordinates, selected by name."""
    dims = [d for d in values.dims if d not in SAMPLE]
    means = values.mean(SAMPLE) if "chain" in values.dims else values
    found = {}
    for at in itertools.product(*(values[d].values.tolist() for d in dims)):
        chosen = means.sel(dict(zip(dims, at, strict=True)))
        found[tuple(map(str, at))] = float(chosen)
    return found


def check(table: Any, group: Any, names: Any = None, column: str = "mean") -> int:
    """Every entry of a group (of some variables) under its own label; how many there were."""
    seen = 0
    for name in names or group.data_vars:
        for at, value in expected(group[name]).items():
            label = f"{name}[{', '.join(at)}]" if at else name
            if name == "corr" and label not in table.index:
                continue
            close(float(table.loc[label, column]), value, rtol=1e-9, atol=1e-12)
            seen += 1
    return seen


@pytest.fixture(scope="module")
def point():
    return hb.empirical_bayes(*hb.from_formula(FORMULA, data()))


def test_the_check_sees_labels_that_are_turned_round(point):
    table = point.summary("theta")
    turned = table.set_index(table.index[np.arange(10).reshape(5, 2).T.ravel()])
    with pytest.raises(AssertionError):
        check(turned, point.datatree["point_estimate"], ["theta"], "estimate")


def drawn(model: Any, tasks: Any) -> hb.Fit:
    """A fit by full Bayes: draws of the right shapes stand for what would have been learned."""
    from hierbayes.simulation import draw

    rng = np.random.default_rng(8)
    resolved = model.resolve(tasks)
    phis = {
        name: draw(name, hyperprior, 40, rng).reshape(2, 20, *hyperprior.shape())
        for name, hyperprior in resolved.phi_distributions(tasks).items()
    }
    phi = {name: value.mean((0, 1)) for name, value in phis.items()}
    theta = rng.normal(size=(2, 20, tasks.num_tasks, len(tasks.coef)))
    return hb.Fit(hb.meta.FullBayes(), resolved, tasks, phi, Laplace(), None, phis, theta)


@pytest.fixture(scope="module")
def families():
    """Full Bayes with correlations and β; with γ of tasks' own predictors; with κ of counts."""
    tasks = hb.Tasks.from_dataframe(
        data(), task="who", outcome="y", predictors=["x"], shared=["z"], task_predictors=["w"]
    )
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    counts = hb.from_formula("y ~ 1 + (1 + x | who)", data(kind="poisson"),
                             family="negative_binomial")  # fmt: skip
    return {
        "corr": drawn(*hb.from_formula(FORMULA, data())), "gamma": drawn(model, tasks),
        "own": drawn(*counts),
    }  # fmt: skip


@pytest.fixture(scope="module")
def full(families):
    return families["corr"]


@pytest.mark.parametrize(
    ("name", "group"), [("corr", "posterior"), ("gamma", "prior"), ("own", "posterior")]
)
def test_arvizs_own_summary_of_the_tree(families, name, group):
    tree = families[name].datatree
    assert {"theta", "mu", "tau"} <= set(tree[group].data_vars)
    table = arviz_stats.summary(tree, group=group, round_to="none")
    assert check(table, tree[group]) == len(table) >= 14
    # by a part of the names too, and without some of them
    names = [str(n) for n in tree[group].data_vars]
    like = ({"var_names": "t", "filter_vars": "like"}, [n for n in names if "t" in n])
    without = ({"var_names": ["~mu"]}, [n for n in names if n != "mu"])
    for some, left in (like, without):
        chosen: Any = arviz_stats.summary(tree, group=group, round_to="none", **some)
        assert check(chosen, tree[group], left) == len(chosen)


def test_gamma_and_own_parameters_are_there(families):
    assert families["gamma"].datatree["posterior"]["gamma"].dims[2:] == ("coef", "task_predictor")
    assert "concentration" in families["own"].summary().index
    assert "corr[Intercept, x]" in families["corr"].summary().index


def test_frames_and_exploded_variables_of_arviz(full):
    group = full.datatree["posterior"].to_dataset()
    frame = arviz_base.dataset_to_dataframe(group)
    assert check(frame.T.assign(mean=frame.mean()), group) == frame.shape[1]
    apart = arviz_base.explode_dataset_dims(group, ["task", "coef", "coef_bis", "shared"])
    assert len(apart.data_vars) == frame.shape[1]


@pytest.mark.parametrize("name", ["corr", "gamma", "own"])
def test_our_summary_of_draws_in_any_order_of_names(families, name):
    fit = families[name]
    group = fit.datatree["posterior"]
    table = fit.summary()
    assert not table.index.str.startswith("theta").any()
    check(table, group, list(fit.phi_draws))
    for names in (["mu", "theta"], ["theta", "mu"], ["tau", "theta", "mu"], ("theta",)):
        chosen = fit.summary(names)
        assert check(chosen, group, names) == len(chosen)
        order = chosen.index.str.replace(r"\[.*", "", regex=True)
        assert list(dict.fromkeys(order)) == list(names)
    assert check(fit.summary("theta"), group, ["theta"]) == 10
    assert {"mean", "sd", "r_hat", "ess_bulk"} <= set(table.columns)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["corr", "gamma"])
def test_labels_outlive_files(families, name, tmp_path):
    fit = families[name]
    fit.save(tmp_path / "fit.nc")
    again = hb.load(tmp_path / "fit.nc")
    pd.testing.assert_frame_equal(again.summary("theta"), fit.summary("theta"))
    pd.testing.assert_frame_equal(again.summary(), fit.summary())
    fit.datatree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    stored = arviz_base.convert_to_datatree(str(tmp_path / "tree.nc"))
    for tree in (again.datatree, stored):
        for group in ("posterior", "prior"):
            table = arviz_stats.summary(tree, group=group, round_to="none")
            assert check(table, fit.datatree[group]) == len(table)
    stored.close()


def test_predictive_groups_are_labelled_by_row(full):
    tree = full.datatree
    for group in ("posterior_predictive", "prior_predictive"):
        table = arviz_stats.summary(tree, group=group, round_to="none")
        assert check(table, tree[group]) == full.tasks.num_rows


METHODS = {
    "empirical Bayes": lambda m, t: hb.empirical_bayes(m, t),
    "reml": lambda m, t: hb.empirical_bayes(m, t, "reml"),
    "no pooling": lambda m, t: hb.no_pooling(m, t),
    "complete pooling": lambda m, t: hb.complete_pooling(m, t),
}
STEPS = {
    "MAML": lambda m, t: hb.maml(m, t, num_meta_steps=3),
    "iMAML": lambda m, t: hb.imaml(m, t, num_meta_steps=3),
    "Reptile": lambda m, t: hb.reptile(m, t, num_meta_steps=3),
}


QUICK = ("empirical Bayes", "no pooling")


@pytest.mark.parametrize(
    "method",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in METHODS | STEPS],
)
def test_fits_without_draws_give_estimates_and_their_errors(method):
    fit = (METHODS | STEPS)[method](*hb.from_formula("y ~ 1 + x + (1 + x | who)", data()))
    point = fit.datatree["point_estimate"]
    table = fit.summary()
    assert list(table.columns) == ["estimate", "se"]
    check(table, point, list(fit.phi), "estimate")
    theta = fit.summary("theta")
    assert check(theta, point, ["theta"], "estimate") == len(theta) == 10
    for (t, c), sd in expected(fit.adapted.sd).items():
        np.testing.assert_equal(theta.loc[f"theta[{t}, {c}]", "se"], sd)  # NaN of a point
    close(theta.loc["theta[Ann, x]", "estimate"], fit.theta.sel(task="Ann", coef="x"), rtol=1e-12)
    # correlations of estimates, the standard errors by their own labels
    for name, errors in fit.standard_errors.items():
        for at in np.ndindex(np.shape(errors)):
            where = ", ".join(str(point[name][d].values[i])
                              for d, i in zip(point[name].dims, at, strict=True))  # fmt: skip
            label = f"{name}[{where}]" if where else name
            if label in table.index:
                close(table.loc[label, "se"], np.asarray(errors)[at], rtol=1e-12)


def test_draws_of_theta_at_a_point_phi(point):
    tree = point.datatree
    table = arviz_stats.summary(tree, round_to="none")
    assert check(table, tree["posterior"]) == 10


def test_names_that_are_not_there_are_refused(point):
    with refuses("summary", "'tua'", "'tau'"):
        point.summary("tua")
    with refuses("summary", "'sgima'"):
        point.summary(["mu", "sgima"])


def test_tasks_whose_names_read_alike_are_refused():
    with refuses("twice", "'1'"):
        hb.Tasks.from_arrays([(np.ones((2, 1)), [1.0, 2.0])] * 2, names=np.array([1, "1"], object))


def test_tasks_of_odd_names():
    names = ["a, b", "a", "[c]"]
    labels = ["theta[a, b, Intercept]", "theta[a, Intercept]", "theta[[c], Intercept]"]
    arrays = [(np.ones((3, 1)), k + np.array([0.0, 0.1, 0.2])) for k in range(3)]
    tasks = hb.Tasks.from_arrays(arrays, names=names, coef=["Intercept"])
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    table = hb.no_pooling(model, tasks).summary("theta")
    assert table.index.tolist() == labels
    close(table["estimate"], [0.1, 1.1, 2.1], rtol=1e-9)


def test_two_places_never_share_a_label():
    """Task "a, b" with coefficient "c" reads like task "a" with coefficient "b, c"."""
    rows = np.column_stack([np.ones(4), [0.0, 1.0, 2.0, 3.0]])
    noise = 1e-6 * np.array([1.0, -1.0, -1.0, 1.0])  # at right angles to both columns
    arrays = [(rows, rows @ [k, 2.0 * k] + noise) for k in (1.0, 2.0)]
    tasks = hb.Tasks.from_arrays(arrays, names=["a, b", "a"], coef=["c", "b, c"])
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    table = hb.no_pooling(model, tasks).summary("theta")
    assert table.index.is_unique
    close(table.loc["theta['a, b', 'c']", "estimate"], 1.0, rtol=1e-6)
    close(table.loc["theta['a', 'b, c']", "estimate"], 4.0, rtol=1e-6)


@pytest.mark.slow
def test_the_cost_grows_as_the_number_of_tasks():
    """20,000 tasks named by strings in a second; 16 times 5,000's cost where it is quadratic."""
    size = 20_000
    arrays = [(np.ones((2, 1)), np.array([k, k + 1.0])) for k in range(size)]
    tasks = hb.Tasks.from_arrays(arrays, names=[f"task {k}" for k in range(size)])
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    fit = hb.empirical_bayes(model, tasks)
    assert fit.theta.shape == (size, 1)
    started = time.process_time()
    table = fit.summary("theta")
    assert time.process_time() - started < 2.0  # 0.1 s here; 2.3 s and more where quadratic
    close(table["estimate"].to_numpy(), fit.theta.values[:, 0], rtol=0)
    assert table.index[7] == f"theta[task 7, {tasks.coef[0]}]"


def test_a_task_in_a_file_of_xarrays_own_reads_the_same(full, tmp_path):
    """Variables written in alphabetical order, as other programs do, are read by name."""
    group = full.datatree["posterior"].to_dataset()
    plain = group[sorted(map(str, group.data_vars))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        check(full.summary("theta"), plain, ["theta"])
    assert isinstance(plain, xr.Dataset)
