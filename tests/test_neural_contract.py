"""Every way to learn a network's prior answers the same demands, on the same small episodes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from assertions import close

import hierbayes as hb

PRIOR = hb.priors.Gaussian(correlated=False)
EPISODES = hb.datasets.sinusoids(shots=5)
SHORT: dict[str, Any] = {
    "num_meta_steps": 12, "batch_size": 4, "held_out": 10, "evaluate_every": 6, "seed": 1,
}  # fmt: skip
"""Held-out and new tasks are ten, as in test_training: what is compiled for some serves all."""
NETWORK = hb.HierarchicalModel(hb.likelihoods.Network.mlp([1, 8, 1], activation=jnp.tanh), PRIOR)
FEATURES = hb.HierarchicalModel(hb.likelihoods.LastLayer.mlp([1, 8], activation=jnp.tanh), PRIOR)


@dataclass(frozen=True)
class Promise:
    """A method, its model, what φ holds, and what it promises beyond the rest."""

    run: Callable[..., hb.Fit]
    phi: set[str]
    model: hb.HierarchicalModel = NETWORK
    prior: bool = False
    spread: bool = False


POINT = {"mu", "sigma", "sigma_query"}
METHODS = {
    "MAML": Promise(lambda m, e, **s: hb.maml(m, e, 2, 0.02, **s), POINT),
    "first-order MAML": Promise(
        lambda m, e, **s: hb.maml(m, e, 2, 0.02, derivative="first-order", **s), POINT
    ),
    "Meta-SGD": Promise(
        lambda m, e, **s: hb.maml(m, e, 1, 0.02, learn_step_size="coef", **s),
        {*POINT, "step_size"},
    ),
    "ANIL": Promise(
        lambda m, e, **s: hb.maml(m, e, 2, 0.02, **s), {*POINT, "features"}, FEATURES
    ),
    "iMAML": Promise(
        lambda m, e, **s: hb.imaml(m, e, num_steps=4, **s), {*POINT, "tau"}, prior=True
    ),
    "Reptile": Promise(lambda m, e, **s: hb.reptile(m, e, 2, 0.02, **s), POINT),
    "LLAMA": Promise(lambda m, e, **s: hb.meta.llama(m, e, 2, 0.02, **s), POINT, spread=True),
    "ABML": Promise(
        lambda m, e, **s: hb.meta.abml(m, e, 2, 0.02, num_samples=2, **s),
        {"mu", "tau", "sigma"}, prior=True, spread=True,
    ),
    "last layer": Promise(
        hb.empirical_bayes, {"mu", "tau", "sigma", "features"}, FEATURES, prior=True, spread=True
    ),
}  # fmt: skip


QUICK = ("MAML",)
"""What the fast run holds to the contract; the others take seconds to compile each."""


@functools.cache
def fitted(name: str) -> hb.Fit:
    """The fit of one method that all tests of this file look at."""
    return METHODS[name].run(METHODS[name].model, EPISODES, **SHORT)


@pytest.fixture(
    scope="module",
    params=[n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in METHODS],
)
def made(request) -> tuple[Promise, hb.Fit]:
    return METHODS[request.param], fitted(request.param)


def test_phi_holds_what_is_promised_and_is_finite(made):
    promise, fit = made
    assert set(fit.phi) == promise.phi
    for value in fit.phi.values():
        assert isinstance(value, np.ndarray | np.floating)
        assert np.isfinite(value).all()
    assert isinstance(fit.warnings, tuple)
    assert fit.info["seconds"] > 0
    assert fit.info["history"]["step"] == [0, 6, 12]


def test_new_tasks_adapt_and_are_predicted_with_intervals(made):
    promise, fit = made
    support, query = EPISODES.draw(10, seed=7)
    adapted = fit.adapt(support)
    d = fit.phi["mu"].size
    assert adapted.theta.shape == (10, d)
    assert adapted.theta.dims == ("task", "coef")
    seen = adapted.predict(query)
    low, high = seen.interval(0.9)
    assert (low < seen.mean).all()
    assert (seen.mean < high).all()
    assert np.isfinite(seen.log_density()).all()
    if promise.spread:
        assert np.ptp(seen.sd) > 0
    else:
        close(seen.sd, np.full(seen.sd.shape, float(fit.phi["sigma_query"])), rtol=1e-6)


@pytest.mark.parametrize("name", ["MAML", pytest.param("ABML", marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_bits(name):
    """The loop and its keys are one for all methods; ABML alone draws within it besides."""
    fit, promise = fitted(name), METHODS[name]
    again = promise.run(promise.model, EPISODES, **SHORT)
    for key, value in fit.phi.items():
        np.testing.assert_array_equal(value, again.phi[key])
    assert not jax.config.jax_enable_x64


def test_another_seed_gives_another_fit():
    other = METHODS["MAML"].run(NETWORK, EPISODES, **SHORT | {"seed": 2})
    assert (other.phi["mu"] != fitted("MAML").phi["mu"]).any()


def test_the_fit_is_a_tree_of_arviz_and_a_table(made):
    _, fit = made
    tree = fit.datatree
    assert {"point_estimate", "observed_data", "constant_data"} <= set(tree.children)
    assert tree["point_estimate"]["theta"].dims == ("task", "coef")
    assert "mu" in tree["point_estimate"]
    table = fit.summary(var_names=["mu"])
    assert len(table) == fit.phi["mu"].size


def test_a_file_gives_the_fit_back(made, tmp_path):
    promise, fit = made
    fit.save(tmp_path / "fit.nc")
    again = hb.load(tmp_path / "fit.nc", model=promise.model)
    support, query = EPISODES.draw(10, seed=8)
    close(again.adapt(support).predict(query).mean, fit.adapt(support).predict(query).mean, rtol=0)
    assert again.info["history"]["held_out"] == fit.info["history"]["held_out"]


def test_a_prior_that_all_tasks_share_is_given_where_there_is_one(made):
    promise, fit = made
    if promise.prior:
        assert fit.prior.variance.shape == fit.phi["mu"].shape
    else:
        with pytest.raises(AttributeError, match="equivalent_prior"):
            fit.prior  # noqa: B018
    with pytest.raises(AttributeError, match="log_evidence"):
        fit.log_evidence  # noqa: B018


def test_wrong_rows_are_refused_in_words(made):
    _, fit = made
    wide = hb.Tasks.from_arrays([(np.zeros((3, 2)), np.zeros(3))])
    with pytest.raises(hb.InputError, match=r"rows.* x of shape \(2, ?(2)?\)"):
        fit.adapt(wide)


@pytest.mark.slow
def test_fits_stand_side_by_side_on_new_tasks():
    fits = {name: fitted(name) for name in ("MAML", "ANIL", "last layer")}
    support, query = EPISODES.draw(10, seed=3)
    comparison = hb.compare(fits, test=query, support=support)
    table = comparison.table
    assert comparison.reference == "last layer"
    assert table["log_density"].notna().all()
    for name, fit in fits.items():
        seen = fit.adapt(support).predict(query)
        close(table.loc[name, "log_density"], seen.log_density().mean(), rtol=1e-9)
        close(table.loc[name, "rmse"], np.sqrt(np.mean((seen.mean - query.outcome) ** 2)))
    assert np.isnan(table.loc["MAML", "theta_difference"])
    comparison.plot()
    with pytest.raises(hb.InputError, match="support is given without test"):
        hb.compare(fits, support=support)
    with pytest.raises(hb.InputError, match=r"episodes\.draw"):
        hb.compare(fits)


@pytest.mark.slow
def test_classes_of_images_of_bytes_are_learned_and_compared_without_an_rmse():
    """Bars that are bright in one of four rows: after 150 meta-steps all is well above chance."""
    rng = np.random.default_rng(6)
    labels = np.repeat(np.arange(4), 12)
    x = rng.integers(0, 60, (48, 4, 4), dtype=np.uint8)
    x[np.arange(48), labels] += 180
    network = hb.likelihoods.Network(
        lambda p, x: jnp.tanh(x.reshape(len(x), -1) / 255 @ p[0]) @ p[1],
        lambda key: [0.5 * jax.random.normal(k, s) for k, s in zip(
            jax.random.split(key), [(16, 12), (12, 2)], strict=True)],
        hb.likelihoods.Categorical(2),
    )  # fmt: skip
    model = hb.HierarchicalModel(network, PRIOR)
    episodes = hb.Episodes.from_classes(x, labels, ways=2, shots=2, queries=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = hb.maml(
            model, episodes, 3, 0.5, num_meta_steps=150, batch_size=8, held_out=20,
            optimiser=optax.adam(0.02), progress=False,
        )  # fmt: skip
    assert set(fit.phi) == {"mu"}
    support, query = episodes.draw(20, seed=9)
    seen = fit.adapt(support).predict(query)
    close(seen.probabilities.sum(1), np.ones(query.num_rows), rtol=1e-12)
    right = (seen.probabilities.argmax(1) == query.outcome).mean()
    assert right > 0.9, f"{right:.0%} of 160, where guessing gets half"
    table = hb.compare({"MAML": fit}, test=query, support=support).table
    assert np.isnan(table.loc["MAML", "rmse"])
    close(table.loc["MAML", "log_density"], seen.log_density().mean(), rtol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        draws = hb.meta.abml(model, episodes, 2, 0.1, num_samples=2, **SHORT)
    close(draws.adapt(support).predict(query).probabilities.sum(1), np.ones(query.num_rows))
