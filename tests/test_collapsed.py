"""The collapsed posterior: fixed effects integrated out, coordinates, proposals, fall-back.

Rung (a) closed forms: a dense normal density from SciPy, Bayes' theorem point by point. Rung (b):
quadrature for p(D), differences for Jacobians. Rung (c): NUTS on the same density. Rung (d): means
of known targets within Monte-Carlo error.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from assertions import close, monte_carlo
from conftest import QUICK, quietly
from scipy import integrate as quadrature
from scipy import linalg, stats
from test_evidence import case

import hierbayes as hb
from hierbayes.evidence import Exact
from hierbayes.evidence.fixed_effects_out import (
    NormalHyperprior,
    amplification,
    integrate,
    integrated_problem,
    least_squares,
)
from hierbayes.meta import collapsed_sampling
from hierbayes.meta.collapsed import Collapsed
from hierbayes.meta.collapsed_sampling import Proposal, fit_proposal, run_chains
from hierbayes.numerics import float64
from hierbayes.phi.space import inverse_softplus
from hierbayes.statistics import row_scale, statistics

CASES = {
    "intercepts": dict(d=1),
    "two": dict(d=2, shared=1),
    "three, pinned": dict(d=3, shared=2, zero_mean=("x2",)),
    "five": dict(d=5),
    "task predictors": dict(d=2, level=2),
    "known errors": dict(d=2, slots=("known_se",)),
    "weights and offset": dict(d=2, shared=1, slots=("weight", "offset")),
}


FAST = ("intercepts", "three, pinned", "known errors", "weights and offset")
INTEGRATE = jax.jit(integrate, static_argnames="fast")


@pytest.fixture(
    params=[
        pytest.param(made_of, id=name, marks=[] if name in FAST else pytest.mark.slow)
        for name, made_of in CASES.items()
    ]
)
def one(request):
    return case(**request.param)


def belief_of(num_fixed: int) -> NormalHyperprior:
    rng = np.random.default_rng(num_fixed)
    return NormalHyperprior(rng.normal(size=num_fixed), rng.uniform(0.1, 2.0, num_fixed))


def integrated(one, hyperprior, centre=None, fast=False):
    """(evidence, mean, factor) of the package at the case's own τ, R, σ."""
    with float64():
        stats_of = statistics(one.tasks)
        shape = one.model.shape(one.tasks)
        start = least_squares(stats_of, shape.free_mean)[0] if centre is None else centre
        problem = integrated_problem(stats_of, shape.free_mean, start, hyperprior)
        corr = one.phi.get("corr", np.eye(len(one.phi["tau"])))
        root = one.phi["tau"][:, None] * np.linalg.cholesky(corr)
        found = INTEGRATE(problem, root, one.phi.get("sigma", 1.0), fast=fast)
        return tuple(np.asarray(part) for part in found)


def dense(one):
    """y, F and the covariance of y given b, by rows."""
    tasks, phi = one.tasks, one.phi
    shape = one.model.shape(tasks)
    free = [i for i, f in enumerate(shape.free_mean) if f]
    w = tasks.task_predictors[tasks.task_of_row]
    moved = [tasks.predictors[:, [i]] * w for i in range(len(shape.coef))]
    fixed = np.column_stack([tasks.predictors[:, free], *moved, tasks.shared])
    tau = phi["tau"]
    sigma_theta = phi.get("corr", np.eye(len(tau))) * np.outer(tau, tau)
    noise = (phi.get("sigma", 1.0) / row_scale(tasks)) ** 2
    same = tasks.task_of_row[:, None] == tasks.task_of_row[None]
    covariance = same * (tasks.predictors @ sigma_theta @ tasks.predictors.T) + np.diag(noise)
    return tasks.outcome - tasks.slots.get("offset", 0.0), fixed, covariance


