"""Where predictors lie, their units and the order of rows and columns change no answer.

The oracle is the fit itself on other columns: x ↦ a + b x leaves f as it is with
θ_0 ↦ θ_0 − θ_x a/b and θ_x ↦ θ_x / b. Every answer is compared in the first columns, by name.
Shifted columns round: the first data set is made from the shifted one, so that both hold the same
numbers. What is left are optimisers' last digits, far below 1e-8.
"""

import functools
import warnings

import jax
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from assertions import close
from references import assert_said
from scipy import stats

import hierbayes as hb

GENTLE = {"x": (3.0, 2.0), "z": (-1.5, 0.5), "w": (0.7, 4.0)}
YEARS = {"x": (2012.0, 4.0), "z": (1013.0, 8.0), "w": (310.15, 0.5)}
SECONDS = {"x": (2.0**30, 1.0), "z": (-(2.0**31), 4.0), "w": (2.0**29, 0.5)}  # 1e9 sds
TINY = {"x": (0.0, 2.0**-40), "z": (0.0, 2.0**40), "w": (0.0, 2.0**20)}
NONE = dict.fromkeys("xzw", (0.0, 1.0))
FORMULA = "y ~ x + z + w + (x | g)"
FAMILIES = (
    "gaussian", "student_t", "poisson", "negative_binomial", "gamma", "bernoulli", "binomial",
)  # fmt: skip
METHODS = {
    "ml": lambda m, t: hb.empirical_bayes(m, t),
    "reml": lambda m, t: hb.empirical_bayes(m, t, "reml"),
    "map": lambda m, t: hb.empirical_bayes(m, t, "map"),
    "laplace": lambda m, t: hb.empirical_bayes(m, t, evidence="laplace"),
    "kass-steffey": lambda m, t: hb.empirical_bayes(m, t, intervals="kass-steffey"),
    "bootstrap": lambda m, t: hb.empirical_bayes(m, t, intervals="bootstrap", num_bootstrap=10),
    "full Bayes": lambda m, t: hb.full_bayes(m, t, num_draws=100, num_chains=2),
    "NUTS": lambda m, t: hb.full_bayes(m, t, "nuts", 20, 1, num_warmup=20),
    "no pooling": lambda m, t: hb.no_pooling(m, t),
    "complete pooling": lambda m, t: hb.complete_pooling(m, t),
    "MAML": lambda m, t: hb.maml(m, t),
    "Meta-SGD": lambda m, t: hb.maml(m, t, 2, learn_step_size="coef", num_meta_steps=40),
    "iMAML": lambda m, t: hb.imaml(m, t),
    "Reptile": lambda m, t: hb.reptile(m, t),
}


def made(family, num_tasks=12, size=9):
    rng = np.random.default_rng(3)
    g = np.repeat(np.arange(num_tasks), size)
    x, z = rng.normal(size=(2, g.size))
    x += 0.3 * rng.normal(size=num_tasks)[g]
    w, u, s = rng.normal(size=num_tasks), *rng.normal(0, [[0.6], [0.4]], (2, num_tasks))
    f = 0.5 + u[g] + (0.4 + s[g]) * x + 0.3 * z + 0.2 * w[g]
    chance, trials = 1 / (1 + np.exp(-f)), rng.integers(3, 9, g.size)
    y = {
        "gaussian": lambda: f + rng.normal(0, 0.5, g.size),
        "student_t": lambda: f + 0.5 * rng.standard_t(5, g.size),
        "poisson": lambda: rng.poisson(np.exp(f)),
        "negative_binomial": lambda: rng.negative_binomial(5, 5 / (5 + np.exp(f))),
        "gamma": lambda: rng.gamma(4, np.exp(f) / 4),
        "bernoulli": lambda: (rng.random(g.size) < chance).astype(float),
        "binomial": lambda: rng.binomial(trials, chance),
    }[family]()
    return pd.DataFrame({"g": g, "x": x, "z": z, "w": w[g], "n": trials, "y": y})


def moved(frame, by):
    """(the same numbers in the first columns, in the moved ones)."""
    away = frame.assign(**{c: a + b * frame[c] for c, (a, b) in by.items()})
    return frame.assign(**{c: (away[c] - a) / b for c, (a, b) in by.items()}), away


def fitted(family, method, frame, formula=FORMULA, **settings):
    settings |= {} if family == "gaussian" else {"family": family}
    formula = formula.replace("y ~", "p(y, n) ~") if family == "binomial" else formula
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        return METHODS[method](*hb.from_formula(formula, frame, **settings))


