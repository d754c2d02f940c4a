r"""The equivalent prior without d × d matrices, against the one with them.

Tasks of d = 60 coefficients and 0 to 30 rows are small enough for both ways. Rounding leaves about
1e-15 of the largest entry in products; 1e-8 is what the project promises.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from assertions import close, refuses
from scipy import special

import hierbayes as hb
from hierbayes.equivalence import matrix_free
from hierbayes.equivalence.matrix_free import MatrixFreePrior
from hierbayes.likelihoods import Gaussian

D = 60
MODELS = {
    "bernoulli": (hb.HierarchicalModel(hb.likelihoods.Bernoulli(), hb.priors.Gaussian()), None),
    "gaussian": (hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian()), 2.0),
}


def wide():
    """15 and 30 rows, none, 9, and 20 copies of one row: ranks 15, 30, 0, 9, 1."""
    rng = np.random.default_rng(0)
    designs = [rng.normal(size=(n, D)) for n in (15, 30, 0, 9)]
    designs.append(np.repeat(rng.normal(size=(1, D)) / 5, 20, axis=0))
    tasks = hb.Tasks.from_arrays(
        [(x, rng.integers(0, 2, len(x)) * 1.0) for x in designs], names=list("abcde")
    )
    return tasks, 0.1 * rng.normal(size=D)


TASKS, PHI = wide()
SCALES = np.random.default_rng(1).uniform(0.5, 1.5, D)
VECTORS = np.random.default_rng(2).normal(size=(5, D))


def both(name, num_steps=4, step_size=0.01, *, rank=40, **more):
    model, sigma = MODELS[name]
    dense = hb.equivalent_prior(model, TASKS, PHI, num_steps, step_size, sigma=sigma, **more)
    free = hb.equivalent_prior(
        model, TASKS, PHI, num_steps, step_size, sigma=sigma, rank=rank, **more
    )
    assert isinstance(free, MatrixFreePrior)
    return dense, free


@functools.cache
def made(name):
    """Both, as several tests look at them."""
    return both(name)


def assert_products(free, dense, vectors=VECTORS):
    for name in ("precision", "covariance", "posterior_covariance"):
        expected = np.einsum("jkl,jl->jk", getattr(dense, name), vectors)
        found = getattr(free, f"{name}_times")(vectors)
        close(found, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "more"),
    [
        pytest.param("bernoulli", {}, marks=pytest.mark.slow),
        pytest.param(
            "bernoulli", dict(preconditioner=SCALES, curvature="hessian", rank=59),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "bernoulli", dict(null="pinned", momentum=0.3, step_size=0.003), marks=pytest.mark.slow
        ),
        pytest.param(
            "gaussian", dict(preconditioner=SCALES, momentum=0.3, step_size=0.003),
            marks=pytest.mark.slow,
        ),
        ("gaussian", dict(null="pinned")),
        pytest.param(
            "gaussian", dict(step_size=[0.01, 0.005, 0.001, 0.02]), marks=pytest.mark.slow
        ),
        pytest.param(
            "gaussian", dict(num_steps=None, step_size=None, time=0.03), marks=pytest.mark.slow
        ),
    ],
    ids=["Bernoulli", "scaled, Hessian", "pinned, momentum", "Gaussian scaled, momentum",
         "Gaussian pinned", "schedule", "flow"],
)  # fmt: skip
def test_both_ways_agree(name, more):
    rank = more.get("rank", 40)
    dense, free = both(name, **(more | {"rank": rank}))
    close(free.posterior_mean, dense.posterior_mean, rtol=1e-9, atol=1e-9)
    close(free.location, dense.location)
    assert_products(free, dense)
    assert free.status.tolist() == dense.status.tolist()
    close(free.effective_parameters, dense.effective_parameters, rtol=1e-9, atol=1e-12)
    ends = ["largest_curvature", "least_shrinkage", "most_shrinkage"]
    if "preconditioner" not in more:
        # with one, precisions differ among the directions without curvature, whose basis is free
        ends += ["weakest_precision", "strongest_precision"]
    close(free.table[ends], dense.table[ends], rtol=1e-9, atol=1e-9)
    for measure in ("missed", "linearisation", "predictive_kl"):
        # the two optimisers of the MAP estimate stop within 1e-10 nats of it, 1e-5 sds
        close(getattr(free.validity, measure), getattr(dense.validity, measure), rtol=1e-5,
              atol=1e-12)  # fmt: skip
    # 64 probes: the relative error of a squared norm is at most √2 / 8, half of it in the norm
    close(free.validity.curvature_drift, dense.validity.curvature_drift, rtol=0.2, atol=1e-12)


@pytest.mark.slow
def test_the_drift_is_the_same_in_every_call_and_an_estimate():
    (dense, first), (_, second) = made("bernoulli"), both("bernoulli")
    close(first.validity.curvature_drift, second.validity.curvature_drift, rtol=1e-12)
    assert np.abs(first.validity.curvature_drift - dense.validity.curvature_drift).max() > 1e-6


def test_one_task_by_name_and_as_a_pair():
    _, free = made("gaussian")
    model, sigma = MODELS["gaussian"]
    x, y = TASKS.predictors[:15], TASKS.outcome[:15]
    alone = hb.equivalent_prior(model, (x, y), PHI, 4, 0.01, sigma=sigma, rank=40)
    for one in (free["a"], alone):
        close(one.posterior_mean, free.posterior_mean[0], rtol=1e-9)
        close(one.precision_times(VECTORS[0]), free.precision_times(VECTORS[0])[0], rtol=1e-9)
        close(one.covariance_times(VECTORS[0]), free.covariance_times(VECTORS[0])[0], rtol=1e-9)
        assert one.table["rows"].tolist() == [15]
        assert one.draws(4).shape == (4, D)


def test_draws():
    """Along 20 directions: variance vᵀΣv within 4 standard errors, √(2/4000) of it, mean θ_K."""
    _, free = made("gaussian")
    draws = free.draws(4000, seed=1)
    assert draws.shape == (4000, 5, D)
    for v in np.random.default_rng(3).normal(size=(20, D)):
        along = draws @ v
        variance = free.posterior_covariance_times(v) @ v
        error = (along.mean(0) - free.posterior_mean @ v) / np.sqrt(variance / 4000)
        assert np.abs(error).max() < 4.5  # of 100
        assert np.abs(along.var(0) / variance - 1).max() < 4.5 * np.sqrt(2 / 4000)


def test_no_matrix_is_given_out():
    _, free = made("gaussian")
    for name in ("precision", "covariance", "posterior_covariance"):
        with refuses(f"{name}_times", "not formed"):
            getattr(free, name)


# --------------------------------------------------------------------- directions left out


def test_directions_left_out_are_taken_as_flat_and_reported():
    """P of rank 5: the dense one with all but the leading five λ at 0, from NumPy."""
    model, sigma = MODELS["gaussian"]
    free = hb.equivalent_prior(model, TASKS, PHI, 4, 0.01, sigma=sigma, rank=5)
    x = TASKS.predictors[:15] / sigma
    values, vectors = np.linalg.eigh(x.T @ x)
    r = (1 - 0.01 * values[-5:]) ** 4
    p = values[-5:] * r / (1 - r)
    rest = 1 / 0.04
    expected = rest * np.eye(D) + vectors[:, -5:] @ np.diag(p - rest) @ vectors[:, -5:].T
    close(free.precision_times(VECTORS)[0], expected @ VECTORS[0], rtol=0, atol=1e-9 * rest * 9)
    close(free.curvature[0], values[-5:], rtol=1e-10)
    said = [m for m in free.messages if "pass a larger rank" in m]
    assert len(said) == 1
    assert "3 of 5" in said[0]  # the 20 rows of task e are one direction
    assert "'a', 'b', 'd'" in said[0]
    # P is no longer the right one, and the measures see it in Gaussian tasks too
    theta, y = free.posterior_mean[0], TASKS.outcome[:15] / sigma
    slope = expected @ (theta - PHI) - x.T @ (y - x @ theta)
    missed = 0.5 * slope @ np.linalg.solve(x.T @ x + expected, slope)
    close(free.validity.missed[0], missed, rtol=1e-9)
    assert free.validity.missed[[0, 1, 3]].min() > 1e-3
    close(free.validity.missed[[2, 4]], np.zeros(2), atol=1e-12)
    assert made("gaussian")[1].messages == ()


def test_steps_without_a_prior_or_that_diverge():
    model, sigma = MODELS["gaussian"]
    top = np.linalg.eigvalsh(TASKS.predictors[15:45].T @ TASKS.predictors[15:45] / sigma**2)[-1]
    free = hb.equivalent_prior(model, TASKS, PHI, 3, 1.5 / top, sigma=sigma, rank=40)
    assert free.status[1] == "no prior"
    assert np.isnan(free.covariance_times(VECTORS)[1]).all()
    assert np.isfinite(free.posterior_covariance_times(VECTORS)).all()
    assert np.isfinite(free.covariance_times(VECTORS)[[2, 4]]).all()
    with refuses("diverge", "'b'", f"2/λ_max = {2 / top:.3g}"):
        hb.equivalent_prior(model, TASKS, PHI, 3, 2.1 / top, sigma=sigma, rank=40)


@dataclass(frozen=True)
class Exponential(Gaussian):
    """y ~ N(exp(x·θ), σ²), whose exact Hessian may be indefinite."""

    gaussian_in_theta = False

    def location(self, theta, phi, task):
        return jnp.exp((task.predictors * theta).sum(-1))


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "definite"), [(121, False), (116, False), (0, True)])
def test_negative_curvature(seed, definite):
    """Four rows in two of five dimensions: H has rank 2, with λ < 0 at φ for seeds 0 and 116.

    For seeds 121 and 116 the posterior under P is not concave at θ_K: ½ρ² is inf both ways.
    """
    model = hb.HierarchicalModel(Exponential(), hb.priors.Gaussian())
    rng = np.random.default_rng(seed)
    x = np.hstack([rng.normal(size=(4, 2)), np.zeros((4, 3))])
    phi = np.array([0.2, -0.1, 1.0, 2.0, 3.0])
    y = np.exp(x @ phi) + 3 * rng.normal(size=4)
    f = np.exp(x @ phi)
    bend = np.linalg.eigvalsh((x.T * (f**2 + (f - y) * f) / 0.25) @ x)
    eta = (0.9 if not definite else 0.02) / np.abs(bend).max()
    more = dict(num_steps=1 if seed == 116 else 2, step_size=eta, sigma=0.5, curvature="hessian")
    dense = hb.equivalent_prior(model, (x, y), phi, **more)
    free = hb.equivalent_prior(model, (x, y), phi, rank=4, **more)
    for name in ("precision", "posterior_covariance"):
        expected = getattr(dense, name) @ VECTORS[0, :5]
        found = getattr(free, f"{name}_times")(VECTORS[0, :5])
        close(found, expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    assert np.isfinite(dense.validity.missed) == definite
    if definite:
        close(free.validity.missed, dense.validity.missed, rtol=1e-6)
    else:
        assert np.isposinf(free.validity.missed)
        assert any("no longer a MAP estimate" in m for m in free.messages)
    close(free.validity.linearisation, dense.validity.linearisation, rtol=1e-8, atol=1e-14)


# ------------------------------------------------------------------------- large and wrong


def test_two_thousand_coefficients():
    """Without asking: (H + P) Σ_K v = v, with H = Xᵀ diag(p (1 − p)) X applied in NumPy."""
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(25, 2000)) / 10, rng.integers(0, 2, 25) * 1.0
    model, _ = MODELS["bernoulli"]
    phi = 0.1 * rng.normal(size=2000)
    found = hb.equivalent_prior(model, (x, y), phi, 5, 0.05)
    assert isinstance(found, MatrixFreePrior)
    p = special.expit(x @ phi)
    v = rng.normal(size=2000)
    spread = found.posterior_covariance_times(v)
    back = (x.T * (p * (1 - p))) @ (x @ spread) + found.precision_times(spread)
    close(back, v, rtol=0, atol=1e-6)
    close(found.covariance_times(found.precision_times(v)), v, rtol=0, atol=1e-6)
    theta = phi
    for _ in range(5):
        theta = theta + 0.05 * x.T @ (y - special.expit(x @ theta))
    close(found.posterior_mean, theta, rtol=1e-9, atol=1e-12)
    assert found.messages == ()
    assert 0 < found.validity.missed < 0.5


@pytest.mark.parametrize(
    ("large", "kind"), [(D, hb.equivalence.EquivalentPrior), (D - 1, MatrixFreePrior)]
)
def test_a_matrix_is_formed_up_to_256_coefficients(large, kind, monkeypatch):
    assert matrix_free.LARGE == 256
    monkeypatch.setattr("hierbayes.equivalence.prior.LARGE", large)
    model, sigma = MODELS["gaussian"]
    assert isinstance(hb.equivalent_prior(model, TASKS, PHI, 4, 0.01, sigma=sigma), kind)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (dict(rank=0), ("rank must be a positive integer", "60", "0")),
        (dict(rank=60), ("rank must be", "60")),
        (dict(rank=2.5), ("rank must be", "2.5")),
        (dict(rank=5, preconditioner=np.eye(D)), ("(60, 60)", "diagonal", "(60,)")),
        (dict(rank=5, preconditioner=[np.eye(D)] * 2), ("diagonal",)),
        (dict(rank=5, preconditioner=-SCALES), ("positive numbers",)),
        (dict(rank=5, preconditioner=np.full(D, np.nan)), ("positive numbers",)),
    ],
)
def test_bad_input_is_refused_in_words(more, words):
    model, sigma = MODELS["gaussian"]
    with refuses(*words):
        hb.equivalent_prior(model, TASKS, PHI, 2, 1e-3, sigma=sigma, **more)


# ---------------------------------------------------------------------- conjugate gradients


def test_conjugate_gradients():
    rng = np.random.default_rng(6)
    axes = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    target = rng.normal(size=30)
    for low in (0.5, -0.5):
        matrix = axes @ np.diag(np.linspace(low, 4.0, 30)) @ axes.T
        found = matrix_free.conjugate_gradients(lambda v, m=matrix: m @ v, target)
        if low > 0:
            close(found, target @ np.linalg.solve(matrix, target), rtol=1e-11)
        else:
            assert found == np.inf
    assert matrix_free.conjugate_gradients(lambda v: v, np.zeros(3)) == 0.0


def test_conjugate_gradients_that_do_not_converge():
    """Condition 1e12 over 2,000 directions: 300 products are not enough, and NaN says so."""
    spectrum = np.geomspace(1.0, 1e12, 2000)
    assert np.isnan(matrix_free.conjugate_gradients(lambda v: spectrum * v, np.ones(2000)))


def test_measures_that_are_not_known_are_reported(monkeypatch):
    monkeypatch.setattr(matrix_free, "MAX_PRODUCTS", 1)
    model, _ = MODELS["bernoulli"]
    free = hb.equivalent_prior(model, TASKS, PHI, 4, 0.01, rank=40)
    unknown = np.isnan(free.validity.missed)
    assert unknown.tolist() == [True, True, False, True, True]  # c has no rows
    assert any("conjugate gradients did not converge" in m for m in free.messages)
