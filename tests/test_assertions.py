"""Negative controls: every assertion helper rejects what is wrong, and accepts what is right."""

from __future__ import annotations

import numpy as np
import pytest
from assertions import close, finite_difference, gradient, monte_carlo, refuses

from hierbayes import InputError


def rejected():
    return pytest.raises(AssertionError)


def test_close_accepts_the_value_and_rejects_others():
    close(1.0 + 1e-12, 1.0)
    close([1.0, 2.0], [1.0, 2.0 + 1e-10])
    with rejected():
        close(1.0 + 1e-6, 1.0)
    with rejected():
        close(-1.0, 1.0)
    with rejected():
        close(np.nan, np.nan)


def test_close_rejects_a_shape_that_would_broadcast():
    with rejected():
        close(np.ones((3, 1)), np.ones(3))
    with rejected():
        close(1.0, np.ones(3))


def test_close_rejects_one_wrong_entry_among_many():
    wrong = np.ones(1000)
    wrong[731] += 1e-3
    with rejected():
        close(wrong, np.ones(1000))


@pytest.fixture
def white() -> np.ndarray:
    """Independent standard normal draws, four chains of 1,000."""
    return np.random.default_rng(0).standard_normal((4, 1000))


def test_monte_carlo_accepts_right_draws(white):
    monte_carlo(white, 0.0, 1.0)


@pytest.mark.parametrize(("shift", "stretch"), [(0.2, 1.0), (-0.2, 1.0), (0.0, 1.3), (0.0, 0.7)])
def test_monte_carlo_rejects_a_wrong_mean_or_sd(white, shift, stretch):
    """0.2 is 12 standard errors of a mean of 4,000 draws; 30 % is three times the share."""
    with rejected():
        monte_carlo(shift + stretch * white, 0.0, 1.0)


def test_monte_carlo_rejects_a_stuck_chain(white):
    with rejected():
        monte_carlo(np.repeat(white[:, :10], 100, axis=1), 0.0, 1.0)


def test_monte_carlo_rejects_nan_and_flat_draws(white):
    broken = white.copy()
    broken[0, 0] = np.nan
    with rejected():
        monte_carlo(broken, 0.0, 1.0)
    with rejected():
        monte_carlo(white.ravel(), 0.0, 1.0)


def cubic(x: np.ndarray) -> float:
    return float((x**3).sum() + x[0] * x[1])


def test_finite_difference_of_a_cubic():
    """Fourth-order differences are exact for cubics but for rounding, about 1e-13 here."""
    close(finite_difference(cubic, [1.0, -2.0]), [3.0 - 2.0, 12.0 + 1.0], rtol=1e-10)


def test_gradient_accepts_the_slope_and_rejects_others():
    at = np.array([1.0, -2.0])
    slope = np.array([1.0, 13.0])
    gradient(cubic, at, slope)
    for wrong in (-slope, slope * 1.001, slope[::-1], slope + np.array([0.0, 1e-3]), slope[:1]):
        with rejected():
            gradient(cubic, at, wrong)


def test_refuses_wants_the_error_and_the_words():
    with refuses("county", "NaN"):
        raise InputError("2 NaN in column 'county'")
    with rejected(), refuses("floor"):
        raise InputError("2 NaN in column 'county'")
    with pytest.raises(pytest.fail.Exception), refuses("county"):
        pass
    with pytest.raises(ValueError, match="county"), refuses("county"):
        raise ValueError("county")


def test_the_seed_is_stable_and_the_tests_own(seed, rng):
    """CRC-32 of this test's name; np.random.default_rng then fixes the first number."""
    assert seed == 2837705582
    assert rng.random() == np.random.default_rng(2837705582).random()
