"""Every method answers the same demands under every family; ``test_contract`` asks more of one.

Rung (b): SciPy's optimisers and Optax on densities of SciPy and NumPyro, finite differences.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np
import optax
import pandas as pd
import pytest
from assertions import close, finite_difference
from scipy import optimize, special, stats

import hierbayes as hb
from hierbayes.adaptation import GradientSteps, MaximumLikelihood, Proximal, Quadrature
from hierbayes.adaptation.step_length import largest_curvature
from hierbayes.adaptation.unpooled import perfectly_explained
from hierbayes.checks import leave_one_task_out
from hierbayes.evidence import Integrated
from hierbayes.numerics import float64

PHI = {"concentration": 3.0, "shape": 2.5, "sigma": 0.5, "df": 4.0}
L = hb.likelihoods
FAMILIES: dict[str, Any] = {
    "bernoulli": L.Bernoulli(), "binomial": L.Binomial(), "poisson": L.Poisson(),
    "negative binomial": L.NegativeBinomial(), "student": L.StudentT(), "gamma": L.Gamma(),
}  # fmt: skip
OWN = {"negative binomial": {"concentration"}, "student": {"sigma", "df"}, "gamma": {"shape"}}
every_family = pytest.mark.parametrize("family", FAMILIES)
BUT_BERNOULLI = [f for f in FAMILIES if f != "bernoulli"]  # which is a binomial of one trial
all_but_bernoulli = pytest.mark.parametrize("family", BUT_BERNOULLI)
poisson_and_others = pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f == "poisson" else pytest.mark.slow) for f in BUT_BERNOULLI],
)


def outcomes(family: str, f: np.ndarray, trials: np.ndarray, rng: Any) -> np.ndarray:
    """Drawn by SciPy around the linear predictor f."""
    mean, k, a = np.exp(f), PHI["concentration"], PHI["shape"]
    drawn: Any = {
        "bernoulli": stats.bernoulli(special.expit(f)),
        "binomial": stats.binom(trials.astype(int), special.expit(f)),
        "poisson": stats.poisson(mean),
        "negative binomial": stats.nbinom(k, k / (k + mean)),
        "student": stats.t(PHI["df"], f, PHI["sigma"]),
        "gamma": stats.gamma(a, scale=mean / a),
    }[family]
    return np.asarray(drawn.rvs(len(f), random_state=rng), float)


def simulated(
    family: str, num_tasks: int = 7, seed: int = 3, sizes: tuple[int, int] = (2, 12)
) -> hb.Tasks:
    """Ragged tasks of an intercept and a slope, an offset, and trials where there are any.

    Their sizes do not depend on the seed, so that tasks of several seeds share their programs.
    """
    g = np.repeat(np.arange(num_tasks), np.random.default_rng(3).integers(*sizes, num_tasks))
    rng = np.random.default_rng(seed)
    x, offset = rng.normal(size=g.size), rng.normal(0.0, 0.2, g.size)
    theta = [0.4, -0.4] + rng.standard_normal((num_tasks, 2)) * [0.5, 0.3]
    trials = rng.integers(1, 9, g.size).astype(float)
    y = outcomes(family, offset + theta[g, 0] + theta[g, 1] * x, trials, rng)
    data = pd.DataFrame({"g": g, "x": x, "offset": offset, "y": y, "n": trials})
    more = {"trials": "n"} if family == "binomial" else {}
    return hb.Tasks.from_dataframe(
        data, task="g", outcome="y", predictors=["x"], offset="offset", **more
    )


def model(family: str) -> hb.HierarchicalModel:
    return hb.HierarchicalModel(FAMILIES[family], hb.priors.Gaussian(correlated=False))


def own(family: str) -> dict[str, np.ndarray]:
    return {name: np.asarray(PHI[name]) for name in FAMILIES[family].parameters()}


# ------------------------------------------------------------------------ the contract

QUICK_CHAINS = dict(num_draws=100, num_warmup=100, num_chains=2, seed=1, progress=False)
METHODS: dict[str, tuple[Any, set[str]]] = {
    "no pooling": (hb.no_pooling, set()),
    "complete pooling": (hb.complete_pooling, {"mu", "tau"}),
    "maml": (hb.maml, {"mu", "query"}),
    "reptile": (hb.reptile, {"mu", "query"}),
    "imaml": (hb.imaml, {"mu", "tau", "query"}),
    "ml": (hb.empirical_bayes, {"mu", "tau"}),
    "map": (lambda m, t: hb.empirical_bayes(m, t, "map"), {"mu", "tau"}),
    "laplace": (lambda m, t: hb.empirical_bayes(m, t, evidence="laplace"), {"mu", "tau"}),
    "full Bayes": (
        lambda m, t: hb.full_bayes(m, t, **QUICK_CHAINS),
        {"mu", "tau"},
    ),
}
FAST = {
    ("bernoulli", "maml"), ("binomial", "complete pooling"), ("poisson", "no pooling"),
    ("negative binomial", "complete pooling"), ("student", "complete pooling"),
    ("gamma", "complete pooling"),
}  # fmt: skip
"""Pairs that run with the fast tests: every family. ``test_contract`` has every method."""

OWN_WAYS = {
    # own parameters: within tasks, from support and query, under evidence, with priors of theirs
    "negative binomial": ("maml", "ml", "map"),
    "student": ("no pooling", "maml", "imaml", "ml", "map", "full Bayes"),
    "gamma": ("no pooling", "maml", "reptile", "laplace"),
    # curvature without a bound, trials in support and query, the only one of both bounds
    "poisson": ("maml", "reptile", "imaml"),
    "binomial": ("maml", "imaml"),
    "bernoulli": ("imaml", "laplace"),
}
"""Pairs with something of their own, among the slow tests; what is left repeats these."""

PAIRS = [pytest.param(f, m, id=f"{f}, {m}") for f, m in sorted(FAST)]
PAIRS += [
    pytest.param(f, m, id=f"{f}, {m}", marks=pytest.mark.slow)
    for f in OWN_WAYS
    for m in OWN_WAYS[f]
]


def check_contract(fit: hb.Fit, family: str, promised: set[str], tasks: hb.Tasks) -> None:
    names = (promised - {"query"}) | OWN.get(family, set())
    if "query" in promised:
        names |= {f"{name}_query" for name in OWN.get(family, set()) - {"df"}}
    assert set(fit.phi) == names
    assert all(np.isfinite(v).all() for v in fit.phi.values())
    assert all(np.size(fit.phi[n]) == (2 if n in ("mu", "tau") else 1) for n in names)
    assert fit.theta.dims == ("task", "coef")
    assert fit.theta["coef"].values.tolist() == ["Intercept", "x"]
    assert np.isfinite(fit.theta.values).all()
    seen = fit.predict()
    known = ~seen.unidentified
    assert known.sum() > tasks.num_rows / 3
    for values in (seen.log_density(), seen.mean, seen.sd, seen.quantile(0.9)):
        assert not np.isnan(values[known]).any()
        assert np.isnan(values[~known]).all()
    # a t of two degrees of freedom or fewer has no variance
    assert (
        np.isfinite(seen.sd[known]).all()
        or np.min((fit.phi_draws or fit.phi).get("df", np.inf)) <= 2
    )
    assert np.isfinite(seen.log_density()[known]).all()
    assert (seen.quantile(0.1) <= seen.quantile(0.9))[known].all()
    assert np.isfinite(seen.draws(20, seed=1)[:, known]).all()
    if "mu" in fit.phi:
        new = fit.predict(tasks, target="new")
        assert np.isfinite(new.log_density()).all()
        assert np.isfinite(new.draws(250, seed=1)).all()
    # another number of tasks in one family; in the others as many, with the programs that there are
    num_tasks = 3 if family == "poisson" else 7
    some = simulated(family, num_tasks, seed=11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.errors.FitWarning)
        adapted = fit.adapt(some)
    assert adapted.theta.shape == (num_tasks, 2)
    assert np.isfinite(adapted.theta.values).all()
    assert np.isfinite(fit.summary().iloc[:, 0]).all()
    assert {"observed_data", "constant_data"} <= set(fit.datatree.children)
    assert all(len(w.split()) > 3 for w in fit.warnings)


@pytest.mark.filterwarnings("ignore::hierbayes.errors.FitWarning")
@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_every_method_serves_every_family(family, method):
    tasks = simulated(family)
    run, promised = METHODS[method]
    check_contract(run(model(family), tasks), family, promised, tasks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hierbayes.errors.FitWarning")
@pytest.mark.parametrize("family", ["poisson", "bernoulli"])
def test_comparison_by_task_scores_methods(family):
    tasks = simulated(family, num_tasks=4, sizes=(6, 7))  # one size: refits share their programs
    names = ["no pooling", "complete pooling", "full Bayes"]
    if family == "poisson":  # refitted from nothing without each task, which one family shows
        names += ["ml", "laplace", "maml"]
    fits = {name: METHODS[name][0](model(family), tasks) for name in names}
    comparison = hb.compare(fits)
    scores = comparison.table["log_density"]
    assert np.isfinite(scores.drop("no pooling")).all()
    assert np.isnan(scores["no pooling"])
    assert "predicted from the others" in comparison.scored_on


# ------------------------------------------------------------------ steps and their length


def log_likelihood(family: str, theta: Any, x: Any, y: Any, offset: Any, trials: Any) -> float:
    """By SciPy, of one task."""
    f = offset + x @ theta
    mean, k, a = np.exp(f), PHI["concentration"], PHI["shape"]
    if family == "bernoulli":
        return float(stats.bernoulli(special.expit(f)).logpmf(y).sum())
    if family == "binomial":
        return float(stats.binom(trials, special.expit(f)).logpmf(y).sum())
    if family == "poisson":
        return float(stats.poisson(mean).logpmf(y).sum())
    if family == "negative binomial":
        return float(stats.nbinom(k, k / (k + mean)).logpmf(y).sum())
    if family == "student":
        return float(stats.t(PHI["df"], f, PHI["sigma"]).logpdf(y).sum())
    return float(stats.gamma(a, scale=mean / a).logpdf(y).sum())


def parts(tasks: hb.Tasks, j: int) -> tuple[Any, ...]:
    some = slice(tasks.starts[j], tasks.starts[j + 1])
    trials = tasks.slots.get("trials", np.ones(tasks.num_rows))
    return tasks.predictors[some], tasks.outcome[some], tasks.slots["offset"][some], trials[some]


@every_family
def test_steps_climb_the_density_that_scipy_writes(family):
    """K = 3 against slopes of SciPy's density by differences (right to 1e-9 of a slope)."""
    tasks = simulated(family, num_tasks=3)
    mu, eta = np.array([0.3, -0.2]), 0.01
    found = GradientSteps(3, eta)(model(family), tasks, own(family) | {"mu": mu}).mean
    for j in range(3):
        theta = mu.copy()
        for _ in range(3):
            data = parts(tasks, j)
            theta = theta + eta * finite_difference(
                lambda t, data=data: log_likelihood(family, t, *data), theta
            )
        close(found[j], theta, rtol=1e-6, atol=1e-8)


