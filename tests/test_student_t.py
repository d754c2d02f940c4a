"""A Student-t prior of tasks: its integrals against other ones, its fits against each other."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from assertions import close, refuses
from numpyro.infer.util import log_density
from references import assert_agreement
from scipy import integrate, optimize, special, stats

import hierbayes as hb
from hierbayes.adaptation import ScaleMixture
from hierbayes.adaptation.scale_mixture import OverScales
from hierbayes.evidence import Exact
from hierbayes.meta.posterior_mode import maximise_exact
from hierbayes.numerics import float64
from hierbayes.priors.student_t import mixing
from hierbayes.statistics import statistics

pytestmark = pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")


def heavy(model: hb.HierarchicalModel, df: float = 4.0) -> hb.HierarchicalModel:
    """The same model with a Student-t prior in the place of the Gaussian one."""
    prior: Any = model.prior
    return replace(model, prior=hb.priors.StudentT(df, prior.correlated, prior.zero_mean))


GAUSSIAN = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
STUDENT = heavy(GAUSSIAN)


def simulated(num_tasks: int, seed: int, df: float | None = None, outlier: float = 0.0) -> hb.Tasks:
    """Intercept and slope a task, from a normal or a t prior; one task moved by ``outlier``."""
    rng = np.random.default_rng(seed)
    arrays = []
    for j in range(num_tasks):
        x = np.column_stack([np.ones(5), rng.normal(size=5)])
        width = 1.0 if df is None else 1 / np.sqrt(rng.gamma(df / 2, 2 / df))
        theta = np.array([1.0, -0.5]) + width * rng.normal(size=2) * [0.8, 0.4]
        theta[0] += outlier if j == 0 else 0.0
        arrays.append((x, x @ theta + 0.6 * rng.normal(size=5)))
    return hb.Tasks.from_arrays(arrays, coef=["Intercept", "x"])


# --------------------------------------------------------------------- integrals

MEANS = hb.Tasks.from_arrays(
    [(np.ones((len(y), 1)), np.array(y)) for y in
     ([1.0, 0.3, -0.2], [12.0, 12.5], [1000.0], [8.0, 9.0, 7.5])]
)  # fmt: skip
"""Normal means, σ = 0.7: one task near μ = 0.2, two outliers, one absurd."""


def integral_over_theta(
    mean: float, se: float, df: float, mu: float, tau: float
) -> tuple[float, float, float]:
    """log ∫ N(mean; θ, se²) t_ν(θ; μ, τ²) dθ, and θ's posterior mean and sd.

    Gauss–Legendre with 20 nodes, as good as 40 to 1e-13, between marks that lie close beside the
    peaks of likelihood and prior: a direct integral over θ, which knows of no scale mixture.
    """
    far = np.geomspace(1e-3, 1e4, 40)
    marks = [mu + tau * np.concatenate([-far, [0.0], far]), mean + se * np.linspace(-40, 40, 81)]
    edges = np.unique(np.concatenate(marks))
    nodes, weights = np.polynomial.legendre.leggauss(20)
    half = 0.5 * np.diff(edges)[:, None]
    theta = 0.5 * (edges[1:] + edges[:-1])[:, None] + half * nodes
    logs = stats.norm.logpdf(mean, theta, se) + stats.t.logpdf(theta, df, mu, tau)
    logs = logs + np.log(half * weights)
    total = special.logsumexp(logs)
    share = np.exp(logs - total)
    centre = (share * theta).sum()
    return float(total), float(centre), float(np.sqrt((share * (theta - centre) ** 2).sum()))


@pytest.mark.parametrize("tau", [1e-3, 0.1, 1.0, 30.0, 1e5])
@pytest.mark.parametrize("df", [1.0, 4.0, 30.0])
def test_evidence_and_moments_are_the_integrals_over_theta(df, tau):
    """1e-10 of the evidence is promised, and rounding of a sum of squares of 10⁶ is as much."""
    phi = {"mu": np.array([0.2]), "tau": np.array([tau]), "sigma": np.array(0.7)}
    model = heavy(GAUSSIAN, df)
    found, adapted = Exact()(model, MEANS, phi), ScaleMixture()(model, MEANS, phi)
    assert adapted.covariance is not None
    starts = MEANS.starts
    for j in range(4):
        y = MEANS.outcome[starts[j] : starts[j + 1]]
        se = 0.7 / np.sqrt(len(y))
        total, mean, sd = integral_over_theta(y.mean(), se, df, 0.2, tau)
        rest = stats.norm.logpdf(y, y.mean(), 0.7).sum() - stats.norm.logpdf(0.0, 0.0, se)
        close(found[j], rest + total, rtol=1e-12, atol=1e-10)
        assert abs(adapted.mean[j, 0] - mean) < 1e-8 * sd
        close(np.sqrt(adapted.covariance[j, 0, 0]), sd, rtol=1e-7)


def test_the_rule_is_as_fine_as_it_says():
    """Σ_k w_k λ_k^(d/2) e^(−cλ_k) against Γ((ν+d)/2) …: half of an outlier's integrand's family."""
    for df in (0.5, 1.0, 4.0, 30.0, 1000.0):
        rule = mixing(df, 3)
        close(np.exp(rule.log_weight).sum(), 1.0, rtol=1e-12)
        for c in (0.0, 1.0, 30.0):
            half, rate = 0.5 * (df + 3), 0.5 * df
            exact = special.gammaln(half) - special.gammaln(rate) + rate * np.log(rate)
            exact -= half * np.log(rate + c)
            logs = rule.log_weight + 1.5 * np.log(rule.precision) - c * rule.precision
            close(special.logsumexp(logs), exact, rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def wide() -> tuple[hb.Tasks, dict[str, Any]]:
    """d = 2 with shared and task predictors: tasks of 6, 0, 1, 2 rows, collinear in one."""
    rng = np.random.default_rng(3)
    sizes = (6, 0, 1, 2)
    xs = [np.column_stack([np.ones(n), rng.normal(size=n)]) for n in sizes]
    xs[3][:, 1] = 2.0  # a predictor that is constant within the task
    tasks = hb.Tasks.from_arrays(
        [(x, 3 * (j == 2) + rng.normal(size=len(x))) for j, x in enumerate(xs)],
        shared=[rng.normal(size=(n, 1)) for n in sizes], task_predictors=rng.normal(size=(4, 1)),
    )  # fmt: skip
    phi = {
        "mu": np.array([0.3, -0.2]), "tau": np.array([0.9, 0.5]), "sigma": np.array(0.6),
        "corr": np.array([[1.0, 0.4], [0.4, 1.0]]), "beta": np.array([0.7]),
        "gamma": np.array([[0.2], [-0.3]]),
    }  # fmt: skip
    return tasks, phi


def test_two_coefficients_against_a_dense_grid(wide):
    """∫∫ p(D | θ) t(θ) dθ by the trapezoid rule in arcsinh of both whitened coordinates.

    sinh of a grid reaches e⁹ scales out, where a t₄ has e⁻³⁶ of its mass left, and the rule's error
    falls exponentially with its step. The coordinates are turned along the rows, which changes
    nothing for a round t: rows that say nothing in one direction make a ridge along an axis.
    """
    tasks, phi = wide
    found, adapted = Exact()(STUDENT, tasks, phi), ScaleMixture()(STUDENT, tasks, phi)
    assert adapted.covariance is not None
    root = np.linalg.cholesky(np.outer(phi["tau"], phi["tau"]) * phi["corr"])
    u = np.linspace(-9.5, 9.5, 601)
    z1, z2 = np.meshgrid(np.sinh(u), np.sinh(u), indexing="ij")
    log_cell = np.log(np.cosh(u))[:, None] + np.log(np.cosh(u))[None] + 2 * np.log(u[1] - u[0])
    z = np.stack([z1, z2], axis=-1)
    log_prior = stats.multivariate_t.logpdf(z, df=4.0, shape=np.eye(2))
    for j in range(4):
        one = tasks.take([j])
        location = phi["mu"] + phi["gamma"] @ one.task_predictors[0]
        turn = np.linalg.svd(one.predictors @ root)[2] if one.num_rows else np.eye(2)
        theta = location + z @ turn @ root.T
        logs = log_prior + log_cell
        for x, s, y in zip(one.predictors, one.shared, one.outcome, strict=True):
            logs = logs + stats.norm.logpdf(y, theta @ x + s @ phi["beta"], phi["sigma"])
        total = special.logsumexp(logs)
        share = np.exp(logs - total)[..., None]
        mean = (share * theta).sum((0, 1))
        spread = np.einsum("abi,abk->ik", share * (theta - mean), theta - mean)
        close(found[j], total, rtol=0, atol=1e-8)
        close(adapted.mean[j], mean, rtol=0, atol=1e-7)
        close(adapted.covariance[j], spread, rtol=1e-4 if j == 1 else 1e-6, atol=1e-6)
    assert abs(found[1]) < 1e-14, "a task without rows says nothing"


def test_three_coefficients_against_importance_sampling(rng):
    """E over λ of the dense normal evidence, 200,000 draws: within four of its standard errors."""
    x, y = rng.normal(size=(5, 3)), rng.normal(size=5) + 2.0
    tau, corr = np.array([0.5, 1.0, 2.0]), np.corrcoef(rng.normal(size=(3, 9)))
    phi = {"mu": np.zeros(3), "tau": tau, "corr": corr, "sigma": np.array(0.5)}
    found = Exact()(STUDENT, hb.Tasks.from_arrays([(x, y)] * 2), phi)[0]
    precision = rng.gamma(2.0, 0.5, size=200_000)
    spread = x @ (np.outer(tau, tau) * corr) @ x.T
    values, vectors = np.linalg.eigh(spread)
    variances = values / precision[:, None] + 0.25
    densities = np.exp(stats.norm.logpdf(y @ vectors, 0, np.sqrt(variances)).sum(1))
    error = densities.std() / np.sqrt(len(densities))
    assert error < 0.005 * densities.mean()
    assert abs(np.exp(found) - densities.mean()) < 4 * error


@pytest.mark.slow
def test_many_degrees_of_freedom_are_the_gaussian_prior(wide):
    """E g(λ) = g(1) + g''(1)/ν + …: at ν = 1e8 the difference is of order 1e-8."""
    tasks, phi = wide
    close(
        Exact()(heavy(GAUSSIAN, 1e8), tasks, phi), Exact()(GAUSSIAN, tasks, phi), rtol=0, atol=1e-6
    )
    plain = hb.adaptation.Conjugate()(GAUSSIAN, tasks, phi)
    near = ScaleMixture()(heavy(GAUSSIAN, 1e8), tasks, phi)
    close(near.mean, plain.mean, rtol=1e-6, atol=1e-7)
    close(near.covariance, plain.covariance, rtol=1e-6, atol=1e-7)


def test_without_spread_it_is_complete_pooling(wide):
    tasks, phi = wide
    zero = phi | {"tau": np.zeros(2)}
    close(Exact()(STUDENT, tasks, zero), Exact()(GAUSSIAN, tasks, zero), rtol=1e-12, atol=1e-12)
    assert not np.any(ScaleMixture()(STUDENT, tasks, zero).covariance)


def test_draws_have_the_moments(wide, rng):
    """5,000 draws: means within four standard errors, covariances within 10 % of the variances.

    A task without rows has t₄ as its posterior, no fourth moment, and a test of its own.
    """
    tasks, phi = wide
    adapted = ScaleMixture()(STUDENT, tasks, phi)
    assert adapted.covariance is not None
    size = 5_000
    at_one = ScaleMixture().draws_at(STUDENT, tasks, phi, size, 1)
    phis = {name: np.repeat(value[None], size, 0) for name, value in phi.items()}
    each = ScaleMixture().draws(STUDENT, tasks, phis, 2)
    some = np.array([0, 2, 3])
    for drawn in (at_one, each):
        drawn = drawn[:, some]
        sd = np.sqrt(np.diagonal(adapted.covariance[some], axis1=1, axis2=2))
        assert (abs(drawn.mean(0) - adapted.mean[some]) < 4 * sd / np.sqrt(size)).all()
        away = drawn - adapted.mean[some]
        found = np.einsum("sji,sjk->jik", away, away) / size
        gap = abs(found - adapted.covariance[some]) / (sd[:, :, None] * sd[:, None])
        assert gap.max() < 0.1
    # a task without rows: θ is t₄ itself
    z = (at_one[:, 1, 0] - (phi["mu"] + phi["gamma"] @ tasks.task_predictors[1])[0]) / 0.9
    assert stats.kstest(z, stats.t(4).cdf).pvalue > 1e-3


def test_moments_over_draws_of_phi_are_their_average(wide):
    tasks, phi = wide
    phis = {n: np.stack([v, v * (0.9 if n != "corr" else 1.0)]) for n, v in phi.items()}
    mean, covariance = ScaleMixture().moments(STUDENT, tasks, phis)
    parts = [ScaleMixture()(STUDENT, tasks, {n: v[i] for n, v in phis.items()}) for i in (0, 1)]
    close(mean, (parts[0].mean + parts[1].mean) / 2, rtol=1e-12)
    apart = (parts[0].mean - parts[1].mean) / 2
    expected = (parts[0].covariance + parts[1].covariance) / 2 + apart[:, :, None] * apart[:, None]
    close(covariance, expected, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------ model


def test_the_joint_density_is_the_programs_and_scipys(wide, rng):
    """And the non-centred program's: log p(z, …) = log p(θ, …) + Σ log |L| for θ = m + L z."""
    tasks, phi = wide
    z, other = rng.normal(size=(4, 2)), rng.normal(size=(4, 2))
    model = replace(STUDENT, hyperprior=hb.HyperPrior(corr=1.0)).resolve(tasks)
    with float64():
        root = np.asarray(model.prior.scale_tril(phi))
        centres = np.asarray(model.prior.location(phi, tasks.task_predictors))
        theta = centres + z @ root.T
        centred, free = (model.numpyro_program(tasks, centred=c) for c in (True, False))
        at = model.column_map(tasks, "hyperpriors", scaled=False)
        own = at.phi_inward(phi)
        sites = {f"{n}_centred" if n in at.changed() else n: v for n, v in own.items()}
        name = "theta_centred" if "theta" in at.changed() else "theta"

        compiled = jax.jit(lambda t: log_density(centred, (), {}, sites | {name: t})[0])

        def density(t: np.ndarray) -> float:
            return float(compiled(at.theta_inward(t, phi.get("beta"))))

        found, moved = density(theta), density(other)
        in_z = float(jax.jit(lambda t: log_density(free, (), {}, sites | {"z": t})[0])(z))
    close(model.log_joint(phi, theta, tasks), found, rtol=1e-12)
    close(in_z, found + tasks.num_tasks * np.log(np.diag(root)).sum(), rtol=1e-12)

    # from one θ to another nothing moves but SciPy's t and the rows' normals
    scale = np.outer(phi["tau"], phi["tau"]) * phi["corr"]

    def by_hand(at: np.ndarray) -> float:
        total = sum(
            stats.multivariate_t.logpdf(t, m, scale, df=4.0)
            for t, m in zip(at, phi["mu"] + tasks.task_predictors @ phi["gamma"].T, strict=True)
        )
        f = (at[tasks.task_of_row] * tasks.predictors).sum(1) + tasks.shared @ phi["beta"]
        return total + stats.norm.logpdf(tasks.outcome, f, phi["sigma"]).sum()

    close(found - moved, by_hand(theta) - by_hand(other), rtol=1e-9)


