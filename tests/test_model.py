"""One model, three ways to read it: the joint density, the NumPyro program, an independent sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from assertions import close, refuses
from numpyro.distributions import biject_to, constraints
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density
from numpyro.optim import Adam
from scipy import special, stats

import hierbayes as hb
from hierbayes.numerics import float64
from hierbayes.phi.assembled import Assembled

HYPER = dict(
    mu=dist.Normal(0.5, 2.0), tau=dist.HalfCauchy(1.5), corr=2.0, beta=dist.Normal(0.0, 3.0),
    gamma=dist.Normal(0.0, 1.0), sigma=dist.Exponential(0.7),
)  # fmt: skip
"""Hyperpriors with closed forms in SciPy, one a name, so that the sum below can name them."""

VARIANTS: dict[str, dict[str, Any]] = {
    "d=2, independent": dict(d=2, correlated=False),
    "d=3": dict(d=3),
    "d=3, blocks and a zero mean": dict(d=3, correlated=[("x0", "x2")], zero_mean=("x1",)),
    "d=2, shared and task predictors": dict(d=2, shared=2, level=1),
    "d=1, known_se": dict(d=1, known_se=True),
}


def made(
    d: int, *, correlated: Any = True, zero_mean: tuple[str, ...] = (), shared: int = 0,
    level: int = 0, known_se: bool = False,
) -> tuple[hb.HierarchicalModel, hb.Tasks, dict[str, Any], np.ndarray]:  # fmt: skip
    """(model, tasks, φ, θ) with random values; sizes 3, 0, 1, 4."""
    rng = np.random.default_rng([d, shared, level])
    sizes = (3, 0, 1, 4)
    tasks = hb.Tasks.from_arrays(
        [(rng.normal(size=(n, d)), rng.normal(size=n)) for n in sizes],
        shared=[rng.normal(size=(n, shared)) for n in sizes],
        task_predictors=rng.normal(size=(4, level)),
        known_se=[0.5 + rng.random(n) for n in sizes] if known_se else None,
    )
    prior = hb.priors.Gaussian(correlated, zero_mean)
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(known_se), prior, hb.HyperPrior(**HYPER))
    free = prior.free_mean(tasks.coef)
    phi: dict[str, Any] = {
        "mu": np.where(free, rng.normal(size=d), 0.0),
        "tau": 0.5 + rng.random(d),
    }
    blocks = [b for b in prior.blocks(tasks.coef) if len(b) > 1]
    if blocks:
        phi["corr"] = np.eye(d)
        for b in blocks:
            phi["corr"][np.ix_(b, b)] = np.corrcoef(rng.normal(size=(len(b), 9)))
    if shared:
        phi["beta"] = rng.normal(size=shared)
    if level:
        phi["gamma"] = rng.normal(size=(d, level))
    if not known_se:
        phi["sigma"] = np.asarray(0.8)
    return model, tasks, phi, rng.normal(size=(4, d))


def lkj(matrix: np.ndarray, concentration: float) -> float:
    """Log density of LKJ(η) over correlation matrices; Lewandowski et al. (2009), equation 16."""
    d = len(matrix)
    constant = 0.0
    for k in range(1, d):
        alpha = concentration + 0.5 * (d - k - 1)
        constant += (d - k) * ((2 * alpha - 1) * np.log(2.0) + special.betaln(alpha, alpha))
    return (concentration - 1) * np.linalg.slogdet(matrix)[1] - constant


def by_hand(model: Any, tasks: hb.Tasks, phi: dict[str, Any], theta: np.ndarray) -> float:
    """Log p(φ) + Σ_j log p(θ_j | φ) + Σ_i log p(y_i | θ, φ), term by term with SciPy."""
    free = model.prior.free_mean(tasks.coef)
    total = stats.norm.logpdf(phi["mu"][free], 0.5, 2.0).sum()
    total += stats.halfcauchy.logpdf(phi["tau"], scale=1.5).sum()
    for b in model.prior.blocks(tasks.coef):
        total += lkj(phi["corr"][np.ix_(b, b)], 2.0) if len(b) > 1 else 0.0
    if "beta" in phi:
        total += stats.norm.logpdf(phi["beta"], 0.0, 3.0).sum()
    if "gamma" in phi:
        total += stats.norm.logpdf(phi["gamma"], 0.0, 1.0).sum()
    if "sigma" in phi:
        total += stats.expon.logpdf(phi["sigma"], scale=1 / 0.7)
    covariance = np.outer(phi["tau"], phi["tau"]) * phi.get("corr", np.eye(len(phi["tau"])))
    for j in range(tasks.num_tasks):
        one = tasks.take([j])
        location = phi["mu"] + (phi["gamma"] @ one.task_predictors[0] if "gamma" in phi else 0.0)
        total += stats.multivariate_normal.logpdf(theta[j], location, covariance)
        mean = one.predictors @ theta[j]
        mean = mean + (one.shared @ phi["beta"] if "beta" in phi else 0.0)
        total += stats.norm.logpdf(
            one.outcome, mean, one.slots.get("known_se", phi.get("sigma"))
        ).sum()
    return float(total)


# ----------------------------------------------------------------------- density


REPEATED = ("d=2, independent", "d=3")
"""Of these, the other variants have every part."""


@pytest.fixture(
    params=[
        pytest.param(made, id=name, marks=pytest.mark.slow if name in REPEATED else ())
        for name, made in VARIANTS.items()
    ],
    scope="module",
)
def variant(request: pytest.FixtureRequest):
    return made(**request.param)


def program_density(model: Any, tasks: Any, values: dict[str, Any], centred: bool = True) -> float:
    program = model.numpyro_program(tasks, centred=centred)
    with float64():
        return float(jax.jit(lambda v: log_density(program, (), {}, v)[0])(values))


def test_the_program_the_joint_density_and_the_sum_by_hand_agree(variant):
    """Sums of about thirty terms of order one in float64: 1e-10 is far above their rounding."""
    model, tasks, phi, theta = variant
    joint = model.log_joint(phi, theta, tasks)
    close(joint, by_hand(model, tasks, phi, theta), rtol=1e-10)
    close(program_density(model, tasks, phi | {"theta": theta}), joint, rtol=1e-10)


def test_the_sum_by_hand_notices_each_name():
    """The control: nothing in φ is idle, so an agreement above is about all of it."""
    model, tasks, phi, theta = made(2, shared=1, level=1)
    whole = by_hand(model, tasks, phi, theta)
    for name, value in phi.items():
        moved = value * (0.9 if name != "corr" else 1.0)
        if name == "corr":
            moved = 0.9 * value + 0.1 * np.eye(2)
        assert abs(by_hand(model, tasks, phi | {name: moved}, theta) - whole) > 1e-3


def test_non_centring_is_a_change_of_variables():
    """With θ_j = m_j + L z_j: log p(z) = log p(θ) + J log |L|, all else equal; 1e-10 as above."""
    model, tasks, phi, _ = made(3, level=1)
    white = np.random.default_rng(0).normal(size=(4, 3))
    root = np.linalg.cholesky(np.outer(phi["tau"], phi["tau"]) * phi["corr"])
    theta = phi["mu"] + tasks.task_predictors @ phi["gamma"].T + white @ root.T
    free = program_density(model, tasks, phi | {"z": white}, centred=False)
    close(free, model.log_joint(phi, theta, tasks) + 4 * np.log(np.diag(root)).sum(), rtol=1e-10)


# ------------------------------------------------------------- NumPyro's own tools


@pytest.mark.slow
def test_mcmc_runs_the_program():
    model, tasks, _, _ = made(1, shared=1)
    mcmc = MCMC(NUTS(model.numpyro_program(tasks)), num_warmup=5, num_samples=5, num_chains=2,
                chain_method="vectorized", progress_bar=False)  # fmt: skip
    mcmc.run(jax.random.key(0))
    draws = mcmc.get_samples(group_by_chain=True)
    assert draws["theta"].shape == (2, 5, 4, 1)
    assert set(draws) == {"mu", "tau", "beta", "sigma", "theta"}
    assert all(np.isfinite(value).all() for value in draws.values())


@pytest.mark.slow
def test_svi_runs_the_program():
    model, tasks, _, _ = made(1, shared=1)
    program = model.numpyro_program(tasks)
    svi = SVI(program, AutoNormal(program), Adam(0.01), Trace_ELBO())
    result = svi.run(jax.random.key(0), 50, progress_bar=False)
    assert np.isfinite(result.losses).all()
    assert result.losses[-10:].mean() < result.losses[:10].mean()


@pytest.mark.parametrize(
    ("d", "centred"), [(1, True), pytest.param(2, False, marks=pytest.mark.slow)]
)
def test_predictive_draws_from_the_prior(d, centred):
    model, tasks, _, _ = made(d)
    program = model.numpyro_program(tasks, centred=centred)
    draws = Predictive(program, num_samples=400)(jax.random.key(1))
    assert draws["theta"].shape == (400, 4, d)
    if d > 1:
        assert draws["corr"].shape == (400, 2, 2)
    # mean of 400 draws of Normal(0.5, 2): standard error 0.1
    close(draws["mu"].mean(0), [0.5] * d, atol=0.4)
    assert (np.asarray(draws["tau"]) > 0).all()


# -------------------------------------------------------------------- hyperpriors


def sites(d: int = 2, **hyperpriors: Any) -> dict[str, dist.Distribution]:
    model, tasks, *_ = made(d, shared=1)
    return replace(model, hyperprior=hb.HyperPrior(**hyperpriors)).phi_distributions(tasks)


@pytest.mark.parametrize(
    ("hyperprior", "expected"),
    [
        (dist.HalfNormal(2.0), lambda t: stats.halfnorm.logpdf(t, scale=2.0).sum()),
        (dist.HalfNormal(np.array([1.0, 3.0])),
         lambda t: stats.halfnorm.logpdf(t, scale=[1.0, 3.0]).sum()),
        (dist.HalfNormal(np.array([1.0, 3.0])).to_event(1),
         lambda t: stats.halfnorm.logpdf(t, scale=[1.0, 3.0]).sum()),
        ({"x0": dist.HalfNormal(1.0), "x1": dist.HalfNormal(3.0)},
         lambda t: stats.halfnorm.logpdf(t, scale=[1.0, 3.0]).sum()),
        ({"x1": dist.Gamma(2.0, 0.5), "x0": dist.HalfCauchy(2.0)},
         lambda t: stats.halfcauchy.logpdf(t[0], scale=2) + stats.gamma.logpdf(t[1], 2, scale=2)),
        (dist.ImproperUniform(dist.constraints.positive, (), ()), lambda t: 0.0),
    ],
    ids=["scalar", "batch", "event", "mapping", "mixed mapping", "improper"],
)  # fmt: skip
def test_a_belief_may_be_given_in_every_form(hyperprior, expected):
    at = np.array([0.7, 1.9])
    with float64():
        tau = sites(tau=hyperprior)["tau"]
        assert tau.shape() == (2,)
        found = jax.jit(lambda at: jnp.sum(tau.log_prob(at)))(at)
        close(found, expected(at), rtol=1e-10)


def test_a_prior_on_a_variance_goes_through_a_transform():
    """σ² ~ InverseGamma(2, 1) read on σ: log p(σ²) + log 2σ."""
    variance = dist.TransformedDistribution(
        dist.InverseGamma(2.0, 1.0), dist.transforms.PowerTransform(0.5)
    )
    with float64():
        found = float(sites(sigma=variance)["sigma"].log_prob(0.7))
    close(found, stats.invgamma.logpdf(0.49, 2.0, scale=1.0) + np.log(1.4), rtol=1e-10)


@pytest.mark.parametrize("corr", [3.0, dist.LKJ(3, 3.0)], ids=["concentration", "distribution"])
def test_correlations_take_a_concentration_or_a_distribution(corr):
    matrix = np.corrcoef(np.random.default_rng(1).normal(size=(3, 9)))
    with float64():
        found = float(jax.jit(sites(3, corr=corr)["corr"].log_prob)(matrix))
    close(found, lkj(matrix, 3.0), rtol=1e-10)


def test_defaults_are_what_the_docstring_says():
    """s_y and sd(x) as stated; the intercept is the one where every predictor is at its mean."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(10.0, 2.0, size=60), rng.normal(4.0, 3.0, size=60)
    z = rng.normal(0.0, 0.5, size=60)
    design = np.column_stack([np.ones(60), x])
    level = rng.normal(size=(6, 1))
    tasks = hb.Tasks.from_arrays(
        list(zip(np.split(design, 6), np.split(y, 6), strict=True)),
        coef=["Intercept", "x"], shared=np.split(z[:, None], 6), task_predictors=level,
    )  # fmt: skip
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian()).resolve(tasks)
    s_y, s_x = y.std(), y.std() / x.std()
    hyperprior = model.hyperprior
    close(hyperprior.mu["Intercept"].loc, y.mean(), rtol=1e-12)
    close(hyperprior.mu["Intercept"].scale, 2.5 * s_y, rtol=1e-12)
    close([hyperprior.mu["x"].loc, hyperprior.mu["x"].scale], [0.0, 2.5 * s_x], rtol=1e-12)
    close([hyperprior.tau[c].scale for c in tasks.coef], [s_y, s_x], rtol=1e-12)
    close(hyperprior.beta["z0"].scale, 2.5 * y.std() / z.std(), rtol=1e-12)
    close(hyperprior.gamma["x"].scale, 2.5 * s_x / level.std(axis=0), rtol=1e-12)
    close(hyperprior.sigma.scale, s_y, rtol=1e-12)
    assert hyperprior.corr == 2.0
    again = model.resolve(tasks.keep_rows(tasks.outcome > 4.0))
    assert again.hyperprior.mu is not None
    close(again.hyperprior.mu["x"].scale, hyperprior.mu["x"].scale, rtol=0)
    close(again.hyperprior.sigma.scale, hyperprior.sigma.scale, rtol=0)