def test_steps_are_those_of_optax_on_each_task_by_itself():
    tasks, mu = simulated("poisson", num_tasks=2), np.array([0.3, -0.2])
    found = GradientSteps(6, 0.02)(model("poisson"), tasks, {"mu": mu}).mean
    sgd = optax.sgd(0.02)
    for j in range(tasks.num_tasks):
        x, y, offset, _ = parts(tasks, j)
        with float64():

            def loss(t, x=x, y=y, offset=offset):
                f = offset + x @ t
                return (jax.numpy.exp(f) - y * f).sum()

            @jax.jit
            def six_steps(theta: Any, loss=loss) -> Any:
                state = sgd.init(theta)
                for _ in range(6):
                    updates, state = sgd.update(jax.grad(loss)(theta), state)
                    theta = optax.apply_updates(theta, updates)
                return theta

            theta = six_steps(mu)
            close(found[j], np.asarray(theta), rtol=1e-12)


def test_the_slope_through_the_steps_of_a_poisson_task_is_right():
    tasks = simulated("poisson", num_tasks=2)
    bare, rows = model("poisson"), L.Poisson().arrange(tasks)
    steps = GradientSteps(4, 0.01)
    with float64():

        @jax.jit
        def total(mu: Any) -> Any:
            return (steps.steps(bare, {"mu": mu}, *rows) ** 2).sum()

        at = np.array([0.4, -0.3])
        slope = np.asarray(jax.grad(total)(at))
        close(slope, finite_difference(lambda v: float(total(v)), at), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "family",
    [
        "poisson",
        pytest.param("negative binomial", marks=pytest.mark.slow),
        pytest.param("gamma", marks=pytest.mark.slow),
    ],
)
def test_auto_steps_climb_where_curvature_has_no_bound(family, recwarn):
    """From the overall level, where the rule is stated, no log likelihood falls in 30 steps."""
    tasks = simulated(family, num_tasks=40, seed=1)
    phi = own(family)
    eta = float(1 / largest_curvature(model(family), tasks, phi).max())
    start = phi | {"mu": np.array([FAMILIES[family].units(tasks)[0], 0.0])}
    assert GradientSteps(30, eta)(model(family), tasks, start).remarks == ()
    assert not recwarn.list


