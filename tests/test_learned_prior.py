"""The learned prior as an object of its own: a distribution, moments, JSON, a part of programs."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from assertions import close, refuses
from numpyro.infer import MCMC, NUTS, Predictive
from numpyro.infer.util import log_density
from scipy import special, stats

import hierbayes as hb
from hierbayes.adaptation import Conjugate, Laplace
from hierbayes.numerics import float64
from hierbayes.priors import LearnedPrior

RNG = np.random.default_rng(3)
LOCATIONS = RNG.normal(size=(3, 2))
ROOTS = np.tril(RNG.normal(size=(3, 2, 2)), -1) + np.eye(2) * RNG.uniform(0.5, 1.5, (3, 1, 2))
WEIGHTS = np.array([0.2, 0.5, 0.3])
MIXTURE = LearnedPrior(("a", "b"), LOCATIONS, ROOTS, WEIGHTS)
POINT_IN_A = LearnedPrior(("a", "b"), [[1.0, 2.0]], [[[0.0, 0.0], [0.0, 0.5]]])
POINT = LearnedPrior(("a", "b"), [[1.0, 2.0]], [np.zeros((2, 2))])
INDEPENDENT = LearnedPrior(("a", "b"), [[1.0, 2.0]], [[0.3, 0.5]])
SINGULAR = LearnedPrior(("a", "b"), [[1.0, 2.0]], [[[0.3, 0.0], [0.5, 0.0]]])
ALL = {"mixture": MIXTURE, "point in a": POINT_IN_A, "point": POINT, "independent": INDEPENDENT,
       "singular": SINGULAR}  # fmt: skip

log_prob = jax.jit(lambda prior, at: prior.log_prob(at))
sample = jax.jit(lambda prior, key, shape: prior.sample(key, shape), static_argnums=2)
"""As in programs: op by op each of their operations would be a program of its own."""

every_kind = pytest.mark.parametrize("prior", ALL.values(), ids=ALL.keys())


def moments_agree(draws: np.ndarray, prior: LearnedPrior) -> None:
    """Mean and covariance of independent draws within five of their own standard errors."""
    draws = np.asarray(draws, float)
    centred = draws - np.asarray(prior.mean)
    error = centred.std(0) / np.sqrt(len(draws))
    # of what does not vary, the rounding of float32
    assert (np.abs(centred.mean(0)) <= 5 * error + 1e-6).all(), "the mean"
    products = centred[:, :, None] * centred[:, None, :]
    error = products.std(0) / np.sqrt(len(draws))
    gap = np.abs(products.mean(0) - prior.covariance)
    assert (gap <= 5 * error + 1e-6).all(), "the covariance"


def scipy_log_density(prior: LearnedPrior, at: np.ndarray) -> np.ndarray:
    each = [
        stats.multivariate_normal(m, root @ root.T).logpdf(at)
        for m, root in zip(prior.locations, prior.scale_trils, strict=True)
    ]
    return special.logsumexp(np.array(each), axis=0, b=prior.weights[:, None])


# ------------------------------------------------------------------------------ moments


@every_kind
def test_moments_are_those_of_draws(prior):
    moments_agree(prior.draws(20_000, seed=1), prior)
    moments_agree(sample(prior, jax.random.key(1), (20_000,)), prior)


def test_moments_that_are_wrong_are_seen():
    """The control: 3 % of a mean's own sd, and 5 % of a variance, are seen in 200,000 draws."""
    draws = MIXTURE.draws(200_000, seed=1)
    sd = np.sqrt(MIXTURE.variance)
    moments_agree(draws, MIXTURE)
    with pytest.raises(AssertionError, match="the mean"):
        moments_agree(draws + 0.03 * sd, MIXTURE)
    with pytest.raises(AssertionError, match="the covariance"):
        moments_agree(MIXTURE.mean + (draws - MIXTURE.mean) * 1.05, MIXTURE)


def test_covariance_by_the_law_of_total_variance():
    """E[Σ_s] + Cov(m_s), written out component by component; and by hand for two."""
    mean = WEIGHTS @ LOCATIONS
    expected = np.zeros((2, 2))
    for w, m, root in zip(WEIGHTS, LOCATIONS, ROOTS, strict=True):
        expected += w * (root @ root.T + np.outer(m - mean, m - mean))
    close(MIXTURE.mean, mean, rtol=1e-14)
    close(MIXTURE.covariance, expected, rtol=1e-13)
    close(MIXTURE.covariance_matrix, expected, rtol=1e-13)
    close(MIXTURE.variance, np.diag(expected), rtol=1e-13)
    # means −1 and 3 (variance 4 about 1), sds 1 and 2 (mean variance 2.5)
    close(LearnedPrior(["a"], [[-1.0], [3.0]], [[1.0], [2.0]]).covariance, [[6.5]], rtol=1e-14)


