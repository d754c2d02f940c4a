r"""Type-II ML, REML and MAP against closed forms, SciPy and what must not change anything.

In a balanced layout every task has the same design X (n × d). Its least squares
θ̂_j ~ N(μ, Σ + σ²(XᵀX)⁻¹) and the residuals are then sufficient and independent, so that with
S = Σ_j (θ̂_j − θ̄)(θ̂_j − θ̄)ᵀ / J (REML: / (J − 1)) and s² the pooled residual variance on
J (n − d) degrees of freedom the maximum is

.. math:: \hat\mu = \bar\theta, \qquad \hat\sigma^2 = s^2, \qquad
          \hat\Sigma = S - s^2 (X^\top X)^{-1}

wherever the last is positive definite; for d = 1 these are the ANOVA estimates. The search stops
where a Newton step gains less than 1e-14 of the log evidence, so estimates are right to about
1e-7; tolerances of 1e-6 leave a factor of ten.
"""

import jax
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from references import (
    Rows,
    assert_said,
    dense_log_evidence,
    hessian,
    profiled_log_evidence,
    rows_of,
)
from scipy import optimize, stats

import hierbayes as hb

GAUSSIAN = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
NORMAL_MEANS = hb.HierarchicalModel(hb.likelihoods.Gaussian(known_se=True), hb.priors.Gaussian())


def fit(model, tasks, criterion="ml"):
    return hb.empirical_bayes(model, tasks, criterion, num_draws=1)


def balanced(num_tasks, design, mu, root, sigma, seed):
    """Tasks with one design; returns the Tasks and the outcomes (J, n)."""
    rng = np.random.default_rng(seed)
    theta = mu + rng.standard_normal((num_tasks, len(mu))) @ np.transpose(root)
    y = theta @ design.T + sigma * rng.standard_normal((num_tasks, len(design)))
    return hb.Tasks.from_arrays([(design, row) for row in y]), y


DESIGNS = {
    1: np.ones((5, 1)),
    2: np.column_stack([np.ones(6), np.arange(6.0)]),
    3: np.column_stack([np.ones(8), np.linspace(-1, 1, 8), np.linspace(-1, 1, 8) ** 2]),
}
ROOTS = {
    1: np.array([[1.2]]),
    2: np.array([[1.5, 0.0], [-0.4, 0.6]]),
    3: np.array([[1.5, 0.0, 0.0], [0.5, 1.0, 0.0], [-0.6, 0.3, 1.4]]),
}


def balanced_solution(design, y, criterion):
    """(μ̂, Σ̂, σ̂², Cov θ̂_j) of the balanced layout, by the formulas above."""
    (n, d), num_tasks = design.shape, len(y)
    theta = np.linalg.lstsq(design, y.T, rcond=None)[0].T
    s2 = ((y - theta @ design.T) ** 2).sum() / (num_tasks * (n - d))
    centred = theta - theta.mean(0)
    total = centred.T @ centred / (num_tasks - (criterion == "reml"))
    return theta.mean(0), total - s2 * np.linalg.inv(design.T @ design), s2, total


@pytest.mark.parametrize("criterion", ["ml", "reml"])
@pytest.mark.parametrize("d", [2, *(pytest.param(d, marks=pytest.mark.slow) for d in (1, 3))])
def test_balanced_layout(d, criterion):
    design, num_tasks = DESIGNS[d], 40
    tasks, y = balanced(num_tasks, design, np.arange(1.0, d + 1), ROOTS[d], 0.8, seed=d)
    mu, spread, s2, total = balanced_solution(design, y, criterion)
    assert np.linalg.eigvalsh(spread)[0] > 0.01  # inside, where the closed form holds
    found = fit(GAUSSIAN, tasks, criterion)
    tau = np.sqrt(np.diag(spread))
    assert found.phi["mu"] == pytest.approx(mu, rel=1e-9)
    assert found.phi["tau"] == pytest.approx(tau, rel=1e-6)
    assert float(found.phi["sigma"]) == pytest.approx(np.sqrt(s2), rel=1e-6)
    assert found.standard_errors["mu"] == pytest.approx(
        np.sqrt(np.diag(total) / num_tasks), rel=1e-6
    )
    if d > 1:
        assert found.phi["corr"] == pytest.approx(spread / np.outer(tau, tau), abs=1e-6)
    # posteriors: θ_j | D_j ~ N(μ + Σ Cov⁻¹ (θ̂_j − μ), Σ − Σ Cov⁻¹ Σ)
    theta = np.linalg.lstsq(design, y.T, rcond=None)[0].T
    gain = spread @ np.linalg.inv(total)
    assert found.theta.values == pytest.approx(mu + (theta - mu) @ gain.T, abs=1e-6)
    assert found.adapted.covariance.values[3] == pytest.approx(spread - gain @ spread, abs=1e-6)


