r"""What can be known of the sinusoids before any learning: errors by integration, an exact oracle.

.. math:: y = A \sin(x - b), \qquad A \sim U(a_0, a_1), \; b \sim U(0, \pi), \; x \sim U(-c, c)

Nobody who has seen no row of a task can do better than E[y | x], whatever they learned before.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import integrate

AMPLITUDE, PHASE, X = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)


def zero_error() -> float:
    """The mean squared error of f = 0, E[y²], by integration."""
    volume = math.prod(high - low for low, high in (AMPLITUDE, PHASE, X))
    total, _ = integrate.tplquad(
        lambda x, b, a: (a * math.sin(x - b)) ** 2, *AMPLITUDE, *PHASE, *X, epsabs=1e-8
    )
    return total / volume


def unadapted_mean(x: float) -> float:
    """E[y | x], the best that can be said of a task without any row of it, by integration."""
    volume = math.prod(high - low for low, high in (AMPLITUDE, PHASE))
    total, _ = integrate.dblquad(lambda b, a: a * math.sin(x - b), *AMPLITUDE, *PHASE, epsabs=1e-10)
    return total / volume


def unadapted_error() -> float:
    """The mean squared error of E[y | x]: E[y²] − E[E[y | x]²]."""
    explained, _ = integrate.quad(lambda x: unadapted_mean(x) ** 2, *X, epsabs=1e-8)
    return zero_error() - explained / (X[1] - X[0])


def leaks(mean: float, standard_error: float, floor: float | None = None) -> bool:
    """Whether an error before any step is too small to be honest: four standard errors below.

    ``floor``: the best error of a function that has seen no row of its task.
    """
    best = unadapted_error() if floor is None else floor
    return mean < best - 4 * standard_error


def oracle(x: np.ndarray, y: np.ndarray, x_query: np.ndarray, sigma: float = 1e-6) -> np.ndarray:
    """What Bayesian regression on sin x and cos x says of query rows (J, m), given (J, n) rows.

    Sinusoids are linear in these two features and free of noise, so that it is exact from two rows
    on; with one row or none the prior's moments of (A cos b, −A sin b) fill in.
    """
    mean, covariance = coefficient_moments()
    features = np.stack([np.sin(x), np.cos(x)], axis=-1)
    asked = np.stack([np.sin(x_query), np.cos(x_query)], axis=-1)
    between = covariance @ np.swapaxes(features, -1, -2)
    spread = features @ between + sigma**2 * np.eye(x.shape[-1])
    gap = (y - features @ mean)[..., None]
    theta = mean[:, None] + between @ np.linalg.pinv(spread, hermitian=True, rcond=1e-10) @ gap
    return (asked @ theta)[..., 0]


def coefficient_moments() -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of (A cos b, −A sin b)."""
    low, high = AMPLITUDE
    first, second = (low + high) / 2, (high**3 - low**3) / (3 * (high - low))
    # E cos b = 0, E sin b = 2/π, E cos² b = E sin² b = ½, E sin b cos b = 0 for b ~ U(0, π)
    mean = np.array([0.0, -first * 2 / math.pi])
    return mean, np.diag([second / 2, second / 2]) - np.outer(mean, mean)
