r"""iMAML's outer gradient on episodes, against dense algebra.

At θ_K, where A = −∇²Ψ, the gradient of a task's query score s in φ is λ A⁻¹ ∇_θ s, the derivative
of the maximum that K steps stand for. One outer step of length one from a generator that gives the
same batch for ever moves φ by its mean over tasks and rows. σ = √½ in both parts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from assertions import close

import hierbayes as hb

HALF = 0.5  # σ²
LAST = ("inner_residual", "gradient_residual", "not_a_maximum")


def outer_step(apply, start, batch, precision, num_steps, step_size, dtype="float64"):
    """(what one outer step adds to φ, the fit)."""

    def make(seed):
        del seed
        while True:
            yield batch

    likelihood = hb.likelihoods.Network(apply, start, dtype=dtype)
    model = hb.HierarchicalModel(likelihood, hb.priors.Gaussian(correlated=False))
    fit = hb.imaml(
        model, hb.Episodes.from_generator(make), prior_precision=precision, num_steps=num_steps,
        step_size=step_size, optimiser=optax.sgd(1.0), num_meta_steps=1,
        held_out=len(batch[0][1]), progress=False,
    )  # fmt: skip
    before = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(start)]).astype(dtype)
    return fit.phi["mu"] - before, fit


def dense(apply, start, batch, precision, num_steps, step_size):
    """(the same move, ‖∇Ψ(θ_K)‖ / ‖∇Ψ(φ)‖ and A's eigenvalues of each task), from matrices."""
    moves, left, values = [], [], []
    with jax.enable_x64(True):
        (xs, ys), (xq, yq) = batch
        for rows in zip(xs, ys, xq, yq, strict=True):
            found = of_one(apply, start, rows, precision, num_steps, step_size)
            bend, asked, share = map(np.asarray, found)
            moves.append(precision * np.linalg.solve(bend, asked))
            left.append(float(share))
            values.append(np.linalg.eigvalsh(bend))
    return np.mean(moves, axis=0), np.array(left), np.array(values)


@functools.partial(jax.jit, static_argnums=0)
def of_one(apply, start, rows, precision, num_steps, step_size):
    """(A at θ_K, ∇_θ of the query rows there, ‖∇Ψ(θ_K)‖ / ‖∇Ψ(φ)‖) of one task."""
    flat, back = jax.flatten_util.ravel_pytree(start)
    x, y, xq, yq = rows

    def log_density(theta, x, y):
        return -0.5 * ((y - apply(back(theta), x).reshape(-1)) ** 2).sum() / HALF

    def psi(theta):
        return log_density(theta, x, y) - 0.5 * precision * ((theta - flat) ** 2).sum()

    slope = jax.grad(psi)
    theta = jax.lax.fori_loop(0, num_steps, lambda _, t: t + step_size / len(y) * slope(t), flat)
    asked = jax.grad(log_density)(theta, xq, yq) / len(yq)
    share = jnp.linalg.norm(slope(theta)) / jnp.linalg.norm(slope(flat))
    return -jax.hessian(psi)(theta), asked, share


def linear(p, x):
    return x @ p


def linear_batch(condition, d=12, num_tasks=3, seed=0):
    """Tasks with 2 XᵀX of eigenvalues 0 to ``condition``, evenly spread by logarithm."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(num_tasks):
        left = np.linalg.qr(rng.normal(size=(d + 3, d)))[0]
        right = np.linalg.qr(rng.normal(size=(d, d)))[0]
        spread = np.sqrt(HALF * np.geomspace(1.0, condition, d)) * (np.arange(d) > 0)
        parts.append((left * spread) @ right.T)
    x, y = np.stack(parts), rng.normal(size=(num_tasks, d + 3))
    return (x, y), (rng.normal(size=(num_tasks, 4, d)), rng.normal(size=(num_tasks, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("condition", [214.0, 1e6])
def test_the_implicit_gradient_of_linear_tasks_is_the_dense_one(condition):
    """1e-10 of the system is left: up to the condition times that of the gradient, and 1e-9."""
    batch, start = linear_batch(condition), np.zeros(12)
    eta = 1.0 / condition
    wanted, left, values = dense(linear, start, batch, 1.0, 3, eta)
    assert values.min() == pytest.approx(1.0)
    assert values.max() == pytest.approx(condition + 1)
    found, fit = outer_step(linear, start, batch, 1.0, 3, eta)
    scale = np.abs(wanted).max()
    close(found, wanted, rtol=0, atol=max(1e-9, 1e-11 * condition) * scale)
    history = fit.info["history"]
    close(history["inner_residual"][0], left.max(), rtol=1e-8)
    assert max(history["gradient_residual"]) < 1e-8
    assert history["not_a_maximum"] == [0.0, 0.0]


def test_five_iterations_would_not_do():
    """The control: A's inverse by five iterations from zero is 10 % off and more."""
    (x, _), _ = linear_batch(214.0)
    a = 2 * x[0].T @ x[0] + np.eye(12)
    b = np.random.default_rng(1).normal(size=12)
    basis = np.linalg.qr(np.stack([np.linalg.matrix_power(a, k) @ b for k in range(5)], 1))[0]
    five = basis @ np.linalg.solve(basis.T @ a @ basis, basis.T @ b)
    exact = np.linalg.solve(a, b)
    assert np.linalg.norm(five - exact) > 0.1 * np.linalg.norm(exact)


def network(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def network_start():
    rng = np.random.default_rng(3)
    return {"b": rng.normal(size=4), "v": rng.normal(size=4), "w": rng.normal(size=(1, 4))}


def network_batch():
    rng = np.random.default_rng(4)
    xs, xq = rng.normal(size=(3, 6, 1)), rng.normal(size=(3, 5, 1))
    return (xs, np.sin(2 * xs[..., 0])), (xq, np.sin(2 * xq[..., 0]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_implicit_gradient_of_a_network_is_the_dense_one(dtype):
    """H has negative eigenvalues, A = H + λI none: conjugate gradients need no more.

    float32: 1e-5 of the system is left, and slopes are rounded.
    """
    precision, start, batch = 30.0, network_start(), network_batch()
    wanted, left, values = dense(network, start, batch, precision, 2, 0.02)
    assert 0 < values.min() < precision, "H itself bends upwards somewhere"
    found, fit = outer_step(network, start, batch, precision, 2, 0.02, dtype)
    close(found, wanted, rtol=0, atol=(1e-8 if dtype == "float64" else 1e-4) * abs(wanted).max())
    assert fit.info["history"]["not_a_maximum"][0] == 0
    close(fit.info["history"]["inner_residual"][0], left.max(), rtol=1e-3)
    assert any("do not reach the maximum" in said for said in fit.warnings)


@pytest.mark.slow
def test_what_is_no_maximum_is_said_and_bounded():
    """Under a weak prior A is indefinite: there is no such gradient, and the move stays finite."""
    precision, start, batch = 0.01, network_start(), network_batch()
    _, _, values = dense(network, start, batch, precision, 2, 0.02)
    assert (values.min(1) < 0).all()
    found, fit = outer_step(network, start, batch, precision, 2, 0.02)
    assert np.isfinite(found).all()
    assert fit.info["history"]["not_a_maximum"][0] > 0
    assert any("bends upwards" in said and "prior_precision" in said for said in fit.warnings)


@pytest.mark.slow
def test_steps_that_reach_the_maximum_are_not_warned_of():
    """The slowest of 400 steps leaves (1 − 0.05)^400 of the way."""
    batch = linear_batch(19.0)
    _, fit = outer_step(linear, np.zeros(12), batch, 1.0, 400, 15 / 20.0)
    last = {name: fit.info["history"][name][-1] for name in LAST}
    assert last["inner_residual"] < 1e-6
    assert last["gradient_residual"] < 1e-9
    assert last["not_a_maximum"] == 0
    assert fit.warnings == ()