def test_what_is_no_prior_is_refused():
    for df in (0.0, -1.0, np.inf, np.nan):
        with refuses("df", "positive"):
            hb.priors.StudentT(df)
    with refuses("df", "number"):
        hb.priors.StudentT("4")  # type: ignore[arg-type]
    with refuses("priors.StudentT(correlated", "floor"):
        hb.priors.StudentT(4, [("flor",)]).blocks(("floor",))


@pytest.mark.parametrize("df", [1.0, 2.0, 3.0, 30.0])
def test_variance_factors_are_strata_of_the_mixture(df):
    """Each is the mean of 1/λ in its stratum, by SciPy's quad over the distribution of 1/λ."""
    found = hb.priors.StudentT(df).variance_factors(5)
    law = stats.gamma(df / 2, scale=2 / df)
    if df > 2:
        close(found.mean(), df / (df - 2), rtol=1e-12)
        for s in range(5):
            low, high = law.ppf(s / 5), min(law.ppf((s + 1) / 5), 50.0)
            mean = 5 * integrate.quad(lambda v: law.pdf(v) / v, low, high, epsabs=1e-13)[0]
            close(found[s], mean, rtol=1e-6)
    else:
        close(found, 1 / law.ppf(np.arange(0.1, 1.0, 0.2)), rtol=1e-10)


