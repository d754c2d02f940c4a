"""Assertions of these tests. ``test_assertions.py`` shows each of them rejecting a wrong value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from hierbayes import InputError


def close(found: Any, expected: Any, rtol: float = 1e-9, atol: float = 0.0) -> None:
    """Equal shapes and |found − expected| ≤ atol + rtol |expected|; NaN equals nothing."""
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, equal_nan=False)


def monte_carlo(
    draws: Any, mean: float, sd: float, k: float = 4.0, share: float = 0.1, least_ess: float = 100
) -> None:
    """Draws (chain, draw) have this mean within k of their own standard errors, and this sd.

    The standard error is ArviZ's (autocorrelation counted), never smaller than what ``sd`` and
    the effective sample size allow, so that stuck chains cannot pass by chance. ``share`` is the
    relative error allowed in the sd.
    """
    import arviz_stats

    draws = np.asarray(draws, dtype=float)
    assert draws.ndim == 2, f"expected (chain, draw), found shape {draws.shape}"
    assert np.isfinite(draws).all(), "draws are not finite"
    ess = float(arviz_stats.ess(draws, method="mean"))
    assert ess >= least_ess, f"effective sample size {ess:.0f}, at least {least_ess:.0f} wanted"
    error = sd / np.sqrt(ess)
    assert abs(draws.mean() - mean) <= k * error, (
        f"mean {draws.mean():.6g} is {abs(draws.mean() - mean) / error:.1f} standard errors from "
        f"{mean:.6g} (at most {k} allowed)"
    )
    assert abs(draws.std() - sd) <= share * sd, (
        f"sd {draws.std():.6g} differs from {sd:.6g} by more than {share:.0%}"
    )


def finite_difference(function: Callable[[np.ndarray], float], at: Any) -> np.ndarray:
    """Slope of ``function`` by fourth-order central differences, entry by entry.

    With a step h of 1e-3 the truncation error is of order h⁴ = 1e-12 and the rounding error of
    order 1e-16 / h = 1e-13, both relative to functions and arguments of order one.
    """
    at = np.asarray(at, dtype=float)
    slope = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        h = 1e-3 * max(abs(at[index]), 0.1)
        value = []
        for step in (-2, -1, 1, 2):
            moved = at.copy()
            moved[index] += step * h
            value.append(float(function(moved)))
        slope[index] = (value[0] - 8 * value[1] + 8 * value[2] - value[3]) / (12 * h)
    return slope


def gradient(
    function: Callable[[np.ndarray], float], at: Any, claimed: Any, rtol: float = 1e-6
) -> None:
    """``claimed`` is the slope of ``function`` at ``at``, within rtol of its largest entry."""
    numerical = finite_difference(function, at)
    scale = max(float(np.abs(numerical).max(initial=0.0)), 1e-8)
    close(claimed, numerical, rtol=rtol, atol=rtol * scale)


@contextlib.contextmanager
def refuses(*words: str) -> Iterator[None]:
    """The block raises InputError, and its message mentions every one of ``words``."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not mentioned in: {message}"
