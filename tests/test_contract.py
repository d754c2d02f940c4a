"""Every method answers the same demands on the same tasks: radon, 85 counties, β = log_uranium.

``Promise`` says in what the methods may differ; everything else they share.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from assertions import close
from conftest import QUICK, Problem, quietly

import hierbayes as hb

DIMS = {
    "mu": ("coef",), "tau": ("coef",), "corr": ("coef", "coef_bis"), "beta": ("shared",),
    "sigma": (), "sigma_query": (), "theta": ("task", "coef"),
}  # fmt: skip
"""Design.md section 3: always with these dimensions."""


@dataclass(frozen=True)
class Promise:
    """A method, how to run it, and what it promises beyond the rest."""

    fixture: str
    run: Callable[..., hb.Fit]
    phi: tuple[str, ...]
    evidence: bool
    prior: bool
    draws: tuple[str, ...] = ()

    @property
    def phi_is_point(self) -> bool:
        return "mu" not in self.draws


FULL = ("mu", "tau", "corr", "beta", "sigma")


def eb(criterion: str) -> Callable[..., hb.Fit]:
    return lambda model, tasks: hb.empirical_bayes(model, tasks, criterion=criterion)


METHODS = {
    "no pooling": Promise("radon_no_pooling", hb.no_pooling, ("beta", "sigma"), False, False),
    "complete pooling": Promise(
        "radon_complete_pooling", hb.complete_pooling, ("mu", "tau", "beta", "sigma"), True, True
    ),
    "ml": Promise("radon_ml", eb("ml"), FULL, True, True, ("theta",)),
    "reml": Promise("radon_reml", eb("reml"), FULL, True, True, ("theta",)),
    "map": Promise("radon_map", eb("map"), FULL, True, True, ("theta",)),
    "maml": Promise("radon_maml", hb.maml, ("mu", "beta", "sigma", "sigma_query"), False, False),
    "imaml": Promise("radon_imaml", hb.imaml, (*FULL, "sigma_query"), False, True),
    "reptile": Promise(
        "radon_reptile", hb.reptile, ("mu", "beta", "sigma", "sigma_query"), False, False
    ),
    "full Bayes": Promise(
        "radon_full", lambda m, t: hb.full_bayes(m, t, **QUICK), FULL, True, True, (*FULL, "theta")
    ),
}


@dataclass(frozen=True)
class Made:
    """One method's promise kept: the fit, and the problem that it was made from."""

    promise: Promise
    fit: hb.Fit
    problem: Problem


@pytest.fixture(
    params=[pytest.param(n, marks=pytest.mark.slow) if n == "map" else n for n in METHODS]
)
def made(request: pytest.FixtureRequest, radon: Problem) -> Made:
    """Of the three criteria of empirical Bayes "map" takes seconds to compile."""
    promise = METHODS[request.param]
    return Made(promise, request.getfixturevalue(promise.fixture), radon)


# --------------------------------------------------------------------- estimates


def test_phi_has_the_promised_names_and_shapes(made):
    phi = made.fit.phi
    assert set(phi) == set(made.promise.phi)
    sizes = {"coef": 2, "coef_bis": 2, "shared": 1}
    for name, value in phi.items():
        assert isinstance(value, np.ndarray | np.floating)
        assert np.asarray(value).dtype == np.float64
        assert np.shape(value) == tuple(sizes[d] for d in DIMS[name])
        assert np.isfinite(value).all()
    if "corr" in phi:
        close(np.diag(phi["corr"]), [1.0, 1.0], rtol=1e-12)


def test_theta_is_labelled_by_task_and_coefficient(made):
    theta = made.fit.theta
    assert theta.dims == ("task", "coef")
    assert theta.dtype == np.float64
    assert theta["coef"].values.tolist() == ["Intercept", "floor"]
    assert theta["task"].values.tolist() == made.problem.data["county"].drop_duplicates().tolist()
    assert np.isfinite(theta.values).all()


def test_warnings_are_sentences(made):
    assert isinstance(made.fit.warnings, tuple)
    assert all(isinstance(w, str) and len(w.split()) > 3 for w in made.fit.warnings)


def test_log_evidence_is_a_number_or_says_why_not(made):
    if made.promise.evidence:
        assert isinstance(made.fit.log_evidence, float)
        # 919 rows with a residual sd of 0.75: about −919 (½ log 2πe + log 0.75) = −1039
        assert -1300 < made.fit.log_evidence < -950
    else:
        with pytest.raises(AttributeError, match=r"no log_evidence: \w+ "):
            _ = made.fit.log_evidence