# 1e-9: dense Cholesky of 32 rows with condition numbers up to 1e4
@pytest.mark.parametrize("fast", [False, True], ids=["by elimination", "by inverses"])
def test_the_evidence_is_the_dense_normal_density(one, fast):
    y, fixed, covariance = dense(one)
    hyperprior = belief_of(fixed.shape[1])
    whole = covariance + fixed @ np.diag(1 / hyperprior.precision) @ fixed.T
    expected = stats.multivariate_normal(fixed @ hyperprior.location, whole).logpdf(y)
    found, mean, factor = integrated(one, hyperprior, fast=fast)
    close(found, expected, rtol=1e-9)
    precision = fixed.T @ np.linalg.solve(covariance, fixed) + np.diag(hyperprior.precision)
    slope = fixed.T @ np.linalg.solve(covariance, y) + hyperprior.precision * hyperprior.location
    close(factor @ factor.T, precision, rtol=1e-9, atol=1e-9)
    close(mean, np.linalg.solve(precision, slope), rtol=1e-8, atol=1e-9)


def test_where_it_is_expanded_does_not_matter(one):
    num_fixed = dense(one)[1].shape[1]
    near = integrated(one, belief_of(num_fixed))
    far = integrated(one, belief_of(num_fixed), np.full(num_fixed, 3.0))
    for a, b in zip(near, far, strict=True):
        close(a, b, rtol=1e-9, atol=1e-9)


def test_a_flat_belief_is_the_limit_of_wide_ones(one):
    """log p(D) less the normals' own log density at their centre; 1e-6: precision 1e-9 times b²."""
    num_fixed = dense(one)[1].shape[1]
    flat = integrated(one, NormalHyperprior(np.zeros(num_fixed), np.zeros(num_fixed)))
    wide = integrated(one, NormalHyperprior(np.zeros(num_fixed), np.full(num_fixed, 1e-9)))
    own = 0.5 * num_fixed * np.log(1e-9 / (2 * np.pi))
    close(flat[0], wide[0] - own, rtol=0, atol=1e-6)
    close(flat[1], wide[1], rtol=1e-6, atol=1e-6)


def test_inverses_lose_what_amplification_says():
    """Lines in one direction but for noise, down to 1e-7 of them; elimination is the measure.

    With one direction alone V has eigenvalues σ² and τ², and inverses cancel.
    """
    lost = []
    for sigma in (1.0, 1e-2, 1e-4, 1e-7):
        rng = np.random.default_rng(0)
        x = np.stack([np.ones((30, 6)), rng.normal(size=(30, 6))], -1)
        lines = rng.normal(size=(30, 1)) * [1.0, -1.0]
        y = (x * lines[:, None]).sum(-1) + sigma * rng.normal(size=(30, 6))
        tasks = hb.Tasks.from_arrays(list(zip(x, y, strict=True)))
        with float64():
            hyperprior = NormalHyperprior(np.zeros(2), np.ones(2))
            problem = integrated_problem(statistics(tasks), (True, True), np.zeros(2), hyperprior)
            root = np.array([[1.0, 0.0], [-1.0, 1e-9]])
            stable, fast = (
                float(INTEGRATE(problem, root, sigma, fast=fast).log_evidence)
                for fast in (False, True)
            )
            lost.append(abs(fast - stable))
            bound = 1e-16 * amplification(problem, root @ root.T, sigma)
        # 30: sums over tasks and entries; 1e-12: rounding of what does not cancel
        assert lost[-1] < 30 * bound + 1e-12 * abs(stable)
    assert lost[-1] > 1e-3  # else the bound bounds nothing


def test_inverses_are_left_where_they_lose_much(radon):
    with float64():
        target = Collapsed(radon.model.resolve(radon.tasks), radon.tasks)
        psi = target.within(target.units).psi
        at = {s: psi.x({"tau": np.ones(2), "sigma": s}) for s in (0.5, 1e-5)}
        assert target.well_conditioned(target.units, at[0.5])
        assert not target.well_conditioned(target.units, at[1e-5])


# --------------------------------------------------------------- the density of a point


def believing(**hyperpriors):
    """A correlated radon model and what is believed of its φ."""
    model, tasks = hb.from_formula(
        "log_radon ~ 1 + floor + log_uranium + (1 + floor | county)", hb.datasets.radon(),
        hyperprior=hb.HyperPrior(**hyperpriors),
    )  # fmt: skip
    return model.resolve(tasks), tasks


BELIEFS = {
    "default": {},
    "Student t": dict(mu=dist.StudentT(3.0, 1.0, 0.5), beta=dist.Laplace(0.0, 0.3)),
    "Cauchy": dict(mu={"floor": dist.Cauchy(0.0, 1.0)}, tau=dist.HalfCauchy(1.0)),
    "flat": dict(mu=dist.ImproperUniform(dist.constraints.real, (), ())),
    "variance": dict(sigma=dist.Gamma(2.0, 2.0), corr=dist.LKJ(2, 0.7)),
}


