"""The exact last layer: evidence on features, slopes, posteriors, and learning the features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import close, finite_difference
from scipy import stats

import hierbayes as hb
from hierbayes.evidence import Exact
from hierbayes.fit.method import Derived
from hierbayes.meta.last_layer import log_evidence_on_features
from hierbayes.numerics import float64
from hierbayes.priors import Gaussian as GaussianPrior

PRIOR = GaussianPrior(correlated=False)


def model_of(sizes=(1, 6), dtype="float64", **settings):
    likelihood = hb.likelihoods.LastLayer.mlp(
        list(sizes), activation=jnp.tanh, dtype=dtype, **settings
    )
    return hb.HierarchicalModel(likelihood, PRIOR)


def some_phi(model, d, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "mu": rng.normal(size=d),
        "tau": rng.uniform(0.3, 1.0, d),
        "sigma": np.asarray(0.4),
        "features": rng.normal(size=model.likelihood.weights.size),
    }


def ragged(seed=1, sizes=(3, 7, 1, 5)):
    rng = np.random.default_rng(seed)
    return hb.Tasks.from_arrays([(rng.normal(size=(n, 1)), rng.normal(size=n)) for n in sizes])


def features_by_hand(model, phi, x):
    """One tanh layer in NumPy; the pytree of an mlp holds w (in, out) and b (out,)."""
    with float64():
        tree = jax.jit(model.likelihood.weights.tree)(phi["features"])
        layer = jax.tree.map(np.asarray, tree)[0]
    return np.column_stack([np.ones(len(x)), np.tanh(x @ layer["w"] + layer["b"])])


def dense_evidence(model, phi, tasks):
    """log N(y; Hμ, HΣHᵀ + σ²I) of every task by SciPy."""
    values = []
    for low, high in zip(tasks.starts[:-1], tasks.starts[1:], strict=True):
        h = features_by_hand(model, phi, tasks.predictors[low:high])
        cov = h @ np.diag(phi["tau"] ** 2) @ h.T + phi["sigma"] ** 2 * np.eye(high - low)
        values.append(stats.multivariate_normal(h @ phi["mu"], cov).logpdf(tasks.outcome[low:high]))
    return np.array(values)


def on_features(model, phi, tasks):
    block = tasks.block(np.arange(tasks.num_tasks), int(tasks.sizes.max()))
    with float64():
        evidence = jax.jit(lambda phi, block: log_evidence_on_features(model, phi, block))
        return np.asarray(evidence(phi, block))


def test_the_evidence_on_features_is_the_dense_normal_for_ragged_tasks():
    """Rows that only fill up add nothing; 1e-10: n × n algebra against SciPy's eigenvalues."""
    model, tasks = model_of(), ragged()
    phi = some_phi(model, 7)
    close(on_features(model, phi, tasks), dense_evidence(model, phi, tasks), rtol=1e-10)


@pytest.mark.slow
def test_the_evidence_on_features_is_the_exact_evidence_of_the_featurised_tasks():
    """Two independent computations, n × n and d × d."""
    model, tasks = model_of(), ragged(seed=2)
    phi = some_phi(model, 7)
    close(on_features(model, phi, tasks), Exact()(model, model.tasks(tasks), phi), rtol=1e-9)


def test_the_control_a_wrong_feature_is_seen():
    model, tasks = model_of(), ragged()
    phi = some_phi(model, 7)
    other = phi | {"features": phi["features"] * 1.01}
    with pytest.raises(AssertionError):
        close(on_features(model, other, tasks), dense_evidence(model, phi, tasks), rtol=1e-10)


@pytest.mark.slow
def test_the_slope_of_the_evidence_is_that_of_differences():
    model, tasks = model_of(sizes=(1, 3)), ragged()
    phi = some_phi(model, 4)
    block = tasks.block(np.arange(tasks.num_tasks), int(tasks.sizes.max()))
    with float64():
        total = jax.jit(lambda phi: log_evidence_on_features(model, phi, block).sum())
        slopes = jax.jit(jax.grad(total))(phi)
        for name in ("mu", "tau", "sigma", "features"):
            wanted = finite_difference(lambda v, n=name: float(total(phi | {n: v})), phi[name])
            close(np.asarray(slopes[name]), wanted, rtol=1e-6, atol=1e-7)


