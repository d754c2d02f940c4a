r"""How θ_K depends on φ: four derivatives of the same steps, against differences and formulas.

Everything here is float64. Sums of a few hundred products round to about 1e-14 of their size, so
that what must be the same number computed in another order is compared at 1e-12 or 1e-10.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from assertions import close, gradient

import hierbayes as hb
from hierbayes.adaptation import GradientSteps
from hierbayes.numerics import float64
from hierbayes.tasks.views import Task

SIZES = [4, 3, 4]
"""Rows of the tasks: ragged, so that the shorter ones are filled up."""


@functools.cache
def network():
    """A tanh network with three hidden units, ten weights."""
    net = hb.likelihoods.Network.mlp([1, 3, 1], activation=jnp.tanh, dtype="float64")
    return hb.HierarchicalModel(net, hb.priors.Gaussian())


LINEAR = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())


@functools.cache
def curves():
    rng = np.random.default_rng(3)
    arrays = [(x := rng.uniform(-2, 2, (n, 1)), np.sin(x[:, 0] + n)) for n in SIZES]
    return network().tasks(hb.Tasks.from_arrays(arrays))


@functools.cache
def regressions():
    rng = np.random.default_rng(4)
    arrays = [(rng.normal(size=(n, 2)), 2 * rng.normal(size=n)) for n in SIZES]
    return hb.Tasks.from_arrays(arrays)


def phi_of(model, **more):
    d = 10 if model is network() else 2
    mu = np.random.default_rng(5).normal(size=d) * 0.7
    return {"mu": mu, "sigma": np.asarray(0.8)} | more


def block(tasks):
    return tasks.block(np.arange(tasks.num_tasks), int(tasks.sizes.max()))


def reached(steps, model, tasks, phi):
    """θ_K of every task (J, d), rows arranged as the steps want them."""
    rows = steps.arrange(model, tasks)
    with float64():
        return np.asarray(jax.jit(lambda phi, *rows: steps.steps(model, phi, *rows))(phi, *rows))


def weighing(model):
    """Fixed weights that make one number of θ_K (J, d)."""
    d = 10 if model is network() else 2
    return np.random.default_rng(6).normal(size=(len(SIZES), d))


def value_and_slope(steps, model, tasks, phi):
    """A number made of θ_K, and its slope in every entry of φ."""
    rows, weights = steps.arrange(model, tasks), weighing(model)

    def number(phi):
        return (weights * steps.steps(model, phi, *rows)).sum()

    with float64():
        value, slope = jax.jit(jax.value_and_grad(number))(phi)
        return float(value), {name: np.asarray(v) for name, v in slope.items()}


# ------------------------------------------------------------------- through the steps


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 7, 16])
def test_recomputed_steps_have_the_derivative_of_kept_ones(num_steps):
    """1 and 7 do not fill segments of √K steps, 16 does."""
    phi = phi_of(network(), step_size=np.asarray(0.05))
    kept, again = (
        value_and_slope(GradientSteps(num_steps, derivative=derivative), network(), curves(), phi)
        for derivative in ("unrolled", "rematerialised")
    )
    close(again[0], kept[0], rtol=1e-12)
    for name, slope in kept[1].items():
        close(again[1][name], slope, rtol=1e-12, atol=1e-12 * np.abs(slope).max())


def test_the_derivative_through_the_steps_is_that_of_differences():
    steps = GradientSteps(5, proximal=True)
    phi = phi_of(network(), step_size=np.asarray(0.05), tau=np.full(10, 0.9))
    _, slope = value_and_slope(steps, network(), curves(), phi)
    rows, weights = steps.arrange(network(), curves()), weighing(network())
    with float64():
        run = jax.jit(lambda phi: (weights * steps.steps(network(), phi, *rows)).sum())
        for name in ("mu", "sigma", "step_size", "tau"):
            gradient(lambda value, n=name: run(phi | {n: value}), phi[name], slope[name])


@pytest.mark.slow
def test_the_derivative_in_a_step_size_for_each_weight_is_that_of_differences():
    steps = GradientSteps(4, derivative="rematerialised")
    phi = phi_of(network(), step_size=np.linspace(0.01, 0.1, 10))
    _, slope = value_and_slope(steps, network(), curves(), phi)
    rows, weights = steps.arrange(network(), curves()), weighing(network())
    with float64():
        run = jax.jit(lambda phi: (weights * steps.steps(network(), phi, *rows)).sum())
        gradient(lambda eta: run(phi | {"step_size": eta}), phi["step_size"], slope["step_size"])


# ------------------------------------------------------------------------- first order


def written_out(model, task, theta, eta, num_steps):
    """(θ_K, the slopes at θ_0 … θ_{K−1}) of one task, step by step."""
    slopes = []
    for _ in range(num_steps):
        slopes.append(np.asarray(uphill(model)(theta, task.predictors, task.outcome)))
        theta = theta + eta * slopes[-1]
    return theta, slopes


@functools.cache
def uphill(model):
    return jax.jit(jax.grad(lambda theta, x, y: log_likelihood(model, x, y, theta)))


def log_likelihood(model, x, y, theta):
    """The normal log density of a task's rows at σ = 0.8, but for its constant."""
    f = model.likelihood.apply(model.likelihood.tree(theta), x)[:, 0]
    return -0.5 * ((y - f) ** 2).sum() / 0.64