# ------------------------------------------------------------------------------ density


def test_density_is_scipys_mixture():
    at = RNG.normal(size=(50, 2)) * 2
    expected = scipy_log_density(MIXTURE, at)
    with jax.enable_x64(True):
        close(log_prob(MIXTURE, at), expected, rtol=1e-11)
        close(log_prob(MIXTURE, at.reshape(5, 10, 2)), expected.reshape(5, 10), rtol=1e-11)
        close(log_prob(INDEPENDENT, at), stats.norm([1, 2], [0.3, 0.5]).logpdf(at).sum(1))


def test_precision_is_the_callers_and_no_flag_moves():
    assert sample(MIXTURE, jax.random.key(0), (50,)).dtype == np.float32
    assert log_prob(MIXTURE, np.zeros((50, 2))).dtype == np.float32
    with jax.enable_x64(True):
        assert sample(MIXTURE, jax.random.key(0), (50,)).dtype == np.float64
        assert log_prob(MIXTURE, np.zeros((50, 2))).dtype == np.float64
    assert not jax.config.jax_enable_x64
    assert MIXTURE.draws(2).dtype == MIXTURE.mean.dtype == MIXTURE.covariance.dtype == np.float64


def test_directions_without_variance():
    """The density is that of b alone; with none left, one at the point and none elsewhere."""
    found = log_prob(POINT_IN_A, np.array([1.0, 2.3]))
    close(found, stats.norm(2, 0.5).logpdf(2.3), rtol=1e-6)  # float32
    assert (POINT_IN_A.draws(50)[:, 0] == 1).all()
    assert (np.asarray(sample(POINT_IN_A, jax.random.key(0), (50,)))[:, 0] == 1).all()
    at_point = np.asarray(log_prob(POINT, np.array([[1.0, 2.0], [1.0, 3.0]])))
    assert at_point.tolist() == [0.0, -np.inf]
    with refuses("no density", "exactly 0"):
        SINGULAR.log_prob(np.array([1.0, 2.0]))
    # a mixture of two points: between them is nothing
    with refuses("no density"):
        LearnedPrior(["a"], [[0.0], [1.0]], [[0.0], [0.0]]).log_prob(np.zeros(1))


def test_what_a_constant_shares_with_others_is_not_lost():
    """L with a zero row but a full column: Σ = [[0, 0], [0, 0.5² + 1.2²]]."""
    prior = LearnedPrior(["a", "b"], [[1.0, 2.0]], [[[0.0, 0.0], [1.2, -0.5]]])
    close(prior.covariance, [[0.0, 0.0], [0.0, 1.69]], rtol=1e-14)
    close(log_prob(prior, np.array([1.0, 2.3])), stats.norm(2, 1.3).logpdf(2.3), rtol=1e-6)


# --------------------------------------------------------------------------------- JSON


@every_kind
def test_json_brings_back_every_bit(prior, tmp_path):
    path = tmp_path / "prior.json"
    text = prior.to_json(path)
    for again in (LearnedPrior.from_json(path), LearnedPrior.from_json(text),
                  LearnedPrior.from_json(str(path))):  # fmt: skip
        assert again.coef == prior.coef
        for name in ("weights", "locations", "scale_trils"):
            np.testing.assert_array_equal(getattr(again, name), getattr(prior, name))
        np.testing.assert_array_equal(again.draws(5, seed=2), prior.draws(5, seed=2))
    assert [p.name for p in tmp_path.iterdir()] == ["prior.json"]


def test_the_json_says_what_its_docstring_says():
    plain = json.loads(MIXTURE.to_json())
    assert plain["format"] == "hierbayes learned prior"
    assert plain["version"] == 1
    assert plain["coef"] == ["a", "b"]
    close(plain["weights"], WEIGHTS, rtol=0)
    close(plain["locations"], LOCATIONS, rtol=0)
    close(plain["scale_trils"], ROOTS, rtol=0)
    for name in plain:
        assert name in LearnedPrior.to_json.__doc__


