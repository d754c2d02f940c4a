r"""How far apart two posteriors of the same tasks are, by their means and covariances.

.. math::

    \text{KL}(q \,\|\, p) &= \tfrac12\left[\operatorname{tr} V^{-1}\Sigma + \delta^\top V^{-1}\delta
        - d + \log |V| / |\Sigma|\right], \qquad \delta = m - \mu \\
    W_2^2(q, p) &= \lVert\delta\rVert^2 + \operatorname{tr}\!\left(\Sigma + V
        - 2 (V^{1/2} \Sigma V^{1/2})^{1/2}\right)

for q = N(μ, Σ) and p = N(m, V). Where m and V come from draws, each quantity has a floor: what it
would be if q were p itself and only the draws' own error were left.
"""

from __future__ import annotations

import numpy as np

LEVELS = (0.5, 0.8, 0.95)
"""Probabilities of the intervals that are held against the draws."""

SINGULAR = 1e-13
"""Eigenvalue of a correlation matrix below which a direction has no variance but rounding."""


def kl_divergence(
    mean: np.ndarray, covariance: np.ndarray, to_mean: np.ndarray, to_covariance: np.ndarray
) -> np.ndarray:
    """KL(N(mean, covariance) ‖ N(to_mean, to_covariance)) of each task, (J,), in nats.

    inf where one is a point in some direction and the other is not, or is another point; where
    both are the same point in some direction, the divergence of what is left.
    """
    sd = _sd(to_covariance)
    sd = np.where(sd > 0, sd, np.where(_sd(covariance) > 0, _sd(covariance), 1.0))
    outer = sd[..., :, None] * sd[..., None, :]
    gap, here, there = (to_mean - mean) / sd, covariance / outer, to_covariance / outer
    values, vectors = np.linalg.eigh(there)
    spread = values > SINGULAR
    root = vectors * np.where(spread, 1 / np.sqrt(np.where(spread, values, 1.0)), 0.0)[..., None, :]
    white = np.swapaxes(root, -1, -2) @ here @ root
    moved = (np.swapaxes(root, -1, -2) @ gap[..., None])[..., 0]
    own = np.linalg.eigvalsh(0.5 * (white + np.swapaxes(white, -1, -2)))
    rank = spread.sum(-1)
    # what is left out of the determinant are zeros, in the directions where `there` is a point
    counted = np.arange(own.shape[-1]) >= own.shape[-1] - rank[..., None]
    with np.errstate(divide="ignore"):
        log_det = np.log(np.where(counted, np.maximum(own, 0.0), 1.0)).sum(-1)
    found = 0.5 * (own.sum(-1) + (moved**2).sum(-1) - rank - log_det)
    beside = np.where(spread[..., None, :], 0.0, vectors)
    away = np.abs(np.swapaxes(beside, -1, -2) @ gap[..., None]).max((-1, -2))
    wide = np.linalg.norm(np.swapaxes(beside, -1, -2) @ here @ beside, axis=(-1, -2))
    # up to the rounding of means and of covariances
    size = (np.maximum(np.abs(mean), np.abs(to_mean)) / sd).max(-1)
    elsewhere = (away > 1e-12 * size) | (
        wide > SINGULAR * np.maximum(np.linalg.norm(here, axis=(-1, -2)), 1.0)
    )
    elsewhere |= _rank(covariance) < rank
    return np.where(elsewhere, np.inf, np.maximum(found, 0.0))


def wasserstein(
    mean: np.ndarray, covariance: np.ndarray, to_mean: np.ndarray, to_covariance: np.ndarray
) -> np.ndarray:
    """2-Wasserstein distance of each task, (J,), in sds of the second posterior.

    Every coefficient is divided by its standard deviation under the second posterior, so that
    coefficients of different units add up; where that is zero the distance is inf, or nothing if
    the first posterior is the same point.
    """
    sd = _sd(to_covariance)
    point = sd == 0
    other = point & ((mean != to_mean) | (_sd(covariance) > 0))
    sd = np.where(point, 1.0, sd)
    gap = np.where(point, 0.0, to_mean - mean) / sd
    outer = sd[..., :, None] * sd[..., None, :]
    here, there = covariance / outer, to_covariance / outer
    root = _root(there)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ here @ root), 0.0)).sum(-1)
    traces = np.trace(here, axis1=-2, axis2=-1) + np.trace(there, axis1=-2, axis2=-1)
    found = np.sqrt((gap**2).sum(-1) + np.maximum(traces - 2 * cross, 0.0))
    return np.where(other.any(-1), np.inf, found)


def _sd(covariance: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(np.diagonal(covariance, axis1=-2, axis2=-1), 0.0))


def _rank(covariance: np.ndarray) -> np.ndarray:
    """In how many directions each is not a point, whatever the units of its coefficients."""
    sd = np.where(_sd(covariance) > 0, _sd(covariance), 1.0)
    return (np.linalg.eigvalsh(covariance / (sd[..., :, None] * sd[..., None, :])) > SINGULAR).sum(
        -1
    )


def _root(matrices: np.ndarray) -> np.ndarray:
    """Symmetric square roots."""
    values, vectors = np.linalg.eigh(matrices)
    scaled = vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]
    return scaled @ np.swapaxes(vectors, -1, -2)


def kl_floor(num_coef: int, ess: np.ndarray) -> np.ndarray:
    """d (d + 3) / (4 ESS): the expected KL from a normal to its own moments out of ESS draws."""
    return num_coef * (num_coef + 3) / (4 * ess)


def wasserstein_floor(num_coef: int, ess: np.ndarray) -> np.ndarray:
    """√((d + d (d + 1) / 4) / ESS): the same for the distance, for coefficients of unit sd.

    The means' errors give d / ESS. An error E in the covariance moves its root by E / 2, and
    E‖E‖² = d (d + 1) / ESS where the coefficients are uncorrelated.
    """
    return np.sqrt((num_coef + num_coef * (num_coef + 1) / 4) / ess)


def coverage(
    mean: np.ndarray, covariance: np.ndarray, draws: np.ndarray, levels: tuple[float, ...] = LEVELS
) -> np.ndarray:
    """Share of draws (S, J, d) inside central normal intervals, by level and task: (L, J)."""
    from scipy import stats

    sd = np.sqrt(np.maximum(np.diagonal(covariance, axis1=-2, axis2=-1), 0.0))
    away = np.abs(draws - mean)
    return np.array(
        [(away <= stats.norm.ppf(0.5 + level / 2) * sd).mean(axis=(0, -1)) for level in levels]
    )
