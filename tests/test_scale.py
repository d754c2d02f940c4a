"""Many tasks: one pass for value and curvature, nothing computed twice, nothing compiled twice."""

import gc
import json
import subprocess
import sys
import weakref
from dataclasses import replace

import jax
import numpy as np
import pytest

import hierbayes as hb
from hierbayes import statistics as statistics_module
from hierbayes.adaptation import Conjugate
from hierbayes.evidence.profile import (
    LANES,
    Curved,
    Plain,
    around,
    profile,
    profile_and_slopes,
    profile_problem,
    with_criterion,
)
from hierbayes.meta.optimum import curvature
from hierbayes.numerics import float64, triangle
from hierbayes.statistics import statistics

MODEL = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())


def simulated(num_tasks, num_rows=4, seed=0, tau=(0.6, 0.4)):
    """Tasks with an intercept and a slope, of 1 to 2 ``num_rows`` rows each."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 2 * num_rows, num_tasks)
    of = np.repeat(np.arange(num_tasks), sizes)
    theta = np.array([1.0, -0.5]) + rng.normal(size=(num_tasks, 2)) * tau
    x = np.column_stack([np.ones(len(of)), rng.normal(size=len(of))])
    y = (theta[of] * x).sum(1) + 0.8 * rng.normal(size=len(of))
    ends = np.cumsum(sizes)[:-1]
    pairs = zip(np.split(x, ends), np.split(y, ends), strict=True)
    return hb.Tasks.from_arrays(list(pairs))


def problem_of(tasks, **criterion):
    return profile_problem(statistics(tasks), MODEL.shape(tasks), **criterion)


ROOT = np.array([[0.7, 0.0], [0.2, 0.5]])


@pytest.mark.parametrize("reml", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sigma", [np.nan, 0.9])
def test_the_pass_gives_value_slopes_and_curvature_of_the_profile(reml, sigma):
    """Sums over chunks against the evidence itself: 1e-12, curvature by differences 1e-8.

    2,500 tasks fill two chunks and a part of a third.
    """
    with float64():
        problem = problem_of(simulated(2500), reml=reml, known_noise=False)
        near = around(problem).at(ROOT)
        for found, expected in zip(near.profile, profile(problem, ROOT), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-11)

        def exact(v):
            value, (slope, _) = profile_and_slopes(problem, v.reshape(2, 2), np.float64(sigma))
            return float(value), np.asarray(slope).ravel()

        def nearby(v):
            value, (slope, _) = near.value_and_slope(v.reshape(2, 2), sigma)
            return value, slope.ravel()

        value, slopes = near.value_and_slope(ROOT, sigma)
        expected, expected_slopes = profile_and_slopes(problem, ROOT, np.float64(sigma))
        assert value == pytest.approx(float(expected), rel=1e-13)
        for a, b in zip(slopes, expected_slopes, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-9)
        every = np.ones(4, bool)
        hessian = curvature(exact, ROOT.ravel(), every)
        bent = curvature(nearby, ROOT.ravel(), every)
        np.testing.assert_allclose(bent, hessian, atol=1e-8 * np.abs(hessian).max())


def test_a_sample_of_chunks_is_an_even_sample_of_the_tasks():
    """The first of n chunks holds every n-th task."""
    tasks = simulated(3 * LANES)
    with float64():
        everything = around(problem_of(tasks, reml=False, known_noise=False))
        assert isinstance(everything, Curved)
        assert everything.num_chunks == 3
        first = everything.sample(1).at(ROOT).sums
        third = tasks.take(np.arange(0, 3 * LANES, 3))
        thirds = around(problem_of(third, reml=False, known_noise=False))
        assert isinstance(thirds, Curved)
        own = thirds.at(ROOT).sums
    assert first.num_rows == third.num_rows
    assert first.log_det == pytest.approx(own.log_det, rel=1e-12)
    np.testing.assert_allclose(first.mm, own.mm, rtol=1e-12)


def test_statistics_on_a_device_give_the_same_problem():
    """Whitening by sums over tasks against Householder's QR on the host."""
    tasks = simulated(2000)
    with float64():
        shape, on_host = MODEL.shape(tasks), statistics(tasks)
        there = jax.device_put(on_host)
        found = around(profile_problem(there, shape, reml=True, known_noise=False)).at(ROOT)
        expected = around(profile_problem(on_host, shape, reml=True, known_noise=False)).at(ROOT)
    for a, b in zip(found.profile, expected.profile, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)


@pytest.mark.parametrize(
    "tau",
    [(0.6, 0.0), *(pytest.param(t, marks=pytest.mark.slow) for t in ((0.6, 0.4), (0.0, 0.0)))],
    ids=str,
)
def test_the_estimate_is_the_one_without_shortcuts(tau, monkeypatch):
    """5,000 tasks by samples and single passes, against quasi-Newton on the evidence itself."""
    tasks = simulated(5000, tau=tau, seed=3)
    fast = hb.empirical_bayes(MODEL, tasks, num_draws=1, num_chains=1)
    other = replace(tasks)  # nothing is kept with these
    monkeypatch.setattr("hierbayes.evidence.profile.fits", lambda *sizes: False)
    slow = hb.empirical_bayes(MODEL, other, num_draws=1, num_chains=1)
    assert fast.log_evidence == pytest.approx(slow.log_evidence, rel=1e-12)
    for name, value in slow.phi.items():
        np.testing.assert_allclose(fast.phi[name], value, rtol=1e-6, atol=1e-6)
    for name, value in slow.standard_errors.items():
        np.testing.assert_allclose(fast.standard_errors[name], value, rtol=1e-5)


