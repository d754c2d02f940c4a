"""T12 of methods.md: the collapsed evidence and posterior are those of dense Gaussian algebra.

Rung (b) of style.md: independent computations. ``dense`` is SciPy's multivariate normal;
``rational`` is exact arithmetic on the same numbers, for designs where dense algebra in float64
loses digits itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import close, gradient
from scipy import linalg, stats

import hierbayes as hb
from hierbayes.adaptation import Conjugate
from hierbayes.adaptation.exact import collapse
from hierbayes.evidence import Exact
from hierbayes.evidence.profile import profile, profile_and_slopes, profile_problem
from hierbayes.numerics import float64
from hierbayes.statistics import statistics

SIZES = (4, 0, 7, 1, 2, 6, 9, 3)
"""Rows of each task: none, one, fewer than coefficients, more."""


@dataclass(frozen=True)
class Case:
    """A model, tasks and a φ with every feature asked for."""

    model: hb.HierarchicalModel
    tasks: hb.Tasks
    phi: dict[str, Any]

    @property
    def evidence(self) -> np.ndarray:
        return Exact()(self.model, self.tasks, self.phi)


def case(
    d: int, *, shared: int = 0, level: int = 0, slots: tuple[str, ...] = (),
    correlated: Any = True, zero_mean: tuple[str, ...] = (), shift: float = 0.0, seed: int = 0,
) -> Case:  # fmt: skip
    """Random tasks; ``shift`` is the mean of every covariate but the first, the intercept."""
    rng = np.random.default_rng([seed, d, shared, level])
    num_rows, num_tasks = sum(SIZES), len(SIZES)
    x = rng.normal(size=(num_rows, d)) + shift
    x[:, 0] = 1.0
    x[4:11, -1] = x[4, -1]  # the task of seven rows does not determine its last coefficient
    z = rng.normal(size=(num_rows, shared))
    y = x @ (1.0 + rng.normal(size=d)) + z.sum(1) + rng.normal(size=num_rows)
    cut = np.cumsum(SIZES)[:-1]
    tasks = hb.Tasks.from_arrays(
        list(zip(np.split(x, cut), np.split(y, cut), strict=True)),
        shared=np.split(z, cut), task_predictors=rng.normal(size=(num_tasks, level)),
    )  # fmt: skip
    tasks = replace(tasks, slots={name: 0.5 + rng.random(num_rows) for name in slots})
    known = "known_se" in slots
    prior = hb.priors.Gaussian(correlated, zero_mean)
    phi: dict[str, Any] = {
        "mu": np.where([c in zero_mean for c in tasks.coef], 0.0, 1.0 + rng.normal(size=d)),
        "tau": 0.3 + rng.random(d),
    }
    if d > 1 and correlated is not False:
        spread = rng.normal(size=(d, 2 * d))
        corr = np.corrcoef(spread)
        phi["corr"] = np.eye(d)
        for block in prior.blocks(tasks.coef):
            phi["corr"][np.ix_(block, block)] = corr[np.ix_(block, block)]
    if shared:
        phi["beta"] = rng.normal(size=shared)
    if level:
        phi["gamma"] = rng.normal(size=(d, level))
    if not known:
        phi["sigma"] = np.asarray(0.8)
    return Case(hb.HierarchicalModel(hb.likelihoods.Gaussian(known), prior), tasks, phi)


VARIANTS = {
    "d=6": dict(d=6),  # beyond the unrolled algebra: LAPACK's path
    "d=2, independent, shared": dict(d=2, correlated=False, shared=2),
    "d=3, blocks": dict(d=3, correlated=[("x0", "x2")], zero_mean=("x1",)),
    "d=3, everything": dict(d=3, shared=1, level=1, slots=("offset", "weight")),
    "d=1, known_se and weight": dict(d=1, level=2, slots=("known_se", "weight", "offset")),
}


QUICK = ("d=3, everything", "d=1, known_se and weight")
"""Together they have every feature of the data; those of the prior go with the slow tests."""


@pytest.fixture(
    params=[
        pytest.param(made, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, made in VARIANTS.items()
    ],
    scope="module",
)
def variant(request: pytest.FixtureRequest) -> Case:
    return case(**request.param)


# --------------------------------------------------------- independent computations


def parts(c: Case, j: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(X_j, residual at the prior's mean, Σ, noise variances) of one task, from the definition."""
    t, phi = c.tasks.take([j]), c.phi
    location = phi["mu"] + (phi["gamma"] @ t.task_predictors[0] if "gamma" in phi else 0.0)
    mean = t.predictors @ location + t.slots.get("offset", 0.0)
    mean = mean + (t.shared @ phi["beta"] if "beta" in phi else 0.0)
    noise = (
        t.slots["known_se"] ** 2
        if "known_se" in t.slots
        else np.full(t.num_rows, phi.get("sigma")) ** 2
    )
    noise = noise / t.slots.get("weight", 1.0)
    corr = phi.get("corr", np.eye(len(phi["tau"])))
    return t.predictors, t.outcome - mean, np.outer(phi["tau"], phi["tau"]) * corr, noise