def test_tasks_that_overshoot_are_named():
    """Two tasks of 4 rows: steps of 0.3 exceed 2/(4·5) where five are counted, not where one is."""
    tasks = hb.Tasks.from_arrays(
        [(np.ones((4, 1)), [1.0, 1, 0, 1]), (np.ones((4, 1)), [5.0, 6, 5, 4])],
        names=["few", "many"],
    )
    bare = hb.HierarchicalModel(L.Poisson(), hb.priors.Gaussian())
    said = GradientSteps(8, 0.3)(bare, tasks, {"mu": np.zeros(1)}).remarks
    assert len(said) == 1
    assert "overshoot in 1 of 2 tasks ('many')" in said[0]
    assert GradientSteps(8, 0.04)(bare, tasks, {"mu": np.zeros(1)}).remarks == ()


def test_curvature_without_a_bound_is_read_between_start_and_outcome():
    """Poisson: e^f. From a level of log 2 (f = 0.69) to counts of 0, 1, 9: 2, 2 and 9, summed."""
    tasks = hb.Tasks.from_arrays([(np.ones((3, 1)), [0.0, 1.0, 9.0]), (np.ones((1, 1)), [3.0])])
    bare = hb.HierarchicalModel(L.Poisson(), hb.priors.Gaussian())
    found = largest_curvature(bare, tasks, {"mu": np.array([np.log(2.0)])})
    close(found, [13.0, 3.0], rtol=1e-12)


