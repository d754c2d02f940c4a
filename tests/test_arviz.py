"""ArviZ's own functions take ``fit.datatree`` as it is, in ArviZ 0.8 and 1.x alike."""

from __future__ import annotations

from typing import Any

import arviz_stats
import jax
import matplotlib
import numpy as np
import pytest
from assertions import close
from conftest import quietly
from scipy import special, stats

import hierbayes as hb

matplotlib.use("Agg")

# The shared fits are 200 draws long: ArviZ rightly says that some Pareto k are high.
few_draws = pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")


@pytest.mark.slow
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
def test_compare_ranks_fits(schools, schools_full):
    by_map = quietly(hb.empirical_bayes, schools, criterion="map")
    fits = {"full Bayes": schools_full.datatree, "empirical Bayes": by_map.datatree}
    table: Any = arviz_stats.compare(fits)
    assert set(table.index) == set(fits)


@pytest.mark.parametrize("name", ["radon_full", pytest.param("radon_ml", marks=pytest.mark.slow)])
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


# -------------------------------------------------------------------- predictive groups

PREDICTIVE = {"posterior_predictive", "prior", "prior_predictive"}


@pytest.mark.parametrize("name", ["radon_full", "radon_ml"])
def test_posterior_predictive_stands_beside_the_posterior(name, request):
    fit = request.getfixturevalue(name)
    tree = fit.datatree
    y = tree["posterior_predictive"]["y"]
    assert y.dims == ("chain", "draw", "row")
    assert y.dtype == np.float64
    for other in ("posterior", "log_likelihood"):
        for dim in ("chain", "draw"):
            np.testing.assert_array_equal(y[dim].values, tree[other][dim].values)
    np.testing.assert_array_equal(y["row"].values, tree["observed_data"]["row"].values)
    # draw s is of θ_s and φ_s: what is left is noise of σ_s, in every chain and draw
    theta = tree["posterior"]["theta"].values[:, :, fit.tasks.task_of_row]
    phi = {n: tree["posterior"][n].values for n in ("beta", "sigma") if n in tree["posterior"]}
    beta = phi.get("beta", fit.phi["beta"])
    sigma = phi.get("sigma", np.broadcast_to(fit.phi["sigma"], y.shape[:2]))
    mean = (theta * fit.tasks.predictors).sum(-1) + beta @ fit.tasks.shared.T
    white = (y.values - mean) / sigma[..., None]
    # five standard errors of a mean and of a variance of 180,000 and more white numbers, and of
    # those of one draw (919 rows; six for the worst of up to 4,000)
    assert abs(white.mean()) < 5 / np.sqrt(white.size)
    assert abs(white.var() - 1) < 5 * np.sqrt(2 / white.size)
    assert np.abs(white.var(-1) - 1).max() < 6 * np.sqrt(2 / 919)
    # and the noise has nothing to do with the θ of its own draw
    for k in range(2):
        moved = theta[..., k] - theta[..., k].mean((0, 1))
        r = np.corrcoef(moved.ravel(), white.ravel())[0, 1]
        assert abs(r) < 5 / np.sqrt(white.size) * np.sqrt(12)  # θ is shared by 11 rows on average


@pytest.mark.parametrize(
    ("name", "plot"),
    [("schools_full", "plot_ppc_dist"), ("schools_full", "plot_loo_pit"),
     *(pytest.param(*case, marks=pytest.mark.slow)
       for case in [("schools_full", "plot_ppc_pit"), ("radon_ml", "plot_loo_pit")])],
)  # fmt: skip
@few_draws
def test_arviz_draws_predictive_checks(name, plot, request):
    import arviz_plots
    import matplotlib.pyplot as plt

    fit = request.getfixturevalue(name)
    collection = getattr(arviz_plots, plot)(fit.datatree, backend="matplotlib")
    assert "y" in collection.viz["plot"].data_vars or "y" in str(collection.viz)
    plt.close("all")