def dense(c: Case) -> np.ndarray:
    """log N(y_j; X_j μ_j + Z_j β + o_j, X_j Σ X_jᵀ + diag(s²)) by SciPy."""
    values = np.zeros(c.tasks.num_tasks)
    for j in np.flatnonzero(c.tasks.sizes):
        x, residual, sigma, noise = parts(c, j)
        covariance = x @ sigma @ x.T + np.diag(noise)
        values[j] = stats.multivariate_normal.logpdf(residual, cov=covariance)
    return values


def rational(c: Case) -> np.ndarray:
    """The same by Gaussian elimination in exact fractions; only the last logarithm rounds."""
    fraction = np.vectorize(Fraction, otypes=[object])
    t, phi = c.tasks, {k: fraction(v) for k, v in c.phi.items()}
    values = np.zeros(t.num_tasks)
    covariance = np.outer(phi["tau"], phi["tau"]) * phi["corr"]
    for j in np.flatnonzero(t.sizes):
        one = t.take([j])
        x, n = fraction(one.predictors), int(t.sizes[j])
        left = fraction(one.outcome) - x.dot(phi["mu"])
        rows = x.dot(covariance).dot(x.T)
        rows[np.arange(n), np.arange(n)] += phi["sigma"].item() ** 2
        determinant, squares = Fraction(1), Fraction(0)
        for k in range(n):
            determinant *= rows[k, k]
            squares += left[k] ** 2 / rows[k, k]
            for i in range(k + 1, n):
                factor = rows[i, k] / rows[k, k]
                rows[i, k:] = rows[i, k:] - factor * rows[k, k:]
                left[i] = left[i] - factor * left[k]
        log_det = math.log(determinant.numerator) - math.log(determinant.denominator)
        values[j] = -0.5 * (n * math.log(2 * math.pi) + log_det + float(squares))
    return values


# ------------------------------------------------------------------------- evidence


def test_evidence_is_the_dense_normal_density(variant):
    """1e-9 of values up to a hundred: thousands of roundings, and SciPy's own eigenvalue cut."""
    found = variant.evidence
    close(found, dense(variant), rtol=1e-9, atol=1e-9)
    close(found[1], 0.0, atol=1e-14)  # a task without rows says nothing


def test_the_comparison_notices_a_variance_taken_for_a_deviation():
    c = case(2)
    wrong = replace(c, phi=c.phi | {"tau": c.phi["tau"] ** 2})
    assert np.abs(wrong.evidence - dense(c)).max() > 0.01


@pytest.mark.parametrize(("shift", "rtol"), [(0.0, 1e-12), (50.0, 1e-12), (1e4, 1e-10)])
def test_covariates_far_from_zero_cost_no_digits(shift, rtol):
    """Exact fractions as the reference.

    At 1e4 the residual of outcomes of order 1e4 keeps 1e4 · 2e-16 = 2e-12; raw cross products
    XᵀX would lose eight more digits.
    """
    c = case(3, shift=shift)
    close(c.evidence, rational(c), rtol=rtol, atol=rtol)


def pack(phi: dict[str, Any]) -> tuple[np.ndarray, Any]:
    """φ as one vector (correlations below the diagonal once) and the way back."""
    names = [name for name in phi if name != "corr"]
    d = len(phi["tau"])
    i, k = np.tril_indices(d, -1)
    vector = [np.ravel(phi[name]) for name in names]
    vector += [phi["corr"][i, k]] if "corr" in phi else []

    def unpack(v: Any) -> dict[str, Any]:
        out, at = {}, 0
        for name in names:
            size = np.size(phi[name])
            out[name] = v[at : at + size].reshape(np.shape(phi[name]))
            at += size
        if "corr" in phi:
            lower = jnp.zeros((d, d)).at[i, k].set(v[at:])
            out["corr"] = lower + lower.T + jnp.eye(d)
        return out

    return np.concatenate(vector), unpack