def answers(fit, frame, by=NONE):
    """Everything that a fit says, by name, in the first columns: θ_0 at x = z = w = 0 of those."""
    coef, shared = list(fit.tasks.coef), list(fit.tasks.labels.shared)
    order = [coef.index("Intercept"), coef.index("x")]
    (a, b), names = by["x"], sorted(shared)
    at = [shared.index(n) for n in names]
    theta = fit.theta.values[np.argsort(fit.tasks.names)][:, order]
    said = {"theta_x": theta[:, 1] * b}
    # beyond, the rounding of a + b x is all that a sum of the parts would show; of a bootstrap β is
    # averaged with θ, and φ̂ has another
    if a < 1e5 and fit.phi_bootstrap is None:
        level = theta[:, 0] + a * theta[:, 1]
        if "beta" in fit.phi:
            level = level + sum(fit.phi["beta"][shared.index(n)] * by[n][0] for n in names)
        said["theta_0"] = level
    said["sd_x"] = fit.adapted.sd.values[np.argsort(fit.tasks.names)][:, order[1]] * b
    units = np.array([by[n][1] for n in names])
    for what, values in (("", fit.phi), ("se_", fit.standard_errors)):
        for name in ("mu", "tau"):
            if name in values:
                said[f"{what}{name}_x"] = values[name][order[1]] * b
        if "beta" in values:
            said[f"{what}beta"] = values["beta"][at] * units
        for name in ("sigma", "shape", "concentration", "df", "sigma_query"):
            if name in values:
                said[what + name] = values[name]
    if fit.evidence is not None:
        said["evidence"] = fit.evidence
        if fit.info.get("criterion") == "reml":  # ∫ dμ dβ is over coefficients in their own units
            said["evidence"] = fit.evidence + np.log([b, *units]).sum()
    new = frame[frame["g"] < 3].assign(g=lambda d: d["g"] + 50)
    known = fit.predict(frame)
    said |= {"mean": known.to_dataframe()["mean"], "sd": known.to_dataframe()["sd"]}
    if fit.method.name != "no pooling":
        unseen = fit.predict(new, target="new").to_dataframe()
        said |= {"new mean": unseen["mean"], "new sd": unseen["sd"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        said["adapted"] = fit.adapt(new).predict(new).to_dataframe()["mean"]
    return {name: np.asarray(value, float) for name, value in said.items()}


def same(found, expected, rtol=1e-8):
    assert expected.keys() - found.keys() <= {"theta_0"}
    for name, value in expected.items():
        if name not in found:
            continue
        assert np.array_equal(np.isnan(found[name]), np.isnan(value)), name
        scale = np.nanmax(np.abs(value), initial=1e-3) if np.isfinite(value).any() else 1.0
        off = np.nanmax(np.abs(found[name] - value), initial=0.0)
        assert off <= rtol * max(scale, 1e-3), (name, off)


def invariant(family, method, by, **settings):
    """Draws are the same but for the last digits of the mode that their proposals stand around."""
    frame, away = moved(made(family), by)
    base = answers(fitted(family, method, frame, **settings), frame)
    rtol = 1e-6 if method in ("full Bayes", "NUTS") else 1e-8
    same(answers(fitted(family, method, away, **settings), away, by), base, rtol)


@pytest.mark.parametrize(
    ("family", "method", "by"),
    [("gaussian", "reml", SECONDS), ("gaussian", "no pooling", YEARS), ("poisson", "ml", YEARS)],
)
def test_the_origin_changes_nothing(family, method, by):
    """The commonest of those below, which are slow."""
    invariant(family, method, by)


EVERY_METHOD = [
    ("gaussian", method, "gentle") for method in METHODS
    if method not in ("ml", "reml", "laplace", "no pooling", "MAML")
]  # fmt: skip
EVERY_FAMILY = [
    (family, "ml", "years") for family in FAMILIES
    if family not in ("gaussian", "poisson")
]  # fmt: skip
FAR = [
    ("gaussian", "ml", "seconds"), ("gaussian", "MAML", "seconds"), ("gaussian", "ml", "tiny"),
    ("gaussian", "MAML", "tiny"), ("poisson", "laplace", "seconds"),
    ("poisson", "full Bayes", "years"), ("bernoulli", "iMAML", "seconds"),
    ("negative_binomial", "complete pooling", "seconds"),
    # whose own parameters are looked for within tasks, where w has no estimate
    *((f, m, "years") for f in ("student_t", "negative_binomial") for m in ("no pooling", "MAML")),
]  # fmt: skip
"""Origins and units that are hard for the method, each with a family whose columns are its own."""


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method", "by"), [*EVERY_METHOD, *EVERY_FAMILY, *FAR])
def test_nothing_depends_on_where_predictors_lie_or_on_their_units(family, method, by):
    """With the fast ones: every method once, every family once, and the hardest of the rest."""
    by = {"gentle": GENTLE, "years": YEARS, "seconds": SECONDS, "tiny": TINY}[by]
    invariant(family, method, by)


# ---------------------------------------------------------- the outcome, and the order of things


AMOUNTS = [("gaussian", m, 300.0) for m in ("ml", "reml", "full Bayes", "iMAML", "no pooling")]
AMOUNTS += [("student_t", m, 300.0) for m in ("ml", "no pooling", "MAML")]
AMOUNTS += [("gamma", "ml", 0.0), ("gamma", "MAML", 0.0)]


@functools.cache
def as_made(family, method):
    """What is said of the data as they are, which several tests compare with."""
    frame = made(family)
    return answers(fitted(family, method, frame), frame)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method", "shift"), AMOUNTS)
def test_the_outcomes_origin_and_units_are_carried_along(family, method, shift):
    """y ↦ a + b y moves θ_0 by a and multiplies all else by b; of amounts log b is added to θ_0."""
    unit = 7.0
    frame, base = made(family), as_made(family, method)
    other = frame.assign(y=shift + unit * frame["y"])
    found = answers(fitted(family, method, other), other)
    rows, log = len(frame), family == "gamma"
    back = {}
    for name, value in found.items():
        level = name in ("theta_0", "mean", "new mean", "adapted")
        if name == "evidence":
            back[name] = value + rows * np.log(unit)
            if method == "reml":  # four fixed effects in the outcome's units
                back[name] -= 4 * np.log(unit)
        elif log:
            of_rows = name in ("mean", "sd", "new mean", "new sd", "adapted")
            back[name] = value / unit if of_rows else value - np.log(unit) * (name == "theta_0")
        elif name in ("df", "se_df"):
            back[name] = value
        else:
            back[name] = (value - shift * level) / unit
    same(back, base)


ORDERED = [
    ("gaussian", m) for m in ("ml", "kass-steffey", "full Bayes", "no pooling", "complete pooling")
]
ORDERED += [("binomial", "ml")]  # trials are a column of rows beside the outcome


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), ORDERED)
def test_the_order_of_rows_tasks_and_columns_changes_nothing(family, method):
    """By name. Draws of θ are by the position of the task: φ alone is compared of those."""
    frame, base = made(family), as_made(family, method)
    shuffled = frame.sample(frac=1.0, random_state=4)
    drawn = method == "full Bayes"  # with another order of β's entries they are other draws of it
    formula = FORMULA if drawn else "y ~ w + x + z + (x | g)"
    found = answers(fitted(family, method, shuffled, formula), frame)
    if drawn:
        alone = ("mu_x", "tau_x", "sigma", "shape", "concentration", "df", "evidence")
        base = {name: base[name] for name in alone if name in base}
    same(found, base)