# --------------------------------------------------------------- MAP and maximum likelihood


@poisson_and_others
def test_the_map_estimate_is_stationary(family):
    """∇ log p(D | θ*) = (θ* − μ) / τ², with SciPy's densities and differences."""
    tasks, tau, mu = simulated(family, num_tasks=3), np.array([0.7, 0.4]), np.array([0.3, -0.2])
    phi = own(family) | {"mu": mu, "tau": tau}
    found = Proximal()(model(family), tasks, phi).mean
    for j in range(3):
        data = parts(tasks, j)
        slope = finite_difference(lambda t, data=data: log_likelihood(family, t, *data), found[j])
        close(slope, (found[j] - mu) / tau**2, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@all_but_bernoulli
def test_many_steps_reach_the_tasks_own_maximum(family):
    """K → ∞: θ_K of equivalent_prior is the maximum of SciPy's density, and the prior is flat."""
    tasks = simulated(family, num_tasks=2, seed=5, sizes=(15, 20))
    phi = own(family) | {"mu": np.array([0.3, -0.2])}
    eta = float(1 / largest_curvature(model(family), tasks, phi).max())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.errors.FitWarning)
        found = hb.equivalent_prior(model(family), tasks, phi, num_steps=20_000, step_size=eta)
    alone = MaximumLikelihood()(model(family), tasks, phi)
    assert not np.isnan(found.precision).any()
    for j in range(2):
        data = parts(tasks, j)
        best = optimize.minimize(
            lambda t, data=data: -log_likelihood(family, t, *data), found.posterior_mean[j],
            method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13},
        )  # fmt: skip
        close(found.posterior_mean[j], best.x, rtol=1e-6, atol=1e-6)
        close(alone.mean[j], best.x, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@all_but_bernoulli
def test_an_equivalent_prior_is_judged_and_never_nan(family):
    """Short steps, longer ones, and such that leave the finite numbers: judged, or refused."""
    tasks = simulated(family, num_tasks=2, seed=5, sizes=(15, 20))
    phi = own(family) | {"mu": np.array([0.3, -0.2])}
    top = float(largest_curvature(model(family), tasks, phi).max())
    for num_steps, share in ((1, 0.5), (5, 1.0), (4, 2.5), (3, 1e3), (4000, 1e3)):
        said = ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hb.errors.FitWarning)
            try:
                found = hb.equivalent_prior(
                    model(family), tasks, phi, num_steps=num_steps, step_size=share / top
                )
            except hb.InputError as error:
                found, said = None, str(error)
        if found is None:
            assert "diverge" in said
            assert share > 2
            continue
        for values in (found.precision, found.posterior_mean, found.posterior_covariance):
            assert np.isfinite(values).all()
        proper = found.status != "no prior"
        assert not np.isnan(found.validity.missed[proper]).any()
        if share < 1:
            assert proper.all()


