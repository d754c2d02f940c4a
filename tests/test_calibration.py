"""Simulation-based calibration: exact p-values, samplers that pass, and samplers that it catches.

Rung (a): ranks that can be enumerated. Rung (b): a posterior of normal means on a grid, by NumPy
alone; data simulated by NumPy alone; ArviZ's bands. Rung (d): full Bayes on what it simulates, with
wrong samplers beside it, in the slow tests.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from assertions import close, refuses
from scipy import stats

import hierbayes as hb
from hierbayes.calibration import Calibration
from hierbayes.calibration.check import Draws, thinned
from hierbayes.calibration.result import band, counts_below, leaving, p_value, shape_of
from hierbayes.checks.coverage import covered_by_draws, covered_by_normal
from hierbayes.checks.quantities import quantities, rank
from hierbayes.meta import collapsed_sampling
from hierbayes.phi import Space
from hierbayes.simulation import draw_phi, draw_theta, simulate

WRONG = 1e-6
"""p-value below which a sampler counts as caught; fourteen quantities pass by chance in all but
0.001 % of seeds."""

# ------------------------------------------------------------------ uniformity


def smallest_tail(ranks: Any, num_draws: int) -> float:
    """γ of ranks, by SciPy's binomial, position after position."""
    size, found = len(ranks), []
    for i in range(1, num_draws + 1):
        count, z = sum(r < i for r in ranks), i / (num_draws + 1)
        below, above = stats.binom.cdf(count, size, z), stats.binom.sf(count - 1, size, z)
        found.append(2 * min(below, above))
    return min(found)


@pytest.mark.parametrize(("size", "num_draws"), [(1, 3), (2, 2), (4, 3), (3, 5)])
def test_p_values_are_those_of_all_ranks_enumerated(size, num_draws):
    """P(γ' ≤ γ) by counting the (L + 1)^N equally likely cases."""
    every = list(itertools.product(range(num_draws + 1), repeat=size))
    tails = np.array([smallest_tail(ranks, num_draws) for ranks in every])
    for ranks, tail in zip(every, tails, strict=True):
        expected = (tails <= tail * (1 + 1e-9)).mean()
        # sums of at most 4^4 terms of rounding 1e-16
        close(p_value(np.array(ranks), num_draws), expected, rtol=1e-10)


def test_p_values_of_uniform_ranks_are_uniform(rng):
    """Of 400 samples; discreteness only makes them larger."""
    found = [p_value(rng.integers(0, 20, 100), 19) for _ in range(400)]
    assert stats.kstest(found, "uniform").pvalue > 1e-3
    assert abs(np.mean(np.array(found) <= 0.1) - 0.1) < 4 * np.sqrt(0.09 / 400)


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("∪", lambda rng: rng.beta(0.7, 0.7, 500)), ("∩", lambda rng: rng.beta(2.0, 2.0, 500)),
        ("slope up", lambda rng: rng.beta(1.4, 1.0, 500)),
        ("slope down", lambda rng: rng.beta(1.0, 1.4, 500)),
    ],
)  # fmt: skip
def test_ranks_that_are_not_uniform_are_caught_and_named(name, draw, rng):
    ranks = np.floor(draw(rng) * 100).astype(int)
    assert p_value(ranks, 99) < 1e-4
    assert shape_of("sigma", ranks, 99).startswith(name)


def test_a_band_is_left_as_often_as_it_says(rng):
    """Exactly, by :func:`leaving`; and of 4,000 samples within four standard errors."""
    found = band(300, 49, 0.05)
    exact = leaving(found.low, found.high, 300)
    assert 0.045 < exact <= 0.05  # counts are whole numbers: the next band would be left too often
    counts = np.array([counts_below(rng.integers(0, 50, 300), 49) for _ in range(4000)])
    left = ((counts < found.low) | (counts > found.high)).any(1).mean()
    assert abs(left - exact) < 4 * np.sqrt(0.05 * 0.95 / 4000)


