"""What every prior of the package answers."""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

Phi = dict[str, Any]
"""φ by name: ``mu``, ``tau``, ``corr``, ``beta``, ``gamma``, ``sigma``; arrays or pytrees."""


class Prior(abc.ABC):
    """p(θ_j | φ) for one task with covariates w_j."""

    @property
    def gaussian(self) -> bool:
        """Whether p(θ_j | φ) is normal: then Gaussian tasks have everything in closed form."""
        return False

    @abc.abstractmethod
    def location(self, phi: Phi, w: Any) -> Any:
        """Where the prior is centred for a task with covariates ``w`` (q,): shaped like θ."""

    @abc.abstractmethod
    def distribution(self, phi: Phi, w: Any) -> dist.Distribution:
        """The distribution of θ_j; ``w`` may have leading axes."""

    @abc.abstractmethod
    def scale_tril(self, phi: Phi) -> Any:
        """L (d, d), lower triangular: θ = location + L z with z of unit scale."""

    @abc.abstractmethod
    def noncentred(self, dimension: int) -> dist.Distribution:
        """The distribution of z (d,) in θ = location + L z."""

    def noncentred_draws(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """z (…, d) of :meth:`white` by NumPy, ``shape`` all of its axes."""
        return rng.standard_normal(shape)

    def variance_factors(self, count: int) -> np.ndarray:
        """Equally likely v with θ | v ~ N(location, v Σ): ones, or ``count`` of a scale mixture."""
        del count
        return np.ones(1)

    def covariance(self, phi: Phi) -> Any:
        """Σ = L Lᵀ (d, d), the scale matrix; the covariance of θ where the prior is normal."""
        factor = self.scale_tril(phi)
        return factor @ jnp.swapaxes(factor, -1, -2)

    def log_prob(self, theta: Any, phi: Phi, w: Any) -> jax.Array:
        """log p(θ_j | φ)."""
        return jnp.asarray(self.distribution(phi, w).log_prob(theta))