def test_steps_of_a_network_are_those_written_out():
    eta = 0.05
    found = reached(GradientSteps(4, eta), network(), curves(), phi_of(network()))
    with float64():
        for j in range(len(SIZES)):
            task = curves().take([j])
            expected, _ = written_out(network(), task, phi_of(network())["mu"], eta, 4)
            close(found[j], expected, rtol=1e-12, atol=1e-12)


def test_first_order_takes_the_slope_at_the_last_point_with_slopes_held():
    """dθ_K/dμ is the identity, and dθ_K/dη the sum of the slopes along the way."""
    phi = phi_of(network(), step_size=np.asarray(0.05))
    steps = GradientSteps(4, derivative="first-order")
    value, slope = value_and_slope(steps, network(), curves(), phi)
    weights = weighing(network())
    close(slope["mu"], weights.sum(0), rtol=1e-12, atol=1e-12)
    close(slope["sigma"], 0.0)
    with float64():
        along = [
            sum(written_out(network(), curves().take([j]), phi["mu"], 0.05, 4)[1])
            for j in range(len(SIZES))
        ]
        close(slope["step_size"], (weights * np.stack(along)).sum(), rtol=1e-10)
    unrolled, _ = value_and_slope(GradientSteps(4), network(), curves(), phi)
    close(value, unrolled, rtol=1e-12)