def test_bands_are_arviz_stats_own():
    """Which simulates their pointwise level; the counts at their edges agree to one."""
    from arviz_stats import ecdf_utils

    z = np.arange(1, 100) / 100
    level = ecdf_utils.simulate_confidence_bands(500, 1, z, 0.95, 2000, np.random.default_rng(1))
    low, high = ecdf_utils.get_pointwise_confidence_band(level, 500, z)
    found = band(500, 99, 0.05)
    assert np.abs(low * 500 - found.low).max() <= 1
    assert np.abs(high * 500 - found.high).max() <= 1


def test_a_band_agrees_with_the_p_values(rng):
    """Outside the band of level α if and only if p ≤ α, but for the band's own rounding."""
    found = band(200, 19, 0.2)
    exact = leaving(found.low, found.high, 200)
    for _ in range(200):
        ranks = rng.integers(0, 20, 200)
        counts = counts_below(ranks, 19)
        outside = bool(((counts < found.low) | (counts > found.high)).any())
        assert outside == (p_value(ranks, 19) <= exact * (1 + 1e-9))


def test_ranks_outside_their_range_are_refused():
    with refuses("lie from 0 to 9", "found 3 to 10"):
        p_value(np.array([3, 10]), 9)
    with refuses("expected ranks (N,)"):
        p_value(np.zeros((2, 2), int), 9)
    with refuses("level must lie between 0 and 1"):
        band(10, 9, 1.0)


def test_ties_are_broken_at_random(rng):
    draws = {"a": np.array([0.0, 1.0, 1.0, 1.0, 2.0])}
    found = [rank(draws, {"a": 1.0}, rng)["a"] for _ in range(2000)]
    counts = np.bincount(found, minlength=6)
    assert counts[[0, 5]].sum() == 0
    assert stats.chisquare(counts[1:5]).pvalue > 1e-4


# ------------------------------------------------- normal means, by NumPy alone

SE = np.array([0.6, 1.5, 0.9, 1.2, 0.8, 1.0])
MEANS = hb.HierarchicalModel(
    hb.likelihoods.Gaussian(known_se=True), hb.priors.Gaussian(),
    hb.HyperPrior(mu=dist.Normal(0.0, 1.0), tau=dist.HalfNormal(1.0)),
)  # fmt: skip
SCHOOLS = hb.Tasks.from_arrays(
    [(np.ones((1, 1)), [float(j % 3)]) for j in range(6)], known_se=[[s] for s in SE]
)
GRID = np.arange(0.005, 5.0, 0.01)
"""τ, of which HalfNormal(1) leaves 6e-7 above the end."""


def on_a_grid(
    y: np.ndarray, seed: int, prior_of_tau: Any = None, se: np.ndarray = SE
) -> dict[str, np.ndarray]:
    """99 independent draws of (μ, τ, θ) given y (J,): τ on a grid, the others exactly."""
    rng = np.random.default_rng([3, seed])
    log_prior = -0.5 * GRID**2 if prior_of_tau is None else prior_of_tau(GRID)
    variance = GRID[:, None] ** 2 + se**2
    precision = 1.0 + (1 / variance).sum(1)
    centre = (y / variance).sum(1) / precision
    log_p = log_prior - 0.5 * (np.log(variance) + y**2 / variance).sum(1)
    log_p += 0.5 * precision * centre**2 - 0.5 * np.log(precision)
    chosen = rng.choice(len(GRID), 99, p=np.exp(log_p - log_p.max()) / np.exp(
        log_p - log_p.max()).sum())  # fmt: skip
    tau = GRID[chosen] + rng.uniform(-0.005, 0.005, 99)
    mu = centre[chosen] + rng.normal(size=99) / np.sqrt(precision[chosen])
    share = tau[:, None] ** 2 / (tau[:, None] ** 2 + se**2)
    theta = share * y + (1 - share) * mu[:, None]
    theta += np.sqrt(share) * se * rng.normal(size=theta.shape)
    return {"mu": mu[:, None], "tau": tau[:, None], "theta": theta[..., None]}


