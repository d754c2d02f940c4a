"""The Student-t likelihood: a Gaussian one that a few wild rows do not move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import gammaln

from hierbayes import inputs
from hierbayes.likelihoods.generalised import GeneralisedLinear
from hierbayes.likelihoods.over_normal import averaged
from hierbayes.tasks import Tasks

NODES = np.arange(-20.0, 20.05, 0.1)
"""u of the trapezium rule in r = sinh u, along which tails fall like e^(−ν |u|)."""

MIDDLE = np.sinh(NODES)


@dataclass(frozen=True)
class StudentT(GeneralisedLinear):
    r"""Outcomes around a linear predictor with heavy tails.

    .. math:: \frac{y_{ij} - f_{ij}}{\sigma} \sim t_\nu

    Parameters
    ----------
    df : float, optional
        ν; learned as ``df`` in φ where none is given, by default Gamma(2, 0.1) a priori (Juárez
        and Steel 2010).

    Examples
    --------
    >>> import hierbayes as hb
    >>> hb.likelihoods.StudentT().parameters(), hb.likelihoods.StudentT(df=4.0).parameters()
    (('sigma', 'df'), ('sigma',))
    """

    df: float | None = None

    def __post_init__(self) -> None:
        if self.df is not None:
            df = inputs.positive("likelihoods.StudentT(df=…)", self.df)
            object.__setattr__(self, "df", df)

    log_concave = False

    def parameters(self) -> tuple[str, ...]:
        """``sigma``, and ``df`` where it is learned."""
        return ("sigma",) if self.df is not None else ("sigma", "df")

    def default_priors(self, spread: float) -> dict[str, dist.Distribution]:
        """Gamma(2, 0.1): most weight on 3 to 50 degrees of freedom."""
        return {"sigma": dist.HalfNormal(spread), "df": dist.Gamma(2.0, 0.1)}

    def family(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> dist.Distribution:
        """t around f."""
        del slots
        return HeavyTailed(self._df(phi), location, phi["sigma"])

    def _df(self, phi: dict[str, Any]) -> Any:
        return phi["df"] if self.df is None else self.df

    def predictive(
        self, location: Any, variance: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> Any:
        """t averaged over a normal f."""
        from scipy import stats

        del slots
        df, sigma = np.asarray(self._df(phi)), np.asarray(phi["sigma"])
        return averaged(lambda f: stats.t(df, f, sigma), location, variance)

    def divergence(
        self, location: Any, other: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> jax.Array:
        """(ν + 1) / 2 E[log(ν + (r + δ)²) − log(ν + r²)], δ = (f − f′) / σ, by the trapezium."""
        del slots
        df = self._df(phi)
        weight = (1.0 + MIDDLE**2 / df) ** (-0.5 * (df + 1)) * jnp.cosh(NODES)
        apart = ((location - other) / phi["sigma"])[..., None]
        gain = jnp.log1p((MIDDLE + apart) ** 2 / df) - jnp.log1p(MIDDLE**2 / df)
        return 0.5 * (df + 1) * (gain * weight).sum(-1) / weight.sum()

    def curvature_bound(self, phi: dict[str, Any], slots: dict[str, Any]) -> Any:
        """(ν + 1) / (ν σ²), at the middle."""
        df = self._df(phi)
        return (df + 1.0) / (df * phi["sigma"] ** 2) * slots.get("weight", 1.0)

    def units(self, tasks: Tasks) -> tuple[float, float]:
        """Median of the outcome less its offset, and its spread by quartiles, as of a normal."""
        y = tasks.outcome - tasks.slots.get("offset", 0.0)
        low, middle, high = np.quantile(y, [0.25, 0.5, 0.75])
        spread = (high - low) / 1.349 or float(np.std(y)) or max(float(np.abs(y).max()), 1.0)
        return float(middle), float(spread)


class HeavyTailed(dist.StudentT):
    """t with derivatives of every order at its middle.

    NumPyro writes a power of 2.0, whose third derivative at zero is no number: just where a task
    has no more rows than coefficients.
    """

    def log_prob(self, value: Any) -> jax.Array:
        """−½ (ν + 1) log(1 + r² / ν) and the log of the constant, r = (y − f) / σ."""
        df: Any = self.df
        r = (value - self.loc) / self.scale
        scale: Any = self.scale
        constant = gammaln(0.5 * (df + 1)) - gammaln(0.5 * df) - 0.5 * jnp.log(jnp.pi * df)
        return constant - jnp.log(scale) - 0.5 * (df + 1) * jnp.log1p(r * r / df)