# -------------------------------------------------------------------------- fits


@pytest.fixture(scope="module")
def outlying() -> hb.Tasks:
    """Sixteen tasks, one of them 15 away: about 19 scales."""
    return simulated(16, seed=1, outlier=15.0)


@pytest.fixture(scope="module")
def robust(outlying) -> hb.Fit:
    return hb.empirical_bayes(STUDENT, outlying, num_draws=200, num_chains=2)


@pytest.fixture(scope="module")
def heavy_schools(schools) -> hb.HierarchicalModel:
    hyperprior = hb.HyperPrior(mu=dist.Normal(0.0, 10.0), tau=dist.HalfNormal(10.0))
    return replace(heavy(schools.model), hyperprior=hyperprior).resolve(schools.tasks)


@pytest.fixture(scope="module")
def eight(schools, heavy_schools) -> hb.Fit:
    return hb.full_bayes(heavy_schools, schools.tasks, seed=0, progress=False)


@pytest.mark.slow
def test_empirical_bayes_is_at_scipys_maximum(schools, heavy_schools):
    """Eight schools under t₄, mode of p(φ | D), by Nelder and Mead on integrals over θ."""
    model = heavy_schools
    y, se = schools.tasks.outcome, schools.tasks.slots["known_se"]

    def minus(at: np.ndarray) -> float:
        mu, tau = at[0], np.exp(at[1])
        total = sum(integral_over_theta(v, e, 4.0, mu, tau)[0] for v, e in zip(y, se, strict=True))
        return -(total + stats.norm.logpdf(mu, 0, 10) + stats.halfnorm.logpdf(tau, scale=10))

    found = maximise_exact(model, schools.tasks, ScaleMixture(), with_hyperprior=True)
    best: Any = optimize.minimize(
        minus, [8.0, np.log(3.0)], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12}
    )
    assert found.log_posterior is not None
    close(found.log_posterior, -best.fun, rtol=0, atol=1e-9)
    # the search ends where the value no longer moves in its 12th digit: 1e-5 in φ
    close(found.phi["mu"][0], best.x[0], rtol=0, atol=1e-4)
    close(found.phi["tau"][0], np.exp(best.x[1]), rtol=0, atol=1e-4)


