"""Evidence and posteriors of tasks that are not Gaussian, by Laplace and by quadrature.

Rung (a): Gaussian tasks, where Laplace is exact; the published table of Laplace's bias
(methods, section 3.3, by adaptive quadrature). Rung (b): SciPy's quadrature and optimisers,
finite differences, a dense grid. Rung (c): one node is Laplace. Rung (d): draws against
quadrature.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from assertions import close, gradient
from scipy import optimize, special, stats
from test_families import LIKELIHOODS, PHI, expected, log_density, outcomes

import hierbayes as hb
from hierbayes.adaptation import Laplace
from hierbayes.adaptation.mode import LogJoint, damped_newton
from hierbayes.adaptation.quadrature import Quadrature, RowsAndRule, nodes_of
from hierbayes.numerics import float64
from hierbayes.rows import rows_of

every_family = pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS.keys())


def tasks_of(likelihood, rng, d, sizes=(4, 1, 7)):
    """Tasks of these sizes with an intercept, and their f around the prior's mean."""
    parts = []
    for n in sizes:
        x = np.column_stack([np.ones(n), rng.normal(size=(n, d - 1))])
        y, slots = outcomes(likelihood, rng, x @ rng.normal(0.2, 0.6, d))
        parts.append(pd.DataFrame({"y": y, **slots} | {f"x{k}": x[:, k] for k in range(1, d)}))
    frame = pd.concat(parts, keys=range(len(sizes)), names=["g"]).reset_index("g")
    columns = {"trials": "trials"} if "trials" in frame else {}
    return hb.Tasks.from_dataframe(
        frame, task="g", outcome="y", predictors=[f"x{k}" for k in range(1, d)], **columns
    )


def phi_of(d):
    phi = PHI | {"mu": np.linspace(0.2, -0.3, d), "tau": np.linspace(0.9, 0.5, d)}
    if d > 1:
        phi["corr"] = np.full((d, d), 0.4) + 0.6 * np.eye(d)
    return phi


class Found(NamedTuple):
    log_evidence: jax.Array
    mode: jax.Array
    converged: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def evidence_of(likelihood, num_nodes, rows, phi, start):
    """One program for all data and φ of one shape."""
    model = hb.HierarchicalModel(likelihood, hb.priors.Gaussian(correlated="corr" in phi))
    if num_nodes == 1:
        at = Laplace.given(model, phi, rows, start)
    else:
        at = Quadrature.given(model, phi, RowsAndRule(rows, nodes_of(num_nodes, len(start))), start)
    return Found(at.log_normaliser, at.start, at.converged)


def numbers_of(likelihood, tasks):
    """(rows, start) as arguments of a program."""
    start = Laplace().begin(tasks)
    return jax.tree.map(jnp.asarray, (rows_of(tasks, likelihood), start))


def found(likelihood, tasks, phi, num_nodes):
    with float64():
        rows, start = numbers_of(likelihood, tasks)
        evidence = evidence_of(likelihood, num_nodes, rows, phi, start)
        own = slice(tasks.num_tasks)  # the tasks beyond only fill up
        log_evidence, mode, converged = map(np.asarray, evidence)
        return Found(log_evidence[own], mode[:, own], converged[own])


def log_joint(likelihood, task, phi, theta):
    """log p(D_j | θ) + log p(θ | φ), by SciPy."""
    d = len(phi["mu"])
    corr = phi.get("corr", np.eye(d))
    cov = phi["tau"][:, None] * corr * phi["tau"]
    f = task.predictors @ theta
    rows = log_density(expected(likelihood, f, task.slots.get("trials")), task.outcome)
    return rows.sum() + stats.multivariate_normal(phi["mu"], cov).logpdf(theta)


def on_a_grid(likelihood, task, phi):
    """20,001 values of θ over ±10 prior sds and log p(D_j, θ) there: the trapezium rule is exact.

    What it leaves out and its rounding are below 1e-12 of the integral of a smooth density.
    """
    grid = phi["mu"][0] + phi["tau"][0] * np.linspace(-10, 10, 20_001)
    f = grid[:, None] * task.predictors[:, 0]
    rows = log_density(expected(likelihood, f, task.slots.get("trials")), task.outcome).sum(1)
    return grid, rows + stats.norm(phi["mu"][0], phi["tau"][0]).logpdf(grid)


