r"""Where tasks are not Gaussian: K steps of the actual log likelihood, and what is said of them.

Slopes and curvatures of the references are written out in NumPy (logistic regression) or are
differences of log likelihoods; MAP estimates are SciPy's.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from assertions import close, finite_difference, refuses
from references import hessian
from scipy import integrate, optimize, special

import hierbayes as hb
from hierbayes.likelihoods import Gaussian

BERNOULLI = hb.HierarchicalModel(hb.likelihoods.Bernoulli(), hb.priors.Gaussian())


def logistic(n=40, d=3, seed=0):
    """(X, y, φ): n = 40, d = 3 is the example of methods.md 2.6."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    return x, (rng.random(n) < special.expit(x @ rng.normal(size=d))) * 1.0, 0.3 * np.ones(d)


def slope_at(x, y, theta):
    return x.T @ (y - special.expit(x @ theta))


def bend_at(x, theta):
    p = special.expit(x @ theta)
    return (x.T * (p * (1 - p))) @ x


def steps(slope, theta, eta, num_steps, beta=0.0):
    moved = np.zeros_like(theta)
    for _ in range(num_steps):
        moved = beta * moved + eta * slope(theta)
        theta = theta + moved
    return theta


# --------------------------------------------------------------------- steps on actual tasks


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_posterior_mean_is_the_actual_steps(beta):
    x, y, phi = logistic()
    found = hb.equivalent_prior(BERNOULLI, (x, y), phi, 4, 0.05, momentum=beta)
    expected = steps(lambda t: slope_at(x, y, t), phi, 0.05, 4, beta)
    close(found.posterior_mean, expected, rtol=1e-12)
    close(found.curvature, np.linalg.eigvalsh(bend_at(x, phi)), rtol=1e-11)


@pytest.mark.slow
def test_other_methods_run_on_actual_tasks():
    """A schedule with a matrix."""
    x, y, phi = logistic()
    b = np.array([[1.0, 0.3, 0.0], [0.3, 0.8, 0.1], [0.0, 0.1, 0.5]])
    found = hb.equivalent_prior(BERNOULLI, (x, y), phi, 2, [0.05, 0.02], preconditioner=b)
    theta = phi + 0.05 * b @ slope_at(x, y, phi)
    theta = theta + 0.02 * b @ slope_at(x, y, theta)
    close(found.posterior_mean, theta, rtol=1e-12)


@pytest.mark.slow
def test_flow_runs_on_actual_tasks():
    """Against SciPy's integrator at 1e-12."""
    x, y, phi = logistic()
    found = hb.equivalent_prior(BERNOULLI, (x, y), phi, time=0.3)
    solved = integrate.solve_ivp(
        lambda _, t: slope_at(x, y, t), (0, 0.3), phi, rtol=1e-12, atol=1e-13
    )
    close(found.posterior_mean, solved.y[:, -1], rtol=1e-9)


# ----------------------------------------------------------------------------- T20: slopes


def distances(model, task, phi, etas, num_steps, bend, slope, **more):
    """(‖θ_K − θ_lin‖, ½ρ²) of each η, θ_lin = φ + Σ_K g with Σ_K written out in NumPy."""
    apart, missed = [], []
    for eta in etas:
        found = hb.equivalent_prior(model, task, phi, num_steps, eta, **more)
        step = np.eye(len(phi)) - eta * bend
        total = eta * sum(np.linalg.matrix_power(step, k) for k in range(num_steps))
        apart.append(np.linalg.norm(found.posterior_mean - phi - total @ slope))
        missed.append(float(found.validity.missed))
    return np.array(apart), np.array(missed)


