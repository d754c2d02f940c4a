"""The Gaussian prior of tasks, correlated or independent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist

from hierbayes.priors.base import Phi
from hierbayes.priors.elliptical import Elliptical


@dataclass(frozen=True)
class Gaussian(Elliptical):
    r"""θ_j ~ N(μ + Γ w_j, Σ) with Σ = diag(τ) R diag(τ).

    Parameters
    ----------
    correlated : bool or sequence of sequences of str
        True: one correlation matrix over all coefficients. False: independent coefficients.
        Groups of coefficient names: correlated within a group, independent between groups, as
        separate bars of a formula are.
    zero_mean : sequence of str
        Coefficients whose mean μ is exactly zero: those that stand inside bars only.

    Examples
    --------
    >>> import hierbayes as hb
    >>> hb.priors.Gaussian(correlated=[("Intercept", "x"), ("z",)]).blocks(("Intercept", "x", "z"))
    ((0, 1), (2,))
    """

    correlated: bool | Sequence[Sequence[str]] = True
    zero_mean: Sequence[str] = ()

    @property
    def gaussian(self) -> bool:
        """True."""
        return True

    def noncentred(self, dimension: int) -> dist.Distribution:
        """z standard normal."""
        return dist.Normal(jnp.zeros(dimension), 1.0).to_event(1)

    def distribution(self, phi: Phi, w: Any) -> dist.Distribution:
        """Multivariate normal N(μ + Γ w, Σ); τ must be positive."""
        return dist.MultivariateNormal(self.location(phi, w), scale_tril=self.scale_tril(phi))
