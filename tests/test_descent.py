r"""Gradient steps, momentum and flow along one direction of curvature λ.

The reference is the closed form r = (1 − ηλ)^K, s = (1 − r)/λ, p = r/s in 80-bit floats, with
expm1 and log1p where 1 − r would cancel; momentum is run as its own scalar recursion.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import close, finite_difference
from scipy import integrate, optimize

from hierbayes.adaptation import Descent, Flow, implied_precision
from hierbayes.numerics import float64

ETA = 0.4

# what users call on arrays op by op, in one program
precision_of = functools.partial(jax.jit, static_argnums=1)(implied_precision)
responses_of_flow = jax.jit(lambda t, lam: Flow(t).responses(lam))


def exact_precision(curvature, num_steps, eta=ETA):
    """p = λ r / (1 − r) in 80-bit floats: 1 − r = −expm1(K log1p(−x)) below x = 1."""
    lam, eta = np.longdouble(curvature), np.longdouble(eta)
    x = eta * lam
    r = (1 - x) ** num_steps
    gap = -np.expm1(num_steps * np.log1p(-x)) if x < 1 else 1 - r
    return lam * r / gap


# --------------------------------------------------------------- precision of equal steps

XS = [-0.5, -0.05, -1e-4, 1e-4, 0.05, 0.3, 0.7, 0.95, 1.05, 1.4, 1.9]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 33])
def test_precision_is_the_closed_form(num_steps):
    """Relative to max(|r|, 1 − |r|)⁻¹ nothing cancels: K roundings, so 1e-13 for K = 33."""
    lam = np.array(XS) / ETA
    with float64():
        found = np.asarray(precision_of(lam, num_steps, ETA))
    close(found, [exact_precision(one, num_steps) for one in lam], rtol=1e-13 * (1 + num_steps))


@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_precision_without_curvature(num_steps):
    """1/(Kη) − (K+1)λ/(2K) + c λ²: a tenth of λ leaves a hundredth of the remainder."""
    lam = np.array([0.0, 1e-2, 1e-3])
    with float64():
        found = np.asarray(precision_of(lam, num_steps, ETA))
    close(found[0], 1 / (num_steps * ETA), rtol=1e-15)
    rest = found - 1 / (num_steps * ETA) + (num_steps + 1) * lam / (2 * num_steps)
    if num_steps == 1:  # p = 1/η − λ has no further term
        close(rest, np.zeros(3), atol=1e-14)
    else:
        # c = (K²−1) η / (12 K), from expanding λ / expm1(−K log1p(−ηλ)) by hand
        close(rest[1:] / lam[1:] ** 2, np.full(2, (num_steps**2 - 1) * ETA / 12 / num_steps), 0.02)


def slopes_in_curvature_and_step(lam, num_steps):
    """(dp/dλ, dp/dη) at each λ, by JAX."""

    def precision(lam, eta):
        return implied_precision(lam, num_steps, eta)

    slopes = jax.jit(jax.vmap(lambda lam: jax.grad(precision, argnums=(0, 1))(lam, ETA)))
    with float64():
        return [np.asarray(g) for g in slopes(np.asarray(lam))]


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_slopes_of_the_precision(num_steps):
    """In λ and η against differences of the 80-bit form.

    The pole at x = 2 (even K) is 0.1 away from the last point, 100 steps of 1e-3, which leaves
    (1e-2)⁴ ~ 1e-8 of it; near x = 1, where slopes vanish, the fifth derivative of (1 − x)⁵ leaves
    120 h⁴ / 30 ~ 3e-11.
    """
    lam = np.array([-0.5, -0.01, 0.3, 0.999, 1.001, 1.5, 1.9]) / ETA
    in_lam, in_eta = slopes_in_curvature_and_step(lam, num_steps)
    wanted = [finite_difference(lambda v: exact_precision(v[0], num_steps), [one]) for one in lam]
    close(in_lam, np.ravel(wanted), rtol=1e-6, atol=1e-10)
    wanted = [
        finite_difference(lambda v, one=one: exact_precision(one, num_steps, v[0]), [ETA])
        for one in lam
    ]
    close(in_eta, np.ravel(wanted), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 8])
def test_slopes_next_to_no_curvature_and_to_the_optimum(num_steps):
    """At and beside x = 0 and x = 1, by their limits; no NaN.

    At x = 0: dp/dλ = −(K+1)/(2K), dp/dη = −1/(Kη²). At x = 1: p = λ (1−x)^K for K ≥ 2 to first
    order, so both slopes vanish; K = 1 has p = 1/η − λ. A neighbour at ε = 1e-8 moves them by
    order ε.
    """
    beside = np.array([-1e-8, -1e-12, 0.0, 1e-12, 1e-8])
    at = np.concatenate([beside, 1 + beside]) / ETA
    in_lam, in_eta = (g.reshape(2, 5) for g in slopes_in_curvature_and_step(at, num_steps))
    close(in_lam[0], np.full(5, -(num_steps + 1) / (2 * num_steps)), rtol=1e-7)
    close(in_eta[0], np.full(5, -1 / (num_steps * ETA**2)), rtol=1e-7)
    last = num_steps == 1
    close(in_lam[1], np.full(5, -1.0 * last), atol=1e-6)
    close(in_eta[1], np.full(5, -last / ETA**2), atol=1e-6)


def test_negative_precision_where_no_prior_exists():
    with float64():
        odd, even = (np.asarray(implied_precision(1.5 / ETA, k, ETA)) for k in (3, 4))
    assert odd < 0 < even


def test_no_step_leaves_a_gap_at_many_steps():
    """K = 10⁶ by doubling: r = exp(K log1p(−x)) to K roundings."""
    x, num_steps = 1e-6, 10**6
    with float64():
        left, moved = jax.jit(Descent(num_steps, ETA).responses)(np.array([x / ETA]))
    close(left, [np.exp(num_steps * np.log1p(-x))], rtol=1e-9)
    close(moved, [-np.expm1(num_steps * np.log1p(-x)) * ETA / x], rtol=1e-9)


# ------------------------------------------------------------------- momentum and schedules


def scalar_recursion(lam, etas, beta=0.0, nesterov=False):
    """(r, s) by running the method on slope −λθ from 1 and on slope 1 − λθ from 0."""
    ends = []
    for slope, theta in ((0.0, 1.0), (1.0, 0.0)):
        moved = 0.0
        for eta in etas:
            at = theta + beta * moved if nesterov else theta
            moved = beta * moved + eta * (slope - lam * at)
            theta += moved
        ends.append(theta)
    return ends


LAMBDAS = np.array([-0.3, 0.0, 1e-9, 0.2, 1.0, 2.0])


@pytest.mark.parametrize(
    ("descent", "etas", "beta", "nesterov"),
    [
        (Descent(5, 0.3, 0.5), [0.3] * 5, 0.5, False),
        (Descent(4, 0.3, 0.9, nesterov=True), [0.3] * 4, 0.9, True),
        (Descent(3, np.array([0.5, 0.1, 0.2])), [0.5, 0.1, 0.2], 0.0, False),
        (Descent(3, np.array([0.5, 0.1, 0.2]), 0.3), [0.5, 0.1, 0.2], 0.3, False),
    ],
    ids=["heavy ball", "Nesterov", "schedule", "schedule with momentum"],
)
def test_responses_are_the_scalar_recursion(descent, etas, beta, nesterov):
    with float64():
        left, moved = (np.asarray(v) for v in jax.jit(descent.responses)(LAMBDAS))
    expected = np.array([scalar_recursion(lam, etas, beta, nesterov) for lam in LAMBDAS])
    close(left, expected[:, 0], rtol=1e-13, atol=1e-15)
    close(moved, expected[:, 1], rtol=1e-13)
    close(1 - left, LAMBDAS * moved, rtol=1e-12, atol=1e-14)  # r = 1 − λ s


def test_heavy_ball_may_be_stable_and_yet_no_prior():
    """methods.md 2.5: R = −0.25 at β = 0.5, ηλ = 0.5, K = 4."""
    with float64():
        left, _ = Descent(4, 0.5, 0.5).responses(np.array([1.0]))
    close(left, [-0.25], rtol=1e-12)


def test_path_ends_where_run_ends():
    bend = np.array([0.2, 1.0])
    with float64():
        descent = Descent(6, 0.3, 0.4)
        path = np.asarray(descent.path(lambda t: 1.0 - bend * t, jnp.zeros(2)))
        end = np.asarray(descent.run(lambda t: 1.0 - bend * t, jnp.zeros(2)))
    assert path.shape == (7, 2)
    close(path[0], [0.0, 0.0])
    close(path[-1], end, rtol=1e-15)
    close(path[1], [0.3, 0.3], rtol=1e-15)


# ---------------------------------------------------------------------------------- flow


def test_flow_beside_no_curvature():
    """s/t = −expm1(−u)/u in 80-bit floats, on both sides of where the series takes over."""
    t = 2.5
    u = np.array([1e-16, 1e-8, 9.99e-4, 1.001e-3, 0.1, 3.0, 40.0])
    u = np.concatenate([-u[:-1], u])
    with float64():
        left, moved = (np.asarray(v) for v in responses_of_flow(t, u / t))
        at_zero = [float(v) for v in Flow(t).responses(0.0)]
        slope = jax.jit(jax.grad(lambda lam: Flow(t).responses(lam)[1]))(0.0)
    wide = np.asarray(u / t, np.longdouble) * t
    close(left, np.exp(-wide), rtol=1e-14)
    close(moved, t * -np.expm1(-wide) / wide, rtol=1e-15 * 4)
    assert at_zero == [1.0, t]
    close(slope, -(t**2) / 2, rtol=1e-15)


def test_flow_is_the_limit_of_many_steps():
    """Error O(1/K) at Kη = t: slope −1 of its logarithm, next order 1/K² bends it by 1 %."""
    t, lam, steps = 1.7, np.array([-0.2, 0.0, 0.4, 1.3, 3.0]), np.array([256, 512, 1024])
    with float64():
        limit = np.asarray(responses_of_flow(t, lam))
        errors = [np.asarray(jax.jit(Descent(int(k), t / k).responses)(lam)) - limit for k in steps]
    sizes = np.abs(errors)
    moving = lam != 0  # without curvature both are exact
    slopes = np.diff(np.log(sizes[:, :, moving]), axis=0) / np.log(2)
    close(slopes, np.full(slopes.shape, -1.0), atol=0.02)
    assert (sizes[:, :, ~moving] < 1e-12).all()


def test_flow_and_ridge_regression_never_differ_by_more_than_1_2984():
    """Shrinkage of flow for t over that of ridge of strength 1/t: largest at u = tλ = 1.793.

    The bound of methods.md 2.3, here found by SciPy from (1 − e^−u)(1 + u)/u.
    """
    best = optimize.minimize_scalar(
        lambda u: -(1 - np.exp(-u)) * (1 + u) / u, bounds=(0.1, 10), options={"xatol": 1e-10}
    )
    t, u = 0.6, np.append(np.geomspace(1e-3, 1e3, 2001), best.x)
    with float64():
        left, _ = responses_of_flow(t, u / t)
    ratio = (1 - np.asarray(left)) / (u / (1 + u))
    close(ratio.max(), -best.fun, rtol=1e-12)
    close([best.x, ratio.max()], [1.793, 1.2984], rtol=3e-4)  # as printed, four digits
    assert ratio.min() > 1 - 1e-12


@pytest.mark.slow
def test_flow_runs_along_the_slope():
    """A logistic slope, against SciPy's integrator at 1e-12."""
    with float64():
        end = np.asarray(Flow(3.0).run(lambda t: 1.0 - 2 / (1 + jnp.exp(-t)), jnp.asarray([2.0])))
        path = np.asarray(Flow(3.0).path(lambda t: -t, jnp.asarray([2.0]), num_points=3))
    solved = integrate.solve_ivp(
        lambda _, t: 1.0 - 2 / (1 + np.exp(-t)), (0, 3), [2.0], rtol=1e-12, atol=1e-13
    )
    close(end, solved.y[:, -1], rtol=1e-9)
    close(path[:, 0], 2 * np.exp(-np.arange(4.0)), rtol=1e-8)
