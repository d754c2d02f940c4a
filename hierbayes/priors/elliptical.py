r"""What priors with elliptical contours share: a centre, a scale matrix, its structure.

.. math:: \theta_j = \mu + \Gamma w_j + L z_j, \qquad L L^\top = \Sigma
          = \operatorname{diag}(\tau)\, R\, \operatorname{diag}(\tau)

with z standard normal, or heavier in its tails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from hierbayes import inputs
from hierbayes.errors import InputError, suggestion
from hierbayes.numerics import semidefinite_root
from hierbayes.phi import Part
from hierbayes.priors.base import Phi, Prior


def _read_groups(kind: str, groups: Any) -> tuple[tuple[str, ...], ...]:
    """Groups of names as tuples; refused where they are none."""
    where = f"priors.{kind}(correlated=…)"
    try:
        listed = None if isinstance(groups, (str, bytes)) else list(groups)
    except TypeError:
        listed = None
    if listed is None or any(isinstance(group, (str, bytes)) for group in listed):
        raise InputError(
            f'{where} must be True, False, or groups of names, [["Intercept", "x"]]; found '
            f"{inputs.shown(groups)}"
        )
    return tuple(inputs.names(where, group) for group in listed)


class Elliptical(Prior):
    """A prior with a centre μ + Γ w_j and a scale matrix Σ = diag(τ) R diag(τ)."""

    correlated: bool | Sequence[Sequence[str]]
    zero_mean: Sequence[str]

    def __post_init__(self) -> None:
        self._tidy()

    def _tidy(self) -> None:
        """Names as tuples, so that priors can be compared and hashed."""
        kind, groups = type(self).__name__, self.correlated
        if isinstance(groups, (bool, np.bool_)):
            object.__setattr__(self, "correlated", bool(groups))
        else:
            object.__setattr__(self, "correlated", _read_groups(kind, groups))
        where = f"priors.{kind}(zero_mean=…)"
        object.__setattr__(self, "zero_mean", inputs.names(where, self.zero_mean))

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
            kind = type(self).__name__
            raise InputError(f"priors.{kind}(correlated=…): a coefficient stands in two groups")
        blocks += [(i,) for i in range(len(coef)) if i not in taken]
        return tuple(sorted(blocks))

    def free_mean(self, coef: Sequence[str]) -> np.ndarray:
        """Which coefficients have a mean to be learned, (d,) of bool."""
        self._known(self.zero_mean, coef, "zero_mean")
        return np.array([c not in self.zero_mean for c in coef], dtype=bool)

    def parts(self, coef: Sequence[str], task_predictors: Sequence[str]) -> list[Part]:
        """μ where it is free, Γ, τ and R."""
        d, q = len(coef), len(task_predictors)
        free = tuple(np.flatnonzero(self.free_mean(coef)).tolist())
        blocks = tuple(b for b in self.blocks(coef) if len(b) > 1)
        parts = [Part("mu", ("coef",), (d,), learned=free)]
        if q:
            parts.append(Part("gamma", ("coef", "task_predictor"), (d, q)))
        parts.append(Part("tau", ("coef",), (d,), "spread"))
        if blocks:
            parts.append(Part("corr", ("coef", "coef_bis"), (d, d), "correlation", blocks=blocks))
        return parts

    def _known(self, names: Sequence[str], coef: Sequence[str], argument: str) -> None:
        kind = type(self).__name__
        for name in names:
            if name not in coef:
                raise InputError(
                    f"priors.{kind}({argument}=…): no coefficient is named {name!r}; "
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