@pytest.fixture(scope="module")
def of_counts():
    """A model and 40 tasks of 5 counts that it made."""
    import numpyro.distributions as dist

    rng = np.random.default_rng(5)
    rates = np.exp(1.0 + 0.5 * rng.normal(size=40))
    tasks = hb.Tasks.from_arrays([(np.ones((5, 1)), rng.poisson(rate, 5)) for rate in rates])
    hyperpriors = hb.HyperPrior(mu=dist.Normal(1.0, 0.5), tau=dist.HalfNormal(0.4))
    model = hb.HierarchicalModel(hb.likelihoods.Poisson(), hb.priors.Gaussian(), hyperpriors)
    return model.resolve(tasks), tasks


@pytest.fixture(scope="module")
def counts(of_counts):
    """Draws like those of a posterior, without one: what was learned does not matter here."""
    from hierbayes.adaptation import Laplace

    model, tasks = of_counts
    rng = np.random.default_rng(7)
    near = np.log(0.5 + tasks.outcome.reshape(40, 5).mean(1))[:, None]
    draws = {"mu": 1.0 + 0.1 * rng.normal(size=(2, 200, 1)),
             "tau": rng.uniform(0.4, 0.6, (2, 200, 1))}  # fmt: skip
    phi = {name: value.mean((0, 1)) for name, value in draws.items()}
    theta = near + 0.2 * rng.normal(size=(2, 200, 40, 1))
    return hb.Fit(hb.meta.FullBayes(), model, tasks, phi, Laplace(), None, draws, theta)


@few_draws
def test_counts_are_integers_and_arviz_draws_them(counts):
    import arviz_plots
    import matplotlib.pyplot as plt

    tree = counts.datatree
    for group in ("posterior_predictive", "prior_predictive", "observed_data"):
        assert tree[group]["y"].dtype == np.int64
        assert (tree[group]["y"] >= 0).all()
    arviz_plots.plot_ppc_dist(tree, kind="ecdf", backend="matplotlib")
    arviz_plots.plot_ppc_pit(tree, backend="matplotlib")
    arviz_plots.plot_loo_pit(tree, backend="matplotlib")
    plt.close("all")


@pytest.mark.slow
def test_the_pit_of_a_calibrated_model_is_uniform_but_for_what_it_has_seen(of_counts):
    """Randomised PIT of 200 rows by the posterior predictive: Kolmogorov–Smirnov's p above 0.01.

    Rows that were learned from are a little too well predicted, which draws PIT to the middle; with
    five rows a task that is not seen in 200. A rate twice as large is.
    """
    fit = hb.full_bayes(*of_counts, num_draws=500, num_chains=2, seed=1, progress=False)
    y = fit.tasks.outcome
    drawn = fit.datatree["posterior_predictive"]["y"].values.reshape(-1, len(y))
    u = np.random.default_rng(0).uniform(size=len(y))

    def pit(draws: np.ndarray) -> np.ndarray:
        below, upto = (draws < y).mean(0), (draws <= y).mean(0)
        return below + u * (upto - below)

    assert stats.kstest(pit(drawn), "uniform").pvalue > 0.01
    assert stats.kstest(pit(2 * drawn), "uniform").pvalue < 1e-6


def test_prior_predictive_of_counts_against_the_closed_form(counts):
    """log λ ~ N(μ, τ²), μ ~ N(1, 0.5²), τ ~ HalfNormal(0.4).

    E y = e^{1 + 0.125} E e^{τ²/2} and E e^{tτ²/2} = (1 − t 0.4²)^{-1/2}, a χ² moment.
    """
    tree = counts.datatree
    prior, y = tree["prior"], tree["prior_predictive"]["y"].values[0]
    assert prior["theta"].dims == ("chain", "draw", "task", "coef")
    assert y.shape == (500, 200)
    expected = np.exp(1.125) / np.sqrt(1 - 0.16)
    # rows of one draw hang together: one number a draw, by its own standard error
    by_draw = y.mean(1)
    assert abs(by_draw.mean() - expected) < 5 * by_draw.std() / np.sqrt(500)
    # E y² = E λ + E λ², E λ² = e^{2 + 0.5} (1 − 4 · 0.16)^{-1/2}
    squares = (y.astype(float) ** 2).mean(1)
    second = expected + np.exp(2.5) / np.sqrt(1 - 0.64)
    assert abs(squares.mean() - second) < 5 * squares.std() / np.sqrt(500)


