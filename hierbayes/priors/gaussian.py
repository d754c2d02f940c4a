"""The Gaussian prior of tasks, correlated or independent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from hierbayes.errors import InputError, suggestion
from hierbayes.numerics import semidefinite_root
from hierbayes.priors.base import Phi, Prior


@dataclass(frozen=True)
class Gaussian(Prior):
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

    def __post_init__(self) -> None:
        groups = self.correlated
        if not isinstance(groups, bool):
            object.__setattr__(self, "correlated", tuple(tuple(group) for group in groups))
        object.__setattr__(self, "zero_mean", tuple(self.zero_mean))

    def blocks(self, coef: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Positions of the coefficients that may be correlated with one another."""
        if self.correlated is True:
            return (tuple(range(len(coef))),)
        named = () if self.correlated is False else self.correlated
        self._known([c for group in named for c in group], coef, "correlated")
        position = {c: i for i, c in enumerate(coef)}
        blocks = [tuple(position[c] for c in group) for group in named]
        taken = [i for block in blocks for i in block]
        if len(set(taken)) < len(taken):
            raise InputError("priors.Gaussian(correlated=…): a coefficient stands in two groups")
        blocks += [(i,) for i in range(len(coef)) if i not in taken]
        return tuple(sorted(blocks))

    def free_mean(self, coef: Sequence[str]) -> np.ndarray:
        """Which coefficients have a mean to be learned, (d,) of bool."""
        self._known(self.zero_mean, coef, "zero_mean")
        return np.array([c not in self.zero_mean for c in coef], dtype=bool)

    @staticmethod
    def _known(names: Sequence[str], coef: Sequence[str], argument: str) -> None:
        for name in names:
            if name not in coef:
                raise InputError(
                    f"priors.Gaussian({argument}=…): no coefficient is named {name!r}; "
                    f"{suggestion(name, coef)}"
                )

    def location(self, phi: Phi, w: Any) -> Any:
        """μ + Γ w_j: ``w`` (…, q) gives (…, d)."""
        shape = (*jnp.shape(w)[:-1], jnp.shape(phi["mu"])[-1])
        if "gamma" not in phi:
            return jnp.broadcast_to(phi["mu"], shape)
        return phi["mu"] + (phi["gamma"] * w[..., None, :]).sum(-1)

    def scale_tril(self, phi: Phi) -> Any:
        """L with Σ = L Lᵀ: the rows of the Cholesky factor of R times τ; τ = 0 is allowed."""
        if "corr" not in phi:
            return jnp.eye(phi["tau"].shape[-1]) * phi["tau"][..., None, :]
        factor = semidefinite_root(phi["corr"])
        return phi["tau"][..., :, None] * factor

    def distribution(self, phi: Phi, w: Any) -> dist.Distribution:
        """Multivariate normal N(μ + Γ w, Σ); τ must be positive."""
        return dist.MultivariateNormal(self.location(phi, w), scale_tril=self.scale_tril(phi))