def exact(model: Any, tasks: hb.Tasks, seed: int) -> dict[str, np.ndarray]:
    return on_a_grid(tasks.outcome, seed)


@pytest.fixture(scope="module")
def passed() -> Calibration:
    return hb.check_calibration(MEANS, SCHOOLS, 300, sampler=exact, seed=1)


def test_an_exact_sampler_passes(passed):
    """14 % of the seeds would show a p-value below 0.15 after correction; 1 % fail."""
    assert passed.failed == ()
    assert passed.verdict.startswith("Calibrated, as far as 300 simulated data sets can tell")
    assert set(passed.ranks) == {
        "mu[x0]", "log tau[x0]", "theta[0, x0]", "theta[5, x0]", "theta · tau [0, x0]",
        "log likelihood", "log likelihood of task 0", "prediction error",
    }  # fmt: skip
    assert all(len(r) == 300 for r in passed.ranks.values())
    table = passed.table
    assert (table["shape"] == "uniform").all()
    close(table["corrected"], np.minimum(1.0, 8 * table["p_value"].to_numpy()))
    assert passed.warnings == ()
    assert str(passed) == passed.verdict


def test_an_exact_samplers_intervals_cover_what_they_say(passed):
    """Within four standard errors over data sets, which must be small to mean something."""
    found = passed.coverage.loc["sampler"]
    assert (found["data_sets"] == 300).all()
    assert (found["se"] < 0.02).all()
    assert (np.abs(found["coverage"] - found.index) < 4 * found["se"]).all()


def test_the_same_seed_gives_the_same_ranks(passed):
    again = hb.check_calibration(MEANS, SCHOOLS, 20, sampler=exact, seed=5)
    once = hb.check_calibration(MEANS, SCHOOLS, 20, sampler=exact, seed=5)
    for label, ranks in once.ranks.items():
        assert np.array_equal(ranks, again.ranks[label])