def test_many_components_are_thinned_evenly():
    many = LearnedPrior(["a"], np.arange(4000.0)[:, None], np.ones((4000, 1, 1)))
    few = LearnedPrior.from_json(many.to_json())
    assert few.locations.shape == (500, 1)
    close(few.weights, np.full(500, 1 / 500), rtol=1e-12)
    gaps = np.diff(few.locations[:, 0])
    assert (few.locations[[0, -1], 0] == [0, 3999]).all()
    assert set(gaps) <= {7.0, 8.0, 9.0}
    assert len(many.to_json()) < 60_000
    whole = LearnedPrior.from_json(many.to_json(num_components=4000))
    np.testing.assert_array_equal(whole.locations, many.locations)
    with refuses("num_components"):
        many.to_json(num_components=0)


def changed(**fields: object) -> str:
    plain = json.loads(MIXTURE.to_json())
    return json.dumps({**plain, **fields})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ("no JSON",)),
        ("[1, 2]", ("no learned prior",)),
        ('{"format": "another"}', ("no learned prior", "to_json")),
        (changed(version=2), ("newer hierbayes", "version 2")),
        (changed(version="one"), ("version",)),
        (json.dumps({"format": "hierbayes learned prior", "version": 1, "coef": ["a"]}),
         ("lacks", "'weights'", "'locations'")),
        (changed(coef="ab"), ("`coef`", "names")),
        (changed(coef=["a", "a"]), ("`coef`", "each once")),
        (changed(coef=["a"]), ("`locations`", "(3, 2)")),
        (changed(locations=[[1, 2], [3]]), ("`locations`", "no array of numbers")),
        (changed(locations=[["x", "y"]] * 3), ("`locations`", "no array of numbers")),
        (changed(locations=[[1, float("nan")]] * 3), ("`locations`", "NaN")),
        (changed(scale_trils=[[[1.0]]] * 3), ("`scale_trils`", "(3, 2, 2)")),
        (changed(scale_trils=[[[1.0, 1.0], [0.0, 1.0]]] * 3), ("lower triangular",)),
        (changed(weights=[0.5, 0.6, -0.1]), ("`weights`", "positive")),
        (changed(weights=[0.5, 0.6, 0.1]), ("`weights`", "sum 1.2")),
        ("no/such/file.json", ("cannot read", "no/such/file.json")),
        (7, ("expected a path or JSON text", "int")),
    ],
)  # fmt: skip
def test_json_that_is_no_prior_is_refused_in_words(text, words):
    with refuses(*words):
        LearnedPrior.from_json(text)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    with refuses("no JSON", "binary"):
        LearnedPrior.from_json(tmp_path / "binary")
    with refuses("folder does not exist"):
        MIXTURE.to_json(tmp_path / "nowhere" / "prior.json")


# ------------------------------------------------------------------------ NumPyro models


@every_kind
def test_in_a_plate_of_a_program(prior):
    def program():
        with numpyro.plate("task", 3):
            numpyro.sample("theta", prior)
        numpyro.sample("one", prior)

    draws = Predictive(program, num_samples=4000)(jax.random.key(2))
    assert draws["theta"].shape == (4000, 3, 2)
    moments_agree(draws["one"], prior)
    moments_agree(draws["theta"][:, 2], prior)


def test_density_inside_a_program():
    at = RNG.normal(size=(4, 2))

    def program():
        with numpyro.plate("task", 4):
            numpyro.sample("theta", MIXTURE)

    with jax.enable_x64(True):
        found = jax.jit(lambda theta: log_density(program, (), {}, {"theta": theta})[0])(at)
    close(found, scipy_log_density(MIXTURE, at).sum(), rtol=1e-11)


def nuts(program, num_samples: int = 700) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        chain = MCMC(NUTS(program), num_warmup=300, num_samples=num_samples, num_chains=2,
                     chain_method="vectorized", progress_bar=False)  # fmt: skip
        chain.run(jax.random.key(3))
        return {name: np.asarray(v) for name, v in chain.get_samples(True).items()}


@pytest.mark.slow
def test_nuts_moves_only_where_there_is_variance():
    """b | y = 3 of sd 1: precision 4 + 1, mean (4·2 + 3) / 5 = 2.2."""

    def program():
        theta = numpyro.sample("theta", POINT_IN_A)
        numpyro.sample("y", dist.Normal(theta[1], 1.0), obs=3.0)

    found = nuts(program)["theta"]
    assert (found[..., 0] == 1).all()
    posterior_agrees(found[..., 1], 2.2, np.sqrt(1 / 5))


def posterior_agrees(draws: np.ndarray, mean: float, sd: float) -> None:
    """Draws (chain, draw) within four of their standard errors (ArviZ's effective size)."""
    import arviz_stats

    ess = float(arviz_stats.ess(draws, method="mean"))
    assert ess > 200
    assert abs(draws.mean() - mean) < 4 * sd / np.sqrt(ess)
    ess = float(arviz_stats.ess((draws - mean) ** 2, method="mean"))
    # a variance of normal draws has a relative standard error of √(2 / ess), an sd half of it
    assert abs(draws.std() / sd - 1) < 4 * np.sqrt(0.5 / ess)