def test_the_maximum_is_stationary_and_its_errors_are_the_hessians(outlying, robust):
    """By values of the evidence alone, along μ, τ and σ one by one.

    The error of one with the others held is 1/√(−∂² log p), which the whole inverse only widens.
    """

    def log_evidence(name: str, i: int, by: float) -> float:
        moved = {k: np.array(v, float) for k, v in robust.phi.items()}
        moved[name][... if moved[name].ndim == 0 else i] += by
        return float(Exact()(STUDENT, outlying, moved).sum())

    for name, i in (("mu", 0), ("mu", 1), ("tau", 0), ("tau", 1), ("sigma", 0)):
        error = np.ravel(robust.standard_errors[name])[i]
        h = 0.05 * error
        up, here, down = (log_evidence(name, i, by) for by in (h, 0.0, -h))
        # the slope in units of the standard error; 1e-3 of it would move φ̂ by as little
        assert abs(up - down) / (2 * h) * error < 1e-3
        alone = 1 / np.sqrt((2 * here - up - down) / h**2)
        assert alone < 1.001 * error
        assert error < 2 * alone


def test_an_outlier_moves_the_gaussian_prior_and_not_the_student(outlying, robust):
    """19 scales out: τ of the Gaussian prior has to cover it, that of t₄ stays near 0.8."""
    plain = hb.empirical_bayes(GAUSSIAN, outlying, num_draws=1, num_chains=1)
    assert plain.phi["tau"][0] > 2.0
    assert robust.phi["tau"][0] < 1.1
    assert robust.log_evidence > plain.log_evidence + 10
    # and the others are shrunk as if it were not there
    own = outlying.outcome.reshape(16, 5).mean(1)
    assert abs(robust.phi["mu"][0] - np.median(own)) < abs(plain.phi["mu"][0] - np.median(own))