def from_the_prior(model: Any, tasks: hb.Tasks, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([9, seed])
    phis = draw_phi(model, tasks, 99, rng)
    return phis | {"theta": draw_theta(model, tasks, phis, rng)}


def plug_in(model: Any, tasks: hb.Tasks, seed: int) -> dict[str, np.ndarray]:
    """One draw of φ for all draws of θ."""
    draws = on_a_grid(tasks.outcome, seed)
    mu, tau = draws["mu"][0], draws["tau"][0]
    share = tau**2 / (tau**2 + SE**2)
    white = np.random.default_rng([4, seed]).normal(size=(99, 6))
    theta = share * tasks.outcome + (1 - share) * mu + np.sqrt(share) * SE * white
    same = {n: np.broadcast_to(draws[n][:1], draws[n].shape) for n in ("mu", "tau")}
    return same | {"theta": theta[..., None]}


def without_the_first_row(model: Any, tasks: hb.Tasks, seed: int) -> dict[str, np.ndarray]:
    """An se of 1e6 in the place of the first row's: a row that says nothing."""
    return on_a_grid(tasks.outcome, seed, se=np.array([1e6, *SE[1:]]))


def too_wide(model: Any, tasks: hb.Tasks, seed: int) -> dict[str, np.ndarray]:
    draws = on_a_grid(tasks.outcome, seed)
    centre = draws["mu"].mean(0)
    return draws | {"mu": centre + 1.6 * (draws["mu"] - centre)}


@functools.cache
def checked(sampler: Any) -> Calibration:
    return hb.check_calibration(MEANS, SCHOOLS, 300, sampler=sampler, seed=2)


@pytest.mark.parametrize(
    ("sampler", "caught", "words"),
    [
        (from_the_prior, "log likelihood", "Parameters pass and what looks at the data does not"),
        (plug_in, "mu[x0]", "∪: the truth lies too often in the tails"),
        (without_the_first_row, "log likelihood of task 0", "explain the data worse"),
        (too_wide, "mu[x0]", "∩: the truth lies too often in the middle"),
    ],
)
def test_wrong_samplers_are_caught(sampler, caught, words):
    """The controls, on 300 data sets; the exact sampler passes on as many."""
    found = checked(sampler)
    assert found.corrected[caught] < WRONG, found.p_values
    assert words in found.verdict
    assert caught in found.failed
    assert found.table.loc[caught, "shape"] == found.shapes[caught]


def test_a_variance_in_the_place_of_a_sd_is_caught():
    """θ_j ~ N(μ, τ) with τ's own prior, on a scale where it matters: HalfNormal(5).

    With s = √τ the sd, p(s) = p(τ = s²) 2 s; what is reported is τ = s².
    """
    prior = replace(MEANS.hyperprior, tau=dist.HalfNormal(5.0))

    def wrong(model: Any, tasks: hb.Tasks, seed: int) -> dict[str, np.ndarray]:
        draws = on_a_grid(tasks.outcome, seed, lambda s: -0.5 * (s**2 / 5) ** 2 + np.log(s))
        return draws | {"tau": draws["tau"] ** 2}

    model = replace(MEANS, hyperprior=prior)
    found = hb.check_calibration(model, SCHOOLS, 300, sampler=wrong, seed=2)
    assert found.corrected["log tau[x0]"] < WRONG, found.p_values
    assert "log tau[x0] (p < 1e-12)" in found.verdict


def test_the_prior_passes_on_parameters_alone():
    """Why data-dependent quantities are ranked."""
    found = checked(from_the_prior)
    assert all(label.startswith(("log likelihood", "prediction")) for label in found.failed)


# --------------------------------------------------------------------- pictures


def test_the_picture_has_a_panel_a_quantity_failed_ones_first(passed):
    import matplotlib.pyplot as plt

    axes = passed.plot()
    assert [ax.get_title(loc="left") for ax in axes] == list(passed.ranks)
    for ax in axes:  # what is drawn stays inside what is seen
        (line,) = [x for x in ax.lines if len(x.get_xdata()) > 2]
        assert np.abs(line.get_ydata()).max() < ax.get_ylim()[1]
    found = hb.check_calibration(MEANS, SCHOOLS, 100, sampler=plug_in, seed=2)
    axes = hb.plots.calibration(found)
    titles = [ax.get_title(loc="left") for ax in axes]
    assert titles[: len(found.failed)] == list(found.failed)
    one = plt.subplots()[1]
    assert found.plot(ax=one) is one
    plt.close("all")


# ------------------------------------------------------------------ what is told


def test_data_that_the_model_refuses_are_counted_and_told():
    """Eight coins: now and then all show the same side."""
    tasks = hb.Tasks.from_arrays([(np.ones((2, 1)), [0.0, 1.0]) for _ in range(4)])
    model = hb.HierarchicalModel(
        hb.likelihoods.Bernoulli(), hb.priors.Gaussian(),
        hb.HyperPrior(mu=dist.Normal(0.0, 1.5), tau=dist.HalfNormal(0.5)),
    )  # fmt: skip

    def checked(model: Any, tasks: hb.Tasks, seed: int) -> Any:
        model.check(tasks, learns_prior=True)
        return from_the_prior(model, tasks, seed)

    with pytest.warns(hb.FitWarning, match="of 60 simulated data sets, which are left out"):
        found = hb.check_calibration(model, tasks, 60, sampler=checked)
    refused = found.info["refused"]["sampler"]
    assert refused > 0
    assert len(found.ranks["mu[x0]"]) == 60 - refused
    assert "there is nothing to learn from a constant" in found.warnings[0]
    assert f"{60 - refused} simulated data sets" in found.verdict


def test_a_model_that_refuses_everything_is_told_soon():
    def refuse(model: Any, tasks: Any, seed: int) -> Any:
        raise hb.InputError("not these")

    with refuses("refused each of the first 20", "not these"):
        hb.check_calibration(MEANS, SCHOOLS, 500, sampler=refuse)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda d: {n: v for n, v in d.items() if n != "tau"}, ("lack", "'tau'")),
        (lambda d: d | {"mu": d["mu"][:, 0]}, ("draws of mu have shape (99,)", "(99, 1)")),
        (lambda d: {n: v[:50] for n, v in d.items()}, ("returned 50 draws", "num_draws=99")),
        (lambda d: d | {"mu": d["mu"] * np.nan}, ("mu[x0] is not a number in 99 draw(s)",)),
        (lambda d: list(d), ("returns a Fit or a mapping", "found list")),
    ],
)
def test_draws_that_are_none_are_refused(returned, words):
    def sampler(model: Any, tasks: hb.Tasks, seed: int) -> Any:
        return returned(exact(model, tasks, seed))

    with refuses(*words):
        hb.check_calibration(MEANS, SCHOOLS, 3, sampler=sampler)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_simulations": 0}, ("num_simulations must be a positive integer",)),
        ({"num_draws": 1.5}, ("num_draws must be a positive integer",)),
        ({"level": 2.0}, ("level must lie between 0 and 1",)),
        ({"methods": {"sampler": print}, "sampler": print}, ("'sampler'", "name it otherwise")),
        ({"methods": "full Bays"}, ("no method 'full Bays'", "did you mean 'full Bayes'?")),
        ({"methods": []}, ("name at least one method",)),
        ({"methods": {"mine": 3}}, ("methods['mine'] is no function",)),
        ({"sampler": "nuts"}, ("sampler is a function of (model, tasks, seed)",)),
    ],
)
def test_arguments_are_refused(arguments, words):
    with refuses(*words):
        hb.check_calibration(MEANS, SCHOOLS, **{"num_simulations": 3, **arguments})


