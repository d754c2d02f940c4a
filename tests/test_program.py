"""Any NumPyro program as a likelihood: the answers of the families, and sentences elsewhere."""

from __future__ import annotations

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from assertions import close
from numpyro.infer.util import log_density
from scipy import stats

import hierbayes as hb
from hierbayes.adaptation import GradientSteps
from hierbayes.fit import Fit
from hierbayes.fit.method import Derived
from hierbayes.numerics import float64
from hierbayes.rows import rows_of

HYPER = hb.HyperPrior(mu=dist.Normal(0.0, 2.5), tau=dist.HalfNormal(1.0))
PRIOR = hb.priors.Gaussian(correlated=False)


def counts(theta, phi, task):
    f = task.predictors @ theta + task.slots["offset"]
    numpyro.sample("y", dist.Poisson(jnp.exp(f)), obs=task.outcome)


def noisy(theta, phi, task):
    numpyro.sample("y", dist.Normal(task.predictors @ theta, phi["noise"]), obs=task.outcome)


def together(theta, phi, task):
    """The same rows as one site for the whole task."""
    mean = task.predictors @ theta
    scale = phi["noise"] * jnp.eye(len(mean))
    numpyro.sample("y", dist.MultivariateNormal(mean, scale_tril=scale), obs=task.outcome)


NOISE = hb.HyperPrior(
    mu=dist.Normal(0.0, 2.5), tau=dist.HalfNormal(1.0), extra={"noise": dist.HalfNormal(1.0)}
)


def ragged(seed=0, sizes=(5, 0, 1, 8, 6, 7)):
    """Counts with an offset; a task without rows and one of a single row among them."""
    rng = np.random.default_rng(seed)
    data, offsets = [], []
    for n in sizes:
        x = np.column_stack([np.ones(n), rng.normal(size=n)])
        offset = rng.normal(0.0, 0.3, n)
        theta = np.array([0.5, 0.3]) + rng.normal(size=2) * [0.6, 0.4]
        data.append((x, rng.poisson(np.exp(x @ theta + offset)).astype(float)))
        offsets.append(offset)
    tasks = hb.Tasks.from_arrays(data, coef=["Intercept", "x"])
    return replace(tasks, slots={"offset": np.concatenate(offsets)})


def even(seed=0, num_tasks=8, n=6):
    rng = np.random.default_rng(seed)
    x = np.column_stack([np.ones(n), np.linspace(-1, 1, n)])
    thetas = rng.normal(size=(num_tasks, 2))
    return hb.Tasks.from_arrays([(x, x @ t + 0.4 * rng.normal(size=n)) for t in thetas])


def at_a_point(model, tasks, phi):
    """A fit whose φ is given and not learned, which compiles no outer loop; θ is two steps away."""
    phi = {name: np.asarray(value, float) for name, value in phi.items()}
    model, tasks = model.resolve(tasks), model.tasks(tasks)
    model.likelihood.check(tasks)  # as every method does first
    return Fit(Derived("steps"), model, tasks, phi, GradientSteps(2, 0.01))