@pytest.fixture(scope="module")
def adapted_to(radon_ml):
    """(prior through JSON, x, y, z, the new task as fit.adapt has it)."""
    prior = LearnedPrior.from_json(radon_ml.prior.to_json())
    rng = np.random.default_rng(8)
    x = np.column_stack([np.ones(6), [0, 0, 1, 0, 1, 0]])
    y, z = 1.5 - 0.6 * x[:, 1] + rng.normal(size=6), np.full((6, 1), 0.2)
    labels = radon_ml.tasks.labels
    new = hb.Tasks.from_arrays([(x, y)], coef=labels.coef, shared=[z])
    new = type(new)(**{**vars(new), "labels": type(labels)(
        new.names, labels.coef, labels.shared, (), labels.task, labels.outcome)})  # fmt: skip
    return prior, x, y, z, radon_ml.adapt(new)


def test_a_new_task_under_it_is_dense_algebra(adapted_to, radon_ml):
    """Precision Σ⁻¹ + XᵀX/σ²."""
    prior, x, y, z, adapted = adapted_to
    sigma = float(radon_ml.phi["sigma"])
    precision = np.linalg.inv(prior.covariance) + x.T @ x / sigma**2
    pull = (
        np.linalg.solve(prior.covariance, prior.mean)
        + x.T @ (y - z @ radon_ml.phi["beta"]) / sigma**2
    )
    close(adapted.theta.values[0], np.linalg.solve(precision, pull), rtol=1e-8)
    close(adapted.covariance.values[0], np.linalg.inv(precision), rtol=1e-7)


@pytest.mark.slow
def test_a_new_task_in_a_program_is_as_adapted(adapted_to, radon_ml):
    """A NumPyro program and NUTS: the posterior that fit.adapt has exactly."""
    prior, x, y, z, adapted = adapted_to

    def program():
        theta = numpyro.sample("theta", prior)
        mean = x @ theta + z @ radon_ml.phi["beta"]
        noise = float(radon_ml.phi["sigma"])
        numpyro.sample("y", dist.Normal(mean, noise).to_event(1), obs=y)

    found = nuts(program)["theta"]
    for k in range(2):
        sd = float(np.sqrt(adapted.covariance.values[0, k, k]))
        posterior_agrees(found[..., k], float(adapted.theta.values[0, k]), sd)


# --------------------------------------------------------------------------------- fits


def test_full_bayes_is_a_mixture_over_draws(radon_full):
    prior, draws = radon_full.prior, radon_full.phi_draws
    assert isinstance(prior, LearnedPrior)
    assert prior.coef == radon_full.tasks.coef
    mu, tau, corr = (draws[n].reshape(200, *draws[n].shape[2:]) for n in ("mu", "tau", "corr"))
    close(prior.locations, mu, rtol=0)
    within = tau[:, :, None] * corr * tau[:, None, :]
    close(prior.covariance, within.mean(0) + np.cov(mu.T, bias=True), rtol=1e-10)
    close(prior.mean, radon_full.phi["mu"], rtol=1e-12)


def test_empirical_bayes_is_one_normal(radon_ml):
    prior, phi = radon_ml.prior, radon_ml.phi
    assert len(prior.weights) == 1
    close(prior.mean, phi["mu"], rtol=0)
    close(prior.covariance, np.outer(phi["tau"], phi["tau"]) * phi["corr"], rtol=1e-9)


def test_one_draw_of_phi(schools_full):
    one = {name: value[:1, :1] for name, value in schools_full.phi_draws.items()}
    fit = replace(schools_full, phi_draws=one)
    prior = fit.prior
    assert len(prior.weights) == 1
    close(prior.covariance, [[float(fit.phi_draws["tau"][0, 0, 0]) ** 2]], rtol=1e-12)


def test_task_predictors_move_each_tasks_own(rng):
    w = np.linspace(-1, 1, 8)[:, None]
    arrays = [(np.ones((4, 1)), 2 * v + rng.normal(size=4)) for v in w[:, 0]]
    tasks = hb.Tasks.from_arrays(arrays, task_predictors=w)
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    phi = {"mu": np.array([0.1]), "gamma": np.array([[1.9]]), "tau": np.array([0.3]),
           "sigma": np.array(1.0)}  # fmt: skip
    fit = hb.Fit(hb.meta.EmpiricalBayes(), model, tasks, phi, Conjugate())
    with pytest.raises(AttributeError, match="prior_for"):
        _ = fit.prior
    means = np.array([prior.mean for prior in fit.prior_for(tasks)])
    close(means, fit.phi["mu"] + w @ fit.phi["gamma"].T, rtol=1e-12)