def test_many_coefficients_go_the_plain_way():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(9, 6)), rng.normal(size=9)) for _ in range(30)]
    tasks = hb.Tasks.from_arrays(pairs)
    with float64():
        plain = around(problem_of(tasks, reml=False, known_noise=False))
        assert isinstance(plain, Plain)
        reml = with_criterion(plain, reml=True, known_noise=False)
        near = reml.at(np.eye(6))
        assert near.value_and_slope(np.eye(6))[0] == pytest.approx(float(near.profile.log_evidence))


# ------------------------------------------------------------------------ once, not twice


def test_statistics_are_formed_once_and_leave_with_their_tasks():
    tasks = simulated(50)
    made = statistics(tasks)
    assert statistics(tasks) is made
    assert statistics(replace(tasks)) is not made
    with pytest.raises(ValueError, match="read-only"):
        made.y[0, 0] = 1.0
    hb.empirical_bayes(MODEL, tasks, num_draws=1)
    gone = weakref.ref(tasks)
    del tasks
    gc.collect()
    assert gone() is None


def compilations(function):
    """How many programs JAX compiles in a call."""
    found = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(found)


@pytest.mark.slow
def test_other_data_of_one_shape_compile_nothing():
    def fit(num_tasks, seed):
        return lambda: hb.empirical_bayes(MODEL, simulated(num_tasks, seed=seed), num_draws=1)

    jax.clear_caches()
    assert compilations(fit(1500, 0)) > 0, "the control"
    assert compilations(fit(1500, 1)) == 0
    assert compilations(fit(1501, 2)) == 0, "on one rung of the ladder, 1,536"
    assert compilations(fit(1700, 2)) > 0, "shapes decide"


# ------------------------------------------------------------------ the parts, at a size


@pytest.mark.parametrize("num_rows", [2, 10])
def test_reflections_over_all_tasks_are_lapacks_triangles(num_rows, monkeypatch):
    """RᵀR to 1e-14 of its diagonal; ill-scaled columns, tasks of one row, constant columns."""
    rng = np.random.default_rng(num_rows)
    pairs = []
    for n in rng.integers(1, 2 * num_rows, 400):
        x = np.column_stack([np.ones(n), 1e6 + rng.normal(size=n), 1e-6 * rng.normal(size=n)])
        pairs.append((x, rng.normal(size=n)))
    tasks = hb.Tasks.from_arrays(pairs)
    found = statistics(tasks)
    monkeypatch.setattr(statistics_module, "FEW_TASKS", 10**9)
    expected = statistics(replace(tasks))

    def products(s):
        r = np.concatenate([s.x, s.y[:, None]], axis=1)
        return np.einsum("mkj,mlj->klj", r, r)

    ours, lapacks = products(found), products(expected)
    size = np.sqrt(np.einsum("kkj->kj", lapacks))
    assert (np.abs(ours - lapacks) <= 2e-14 * size[:, None] * size[None]).all()
    assert not found.x[3:].any()


def test_a_triangle_by_blocks_is_one_triangle():
    rows = np.random.default_rng(0).normal(size=(12_345, 3))
    found, expected = triangle(rows), np.linalg.qr(rows, mode="r")
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-10)


def test_posteriors_by_chunks_are_posteriors_one_by_one():
    tasks = simulated(4 * LANES + 5)
    phi = {"mu": np.array([1.0, -0.5]), "tau": np.array([0.6, 0.0]), "corr": np.eye(2),
           "sigma": np.asarray(0.8)}  # fmt: skip
    found = Conjugate()(MODEL, tasks, phi)
    for part in (np.arange(1000), np.arange(4 * LANES - 500, 4 * LANES + 5)):
        alone = Conjugate()(MODEL, tasks.take(part), phi)
        assert found.covariance is not None
        assert alone.covariance is not None
        np.testing.assert_allclose(found.mean[part], alone.mean, rtol=1e-13)
        np.testing.assert_allclose(found.covariance[part], alone.covariance, rtol=1e-13, atol=1e-16)


# ----------------------------------------------------------------------- compiled programs

COUNT_HITS = """
import json, sys, jax
found = []
jax.monitoring.register_event_listener(lambda name, **more: found.append(name))
import hierbayes as hb
before = jax.config.jax_compilation_cache_dir
jax.jit(lambda x: x + 1)(1.0)  # JAX decides at its first program whether there is a cache
folder = hb.compilation_cache(sys.argv[1])
model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(), known_se="se")
hb.complete_pooling(model, tasks)
hb.compilation_cache(False)
hits, misses = (found.count(f"/jax/compilation_cache/cache_{k}") for k in ("hits", "misses"))
print(json.dumps([hits, misses, jax.config.jax_compilation_cache_dir == before]))
"""


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    def process():
        command = [sys.executable, "-c", COUNT_HITS, str(tmp_path / "new" / "folder")]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

    first_hits, first_misses, as_found = process()
    assert first_misses >= 2, "least squares and the posterior"
    assert as_found
    hits, misses, _ = process()
    assert misses == 0
    assert hits == first_hits + first_misses
