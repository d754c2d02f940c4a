r"""Binary outcomes: closed forms by SciPy, quadrature, identities, and NUTS against a grid.

With f = o + xᵀθ + zᵀβ and p = 1/(1 + e^−f) everything here is written out again from ``expit``
and ``scipy.stats.bernoulli``; no expected number comes from hierbayes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import matplotlib
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray as xr
from assertions import close, finite_difference, monte_carlo, refuses
from numpyro.infer.util import log_density
from scipy import integrate, stats
from scipy.special import expit, logit

import hierbayes as hb
from hierbayes.adaptation import Laplace
from hierbayes.adaptation.step_length import curvatures
from hierbayes.checks import held_out_scores
from hierbayes.numerics import float64

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BERNOULLI = hb.likelihoods.Bernoulli()
MODEL = hb.HierarchicalModel(BERNOULLI, hb.priors.Gaussian())


def frame(seed: int = 3, num_tasks: int = 14) -> pd.DataFrame:
    """Ragged tasks of 1 to 20 rows with a slope, a shared column and an offset."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(num_tasks), rng.integers(1, 21, num_tasks))
    x, z = rng.normal(0.3, 1.2, g.size), rng.normal(size=g.size)
    offset = rng.normal(0.0, 0.3, g.size)
    theta = [-0.4, 0.9] + rng.standard_normal((num_tasks, 2)) * [0.9, 0.5]
    chance = expit(offset + theta[g, 0] + theta[g, 1] * x + 0.7 * z)
    y = (rng.random(g.size) < chance).astype(float)
    return pd.DataFrame({"g": g, "x": x, "z": z, "offset": offset, "y": y})


def read(data: pd.DataFrame, **slots: str) -> hb.Tasks:
    return hb.Tasks.from_dataframe(
        data, task="g", outcome="y", predictors=["x"], shared=["z"], **slots
    )


@pytest.fixture(scope="module")
def tasks() -> hb.Tasks:
    return read(frame(), offset="offset")


@pytest.fixture(scope="module")
def train_and_test(tasks: hb.Tasks) -> tuple[hb.Tasks, hb.Tasks]:
    return tasks.hold_out(0.25, seed=1)