@every_family
def test_kl_between_two_predictors_is_the_sum_over_outcomes(family):
    """Sums over counts, and integrals by SciPy's densities on 200,001 points."""
    f, other = np.array([0.4, -0.7, 1.1]), np.array([-0.2, -0.6, 0.5])
    trials = np.array([5.0, 1.0, 8.0])
    with float64():
        found = FAMILIES[family].divergence(f, other, own(family), {"trials": trials})
    for i in range(3):
        if family == "student":
            y = np.sinh(np.linspace(-12, 12, 200_001))
            jacobian = np.cosh(np.linspace(-12, 12, 200_001)) * 24 / 200_000
        elif family == "gamma":
            y = np.exp(np.linspace(-30, 6, 200_001))
            jacobian = y * 36 / 200_000
        else:
            last = {"bernoulli": 1, "binomial": int(trials[i])}.get(family, 400)
            y, jacobian = np.arange(last + 1.0), 1.0
        here, there = (
            np.array([log_likelihood_of_rows(family, v, y, trials[i])]) for v in (f[i], other[i])
        )
        close(found[i], (np.exp(here) * (here - there) * jacobian).sum(), rtol=1e-6, atol=1e-9)


def log_likelihood_of_rows(family: str, f: float, y: Any, trials: float) -> np.ndarray:
    """By SciPy, of each of some outcomes around one f."""
    mean, k, a = np.exp(f), PHI["concentration"], PHI["shape"]
    d: Any = {
        "bernoulli": stats.bernoulli(special.expit(f)),
        "binomial": stats.binom(trials, special.expit(f)),
        "poisson": stats.poisson(mean), "negative binomial": stats.nbinom(k, k / (k + mean)),
        "student": stats.t(PHI["df"], f, PHI["sigma"]), "gamma": stats.gamma(a, scale=mean / a),
    }[family]  # fmt: skip
    return d.logpmf(y) if hasattr(d.dist, "pmf") else d.logpdf(y)