def test_more_draws_than_wanted_are_taken_at_even_distances():
    draws = Draws({"mu": np.arange(20.0)[:, None]}, np.arange(20.0)[:, None, None])
    assert thinned(draws, 5).phis["mu"][:, 0].tolist() == [2.0, 6.0, 10.0, 14.0, 18.0]
    assert thinned(draws, 20).thetas[:, 0, 0].tolist() == list(range(20))


# --------------------------------------------------------------------- coverage


def test_coverage_by_hand(rng):
    """Means of 0 and sds of 1: |z| below 0.674, 1.282, 1.960 lie in 50, 80, 95 %."""
    truth = np.array([[0.5], [1.0], [1.5], [2.5]])
    found = covered_by_normal(truth, np.zeros((4, 1)), np.ones((4, 1)))
    assert found.tolist() == [0.25, 0.5, 0.75]
    point = covered_by_normal(
        truth, truth + np.array([[0.0], [0.1], [0.0], [0.1]]), np.zeros((4, 1))
    )
    assert point.tolist() == [0.5, 0.5, 0.5]
    unknown = np.array([[1.0], [np.nan], [1.0], [np.nan]])
    assert covered_by_normal(truth, np.zeros((4, 1)), unknown).tolist() == [0.5, 0.5, 1.0]
    draws = rng.normal(size=(99, 3000, 1))
    shares = covered_by_draws(rng.normal(size=(3000, 1)), draws, rng)
    assert (np.abs(shares - [0.5, 0.8, 0.95]) < 4 * np.sqrt([0.25 / 3000, 0.16 / 3000, 0.05 / 3000])
            ).all()  # fmt: skip