@pytest.fixture(scope="module")
def gaussians():
    """Full Bayes of correlated Gaussian tasks, with a task predictor, under a stated hyperprior."""
    import numpyro.distributions as dist

    from hierbayes.adaptation import Conjugate
    from hierbayes.simulation import draw

    rng = np.random.default_rng(6)
    arrays = [
        (np.column_stack([np.ones(6), rng.normal(size=6)]), rng.normal(size=6)) for _ in range(5)
    ]
    tasks = hb.Tasks.from_arrays(arrays, task_predictors=rng.normal(size=(5, 1)))
    hyperpriors = hb.HyperPrior(
        mu=dist.Normal(0.5, 2.0), tau=dist.HalfNormal(0.7), gamma=dist.Normal(0.0, 0.4),
        sigma=dist.Exponential(2.0), corr=3.0,
    )  # fmt: skip
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian(), hyperpriors)
    resolved = model.resolve(tasks)
    # what was learned does not matter here: draws of the right shapes stand for it
    draws = {
        name: draw(name, hyperprior, 20, rng).reshape(2, 10, *hyperprior.event_shape)
        for name, hyperprior in resolved.phi_distributions(tasks).items()
    }
    phi = {name: value.mean((0, 1)) for name, value in draws.items()}
    theta = rng.normal(size=(2, 10, 5, 2))
    return hb.Fit(hb.meta.FullBayes(), resolved, tasks, phi, Conjugate(), None, draws, theta)


def test_prior_predictive_of_gaussian_tasks_against_the_closed_form(gaussians):
    """Var y = Σ_k x_k² (Var μ + w² Var γ + E τ²) + E σ²; E σ² = 2/2², E τ² = 0.7².

    E τ_1 τ_2 ρ = 0 as E ρ = 0, so x_1 x_2 has no part in it.
    """
    tree, tasks = gaussians.datatree, gaussians.tasks
    y, x = tree["prior_predictive"]["y"].values[0], tasks.predictors
    w = tasks.task_predictors[tasks.task_of_row, 0]
    mean = 0.5 * x.sum(1)
    variance = (x**2).sum(1) * (4.0 + 0.16 * w**2 + 0.49) + 0.5
    assert (np.abs(y.mean(0) - mean) < 5 * np.sqrt(variance / 500)).all()
    squares = (y - mean) ** 2
    assert (np.abs(squares.mean(0) - variance) < 5 * squares.std(0) / np.sqrt(500)).all()


def test_prior_draws_have_every_name_and_dimension(gaussians):
    tree = gaussians.datatree
    assert set(tree["prior"].data_vars) == set(tree["posterior"].data_vars)
    for name, values in tree["prior"].data_vars.items():
        assert values.dims == tree["posterior"][name].dims
        assert values.dtype == np.float64
        np.testing.assert_array_equal(values[values.dims[-1]], tree["posterior"][name][
            values.dims[-1]] if values.ndim > 2 else np.arange(500))  # fmt: skip
    theta, mu = tree["prior"]["theta"].values[0], tree["prior"]["mu"].values[0]
    corr, tau = tree["prior"]["corr"].values[0], tree["prior"]["tau"].values[0]
    w = gaussians.tasks.task_predictors
    centre = mu[:, None] + np.einsum("skq,jq->sjk", tree["prior"]["gamma"].values[0], w)
    # θ whitened by its own draw's τ and R is white
    roots = tau[..., None] * np.linalg.cholesky(corr)
    white = np.linalg.solve(roots[:, None], (theta - centre)[..., None])[..., 0].reshape(-1, 2)
    close(white.T @ white / len(white), np.eye(2), atol=5 * np.sqrt(2 / len(white)))