@pytest.fixture(scope="module")
def learned():
    """Laplace's evidence of a program, which several tests look at."""
    model = hb.HierarchicalModel(hb.likelihoods.from_numpyro(noisy), PRIOR, NOISE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        return hb.empirical_bayes(model, even(), evidence="laplace")


@pytest.fixture(scope="module")
def pair():
    """(family, program) models of the same counts."""
    return tuple(
        hb.HierarchicalModel(likelihood, PRIOR, HYPER)
        for likelihood in (hb.likelihoods.Poisson(), hb.likelihoods.from_numpyro(counts))
    )


@pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")
def test_laplaces_evidence_is_exact_where_rows_are_normal(learned):
    """Against the closed form of the family: log evidence to 1e-5, φ̂ and θ̂ to 1e-3."""
    gaussian = hb.HierarchicalModel(hb.likelihoods.Gaussian(), PRIOR)
    exact = hb.empirical_bayes(gaussian, even())
    close(learned.log_evidence, exact.log_evidence, rtol=0, atol=1e-5)
    for ours, theirs in (("noise", "sigma"), ("mu", "mu"), ("tau", "tau")):
        close(learned.phi[ours], exact.phi[theirs], rtol=0, atol=1e-3)
    close(learned.theta, exact.theta, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")
def test_evidence_is_the_familys(pair):
    """Two ways to the same maximum: log evidence to 1e-6, where a maximum is flat; φ̂ to 1e-3."""
    family, program = (hb.empirical_bayes(m, ragged(), evidence="quadrature") for m in pair)
    close(program.log_evidence, family.log_evidence, rtol=0, atol=1e-6)
    for name in ("mu", "tau"):
        close(program.phi[name], family.phi[name], rtol=0, atol=1e-3)
    close(program.theta, family.theta, rtol=0, atol=1e-3)


def test_values_and_curvature_are_the_familys(pair):
    """Automatic derivatives against those written out; 1e-10 of order-one numbers."""
    tasks, rng = ragged(), np.random.default_rng(1)
    theta, phi = rng.normal(size=(2, tasks.num_tasks)), {"mu": np.zeros(2), "tau": np.ones(2)}
    with float64():
        found = []
        for model in pair:
            rows = rows_of(tasks, model.likelihood)

            @jax.jit
            def to_second_order(rows, theta, likelihood=model.likelihood):
                rows = rows.under(likelihood, phi)
                at = rows.to_second_order(likelihood, theta, phi, damped=False)
                return at.value + rows.constant, at.slope, at.curvature

            found.append(to_second_order(rows, theta))
    for ours, theirs in zip(*found, strict=True):
        close(theirs, ours, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(
            lambda m, t: hb.maml(m, t, num_steps=3, step_size=0.01, num_meta_steps=50),
            id="maml", marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda m, t: hb.imaml(m, t, prior_precision=1.0, num_meta_steps=20),
            id="imaml", marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda m, t: hb.reptile(m, t, num_steps=3, step_size=0.01, num_meta_steps=20),
            id="reptile",
        ),
    ],
)  # fmt: skip
def test_gradient_methods_are_the_familys(pair, method):
    """The same steps on the same numbers; 1e-6: sums in another order."""
    family, program = (method(m, ragged()) for m in pair)
    close(program.phi["mu"], family.phi["mu"], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_equivalent_prior_takes_a_program(pair):
    phi = {"mu": np.array([0.4, 0.2])}
    family, program = (
        hb.equivalent_prior(m, ragged(), phi, num_steps=3, step_size=0.02) for m in pair
    )
    close(program.precision, family.precision, rtol=1e-8, atol=1e-8)
    close(program.posterior_mean, family.posterior_mean, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")
def test_one_density_for_a_whole_task_is_exact_where_it_is_normal():
    """Laplace's evidence of a normal is exact: at the same φ̂, the closed form, to 1e-8."""
    tasks = even()
    likelihood = hb.likelihoods.from_numpyro(together)
    model = hb.HierarchicalModel(likelihood, PRIOR, NOISE)
    fit = hb.empirical_bayes(model, tasks, evidence="laplace")
    gaussian = hb.HierarchicalModel(hb.likelihoods.Gaussian(), PRIOR)
    exact = hb.empirical_bayes(gaussian, tasks)
    close(fit.log_evidence, exact.log_evidence, rtol=0, atol=1e-5)
    close(fit.phi["noise"], exact.phi["sigma"], rtol=0, atol=1e-3)


def test_one_density_for_a_whole_task_predicts_no_rows():
    model = hb.HierarchicalModel(hb.likelihoods.from_numpyro(together), PRIOR, NOISE)
    fit = at_a_point(model, even(), {"mu": [0.1, 0.2], "tau": [1.0, 1.0], "noise": 0.5})
    with pytest.raises(ValueError, match="predictions of rows need a program with one sample site"):
        fit.predict().mean  # noqa: B018


def test_its_program_has_the_joint_density():
    """NumPyro's density of its program is log p(φ, θ, D), in float64 to 1e-9."""
    tasks, rng = even(), np.random.default_rng(3)
    model = hb.HierarchicalModel(hb.likelihoods.from_numpyro(noisy), PRIOR, NOISE)
    phi = {"mu": np.array([0.3, -0.2]), "tau": np.array([0.7, 1.1]), "noise": np.array(0.5)}
    theta = rng.normal(size=(tasks.num_tasks, 2))
    with float64():
        program = model.numpyro_program(tasks)
        found = jax.jit(lambda v: log_density(program, (), {}, v)[0])(phi | {"theta": theta})
    close(model.log_joint(phi, theta, tasks), float(found), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")
def test_collapsed_and_joint_sampling_agree(pair):
    """Means of φ within four standard errors of their difference."""
    fits = [
        hb.full_bayes(pair[1], ragged(), method, num_draws=500, num_chains=2)
        for method in ("collapsed", "nuts")
    ]
    for name in ("mu", "tau"):
        means, errors = [], []
        for fit in fits:
            table = fit.summary([name])
            means.append(table["mean"].to_numpy())
            errors.append(table["mcse_mean"].to_numpy())
        gap = np.abs(means[0] - means[1]) / np.hypot(*errors)
        assert gap.max() < 4


# ---------------------------------------------------------------------- predictions


@pytest.fixture(scope="module")
def predicted(pair):
    """At one θ, by way of gradient steps, and the rates written out."""
    tasks = ragged()
    fit = at_a_point(pair[1], tasks, {"mu": [0.4, 0.2]})
    theta = fit.theta.values[tasks.task_of_row]
    return fit.predict(), np.exp((tasks.predictors * theta).sum(1) + tasks.slots["offset"])


def test_predictions_are_the_familys_at_a_point(predicted):
    """Poisson against SciPy's."""
    prediction, rate = predicted
    expected = stats.poisson(rate)
    close(prediction.mean, rate, rtol=1e-10, atol=1e-10)
    close(prediction.sd, np.sqrt(rate), rtol=1e-10, atol=1e-10)
    close(prediction.log_density(), expected.logpmf(ragged().outcome), rtol=1e-10, atol=1e-10)
    assert (prediction.quantile(0.9) == expected.ppf(0.9)).all()


@pytest.mark.slow
def test_draws_are_the_familys_at_a_point(predicted):
    prediction, rate = predicted
    draws = prediction.draws(4000)
    gap = np.abs(draws.mean(0) - rate) / np.sqrt(rate / 4000)
    assert gap.max() < 5


def test_new_tasks_are_drawn_from_the_prior(learned):
    """E y = E θ₁ at x = (1, 0): within five standard errors of 200 draws; spread likewise."""
    phi = learned.phi
    new = hb.Tasks.from_arrays([(np.array([[1.0, 0.0]]), np.zeros(1))], names=["new"])
    prediction = learned.predict(new, target="new")
    spread = np.hypot(phi["tau"][0], phi["noise"])
    assert abs(prediction.mean[0] - phi["mu"][0]) < 5 * phi["tau"][0] / np.sqrt(200)
    assert abs(prediction.sd[0] / spread - 1) < 5 / np.sqrt(2 * 200)
    assert learned.prior.event_shape == (2,)


def test_a_fit_comes_back_from_its_file(learned, tmp_path):
    learned.save(tmp_path / "fit.nc")
    with pytest.raises(ValueError, match="model=…"):
        hb.load(tmp_path / "fit.nc")
    again = hb.load(tmp_path / "fit.nc", model=learned.model)
    close(again.predict().mean, learned.predict().mean, rtol=1e-12, atol=1e-12)
    tasks = even(seed=1)
    close(again.adapt(tasks).theta, learned.adapt(tasks).theta, rtol=1e-12, atol=1e-12)


def decay(theta, phi, task):
    level = theta[0] - jnp.exp(theta[1]) * task.predictors[:, 0]
    numpyro.sample("y", dist.Normal(level, 0.1), obs=task.outcome)


def decaying(num_tasks):
    """A model of one column and two entries of θ, and its tasks."""
    rng, hours = np.random.default_rng(0), np.arange(1.0, 7.0)
    rates = np.exp(rng.normal(-1.0, 0.3, num_tasks))
    data = [(hours[:, None], 2 - k * hours + 0.1 * rng.normal(size=6)) for k in rates]
    likelihood = hb.likelihoods.from_numpyro(decay, theta=["level", "log_rate"])
    return hb.HierarchicalModel(likelihood, PRIOR), hb.Tasks.from_arrays(data, coef=["hours"])


def test_theta_may_have_other_entries_than_columns(tmp_path):
    """One column, two entries of θ; names, DataTree and file follow."""
    model, tasks = decaying(8)
    fit = at_a_point(model, tasks, {"mu": [2.0, -1.0]})
    assert fit.theta.coef.values.tolist() == ["level", "log_rate"]
    assert set(fit.datatree["point_estimate"]["mu"].coef.values) == {"level", "log_rate"}
    fit.save(tmp_path / "fit.nc")
    again = hb.load(tmp_path / "fit.nc", model=model)
    close(again.predict().mean, fit.predict().mean, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_entries_that_are_no_columns_are_recovered():
    """40 tasks: within four standard errors of the truth."""
    fit = hb.empirical_bayes(*decaying(40), evidence="laplace")
    assert fit.theta.coef.values.tolist() == ["level", "log_rate"]
    assert set(fit.datatree["point_estimate"]["mu"].coef.values) == {"level", "log_rate"}
    assert abs(fit.phi["mu"][1] + 1.0) < 4 * 0.3 / np.sqrt(40)
    assert abs(fit.phi["tau"][1] / 0.3 - 1) < 4 / np.sqrt(80)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")
def test_parameters_live_where_their_priors_do():
    """A shift on the real line and a share between 0 and 1, found where the data put them."""

    def mixed(theta, phi, task):
        ones = dist.Bernoulli(phi["share"]).log_prob(task.slots["weight"])
        numpyro.factor("kind", ones)
        numpyro.sample("y", dist.Normal(theta[0] + phi["shift"] * task.predictors[:, 0], 1.0),
                       obs=task.outcome)  # fmt: skip

    rng = np.random.default_rng(0)
    data, kinds = [], []
    for _ in range(60):
        z, kind = rng.normal(size=(10, 1)), (rng.random(10) < 0.25).astype(float)
        data.append((z, rng.normal() - 1.5 * z[:, 0] + rng.normal(size=10)))
        kinds.append(kind)
    tasks = hb.Tasks.from_arrays(data)
    tasks = replace(tasks, slots={"weight": np.concatenate(kinds)})
    hyper = hb.HyperPrior(
        extra={"shift": dist.Normal(0.0, 2.0), "share": dist.Beta(1.0, 1.0)},
    )
    model = hb.HierarchicalModel(hb.likelihoods.from_numpyro(mixed, theta=["level"]), PRIOR, hyper)
    fit = hb.empirical_bayes(model, tasks, evidence="laplace")
    assert fit.phi["share"] == pytest.approx(np.concatenate(kinds).mean(), abs=1e-3)
    assert abs(fit.phi["shift"] + 1.5) < 4 / np.sqrt(540)


@pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")
def test_a_parameter_lies_where_its_prior_does(learned):
    """The maximum of the evidence knows of a prior only where that cuts it off."""
    anywhere = learned.phi["noise"]

    def noise_within(low, high):
        hyper = replace(NOISE, extra={"noise": dist.Uniform(low * anywhere, high * anywhere)})
        model = hb.HierarchicalModel(hb.likelihoods.from_numpyro(noisy), PRIOR, hyper)
        return hb.empirical_bayes(model, even(), evidence="laplace").phi["noise"] / anywhere

    assert noise_within(0.5, 2.0) == pytest.approx(1.0, abs=1e-5)  # slopes vanish to 1e-9 of a nat
    assert noise_within(1.5, 2.0) == pytest.approx(1.5, abs=1e-3)


# ------------------------------------------------------------------------ bad input


def refused(program, words, tasks=None, hyper=HYPER, **named):
    model = hb.HierarchicalModel(hb.likelihoods.from_numpyro(program, **named), PRIOR, hyper)
    with pytest.raises(ValueError, match=words):
        hb.empirical_bayes(model, even() if tasks is None else tasks)


def latent(theta, phi, task):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(task.predictors @ theta, scale), obs=task.outcome)


def test_programs_that_are_no_likelihood_are_refused():
    refused(latent, "'scale' of the program are not observed")
    refused(lambda theta, phi, task: None, "no observed site")
    refused(noisy, "asks phi for 'noise'")
    refused(lambda theta, phi, task: theta[None] @ task.predictors, "does not run on task 0")
    refused(together, "tasks of different lengths need one a row", ragged(), NOISE)
    with pytest.raises(ValueError, match="takes a function of"):
        hb.likelihoods.from_numpyro("y ~ x")
    with pytest.raises(ValueError, match="every entry of θ once"):
        hb.likelihoods.from_numpyro(noisy, theta=["a", "a"])


@pytest.mark.parametrize("method", [hb.no_pooling, hb.complete_pooling])
def test_programs_without_a_prior_are_refused(pair, method):
    with pytest.raises(ValueError, match="needs a linear predictor"):
        method(pair[1], ragged())
