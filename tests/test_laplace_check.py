"""Laplace's approximation held against better evidences: the check, its nodes, its skewness.

Rung (a): Gaussian integrals, a binomial row's third derivative, the published table of Laplace's
bias (methods, section 3.3). Rung (b): dense grids in NumPy, SciPy's modes, finite differences.
Rung (d): four coefficients against plain Monte Carlo from the prior, within its own error.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from assertions import close, finite_difference, refuses
from conftest import quietly
from scipy import optimize, special, stats

import hierbayes as hb
from hierbayes.checks.laplace_check import _flags, effective_count, largest
from hierbayes.meta.better_evidence import jackknife_error, pooled, student_nodes, x_of
from hierbayes.numerics import float64, to_numpy

QUIET = dict(num_draws=1, num_chains=1)


def binomials(n, successes):
    data = pd.DataFrame({"g": np.arange(len(successes)), "y": successes, "n": n})
    return hb.from_formula("p(y, n) ~ 1 + (1 | g)", data)


# ------------------------------------------------------------------------ the nodes


def gaussian_integrals(nodes, log_weights, precision):
    """Of exp(−½ s² |t|²) / (2π)^{d/2} by every replicate, (R,); the truth is s^{−d}."""
    squares = (nodes**2).sum(-1)
    # nodes' weights hold exp(½ |t|²) already: what is summed is f × w̄ × exp(½ |t|²)
    return np.exp(-0.5 * precision * squares + log_weights).sum((1, 2)) / nodes.shape[2]


@pytest.mark.parametrize("precision", [0.7, 1.0, 3.0])
def test_sobol_nodes_integrate_gaussians(precision):
    """In five dimensions; four standard errors over 16 scrambles, which are below 1 %."""
    values = gaussian_integrals(*student_nodes(256, 5, 16), precision)
    error = values.std(ddof=1) / 4
    assert error < 0.01 * precision**-2.5
    assert abs(values.mean() - precision**-2.5) < 4 * error


def test_wrong_weights_are_seen():
    """Negative control: the weights of normal nodes, under which t = 0 is all that matters."""
    nodes, log_weights = student_nodes(256, 5, 16)
    values = gaussian_integrals(nodes, 0 * log_weights - np.log(256), 1.0)
    assert abs(values.mean() - 1) > 4 * values.std(ddof=1) / 4


def test_runs_of_one_sequence_are_rules_by_themselves():
    """Every run of 64 nodes to 20 %, their mean to 1 %: plain draws would give 20 % and 3.5 %."""
    nodes, log_weights = student_nodes(64, 4, 1, 32)
    each = [gaussian_integrals(nodes[:, :, [k]], log_weights[:, :, [k]], 1.0) for k in range(32)]
    close(np.ravel(each), np.ones(32), rtol=0.2)
    close(np.mean(each), 1.0, rtol=0.01)


def test_the_jackknife_takes_the_logarithms_bias_away(rng):
    """Against NumPy's leave-one-out; the bias of log mean, −½ Var, falls by more than 5."""
    draws = rng.gamma(4.0, 0.25, (8, 40_000))  # mean one, variance ¼ each
    with float64():
        found, without = (np.asarray(part) for part in pooled(jnp.log(draws)))
        error = np.asarray(jackknife_error(without))
    loo = np.array([np.log(np.delete(draws, r, 0).mean(0)) for r in range(8)])
    close(without, loo, rtol=1e-9, atol=1e-12)
    close(found, 8 * np.log(draws.mean(0)) - 7 * loo.mean(0), rtol=1e-9, atol=1e-12)
    plain = np.log(draws.mean(0)).mean()
    se = found.std() / 200
    assert plain < -0.012
    assert abs(found.mean()) < 0.2 * abs(plain) + 4 * se
    close(np.sqrt((error**2).mean()), found.std(), rtol=0.05)


def test_one_replicate_is_itself():
    with float64():
        found, without = pooled(jnp.array([[0.3, -2.0]]))
        assert np.isnan(np.asarray(jackknife_error(without))).all()
    close(found, [0.3, -2.0])


# --------------------------------------------------------------------- the skewness


