"""Networks in which a row's f depends on the task's other rows: batch norm, attention over a set.

The right numbers are those of ``apply`` on a task's own rows, step by step with ``jax.grad``, in
float64; 1e-9 is what rounding leaves of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from assertions import close, refuses

import hierbayes as hb
from hierbayes.adaptation import GradientSteps
from hierbayes.fit import Fit
from hierbayes.fit.method import Derived

GAUSSIAN = hb.priors.Gaussian(correlated=False)


def normed(h):
    """Batch norm with the statistics of the rows at hand."""
    return (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)


def init(key):
    a, b = jax.random.split(key)
    return {"w": jax.random.normal(a, (1, 4)), "b": jnp.zeros(4), "v": jax.random.normal(b, (4,))}


def batch_norm(p, x):
    return jnp.tanh(normed(x @ p["w"] + p["b"])) @ p["v"]


def attention(p, x):
    h = x @ p["w"] + p["b"]
    return jax.nn.softmax(h @ h.T) @ h @ p["v"]


def gated(p, x):
    """Its gate is shut at the initial weights: there rows do not depend on one another."""
    return jnp.tanh(x @ p["w"]) @ p["v"] + (p["b"] * x.mean(0)).sum()


MIXING = {"batch norm": batch_norm, "attention": attention, "a shut gate": gated}


def model_of(apply, outcome=None):
    net = hb.likelihoods.Network(apply, init, outcome or hb.likelihoods.Gaussian(), "float64")
    return hb.HierarchicalModel(net, GAUSSIAN)


def some_tasks(sizes, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [(rng.normal(size=(n, 1)) + 1, rng.normal(size=n)) for n in sizes]
    return hb.Tasks.from_arrays(arrays)


def sampler(shots=5, queries=3):
    def sample(key, num_rows):
        a, b, c = jax.random.split(key, 3)
        x = jax.random.normal(a, (num_rows, 1)) + 1
        return x, jnp.sin(x[:, 0] * jax.random.uniform(b)) + jax.random.normal(c)

    return hb.Episodes.from_sampler(sample, shots, queries)


def by_task(tasks):
    return [(t.predictors, t.outcome) for _, t in tasks]


def written_out(apply, weights, mu, support, asked, num_steps, eta):
    """f of the asked rows after gradient steps on the mean squared error, task by task."""

    @jax.jit
    def of_one(x, y, xq):
        p = weights.tree(jnp.asarray(mu))
        for _ in range(num_steps):
            slope = jax.grad(lambda p: ((apply(p, x) - y) ** 2).mean())(p)
            p = jax.tree.map(lambda a, b: a - eta * b, p, slope)
        return apply(p, xq)

    with jax.enable_x64(True):
        parts = zip(by_task(support), by_task(asked), strict=True)
        return np.concatenate([of_one(*given, xq) for given, (xq, _) in parts])


def fit_at(apply, tasks, optimiser=None):
    """A fit whose φ is drawn and not learned; σ = √½, so that steps are on the squared error."""
    model = model_of(apply)
    mu = 0.5 * np.random.default_rng(1).normal(size=model.likelihood.weights.size)
    phi = {"mu": mu, "sigma": np.asarray(0.5**0.5), "sigma_query": np.asarray(1.0)}
    steps = GradientSteps(3, None if optimiser else 0.05, "mean", optimiser)
    return Fit(Derived("steps"), model, model.tasks(tasks), phi, steps)


# --------------------------------------------------------------- what adapts and predicts


@pytest.mark.parametrize(
    ("name", "sizes", "optimiser"),
    [
        ("batch norm", (5, 2, 5), None),
        pytest.param("batch norm", (5, 2, 5), optax.sgd(0.05), marks=pytest.mark.slow),
        pytest.param("batch norm", (5, 5, 5), None, marks=pytest.mark.slow),
        pytest.param("attention", (5, 2, 7), None, marks=pytest.mark.slow),
        pytest.param("a shut gate", (5, 2, 5), None, marks=pytest.mark.slow),
    ],
)
def test_adapting_and_predicting_see_a_tasks_own_rows(name, sizes, optimiser):
    support, asked = some_tasks(sizes), some_tasks((3, 3, 3), seed=1)
    fit = fit_at(MIXING[name], support, optimiser)
    weights = fit.model.likelihood.weights
    wanted = written_out(MIXING[name], weights, fit.phi["mu"], support, asked, 3, 0.05)
    close(fit.adapt(support).predict(asked).mean, wanted, rtol=1e-9, atol=1e-11)


def test_the_control_rows_that_fill_up_would_be_seen():
    """As it was: a task of five rows, filled up to eight with zeros, has other numbers."""
    support = some_tasks((5,))
    with jax.enable_x64(True):
        p, x = init(jax.random.key(0)), support.predictors
        filled = jax.jit(batch_norm)(p, np.concatenate([x, np.zeros((3, 1))]))[:5]
        assert np.abs(np.asarray(filled) - np.asarray(jax.jit(batch_norm)(p, x))).max() > 0.1


def test_a_row_is_scored_at_the_prior_among_its_own_task():
    tasks = some_tasks((5, 3))
    fit = fit_at(batch_norm, tasks)
    found = fit.predict(tasks, target="population").mean
    weights = fit.model.likelihood.weights
    wanted = written_out(batch_norm, weights, fit.phi["mu"], tasks, tasks, 0, 0.0)
    close(found, wanted, rtol=1e-9, atol=1e-11)


def test_what_stands_tasks_of_several_sizes_side_by_side_refuses_them():
    tasks = some_tasks((5, 3, 8))
    fit = fit_at(batch_norm, tasks)
    words = ("apply", "3, 5, 8", "tasks of one size")
    with refuses(*words):
        hb.equivalent_prior(fit.model, tasks, fit.phi["mu"], 3, 0.01, sigma=0.7)
    with refuses(*words):
        hb.meta.nuts(fit, tasks, tau=0.3, sigma=0.5, progress=False)


@pytest.mark.slow
def test_the_equivalent_prior_of_tasks_of_one_size_is_that_of_their_own_rows():
    """Its posterior mean is θ_K, which the steps written out give."""
    tasks = some_tasks((5, 5))
    fit = fit_at(batch_norm, tasks)
    found = hb.equivalent_prior(
        fit.model, tasks, fit.phi["mu"], 3, 0.05, loss="mean", sigma=0.5**0.5, rank=5
    )
    close(found.posterior_mean, fit.adapt(tasks).theta.values, rtol=1e-9, atol=1e-11)


# -------------------------------------------------------------------------- what learns


METHODS = {
    "maml": lambda m, e, **k: hb.maml(m, e, 2, 0.05, **k),
    "first-order": lambda m, e, **k: hb.maml(m, e, 2, 0.05, derivative="first-order", **k),
    "maml, adam": lambda m, e, **k: hb.maml(
        m, e, 2, inner_optimiser=optax.adam(0.05, eps_root=1e-8), **k
    ),
    "imaml": lambda m, e, **k: hb.imaml(m, e, prior_precision=5.0, num_steps=2, **k),
    "reptile": lambda m, e, **k: hb.reptile(m, e, 2, 0.05, **k),
    "llama": lambda m, e, **k: hb.meta.llama(m, e, 2, 0.05, **k),
    "abml": lambda m, e, **k: hb.meta.abml(m, e, 2, 0.05, num_samples=2, **k),
}
SHORT = dict(num_meta_steps=2, batch_size=3, held_out=4, evaluate_every=2, progress=False)


OFTEN = ("maml", "imaml", "reptile")


@pytest.mark.parametrize(
    ("method", "from_tasks"),
    [("reptile", True), ("maml", True)]
    + [pytest.param(m, False, marks=() if m in OFTEN else pytest.mark.slow) for m in METHODS],
)
def test_apply_never_sees_a_row_that_is_not_the_tasks(method, from_tasks):
    """Episodes of 5 and 3 rows; a fixed set of tasks of 6, split 3 and 3; adapted and predicted."""
    seen = set()

    def apply(p, x):
        seen.add(x.shape[0])
        return batch_norm(p, x)

    def learned(tasks):
        seen.clear()
        fit = METHODS[method](model_of(apply), tasks, **SHORT)
        assert np.isfinite(fit.phi["mu"]).all()
        return fit

    if from_tasks:
        fit = learned(some_tasks((6, 6, 6, 6)))
        fit.theta, fit.predict().log_density()
        assert seen <= {2, 3, 6}
        return
    support, asked = some_tasks((5, 5)), some_tasks((3, 3), seed=1)
    fit = learned(sampler())
    fit.adapt(support).predict(asked).log_density()
    assert seen <= {2, 5, 3, 8}, "2 tell the shape; support, query and both together"


@pytest.mark.parametrize(
    "method",
    [m if m == "maml" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
)
def test_tasks_of_several_sizes_are_refused_where_they_would_be_filled_up(method):
    tasks = some_tasks((6, 4, 6))
    for given in (tasks, hb.Episodes.from_tasks(tasks)):
        with refuses("apply", "4, 6", "tasks of one size", "shots"):
            METHODS[method](model_of(batch_norm), given, **SHORT)


@pytest.mark.slow
def test_tasks_of_several_sizes_are_drawn_with_as_many_rows_of_each():
    drawn = hb.Episodes.from_tasks(some_tasks((6, 4, 6)), shots=2, queries=2)
    fit = hb.maml(model_of(batch_norm), drawn, 1, **SHORT)
    assert np.isfinite(fit.info["history"]["held_out"]).all()


@pytest.mark.slow
def test_the_score_of_a_fixed_set_of_tasks_is_that_of_the_parts_alone():
    """Tasks whose rows are all alike: every split is the same. f = (w + v) x for rows (x, y).

    σ = √½, and the step of 0.1 is on the mean squared error, in w + v twice as long.
    """
    x, y = 1.5, 2.0
    arrays = [(np.full((5, 1), s * x), np.full(5, s * y)) for s in (1.0, -1.0)]

    def apply(p, rows):
        return rows[:, 0] * p["w"] + rows[:, 0].mean() * p["v"]

    net = hb.likelihoods.Network(apply, {"w": np.array(0.3), "v": np.array(0.2)}, dtype="float64")
    model = hb.HierarchicalModel(net, GAUSSIAN)
    fit = hb.maml(
        model, hb.Tasks.from_arrays(arrays), 1, 0.1, num_meta_steps=1, held_out=6, progress=False
    )
    slope = 0.5 + 2 * 0.1 * 2 * (y - 0.5 * x) * x
    wanted = -((y - slope * x) ** 2) - 0.5 * np.log(np.pi)
    close(fit.info["history"]["held_out"][0], wanted, rtol=1e-12)


# ---------------------------------------------------------------------------- last layers


def features(p, x):
    return jnp.tanh(normed(x @ p["w"] + p["b"]))


def head(tasks=None, apply=features):
    likelihood = hb.likelihoods.LastLayer(apply, init, dtype="float64")
    return hb.HierarchicalModel(likelihood, GAUSSIAN)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((5, 5, 5), id="one size", marks=pytest.mark.slow),
        pytest.param((5, 0, 2, 5), id="several"),
    ],
)
def test_features_are_those_of_one_task_at_a_time(sizes):
    """Of a task without rows there are none; the posterior is then that of dense algebra."""
    model, tasks = head(), some_tasks(sizes)
    rng = np.random.default_rng(0)
    phi = {"mu": rng.normal(size=5), "tau": rng.uniform(0.5, 1, 5), "sigma": np.asarray(0.7)}
    with jax.enable_x64(True):
        weights = model.likelihood.initial(jax.random.key(3))
        phi["features"] = np.asarray(model.likelihood.weights.vector(weights), np.float64)
        params = model.likelihood.weights.tree(jnp.asarray(phi["features"]))
        h = [np.asarray(features(params, x)) for x, _ in by_task(tasks)]
    h = [np.column_stack([np.ones(len(one)), one]) for one in h]
    close(model.likelihood.design(tasks, phi).predictors, np.concatenate(h), rtol=1e-12, atol=1e-14)
    fit = Fit(Derived("at a point"), model, model.tasks(tasks), phi, hb.adaptation.Conjugate())
    for j, ((_, y), one) in enumerate(zip(by_task(tasks), h, strict=True)):
        bend = one.T @ one / 0.49 + np.diag(phi["tau"] ** -2)
        wanted = np.linalg.solve(bend, one.T @ y / 0.49 + phi["mu"] / phi["tau"] ** 2)
        close(fit.theta.values[j], wanted, rtol=1e-9, atol=1e-12)
    close(
        fit.predict(tasks).mean,
        np.concatenate([one @ t for one, t in zip(h, fit.theta.values, strict=True)]),
        rtol=1e-9, atol=1e-12,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["anil", "empirical Bayes"])
def test_a_last_layer_never_sees_rows_of_two_tasks_together(method):
    seen = set()

    def apply(p, x):
        seen.add(x.shape[0])
        return features(p, x)

    model = head(apply=apply)
    learn = {
        "anil": lambda *a, **k: hb.maml(*a, 2, 0.05, **k),
        "empirical Bayes": hb.empirical_bayes,
    }
    fit = learn[method](model, sampler(), **SHORT)
    fit.adapt(some_tasks((5, 5))).predict(some_tasks((3, 3), seed=1)).log_density()
    assert seen <= {2, 5, 3, 8}
    with refuses("apply", "4, 6", "tasks of one size"):
        learn[method](model, some_tasks((6, 4, 6)), **SHORT)


# ------------------------------------------------------------------------------- the probe


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_rows_is_found_out_once(name):
    calls = []

    def apply(p, x):
        calls.append(x.shape)
        return MIXING[name](p, x)

    net = hb.likelihoods.Network(apply, init)
    x = some_tasks((5, 3)).predictors
    assert net.mixes_rows(x)
    tried = len(calls)
    assert net.mixes_rows(x)
    assert len(calls) == tried


OTHERS = {
    "the number of rows": (lambda p, x: x @ p / len(x), True),
    "the largest row": (lambda p, x: x @ p + jax.nn.relu(x).max(0), True),
    "the place of the largest row": (lambda p, x: x @ p + jnp.argmax(x[:, 0]), True),
    "rows as they are": (lambda p, x: jnp.tanh(x @ p), False),
    "logarithms, which zeros have none of": (lambda p, x: jnp.log(x**2) @ p, False),
    "a norm of each row": (lambda p, x: x @ p / (1 + jnp.linalg.norm(x, axis=1)), False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_probe_tells_rows_that_mix_from_those_that_do_not(name):
    apply, mixes = OTHERS[name]
    net = hb.likelihoods.Network(apply, np.ones(1))
    assert net.mixes_rows(some_tasks((9, 3)).predictors) is mixes


def test_rows_that_do_not_mix_are_filled_up_as_before():
    tasks = some_tasks((5, 3, 8))
    net = hb.likelihoods.Network.mlp([1, 4, 1])
    assert not net.mixes_rows(tasks.predictors)
    assert sorted(block.mask.shape for _, block in net.blocks(tasks)) == [(1, 4), (2, 8)]
    assert net.arrange(tasks)[0].mask.shape == (3, 8)


# ------------------------------------------------------- what is no weight, and no function


WITH_STATISTICS = {
    "w": np.ones(2), "norm": {"running_mean": np.zeros(2), "running_var": np.ones(2)}
}  # fmt: skip


def refuses_as_weights(given):
    with refuses("running statistics", "LayerNorm", "batch statistics"):
        _ = hb.likelihoods.Network(lambda p, x: x[:, 0], given).weights


def test_running_statistics_are_no_weights():
    import equinox

    norm = equinox.nn.BatchNorm(3, "rows", mode="batch")
    for given in (WITH_STATISTICS, equinox.filter(norm, equinox.is_inexact_array)):
        refuses_as_weights(given)


@pytest.mark.slow
def test_running_statistics_are_no_weights_from_any_library():
    import equinox
    from flax import linen, nnx

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1)(linen.BatchNorm(use_running_average=False)(linen.Dense(3)(x)))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.norm = nnx.Linear(1, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))[:, 0]

    def linen_init(key):
        return Linen().init(key, jnp.ones((2, 1)))

    made = Nnx(nnx.Rngs(0))
    _, whole = nnx.split(made)
    norm, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(3, "rows", mode="batch")
    arrays = equinox.filter(norm, equinox.is_inexact_array)
    for given in (
        linen_init, linen_init(jax.random.key(0)), whole, made, nnx.to_pure_dict(whole),
        lambda key: nnx.split(Nnx(nnx.Rngs(key)))[1], (arrays, state),
    ):  # fmt: skip
        refuses_as_weights(given)
    started = linen_init(jax.random.key(0))
    graph, weights, rest = nnx.split(made, nnx.Param, ...)
    parts = {
        "linen": (lambda p, x: Linen().apply(
            {"params": p, "batch_stats": started["batch_stats"]}, x,
            mutable=["batch_stats"])[0], lambda key: linen_init(key)["params"]),
        # a copy inside apply: nnx writes its statistics into what it is given
        "nnx": (lambda p, x: nnx.merge(graph, p, jax.tree.map(jnp.copy, rest))(x), weights),
    }  # fmt: skip
    for apply, given in parts.values():
        net = hb.likelihoods.Network(apply, given)
        assert net.output_shape(np.ones((2, 1))) in ((2,), (2, 1))
        assert net.mixes_rows(some_tasks((6,)).predictors)


def callable_module():
    """A module, apply, and its weights, which can be called."""
    import equinox

    made = equinox.nn.MLP(1, "scalar", 8, 1, key=jax.random.key(0))
    params, static = equinox.partition(made, equinox.is_inexact_array)
    assert callable(params)

    def apply(p, x):
        return jax.vmap(equinox.combine(p, static))(x)

    return made, apply, params


@pytest.mark.slow
def test_a_module_that_can_be_called_is_learned():
    _, apply, params = callable_module()
    model = hb.HierarchicalModel(hb.likelihoods.Network(apply, params, dtype="float64"), GAUSSIAN)
    fit = hb.maml(model, sampler(), 1, **SHORT)
    assert fit.phi["mu"].shape == (25,)


def test_a_module_that_can_be_called_is_weights_and_no_init():
    made, apply, params = callable_module()
    net = hb.likelihoods.Network(apply, params, dtype="float64")
    assert net.weights.size == 8 + 8 + 8 + 1
    with jax.enable_x64(True):
        start = net.initial(jax.random.key(5))
    for one, other in zip(jax.tree.leaves(start), jax.tree.leaves(params), strict=True):
        assert np.array_equal(one, other)
    with refuses("floats", "eqx.partition"):
        _ = hb.likelihoods.Network(apply, made).weights
    assert hb.likelihoods.Network(lambda p, x: x[:, 0] * p, 2.0).weights.size == 1
    drawn = jax.tree_util.Partial(lambda a, key: a * jax.random.normal(key, (2,)), jnp.ones(2))
    assert hb.likelihoods.Network(lambda p, x: x @ p, drawn).weights.size == 2


def refuses_to_draw(*given):
    tasks = some_tasks((6, 6))
    for apply, weights in given:
        model = hb.HierarchicalModel(hb.likelihoods.Network(apply, weights), GAUSSIAN)
        with refuses("apply", "the same f", "dropout"):
            hb.maml(model, tasks, 1, **SHORT)
        head = hb.likelihoods.LastLayer(apply, weights)
        with refuses("apply", "the same f", "dropout"):
            head.num_features(tasks.predictors)


def test_apply_that_draws_is_refused():
    import equinox

    drop = equinox.nn.Dropout(0.5)
    refuses_to_draw(
        (lambda p, x: jax.vmap(drop)(x) @ p, np.ones(1)),
        (lambda p, x: drop(x, key=jax.random.key(0)) @ p, np.ones(1)),
        (lambda p, x: x @ p + jax.random.normal(jax.random.key(0), (len(x),)), np.ones(1)),
        (lambda p, x, key: x @ p, np.ones(1)),
    )


@pytest.mark.slow
def test_flax_modules_that_draw_are_refused():
    from flax import linen

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1)(linen.Dropout(0.5, deterministic=False)(x))

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    params = jax.jit(Linen().init)(keys, np.ones((2, 1), np.float32))
    refuses_to_draw(
        (Linen().apply, params),
        (lambda p, x: Linen().apply(p, x, rngs={"dropout": jax.random.key(0)}), params),
    )


def test_rows_of_another_width_are_refused_and_a_number_is_weights():
    """``apply`` would take them: it adds up whatever columns there are."""
    net = hb.likelihoods.Network(lambda p, x: (x * p).sum(1), 1.0)
    assert net.weights.size == 1
    tasks, phi = some_tasks((6, 6, 6)), {"mu": np.ones(1), "sigma": np.asarray(1.0)}
    model = hb.HierarchicalModel(net, GAUSSIAN)
    fit = Fit(Derived("steps"), model, model.tasks(tasks), phi, GradientSteps(1, 0.01))
    assert np.isfinite(fit.predict().mean).all()
    rng = np.random.default_rng(0)
    wide = hb.Tasks.from_arrays([(rng.normal(size=(6, 2)), rng.normal(size=6))])
    for ask in (fit.adapt, fit.predict, fit.adapted.predict):
        with refuses("(2,)", "(1,)", "same columns"):
            ask(wide)