def test_predictions_are_of_the_mixture(outlying, robust):
    """Means and variances are those of θ exactly; a new task's are as wide as a t₄'s."""
    known = robust.predict()
    x, of = outlying.predictors, outlying.task_of_row
    close(known.mean, (x * robust.theta.values[of]).sum(1), rtol=1e-10, atol=1e-12)
    variance = np.einsum("ni,nik,nk->n", x, robust.adapted.covariance.values[of], x)
    close(known.sd**2, variance + robust.phi["sigma"] ** 2, rtol=1e-9)
    new = robust.predict(target="new")
    tau, corr = robust.phi["tau"], robust.phi["corr"]
    spread = np.einsum("ni,ik,nk->n", x, np.outer(tau, tau) * corr, x)
    close(new.sd**2, 2 * spread + robust.phi["sigma"] ** 2, rtol=1e-9)
    close(new.mean, robust.predict(target="population").mean, rtol=1e-10)


def test_the_posteriors_draws_are_in_the_tree(robust):
    draws = robust.datatree["posterior"]["theta"]
    assert draws.sizes == {"chain": 2, "draw": 200, "task": 16, "coef": 2}
    sd = robust.adapted.sd.values
    gap = abs(draws.mean(("chain", "draw")).values - robust.theta.values)
    assert (gap < 5 * sd / np.sqrt(400)).all()