def symmetric(rng, d):
    tensor = rng.normal(size=(d, d, d))
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    return sum(np.transpose(tensor, p) for p in orders) / 6


def test_the_largest_third_derivative_is_that_of_a_dense_circle(rng):
    tensors = np.stack([symmetric(rng, 2) for _ in range(20)], -1)
    angle = np.linspace(0, np.pi, 20_001)
    v = np.stack([np.cos(angle), np.sin(angle)])
    expected = np.abs(np.einsum("abcj,ai,bi,ci->ji", tensors, v, v, v)).max(1)
    with float64():
        close(jax.jit(largest)(jnp.asarray(tensors)), expected, rtol=1e-6)


def test_the_largest_third_derivative_of_five_axes():
    """T = Σ a_k e_k³ has its largest value |a|_max along an axis, here turned by a rotation."""
    a = np.array([0.3, -0.9, 0.5, 0.1, 0.7])
    turn = stats.special_ortho_group.rvs(5, random_state=1)
    tensor = np.einsum("k,ak,bk,ck->abc", a, turn, turn, turn)[..., None]
    with float64():
        close(jax.jit(largest)(jnp.asarray(tensor)), [0.9], rtol=1e-6)


@pytest.mark.slow
def test_skewness_of_two_coefficients_is_that_of_differences(slopes):
    """|d³Ψ/ds³| along 181 whitened directions, by differences with s = 0.02: right to 1 %."""
    model, tasks = slopes
    fit = hb.empirical_bayes(model, tasks, evidence="laplace", **QUIET)
    found = hb.checks.laplace_check(fit)["skewness"].to_numpy()
    root = np.diag(fit.phi["tau"]) @ np.linalg.cholesky(fit.phi["corr"])
    for j in (0, 3):
        rows = slice(tasks.starts[j], tasks.starts[j + 1])
        x, y = tasks.predictors[rows] @ root, tasks.outcome[rows]
        base = tasks.predictors[rows] @ fit.phi["mu"]

        def psi(z, x=x, y=y, base=base):
            f = base + x @ z
            return (y * f - np.logaddexp(0, f)).sum() - 0.5 * z @ z

        mode = optimize.minimize(lambda z: -psi(z), np.zeros(2), options={"gtol": 1e-9}).x
        p = special.expit(base + x @ mode)
        a = np.eye(2) + x.T @ (x * (p * (1 - p))[:, None])
        unwhite = np.linalg.inv(np.linalg.cholesky(a)).T
        third = []
        for angle in np.linspace(0, np.pi, 181):
            v, h = unwhite @ [np.cos(angle), np.sin(angle)], 0.02
            third.append((psi(mode + 2 * h * v) - 2 * psi(mode + h * v) + 2 * psi(mode - h * v)
                          - psi(mode - 2 * h * v)) / (2 * h**3))  # fmt: skip
        close(found[j], np.abs(third).max(), rtol=1e-2, atol=1e-4)


@pytest.fixture(scope="module")
def slopes():
    """Forty tasks of ten binary rows with a correlated slope."""
    rng = np.random.default_rng(3)
    g, x = np.repeat(np.arange(40), 10), rng.normal(size=400)
    theta = rng.normal(size=(40, 2)) @ np.array([[1.0, 0.3], [0.0, 0.8]]) + [0.3, -0.4]
    y = rng.binomial(1, special.expit(theta[g, 0] + theta[g, 1] * x))
    data = pd.DataFrame({"g": g, "x": x, "y": y})
    return hb.from_formula("y ~ 1 + x + (1 + x | g)", data, family="bernoulli")


# --------------------------------------------------------- the error, task by task


def exact_binomials(n, mu, tau, y):
    """log ∫ Bin(y; n, θ) N(θ; μ, τ²) dθ by the trapezium rule over ±12 τ: exact to rounding."""
    z = np.linspace(-12, 12, 4001)
    theta = mu + tau * z
    rows = stats.binom.logpmf(y[:, None], n, special.expit(theta)) + stats.norm.logpdf(z)
    return special.logsumexp(rows, axis=1) + np.log(z[1] - z[0])