# ------------------------------------------------------------------------- the two limits


def separated() -> tuple[hb.HierarchicalModel, hb.Tasks]:
    """Zeros below 0.5 and ones above; nothing but zeros; and a task with a maximum."""
    x = np.array([0.0, 0.2, 0.8, 1.0, 0.4])
    apart = [(x, (x > 0.5).astype(float)), (x, np.zeros(5)), (x, np.array([0.0, 1, 0, 1, 1]))]
    arrays = [(np.column_stack([np.ones(5), c]), y) for c, y in apart]
    tasks = hb.Tasks.from_arrays(arrays, names=["apart", "none", "fine"], coef=["Intercept", "x"])
    return hb.HierarchicalModel(L.Bernoulli(), hb.priors.Gaussian()), tasks


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hierbayes.errors.FitWarning")
@pytest.mark.parametrize("method", ["imaml", "map", "full Bayes"])
def test_the_prior_holds_separated_tasks(method):
    """Finite everywhere; under full Bayes and MAP no estimate runs off."""
    bare, tasks = separated()
    fit = METHODS[method][0](bare, tasks)
    assert np.isfinite(fit.theta.values).all()
    assert np.isfinite(fit.predict().log_density()).all()
    if method in ("map", "full Bayes"):
        assert np.abs(fit.theta.values).max() < 50


def test_separated_tasks_are_marked_and_named():
    bare, tasks = separated()
    with pytest.warns(hb.errors.FitWarning, match="2 of 3 tasks has no maximum .*'apart', 'none'"):
        fit = hb.no_pooling(bare, tasks)
    identified = fit.adapted.posterior.identified
    assert identified.tolist() == [[False, False], [False, False], [True, True]]
    assert np.isfinite(fit.theta.values).all()
    assert fit.predict().unidentified.tolist() == [True] * 10 + [False] * 5


def test_rows_that_a_direction_leaves_open_still_tell():
    """A dummy column with nothing counted: the intercept is that of the other rows, log 3."""
    dummy = np.array([0.0, 0, 0, 1, 1])
    arrays = [(np.column_stack([np.ones(5), dummy]), [2.0, 4, 3, 0, 0])] * 2
    tasks = hb.Tasks.from_arrays(arrays, names=["a", "b"], coef=["Intercept", "dummy"])
    phi: dict[str, Any] = {}
    bare = hb.HierarchicalModel(L.Poisson(), hb.priors.Gaussian())
    found = MaximumLikelihood()(bare, tasks, phi)
    close(found.mean, [[np.log(3.0), 0.0]] * 2, rtol=1e-9, atol=1e-9)
    assert found.identified.tolist() == [[True, False]] * 2


def test_a_direction_of_separation_is_found_by_hand():
    """x = −1, 1 with y = 0, 1 separates; a third row inside, y = 1 at −2, undoes it."""
    x = np.array([[1.0, -1.0], [1.0, 1.0], [1.0, -2.0]])
    up = np.array([False, True, True])
    one = np.zeros(3, int)
    assert perfectly_explained(x[:2], one[:2], 1, up[:2], ~up[:2]).all()
    assert not perfectly_explained(x, one, 1, up, ~up).any()