@pytest.mark.parametrize("criterion", ["ml", "reml"])
def test_one_way_layout_has_anovas_standard_errors(criterion):
    """With a = σ² and b = σ² + n τ² the evidence is that of two independent mean squares.

    Var â = 2 a² / (J (n − 1)), Var b̂ = 2 b² / J (REML: J − 1), τ² = (b − a) / n, and the delta
    method, exact for an inverse Hessian at the maximum. The Hessian is right to ten digits and
    the maximum to seven.
    """
    design, num_tasks = DESIGNS[1], 30
    tasks, y = balanced(num_tasks, design, [2.0], ROOTS[1], 1.1, seed=5)
    n = len(design)
    within = ((y - y.mean(1, keepdims=True)) ** 2).sum() / (num_tasks * (n - 1))
    free = num_tasks - (criterion == "reml")
    between = n * ((y.mean(1) - y.mean()) ** 2).sum() / free
    tau, sigma = np.sqrt((between - within) / n), np.sqrt(within)
    var_a, var_b = 2 * within**2 / (num_tasks * (n - 1)), 2 * between**2 / free
    found = fit(GAUSSIAN, tasks, criterion)
    assert found.phi["tau"] == pytest.approx([tau], rel=1e-6)
    assert found.standard_errors["sigma"] == pytest.approx(np.sqrt(var_a) / (2 * sigma), rel=1e-6)
    expected = np.sqrt(var_a + var_b) / n / (2 * tau)
    assert found.standard_errors["tau"] == pytest.approx([expected], rel=1e-6)
    assert found.standard_errors["mu"] == pytest.approx([np.sqrt(between / y.size)], rel=1e-6)


# ---------------------------------------------------------------------- normal means

EFFECTS = np.array([1.8, -0.9, 0.4, 3.1, -2.2, 0.7, 1.1, -1.4, 2.6, 0.0, -0.6, 4.0])
ERRORS = np.array([0.5, 0.8, 1.2, 0.4, 0.9, 1.5, 0.6, 0.7, 1.1, 0.3, 1.0, 0.8])


def normal_means(y=EFFECTS, se=ERRORS):
    return hb.Tasks.from_arrays(
        [(np.ones((1, 1)), [value]) for value in y], coef=["mean"], known_se=[[s] for s in se]
    )


@pytest.mark.parametrize("criterion", ["ml", "reml"])
def test_normal_means_with_equal_errors(criterion):
    """Morris (1983): τ̂² = Σ(y − ȳ)² / J − V, under REML / (J − 1); shrinkage V / (V + τ̂²)."""
    v = 0.7**2
    found = fit(NORMAL_MEANS, normal_means(se=np.full(12, 0.7)), criterion)
    total = EFFECTS.var(ddof=1 if criterion == "reml" else 0)
    assert found.phi["tau"] ** 2 == pytest.approx([total - v], rel=1e-6)
    shrunk = EFFECTS.mean() + (total - v) / total * (EFFECTS - EFFECTS.mean())
    assert found.theta.values[:, 0] == pytest.approx(shrunk, abs=1e-6)
    # τ² + V has the variance 2 (τ² + V)² / J of a mean square
    free = 12 - (criterion == "reml")
    expected = total * np.sqrt(2 / free) / (2 * np.sqrt(total - v))
    assert found.standard_errors["tau"] == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize("criterion", ["ml", "reml"])