def test_intervals_of_empirical_bayes_and_maml():
    """Intervals at a point estimate of φ cover too little where tasks are few and small."""
    with pytest.warns(hb.FitWarning, match="fits by empirical Bayes came with warnings"):
        found = hb.check_calibration(
            MEANS, SCHOOLS, 60, methods=["full Bayes", "empirical_bayes"], sampler=exact
        )
    table = found.coverage
    low = table.loc[("empirical Bayes", 0.95)]
    assert low["coverage"] + 4 * low["se"] < 0.95
    assert table.loc[("sampler", 0.95), "coverage"] > low["coverage"]
    alone = hb.check_calibration(
        MEANS, SCHOOLS, 25, methods={"alone": lambda m, t, s: hb.no_pooling(m, t)}
    )
    assert alone.verdict == "No draws were ranked: see `coverage`."
    each = alone.coverage.loc[("alone", 0.95)]  # each task's own normal interval is exact
    assert abs(each["coverage"] - 0.95) < 4 * each["se"]
    with refuses("no draws were ranked"):
        alone.plot()


# ---------------------------------------------- regressions: full Bayes, and slow

SIZES = (1, 2, 3, 3, 4, 5, 6, 8)
HYPERPRIOR = hb.HyperPrior(
    mu=dist.Normal(0.0, 1.0), tau=dist.HalfNormal(1.0), corr=2.0, sigma=dist.HalfNormal(1.0)
)
MODEL = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian(), HYPERPRIOR)
DESIGN = [
    np.column_stack([np.ones(n), np.random.default_rng([7, n, j]).normal(size=n)])
    for j, n in enumerate(SIZES)
]
TASKS = hb.Tasks.from_arrays([(x, np.arange(len(x), dtype=float)) for x in DESIGN])
SIMULATIONS = 200


def simulated(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, hb.Tasks]:
    """φ, θ and tasks from the prior, by NumPy alone."""
    rng = np.random.default_rng([11, seed])
    mu, tau = rng.normal(size=2), np.abs(rng.normal(size=2))
    corr = 2.0 * rng.beta(2.0, 2.0) - 1.0  # LKJ(2) of two: density proportional to 1 − ρ²
    sigma = abs(rng.normal())
    root = np.array([[tau[0], 0.0], [tau[1] * corr, tau[1] * np.sqrt(1 - corr**2)]])
    theta = mu + rng.normal(size=(len(SIZES), 2)) @ root.T
    outcomes = [x @ t + sigma * rng.normal(size=len(x)) for x, t in zip(DESIGN, theta, strict=True)]
    both = np.array([[1.0, corr], [corr, 1.0]])
    phi = dict(mu=mu, tau=tau, corr=both, sigma=np.asarray(sigma))
    return phi, theta, replace(TASKS, outcome=np.concatenate(outcomes))


@pytest.mark.slow
def test_simulated_data_are_distributed_as_those_by_numpy_alone():
    """Quantities of φ, θ and data, 600 each way, by Kolmogorov's two-sample distance."""

    def of(phi: Any, theta: Any, tasks: Any) -> list[float]:
        found = quantities(MODEL, tasks, {n: np.asarray(v)[None] for n, v in phi.items()},
                           theta[None])  # fmt: skip
        y = tasks.outcome
        return [*(float(v[0]) for v in found.values()), y[0], y[-1], y.std(), y[:6] @ y[-6:]]

    ours = np.array([of(*simulate(MODEL, TASKS, seed)) for seed in range(600)])
    alone = np.array([of(*simulated(seed)) for seed in range(600)])
    p = [stats.ks_2samp(a, b).pvalue for a, b in zip(ours.T, alone.T, strict=True)]
    assert min(p) > 1e-4, p  # 18 comparisons: by chance in 0.2 % of seeds
    shifted = stats.ks_2samp(ours[:, 0], alone[:, 0] + 0.5).pvalue  # the control: half an sd
    assert shifted < WRONG