def test_gradients_in_every_phi_are_finite_differences(variant):
    with float64():
        at, unpack = pack(variant.phi)
        stats_ = statistics(variant.tasks)
        total = jax.jit(jax.value_and_grad(
            lambda v: collapse(stats_, variant.model.prior, unpack(v)).log_normaliser.sum()
        ))  # fmt: skip
        claimed = np.asarray(total(at)[1])
        gradient(lambda v: float(total(v)[0]), at, claimed)
        assert (np.abs(claimed) > 1e-6).sum() >= len(at) - len(variant.model.prior.zero_mean) - 3


# ------------------------------------------------------------------------ posterior


def dense_posterior(c: Case, j: int) -> tuple[np.ndarray, np.ndarray]:
    """μ_j + ΣXᵀV⁻¹r and Σ − ΣXᵀV⁻¹XΣ."""
    x, residual, sigma, noise = parts(c, j)
    t = c.tasks.take([j])
    location = c.phi["mu"] + (c.phi["gamma"] @ t.task_predictors[0] if "gamma" in c.phi else 0.0)
    gain = np.linalg.solve(x @ sigma @ x.T + np.diag(noise), x @ sigma).T
    return location + gain @ residual, sigma - gain @ x @ sigma


@pytest.mark.parametrize("zero", [False, True], ids=["tau > 0", "one tau = 0"])
def test_posterior_is_dense_algebra(variant, zero):
    """1e-9 as above; where τ = 0 the posterior is a point in that direction, and finite."""
    c = variant
    if zero:
        tau = c.phi["tau"].copy()
        tau[-1] = 0.0
        c = replace(c, phi=c.phi | {"tau": tau})
    found = Conjugate()(c.model, c.tasks, c.phi)
    assert found.covariance is not None
    for j in range(c.tasks.num_tasks):
        mean, covariance = dense_posterior(c, j)
        close(found.mean[j], mean, rtol=1e-9, atol=1e-9)
        close(found.covariance[j], covariance, rtol=1e-9, atol=1e-9)
        if zero:
            assert not found.covariance[j, -1].any()


def test_no_spread_at_all_leaves_the_prior_mean():
    c = case(2)
    c = replace(c, phi=c.phi | {"tau": np.zeros(2)})
    found = Conjugate()(c.model, c.tasks, c.phi)
    close(found.mean, np.tile(c.phi["mu"], (len(SIZES), 1)), rtol=1e-15)
    assert np.isfinite(c.evidence).all()


def test_draws_have_the_moments_of_the_posterior():
    """4,000 exact draws: means within 4.5 standard errors (16 entries), sds within 10 %.

    The standard error of these sds is 1.1 %.
    """
    c = case(2)
    phis = {name: np.broadcast_to(v, (4000, *np.shape(v))) for name, v in c.phi.items()}
    draws = Conjugate().draws(c.model, c.tasks, phis, jax.random.key(0))
    exact = Conjugate()(c.model, c.tasks, c.phi)
    sd = np.sqrt(np.diagonal(exact.covariance, axis1=1, axis2=2))
    assert (np.abs(draws.mean(0) - exact.mean) <= 4.5 * sd / np.sqrt(4000)).all()
    close(draws.std(0), sd, rtol=0.1)


# ------------------------------------------------------------------------ statistics


def test_the_triangle_gives_every_residual_sum_of_squares(rng):
    c = case(3, shared=2, slots=("weight", "offset"))
    s = statistics(c.tasks)
    theta, beta = rng.normal(size=3), rng.normal(size=2)
    found = (
        (s.y - np.einsum("mdj,d->mj", s.x, theta) - np.einsum("mpj,p->mj", s.z, beta)) ** 2
    ).sum(0)
    t = c.tasks
    residual = t.outcome - t.slots["offset"] - t.predictors @ theta - t.shared @ beta
    squares = np.bincount(t.task_of_row, t.slots["weight"] * residual**2, minlength=len(SIZES))
    close(found, squares, rtol=1e-11, atol=1e-11)


def test_the_size_of_the_statistics_does_not_depend_on_the_rows(rng):
    def made(n: int) -> Any:
        pairs = [(rng.normal(size=(n, 2)), rng.normal(size=n)) for _ in range(3)]
        return jax.tree.map(np.shape, statistics(hb.Tasks.from_arrays(pairs)))

    assert made(5) == made(500)


# --------------------------------------------------------------------------- profile


