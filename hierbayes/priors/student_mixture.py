"""Student-t distributions, equally weighted: what a learned Student-t prior says of a new task."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints

from hierbayes.errors import InputError
from hierbayes.priors.assembled import Assembled


def student_mixture(df: float, locations: np.ndarray, roots: np.ndarray) -> dist.Distribution:
    """Of t_ν(m_s, L_s L_sᵀ) with m (S, d), L (S, d, d); a point in directions without scale."""
    if len(roots) > 1:
        weights = dist.Categorical(probs=np.full(len(roots), 1 / len(roots)))
        return dist.MixtureSameFamily(weights, dist.MultivariateStudentT(df, locations, roots))
    location, root = locations[0], roots[0]
    spread = np.flatnonzero(np.any(root != 0, axis=1))
    if not spread.size:
        return dist.Delta(location, event_dim=1)
    inner = root[np.ix_(spread, spread)]
    if np.linalg.matrix_rank(inner) < len(spread):
        return SingularStudentT(df, location, root)
    heavy = dist.MultivariateStudentT(df, location[spread], inner)
    if len(spread) == len(location):
        return heavy
    return Assembled([(heavy, (spread,))], location)


class SingularStudentT(dist.Distribution):
    """loc + L z with z Student-t and L (d, d) singular: draws and moments, but no density."""

    def __init__(self, df: float, loc: Any, root: Any, *, validate_args: Any = None):
        self.df, self.loc, self.root = float(df), np.asarray(loc), np.asarray(root)
        super().__init__(event_shape=self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> Any:  # type: ignore[override]
        """All of R^d, of which only a subspace is reached."""
        return constraints.real_vector

    def sample(self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draws (…, d)."""
        assert key is not None
        d = len(self.loc)
        white: Any = dist.MultivariateStudentT(self.df, jnp.zeros(d), jnp.eye(d))
        return jnp.asarray(self.loc) + white.sample(key, sample_shape) @ jnp.asarray(self.root).T

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        """Refused: a distribution on a subspace has no density."""
        raise InputError(
            "this prior has no density: in at least one direction its scale is estimated as "
            "exactly 0; it can be sampled, and it has mean and variance"
        )

    @property
    def mean(self) -> Any:
        """The mean (d,), NaN up to one degree of freedom."""
        return self.loc if self.df > 1 else np.full_like(self.loc, np.nan)

    @property
    def variance(self) -> Any:
        """The diagonal of the covariance (d,), infinite up to two degrees of freedom."""
        squares = (self.root**2).sum(1)
        if self.df <= 2:
            return np.where(squares > 0, np.inf if self.df > 1 else np.nan, 0.0)
        return squares * self.df / (self.df - 2)

    def tree_flatten(self) -> Any:
        """Flatten to no leaves: the parameters are constants."""
        return (), self

    @classmethod
    def tree_unflatten(cls, aux_data: Any, params: Any) -> Any:
        """Undo :meth:`tree_flatten`."""
        return aux_data