def test_normal_means_solve_the_score_equation(criterion):
    """w_j = 1/(V_j + τ²): Σ w_j² (y_j − μ)² = Σ w_j, under REML less Σ w_j² / Σ w_j.

    An error of 1e-7 in τ moves the difference, relative to Σ w_j, by less than 1e-6.
    """
    found = fit(NORMAL_MEANS, normal_means(), criterion)
    tau2 = found.phi["tau"][0] ** 2
    w = 1 / (ERRORS**2 + tau2)
    mu = (w @ EFFECTS) / w.sum()
    wanted = w.sum() - ((w**2).sum() / w.sum() if criterion == "reml" else 0.0)
    assert tau2 > 0.5
    assert found.phi["mu"] == pytest.approx([mu], rel=1e-10)
    assert (w**2) @ (EFFECTS - mu) ** 2 == pytest.approx(wanted, rel=1e-6)
    assert found.standard_errors["mu"] == pytest.approx([w.sum() ** -0.5], rel=1e-10)
    expected = stats.norm.logpdf(EFFECTS, mu, w**-0.5).sum()
    if criterion == "reml":
        expected += 0.5 * np.log(2 * np.pi / w.sum())
    assert found.log_evidence == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------- map


def ragged(seed=11, num_tasks=24):
    """A DataFrame of ragged tasks with a varying intercept and slope and one shared column."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 9, num_tasks)
    task = np.repeat(np.arange(num_tasks), sizes)
    x, z = rng.normal(0.3, 1.0, task.size), rng.normal(size=task.size)
    theta = [2.0, -1.0] + rng.standard_normal((num_tasks, 2)) @ np.array([[0.9, 0.3], [0.0, 0.6]])
    y = theta[task, 0] + theta[task, 1] * x + 0.5 * z + 0.7 * rng.standard_normal(task.size)
    return pd.DataFrame({"g": task, "x": x, "z": z, "y": y})


FORMULA = "y ~ 1 + x + z + (1 + x | g)"


def default_beliefs(frame):
    """The documented defaults for FORMULA, and Gamma(2, rate → 0) on τ.

    s_y the outcome's sd; a predictor's coefficient ~ N(0, 2.5 s_y / sd); the intercept where
    predictors are at their means ~ N(mean outcome, 2.5 s_y), and Σ is that of the coefficients
    there: A Σ Aᵀ with A = [[1, mean x], [0, 1]].
    """
    s_y = frame["y"].std(ddof=0)
    s = {c: s_y / frame[c].std(ddof=0) for c in "xz"}
    means = {c: frame[c].mean() for c in "xz"}
    unit = {"1": s_y, **s}
    rate = {c: 1e-8 / unit[c] for c in "1x"}

    def log_density(mu, tau, beta, rho, sigma):
        level = mu[0] + means["x"] * mu[1] + means["z"] * beta
        a = np.array([[1.0, means["x"]], [0.0, 1.0]])
        covariance = a @ (np.outer(tau, tau) * [[1, rho], [rho, 1]]) @ a.T
        tau = np.sqrt(np.diag(covariance))
        rho = covariance[0, 1] / tau.prod()
        return (
            stats.norm.logpdf(level, frame["y"].mean(), 2.5 * s_y)
            + stats.norm.logpdf(mu[1], 0, 2.5 * s["x"])
            + stats.norm.logpdf(beta, 0, 2.5 * s["z"])
            + stats.gamma.logpdf(tau, 2, scale=[1 / rate["1"], 1 / rate["x"]]).sum()
            + stats.halfnorm.logpdf(sigma, scale=s_y) + lkj(rho, 2.0)
        )  # fmt: skip

    return log_density


def lkj(rho, concentration):
    """LKJ(η) at d = 2: (1 + ρ)/2 ~ Beta(η, η), so p(ρ) is half that density."""
    return stats.beta.logpdf((1 + rho) / 2, concentration, concentration) - np.log(2)


def user_beliefs(mu, tau, beta, rho, sigma):
    return (
        stats.norm.logpdf(mu, 0.5, 1.5).sum() + stats.halfnorm.logpdf(tau, scale=[0.4, 0.3]).sum()
        + stats.norm.logpdf(beta, 0, 0.2) + stats.expon.logpdf(sigma, scale=1 / 3) + lkj(rho, 5.0)
    )  # fmt: skip


USER = hb.HyperPrior(
    mu=dist.Normal(0.5, 1.5),
    tau={"Intercept": dist.HalfNormal(0.4), "x": dist.HalfNormal(0.3)},
    beta=dist.Normal(0, 0.2),
    sigma=dist.Exponential(3.0),
    corr=5.0,
)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["default", "user"])
def test_map_is_scipys_mode_of_the_dense_posterior(which):
    """Maximised over (μ, τ, β, ρ, log σ): densities of τ and ρ, and that of log σ, which is σ p(σ).

    SciPy's BFGS, restarted until it stays, finds a mode to about 1e-6; the densities agree
    to rounding.
    """
    frame = ragged()
    tasks = rows_of(frame, "g", "y", ["1", "x"], ["1", "x", "z"])
    hyperpriors = default_beliefs(frame) if which == "default" else user_beliefs

    def log_density(v: np.ndarray) -> float:
        mu, tau, beta, rho, sigma = v[:2], v[2:4], v[4], np.tanh(v[5]), np.exp(v[6])
        corr = np.array([[1, rho], [rho, 1]])
        if (tau <= 0).any():
            return -np.inf
        evidence = dense_log_evidence(tasks, [*mu, beta], tau, corr, sigma)
        return evidence + hyperpriors(mu, tau, beta, rho, sigma) + np.log(sigma)

    model, data = hb.from_formula(FORMULA, frame, hyperprior=USER if which == "user" else None)
    found = fit(model, data, "map")
    phi = found.phi
    at = [
        *phi["mu"],
        *phi["tau"],
        *phi["beta"],
        np.arctanh(phi["corr"][0, 1]),
        np.log(phi["sigma"]),
    ]
    assert found.log_posterior == pytest.approx(log_density(np.array(at)), rel=1e-11)
    corr = phi["corr"]
    assert found.log_evidence == pytest.approx(
        dense_log_evidence(tasks, [*at[:2], at[4]], phi["tau"], corr, float(phi["sigma"])),
        rel=1e-11,
    )
    best = np.array([2.0, -1.0, 0.8, 0.5, 0.4, 0.0, -0.3])  # not where hierbayes ended
    for _ in range(8):
        run = optimize.minimize(
            lambda v: -log_density(v), best, method="BFGS", options={"gtol": 1e-9}
        )
        if np.array_equal(run.x, best):
            break
        best = run.x
    assert at == pytest.approx(best, abs=2e-6)
    assert found.log_posterior == pytest.approx(-run.fun, rel=1e-11)
    # standard errors: the inverse Hessian there
    covariance = np.linalg.inv(-hessian(log_density, at, 2e-3))
    se = np.sqrt(np.diag(covariance))
    errors = found.standard_errors
    assert errors["mu"] == pytest.approx(se[:2], rel=1e-5)
    assert errors["tau"] == pytest.approx(se[2:4], rel=1e-5)
    assert errors["beta"] == pytest.approx(se[4:5], rel=1e-5)
    assert float(errors["sigma"]) == pytest.approx(se[6] * float(phi["sigma"]), rel=1e-5)


def schools(hyperprior=None):
    return hb.from_formula(
        "y ~ 1 + (1 | school)", hb.datasets.eight_schools(), known_se="se", hyperprior=hyperprior
    )


def test_maps_default_keeps_tau_off_the_boundary():
    """Where ML gives 0, the mode of evidence × τ solves d/dτ [evidence + log τ] = 0."""
    model, tasks = schools()
    found = fit(model, tasks, "map")
    tau, y = found.phi["tau"][0], hb.datasets.eight_schools()
    w = 1 / (y["se"].to_numpy() ** 2 + tau**2)
    mu = found.phi["mu"][0]
    slope = tau * ((w * (y["y"] - mu)) ** 2 - w).sum() + 1 / tau
    assert tau > 1
    assert slope == pytest.approx(0, abs=1e-6)
    assert fit(model, tasks, "ml").phi["tau"].tolist() == [0.0]


def test_map_takes_the_users_prior_on_tau_as_it_is():
    """A half-normal falls with τ, so that a mode at 0 stays there."""
    model, tasks = schools(hb.HyperPrior(tau=dist.HalfNormal(10.0)))
    found = fit(model, tasks, "map")
    assert found.phi["tau"].tolist() == [0.0]
    assert np.isnan(found.standard_errors["tau"]).all()
    assert_said(found.warnings, "standard errors of tau", "NaN", "tau = 0")
    assert_said(found.warnings, "tau is estimated as exactly 0", "'Intercept'")
    # at τ = 0 the mode of μ is that of one normal sample with its prior, N(8.75, 2.5 s_y)
    y, se = (hb.datasets.eight_schools()[c].to_numpy() for c in ("y", "se"))
    precision = np.append(se**-2, (2.5 * y.std()) ** -2)
    mode = precision @ np.append(y, y.mean()) / precision.sum()
    assert found.phi["mu"] == pytest.approx([mode], rel=1e-8)
    assert found.standard_errors["mu"] == pytest.approx([precision.sum() ** -0.5], rel=1e-6)


# ----------------------------------------------------------------------- invariance


@pytest.mark.parametrize("criterion", ["ml", "reml", pytest.param("map", marks=pytest.mark.slow)])
def test_units_do_not_matter(criterion):
    """y → a y + c, x → b x: φ̂ follows, and the density of y falls by a factor a a row."""
    frame, (a, b, c) = ragged(), (250.0, 1e-3, -40.0)
    scaled = frame.assign(y=a * frame["y"] + c, x=b * frame["x"])
    first, second = (fit(*hb.from_formula(FORMULA, f), criterion) for f in (frame, scaled))
    unit = np.array([a, a / b])
    assert second.phi["mu"] == pytest.approx(unit * first.phi["mu"] + [c, 0], rel=1e-6)
    assert second.phi["tau"] == pytest.approx(unit * first.phi["tau"], rel=1e-6)
    assert second.phi["corr"] == pytest.approx(first.phi["corr"], abs=1e-6)
    assert second.phi["beta"] == pytest.approx(a * first.phi["beta"], rel=1e-6)
    assert float(second.phi["sigma"]) == pytest.approx(a * float(first.phi["sigma"]), rel=1e-6)
    for name, factor in [("mu", unit), ("tau", unit), ("beta", a), ("sigma", a)]:
        expected = factor * first.standard_errors[name]
        assert second.standard_errors[name] == pytest.approx(expected, rel=1e-5)
    rows = len(frame)
    change = -rows * np.log(a)
    if criterion == "reml":  # ∫ dμ dβ has units: y² per (1, x, z)
        change += 3 * np.log(a) - np.log(b)
    assert second.log_evidence == pytest.approx(first.log_evidence + change, rel=1e-9)


@pytest.mark.parametrize("criterion", ["ml", "reml"])
def test_order_does_not_matter(criterion):
    frame = ragged()
    shuffled = frame.sample(frac=1.0, random_state=3)
    first, second = (fit(*hb.from_formula(FORMULA, f), criterion) for f in (frame, shuffled))
    assert first.tasks.names.tolist() != second.tasks.names.tolist()
    for name, values in first.phi.items():
        assert second.phi[name] == pytest.approx(values, abs=1e-7)
    assert second.log_evidence == pytest.approx(first.log_evidence, rel=1e-12)
    theta = second.theta.sel(task=first.theta["task"])
    assert theta.values == pytest.approx(first.theta.values, abs=1e-7)


@pytest.mark.parametrize("criterion", ["ml", "reml"])
def test_a_predictor_far_from_zero(criterion):
    """x → x + 1000 moves the intercept: Σ → A Σ Aᵀ, μ → A μ with A = [[1, −1000], [0, 1]].

    The intercept's τ and ρ are then a difference of numbers 1e6 times larger, so what is compared
    is Σ seen from the data's side, A⁻¹ Σ A⁻ᵀ.
    """
    frame = ragged()
    far = frame.assign(x=frame["x"] + 1000.0)
    first, second = (fit(*hb.from_formula(FORMULA, f), criterion) for f in (frame, far))
    back = np.array([[1.0, 1000.0], [0.0, 1.0]])

    def spread(f):
        return f.phi["corr"] * np.outer(f.phi["tau"], f.phi["tau"])

    assert second.log_evidence == pytest.approx(first.log_evidence, rel=1e-9)
    assert back @ second.phi["mu"] == pytest.approx(first.phi["mu"], rel=1e-6)
    assert second.phi["tau"][1] == pytest.approx(first.phi["tau"][1], rel=1e-5)
    assert float(second.phi["sigma"]) == pytest.approx(float(first.phi["sigma"]), rel=1e-6)
    assert back @ spread(second) @ back.T == pytest.approx(spread(first), rel=1e-4)
    assert second.theta.values @ back.T == pytest.approx(first.theta.values, abs=1e-5)


# ------------------------------------------------------------------------ large data


@pytest.mark.slow
def test_twenty_thousand_tasks_recover_the_prior():
    """Correlated slopes, 10 rows a task: every φ within four of its standard errors.

    The fit's own standard errors serve for μ, τ and σ; they are compared with theory: a task's
    least squares has covariance V_j = Σ + σ² (X_jᵀX_j)⁻¹, and the evidence of 20,000 of them
    knows Σ about as well as a sample of N(μ, mean V_j), whose covariance has the variance
    (V_aa V_bb + V_ab²) / J. That ignores how tasks differ, 20 % at most here.
    """
    num_tasks, n = 20_000, 10
    rng = np.random.default_rng(17)
    mu, tau, rho, sigma = np.array([1.0, -0.5]), np.array([0.7, 0.4]), -0.35, 0.9
    root = np.diag(tau) @ np.array([[1, 0], [rho, np.sqrt(1 - rho**2)]])
    theta = mu + rng.standard_normal((num_tasks, 2)) @ root.T
    x = rng.standard_normal((num_tasks, n))
    y = theta[:, :1] + theta[:, 1:] * x + sigma * rng.standard_normal((num_tasks, n))
    frame = pd.DataFrame({"g": np.repeat(np.arange(num_tasks), n), "x": x.ravel(), "y": y.ravel()})
    found = fit(*hb.from_formula("y ~ 1 + x + (1 + x | g)", frame))
    errors = found.standard_errors
    assert np.abs((found.phi["mu"] - mu) / errors["mu"]).max() < 4
    assert np.abs((found.phi["tau"] - tau) / errors["tau"]).max() < 4
    assert abs(float(found.phi["sigma"]) - sigma) < 4 * float(errors["sigma"])
    assert found.warnings == ()

    gram = np.einsum("jnk,jnl->jkl", designs := np.stack([np.ones_like(x), x], -1), designs)
    v = root @ root.T + sigma**2 * np.linalg.inv(gram).mean(0)
    assert errors["mu"] == pytest.approx(np.sqrt(np.diag(v) / num_tasks), rel=0.2)
    expected = np.diag(v) * np.sqrt(2 / num_tasks) / (2 * tau)
    assert errors["tau"] == pytest.approx(expected, rel=0.2)
    free = num_tasks * (n - 2)
    assert float(errors["sigma"]) == pytest.approx(sigma / np.sqrt(2 * free), rel=0.02)
    # Σ_01 = ρ τ_0 τ_1 within four standard errors of a sample covariance
    off = found.phi["corr"][0, 1] * found.phi["tau"].prod()
    se = np.sqrt((v[0, 0] * v[1, 1] + v[0, 1] ** 2) / num_tasks)
    assert abs(off - rho * tau.prod()) < 4 * se


# ------------------------------------------------------------------------ boundaries


def parallel_lines():
    """Tasks that differ in level only: every least-squares slope is exactly 0.5."""
    x = np.linspace(-1, 1, 6)
    wiggle = np.array([1.0, -1.0, 0.0, 0.0, -1.0, 1.0])  # orthogonal to 1 and to x
    levels = np.array([0.0, 1.0, 2.5, -1.0, 0.7, 3.0, -2.0])
    signs = np.array([1, -1, 1, 1, -1, 1, -1])
    y = levels[:, None] + 0.5 * x + 0.3 * signs[:, None] * wiggle
    return pd.DataFrame(
        {"g": np.repeat(np.arange(7), 6), "x": np.tile(x, 7), "y": y.ravel()}
    ), levels


@pytest.mark.parametrize(
    "bars", ["(1 + x || g)", pytest.param("(1 + x | g)", marks=pytest.mark.slow)]
)
def test_one_of_two_directions_without_variance(bars):
    """τ̂ of the slope is exactly 0; the rest is the fit of y ~ 1 + x + (1 | g)."""
    frame, _ = parallel_lines()
    found = fit(*hb.from_formula(f"y ~ 1 + x + {bars}", frame))
    without = fit(*hb.from_formula("y ~ 1 + x + (1 | g)", frame))
    assert found.phi["tau"][1] == 0
    assert found.log_evidence == pytest.approx(without.log_evidence, rel=1e-10)
    assert found.phi["tau"][0] == pytest.approx(without.phi["tau"][0], rel=1e-6)
    assert float(found.phi["sigma"]) == pytest.approx(float(without.phi["sigma"]), rel=1e-6)
    assert found.phi["mu"] == pytest.approx([*without.phi["mu"], *without.phi["beta"]], rel=1e-9)
    assert np.isnan(found.standard_errors["tau"]).tolist() == [False, True]
    assert found.standard_errors["tau"][0] == pytest.approx(
        without.standard_errors["tau"][0], rel=1e-5
    )
    assert_said(found.warnings, "tau is estimated as exactly 0", "'x'")
    assert_said(found.warnings, "standard error of tau", "'x'", "NaN", "boundary")
    assert np.ptp(found.theta.sel(coef="x").values) == 0
    assert (found.adapted.covariance.sel(coef="x").values == 0).all()
    if "corr" in found.phi:
        assert np.isfinite(found.phi["corr"]).all()


def test_perfect_correlation_is_found_and_said():
    """Slopes that are half the intercepts, exactly: the maximum is a Σ of rank one.

    The best rank-one Σ = l lᵀ is found by SciPy on the dense evidence; Σ of full rank nearby does
    not explain the data better.
    """
    frame, levels = parallel_lines()
    frame["y"] += 0.5 * np.repeat(levels, 6) * frame["x"]
    tasks = rows_of(frame, "g", "y", ["1", "x"], ["1", "x"])
    found = fit(*hb.from_formula("y ~ 1 + x + (1 + x | g)", frame))
    tau, rho, sigma = found.phi["tau"], found.phi["corr"][0, 1], float(found.phi["sigma"])
    assert rho == pytest.approx(1, abs=1e-6)
    assert_said(found.warnings, "correlations", "boundary")

    def rank_one(v: np.ndarray) -> float:
        return -profiled_log_evidence(tasks, v[:2], np.ones((2, 2)), np.exp(v[2])).value

    best = optimize.minimize(rank_one, [1.0, 1.0, -1.0], method="BFGS", options={"gtol": 1e-7})
    assert found.log_evidence == pytest.approx(-best.fun, rel=1e-9)
    assert tau == pytest.approx(best.x[:2], rel=1e-4)
    assert sigma == pytest.approx(np.exp(best.x[2]), rel=1e-4)
    for weaker in (0.99, 0.999):
        corr = np.array([[1, weaker], [weaker, 1]])
        assert profiled_log_evidence(tasks, tau, corr, sigma).value < found.log_evidence
    # the standard errors hold the correlation at 1, as the warning says
    curvature = hessian(lambda v: -rank_one(v), [*tau, np.log(sigma)], 2e-3)
    expected = np.sqrt(np.diag(np.linalg.inv(-curvature)))
    assert found.standard_errors["tau"] == pytest.approx(expected[:2], rel=1e-4)
    assert float(found.standard_errors["sigma"]) == pytest.approx(expected[2] * sigma, rel=1e-4)


def test_the_layouts_of_this_file_are_what_they_say():
    """The closed forms above against the dense evidence, without hierbayes."""
    design = DESIGNS[2]
    _, y = balanced(40, design, np.array([1.0, 2.0]), ROOTS[2], 0.8, seed=2)
    tasks = [Rows(design, design, row, np.ones(len(row))) for row in y]
    _, spread, s2, _ = balanced_solution(design, y, "reml")
    tau = np.sqrt(np.diag(spread))
    rho = spread[0, 1] / tau.prod()

    def value(v: np.ndarray) -> float:
        corr = np.array([[1, v[3]], [v[3], 1]])
        return profiled_log_evidence(tasks, v[:2], corr, v[2], reml=True).value

    at = np.array([*tau, np.sqrt(s2), rho])
    for step in 0.01 * np.eye(4):
        assert max(value(at + step), value(at - step)) < value(at)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "criterion"), [(3, "ml"), (5, "reml")])
def test_singular_covariances_are_ordinary(size, criterion):
    # one direction varies between six tasks, so the estimated covariance lacks rank, as lme4's
    # does in such data; theta, draws and the prior must stay finite all the same
    rng = np.random.default_rng(size)
    direction = rng.normal(size=size)
    arrays = []
    for _ in range(6):
        x = np.column_stack([np.ones(8), rng.normal(size=(8, size - 1))])
        arrays.append((x, x @ (direction * rng.normal()) + rng.normal(size=8)))
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    fit = hb.empirical_bayes(model, hb.Tasks.from_arrays(arrays), criterion)
    root = np.linalg.eigvalsh(fit.phi["corr"])
    assert root[0] < 1e-6  # the case that is meant
    assert np.isfinite(fit.theta.values).all()
    assert np.isfinite(fit.adapted.covariance.values).all()
    assert np.isfinite(fit.theta_draws).all()
    draws = fit.prior.sample(jax.random.key(0), (20_000,))
    expected = np.outer(fit.phi["tau"], fit.phi["tau"]) * fit.phi["corr"]
    # standard error of a variance from 20,000 normal draws is 1 %; five of them, of the largest
    np.testing.assert_allclose(np.cov(draws.T), expected, atol=0.05 * expected.max())
    # the posterior mean by dense algebra, which needs no root of the covariance
    x, y = arrays[0]
    sigma = float(fit.phi["sigma"])
    spread = x @ expected @ x.T + sigma**2 * np.eye(8)
    dense = fit.phi["mu"] + expected @ x.T @ np.linalg.solve(spread, y - x @ fit.phi["mu"])
    # the root is right to the square root of rounding where the matrix is singular
    np.testing.assert_allclose(fit.theta.values[0], dense, atol=1e-6)


@pytest.mark.slow
def test_uncentred_task_predictors_change_nothing_but_mu():
    rng = np.random.default_rng(5)
    w = rng.normal(size=40)
    arrays = [(np.ones((4, 1)), 3 * v + rng.normal() * 2 + rng.normal(size=4)) for v in w]
    fits = []
    for shift in (0.0, 1000.0):
        tasks = hb.Tasks.from_arrays(arrays, task_predictors=(w + shift)[:, None])
        model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
        fits.append(hb.empirical_bayes(model, tasks, "map"))
    centred, far = fits
    # the priors on mu differ in width, both far wider than the estimate's standard error
    np.testing.assert_allclose(far.phi["gamma"], centred.phi["gamma"], rtol=0.02)
    np.testing.assert_allclose(far.phi["tau"], centred.phi["tau"], rtol=0.02)