# ------------------------------------------------------- what depends on it, and what is stated


def quietly(function, *args, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        return function(*args, **settings)


def far_away(formula, **settings):
    _, away = moved(made("gaussian"), YEARS)
    return hb.from_formula(formula, away, **settings)


WHERE = ("'x'", "standard deviations from zero", "subtract its mean")


def test_where_the_origin_matters_a_warning_names_the_column():
    """Independent effects, a step size: as stated, and said."""
    apart = quietly(hb.empirical_bayes, *far_away("y ~ x + z + w + (x || g)"))
    assert_said(apart.warnings, *WHERE)
    model, tasks = far_away(FORMULA)
    assert_said(quietly(hb.maml, model, tasks, 1, 1e-9).warnings, *WHERE)
    for free in (hb.empirical_bayes, hb.no_pooling):
        assert not any("from zero" in w for w in quietly(free, model, tasks).warnings)


@pytest.mark.slow
def test_beliefs_of_ones_own_are_held_where_the_columns_lie():
    tight = hb.HyperPrior(tau=dist.HalfNormal(1.0))
    stated = quietly(hb.empirical_bayes, *far_away(FORMULA, hyperprior=tight), "map")
    assert_said(stated.warnings, *WHERE)


def test_independent_effects_stay_as_stated():
    """Shared columns are centred and varying ones only scaled: lme4's ``||`` at x = 0, densely."""
    _, away = moved(made("gaussian"), GENTLE)
    fit = quietly(hb.empirical_bayes, *hb.from_formula("y ~ x + z + (x || g)", away))
    tau, sigma = fit.phi["tau"], float(fit.phi["sigma"])
    total = 0.0
    for _, task in away.groupby("g"):
        x = np.column_stack([np.ones(len(task)), task["x"]])
        covariance = x @ np.diag(tau**2) @ x.T + sigma**2 * np.eye(len(task))
        mean = x @ fit.phi["mu"] + task["z"] * fit.phi["beta"][0]
        total += stats.multivariate_normal.logpdf(task["y"], mean, covariance)
    close(fit.log_evidence, total, rtol=1e-11)
    assert "corr" not in fit.phi


def test_a_step_that_is_given_is_one_in_the_users_columns():
    """θ after one step from φ, by hand."""
    _, away = moved(made("gaussian"), GENTLE)
    model, tasks = hb.from_formula("y ~ x + (x | g)", away)
    fit = quietly(hb.maml, model, tasks, 1, 1e-3, sigma=0.5)
    assert fit.info["step_size"] == 1e-3
    rows = tasks.predictors[: tasks.starts[1]]
    left = tasks.outcome[: tasks.starts[1]] - rows @ fit.phi["mu"]
    close(fit.theta.values[0], fit.phi["mu"] + 1e-3 * rows.T @ left / 0.25, rtol=1e-10)


@pytest.mark.slow
def test_the_program_has_the_joint_density_and_sites_of_both_columns():
    """Sampled as ``mu_centred`` and the like; ``mu``, ``theta`` in the user's columns follow."""
    from numpyro.handlers import seed, substitute, trace
    from numpyro.infer.util import log_density

    from hierbayes.numerics import float64

    _, away = moved(made("gaussian"), GENTLE)
    model, tasks = hb.from_formula("y ~ x + z + (x | g)", away)
    program = model.numpyro_program(tasks)
    with float64():

        @jax.jit
        def drawn(key):
            sites = trace(seed(program, key)).get_trace()
            return {n: v["value"] for n, v in sites.items() if v["type"] == "sample" and n != "y"}

        @jax.jit
        def of(sampled):
            told = trace(substitute(program, sampled)).get_trace()
            names = ("mu", "tau", "corr", "beta", "sigma", "theta")
            told = {name: told[name]["value"] for name in names}
            return told, log_density(program, (), {}, sampled)[0]

        sampled = drawn(jax.random.key(1))
        phi, density = of(sampled)
    assert {"mu_centred", "tau_centred", "corr_centred", "theta_centred", "beta"} <= {*sampled}
    phi = {name: np.asarray(value) for name, value in phi.items()}
    theta = phi.pop("theta")
    close(model.log_joint(phi, theta, tasks), density, rtol=1e-9)
    # f is the same in both columns
    level = np.asarray(sampled["theta_centred"])[:, 0]
    means = away[["x", "z"]].mean()
    close(theta[:, 0] + means["x"] * theta[:, 1] + means["z"] * phi["beta"][0], level, rtol=1e-10)


@pytest.mark.parametrize(
    "method",
    ["ml", *(pytest.param(m, marks=pytest.mark.slow) for m in ("kass-steffey", "full Bayes"))],
)
def test_a_saved_fit_keeps_its_columns(tmp_path, method):
    """New rows and adapted tasks are read through the same constants: the same to the last bit."""
    _, away = moved(made("gaussian"), SECONDS)
    fit = fitted("gaussian", method, away)
    fit.save(tmp_path / "fit.nc")
    again = hb.load(tmp_path / "fit.nc")
    assert again.model.columns == fit.model.columns
    assert again.at == fit.at
    before, after = answers(fit, away, SECONDS), answers(again, away, SECONDS)
    for name, value in before.items():
        assert np.array_equal(after[name], value, equal_nan=True), name


def test_the_constants_are_those_of_the_first_tasks():
    """Refits and new tasks do not move the columns, or the defaults would move with them."""
    model, tasks = hb.from_formula(FORMULA, made("gaussian"))
    resolved = model.resolve(tasks)
    fit = quietly(hb.empirical_bayes, resolved, tasks.take(np.arange(6)))
    assert fit.model.columns == resolved.columns
    assert fit.on(tasks.take(np.arange(6, 9))).model.columns == resolved.columns


def test_the_comparison_would_see_a_wrong_intercept():
    """The negative control: a slope's τ that is a part in 1e7 off is found."""
    base = as_made("gaussian", "ml")
    with pytest.raises(AssertionError):
        same(base | {"tau_x": base["tau_x"] * (1 + 1e-7)}, base)