def test_the_learned_prior_is_a_t(robust):
    prior = robust.prior
    assert prior.df == 4.0
    scale = np.outer(robust.phi["tau"], robust.phi["tau"]) * robust.phi["corr"]
    with float64():
        found = float(jax.jit(lambda at: prior.log_prob(at))(np.array([3.0, 0.0])))
    expected = stats.multivariate_t.logpdf([3.0, 0.0], robust.phi["mu"], scale, df=4.0)
    close(found, expected, rtol=1e-6)


def test_a_learned_prior_without_scale():
    location = np.array([[1.0, 2.0]])

    def learned(root, df=4.0):
        return hb.priors.LearnedPrior(("a", "b"), location, np.array([root]), df=df)

    sample = jax.jit(lambda prior: prior.sample(jax.random.key(0), (50,)))
    line = learned([[0.0, 0.0], [0.0, 3.0]])
    draws = np.asarray(sample(line))
    assert (draws[:, 0] == 1.0).all()
    assert draws[:, 1].std() > 1
    flat = learned([[1.0, 0.0], [2.0, 0.0]])
    away = np.asarray(sample(flat)) - location
    close(away[:, 1], 2 * away[:, 0], rtol=1e-4, atol=1e-5)
    close(flat.variance, [2.0, 8.0], rtol=1e-12)
    close(flat.mean, location[0], rtol=0)
    with refuses("no density"):
        flat.log_prob(location[0])


def test_a_fit_comes_back(outlying, robust, tmp_path):
    robust.save(tmp_path / "fit.nc")
    again = hb.load(tmp_path / "fit.nc")
    assert again.model.prior == robust.model.prior
    np.testing.assert_array_equal(again.theta.values, robust.theta.values)
    np.testing.assert_array_equal(again.predict().sd, robust.predict().sd)
    some = outlying.take([0, 3])
    np.testing.assert_array_equal(again.adapt(some).theta.values, robust.adapt(some).theta.values)


def test_adapting_gives_the_training_tasks_back(outlying, robust):
    close(robust.adapt(outlying).theta.values, robust.theta.values, rtol=1e-12)
    close(robust.on(outlying).predict().sd, robust.predict().sd, rtol=1e-12)


@pytest.fixture(scope="module")
def sampled(outlying) -> hb.Fit:
    return hb.full_bayes(STUDENT, outlying, num_draws=500, num_chains=2, seed=3, progress=False)


def test_full_bayes_integrates_theta_out_of_schools(eight, schools):
    """It does not need NUTS, and what it learns is a mixture of t₄."""
    assert eight.info["sampler"] == "independence"
    assert eight.info["acceptance"] > 0.5
    assert (eight.predict(target="new").sd > eight.predict(target="population").sd).all()
    assert eight.prior.df == 4.0
    assert len(eight.prior.weights) > 1
    adapted = eight.adapt(schools.tasks.take([0]))
    sd = float(eight.adapted.sd[0, 0])
    assert abs(adapted.theta.values[0, 0] - eight.theta.values[0, 0]) < 0.2 * sd


