"""Networks as likelihoods: any pytree of weights, any family of outcomes, images, new tasks."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import close, refuses
from scipy import special, stats

import hierbayes as hb
from hierbayes.adaptation import GradientSteps
from hierbayes.fit import Fit
from hierbayes.fit.method import Derived
from hierbayes.likelihoods.neural import Weights

Network = hb.likelihoods.Network
PHI = {"sigma": np.asarray(0.7), "sigma_query": np.asarray(0.9)}
OUTCOMES = {
    "gaussian": hb.likelihoods.Gaussian(),
    "bernoulli": hb.likelihoods.Bernoulli(),
    "categorical": hb.likelihoods.Categorical(3),
}


def outputs(name):
    return 3 if name == "categorical" else 1


@functools.cache
def perceptron(name="gaussian", dtype="float64"):
    return Network.mlp([2, 3, outputs(name)], OUTCOMES[name], jnp.tanh, dtype)


def some_tasks(name="gaussian", sizes=(4, 1, 3, 4), shape=(2,), seed=0):
    """Ragged tasks in two blocks, for each of which everything is compiled."""
    rng = np.random.default_rng(seed)
    draw = {
        "gaussian": lambda n: rng.normal(size=n),
        "bernoulli": lambda n: rng.integers(0, 2, n),
        "categorical": lambda n: rng.integers(0, 3, n),
    }[name]
    arrays = [(rng.normal(size=(n, *shape)), draw(n)) for n in sizes]
    return hb.Tasks.from_arrays(arrays, names=list("dcbaefgh")[: len(sizes)])


def fit_at(likelihood, tasks, num_steps=3, step_size=0.1):
    """A fit whose φ is drawn and not learned: what adapting and predicting make of it."""
    model = hb.HierarchicalModel(likelihood, hb.priors.Gaussian())
    mu = 0.5 * np.random.default_rng(1).normal(size=likelihood.weights.size)
    noise = PHI if likelihood.parameters() else {}
    steps = GradientSteps(num_steps, step_size, "mean")
    return Fit(Derived("steps"), model, model.tasks(tasks), {"mu": mu, **noise}, steps)


# -------------------------------------------------------------------------- weights


def flax_network():
    """A Flax module; its weights lie in nested dicts."""
    from flax import linen

    class Small(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1)(jnp.tanh(linen.Dense(3)(x)))

    module = Small()
    return Network(module.apply, lambda key: module.init(key, jnp.ones((1, 2))))


def equinox_network():
    """An Equinox module, partitioned; its weights are a module whose other leaves are None."""
    import equinox

    def make(key):
        return equinox.nn.MLP(2, "scalar", 3, 1, jnp.tanh, key=key)

    _, static = equinox.partition(make(jax.random.key(0)), equinox.is_inexact_array)

    def apply(params, x):
        return jax.vmap(equinox.combine(params, static))(x)

    return Network(apply, lambda key: equinox.partition(make(key), equinox.is_inexact_array)[0])


def plain(tree, apply):
    return lambda: Network(apply, lambda key: jax.tree.map(jnp.asarray, tree))


KINDS = {
    "dict": plain({"b": 0.5, "a": np.ones(2)}, lambda p, x: x @ p["a"] + p["b"]),
    "list": plain([np.ones((2, 1)), np.zeros(1)], lambda p, x: x @ p[0] + p[1]),
    "nested tuples": plain(((np.ones(2), (0.1,)), 2.0), lambda p, x: (x @ p[0][0]) * p[1]),
    "a vector": plain(np.ones(2), lambda p, x: x @ p),
    "a matrix": plain(np.ones((2, 1)), lambda p, x: x @ p),
    "a number": plain(2.0, lambda p, x: x[:, 0] * p),
    "flax": flax_network,
    "equinox": equinox_network,
}


MODULES = ("flax", "equinox")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k in MODULES else k for k in KINDS]
)
def test_any_pytree_of_weights_goes_to_a_vector_and_back(kind):
    net = KINDS[kind]()
    tree = net.initial(jax.random.key(3))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(tree))
    vector = net.vector(tree)
    assert vector.shape == (net.weights.size,)
    again = net.tree(vector)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True):
        assert one.shape == other.shape
        assert np.array_equal(one, other)
    numbered = np.arange(net.weights.size, dtype=np.float32)
    assert np.array_equal(net.vector(net.tree(numbered)), numbered), "no weight is lost or moved"
    assert len(set(net.weights.names)) == len(net.weights.names) == net.weights.size


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nested tuples", "a number", "flax", "equinox"])
def test_any_pytree_of_weights_adapts_and_predicts(kind):
    """f is what ``apply`` says at tree(θ); float32 rounds to 1e-7 a product."""
    net, tasks = KINDS[kind](), some_tasks()
    fit = fit_at(net, tasks)
    found = fit.predict(tasks)
    rows = jnp.asarray(tasks.predictors, jnp.float32)
    apply = jax.jit(lambda theta: net.apply(net.tree(theta), rows).reshape(-1))
    for j, theta in enumerate(fit.theta.values.astype(np.float32)):
        at = slice(tasks.starts[j], tasks.starts[j + 1])
        close(found.mean[at], np.asarray(apply(theta))[at], rtol=1e-5, atol=1e-5)
    close(found.sd, np.full(tasks.num_rows, 0.9))


def test_weights_are_named_by_their_place():
    tree = {"layer": [{"w": np.ones((2, 2)), "b": np.ones(1)}], "scale": np.ones(())}
    names = Weights.like(tree, "float32").names
    assert names == (
        "layer/0/b[0]", "layer/0/w[0, 0]", "layer/0/w[0, 1]", "layer/0/w[1, 0]",
        "layer/0/w[1, 1]", "scale",
    )  # fmt: skip
    fit = fit_at(perceptron(), some_tasks())
    assert fit.theta.coords["coef"].values[0] == "0/b[0]"
    many = Weights.like(np.zeros((400, 300)), "float32")
    assert many.names[:2] == ("0", "1"), "a hundred thousand names are numbers"


def test_weights_given_as_they_are_are_where_training_starts():
    net = Network(lambda p, x: x @ p["w"], {"w": np.array([3.0, 4.0])})
    assert np.array_equal(net.initial(jax.random.key(0))["w"], [3.0, 4.0])


# ------------------------------------------------------------------------- families


def scores(name, f, y):
    """Log densities of outcomes by SciPy, σ = 0.7."""
    if name == "gaussian":
        return stats.norm.logpdf(y, f[:, 0], 0.7)
    if name == "bernoulli":
        return stats.bernoulli.logpmf(y.astype(int), special.expit(f[:, 0]))
    return special.log_softmax(f, axis=1)[np.arange(len(y)), y.astype(int)]


@pytest.mark.parametrize("name", OUTCOMES)
def test_the_log_likelihood_is_scipys(name):
    """Rows that fill up a block count zero."""
    net, tasks = perceptron(name), some_tasks(name)
    thetas = np.random.default_rng(2).normal(size=(4, net.weights.size))
    rows, task_of_row = net.arrange(tasks)
    assert task_of_row is None
    with jax.enable_x64(True):
        score = jax.jit(lambda thetas: net.log_likelihood_of_rows(thetas, PHI, rows, None))
        found = np.asarray(score(thetas))
        apply = jax.jit(lambda theta: net.apply(net.tree(theta), tasks.predictors))
        f = [np.asarray(apply(theta)) for theta in thetas]
    for j, (_, task) in enumerate(tasks):
        n, at = task.num_rows, slice(tasks.starts[j], tasks.starts[j + 1])
        close(found[j, :n], scores(name, f[j][at], task.outcome), rtol=1e-10)
        assert (found[j, n:] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gaussian", "categorical"])
def test_ragged_tasks_adapt_as_each_does_alone(name):
    tasks = some_tasks(name, sizes=(4, 1, 3, 0, 4))
    fit = fit_at(perceptron(name), tasks)
    together = fit.theta.values
    assert together.dtype == np.float64
    for j, task in enumerate(tasks.names):
        alone = fit.adapt(tasks[[task]]).theta
        assert alone.coords["task"].values.tolist() == [task]
        close(together[[j]], alone.values, rtol=1e-10, atol=1e-12)
    close(together[3], fit.phi["mu"], rtol=1e-12)


@pytest.mark.slow
def test_columns_of_shape_n_and_n_by_1_are_the_same_outputs():
    wide = Network(lambda p, x: x @ p, np.ones((2, 1)))
    flat = Network(lambda p, x: (x @ p)[:, 0], np.ones((2, 1)))
    fits = [fit_at(net, some_tasks(sizes=(4, 3))) for net in (wide, flat)]
    close(fits[0].theta.values, fits[1].theta.values, rtol=1e-12)
    close(fits[0].predict().mean, fits[1].predict().mean, rtol=1e-12)


@pytest.mark.slow
def test_images_pass_a_convolution():
    """One 3 × 3 kernel, averaged: outcomes of every family, on images in tasks of any size."""

    def apply(params, x):
        out = jax.lax.conv_general_dilated(
            x[..., None], params["kernel"], (1, 1), "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return jnp.tanh(out).mean((1, 2))

    for name, family in OUTCOMES.items():
        kernel = np.random.default_rng(4).normal(size=(3, 3, 1, outputs(name)))
        net = Network(apply, {"kernel": kernel}, family, "float64")
        tasks = some_tasks(name, sizes=(4, 1), shape=(5, 5))
        fit = fit_at(net, tasks)
        first = tasks.take([0])
        with jax.enable_x64(True):
            f = np.asarray(jax.jit(lambda t, n=net, x=first.predictors: n.apply(n.tree(t), x))(
                fit.theta.values[0]
            ))  # fmt: skip
        density = fit.predict(first).log_density()
        noise = 0.7 / 0.9 if name == "gaussian" else 1.0  # scored with sigma_query
        close(density, scores(name, f * noise, first.outcome * noise) + np.log(noise), rtol=1e-8)


# ----------------------------------------------------------------------- predictions


def test_predictions_of_classes_have_probabilities_in_the_place_of_moments():
    tasks = some_tasks("categorical")
    fit = fit_at(perceptron("categorical"), tasks)
    found = fit.predict(tasks)
    assert found.discrete
    assert found.probabilities.shape == (tasks.num_rows, 3)
    close(found.probabilities.sum(1), np.ones(tasks.num_rows), rtol=1e-12)
    with jax.enable_x64(True):
        net = perceptron("categorical")
        apply = jax.jit(lambda theta: net.apply(net.tree(theta), tasks.take([0]).predictors))
        f = np.asarray(apply(fit.theta.values[0]))
    close(found.probabilities[:4], special.softmax(f, axis=1), rtol=1e-10)
    observed = found.probabilities[np.arange(tasks.num_rows), tasks.outcome.astype(int)]
    close(found.log_density(), np.log(observed), rtol=1e-12)
    other = (tasks.outcome + 1) % 3
    assert (found.log_density(other) != found.log_density()).all()
    for ask, what in [
        (lambda: found.mean, "no mean"), (lambda: found.sd, "no standard deviation"),
        (lambda: found.quantile(0.5), "no quantiles"), (lambda: found.interval(), "no quantiles"),
        (lambda: found.pit(), "no order"),
    ]:  # fmt: skip
        with refuses("classes have", what, "probabilities"):
            ask()


def test_probabilities_average_over_what_is_mixed():
    """As a full posterior would: the mean of the probabilities, not of the logits."""
    from hierbayes.fit import Prediction
    from hierbayes.likelihoods.categorical import ClassProbabilities

    tasks = some_tasks("categorical", sizes=(2,))
    parts = np.array([[[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]], [[0.4, 0.5, 0.1], [0.6, 0.3, 0.1]]])
    found = Prediction("known task", tasks, ClassProbabilities(parts), np.array([False, True]))
    close(found.probabilities[0], [0.3, 0.4, 0.3])
    assert np.isnan(found.probabilities[1]).all(), "not identified"
    close(found.log_density(np.array([1, 1]))[0], np.log(0.4))


def test_draws_of_classes_come_as_often_as_they_are_likely():
    """Shares of 20,000 draws within five standard errors, of 0.0035 at most."""
    tasks = some_tasks("categorical")
    found = fit_at(perceptron("categorical"), tasks).predict(tasks)
    drawn = found.draws(20_000, seed=3)
    assert drawn.shape == (20_000, tasks.num_rows)
    shares = np.stack([(drawn == c).mean(0) for c in range(3)], axis=1)
    close(shares, found.probabilities, rtol=0, atol=5 * 0.0035)


def test_a_table_of_predicted_classes_has_a_column_for_each():
    tasks = some_tasks("categorical")
    found = fit_at(perceptron("categorical"), tasks).predict(tasks)
    table = found.to_dataframe()
    assert table.columns.tolist() == ["task", "class_0", "class_1", "class_2"]
    close(table[["class_0", "class_1", "class_2"]].to_numpy(), found.probabilities)
    assert table["task"].tolist() == tasks.names[tasks.task_of_row].tolist()


@pytest.mark.slow
def test_probabilities_of_numbers_are_refused():
    with refuses("probabilities are those of classes", "the mean is the probability"):
        _ = fit_at(perceptron("bernoulli"), some_tasks("bernoulli")).predict().probabilities


def test_new_tasks_adapt_and_unknown_ones_are_refused():
    fit = fit_at(perceptron(), some_tasks())
    new = hb.Tasks.from_arrays(
        [(np.ones((3, 2)), np.ones(3)), (np.zeros((4, 2)), np.ones(4))], names=["new", "newer"]
    )
    adapted = fit.adapt(new)
    assert adapted.theta.dims == ("task", "coef")
    assert adapted.covariance is None
    assert np.isnan(adapted.sd).all()
    assert adapted.predict(new[["newer"]]).mean.shape == (4,)
    with refuses("'new', 'newer'", "fit.adapt"):
        fit.predict(new)
    with refuses("'d'", "fit.adapt"):
        adapted.predict(some_tasks())


def test_rows_of_no_task_the_fit_knows_are_predicted_at_the_prior():
    fit = fit_at(perceptron(), some_tasks())
    new = hb.Tasks.from_arrays([(np.ones((3, 2)), np.ones(3))], names=["new"])
    net = perceptron()
    with jax.enable_x64(True):
        apply = jax.jit(lambda theta: net.apply(net.tree(theta), np.ones((3, 2))))
        f = np.asarray(apply(fit.phi["mu"]))[:, 0]
    close(fit.predict(new, target="population").mean, f, rtol=1e-10)


@pytest.mark.slow
def test_tasks_without_rows_are_predicted_by_no_numbers():
    for name in OUTCOMES:
        fit = fit_at(perceptron(name), some_tasks(name))
        nothing = some_tasks(name).take([0]).keep_rows(np.zeros(4, bool))
        assert fit.predict(nothing).log_density().shape == (0,)


# ------------------------------------------------------------------------- precision


@pytest.mark.slow
def test_float32_is_computed_in_and_float64_leaves():
    seen = set()

    def apply(params, x):
        seen.add((params["w"].dtype.name, x.dtype.name))
        return x @ params["w"]

    for flag in (False, True):
        with jax.enable_x64(flag):
            seen.clear()
            fit = fit_at(Network(apply, {"w": np.ones(2)}), some_tasks(sizes=(4, 3)))
            assert fit.theta.values.dtype == fit.predict().mean.dtype == np.float64
            assert seen == {("float32", "float32")}
            assert jax.config.jax_enable_x64 is flag


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "flag"), [("float32", True), ("float64", False)])
def test_training_computes_in_what_was_asked_for_whatever_the_flag(dtype, flag):
    seen = set()

    def apply(params, x):
        seen.add((params["w"].dtype.name, x.dtype.name))
        return jnp.tanh(x @ params["w"])

    net = Network(apply, lambda key: {"w": jax.random.normal(key, (1,))}, dtype=dtype)
    model = hb.HierarchicalModel(net, hb.priors.Gaussian())
    with jax.enable_x64(flag):
        fit = hb.maml(
            model, hb.datasets.sinusoids(3), 1, num_meta_steps=5, batch_size=2, held_out=3,
            progress=False,
        )  # fmt: skip
        assert jax.config.jax_enable_x64 is flag
    assert fit.phi["mu"].dtype == np.float64
    rounded = fit.phi["mu"] == fit.phi["mu"].astype(np.float32)
    assert rounded.all() if dtype == "float32" else not rounded.any()
    assert seen == {(dtype, dtype)}


@pytest.mark.slow
def test_networks_work_where_float64_is_the_default():
    code = (
        "import jax, numpy as np, hierbayes as hb\n"
        "net = hb.likelihoods.Network.mlp([1, 4, 1])\n"
        "model = hb.HierarchicalModel(net, hb.priors.Gaussian())\n"
        "fit = hb.maml(model, hb.datasets.sinusoids(3), 1, num_meta_steps=3, batch_size=2,\n"
        "              held_out=3, progress=False)\n"
        "assert jax.config.jax_enable_x64\n"
        "mu = fit.phi['mu']\n"
        "assert mu.dtype == np.float64 and (mu == mu.astype(np.float32)).all()\n"
        "print(fit.predict().mean.shape)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "JAX_ENABLE_X64": "1"},
    )  # fmt: skip
    assert run.stdout.split() == ["(9,)"], run.stderr


# --------------------------------------------------------------------------- refused


def of(apply=lambda p, x: x @ p, init=None, **named):
    """Refused when the tasks are checked, before any work."""
    net = Network(apply, np.ones(2) if init is None else init, **named)
    net.check(some_tasks())


def test_a_network_that_fits_is_not_refused():
    """The control."""
    of()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: of(init=np.ones(3)), ("apply does not take", "x of shape (2, 2)", "TypeError")),
        (lambda: of(lambda p, x: x * p), ("array of shape (2, 2)", "(2,) or (2, 1)")),
        (lambda: of(lambda p, x: x.sum()), ("array of shape ()", "(2,) or (2, 1)")),
        (lambda: of(lambda p, x: (x @ p, x)), ("must return one array", "tuple")),
        (lambda: of(init=np.arange(2)), ("arrays of floats", "int64 (2,)", "eqx.partition")),
        (lambda: of(init={"w": np.ones(2), "n": 3}), ("'n'", "int")),
        (lambda: of(init={}), ("no weights", "empty")),
        (lambda: of(init=lambda key: {}), ("no weights", "empty")),
        (lambda: of(init=lambda key: {"w": jnp.ones(2), "act": jnp.tanh}),
         ("init(key) must be a JAX function", "float arrays")),
        (lambda: of(init=lambda key: 1 / 0), ("init(key)", "ZeroDivisionError")),
        (lambda: of(init=lambda: np.ones(2)), ("init(key)", "TypeError")),
        (lambda: of(apply=3), ("apply must be a function of (params, x)", "3")),
        (lambda: of(dtype="float16"), ("dtype", '"float32" or "float64"', "'float16'")),
        (lambda: of(outcome="gaussian"), ("takes the family of the outcomes", "'gaussian'")),
        (lambda: of(outcome=perceptron()), ("takes the family of the outcomes", "Network")),
        (lambda: of(outcome=hb.likelihoods.Categorical(3)), ("Categorical(3)",)),
        (lambda: Network.mlp([3]), ("sizes", "two or more", "[3]")),
        (lambda: Network.mlp([3, 0]), ("sizes", "positive", "[3, 0]")),
    ],
    ids=["width", "wide", "scalar", "two outputs", "integers", "an integer", "empty",
         "draws nothing", "a function", "raises", "no key", "apply", "dtype", "outcome", "nested",
         "classes", "one size", "size 0"],
)  # fmt: skip
def test_what_is_no_network_for_these_tasks_is_refused(make, words):
    with refuses(*words):
        make()


def test_outputs_that_are_not_as_many_as_classes_are_refused():
    tasks = some_tasks("categorical")
    with refuses("shape (2, 1)", "Categorical(3) needs (2, 3)"):
        Network(lambda p, x: x @ p, np.ones((2, 1)), OUTCOMES["categorical"]).check(tasks)


def test_outcomes_that_are_no_class_are_refused():
    with refuses("Categorical(3) takes outcomes 0 to 2", "in task 'd'"):
        perceptron("categorical").check(some_tasks())
    with refuses("Bernoulli likelihood takes outcomes of 0 and 1"):
        perceptron("bernoulli").check(some_tasks())
    with refuses("num_classes must be 2 or more", "1"):
        hb.likelihoods.Categorical(1)


def test_columns_that_a_network_would_ignore_are_refused():
    arrays = [(np.ones((4, 2)), np.arange(4.0))] * 3
    for extra, name in [
        (dict(shared=[np.ones((4, 1))] * 3), "'z0'"),
        (dict(task_predictors=np.ones((3, 1))), "'w0'"),
        (dict(known_se=[np.ones(4)] * 3), "'known_se'"),
    ]:
        with refuses("Network takes x and y alone", name):
            perceptron().check(hb.Tasks.from_arrays(arrays, **extra))


def test_steps_that_diverge_name_the_tasks():
    tasks = some_tasks(sizes=(4, 3))
    fit = fit_at(Network(lambda p, x: x @ p, np.ones(2)), tasks, 200, 50.0)
    with pytest.warns(hb.FitWarning, match="diverged in .* tasks .*take shorter steps"):
        fit.adapt(tasks)