def laid_out(c: Case, root: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(y, F, V/σ²) over all rows at the relative root covariance Λ, rows unscaled."""
    t = c.tasks
    free = c.model.prior.free_mean(t.coef)
    level = t.task_predictors[t.task_of_row]
    moved = (t.predictors[:, :, None] * level[:, None]).reshape(t.num_rows, -1)
    fixed = np.column_stack([t.predictors[:, free], moved, t.shared])
    noise = t.slots.get("known_se", np.ones(t.num_rows)) ** 2 / t.slots.get("weight", 1.0)
    same = t.task_of_row[:, None] == t.task_of_row
    variance = same * (t.predictors @ root @ root.T @ t.predictors.T) + np.diag(noise)
    return t.outcome - t.slots.get("offset", 0.0), fixed, variance


def problem_of(c: Case, reml: bool) -> tuple[Any, np.ndarray]:
    shape = c.model.shape(c.tasks)
    known = "sigma" not in shape.parameters
    root = np.linalg.cholesky(
        np.outer(c.phi["tau"], c.phi["tau"]) * c.phi.get("corr", np.eye(len(c.phi["tau"])))
    )
    return profile_problem(statistics(c.tasks), shape, reml=reml, known_noise=known), root


@pytest.mark.parametrize("reml", [False, True], ids=["ml", "reml"])
def test_the_profiled_criterion_is_dense_generalised_least_squares(variant, reml):
    """ML against SciPy's density at b̂ and σ̂; REML against the density of error contrasts Kᵀy.

    K is an orthonormal basis orthogonal to F, so Kᵀy is free of b, and ∫ p(y | b) db equals its
    density times |FᵀF|^(−1/2). Values up to 100 in float64: 1e-9.
    """
    with float64():
        problem, root = problem_of(variant, reml)
        found = jax.tree.map(np.asarray, profile(problem, root))
    y, fixed, variance = laid_out(variant, root)
    weighted = np.linalg.solve(variance, fixed)
    effects = np.linalg.solve(fixed.T @ weighted, weighted.T @ y)
    residual = y - fixed @ effects
    squares = residual @ np.linalg.solve(variance, residual)
    known = "sigma" not in variant.phi
    sigma2 = 1.0 if known else squares / (len(y) - fixed.shape[1] * reml)
    close(found.fixed, effects, rtol=1e-8, atol=1e-9)
    close(found.sigma**2, sigma2, rtol=1e-9)
    close(found.covariance, sigma2 * np.linalg.inv(fixed.T @ weighted), rtol=1e-7, atol=1e-10)
    if reml:
        contrasts = linalg.null_space(fixed.T)
        covariance = sigma2 * contrasts.T @ variance @ contrasts
        expected = stats.multivariate_normal.logpdf(contrasts.T @ y, cov=covariance)
        expected -= 0.5 * np.linalg.slogdet(fixed.T @ fixed)[1]
    else:
        expected = stats.multivariate_normal.logpdf(residual, cov=sigma2 * variance)
    close(found.log_evidence, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    [pytest.param("d=2, independent, shared", marks=pytest.mark.slow), "d=1, known_se and weight"],
)
def test_the_profiles_slopes_are_finite_differences(name):
    c = case(**VARIANTS[name])
    with float64():
        problem, root = problem_of(c, reml=True)
        sigma = np.float64(0.9)
        _, (by_root, by_sigma) = profile_and_slopes(problem, root, sigma)
        gradient(lambda r: profile(problem, r, sigma).log_evidence, root, by_root)
        gradient(lambda s: profile(problem, root, s[0]).log_evidence, [0.9], [by_sigma])
        if "sigma" in c.phi:  # with σ maximised out its slope at the maximum is zero
            best = profile(problem, root)
            _, (at_best, flat) = profile_and_slopes(problem, root, best.sigma)
            _, (profiled, _) = profile_and_slopes(problem, root, np.float64(np.nan))
            close(profiled, at_best, rtol=1e-8, atol=1e-8)
            close(flat, 0.0, atol=1e-8)


def test_the_profile_is_the_evidence_at_its_maximising_fixed_effects():
    """Two code paths, one number: profile(Λ) = Σ_j log p(D_j | b̂, σ̂Λ, σ̂)."""
    c = case(2, shared=1, slots=("weight",))
    with float64():
        problem, root = problem_of(c, False)
        best = jax.tree.map(np.asarray, profile(problem, root))
    covariance = best.sigma**2 * root @ root.T
    tau = np.sqrt(np.diag(covariance))
    phi = {"mu": best.fixed[:2], "beta": best.fixed[2:], "tau": tau, "sigma": best.sigma,
           "corr": covariance / np.outer(tau, tau)}  # fmt: skip
    close(replace(c, phi=phi).evidence.sum(), best.log_evidence, rtol=1e-11)