@pytest.mark.parametrize(("size", "concentration"), [(2, 1.0), (2, 3.0), (3, 2.0), (5, 0.7)])
def test_correlations_are_drawn_from_lkj(size, concentration):
    """(1 + ρ_ij)/2 ~ Beta(a, a), a = η + (d − 2)/2, for every pair (Lewandowski et al. 2009).

    And the determinant: E log|R| = Σ_k ψ(η + (d−1−k)/2) − ψ(η + (d−1)/2), of Beta pivots.
    """
    from hierbayes.simulation import draw_correlations

    found = draw_correlations(size, concentration, (4000,), np.random.default_rng(size))
    a = concentration + (size - 2) / 2
    for i in range(size):
        for j in range(i):
            p = stats.kstest((1 + found[:, i, j]) / 2, stats.beta(a, a).cdf).pvalue
            assert p > 1e-3  # of up to ten pairs in four cases
    logs = np.linalg.slogdet(found)[1]
    k = np.arange(1, size)
    pivots = special.psi(concentration + (size - 1 - k) / 2)
    expected = (pivots - special.psi(concentration + (size - 1) / 2)).sum()
    assert abs(logs.mean() - expected) < 5 * logs.std() / np.sqrt(4000)


def hyperpriors() -> dict[str, Any]:
    import numpyro.distributions as dist

    return {
        "normal": dist.Normal(np.array([1.0, -2.0]), 0.5).to_event(1),
        "half-normal": dist.HalfNormal(2.0).expand([2]).to_event(1),
        "Cauchy": dist.Cauchy(1.0, 2.0), "half-Cauchy": dist.HalfCauchy(3.0),
        "exponential": dist.Exponential(2.0), "gamma": dist.Gamma(2.0, 0.5),
        "inverse gamma": dist.InverseGamma(0.4, 0.3), "log-normal": dist.LogNormal(0.5, 0.3),
        "uniform": dist.Uniform(-1.0, 3.0), "Weibull": dist.Weibull(2.0, 1.5),
    }  # fmt: skip


@pytest.mark.parametrize("name", hyperpriors())
def test_beliefs_are_drawn_as_numpyro_has_them(name):
    """By NumPyro's own distribution function, in every entry; Weibull by NumPyro's own sample."""
    from hierbayes.simulation import draw

    hyperprior = hyperpriors()[name]
    drawn = draw("tau", hyperprior, 2000, np.random.default_rng(1))
    assert drawn.shape == (2000, *hyperprior.shape())
    assert drawn.dtype == np.float64
    core = hyperprior.base_dist if hasattr(hyperprior, "reinterpreted_batch_ndims") else hyperprior
    core = getattr(core, "base_dist", core) if type(core).__name__.startswith("Expanded") else core
    u = np.asarray(jax.jit(core.cdf)(drawn)).reshape(2000, -1)
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3


def test_without_a_proper_hyperprior_there_is_no_prior_and_the_tree_says_why(schools, radon_ml):
    import numpyro.distributions as dist

    flat = dist.ImproperUniform(dist.constraints.real, (), ())
    model = hb.HierarchicalModel(
        schools.model.likelihood, schools.model.prior, hb.HyperPrior(mu=flat)
    )
    fit = hb.full_bayes(model, schools.tasks, num_draws=50, num_chains=2, seed=1, progress=False)
    assert set(fit.datatree.children) & PREDICTIVE == {"posterior_predictive"}
    assert "'mu' is improper" in fit.datatree.attrs["no_prior_predictive"]
    assert "full Bayes" in radon_ml.datatree.attrs["no_prior_predictive"]


