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


def kl_divergence(
    mean: np.ndarray, covariance: np.ndarray, to_mean: np.ndarray, to_covariance: np.ndarray
) -> np.ndarray:
    """KL(N(mean, covariance) ‖ N(to_mean, to_covariance)) of each task, (J,), in nats.

    inf where ``covariance`` is singular and ``to_covariance`` is not.
    """
    d = mean.shape[-1]
    root = np.linalg.cholesky(to_covariance)
    white = np.linalg.solve(root, np.swapaxes(np.linalg.solve(root, covariance), -1, -2))
    gap = np.linalg.solve(root, (to_mean - mean)[..., None])[..., 0]
    values = np.linalg.eigvalsh(0.5 * (white + np.swapaxes(white, -1, -2)))
    with np.errstate(divide="ignore"):
        log_det = np.log(np.where(values > 1e-14, values, 0.0)).sum(-1)
    return 0.5 * (values.sum(-1) + (gap**2).sum(-1) - d - log_det)


def wasserstein(
    mean: np.ndarray, covariance: np.ndarray, to_mean: np.ndarray, to_covariance: np.ndarray
) -> np.ndarray:
    """2-Wasserstein distance of each task, (J,), in sds of the second posterior.

    Every coefficient is divided by its standard deviation under the second posterior, so that
    coefficients of different units add up.
    """
    sd = np.sqrt(np.diagonal(to_covariance, axis1=-2, axis2=-1))
    gap = (to_mean - mean) / sd
    outer = sd[..., :, None] * sd[..., None, :]
    here, there = covariance / outer, to_covariance / outer
    root = _root(there)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ here @ root), 0.0)).sum(-1)
    traces = np.trace(here, axis1=-2, axis2=-1) + np.trace(there, axis1=-2, axis2=-1)
    return np.sqrt((gap**2).sum(-1) + np.maximum(traces - 2 * cross, 0.0))


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