def test_counts_have_a_prior_too(rng):
    tasks = hb.Tasks.from_arrays([(np.ones((5, 1)), rng.poisson(m, 5)) for m in (1, 2, 4, 7, 3)])
    model = hb.HierarchicalModel(hb.likelihoods.Poisson(), hb.priors.Gaussian())
    phi = {"mu": np.array([1.1]), "tau": np.array([0.6])}
    fit = hb.Fit(hb.meta.EmpiricalBayes(), model, tasks, phi, Laplace())
    close(fit.prior.mean, [1.1], rtol=0)
    close(fit.prior.covariance, [[0.36]], rtol=1e-12)


def test_methods_without_a_prior_say_so(radon_maml, radon_no_pooling):
    with pytest.raises(AttributeError, match="equivalent_prior"):
        _ = radon_maml.prior
    with pytest.raises(AttributeError, match="learns no prior"):
        _ = radon_no_pooling.prior


# ------------------------------------------------------------------------------ picture


@every_kind
def test_the_picture_of_a_prior_by_itself(prior):
    import matplotlib.pyplot as plt

    ax = hb.plots.learned_prior(prior, coef="b")
    assert ax.get_xlabel() == "θ, b"
    (line,) = ax.lines
    x, y = line.get_data()
    if len(x) > 2:
        # trapezium over ± 4 sds: all but 1e-3 of a mixture of three normals, at 400 points
        close(np.trapezoid(y, x), 1.0, atol=3e-3)
    else:
        assert x[0] == 2.0
    plt.close("all")
    with refuses("'c'"):
        hb.plots.learned_prior(prior, coef="c")


# ---------------------------------------------------------------------- Student-t


@pytest.mark.parametrize("num_components", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_student_t_prior_is_learned_as_one(num_components):
    """Density against SciPy, moments against the law of total variance, draws against both."""
    rng = np.random.default_rng(3)
    locations = rng.normal(size=(num_components, 2))
    roots = np.tril(rng.normal(size=(num_components, 2, 2))) + 2 * np.eye(2)
    prior = hb.priors.LearnedPrior(("a", "b"), locations, roots, df=6.0)
    scales = roots @ np.swapaxes(roots, 1, 2)
    points = rng.normal(size=(5, 2))
    parts = [stats.multivariate_t(m, s, df=6.0).pdf(points)
             for m, s in zip(locations, scales, strict=True)]  # fmt: skip
    with float64():
        close(log_prob(prior, points), np.log(np.mean(parts, axis=0)), rtol=1e-9)
    covariance = 1.5 * scales.mean(0) + np.cov(locations.T, bias=True).reshape(2, 2)
    if num_components == 1:
        covariance = 1.5 * scales[0]
    close(prior.covariance, covariance, rtol=1e-12)
    close(prior.variance, np.diag(covariance), rtol=1e-12)
    for draws in (prior.draws(40_000), np.asarray(sample(prior, jax.random.key(0), (40_000,)))):
        error = np.sqrt(np.diag(covariance) / 40_000)
        assert (np.abs(draws.mean(0) - prior.mean) < 4.5 * error).all()
        # of t with 6 degrees of freedom the kurtosis is 6: a variance's relative error √(5 / n)
        found = np.cov(draws.T)
        assert (np.abs(np.diag(found) / np.diag(covariance) - 1) < 5 * np.sqrt(5 / 40_000)).all()
    again = hb.priors.LearnedPrior.from_json(prior.to_json())
    assert again.df == 6.0
    np.testing.assert_array_equal(again.scale_trils, prior.scale_trils)


def test_moments_that_a_student_t_lacks_are_not_made_up():
    prior = hb.priors.LearnedPrior(("a", "b"), np.zeros((1, 2)), np.diag([1.0, 0.0])[None], df=1.5)
    assert prior.variance.tolist() == [np.inf, 0.0]
    assert prior.covariance.tolist() == [[np.inf, 0.0], [0.0, 0.0]]
    heavier = hb.priors.LearnedPrior(("a",), np.zeros((1, 1)), np.ones((1, 1, 1)), df=0.5)
    assert np.isnan(heavier.mean).all()
    with refuses("df", "positive"):
        hb.priors.LearnedPrior(("a",), np.zeros((1, 1)), np.ones((1, 1, 1)), df=0.0)