def test_a_point_has_no_predictive_draws_and_the_tree_says_why(radon_maml):
    tree = radon_maml.datatree
    assert not set(tree.children) & PREDICTIVE
    assert "no posterior draws of theta" in tree.attrs["no_posterior_predictive"]


def test_what_is_too_large_is_left_out(schools_full, monkeypatch):
    from hierbayes.fit import datatree, predictive

    monkeypatch.setattr(predictive, "LARGEST_PREDICTIVE", 1000)
    tree = datatree.build(schools_full)
    assert not set(tree.children) & PREDICTIVE
    assert "200 draws of 8 rows" in tree.attrs["no_posterior_predictive"]
    assert "500 draws" in tree.attrs["no_prior_predictive"]


def test_a_file_holds_no_predictive_draws_and_the_loaded_fit_draws_the_same(schools_full, tmp_path):
    import xarray as xr

    before = schools_full.datatree
    schools_full.save(tmp_path / "fit.nc")
    with xr.open_datatree(tmp_path / "fit.nc", engine="h5netcdf") as stored:
        assert not set(stored.children) & PREDICTIVE
        assert "log_likelihood" in stored.children
    assert set(before.children) >= PREDICTIVE
    again = hb.load(tmp_path / "fit.nc").datatree
    for group in PREDICTIVE:
        xr.testing.assert_equal(again[group].to_dataset(), before[group].to_dataset())


def test_predictive_draws_leave_chunks_unseen(schools_full, monkeypatch):
    """The same distribution however many are drawn at once; shapes stand."""
    from hierbayes.fit import predictive

    monkeypatch.setattr(predictive, "DRAWN_AT_ONCE", 24)
    y, _ = predictive.posterior_predictive(schools_full)
    assert y.shape == (2, 100, 8)
    theta, se = schools_full.theta_draws[..., 0], schools_full.tasks.slots["known_se"]
    white = (y - theta) / se
    assert abs(white.mean()) < 5 / np.sqrt(white.size)
    assert abs(white.var() - 1) < 5 * np.sqrt(2 / white.size)


@pytest.mark.parametrize(
    "written", ["a curved f", pytest.param("a program", marks=pytest.mark.slow)]
)
def test_a_program_and_a_curved_f_have_predictive_draws_too(written, rng):
    """y = e^θ + noise, as a NumPyro program and as a likelihood with its own f."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from hierbayes.adaptation import Laplace

    class Exponential(hb.likelihoods.Gaussian):
        def location(self, theta, phi, task):
            return jnp.exp((task.predictors * theta).sum(-1))

    def program(theta, phi, task):
        numpyro.sample("y", dist.Normal(jnp.exp(theta[0]), phi["sigma"]), obs=task.outcome)

    tasks = hb.Tasks.from_arrays([(np.ones((n, 1)), rng.normal(size=n)) for n in (3, 2)])
    theta, sigma = rng.normal(size=(2, 300, 2, 1)), rng.uniform(0.5, 1.0, (2, 300))
    draws = {"mu": np.zeros((2, 300, 1)), "tau": np.ones((2, 300, 1)), "sigma": sigma}
    phi = {name: value.mean((0, 1)) for name, value in draws.items()}
    stated = hb.HyperPrior(sigma=dist.HalfNormal(1.0))
    curved = written == "a curved f"
    likelihood = Exponential() if curved else hb.likelihoods.from_numpyro(program)
    model = hb.HierarchicalModel(likelihood, hb.priors.Gaussian(), stated).resolve(tasks)
    fit = hb.Fit(hb.meta.FullBayes(), model, tasks, phi, Laplace(), None, draws, theta)
    tree = fit.datatree
    white = tree["posterior_predictive"]["y"].values - np.exp(theta[:, :, tasks.task_of_row, 0])
    white = white / sigma[..., None]
    assert abs(white.mean()) < 5 / np.sqrt(white.size)
    assert abs(white.var() - 1) < 5 * np.sqrt(2 / white.size)
    assert tree["prior_predictive"]["y"].shape == (1, 500, 5)