PAIRS = np.concatenate([np.tile([2, 0, 1, 2, 0, 2, 0, 1, 2, 2, 0, 1, 2, 1, 0, 2], 3), [0, 1, 2]])
"""Successes of two trials in 51 tasks: far too few for Laplace."""


@pytest.fixture(scope="module")
def fifty_one():
    """A fit whose tasks and φ the table's rows take the place of: one program serves all."""
    return hb.empirical_bayes(*binomials(2, PAIRS), evidence="laplace", **QUIET)


TABLE = [(2, 0.0, 1.0, -0.0105), (5, 0.0, 1.0, -0.0126), (10, 0.0, 1.0, -0.0115),
         (50, 0.0, 1.0, -0.0050), (2, 0.0, 2.0, -0.0326), (5, 0.0, 2.0, -0.0290),
         (20, -4.0, 1.0, 0.0090), (50, -5.0, 0.5, 0.0019)]  # fmt: skip
"""Methods, section 3.3: n, μ, τ and Laplace's mean error a task."""


@pytest.mark.parametrize(("n", "mu", "tau", "error"), TABLE)
def test_the_errors_are_those_of_the_table(n, mu, tau, error, fifty_one):
    """Every outcome 0…n is a task, weighted by its probability; beyond stand copies of the last."""
    y = np.minimum(np.arange(51), n)
    _, tasks = binomials(n, y)
    phi = {"mu": np.array([mu]), "tau": np.array([tau])}
    found = hb.checks.laplace_check(replace(fifty_one, tasks=tasks, phi=phi, training=None))
    right = exact_binomials(n, mu, tau, y)
    chance = np.exp(right) * (np.arange(51) <= n)
    close(chance.sum(), 1.0, rtol=1e-8)
    close(chance @ found["error"], error, atol=6e-5)  # its last digit
    assert found["effective_count"].tolist() == np.minimum(y, n - y).tolist()
    assert (found["reference_error"] < 1e-6).all()


def test_the_shift_is_a_newton_step_on_the_exact_evidence(fifty_one):
    """Slope of the exact evidence by a dense grid, curvature of Laplace's by SciPy and differences.

    1e-3 of the shift: second differences of Laplace's evidence are right to about as much.
    """
    y, fit = PAIRS, fifty_one
    found = hb.checks.laplace_check(fit)
    at = np.array([fit.phi["mu"][0], fit.phi["tau"][0]])

    def laplace(phi):
        mu, tau = phi
        z = np.zeros(len(y))
        for _ in range(30):
            p = special.expit(mu + tau * z)
            z = z + (tau * (y - 2 * p) - z) / (1 + tau**2 * 2 * p * (1 - p))
        p = special.expit(mu + tau * z)
        value = stats.binom.logpmf(y, 2, p) - 0.5 * z**2
        return (value - 0.5 * np.log1p(tau**2 * 2 * p * (1 - p))).sum()

    def exact(phi):
        return exact_binomials(2, *phi, y).sum()

    information = -np.array([
        finite_difference(lambda v, i=i: finite_difference(laplace, v)[i], at) for i in range(2)
    ])  # fmt: skip
    inverse = np.linalg.inv(information)
    expected = inverse @ finite_difference(exact, at) / np.sqrt(np.diag(inverse))
    close(list(found.attrs["shift"].values()), expected, rtol=1e-3)
    assert list(found.attrs["shift"]) == ["mu[Intercept]", "tau[Intercept]"]
    close(found.attrs["farthest"], np.abs(expected).max(), rtol=1e-3)
    assert expected[1] > 0.25  # Laplace's tau is too small
    close(found.attrs["total_error"], laplace(at) - exact(at), rtol=1e-6)
    (said,) = [w for w in fit.warnings if "Laplace's approximation has moved phi" in w]
    assert "quadrature" in said