@pytest.mark.parametrize(
    "hyperpriors",
    [
        pytest.param(b, id=name, marks=pytest.mark.slow if name not in ("default", "flat") else [])
        for name, b in BELIEFS.items()
    ],
)
def test_a_point_obeys_bayes_theorem(hyperpriors):
    """p(D, φ) |dψ/dx| = density(x, e) q(b | ψ, D), with q normal; for any e.

    1e-9: log densities of about 1,000, in which nothing cancels.
    """
    model, tasks = believing(**hyperpriors)
    with float64():
        target = Collapsed(model, tasks)
        units = target.units
        rng = np.random.default_rng(3)
        x, e = 0.3 * rng.normal(size=4), rng.normal(size=3)
        found = target.points(units, x[None], e[None])
        log_density, phi = found.log_density[0], {name: v[0] for name, v in found.phi.items()}
        corr_root = np.linalg.cholesky(phi["corr"])
        inner = INTEGRATE(target.problem, phi["tau"][:, None] * corr_root, phi["sigma"])
        b = np.asarray(inner.mean) + linalg.solve_triangular(inner.factor, e, trans=1, lower=True)
        q = stats.multivariate_normal(
            inner.mean, np.linalg.inv(np.asarray(inner.factor @ inner.factor.T))
        ).logpdf(b)
        close(phi["mu"], b[:2], rtol=1e-12)
        close(phi["beta"], b[2:], rtol=1e-12)

        @jax.jit
        def believed_of(phi):
            return sum(
                hyperprior.log_prob(phi[name]).sum()
                for name, hyperprior in target.hyperpriors.items()
            )

        believed = float(believed_of(phi))

        def free(x):
            found = target.within(units).psi.phi(x)
            return jnp.array([*found["tau"], found["corr"][1, 0], found["sigma"]])

        jacobian = np.linalg.slogdet(np.asarray(jax.jit(jax.jacfwd(free))(x)))[1]
    evidence = Exact()(model, tasks, phi).sum()
    close(log_density + q, evidence + believed + jacobian, rtol=1e-9)


def test_density_is_nothing_outside_the_support():
    model, tasks = believing(tau=dist.Uniform(0.0, 0.5))
    with float64():
        target = Collapsed(model, tasks)
        units = np.full(2, 0.1)
        inside = np.array([*inverse_softplus(np.array([4.0, 4.0])), 0.0, 0.0])
        outside = np.array([*inverse_softplus(np.array([4.0, 6.0])), 0.0, 0.0])
        values = target.points(units, np.stack([inside, outside]), np.zeros((2, 3))).log_density
    assert np.isfinite(values[0])
    assert values[1] == -np.inf


def test_units_are_a_matter_of_description():
    """The same ψ has the same density in ψ: x moves, and the density by its Jacobian only."""
    model, tasks = believing()
    with float64():
        target = Collapsed(model, tasks)
        old, new = target.units, np.array([0.05, 2.0])
        x = np.random.default_rng(0).normal(size=(6, 4))
        one, other = (target.within(units).psi for units in (old, new))
        moved = np.stack([other.x(one.phi(v)) for v in x])
        at = jax.jit(jax.vmap(lambda s, v: s.placed(v, target.hyperpriors), (None, 0)))
        before, after = at(one, x), at(other, moved)
        for name in ("tau", "corr", "sigma"):
            close(after.phi[name], before.phi[name], rtol=1e-12)
        slope = [1 / (1 + np.exp(-v[:, :2])) for v in (x, moved)]
        stretch = np.log(slope[0] * old / (slope[1] * new)).sum(1)
        close(after.log_density + stretch, before.log_density, rtol=1e-11)


# ------------------------------------------------------------------------ the sampler


def correlated_target(points):
    """log Gamma(3) in exp(x₀), normal x₁ around x₀ with sd ½: E eˣ = 3, E x₁ = ψ(3)."""
    x = points[:, 0]
    log_density = stats.gamma(3).logpdf(np.exp(x)) + x + stats.norm(x, 0.5).logpdf(points[:, 1])
    return log_density, {"ratio": np.exp(x - points[:, 1])}