def test_the_prior_is_a_distribution_or_says_why_not(made):
    if not made.promise.prior:
        with pytest.raises(AttributeError, match="learns no prior"):
            _ = made.fit.prior
        return
    prior = made.fit.prior
    assert prior.event_shape == (2,)
    draws = np.asarray(prior.sample(jax.random.key(0), (4000,)))
    sd = np.asarray(made.fit.phi["tau"])
    # ten standard errors of 4,000 draws, and for a point mass the rounding of float32
    assert (np.abs(draws.mean(0) - made.fit.phi["mu"]) < 10 * (sd + 0.05) / 63 + 1e-5).all()


def test_summary_is_a_table(made):
    of_phi, table = made.fit.summary(), made.fit.summary("theta")
    assert isinstance(of_phi, pd.DataFrame)
    assert not of_phi.index.str.startswith("theta").any()
    first = "theta[AITKIN, Intercept]"
    assert first in table.index
    estimate = table.loc[first, "mean" if "mu" in made.promise.draws else "estimate"]
    close(estimate, made.fit.theta.sel(task="AITKIN", coef="Intercept"), rtol=1e-9)
    assert ("mu[Intercept]" in of_phi.index) == ("mu" in made.fit.phi)


# ---------------------------------------------------------------------- DataTree


def test_the_datatree_keeps_arviz_schema(made):
    tree, promise = made.fit.datatree, made.promise
    assert ("posterior" in tree.children) == bool(promise.draws)
    assert ("point_estimate" in tree.children) == promise.phi_is_point
    assert {"observed_data", "constant_data"} <= set(tree.children)
    close(tree["observed_data"]["y"].values, made.problem.tasks.outcome, rtol=0)
    if promise.draws:
        posterior = tree["posterior"]
        assert set(posterior.data_vars) == set(promise.draws)
        for name, values in posterior.data_vars.items():
            assert values.dims == ("chain", "draw", *DIMS[str(name)])
            assert values.sizes["chain"] > 1, "point estimates are no chains of one draw"
            assert values.sizes["draw"] > 1
            assert values.dtype == np.float64
        assert posterior["theta"]["task"].values.tolist() == made.problem.tasks.names.tolist()
        assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "row")
    if promise.phi_is_point:
        point = tree["point_estimate"]
        assert "chain" not in point.dims
        for name in (*promise.phi, "theta"):
            assert point[name].dims == DIMS[name]


def test_draws_have_the_estimates_as_their_means(made):
    """θ̂ is the posterior mean: exact under full Bayes, within 6 errors of 4,000 draws else."""
    if "theta" not in made.promise.draws:
        assert "posterior" not in made.fit.datatree.children
        return
    draws = made.fit.datatree["posterior"]["theta"]
    off = np.abs(draws.mean(("chain", "draw")).values - made.fit.theta.values)
    error = draws.std(("chain", "draw")).values / np.sqrt(
        draws.sizes["chain"] * draws.sizes["draw"]
    )
    assert (off <= (1e-9 if "mu" in made.promise.draws else 6 * error + 1e-12)).all()


# ------------------------------------------------------------------- predictions


def test_predictions_of_known_tasks(made):
    predicted = made.fit.predict(target="known")
    known = ~predicted.unidentified
    assert predicted.target == "known task"
    assert predicted.mean.shape == (919,)
    assert predicted.mean.dtype == np.float64
    assert known.sum() > 700, "no pooling leaves out rows whose county says nothing about floor"
    low, high = predicted.interval(0.9)[:, known]
    assert ((low < predicted.mean[known]) & (predicted.mean[known] < high)).all()
    pit = predicted.pit()[known]
    assert ((pit >= 0) & (pit <= 1)).all()
    assert 0.85 < ((pit > 0.05) & (pit < 0.95)).mean() < 0.97, "90 % intervals cover about 90 %"
    assert np.isnan(predicted.mean[~known]).all()


@pytest.mark.parametrize("probability", [0.025, 0.5, 0.9])
def test_quantiles_invert_the_cdf(made, probability):
    """The bisection stops at 1e-6 of the smallest sd, where the cdf moves by at most 4e-7."""
    predicted = made.fit.predict()
    known = ~predicted.unidentified
    back = predicted.pit(predicted.quantile(probability))[known]
    close(back, np.full(known.sum(), probability), rtol=0, atol=1e-6)