def test_skewness_of_a_share_is_its_formula(fifty_one):
    """Ψ‴ = −τ³ n p q (q − p) and A = 1 + τ² n p q for n trials; the mode by SciPy."""
    found = hb.checks.laplace_check(fifty_one)
    mu, tau = float(fifty_one.phi["mu"][0]), float(fifty_one.phi["tau"][0])
    f = np.array([optimize.brentq(lambda f, y=y: (y - 2 * special.expit(f)) * tau**2 - (f - mu),
                                  -20, 20, xtol=1e-13) for y in PAIRS])  # fmt: skip
    p = special.expit(f)
    third, curvature = tau**3 * 2 * p * (1 - p) * np.abs(1 - 2 * p), 1 + tau**2 * 2 * p * (1 - p)
    close(found["skewness"], third / curvature**1.5, rtol=1e-6)
    assert (found["residual"] < 1e-8).all()


@pytest.mark.slow
def test_of_quadrature_little_is_left():
    """0.02: the number of nodes is enough where 1e-3 of log p̂ are left."""
    fit = hb.empirical_bayes(*binomials(2, PAIRS), evidence="quadrature", **QUIET)
    assert hb.checks.laplace_check(fit).attrs["farthest"] < 0.02


# ---------------------------------------------------------------- four coefficients


@pytest.fixture(scope="module")
def four():
    rng = np.random.default_rng(5)
    num_tasks, n = 30, 8
    g = np.repeat(np.arange(num_tasks), n)
    x = np.column_stack([np.ones(len(g)), rng.normal(size=(len(g), 3))])
    theta = rng.normal(size=(num_tasks, 4)) * [1.5, 1.2, 1.0, 1.0]
    y = rng.binomial(1, special.expit((x * theta[g]).sum(1)))
    data = pd.DataFrame({"g": g, "y": y, "n": 1, "a": x[:, 1], "b": x[:, 2], "c": x[:, 3]})
    model, tasks = hb.from_formula("p(y, n) ~ 1 + a + b + c + (1 + a + b + c || g)", data)
    return tasks, hb.empirical_bayes(model, tasks, **QUIET)


@pytest.mark.slow
def test_four_coefficients_against_draws_from_the_prior(four):
    """Σ_j log p(D_j | φ̂) from 200,000 draws of θ: four standard errors of both sides.

    Negative control: Laplace's own value is farther off than that.
    """
    tasks, fit = four
    found = hb.checks.laplace_check(fit)
    assert fit.info["evidence"] == "laplace"
    draws = np.random.default_rng(0).standard_normal((200_000, 4)) * fit.phi["tau"] + fit.phi["mu"]
    total = variance = 0.0
    for j in range(tasks.num_tasks):
        rows = slice(tasks.starts[j], tasks.starts[j + 1])
        f = draws @ tasks.predictors[rows].T
        chance = np.exp((tasks.outcome[rows] * f - np.logaddexp(0, f)).sum(1))
        total += np.log(chance.mean())
        variance += chance.var() / chance.mean() ** 2 / len(draws)
    # all tasks share these draws: at worst their errors add up
    error = 4 * np.hypot(np.sqrt(variance), found.attrs["total_reference_error"])
    assert abs(fit.log_evidence - found.attrs["total_error"] - total) < error
    assert abs(fit.log_evidence - total) > error
    assert (found["reference_error"] > 0).all()
    assert found.attrs["num_nodes"] == 512


@pytest.mark.slow
def test_other_scrambles_agree_within_their_errors(four):
    _, fit = four
    first, second = (hb.checks.laplace_check(fit, seed=s) for s in (0, 1))
    errors = np.hypot(first["reference_error"], second["reference_error"])
    apart = (first["error"] - second["error"]) / errors
    # of 30 such differences, each a t of few degrees of freedom: their square's mean is about 1.4
    assert 0.2 < (apart**2).mean() < 4
    a, b = first.attrs, second.attrs
    assert a["total_error"] != b["total_error"]
    for name in a["shift"]:
        error = np.hypot(a["shift_error"][name], b["shift_error"][name])
        assert abs(a["shift"][name] - b["shift"][name]) < 6 * error
    # tasks take runs of their own: errors of the sum are those of independent tasks
    alone = np.sqrt((first["reference_error"] ** 2).sum())
    assert a["total_reference_error"] < 2.5 * alone