# 1e-7: 61 nodes for posteriors from priors of sd 0.9 under single rows, the least normal of them
@every_family
def test_the_evidence_of_an_intercept_is_its_integral(likelihood, rng):
    tasks, phi = tasks_of(likelihood, rng, 1), phi_of(1)
    values = found(likelihood, tasks, phi, 61).log_evidence
    for j in range(tasks.num_tasks):
        grid, log = on_a_grid(likelihood, tasks.take([j]).flat(), phi)
        whole = special.logsumexp(log) + np.log(grid[1] - grid[0])
        close(values[j], whole, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["Bernoulli", pytest.param("Poisson", marks=pytest.mark.slow)])
def test_the_evidence_of_two_coefficients_is_its_integral(name, rng):
    """A dense grid of 401 × 401 over ±7 prior sds, where the trapezium rule is next to exact."""
    likelihood = LIKELIHOODS[name]
    tasks, phi = tasks_of(likelihood, rng, 2), phi_of(2)
    values = found(likelihood, tasks, phi, 31).log_evidence
    root = np.linalg.cholesky(phi["tau"][:, None] * phi["corr"] * phi["tau"])
    axis = np.linspace(-7, 7, 401)
    z = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    thetas = phi["mu"] + z @ root.T
    for j in range(tasks.num_tasks):
        task = tasks.take([j]).flat()
        f = thetas @ task.predictors.T
        rows = log_density(expected(likelihood, f, None), task.outcome).sum(1)
        prior = -0.5 * (z**2).sum(1) - np.log(2 * np.pi)
        whole = special.logsumexp(rows + prior) + 2 * np.log(axis[1] - axis[0])
        close(values[j], whole, rtol=1e-8, atol=1e-8)