def chains(weigh, rng, num_draws=4000):
    fitted = fit_proposal(weigh, Proposal(np.zeros(2), np.eye(2)), rng)
    return run_chains(weigh, fitted, rng, num_draws=num_draws, num_chains=4, every=2)


def test_chains_have_the_targets_moments(rng):
    found = chains(correlated_target, rng)
    draws = found.points
    digamma_3, trigamma_3 = 0.9227843350984671, 0.3949340668482264
    monte_carlo(np.exp(draws[..., 0]), 3.0, np.sqrt(3.0))
    monte_carlo(draws[..., 1], digamma_3, np.sqrt(trigamma_3 + 0.25))
    monte_carlo((draws[..., 1] - draws[..., 0]) ** 2, 0.25, np.sqrt(2) * 0.25)
    close(found.beside["ratio"], np.exp(draws[..., 0] - draws[..., 1]), rtol=1e-12)
    assert found.acceptance > 0.6
    assert abs(found.log_normaliser) < 5 * found.log_normaliser_se < 0.05


def test_chains_that_forget_the_proposal_are_caught(rng, monkeypatch):
    """Negative control: weights p(x) in the place of p(x) / q(x)."""
    fitted = fit_proposal(correlated_target, Proposal(np.zeros(2), np.eye(2)), rng)
    monkeypatch.setattr(Proposal, "log_prob", lambda self, points: np.zeros(len(points)))
    found = run_chains(correlated_target, fitted, rng, num_draws=4000, num_chains=4, every=2)
    draws = found.points
    with pytest.raises(AssertionError):
        monte_carlo((draws[..., 1] - draws[..., 0]) ** 2, 0.25, np.sqrt(2) * 0.25)


def test_a_start_far_off_is_found_back_from(rng):
    def far(points):
        return correlated_target(points - np.array([6.0, -9.0]))

    fitted = fit_proposal(far, Proposal(np.zeros(2), np.eye(2)), rng)
    assert fitted.share > 0.3


def test_a_chain_that_stays_is_noticed(rng):
    """A point of weight 1e4 is left after about that many proposals."""
    fitted = fit_proposal(correlated_target, Proposal(np.zeros(2), np.eye(2)), rng)

    def with_an_island(points):
        log_density, beside = correlated_target(points)
        return np.where(np.arange(len(points)) % 1000 == 500, 9.0, 0.0) + log_density, beside

    stuck = run_chains(with_an_island, fitted, rng, num_draws=1000, num_chains=2, every=1)
    free = run_chains(correlated_target, fitted, rng, num_draws=1000, num_chains=2, every=1)
    assert stuck.longest_stay > 50 > 25 > free.longest_stay
    runs = [len(run) for row in np.diff(stuck.points[..., 0]) == 0
            for run in "".join("s" if stays else " " for stays in row).split()]  # fmt: skip
    assert max(runs) == stuck.longest_stay


def test_one_chain_and_one_draw_are_served(schools):
    fit = hb.full_bayes(schools.model, schools.tasks, num_draws=1, num_chains=1)
    assert fit.datatree.posterior["theta"].shape == (1, 1, 8, 1)


def test_the_evidence_of_eight_schools_is_its_integral(schools_full, schools):
    """log p(D) = log ∫ p(τ) N(y; m, τ² I + s² + v 11ᵀ) dτ, the mean integrated by hand."""
    model = schools.model.resolve(schools.tasks)
    data = schools.data
    y, s = data["y"].to_numpy(float), data["se"].to_numpy(float)
    mu = model.hyperprior.mu["Intercept"]
    tau = model.hyperprior.tau["Intercept"]
    spread = float(tau.scale)

    def density(t):
        covariance = np.diag(s**2 + t**2) + float(mu.scale) ** 2
        likelihood = stats.multivariate_normal(np.full(8, float(mu.loc)), covariance).pdf(y)
        return likelihood * stats.halfnorm(scale=spread).pdf(t)

    value = quadrature.quad(density, 0, 15 * spread, epsabs=0, epsrel=1e-10)[0]
    error = schools_full.info["log_evidence_se"]
    assert 0 < error < 0.02
    assert abs(schools_full.log_evidence - np.log(value)) < 5 * error