def test_full_bayes_is_thinned_as_its_autocorrelation_asks():
    found = hb.check_calibration(MEANS, SCHOOLS, 12, num_draws=19, seed=3)
    assert 1 <= found.info["thinning"] <= 10
    assert len(found.ranks) == 8
    assert all(r.max() <= 19 for r in found.ranks.values())
    assert found.failed == ()


@pytest.fixture(scope="module")
def full() -> Calibration:
    return hb.check_calibration(MODEL, TASKS, SIMULATIONS, seed=1)


@pytest.mark.slow
def test_ranks_of_full_bayes_are_uniform(full):
    assert min(full.p_values.values()) > 1e-3, full.p_values  # 14 quantities: 1 % of seeds


@pytest.mark.slow
def test_ranks_of_full_bayes_are_uniform_on_data_simulated_by_numpy_alone():
    rng, ranks = np.random.default_rng(0), []
    for seed in range(120):
        phi, theta, tasks = simulated(seed)
        fit = hb.full_bayes(MODEL, tasks, num_draws=198, num_chains=1, seed=seed, progress=False)
        alone = {name: value[None] for name, value in phi.items()}
        draws = thinned(Draws.of(fit, alone, theta[None]), 99)
        truth = {n: float(v[0]) for n, v in quantities(MODEL, tasks, alone, theta[None]).items()}
        ranks.append(rank(quantities(MODEL, tasks, *draws), truth, rng))
    p = {label: p_value(np.array([r[label] for r in ranks]), 99) for label in ranks[0]}
    assert min(p.values()) > 1e-3, p


def without_jacobian(log_jacobian: Any) -> Any:
    """τ = u log(1 + eˣ) with the slope of τ in x forgotten."""

    @functools.wraps(log_jacobian)
    def forgetful(self: Any, part: Any, x: Any) -> Any:
        return 0.0 if part.name == "tau" else log_jacobian(self, part, x)

    return forgetful


@pytest.mark.slow
def test_a_forgotten_jacobian_is_caught(monkeypatch):
    """On fewer data sets, which are enough for so large an error."""
    monkeypatch.setattr(Space, "_log_jacobian", without_jacobian(Space._log_jacobian))
    # NUTS would be as wrong, and compiles a program a data set
    for name, value in dict(
        LEAST_ACCEPTANCE=0, TOO_LIGHT=np.inf, GOOD_TAIL=0, LEAST_TAIL=0
    ).items():
        monkeypatch.setattr(collapsed_sampling, name, value)
    jax.clear_caches()  # the right program is compiled already
    try:
        found = hb.check_calibration(MODEL, TASKS, 60, seed=1)
    finally:
        monkeypatch.undo()
        jax.clear_caches()
    assert min(found.corrected["log tau[x0]"], found.corrected["log tau[x1]"]) < WRONG
    assert "draws lie too low" in found.shapes["log tau[x0]"]


def own(model: hb.HierarchicalModel, tasks: hb.Tasks, seed: int) -> hb.Fit:
    return hb.full_bayes(model, tasks, num_draws=198, num_chains=1, seed=seed, progress=False)


def empirical(model: hb.HierarchicalModel, tasks: hb.Tasks, seed: int) -> hb.Fit:
    """θ drawn at φ̂, and φ̂ in the place of draws of φ."""
    return hb.empirical_bayes(model, tasks, num_draws=99, num_chains=1, seed=seed)


def one_row_less(model: hb.HierarchicalModel, tasks: hb.Tasks, seed: int) -> hb.Fit:
    return own(model, tasks.keep_rows(np.arange(tasks.num_rows) > 0), seed)


def prior_alone(model: hb.HierarchicalModel, tasks: hb.Tasks, seed: int) -> dict[str, np.ndarray]:
    return from_the_prior(model, tasks, seed)