def test_one_node_is_laplace(rng):
    """SciPy's mode and a Hessian by differences; 1e-6 from these."""
    likelihood = LIKELIHOODS["Poisson"]
    tasks, phi = tasks_of(likelihood, rng, 2), phi_of(2)
    values = found(likelihood, tasks, phi, 1).log_evidence
    for j in range(tasks.num_tasks):
        task = tasks.take([j]).flat()
        minus = lambda t, task=task: -log_joint(likelihood, task, phi, t)  # noqa: E731
        mode = optimize.minimize(minus, phi["mu"], method="BFGS", options={"gtol": 1e-8}).x
        h, unit = 1e-4, np.eye(2)
        hessian = np.array([[
            (minus(mode + h * (a + b)) - minus(mode + h * (a - b))
             - minus(mode - h * (a - b)) + minus(mode - h * (a + b))) / (4 * h * h)
            for a in unit] for b in unit])  # fmt: skip
        laplace = -minus(mode) + np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(hessian)[1]
        close(values[j], laplace, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_more_nodes_come_nearer(rng):
    likelihood = LIKELIHOODS["Bernoulli"]
    tasks, phi = tasks_of(likelihood, rng, 1), phi_of(1) | {"tau": np.array([2.0])}
    right = found(likelihood, tasks, phi, 61).log_evidence
    errors = [np.abs(found(likelihood, tasks, phi, q).log_evidence - right).max()
              for q in (1, 5, 15)]  # fmt: skip
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


# ------------------------------------------------------------------- derivatives


def as_vector(phi):
    return np.concatenate([phi["mu"], phi["tau"]])


@pytest.mark.parametrize(
    ("name", "num_nodes"),
    [
        ("Bernoulli", 15),
        *(pytest.param(*case, marks=pytest.mark.slow)
          for case in [("Poisson", 1), ("NegativeBinomial", 1), ("NegativeBinomial", 15)]),
    ],
)  # fmt: skip
def test_gradients_are_differences(name, num_nodes, rng):
    """With nodes held the slope is that of the integral: both agree to the nodes' error, 1e-6."""
    likelihood = LIKELIHOODS[name]
    tasks, phi = tasks_of(likelihood, rng, 2), phi_of(2)
    del phi["corr"]
    value = total_of(likelihood, tasks, phi, num_nodes)
    with float64():
        at = as_vector(phi)
        compiled = jax.jit(jax.value_and_grad(value))
        claimed = np.asarray(compiled(at)[1])
        gradient(lambda v: float(compiled(v)[0]), at, claimed, rtol=1e-6)


def total_of(likelihood, tasks, phi, num_nodes):
    with float64():
        rows, start = numbers_of(likelihood, tasks)
    d = len(phi["mu"])

    def value(v):
        at = phi | {"mu": v[:d], "tau": v[d:]}
        return evidence_of(likelihood, num_nodes, rows, at, start).log_evidence.sum()

    return value


@pytest.mark.slow
def test_laplace_has_the_right_second_derivatives(rng):
    """Its Hessian by automatic differentiation, against differences of its gradient."""
    likelihood = LIKELIHOODS["Bernoulli"]
    tasks, phi = tasks_of(likelihood, rng, 1, sizes=(3, 5, 8)), phi_of(1)
    value = total_of(likelihood, tasks, phi, 1)
    with float64():
        at = as_vector(phi)
        hessian = np.asarray(jax.jit(jax.hessian(value))(at))
        slope = jax.jit(jax.grad(value))
        for i in range(2):
            gradient(lambda v, i=i: float(slope(v)[i]), at, hessian[i], rtol=1e-6)


# ------------------------------------------------------------------------- the climb


@pytest.mark.parametrize(("n", "tau", "first"), [(200, 1.0, 30), (50, 1.0, 13)])
def test_rare_events_far_out_are_climbed(n, tau, first):
    """Where undamped Newton steps from zero diverge (methods, section 3.2)."""
    successes = np.maximum(np.minimum(np.arange(201.0), n), first)  # as many tasks as below
    tasks = binomials(n, successes)
    likelihood = hb.likelihoods.Binomial()
    phi = {"mu": np.array([-4.0]), "tau": np.array([tau])}
    got = found(likelihood, tasks, phi, 1)
    assert got.converged.all()
    for j in (0, (first + n) // 2, 200):
        y = successes[j]
        slope = lambda t, y=y: y - n * special.expit(t) - (t + 4.0) / tau**2  # noqa: E731
        close(-4.0 + tau * got.mode[0, j], optimize.brentq(slope, -20, 20, xtol=1e-13), atol=1e-9)


def binomials(n, successes):
    frame = pd.DataFrame({"g": np.arange(len(successes)), "y": successes, "n": float(n)})
    return hb.Tasks.from_dataframe(frame, task="g", outcome="y", predictors=[], trials="n")


def test_undamped_steps_would_not_have_got_there():
    """Negative control for the damping: the same climb by hand, whole steps only."""
    n, y, z = 200, 60.0, 0.0
    for _ in range(60):
        p = special.expit(-4.0 + z)
        z += (y - n * p - z) / (n * p * (1 - p) + 1)
        if not np.isfinite(z) or abs(z) > 1e3:
            break
    assert not abs(y - n * special.expit(-4.0 + z) - z) < 1e-6


def test_the_climb_starts_anywhere(rng):
    likelihood = LIKELIHOODS["Poisson"]
    tasks, phi = tasks_of(likelihood, rng, 2), phi_of(2)
    with float64():
        model = hb.HierarchicalModel(likelihood, hb.priors.Gaussian())
        rows, _ = numbers_of(likelihood, tasks)
        up = jax.jit(lambda start: damped_newton(LogJoint.at(model, phi, rows), start))
        ends = [np.asarray(up(np.full((2, 3), s))) for s in (0.0, 5.0, -5.0)]
    close(ends[1], ends[0], rtol=1e-4, atol=1e-4)
    close(ends[2], ends[0], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------- Laplace's bias

TABLE = [
    # n, μ, τ, mean error of log p̂ a task, Laplace's own μ and τ
    (2, 0.0, 1.0, -0.0105, 0.0, 0.702),
    (5, 0.0, 1.0, -0.0126, 0.0, 0.935),
    (10, 0.0, 1.0, -0.0115, 0.0, 0.978),
    (50, 0.0, 1.0, -0.0050, 0.0, 0.998),
    (2, 0.0, 2.0, -0.0326, 0.0, 1.537),
    (5, 0.0, 2.0, -0.0290, 0.0, 1.886),
    (20, -4.0, 1.0, 0.0090, -4.054, 1.060),
    (50, -5.0, 0.5, 0.0019, -5.113, 0.708),
    (200, -5.0, 0.5, 0.0031, -5.008, 0.516),
]
"""Methods, section 3.3: where Laplace is poor."""


@pytest.mark.parametrize(("n", "mu", "tau", "error", "own_mu", "own_tau"), TABLE)
def test_laplace_is_biased_as_the_table_says(n, mu, tau, error, own_mu, own_tau):
    """Every outcome 0…n is a task, weighted by its probability; to the table's last digit.

    Beyond stand copies of the last, weighted by nothing, so that one program serves all rows.
    """
    counts = np.arange(201.0)
    tasks, likelihood = binomials(n, np.minimum(counts, n)), hb.likelihoods.Binomial()
    truth = {"mu": np.array([mu]), "tau": np.array([tau])}
    right = found(likelihood, tasks, truth, 61).log_evidence
    chance = np.exp(right) * (counts <= n)
    close(chance.sum(), 1.0, rtol=1e-8)
    laplace = found(likelihood, tasks, truth, 1).log_evidence
    close(chance @ (laplace - right), error, atol=6e-5)
    with float64():
        rows, start = numbers_of(likelihood, tasks)
        chance = np.append(chance, np.zeros(rows.num_tasks - len(chance)))
        best = optimize.minimize(
            lambda v: tuple(np.asarray(part, float) for part in population(v, rows, chance, start)),
            np.array([mu, np.log(tau)]), jac=True, method="BFGS", options={"gtol": 1e-9},
        ).x  # fmt: skip
    close(best[0], own_mu, atol=6e-4)
    close(np.exp(best[1]), own_tau, atol=6e-4)


@jax.jit
@jax.value_and_grad
def population(v, rows, chance, start):
    """Minus Laplace's expected evidence of a task at (μ, log τ)."""
    phi = {"mu": v[:1], "tau": jnp.exp(v[1:])}
    values = evidence_of(hb.likelihoods.Binomial(), 1, rows, phi, start)
    return -(chance * values.log_evidence).sum()


# ---------------------------------------------------------------------- posteriors


def test_posterior_moments_are_those_of_a_grid(rng):
    likelihood = LIKELIHOODS["Poisson"]
    tasks, phi = tasks_of(likelihood, rng, 1), phi_of(1)
    model = hb.HierarchicalModel(likelihood, hb.priors.Gaussian(correlated=False))
    adapted = Quadrature(41)(model, tasks, phi)
    for j in range(tasks.num_tasks):
        grid, log = on_a_grid(likelihood, tasks.take([j]).flat(), phi)
        weight = np.exp(log - special.logsumexp(log))
        mean = weight @ grid
        close(adapted.mean[j, 0], mean, rtol=1e-7, atol=1e-8)
        close(adapted.covariance[j, 0, 0], weight @ (grid - mean) ** 2, rtol=1e-6)


@pytest.mark.parametrize("d", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_draws_have_the_posteriors_moments(d):
    """20,000 draws at one φ of single rows, least normal: four standard errors of each mean."""
    likelihood, rng = LIKELIHOODS["Bernoulli"], np.random.default_rng(2)  # skewed by 0.45 and more
    tasks = tasks_of(likelihood, rng, d, sizes=(1, 2, 3))
    phi = phi_of(d) | {"tau": np.array([2.5, 1.5])[:d]}
    model = hb.HierarchicalModel(likelihood, hb.priors.Gaussian())
    exact = Quadrature(31)(model, tasks, phi)
    many = {name: np.broadcast_to(v, (20_000, *np.shape(v))) for name, v in phi.items()}
    draws = Quadrature(31).draws(model, tasks, many, 0)
    sd = np.sqrt(np.diagonal(exact.covariance, axis1=1, axis2=2))
    assert (np.abs(draws.mean(0) - exact.mean) < 4 * sd / np.sqrt(20_000)).all()
    close(draws.std(0), sd, rtol=0.03)
    skew = ((draws - draws.mean(0)) ** 3).mean(0) / draws.std(0) ** 3
    assert np.abs(skew).max() > 0.2  # which Laplace's normal would not have


def test_chains_are_as_long_as_their_weights_ask():
    """Equal weights need the fewest steps; one of thirty among twelve needs them all.

    Its share of the mass is 30/41 and it moves with probability 41/360: (1 − 41/360)^11 = 0.26.
    """
    from hierbayes.adaptation.draws_of_theta import LEAST_STEPS, MOST_STEPS, steps_needed

    assert steps_needed(np.zeros((3, 12, 2))) == LEAST_STEPS
    heavy = np.zeros((3, 12, 2))
    heavy[:, 0, 1] = np.log(30.0)
    assert steps_needed(heavy) == MOST_STEPS