def test_many_trials_say_nothing():
    """A thousand trials a task: the posterior is next to normal."""
    rng = np.random.default_rng(1)
    y = rng.binomial(1000, special.expit(0.3 + 0.6 * rng.normal(size=51)))
    fit = hb.empirical_bayes(*binomials(1000, y), evidence="laplace", **QUIET)
    assert not [w for w in fit.warnings if "Laplace" in w]
    found = hb.checks.laplace_check(fit)
    assert (found["flag"] == "").all()
    assert found["error"].abs().max() < 0.03


@pytest.mark.slow
def test_the_fit_says_so_by_itself(four):
    _, fit = four
    (said,) = [w for w in fit.warnings if "Laplace's approximation has moved phi" in w]
    assert "use full_bayes" in said
    assert "quadrature" not in said
    found = hb.checks.laplace_check(fit)
    assert found.attrs["farthest"] > 0.25
    assert found["flag"].str.contains("error").any()


@pytest.mark.slow
def test_tasks_with_many_rows_say_nothing():
    """A thousand trials a row: the posterior is next to normal."""
    rng = np.random.default_rng(1)
    g, x = np.repeat(np.arange(30), 8), rng.normal(size=(240, 3))
    f = (rng.normal(size=(30, 3)) * 0.4)[g]
    y = rng.binomial(1000, special.expit(0.3 + (f * x).sum(1) + 0.5 * rng.normal(size=30)[g]))
    data = pd.DataFrame({"g": g, "y": y, "n": 1000, "a": x[:, 0], "b": x[:, 1], "c": x[:, 2]})
    fit = hb.empirical_bayes(
        *hb.from_formula("p(y, n) ~ 1 + a + b + c + (1 + a + b + c || g)", data), **QUIET
    )
    assert not [w for w in fit.warnings if "Laplace" in w]
    found = hb.checks.laplace_check(fit)
    assert (found["flag"] == "").all()
    assert found["error"].abs().max() < 0.03


# --------------------------------------------------------------- counts, flags, refusals


def test_effective_counts_of_every_kind():
    one = np.ones((3, 1))
    y = [np.array([0.0, 1, 1]), np.array([1.0, 1, 1])]
    tasks = hb.Tasks.from_arrays([(one, part) for part in y])
    close(effective_count(tasks, hb.likelihoods.Bernoulli()), [1, 0])
    close(effective_count(tasks, hb.likelihoods.Poisson()), [2, 3])
    close(effective_count(tasks, hb.likelihoods.NegativeBinomial()), [2, 3])
    assert np.isnan(effective_count(tasks, hb.likelihoods.Gamma())).all()


def test_flags_name_what_stands_out():
    table = pd.DataFrame(
        {"residual": [0.0, 1e-2, np.nan, 0.0, 0.0], "error": [0.0, 0.0, 0.0, -0.3, 0.3],
         "reference_error": [0.0, 0.0, 0.0, 0.01, 0.2], "skewness": [0.1, 0.1, 0.1, 0.9, 0.1]}
    )  # fmt: skip
    assert _flags(table) == ["", "residual", "residual", "error, skewness", ""]


def test_what_need_not_be_checked_is_refused(fifty_one, schools):
    fit = fifty_one
    model, tasks = fit.model, fit.tasks
    with refuses("Gaussian tasks has a closed form"):
        hb.checks.laplace_check(quietly(hb.empirical_bayes, schools))
    with refuses("complete pooling uses no approximation"):
        hb.checks.laplace_check(hb.complete_pooling(model, tasks))
    with refuses("learned from other tasks"):
        hb.checks.laplace_check(fit.on(tasks))
    draws = {name: np.asarray(value)[None, None] for name, value in fit.phi.items()}
    with refuses("full Bayes need not be checked"):
        hb.checks.laplace_check(replace(fit, method="full Bayes", phi_draws=draws))


def test_x_of_phi_is_the_inverse_of_phi_of_x(slopes):
    model, tasks = slopes
    resolved = model.resolve(tasks)
    with float64():
        space = resolved.space(tasks)
        v = np.array([0.3, -0.2, 0.7, 0.4, 0.6])
        close(x_of(space, to_numpy(jax.jit(space.phi)(v))), v, rtol=1e-9)