@pytest.mark.parametrize("kind", ["ggn", pytest.param("hessian", marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_logistic_regression_misses_the_map_estimate_by_the_fifth_order(num_steps, kind):
    """‖θ_K − θ_lin‖ = O((Kη)³), 0 at K = 1; ½ρ² = O((Kη)⁵): slopes over η of 1e-2 to 1e-3 / λ.

    A term of the next order bends a slope by about Kηλ ~ 0.04 at most; GGN and Hessian agree.
    """
    x, y, phi = logistic()
    bend, slope = bend_at(x, phi), slope_at(x, y, phi)
    etas = np.geomspace(1e-3, 1e-2, 4) / np.linalg.eigvalsh(bend)[-1]
    apart, missed = distances(BERNOULLI, (x, y), phi, etas, num_steps, bend, slope, curvature=kind)
    if num_steps == 1:
        assert apart.max() < 1e-15
    else:
        slopes = np.diff(np.log(apart)) / np.diff(np.log(etas))
        close(slopes, np.full(3, 3.0), atol=0.06)
    slopes = np.diff(np.log(missed)) / np.diff(np.log(etas))
    close(slopes, np.full(3, 5.0), atol=0.15)


@dataclass(frozen=True)
class Exponential(Gaussian):
    """y ~ N(exp(x·θ), σ²): GGN and Hessian differ by Σ (f − y) f xxᵀ / σ²."""

    gaussian_in_theta = False

    def location(self, theta, phi, task):
        return jnp.exp((task.predictors * theta).sum(-1))


CURVED = hb.HierarchicalModel(Exponential(), hb.priors.Gaussian())
SIGMA = 0.5


def curved(seed=3, lift=3.0):
    """Outcomes above exp(x·φ): the exact Hessian is indefinite at φ."""
    rng = np.random.default_rng(seed)
    x, phi = 0.5 * rng.normal(size=(8, 3)), np.array([0.2, -0.1, 0.1])
    return x, np.exp(x @ phi) + lift * rng.random(8), phi


def loss(x, y, theta):
    return 0.5 * np.sum((y - np.exp(x @ theta)) ** 2) / SIGMA**2


def hessian_of_loss(x, y, theta):
    """Differences of the slope, written out."""
    f = np.exp(x @ theta)
    return (x.T * ((f**2 + (f - y) * f) / SIGMA**2)) @ x


def test_generalised_gauss_newton_and_hessian():
    """GGN = JᵀWJ with J by differences; the Hessian by differences of the loss's slope."""
    x, y, phi = curved()
    jacobian = np.array([finite_difference(lambda t, i=i: np.exp(x[i] @ t), phi)
                         for i in range(len(x))])  # fmt: skip
    by_differences = hessian(lambda t: loss(x, y, t), phi, 1e-2)  # error 1e-8 and h⁻² 1e-15
    close(hessian_of_loss(x, y, phi), by_differences, rtol=1e-5, atol=1e-5)
    for kind, expected, error in [
        ("ggn", jacobian.T @ jacobian / SIGMA**2, 1e-10),
        ("hessian", hessian_of_loss(x, y, phi), 1e-11),
    ]:
        found = hb.equivalent_prior(CURVED, (x, y), phi, 1, 1e-3, sigma=SIGMA, curvature=kind)
        values, vectors = found.curvature, found.directions
        matrix = vectors @ np.diag(values) @ vectors.T
        close(matrix, expected, rtol=0, atol=error * np.abs(expected).max())
        # one step: P = I/η − H
        close(found.precision, np.eye(3) * 1e3 - expected, rtol=1e-9, atol=1e-8)
        assert (np.linalg.eigvalsh(expected)[0] < 0) == (kind == "hessian")


@pytest.mark.parametrize("num_steps", [1, 3, 4])
def test_negative_curvature_has_a_proper_prior(num_steps):
    """x < 0: r > 1, p = |λ| r / (r − 1) > |λ|, posterior precision |λ| / (r − 1) > 0."""
    x, y, phi = curved()
    values = np.linalg.eigvalsh(hessian_of_loss(x, y, phi))
    eta = 0.3 / np.abs(values).max()
    found = hb.equivalent_prior(
        CURVED, (x, y), phi, num_steps, eta, sigma=SIGMA, curvature="hessian"
    )
    r = (1 - eta * values) ** num_steps
    negative = values < 0
    assert negative.any()
    close(found.curvature, values, rtol=1e-9)
    close(found.filter, r, rtol=1e-10)
    close(found.strength, values * r / (1 - r), rtol=1e-9)
    assert (found.strength > np.abs(values))[negative].all()
    assert found.status == "proper"
    within = np.linalg.inv(found.posterior_covariance)
    close(np.sort(np.linalg.eigvalsh(within)), np.sort(values / (1 - r)), rtol=1e-9)


def test_steps_away_from_an_optimum_overflow():
    """No 2/λ_max is to blame where curvature is negative."""
    x, y, phi = curved()
    with refuses("diverge", "bends away"):
        hb.equivalent_prior(CURVED, (x, y), phi, 3000, 0.05, sigma=SIGMA, curvature="hessian")


def test_gauss_newton_is_right_to_second_order_only():
    """Residual curvature enters θ_2 at (Kη)²: slope 2 with GGN, 3 with the exact Hessian."""
    x, y, phi = curved()
    f = np.exp(x @ phi)
    slope = x.T @ ((y - f) * f) / SIGMA**2
    exact = hessian_of_loss(x, y, phi)
    etas = np.geomspace(1e-4, 1e-3, 3) / np.abs(np.linalg.eigvalsh(exact)).max()
    for kind, bend, order in [("ggn", (x.T * f**2) @ x / SIGMA**2, 2), ("hessian", exact, 3)]:
        apart, _ = distances(CURVED, (x, y), phi, etas, 4, bend, slope, sigma=SIGMA, curvature=kind)
        slopes = np.diff(np.log(apart)) / np.diff(np.log(etas))
        close(slopes, np.full(2, float(order)), atol=0.05)


# --------------------------------------------------------------- the four measures, in NumPy


def map_estimate(x, y, phi, precision):
    """SciPy's maximum of the log likelihood under N(φ, P⁻¹)."""

    def objective(theta):
        f, gap = x @ theta, theta - phi
        value = np.sum(np.logaddexp(0, f) - y * f) + 0.5 * gap @ precision @ gap
        return value, precision @ gap - slope_at(x, y, theta)

    found = optimize.minimize(
        objective, phi, jac=True, method="trust-exact", options={"gtol": 1e-11},
        hess=lambda t: bend_at(x, t) + precision,
    )  # fmt: skip
    return found.x


def measures(x, y, phi, implied):
    """(missed, linearisation, curvature_drift, predictive_kl) from the definitions."""
    theta, precision = implied.posterior_mean, implied.precision
    there, here = bend_at(x, theta), bend_at(x, phi)
    slope = precision @ (theta - phi) - slope_at(x, y, theta)
    gap = theta - phi - np.linalg.solve(here + precision, slope_at(x, y, phi))
    size = np.linalg.norm(here)
    p = special.expit(x @ map_estimate(x, y, phi, precision))
    q = special.expit(x @ theta)
    kl = special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q)
    return [
        0.5 * slope @ np.linalg.solve(there + precision, slope),
        np.sqrt(gap @ (here + precision) @ gap / len(phi)),
        np.linalg.norm(there - here) / size if size else 0.0,
        kl.mean() if len(kl) else 0.0,
    ]


@pytest.mark.parametrize("share", [0.2, 0.9, 1.8])
def test_measures_of_logistic_tasks(share):
    """Ragged tasks, one empty, one of one row; SciPy's optimum is right to 1e-11 in the slope."""
    x, y, phi = logistic(30, seed=4)
    pieces = [(x[:20], y[:20]), (x[20:20], y[20:20]), (x[20:21], y[20:21]), (x[21:], y[21:])]
    tasks = hb.Tasks.from_arrays(pieces, names=list("abcd"))
    top = max(np.linalg.eigvalsh(bend_at(x_j, phi))[-1] for x_j, _ in pieces)
    found = hb.equivalent_prior(BERNOULLI, tasks, phi, 4, share / top)
    for (x_j, y_j), name in zip(pieces, "abcd", strict=True):
        one = found[name]
        validity = [float(v) for v in vars(one.validity).values()]
        close(validity, measures(x_j, y_j, phi, one), rtol=1e-6, atol=1e-13)
    close(found.table["missed"], found.validity.missed)


def test_validity_is_exact_for_gaussian_tasks():
    rng = np.random.default_rng(0)
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    found = hb.equivalent_prior(
        model, (rng.normal(size=(5, 2)), rng.normal(size=5)), [1.0, 2.0], 3, 0.01, sigma=1.0
    )
    close([float(v) for v in vars(found.validity).values()], np.zeros(4))


def test_steps_that_are_no_map_estimate_any_more_are_reported():
    """Twenty rows of a that all say yes, from where p = 0.007; ten of c and d that all say no.

    The message appears where ½ρ² > 0.5, and only there.
    """
    x = np.tile([1.0, 0.0, 0.0], (30, 1))
    tasks = hb.Tasks.from_arrays(
        [(x[:20], np.ones(20)), (x[:0], x[:0, 0]), (x[:1], np.zeros(1)), (x[:9], np.zeros(9))],
        names=list("abcd"),
    )
    phi = [-5.0, 0.0, 0.0]
    found = hb.equivalent_prior(BERNOULLI, tasks, phi, 4, 0.05)
    missed = found.validity.missed
    assert missed[1:].max() < 0.5 < missed[0] < 1.0
    said = [m for m in found.messages if "no longer a MAP estimate" in m]
    assert len(said) == 1
    assert "1 of 4" in said[0]
    assert "('a')" in said[0]
    assert f"{missed[0]:.2g} nats" in said[0]
    short = hb.equivalent_prior(BERNOULLI, tasks, phi, 4, 0.001)
    assert (short.validity.missed < 0.5).all()
    assert short.messages == ()


def test_no_measure_against_a_map_estimate_without_a_prior():
    """Odd K beyond the optimum: P < 0, and neither ½ρ² nor the predictive KL is defined."""
    x, y, phi = logistic()
    eta = 1.5 / np.linalg.eigvalsh(bend_at(x, phi))[-1]
    found = hb.equivalent_prior(BERNOULLI, (x, y), phi, 3, eta)
    assert found.status == "no prior"
    assert np.isnan(found.validity.missed)
    assert np.isnan(found.validity.predictive_kl)
    assert np.isfinite(found.validity.linearisation)
    assert found.validity.curvature_drift > 0
    assert not any("no longer" in m for m in found.messages)


@pytest.mark.slow
def test_a_posterior_that_is_not_concave_is_reported():
    """The Hessian at θ_K plus P may be indefinite: then no maximum is near, and ½ρ² is inf.

    Four rows whose eigenvalues of H(θ_2) + P are −5.1 and 72 though H(φ) > 0: a seed in 300.
    """
    rng = np.random.default_rng(121)
    x, phi = rng.normal(size=(4, 2)), np.array([0.2, -0.1])
    y = np.exp(x @ phi) + 3 * rng.normal(size=4)
    bend = np.linalg.eigvalsh(hessian_of_loss(x, y, phi))
    assert (bend > 0).all()
    for share, definite in [(0.9, False), (0.01, True)]:
        found = hb.equivalent_prior(
            CURVED, (x, y), phi, 2, share / bend[-1], sigma=SIGMA, curvature="hessian"
        )
        total = hessian_of_loss(x, y, found.posterior_mean) + found.precision
        assert (np.linalg.eigvalsh(total)[0] > 0) == definite
        assert found.status == "proper"
        assert np.isfinite(found.validity.missed) == definite
        assert any("no longer a MAP estimate" in m for m in found.messages) != definite
        assert not np.isnan(found.validity.missed)


def test_steps_that_leave_the_numbers_are_refused():
    """The curvature at φ allows 2/λ; where exp(x·θ) bends more the steps themselves overflow."""
    x, y, phi = np.array([[1.0]]), np.array([1e4]), np.array([0.0])
    tasks = hb.Tasks.from_arrays([(x, y), (x, np.ones(1))], names=["far", "still"])
    with refuses("the steps themselves diverge in 1 of 2", "'far'"):
        hb.equivalent_prior(CURVED, tasks, phi, 5, 1.0, sigma=1.0)