@pytest.mark.slow
def test_first_order_of_an_outcome_is_its_slope_at_the_adapted_weights():
    """As MAML uses it: the gradient of the query rows at θ_K, taken as that in μ."""
    steps = GradientSteps(3, 0.05, derivative="first-order")
    phi, rows = phi_of(network()), block(curves())

    def query(theta):
        likelihood = network().likelihood
        return likelihood.log_likelihood_of_rows(theta, {"sigma": 0.8}, rows, None).sum()

    with float64():

        def adapted(mu):
            return steps.steps(network(), phi | {"mu": mu}, rows, None)

        found = jax.jit(jax.grad(lambda mu: query(adapted(mu))))(phi["mu"])
        expected = jax.jit(jax.grad(query))(jax.jit(adapted)(phi["mu"])).sum(0)
        close(found, expected, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------- implicit


def exact(tasks, phi):
    """θ* of each task and its derivatives in μ, τ, σ, by dense solves."""
    sigma, tau, mu = phi["sigma"], np.broadcast_to(phi["tau"], 2), phi["mu"]
    found = []
    for _, task in tasks:
        x, y = task.predictors, task.outcome
        bend = x.T @ x / sigma**2 + np.diag(tau**-2.0)
        theta = np.linalg.solve(bend, x.T @ y / sigma**2 + mu / tau**2)
        d_mu = np.linalg.solve(bend, np.diag(tau**-2.0))
        d_tau = np.linalg.solve(bend, np.diag(2 * (theta - mu) / tau**3))
        d_sigma = np.linalg.solve(bend, -2 * x.T @ (y - x @ theta) / sigma**3)
        found.append((theta, d_mu, d_tau, d_sigma))
    return [np.stack(parts) for parts in zip(*found, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "per_coefficient", "tau"),
    [("sum", False, 0.7), ("mean", True, np.array([0.5, 1.1]))],
    ids=["one tau", "mean, two taus, two step sizes"],
)
def test_the_implicit_derivative_is_that_of_the_maximum(loss, per_coefficient, tau):
    """The slowest of 1,500 steps leaves (1 − 0.02)^1500 = 1e-13 of the way.

    In two dimensions conjugate gradients are exact after two iterations, but for rounding.
    """
    eta = np.array([0.05, 0.03]) if per_coefficient else np.asarray(0.04)
    eta = eta * (3 if loss == "mean" else 1)
    phi = phi_of(LINEAR, step_size=eta, tau=np.asarray(tau))
    steps = GradientSteps(1500, loss=loss, derivative="implicit", proximal=True)
    theta, d_mu, d_tau, d_sigma = exact(regressions(), phi)
    close(reached(steps, LINEAR, regressions(), phi), theta, rtol=1e-8)
    _, slope = value_and_slope(steps, LINEAR, regressions(), phi)
    weights = weighing(LINEAR)
    close(slope["mu"], np.einsum("jk,jkl->l", weights, d_mu), rtol=1e-8)
    by_tau = np.einsum("jk,jkl->l", weights, d_tau)
    close(slope["tau"], by_tau if np.ndim(tau) else by_tau.sum(), rtol=1e-8)
    close(slope["sigma"], (weights * d_sigma).sum(), rtol=1e-8)
    close(slope["step_size"], np.zeros_like(eta), atol=1e-8)


@pytest.mark.slow
def test_the_implicit_derivative_of_a_network_is_that_of_many_steps():
    """Where the steps have converged both are the derivative of the maximum.

    Ten weights take ten iterations for an exact solve and have five; the prior is narrow, so that
    A is close to its multiple of the identity and five leave less than 1e-4.
    """
    phi = phi_of(network(), tau=np.asarray(0.3))
    through, implied = (
        value_and_slope(
            GradientSteps(150, 0.03, derivative=derivative, proximal=True),
            network(), curves(), phi,
        )
        for derivative in ("unrolled", "implicit")
    )  # fmt: skip
    close(implied[0], through[0], rtol=1e-12)
    for name in ("mu", "tau", "sigma"):
        scale = np.abs(through[1][name]).max()
        close(implied[1][name], through[1][name], rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.slow
def test_the_implicit_derivative_of_steps_cut_short_is_not_theirs():
    """The control: after three steps the maximum is far, and the two derivatives differ."""
    phi = phi_of(LINEAR, tau=np.asarray(0.7))
    through, implied = (
        value_and_slope(
            GradientSteps(3, 0.01, derivative=derivative, proximal=True),
            LINEAR, regressions(), phi,
        )[1]["mu"]
        for derivative in ("unrolled", "implicit")
    )  # fmt: skip
    with pytest.raises(AssertionError):
        close(implied, through, rtol=0.1)


def test_many_tasks_do_not_spoil_each_others_implicit_derivative():
    """Solved jointly, five iterations would not do for eighty coefficients of unlike curvature."""
    rng = np.random.default_rng(8)
    arrays = [
        (rng.normal(size=(n, 2)) * rng.uniform(0.3, 2, 2), rng.normal(size=n))
        for n in rng.integers(1, 9, 40)
    ]
    tasks = hb.Tasks.from_arrays(arrays)
    phi = phi_of(LINEAR, tau=np.asarray(0.7))
    steps = GradientSteps(2000, 0.01, derivative="implicit", proximal=True)
    rows = steps.arrange(LINEAR, tasks)
    with float64():
        found = jax.jit(jax.grad(lambda mu: steps.steps(LINEAR, phi | {"mu": mu}, *rows).sum()))(
            phi["mu"]
        )
    close(found, exact(tasks, phi)[1].sum((0, 1)), rtol=1e-7)


# ------------------------------------------------------------------- steps of other kinds


def test_a_step_size_for_each_coefficient_is_a_diagonal_preconditioner():
    eta = np.linspace(0.01, 0.1, 10)
    found = reached(GradientSteps(4), network(), curves(), phi_of(network(), step_size=eta))
    with float64():
        for j in range(len(SIZES)):
            task = curves().take([j])
            expected, _ = written_out(network(), task, phi_of(network())["mu"], eta, 4)
            close(found[j], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_equal_step_sizes_for_all_coefficients_are_one_step_size():
    for model, tasks in ((network(), curves()), (LINEAR, regressions())):
        d = len(phi_of(model)["mu"])
        one = reached(GradientSteps(4), model, tasks, phi_of(model, step_size=np.asarray(0.03)))
        each = reached(GradientSteps(4), model, tasks, phi_of(model, step_size=np.full(d, 0.03)))
        close(each, one, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["network", "linear"])
def test_steps_on_the_mean_are_steps_on_the_sum_divided_by_the_rows(which):
    model, tasks = (network(), curves()) if which == "network" else (LINEAR, regressions())
    mean = reached(GradientSteps(4, 0.1, loss="mean"), model, tasks, phi_of(model))
    for j, n in enumerate(SIZES):
        phi = phi_of(model, step_size=np.asarray(0.1 / n))
        alone = reached(GradientSteps(4), model, tasks.take([j]), phi)
        close(mean[j], alone[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "proximal", "per_coefficient"), [("sum", False, False), ("mean", True, True)]
)
def test_flat_rows_and_tasks_side_by_side_agree(loss, proximal, per_coefficient):
    """A linear model takes either; its own choice is flat rows."""
    eta = np.array([0.02, 0.05]) if per_coefficient else np.asarray(0.03)
    phi = phi_of(LINEAR, step_size=eta, tau=np.array([0.5, 1.1]))
    steps = GradientSteps(5, loss=loss, proximal=proximal)
    flat, task_of_row = steps.arrange(LINEAR, regressions())
    assert task_of_row is not None
    with float64():
        one = jax.jit(lambda phi: steps.steps(LINEAR, phi, flat, task_of_row))(phi)
        other = jax.jit(lambda phi: steps.steps(LINEAR, phi, block(regressions()), None))(phi)
        close(one, other, rtol=1e-12, atol=1e-12)


def test_a_task_without_rows_stays_at_the_prior():
    empty = [(np.zeros((0, 1)), np.zeros(0)), (np.ones((2, 1)), np.ones(2))]
    tasks = network().tasks(hb.Tasks.from_arrays(empty))
    for loss in ("sum", "mean"):
        found = GradientSteps(3, 0.1, loss=loss)(network(), tasks, phi_of(network())).mean
        close(found[0], phi_of(network())["mu"], rtol=1e-12)
        assert np.abs(found[1] - found[0]).max() > 1e-3


OPTIMISERS = {
    "adam": optax.adam(0.05),
    "nesterov": optax.sgd(0.01, momentum=0.8, nesterov=True),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.3)),
    "decaying": optax.adamw(optax.exponential_decay(0.05, 2, 0.5), weight_decay=0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "which"), [*((name, "network") for name in OPTIMISERS), ("clipped", "linear")]
)
def test_an_optimiser_runs_for_each_task_by_itself(name, which):
    """Clipping to 0.5 cuts each task's own slope, which is longer; jointly, less would be left."""
    model, tasks = (network(), curves()) if which == "network" else (LINEAR, regressions())
    optimiser, phi = OPTIMISERS[name], phi_of(model)
    found = reached(GradientSteps(4, optimiser=optimiser), model, tasks, phi)
    with float64():
        for j in range(len(SIZES)):
            task = tasks.take([j])

            def falling(theta, task=task):
                if model is network():
                    return -log_likelihood(model, task.predictors, task.outcome, theta)
                return 0.5 * ((task.outcome - task.predictors @ theta) ** 2).sum() / 0.64

            @jax.jit
            def step(theta, state, falling=falling):
                slope = jax.grad(falling)(theta)
                updates, state = optimiser.update(slope, state, theta)
                return optax.apply_updates(theta, updates), state, jnp.linalg.norm(slope)

            theta = jnp.asarray(phi["mu"])
            state = optimiser.init(theta)
            for _ in range(4):
                theta, state, norm = step(theta, state)
                assert name != "clipped" or norm > 0.5
            close(found[j], theta, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_the_derivative_through_an_optimiser_is_that_of_differences():
    steps = GradientSteps(4, optimiser=optax.adam(0.05), derivative="rematerialised")
    phi = phi_of(network())
    _, slope = value_and_slope(steps, network(), curves(), phi)
    rows, weights = steps.arrange(network(), curves()), weighing(network())
    with float64():
        run = jax.jit(lambda mu: (weights * steps.steps(network(), {**phi, "mu": mu}, *rows)).sum())
        gradient(run, phi["mu"], slope["mu"])


def test_the_path_begins_at_the_prior_and_ends_where_the_steps_do():
    phi, steps = phi_of(network()), GradientSteps(4, 0.05)
    task = curves().take([1])
    with float64():
        rows = Task(
            task.predictors, task.shared, task.task_predictors[0], task.outcome, {},
            np.ones(task.num_rows, bool),
        )  # fmt: skip
        path = np.asarray(jax.jit(lambda phi: steps.path(network(), phi, rows))(phi))
    assert path.shape == (5, 10)
    close(path[0], phi["mu"])
    close(path[-1], reached(steps, network(), curves(), phi)[1], rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------- memory


@functools.cache
def scratch(derivative, num_steps):
    """Bytes that the compiled slope of a small network's adaptation needs beside its arguments."""
    net = hb.likelihoods.Network.mlp([1, 32, 1], activation=jnp.tanh)
    model = hb.HierarchicalModel(net, hb.priors.Gaussian())
    ones = jnp.ones((4, 5))
    rows = Task(ones[..., None], jnp.zeros((4, 5, 0)), jnp.zeros((4, 0)), ones, {}, ones > 0)
    steps = GradientSteps(
        num_steps, 0.01, "mean", derivative=derivative, proximal=derivative == "implicit"
    )

    def number(mu):
        phi = {"mu": mu, "sigma": jnp.asarray(0.7), "tau": jnp.asarray(1.0)}
        return (steps.steps(model, phi, rows, None) ** 2).sum()

    compiled = jax.jit(jax.grad(number)).lower(jnp.zeros(net.weights.size)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("derivative", ["implicit", "first-order"])
def test_memory_does_not_grow_with_the_steps(derivative):
    """Program text aside, which is the same for any K: a tenth is allowed."""
    assert scratch(derivative, 200) <= 1.1 * scratch(derivative, 10)


@pytest.mark.slow
def test_memory_of_recomputed_steps_grows_with_the_root_of_their_number():
    """√200 / √10 = 4.5; segments are whole numbers of steps, 14 and 3, a ratio of 4.7."""
    assert scratch("rematerialised", 200) <= 5 * scratch("rematerialised", 10)
    assert scratch("rematerialised", 200) <= scratch("unrolled", 200) / 10


@pytest.mark.slow
def test_memory_of_kept_steps_grows_with_their_number():
    """The control: 20 times the steps need nearly 20 times the memory."""
    assert 15 <= scratch("unrolled", 200) / scratch("unrolled", 10) <= 25
