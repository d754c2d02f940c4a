"""Binary rows in blocks of one x: what rows one by one say.

Rung (b): densities of single rows by NumPy, gradients and curvatures by automatic derivatives of
these. 1e-10: sums and products of a few dozen factors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from assertions import close

import hierbayes as hb
from hierbayes.numerics import float64
from hierbayes.rows import BinaryRows, rows_of

BERNOULLI = hb.likelihoods.Bernoulli()


def some_tasks(seed, sizes, *, offset=True):
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(len(sizes)), sizes)
    n = len(g)
    frame = pd.DataFrame({
        "g": g, "x": rng.integers(0, 2, n) * 1.0, "z": rng.normal(size=n),
        "offset": rng.normal(size=n), "y": rng.integers(0, 2, n) * 1.0,
    })  # fmt: skip
    more = {"offset": "offset"} if offset else {}
    return hb.Tasks.from_dataframe(
        frame, task="g", outcome="y", predictors=["x"], shared=["z"], **more
    )


def one_by_one(tasks, theta, beta):
    """Σ_i y f − log(1 + e^f) of each task (J,), by its rows."""
    f = (tasks.predictors * theta[tasks.task_of_row]).sum(1) + tasks.shared @ beta
    f = f + tasks.slots.get("offset", 0.0)
    each = tasks.outcome * f - jnp.logaddexp(0.0, f)
    return jax.ops.segment_sum(each, tasks.task_of_row, tasks.num_tasks)


def with_derivatives(tasks, theta, beta):
    """The same, its slope (J, 2) and each task's own curvature (2, 2, J)."""

    def total(t):
        return one_by_one(tasks, t, beta).sum()

    bend = jnp.einsum("jajb->abj", jax.hessian(total)(theta))
    return one_by_one(tasks, theta, beta), jax.grad(total)(theta), bend


@jax.jit
def by_blocks(rows, theta, beta):
    """From the blocks: the values, twice, slopes and curvatures."""
    known = rows.under(BERNOULLI, {"beta": beta})
    at = known.to_second_order(BERNOULLI, theta.T, {}, damped=False)
    value = known.log_likelihood(BERNOULLI, theta.T, {})
    return value, at.value, known.constant, at.slope, at.curvature


@pytest.mark.parametrize(
    ("seed", "sizes", "offset", "scale"),
    [
        (0, [60, 41, 16], True, 0.5), (1, [33, 2, 90], False, 3.0), (2, [17, 64, 9], True, 60.0),
        (3, [1, 0, 3], True, 1.0),
    ],
)  # fmt: skip
def test_blocks_say_what_rows_say(seed, sizes, offset, scale):
    """Values, slopes and curvatures, as far out as f = ±200."""
    sizes = [*sizes, 40]
    tasks = some_tasks(seed, sizes, offset=offset)
    rng = np.random.default_rng(seed)
    theta, beta = scale * rng.normal(size=(tasks.num_tasks, 2)), np.array([0.8])
    rows = rows_of(tasks, BERNOULLI)
    if sum(sizes) >= 8 * len(sizes):
        assert isinstance(rows, BinaryRows)
    with float64():
        value, again, constant, slope, curvature = by_blocks(rows, theta, beta)
        right, of_rows, bend = jax.jit(lambda t: with_derivatives(tasks, t, beta))(theta)
        close(again + constant, right, rtol=1e-10, atol=1e-10)
        close(value, again, rtol=1e-12)
        close(slope, np.asarray(of_rows).T, rtol=1e-9, atol=1e-9)
        close(curvature, -np.asarray(bend), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0.5, 60.0])
def test_slopes_in_phi_are_those_of_rows(scale):
    tasks = some_tasks(3, [30, 5, 17, 55])
    tasks = tasks.keep_rows(tasks.task_of_row != 1)  # one has no rows
    assert tasks.num_tasks == 4
    theta = scale * np.random.default_rng(0).normal(size=(4, 2))
    rows = rows_of(tasks, BERNOULLI)
    assert isinstance(rows, BinaryRows)

    @jax.jit
    @jax.grad
    def of_blocks(beta, rows):
        known = rows.under(BERNOULLI, {"beta": beta})
        return known.log_likelihood(BERNOULLI, theta.T, {}).sum()

    with float64():
        beta = np.array([0.7])
        found = of_blocks(beta, rows)
        right = jax.jit(jax.grad(lambda b: one_by_one(tasks, theta, b).sum()))(beta)
    close(found, right, rtol=1e-10)


def test_rows_that_are_copies_or_weighed_are_added_up_instead():
    few = pd.DataFrame({"g": np.repeat([0, 1], 50), "y": np.tile([0.0, 1.0], 50)})
    model, tasks = hb.from_formula("y ~ 1 + (1 | g)", few, family="bernoulli")
    assert rows_of(tasks, model.likelihood).outcome.shape == (1, 2)
    rng = np.random.default_rng(0)
    weighed = few.assign(x=rng.normal(size=100), w=2.0)
    model, tasks = hb.from_formula("y ~ 1 + x + (1 | g)", weighed, family="bernoulli", weight="w")
    assert not isinstance(rows_of(tasks, model.likelihood), BinaryRows)
    model, tasks = hb.from_formula("y ~ 1 + x + (1 | g)", weighed, family="bernoulli")
    assert isinstance(rows_of(tasks, model.likelihood), BinaryRows)