def tau_for_variance(
    model: hb.HierarchicalModel, tasks: hb.Tasks, seed: int
) -> dict[str, np.ndarray]:
    """θ_j's variance τ, with τ's own prior: the sd is √τ, and τ is reported."""
    root = dist.TransformedDistribution(
        dist.HalfNormal(5.0), dist.transforms.PowerTransform(np.array(0.5))
    )
    wrong = replace(model, hyperprior=replace(model.hyperprior, tau=root))
    fit = own(wrong, tasks, seed)
    assert fit.phi_draws is not None
    found = {name: value[0] for name, value in fit.phi_draws.items()}
    return found | {"tau": found["tau"] ** 2, "theta": fit.theta_draws[0]}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")
@pytest.mark.parametrize(
    ("sampler", "caught"),
    [
        (empirical, "mu[x0]"), (one_row_less, "log likelihood of task 0"),
        (prior_alone, "log likelihood"), (tau_for_variance, "log tau[x0]"),
    ],
)  # fmt: skip
def test_wrong_samplers_of_regressions_are_caught(sampler, caught):
    model = MODEL
    if sampler is tau_for_variance:  # a sd and a variance of about one are hard to tell apart
        model = replace(MODEL, hyperprior=replace(HYPERPRIOR, tau=dist.HalfNormal(5.0)))
    found = hb.check_calibration(model, TASKS, 120, sampler=sampler, seed=1)
    print(found)
    assert found.corrected[caught] < WRONG, found.p_values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "hyperprior", "num_simulations"),
    [
        (hb.likelihoods.Poisson(), {}, 100),
        (hb.likelihoods.Bernoulli(), {}, 60),
        (hb.likelihoods.StudentT(df=4.0), {"sigma": dist.HalfNormal(1.0)}, 40),
    ],
    ids=["poisson", "bernoulli", "student"],
)
@pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")
def test_full_bayes_by_quadrature_is_calibrated(family, hyperprior, num_simulations):
    """τ and the correlation with θ integrated out by quadrature; random intercepts."""
    tasks = hb.Tasks.from_arrays([(np.ones((n, 1)), np.arange(n) % 2.0) for n in SIZES])
    prior = hb.HyperPrior(mu=dist.Normal(0.0, 1.0), tau=dist.HalfNormal(1.0), **hyperprior)
    model = hb.HierarchicalModel(family, hb.priors.Gaussian(), prior)

    def sampler(model: hb.HierarchicalModel, tasks: hb.Tasks, seed: int) -> hb.Fit:
        # where a t has two modes NUTS takes over, whose warm-up is most of the time
        return hb.full_bayes(
            model, tasks, num_draws=155, num_chains=1, num_warmup=300, seed=seed, progress=False
        )

    # ranks among 31 draws tell of next to as small errors as those among 99
    found = hb.check_calibration(
        model, tasks, num_simulations, sampler=sampler, num_draws=31, seed=1
    )
    assert min(found.p_values.values()) > 1e-3, found.p_values


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")
@pytest.mark.parametrize(("num_tasks", "expected"), [(10, 0.720), (20, 0.850)])
def test_empirical_bayes_covers_as_little_as_is_known(num_tasks, expected):
    """95 % intervals of normal means, V = τ² = 1, of 4,000 data sets by another program."""
    tasks = hb.Tasks.from_arrays(
        [(np.ones((1, 1)), [float(j)]) for j in range(num_tasks)], known_se=[[1.0]] * num_tasks
    )
    held = hb.HyperPrior(mu=dist.Normal(0.0, 1e-3), tau=dist.Uniform(0.999, 1.001))
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(known_se=True), hb.priors.Gaussian(), held)
    found = hb.check_calibration(model, tasks, 200, methods="empirical Bayes")
    row = found.coverage.loc[("empirical Bayes", 0.95)]
    # the known number has a standard error of its own, of 4,000 data sets
    assert abs(row["coverage"] - expected) < 4 * row["se"] * np.sqrt(1 + 200 / 4000)