@pytest.fixture(scope="module")
def sampled(train_and_test: Any) -> hb.Fit:
    """Draws that no sampler made: what is asked here holds at any draws of (φ, θ)."""
    train, rng = train_and_test[0], np.random.default_rng(8)
    lead = (2, 20)
    corr = np.tile(np.eye(2), (*lead, 1, 1))
    corr[..., 0, 1] = corr[..., 1, 0] = rng.uniform(-0.6, 0.6, lead)
    draws = {
        "mu": rng.normal([-0.4, 0.9], 0.3, (*lead, 2)), "tau": rng.uniform(0.3, 1.2, (*lead, 2)),
        "corr": corr, "beta": rng.normal(0.7, 0.2, (*lead, 1)),
    }  # fmt: skip
    theta = rng.normal([-0.4, 0.9], 0.8, (*lead, train.num_tasks, 2))
    return hb.Fit(
        hb.meta.FullBayes(), MODEL.resolve(train), train,
        {name: value.mean(axis=(0, 1)) for name, value in draws.items()}, Laplace(),
        phi_draws=draws, theta_draws=theta, info={"seconds": 1.0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def learned(train_and_test: Any) -> hb.Fit:
    return hb.maml(MODEL, train_and_test[0], num_steps=3, seed=5)


def by_hand(tasks: hb.Tasks, theta: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """log p(y_i | θ_j(i), β) of every row, by SciPy."""
    f = (tasks.predictors * theta[tasks.task_of_row]).sum(1) + tasks.shared @ beta
    return stats.bernoulli.logpmf(tasks.outcome, expit(f + tasks.slots.get("offset", 0.0)))


def values(tasks: hb.Tasks, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Some φ and θ; nothing in them is idle."""
    rng = np.random.default_rng(seed)
    corr = np.array([[1.0, -0.3], [-0.3, 1.0]])
    phi = {"mu": np.array([-0.4, 0.9]), "tau": np.array([0.9, 0.5]), "corr": corr}
    return phi | {"beta": np.array([0.7])}, rng.normal(size=(tasks.num_tasks, 2))


# ------------------------------------------------------------------------------ density


def test_log_likelihood_is_scipys(tasks):
    """Sums of rows of order one, in float64: 1e-12 is above their rounding."""
    phi, theta = values(tasks)
    with float64():
        flat, of_row = tasks.flat(), tasks.task_of_row
        rows = jax.jit(lambda t: BERNOULLI.log_likelihood_of_rows(t, phi, flat, of_row))(theta)
        close(rows, by_hand(tasks, theta, phi["beta"]), rtol=1e-12)
        # the control: another β, or rows under their neighbour's θ, would be noticed
        assert np.abs(rows - by_hand(tasks, theta, phi["beta"] + 0.1)).max() > 1e-2
        assert np.abs(rows - by_hand(tasks, np.roll(theta, 1, 0), phi["beta"])).max() > 1e-2


@jax.jit
def slope_and_curvature(f: Any, outcome: Any) -> Any:
    slope = jax.grad(lambda v: BERNOULLI.family(v, {}, {}).log_prob(outcome))
    return slope(f), jax.grad(slope)(f)


@pytest.mark.parametrize("outcome", [0.0, 1.0])
@pytest.mark.parametrize("f", [-800.0, -3.0, 0.0, 1e-12, 0.7, 800.0])
def test_slope_and_curvature_in_f_are_right_everywhere(f, outcome):
    """y − p and p (1 − p), also at f = 0, where NumPyro's own log probability has slope 0 or 1."""
    with float64():
        slope, curvature = slope_and_curvature(f, outcome)
    close(slope, outcome - expit(f), rtol=1e-12, atol=1e-300)
    close(curvature, -expit(f) * expit(-f), rtol=1e-12, atol=1e-300)


def test_the_program_the_joint_density_and_the_sum_by_hand_agree(tasks):
    """With the hyperprior given, p(φ) is SciPy's; at d = 2 LKJ(2) has density ¾ (1 − r²)."""
    hyperprior = hb.HyperPrior(mu=dist.Normal(0.2, 1.5), tau=dist.HalfNormal(0.8),
                               beta=dist.Normal(0.0, 2.0), corr=2.0)  # fmt: skip
    model = hb.HierarchicalModel(BERNOULLI, hb.priors.Gaussian(), hyperprior)
    phi, theta = values(tasks)
    covariance = phi["corr"] * np.outer(phi["tau"], phi["tau"])
    expected = by_hand(tasks, theta, phi["beta"]).sum()
    expected += stats.multivariate_normal.logpdf(theta, phi["mu"], covariance).sum()
    expected += stats.norm.logpdf(phi["mu"], 0.2, 1.5).sum()
    expected += stats.halfnorm.logpdf(phi["tau"], scale=0.8).sum()
    expected += stats.norm.logpdf(phi["beta"], 0.0, 2.0).sum() + np.log(0.75 * (1 - 0.09))
    close(model.log_joint(phi, theta, tasks), expected, rtol=1e-10)
    program = model.numpyro_program(tasks)
    with float64():
        found = jax.jit(lambda v: log_density(program, (), {}, v)[0])(phi | {"theta": theta})
        close(found, expected, rtol=1e-10)


@pytest.mark.parametrize("sd", [0.0, 0.3, 1.0, 2.5, 6.0])
def test_predictive_is_the_integral_over_normal_f(sd):
    """By scipy.integrate, asked for 1e-12; the docstring of the nodes promises 1e-10."""
    means = np.array([[-7.0, -1.3, 0.0, 0.4, 3.0]])
    found = BERNOULLI.predictive(means, np.full((1, 1), sd**2), {}, {}).mean()

    def chance(mean: float) -> float:
        if sd == 0:
            return float(expit(mean))

        def integrand(f: float) -> float:
            return float(stats.norm.pdf(f, mean, sd) * expit(f))

        reach = [mean - 9 * sd, mean, mean + 9 * sd]
        return integrate.quad(integrand, reach[0], reach[2], points=[reach[1], 0.0] if
                              reach[0] < 0 < reach[2] else [reach[1]], epsabs=1e-12,
                              limit=200)[0]  # fmt: skip

    close(found[0], [chance(m) for m in means[0]], rtol=0, atol=1e-10)


def test_the_integral_differs_from_the_point():
    """The control: at sd 1 the chance is not that at the mean, except by symmetry at f = 0."""
    found = BERNOULLI.predictive(np.array([[2.0, 0.0]]), np.ones((1, 1)), {}, {}).mean()[0]
    assert expit(2.0) - found[0] > 0.02
    close(found[1], 0.5, rtol=1e-12)


# ----------------------------------------------------------------------------- curvature


def test_curvature_is_bounded_by_a_quarter_of_the_gram_matrix(tasks):
    """λ_max(XᵀX)/4, reached at f = 0; elsewhere XᵀPX with p (1 − p) ≤ ¼ lies below it."""
    found = curvatures(MODEL, tasks, {})
    rng = np.random.default_rng(2)
    for j in range(tasks.num_tasks):
        x = tasks.take([j]).predictors
        close(found[j], np.linalg.eigvalsh(x.T @ x / 4), rtol=1e-9, atol=1e-12)
        p = expit(x @ rng.normal(size=2))
        assert np.linalg.eigvalsh((x * (p * (1 - p))[:, None]).T @ x)[-1] < found[j, -1]


def test_a_step_that_can_diverge_is_refused_and_the_task_named(tasks):
    gram = [x.T @ x / 4 for x in np.split(tasks.predictors, tasks.starts[1:-1])]
    largest = np.array([np.linalg.eigvalsh(g)[-1] for g in gram])
    worst = repr(int(np.argmax(largest)))
    eta = 2.02 / largest.max()
    bad = int((eta * largest > 2).sum())
    with refuses("can make", f"diverge in {bad} of 14", f"most in {worst}"):
        hb.maml(MODEL, tasks, step_size=eta)


# ---------------------------------------------------------------------------------- MAML


def explicit_theta(
    tasks: hb.Tasks, phi: dict[str, Any], eta: float, num_steps: int, data: hb.Tasks | None = None
) -> np.ndarray:
    """K gradient steps of every task from μ on the rows of ``data``, written out."""
    rows = tasks if data is None else data
    theta = np.tile(phi["mu"], (rows.num_tasks, 1))
    for j in range(rows.num_tasks):
        own = slice(rows.starts[j], rows.starts[j + 1])
        x, rest = rows.predictors[own], rows.shared[own] @ phi["beta"] + rows.slots["offset"][own]
        for _ in range(num_steps):
            theta[j] = theta[j] + eta * x.T @ (rows.outcome[own] - expit(x @ theta[j] + rest))
    return theta


def query_log_density(tasks: hb.Tasks, phi: dict[str, Any], eta: float) -> float:
    """The objective of ``learned``, by SciPy: three steps on the support, scored on the query."""
    support, query = tasks.split(0.5, seed=5)
    theta = explicit_theta(tasks, phi, eta, 3, support)
    return by_hand(query, theta, phi["beta"]).sum()


def test_maml_learns_no_noise(learned):
    """The automatic step is one in centred and scaled columns."""
    assert sorted(learned.phi) == ["beta", "mu"]
    tasks = learned.inside.tasks
    largest = max(
        np.linalg.eigvalsh(x.T @ x / 4)[-1] for x in np.split(tasks.predictors, tasks.starts[1:-1])
    )
    close(learned.info["step_size"], 1 / largest, rtol=1e-12)
    assert learned.warnings == ()  # a bound on the curvature supports no remark on phi's share


def test_theta_is_explicit_gradient_steps(learned, train_and_test):
    """In centred and scaled columns; in the user's with the columns' map as written out here."""
    train, test = train_and_test
    inside, eta = learned.inside, learned.info["step_size"]
    found = explicit_theta(inside.tasks, inside.phi, eta, 3)
    close(inside.theta.values, found, rtol=1e-10)
    asked = learned.seen_inside(test)
    new = explicit_theta(asked, inside.phi, eta, 3)
    x, z = train.predictors[:, 1], train.shared[:, 0]
    shift = inside.phi["beta"][0] * z.mean() / z.std()
    for theta, values in ((found, learned.theta), (new, learned.adapt(test).theta)):
        slope = theta[:, 1] / x.std()
        close(values.values, np.column_stack([theta[:, 0] - slope * x.mean() - shift, slope]),
              rtol=1e-9)  # fmt: skip


def test_maml_is_at_the_top_of_the_query_log_density(learned):
    """Above its start (the overall logit, no slope), and level in μ and β.

    L-BFGS stops at a slope of 1e-10 a row in scaled parameters, the differences are right to
    1e-10 of a value near −100: 1e-6 is above both, and far below the slope at the start.
    """
    inside = learned.inside
    train, eta = inside.tasks, learned.info["step_size"]

    def objective(v: np.ndarray) -> float:
        return query_log_density(train, {"mu": v[:2], "beta": v[2:]}, eta)

    best = np.concatenate([inside.phi["mu"], inside.phi["beta"]])
    close(learned.info["query_log_density"], objective(best), rtol=1e-10)
    share = (train.outcome.sum() + 0.5) / (train.num_rows + 1)
    start = np.array([logit(share) - train.slots["offset"].mean(), 0.0, 0.0])
    assert objective(best) > objective(start) + 1
    assert np.abs(finite_difference(objective, best)).max() < 1e-6
    assert np.abs(finite_difference(objective, start)).max() > 1


@pytest.mark.slow
def test_a_learned_step_size_is_that_of_the_steps(train_and_test):
    """In scaled columns, where the automatic step is the longest that may be learned."""
    found = hb.maml(MODEL, train_and_test[0], num_steps=1, learn_step_size=True).inside
    train = found.tasks
    eta, cap = float(found.phi["step_size"]), 1 / curvatures(MODEL, train, {})[:, -1].max()
    assert 0.01 * cap < eta <= cap
    close(found.theta.values, explicit_theta(train, found.phi, eta, 1), rtol=1e-10)


def test_maml_predicts_at_theta_as_it_is(learned, train_and_test):
    test = train_and_test[1]
    theta = learned.theta.sel(task=test.names).values
    close(learned.predict(test).log_density(), by_hand(test, theta, learned.phi["beta"]), rtol=1e-9)


# ---------------------------------------------------------------------------- full Bayes


def test_predictions_average_over_draws(sampled, train_and_test):
    """Known tasks: mean of p at the draws. New ones: the integral over N(μ, Σ).

    By the trapezium rule with steps of 0.045 sd from −9 to 9: right to rounding up to an sd of 6.
    """
    test = train_and_test[1]
    draws = {name: v.reshape(-1, *v.shape[2:]) for name, v in sampled.phi_draws.items()}
    theta = sampled.theta_draws.reshape(-1, *sampled.theta_draws.shape[2:])
    at = np.array([train_and_test[0].names.tolist().index(n) for n in test.names])
    rest = draws["beta"] @ test.shared.T + test.slots["offset"]
    x = test.predictors
    known = expit(np.einsum("sik,ik->si", theta[:, at[test.task_of_row]], x) + rest).mean(0)
    prediction = sampled.predict(test)
    close(prediction.mean, known, rtol=1e-10)
    close(prediction.sd, np.sqrt(known * (1 - known)), rtol=1e-10)
    close(np.exp(prediction.log_density()), np.where(test.outcome == 1, known, 1 - known))
    nodes = np.linspace(-9, 9, 401)
    weights = stats.norm.pdf(nodes)
    root = np.einsum("sk,skl->skl", draws["tau"], np.linalg.cholesky(draws["corr"]))
    sd = np.sqrt((np.einsum("skl,ik->sil", root, x) ** 2).sum(-1))
    f = (draws["mu"] @ x.T + rest)[..., None] + sd[..., None] * nodes
    new = (expit(f) @ weights / weights.sum()).mean(0)
    assert sd.max() < 6
    close(sampled.predict(test, target="new").mean, new, rtol=1e-9)
    assert np.abs(new - known).max() > 0.05


def test_log_likelihood_of_the_draws_is_scipys(sampled):
    found = sampled.datatree["log_likelihood"]["y"].values
    for chain, draw in [(0, 0), (1, 17)]:
        beta = sampled.phi_draws["beta"][chain, draw]
        expected = by_hand(sampled.tasks, sampled.theta_draws[chain, draw], beta)
        close(found[chain, draw], expected, rtol=1e-10)


@pytest.mark.slow
def test_new_tasks_get_laplace_draws(sampled, train_and_test):
    """The rows are used: with the same white noise, more ones mean a larger intercept."""
    test = train_and_test[1]
    ones, zeros = (
        sampled.adapt(replace(test, outcome=np.full(test.num_rows, value))) for value in (1.0, 0.0)
    )
    assert ones.draws.shape == (40, test.num_tasks, 2)
    held = test.sizes > 0
    assert (ones.theta.values[held, 0] > zeros.theta.values[held, 0]).all()
    close(ones.theta.values[~held], zeros.theta.values[~held], rtol=1e-9)


def grid_posterior(successes: list[int], sizes: list[int]) -> dict[str, tuple[float, float]]:
    """Mean and sd of μ, τ and θ_1 by sums over a grid: μ ~ N(0, 1.5), τ ~ HalfNormal(1).

    Steps of 0.1 in μ and 0.05 in τ, and the trapezium rule in z = (θ − μ)/τ with steps of 0.2,
    where integrands fall to nothing at both ends except at τ = 0 (half weight).
    """
    mu, tau = np.arange(-7, 7.01, 0.1)[:, None], np.arange(0, 6.01, 0.05)
    prior = stats.norm.pdf(mu, 0, 1.5) * stats.halfnorm.pdf(tau)
    prior[:, 0] /= 2
    z = np.arange(-8, 8.01, 0.2)
    theta = mu[..., None] + tau[:, None] * z
    weight = stats.norm.pdf(z) * 0.2
    chance = expit(theta)
    by_task = [chance**s * (1 - chance) ** (n - s) for s, n in zip(successes, sizes, strict=True)]
    evidence = [part @ weight for part in by_task]
    joint = prior * np.prod(evidence, axis=0)
    joint /= joint.sum()
    first = [(theta**k * by_task[0]) @ weight / evidence[0] for k in (1, 2)]
    moments = {"mu": [mu, mu**2], "tau": [tau, tau**2], "theta": first}
    means = {name: [float((joint * m).sum()) for m in ms] for name, ms in moments.items()}
    return {name: (m, float(np.sqrt(square - m**2))) for name, (m, square) in means.items()}


@pytest.mark.slow
def test_nuts_samples_the_posterior_that_a_grid_gives():
    """Three tasks of 1 of 4, 6 of 8 and 3 of 9; within four Monte Carlo standard errors."""
    successes, sizes = [1, 6, 3], [4, 8, 9]
    arrays = [(np.ones((n, 1)), np.arange(n) < s) for s, n in zip(successes, sizes, strict=True)]
    hyperprior = hb.HyperPrior(mu=dist.Normal(0.0, 1.5), tau=dist.HalfNormal(1.0))
    model = hb.HierarchicalModel(BERNOULLI, hb.priors.Gaussian(), hyperprior)
    settings: Any = dict(method="nuts", num_draws=5000, num_warmup=300, num_chains=2, seed=2)
    fit = hb.full_bayes(model, hb.Tasks.from_arrays(arrays), **settings, progress=False)
    assert fit.info["method"] == "nuts"
    assert fit.adaptation == Laplace()
    expected = grid_posterior(successes, sizes)
    found = {"mu": fit.phi_draws["mu"][..., 0], "tau": fit.phi_draws["tau"][..., 0],
             "theta": fit.theta_draws[..., 0, 0]}  # fmt: skip
    for name, (mean, sd) in expected.items():
        monte_carlo(found[name], mean, sd, share=0.06, least_ess=2000)


def test_the_grid_tells_posteriors_apart():
    """The control: one success more moves θ_1 by more than four errors at an ESS of 150."""
    mean, sd = grid_posterior([1, 6, 3], [4, 8, 9])["theta"]
    assert grid_posterior([2, 6, 3], [4, 8, 9])["theta"][0] - mean > 4 * sd / np.sqrt(150)


# ------------------------------------------------------------------ scores and comparison


def test_scores_are_the_log_density_and_the_brier_score(learned, train_and_test):
    test = train_and_test[1]
    theta = learned.theta.sel(task=test.names).values
    rows = by_hand(test, theta, learned.phi["beta"])
    chance = np.where(test.outcome == 1, np.exp(rows), 1 - np.exp(rows))
    scores = held_out_scores(learned.predict(test))
    close(scores["log_density"], rows.mean(), rtol=1e-9)
    close(scores["rmse"] ** 2, ((test.outcome - chance) ** 2).mean(), rtol=1e-9)
    assert scores["rows"] == test.num_rows
    assert all(np.isnan(scores[k]) for k in scores if k.startswith(("coverage", "width")))
    assert sum(k.startswith(("coverage", "width")) for k in scores) == 6


def test_comparison_shows_dashes(sampled, learned, train_and_test):
    comparison = hb.compare({"full Bayes": sampled, "MAML": learned}, test=train_and_test[1])
    assert comparison.table["coverage_95"].isna().all()
    assert comparison.table[["log_density", "rmse", "difference_se"]].notna().any().all()
    assert "coverage_95" not in str(comparison)  # columns without any value are not shown
    assert "—" in str(comparison)


# -------------------------------------------------------------------------------- storage


def test_the_picture_of_the_prior_shows_no_least_squares_of_zeros_and_ones(sampled, schools):
    pooled = hb.complete_pooling(schools.model, schools.tasks)
    for fit, marks in ((sampled, 0), (pooled, 1)):
        ax = hb.plots.learned_prior(fit)
        drawn = [line for line in ax.lines if line.get_marker() == "|" and line.get_xdata().size]
        plt.close(ax.figure)
        assert len(drawn) == marks


@pytest.mark.parametrize("which", ["sampled", "learned"])
def test_a_fit_comes_back_equal(which, request, train_and_test, tmp_path):
    fit: hb.Fit = request.getfixturevalue(which)
    fit.save(tmp_path / "fit.nc")
    again = hb.load(tmp_path / "fit.nc")
    assert again.model.likelihood == BERNOULLI
    assert again.adaptation == fit.adaptation
    test = train_and_test[1]
    np.testing.assert_array_equal(again.predict(test).mean, fit.predict(test).mean)


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_older_formats_are_read(schools, tmp_path, version):
    """Before the prior had a name a file held its arguments, before the likelihood ``known_se``."""
    hb.complete_pooling(schools.model, schools.tasks).save(tmp_path / "fit.nc")
    tree = xr.open_datatree(tmp_path / "fit.nc", engine="h5netcdf").load()
    tree.close()
    described = json.loads(tree["hierbayes"].attrs["fit"])
    assert described["format"] == 4
    described["method"] = "complete pooling"
    model = described["model"]
    named = model.pop("prior")
    assert named.pop("kind") == "Gaussian"
    model |= named.get("settings", named)
    if version == 1:
        del model["likelihood"]
        model["known_se"] = True
    described["format"] = version
    tree["hierbayes"].attrs["fit"] = json.dumps(described)
    tree.to_netcdf(tmp_path / "old.nc", engine="h5netcdf")
    found = hb.load(tmp_path / "old.nc").model
    assert found.likelihood == hb.likelihoods.Gaussian(known_se=True)
    assert found.prior == schools.model.prior


# --------------------------------------------------------------- default priors and refusals


def test_default_priors_are_in_logits(tasks):
    """One logit a standard deviation of x; of the intercept where x and z are at their means."""
    hyperprior = MODEL.resolve(tasks).hyperprior
    ones = tasks.outcome.sum()
    level = np.log((ones + 0.5) / (tasks.num_rows - ones + 0.5)) - tasks.slots["offset"].mean()
    x, z = tasks.predictors[:, 1], tasks.shared[:, 0]
    close(hyperprior.mu["Intercept"].loc, level, rtol=1e-12)
    close(hyperprior.mu["Intercept"].scale, 2.5, rtol=1e-12)
    close([hyperprior.mu["x"].loc, hyperprior.mu["x"].scale], [0.0, 2.5 / x.std()], rtol=1e-12)
    close([hyperprior.tau[c].scale for c in tasks.coef], [1.0, 1 / x.std()], rtol=1e-12)
    close(hyperprior.beta["z"].scale, 2.5 / z.std(), rtol=1e-12)
    assert hyperprior.sigma is None


def pairs(outcome: Any, **arguments: Any) -> hb.Tasks:
    """Three tasks of two rows."""
    arrays = [(np.ones((2, 1)), y) for y in np.reshape(outcome, (3, 2))]
    return hb.Tasks.from_arrays(arrays, **arguments)


SOUND = [0, 1, 1, 1, 0, 1]

REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "an outcome of 2": (lambda: hb.maml(MODEL, pairs([0, 1, 2, 1, 0, 1])),
                        ("0 and 1", "1 row", "2 in task 1")),
    "a probability": (lambda: hb.full_bayes(MODEL, pairs([0, 1, 0.4, 1, 0, 1])),
                      ("0 and 1", "0.4 in task 1")),
    "NaN": (lambda: pairs([0, 1, np.nan, 1, 0, 1]), ("NaN",)),
    "known standard errors": (
        lambda: hb.full_bayes(MODEL, pairs(SOUND, known_se=np.ones((3, 2)))),
        ("known_se", "Bernoulli", "ignore")),
    "trials": (lambda: hb.full_bayes(MODEL, read(frame().assign(n=3.0), trials="n")),
               ("trials", "Bernoulli", "ignore")),
    "nothing but ones": (lambda: hb.full_bayes(MODEL, pairs(np.ones(6))),
                         ("1 in every row", "constant")),
    "nothing but zeros": (lambda: hb.maml(MODEL, pairs(np.zeros(6))),
                          ("0 in every row", "constant")),
    "a sigma": (lambda: hb.maml(MODEL, pairs(SOUND), sigma=1.0), ("Bernoulli", "no sigma")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(name):
    action, words = REFUSED[name]
    with refuses(*words):
        action()