@pytest.mark.slow
def test_full_bayes_integrates_theta_out(sampled, robust, outlying):
    """It agrees with φ̂ to within a posterior sd or so, and does not need NUTS."""
    assert sampled.info["sampler"] == "independence"
    assert sampled.info["acceptance"] > 0.5
    for name in ("mu", "tau", "sigma"):
        sd = sampled.datatree["posterior"][name].std(("chain", "draw")).values
        assert (abs(sampled.phi[name] - robust.phi[name]) < 1.5 * sd).all()
    assert (sampled.predict(target="new").sd > sampled.predict(target="population").sd).all()
    assert sampled.prior.df == 4.0
    assert len(sampled.prior.weights) > 1
    adapted = sampled.adapt(outlying.take([0]))
    assert abs(adapted.theta.values[0, 0] - sampled.theta.values[0, 0]) < 0.2


def test_the_evidence_of_full_bayes_is_the_integral(schools, heavy_schools, eight):
    """log p(D) of eight schools under t₄ against a grid in (μ, log τ) of exact evidences.

    The grid is spectral: both priors and evidence are smooth, and its halves agree to 1e-6.
    """
    model, fit = heavy_schools, eight
    hyperprior = model.phi_distributions(schools.tasks)
    mu, log_tau = np.linspace(-40, 60, 81), np.linspace(-9, 6, 61)
    with float64():
        rows = statistics(schools.tasks)

        def log_joint(m, t):
            phi = {"mu": m[None], "tau": jnp.exp(t)[None]}
            found = OverScales.at(rows, model.prior, phi).log_normaliser.sum()
            hyperpriors = (
                hyperprior["mu"].log_prob(m[None]),
                hyperprior["tau"].log_prob(jnp.exp(t)[None]),
            )
            return found + t + sum(b.sum() for b in hyperpriors)

        over_tau = jax.vmap(log_joint, (None, 0))
        logs = jax.jit(lambda m, t: jax.lax.map(lambda one: over_tau(one, t), m))(mu, log_tau)
    expected = special.logsumexp(logs) + np.log((mu[1] - mu[0]) * (log_tau[1] - log_tau[0]))
    assert fit.evidence is not None
    assert fit.info["log_evidence_se"] < 0.02
    assert abs(fit.evidence - expected) < 4 * fit.info["log_evidence_se"] + 1e-4


# ------------------------------------------------------------------------ checks


@pytest.mark.slow
def test_leaving_tasks_out_prefers_the_student_with_an_outlier(outlying, robust, sampled):
    """The outlier alone costs the Gaussian φ̂ more than 50 nats, and full Bayes more than 10."""
    by_t = hb.checks.leave_one_task_out(robust)["log_density"].sum()
    plain = hb.empirical_bayes(GAUSSIAN, outlying, num_draws=1, num_chains=1)
    assert by_t > hb.checks.leave_one_task_out(plain)["log_density"].sum() + 50
    full = hb.checks.leave_one_task_out(sampled)
    assert np.median(full["pareto_k"]) < 0.5
    # a point φ̂ from fifteen tasks has tails too light, which averaging over φ mends
    assert full["log_density"].sum() > by_t
    normal = hb.full_bayes(GAUSSIAN, outlying, num_draws=500, num_chains=2, progress=False)
    gaussian = hb.checks.leave_one_task_out(normal)["log_density"].sum()
    assert full["log_density"].sum() > gaussian + 10


@pytest.mark.slow
def test_leaving_tasks_out_is_indifferent_without_one():
    """Twice sixteen Gaussian tasks: t₄ gains nothing, and loses less than 0.15 nats a task.

    That is about what ∫ N log (N / t₄) costs in two dimensions at its best scale, 0.1 nats.
    """

    def scores(model: hb.HierarchicalModel, tasks: hb.Tasks) -> np.ndarray:
        fit = hb.full_bayes(model, tasks, num_draws=500, num_chains=2, seed=0, progress=False)
        return np.asarray(hb.checks.leave_one_task_out(fit)["log_density"])

    both = [simulated(16, seed) for seed in (2, 3)]  # the programs of sixteen tasks are there
    gap = np.concatenate([scores(STUDENT, tasks) - scores(GAUSSIAN, tasks) for tasks in both])
    assert gap.sum() < 2 * gap.std() * np.sqrt(len(gap))
    assert gap.mean() > -0.15


