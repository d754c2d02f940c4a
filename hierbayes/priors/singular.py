"""A normal distribution on a subspace: what a learned prior is where its covariance lacks rank."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints

from hierbayes.errors import InputError


class SingularNormal(dist.Distribution):
    """loc + L z with z standard normal and L (d, d) singular: draws and moments, but no density."""

    def __init__(self, loc: Any, root: Any, *, validate_args: Any = None):
        self.loc, self.root = np.asarray(loc), np.asarray(root)
        super().__init__(event_shape=self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> Any:  # type: ignore[override]
        """All of R^d, of which only a subspace is reached."""
        return constraints.real_vector

    def sample(self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draws (…, d)."""
        assert key is not None
        white = jax.random.normal(key, (*sample_shape, len(self.loc)))
        return jnp.asarray(self.loc) + white @ jnp.asarray(self.root).T

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        """Refused: a distribution on a subspace has no density."""
        raise InputError(
            "this prior has no density: in at least one direction its standard deviation is "
            "estimated as exactly 0; it can be sampled, and it has mean and covariance_matrix"
        )

    @property
    def mean(self) -> Any:
        """The mean (d,)."""
        return self.loc

    @property
    def covariance_matrix(self) -> Any:
        """L Lᵀ (d, d)."""
        return self.root @ self.root.T

    @property
    def variance(self) -> Any:
        """The diagonal of the covariance (d,)."""
        return np.diag(self.covariance_matrix)

    def tree_flatten(self) -> Any:
        """Flatten to no leaves: the parameters are constants."""
        return (), self

    @classmethod
    def tree_unflatten(cls, aux_data: Any, params: Any) -> Any:
        """Undo :meth:`tree_flatten`."""
        return aux_data