def test_predictions_of_new_tasks_and_of_the_population(made):
    if "mu" not in made.fit.phi:
        with pytest.raises(hb.InputError, match="no pooling"):
            made.fit.predict(target="new")
        return
    population, new = (made.fit.predict(target=t) for t in ("population", "new"))
    close(new.mean, population.mean, rtol=1e-9, atol=1e-12)
    assert (new.sd >= population.sd - 1e-12).all(), "a new task's θ is not known"
    if "tau" in made.fit.phi and made.fit.phi["tau"].any():
        assert (new.sd > population.sd).any()


def test_adapting_to_the_training_tasks_gives_theta_back(made):
    """The same computation for a point φ; under full Bayes new draws, within Monte Carlo error."""
    again = made.fit.adapt(made.problem.tasks).theta
    if made.promise.phi_is_point:
        close(again.values, made.fit.theta.values, rtol=1e-10, atol=1e-12)
        return
    sd = made.fit.datatree["posterior"]["theta"].std(("chain", "draw")).values
    assert (np.abs(again.values - made.fit.theta.values) < 6 * sd / np.sqrt(200)).all()


def test_a_dataframe_does_where_tasks_do(made):
    data = made.problem.data.iloc[:60]
    tasks = made.problem.tasks.encode(data)
    fit = made.fit
    close(fit.adapt(data).theta.values, fit.adapt(tasks).theta.values, rtol=1e-12)
    first, second = fit.predict(data), fit.predict(tasks)
    np.testing.assert_array_equal(first.mean, second.mean)
    table = first.to_dataframe()
    assert table.index.tolist() == list(range(60)), "in the order of the data"
    assert table["county"].tolist() == data["county"].tolist()


# ------------------------------------------------------------------ global state


@pytest.mark.parametrize(
    "name", ["no pooling", "complete pooling", "ml", "maml", "imaml", "reptile"]
)
def test_a_fit_changes_no_global_state_and_repeats_itself(name, radon, request):
    """Full Bayes below, on eight schools, where it compiles sooner."""
    promise = METHODS[name]
    check_repeats(lambda: quietly(promise.run, radon), request.getfixturevalue(promise.fixture))


def test_full_bayes_changes_no_global_state_and_repeats_itself(schools, schools_full):
    check_repeats(lambda: quietly(hb.full_bayes, schools, **QUICK), schools_full)


def check_repeats(run: Callable[[], hb.Fit], first: hb.Fit) -> None:
    state = global_state()
    again = run()
    assert global_state() == state
    for name, value in first.phi.items():
        np.testing.assert_array_equal(again.phi[name], value)
    np.testing.assert_array_equal(again.theta.values, first.theta.values)
    if first.theta_draws is not None:
        np.testing.assert_array_equal(again.theta_draws, first.theta_draws)


def global_state() -> tuple[Any, ...]:
    return (
        jax.config.jax_enable_x64, tuple(warnings.filters), jax.device_count(),
        jax.config.jax_default_matmul_precision, tuple(np.geterr().items()),
    )  # fmt: skip


def test_x64_is_off_and_the_state_is_read():
    """The control: a flag that is left on would be seen."""
    before = global_state()
    assert before[0] is False
    with jax.enable_x64(True):
        assert global_state() != before
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert global_state() != before


def test_another_seed_gives_other_draws(radon, radon_ml):
    other = quietly(hb.empirical_bayes, radon, seed=5)
    close(other.phi["mu"], radon_ml.phi["mu"], rtol=0)
    assert (other.theta_draws != radon_ml.theta_draws).any()


# ---------------------------------------------------------------- eight schools


def test_without_sigma_nothing_invents_one(schools, schools_full):
    fits = [
        schools_full,
        *(quietly(m, schools) for m in (hb.no_pooling, hb.complete_pooling, hb.empirical_bayes)),
    ]
    for fit in fits:
        assert "sigma" not in fit.phi
        assert "corr" not in fit.phi
        assert fit.theta.dims == ("task", "coef")
    posterior = schools_full.datatree["posterior"]
    assert posterior["mu"].dims == ("chain", "draw", "coef"), "even for one coefficient"
    assert posterior["theta"].shape == (2, 100, 8, 1)


def test_between_the_limits_lies_the_estimate(radon_ml, radon_no_pooling, radon_complete_pooling):
    """τ → ∞ and τ → 0 bracket the evidence: the maximum over τ is above complete pooling's."""
    assert radon_ml.log_evidence > radon_complete_pooling.log_evidence
    inside = radon_ml.inside
    wide = replace(
        inside, phi=dict(inside.phi) | {"tau": np.zeros(2)}, training=None, theta_draws=None
    )
    close(wide.theta.values, np.tile(inside.phi["mu"], (85, 1)), rtol=1e-12)