def test_complete_pooling_is_maximum_likelihood_over_all_rows():
    """Poisson and Student-t against SciPy's Nelder–Mead on SciPy's densities."""
    for family in ("poisson", "student"):
        tasks = simulated(family)
        fit = hb.complete_pooling(model(family), tasks)
        y, x, o = tasks.outcome, tasks.predictors, tasks.slots["offset"]

        def minus(v, y=y, x=x, o=o, family=family):
            f = o + x @ v[:2]
            if family == "poisson":
                return -stats.poisson(np.exp(f)).logpmf(y).sum()
            return -stats.t(np.exp(v[3]), f, np.exp(v[2])).logpdf(y).sum()

        logs = [np.log(fit.phi[n]) for n in ("sigma", "df") if n in fit.phi]
        best = optimize.minimize(
            minus, [*fit.phi["mu"], *logs], method="Nelder-Mead",
            options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000},
        )  # fmt: skip
        close(fit.log_evidence, -best.fun, rtol=1e-9)
        close(fit.phi["mu"], best.x[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_dispersion_within_tasks_does_not_hold_the_spread_between_them():
    """400 tasks of 6 rows, 3 and 2.5 true: within 15 %, where pooling over all is far below."""
    rng = np.random.default_rng(4)
    for family, name in (("negative binomial", "concentration"), ("gamma", "shape")):
        arrays = []
        for _ in range(400):
            f = np.full(6, 1.5 + 0.8 * rng.standard_normal())
            arrays.append((np.ones((6, 1)), outcomes(family, f, np.ones(6), rng)))
        tasks = hb.Tasks.from_arrays(arrays)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hb.errors.FitWarning)
            within = hb.no_pooling(model(family), tasks).phi[name]
            over_all = hb.complete_pooling(model(family), tasks).phi[name]
        assert abs(float(within) / PHI[name] - 1) < 0.15
        assert over_all < 0.6 * PHI[name]


# ------------------------------------------------------------------------ leave one task out


@pytest.mark.slow
def test_a_task_left_out_is_scored_by_a_refit_without_it():
    """Complete pooling and the Laplace evidence against fits made anew of the other tasks."""
    tasks = simulated("poisson", num_tasks=5)
    bare = model("poisson").resolve(tasks)
    rest = tasks.take(np.array([0, 1, 3, 4]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.errors.FitWarning)
        pooled = hb.complete_pooling(bare, tasks)
        mu = hb.complete_pooling(bare, rest).phi["mu"]
    expected = log_likelihood("poisson", mu, *parts(tasks, 2))
    close(leave_one_task_out(pooled)["log_density"][2], expected, rtol=1e-7)


@pytest.mark.slow
def test_empirical_bayes_left_out_is_a_fit_of_the_rest():
    """To 1e-4: two searches from different starts on the same criterion."""
    tasks = simulated("poisson", num_tasks=6)
    bare = model("poisson").resolve(tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.errors.FitWarning)
        fit = hb.empirical_bayes(bare, tasks)
        rest = hb.empirical_bayes(bare, tasks.take(np.array([0, 1, 3, 4, 5])))
    expected = Integrated(Quadrature(15))(bare, tasks, dict(rest.phi))[2]
    close(leave_one_task_out(fit)["log_density"][2], expected, rtol=1e-4)


def test_quantiles_of_a_mixture_without_a_variance():
    """Two t of 1.5 degrees of freedom around 0 and 4: SciPy's distribution function gives 0.9."""
    tasks = simulated("student", num_tasks=1, sizes=(2, 3))
    mixed = stats.t(1.5, np.array([[0.0, 1.0], [4.0, 5.0]]))
    seen = hb.fit.Prediction("known task", tasks, mixed, np.zeros(2, bool))
    close(mixed.cdf(seen.quantile(0.9)).mean(0), [0.9, 0.9], rtol=1e-6)


def test_empty_tasks_stay_at_the_prior():
    tasks = simulated("gamma", num_tasks=3)
    emptied = tasks.keep_rows(tasks.task_of_row != 1)
    phi = own("gamma") | {"mu": np.array([0.3, -0.2])}
    close(GradientSteps(3, 0.01)(model("gamma"), emptied, phi).mean[1], phi["mu"], rtol=1e-15)
    assert np.isfinite(MaximumLikelihood()(model("gamma"), emptied, phi).mean).all()
    assert emptied.sizes[1] == 0