def test_independent_coefficients_are_not_centred_and_the_intercept_stays_wide():
    """Under ``||`` Σ depends on where x lies: s_0² = s_y² + (s_x mean x)², at x = 0."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(10.0, 2.0, size=60), rng.normal(4.0, 3.0, size=60)
    design = np.column_stack([np.ones(60), x])
    tasks = hb.Tasks.from_arrays(
        list(zip(np.split(design, 6), np.split(y, 6), strict=True)), coef=["Intercept", "x"]
    )
    prior = hb.priors.Gaussian(correlated=False)
    hyperprior = hb.HierarchicalModel(hb.likelihoods.Gaussian(), prior).resolve(tasks).hyperprior
    s_0 = np.hypot(y.std(), y.std() / x.std() * x.mean())
    close(hyperprior.tau["Intercept"].scale, s_0, rtol=1e-12)
    close(hyperprior.mu["Intercept"].scale, 2.5 * s_0, rtol=1e-12)


def test_a_mapping_fills_the_rest_with_defaults():
    model, tasks, *_ = made(2)
    model = replace(model, hyperprior=hb.HyperPrior(mu={"x1": dist.Normal(7.0, 0.1)}))
    found = model.resolve(tasks).hyperprior.mu
    default = replace(model, hyperprior=hb.HyperPrior()).resolve(tasks).hyperprior.mu
    assert float(found["x1"].loc) == 7.0
    close(found["x0"].scale, default["x0"].scale, rtol=0)


# ------------------------------------------------------------- assembled distributions

ASSEMBLED = {
    "vector": Assembled(
        [(dist.Normal(1.0, 2.0), (np.array(2),)), (dist.HalfNormal(1.0), (np.array(0),))],
        np.array([0.0, 5.0, 0.0]),
    ),
    "blocks": Assembled([(dist.LKJ(2, 2.0), np.ix_((0, 2), (0, 2)))], np.eye(3)),
    "rows": Assembled(
        [(dist.Normal(np.zeros(3), 1.0).to_event(1), (np.array(i), slice(None))) for i in (0, 1)],
        np.zeros((2, 3)),
    ),
    "nothing free": Assembled([], np.array([1.0, 2.0])),
}


@pytest.mark.parametrize(
    "name", ["vector", pytest.param("blocks", marks=pytest.mark.slow), "rows", "nothing free"]
)
def test_assembled_distributions_sample_in_their_support(name):
    whole = ASSEMBLED[name]
    draws = jax.jit(lambda key: whole.sample(key, (7, 3)))(jax.random.key(0))
    assert draws.shape == (7, 3, *whole.event_shape)
    assert jax.jit(whole.log_prob)(draws).shape == (7, 3)
    covered = np.zeros(whole.event_shape, bool)
    for _, index in whole.parts:
        covered[index] = True
    assert (np.asarray(draws)[..., ~covered] == whole.background[~covered]).all()
    within = jax.jit(whole.support)
    assert bool(within(draws[0, 0]))
    bounded = name in ("vector", "blocks")
    assert bool(within(np.full(whole.event_shape, -9.0, np.float32))) != bounded


@pytest.mark.parametrize("name", ["vector", pytest.param("blocks", marks=pytest.mark.slow), "rows"])
def test_assembled_bijections_return_and_know_their_jacobian(name):
    """log |det| against autodiff, on the entries that are free; float64, 1e-10."""
    with float64():
        whole = ASSEMBLED[name]
        transform = biject_to(whole.support)
        size = transform.inverse_shape(whole.shape())[0]
        x = jnp.asarray(np.random.default_rng(2).normal(size=size))
        y = jax.jit(lambda v: transform(v))(x)
        close(jax.jit(transform._inverse)(y), x, rtol=1e-10)
        free = {
            "vector": lambda a: a[jnp.array([2, 0])],
            "blocks": lambda a: a[2, :1],
            "rows": jnp.ravel,
        }[name]
        slope = jax.jit(jax.jacobian(lambda v: free(transform(v))))(x)
        found = jax.jit(transform.log_abs_det_jacobian)(x, y)
        close(found, np.linalg.slogdet(slope)[1], rtol=1e-10)
        both = jnp.stack([x, 2 * x])
        one_by_one, at_once = jax.jit(lambda v: (jax.vmap(transform)(v), transform(v)))(both)
        close(one_by_one, at_once, rtol=1e-12)


def test_two_beliefs_of_different_supports_stay_in_their_own():
    with float64():
        tau = sites(tau={"x0": dist.HalfCauchy(1.0), "x1": dist.Uniform(0.0, 2.0)})["tau"]
        value = biject_to(tau.support)(jnp.array([3.0, 50.0]))
    assert 0 < float(value[1]) <= 2.0
    close(value[0], np.exp(3.0), rtol=1e-12)


def test_drawing_from_an_improper_prior_is_refused_by_name():
    flat = dist.ImproperUniform(constraints.positive, (), ())
    arrays = [(np.ones((3, 1)), np.arange(3.0) + j) for j in range(4)]
    tasks = hb.Tasks.from_arrays(arrays)
    model = hb.HierarchicalModel(
        hb.likelihoods.Gaussian(), hb.priors.Gaussian(), hb.HyperPrior(tau=flat)
    )
    with refuses("tau", "improper"):
        Predictive(model.numpyro_program(tasks), num_samples=2)(jax.random.key(0))