@pytest.mark.slow
def test_an_improper_hyperprior_has_no_evidence():
    model, tasks = believing(**BELIEFS["flat"])
    fit = hb.full_bayes(model, tasks, **QUICK)
    with pytest.raises(AttributeError, match="improper"):
        _ = fit.log_evidence


@pytest.mark.slow
def test_poor_acceptance_falls_back_to_nuts_and_says_so(schools, monkeypatch):
    before = quietly(hb.full_bayes, schools, num_draws=1000, seed=2)
    monkeypatch.setattr(collapsed_sampling, "LEAST_ACCEPTANCE", 1.1)
    with pytest.warns(hb.FitWarning, match="accepted .* of its proposals"):
        fit = hb.full_bayes(
            schools.model, schools.tasks, num_draws=1000, num_warmup=300, seed=2, progress=False
        )
    assert fit.info["sampler"] == "nuts"
    assert {"diverging", "n_steps"} <= set(fit.sample_stats)
    for name in ("mu", "tau"):
        known = before.phi_draws[name]
        # k = 6: both sides are random, the one that is held for exact by a fraction of the other
        monte_carlo(fit.phi_draws[name][..., 0], known.mean(), known.std(), k=6)


@pytest.mark.slow
def test_nuts_takes_beliefs_that_are_not_normal(monkeypatch):
    """Student's t on μ: b is then sampled too, in coordinates white under its conditional."""
    model, tasks = believing(**BELIEFS["Student t"])
    exact = hb.full_bayes(model, tasks, num_draws=4000, seed=1, progress=False)
    assert exact.info["sampler"] == "independence"
    monkeypatch.setattr(collapsed_sampling, "LEAST_ACCEPTANCE", 1.1)
    fit = hb.full_bayes(
        model, tasks, num_draws=1000, num_chains=2, num_warmup=300, seed=1, progress=False
    )
    for name in ("mu", "beta", "tau", "sigma"):
        for index in np.ndindex(exact.phi_draws[name].shape[2:]):
            known = exact.phi_draws[name][(..., *index)]
            monte_carlo(fit.phi_draws[name][(..., *index)], known.mean(), known.std(), k=6)


@pytest.mark.slow
def test_other_data_of_the_same_shape_compile_nothing(small):
    """Task names, values and default hyperpriors differ; shapes decide."""
    x = np.column_stack([np.ones(36), np.tile([0.0, 1.0, 2.0], 12)])

    def fitted(seed):
        rng = np.random.default_rng(seed)
        tasks = hb.Tasks.from_arrays(
            [(x[i : i + 6], x[i : i + 6] @ rng.normal(size=2) + rng.normal(size=6))
             for i in range(0, 36, 6)], names=[f"{seed}-{k}" for k in range(6)],
        )  # fmt: skip
        return quietly(hb.full_bayes, type(small)(small.model, tasks), num_draws=50, num_chains=2)

    fitted(0)
    compiled = []

    def heard(event: str, seconds: float, **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        fitted(1)
        assert not compiled
        jax.jit(lambda v: v + 1.2345)(jnp.ones(3))  # the listener does hear
        assert compiled
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.mark.slow
def test_moments_take_the_place_of_draws_for_very_many_tasks(small, monkeypatch):
    kept = quietly(hb.full_bayes, small, num_draws=500, seed=5)
    monkeypatch.setattr(sys.modules["hierbayes.fit.adapting"], "LARGEST_THETA", 10)
    fit = quietly(hb.full_bayes, small, num_draws=500, seed=5)
    assert fit.theta_draws is None
    draws = kept.theta_draws
    for j in range(small.tasks.num_tasks):
        for k in range(2):
            sd = np.sqrt(fit.adapted.covariance.values[j, k, k])
            monte_carlo(draws[:, :, j, k], fit.theta.values[j, k], sd)


def test_columns_are_those_of_the_rows():
    """F from triangles has the Gram matrix of F from rows."""
    one = case(2, shared=1, level=1)
    with float64():
        stats_of = statistics(one.tasks)
        columns = stats_of.fixed_columns(one.model.shape(one.tasks).free_mean)
        gram = np.einsum("ikj,imj->km", columns, columns)
    fixed = dense(one)[1] * row_scale(one.tasks)[:, None]
    close(gram, fixed.T @ fixed, rtol=1e-10, atol=1e-10)