@pytest.mark.slow
def test_leaving_tasks_out_by_importance_is_the_refits(schools, heavy_schools, eight):
    """PSIS over φ's draws against full Bayes without the task, eight schools, within 0.1 nats.

    The refit's density is the average of the task's evidence over the refit's draws.
    """
    model, found = heavy_schools, hb.checks.leave_one_task_out(eight)["log_density"]
    for j in (0, 5):
        rest = schools.tasks.take(np.delete(np.arange(8), j))
        again = hb.full_bayes(model, rest, seed=1, progress=False)
        assert again.phi_draws is not None
        draws = {n: v.reshape(-1, *v.shape[2:]) for n, v in again.phi_draws.items()}
        one = schools.tasks.take([j])
        logs = [
            Exact()(model, one, {n: v[s] for n, v in draws.items()})[0] for s in range(0, 4000, 40)
        ]
        assert abs(special.logsumexp(logs) - np.log(len(logs)) - found[j]) < 0.1


# -------------------------------------------------------------- what is not there


def test_what_needs_a_gaussian_prior_is_refused_in_words(outlying, robust, eight, schools):
    for call in (
        lambda: hb.imaml(STUDENT, outlying),
        lambda: hb.empirical_bayes(STUDENT, outlying, "reml"),
        lambda: hb.checks.theta_standard_errors(robust),
    ):
        with refuses("StudentT prior", "full_bayes"):
            call()
    with refuses("equivalence_report", "Gaussian"):
        hb.equivalence_report(hb.reptile(eight.model, schools.tasks), eight)
    binary = hb.HierarchicalModel(hb.likelihoods.Bernoulli(), hb.priors.StudentT(4))
    flags = hb.Tasks.from_arrays(
        [(x.reshape(-1, 1), (x > 0).astype(float)) for x in np.random.default_rng(0).normal(
            size=(4, 9))]
    )  # fmt: skip
    with refuses("Bernoulli", "StudentT prior", 'full_bayes(method="nuts")'):
        hb.empirical_bayes(binary, flags)
    with refuses("collapsed", 'method="nuts"'):
        hb.full_bayes(binary, flags, "collapsed")


@pytest.mark.slow
def test_baselines_and_steps_do_not_ask_the_prior(outlying):
    """They take only its centre: the same numbers as under a Gaussian prior."""
    for method in (hb.no_pooling, hb.complete_pooling, hb.reptile):
        one, other = method(STUDENT, outlying), method(GAUSSIAN, outlying)
        np.testing.assert_array_equal(one.theta.values, other.theta.values)
    pooled = hb.complete_pooling(STUDENT, outlying)
    assert not pooled.prior.scale_trils.any()


@pytest.mark.slow
def test_binary_tasks_go_by_nuts(tmp_path):
    """And say of new tasks that they cannot be adapted to."""
    rng = np.random.default_rng(4)
    flags = hb.Tasks.from_arrays(
        [(np.ones((12, 1)), (rng.random(12) < p).astype(float)) for p in (0.3, 0.5, 0.6, 0.4, 0.7)]
    )
    model = hb.HierarchicalModel(hb.likelihoods.Bernoulli(), hb.priors.StudentT(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = hb.full_bayes(model, flags, num_draws=100, num_chains=2, num_warmup=100, seed=0,
                            progress=False)  # fmt: skip
    assert fit.info["method"] == "nuts"
    assert fit.predict(target="new").mean.shape == (60,)
    with refuses("Student-t", "together"):
        fit.adapt(flags)
    with refuses("leave_one_task_out", "Gaussian"):
        hb.checks.leave_one_task_out(fit)
    fit.save(tmp_path / "fit.nc")
    np.testing.assert_array_equal(hb.load(tmp_path / "fit.nc").theta.values, fit.theta.values)


@pytest.mark.slow
def test_collapsed_and_joint_sampling_agree(schools, heavy_schools):
    """4 × 7,000 draws of NUTS, non-centred, against the collapsed posterior's moments."""
    fits = [
        hb.full_bayes(heavy_schools, schools.tasks, method, num_draws=draws, seed=5, progress=False)
        for method, draws in (("collapsed", 10_000), ("nuts", 7_000))
    ]
    assert fits[0].phi_draws is not None
    posterior = fits[0].datatree["posterior"]
    expected = {
        name: {"mean": posterior[name].mean(("chain", "draw")).values,
               "sd": posterior[name].std(("chain", "draw")).values}
        for name in ("mu", "tau", "theta")
    }  # fmt: skip
    assert_agreement(fits[1].datatree["posterior"], expected)