def test_posterior_means_covariances_and_predictions_are_those_of_dense_algebra():
    model, tasks = model_of(), ragged()
    phi = some_phi(model, 7)
    adapted = hb.adaptation.Conjugate()(model, model.tasks(tasks), phi)
    for j, (low, high) in enumerate(zip(tasks.starts[:-1], tasks.starts[1:], strict=True)):
        h = features_by_hand(model, phi, tasks.predictors[low:high])
        precision = h.T @ h / phi["sigma"] ** 2 + np.diag(phi["tau"] ** -2.0)
        pulled = h.T @ tasks.outcome[low:high] / phi["sigma"] ** 2 + phi["mu"] / phi["tau"] ** 2
        close(adapted.covariance[j], np.linalg.inv(precision), rtol=1e-8, atol=1e-12)
        close(adapted.mean[j], np.linalg.solve(precision, pulled), rtol=1e-8, atol=1e-10)
    fit = hb.Fit(Derived("by hand"), model, model.tasks(tasks), phi, hb.adaptation.Conjugate())
    new = hb.Tasks.from_arrays([(np.array([[0.3], [-1.2]]), np.zeros(2))], names=[1])
    h = features_by_hand(model, phi, new.predictors)
    seen = fit.predict(new)
    close(seen.mean, h @ adapted.mean[1], rtol=1e-8)
    spread = np.einsum("ij,jk,ik->i", h, adapted.covariance[1], h) + phi["sigma"] ** 2
    close(seen.sd, np.sqrt(spread), rtol=1e-8)
    population = fit.predict(new, target="new")
    close(population.mean, h @ phi["mu"], rtol=1e-8)
    close(population.sd, np.sqrt(h**2 @ phi["tau"] ** 2 + phi["sigma"] ** 2), rtol=1e-8)


@pytest.mark.slow
def test_large_d_posteriors_need_no_threads_of_lapack():
    """41 features, 200 tasks: this hung on two cores while a matrix was solved for by LAPACK."""
    model = model_of(sizes=(1, 40))
    tasks = ragged(sizes=(10,) * 200)
    phi = some_phi(model, 41)
    adapted = hb.adaptation.Conjugate()(model, model.tasks(tasks), phi)
    h = features_by_hand(model, phi, tasks.predictors[:10])
    precision = h.T @ h / phi["sigma"] ** 2 + np.diag(phi["tau"] ** -2.0)
    close(adapted.covariance[0], np.linalg.inv(precision), rtol=1e-6, atol=1e-10)


@pytest.fixture(scope="module")
def learned():
    model = model_of(sizes=(1, 16, 16), dtype="float32")
    episodes = hb.datasets.sinusoids(8, noise=0.1)
    fit = hb.empirical_bayes(model, episodes, num_meta_steps=400, evaluate_every=400, seed=3)
    return fit, episodes


@pytest.mark.slow
def test_learning_the_features_raises_the_evidence_of_held_out_tasks(learned):
    fit, _ = learned
    history = fit.info["history"]["held_out"]
    assert history[-1] > history[0] + 0.5
    assert sorted(fit.phi) == ["features", "mu", "sigma", "tau"]
    assert fit.tasks.coef[:2] == ("Intercept", "h0")


@pytest.mark.slow
def test_intervals_cover_and_adapting_beats_what_is_known_of_new_tasks(learned):
    """95 % intervals over 200 tasks; the se of the coverage, tasks as units, is about 0.01."""
    fit, episodes = learned
    support, query = episodes.with_rows(8, 20).draw(200, seed=11)
    seen = fit.adapt(support).predict(query)
    inside = np.abs(seen.pit() - 0.5) < 0.475
    assert 0.88 < inside.mean() <= 1.0
    unseen = fit.predict(query, target="new")
    gain = (seen.log_density() - unseen.log_density()).reshape(200, 20).mean(1)
    assert gain.mean() > 4 * gain.std() / np.sqrt(200)


@pytest.mark.slow
def test_the_fit_goes_to_a_file_and_comes_back(learned, tmp_path):
    fit, episodes = learned
    fit.save(tmp_path / "fit.nc")
    again = hb.load(tmp_path / "fit.nc", model=fit.model)
    support, query = episodes.draw(3, seed=2)
    close(again.adapt(support).predict(query).mean, fit.adapt(support).predict(query).mean, rtol=0)
    with pytest.raises(hb.InputError, match="holds functions"):
        hb.load(tmp_path / "fit.nc")


def test_what_the_last_layer_cannot_do_is_refused_in_words():
    episodes = hb.datasets.sinusoids(5)
    likelihood = hb.likelihoods.LastLayer.mlp([1, 4])
    correlated = hb.HierarchicalModel(likelihood, hb.priors.Gaussian())
    with pytest.raises(hb.InputError, match=r"correlated=False.*Nothing is lost"):
        hb.empirical_bayes(correlated, episodes)
    plain = hb.HierarchicalModel(likelihood, PRIOR)
    with pytest.raises(hb.InputError, match='criterion must be "ml"'):
        hb.empirical_bayes(plain, episodes, criterion="reml")
    with pytest.raises(hb.InputError, match="Reptile moves"):
        hb.reptile(plain, episodes)
    network = hb.HierarchicalModel(hb.likelihoods.Network.mlp([1, 4, 1]), PRIOR)
    with pytest.raises(hb.InputError, match="LastLayer"):
        hb.empirical_bayes(network, episodes)
    flat = hb.likelihoods.LastLayer(lambda p, x: x[:, 0], {"w": jnp.ones(1)})
    with pytest.raises(hb.InputError, match=r"features need \(2, d\)"):
        hb.empirical_bayes(hb.HierarchicalModel(flat, PRIOR), episodes)
    with pytest.raises(hb.InputError, match="unused_name"):
        hb.empirical_bayes(plain, episodes, unused_name=3)
