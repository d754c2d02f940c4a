"""The Student-t likelihood: a Gaussian one that a few wild rows do not move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import gammaln
from scipy import special

from hierbayes import inputs
from hierbayes.likelihoods.generalised import GeneralisedLinear
from hierbayes.likelihoods.integral import log_integral
from hierbayes.likelihoods.over_normal import AT_ONCE, Family, averaged
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
        del slots
        family = HeavyTails(np.asarray(self._df(phi), float), np.asarray(phi["sigma"], float))
        return averaged(family, location, variance)

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


class HeavyTails(Family):
    r"""t around a normal f, by way of a normal whose precision λ is gamma.

    .. math:: p(y) = \int N\!\left(y;\, m,\, v + \frac{\sigma^2}{\lambda}\right)
              \text{Gamma}\!\left(\lambda;\, \frac\nu2, \frac\nu2\right) d\lambda

    In the log of λ no part of it is narrower than √(2/ν), however small σ² is beside v. Outliers
    have a λ of their own, so that there may be two modes.
    """

    discrete = False
    lowest = -np.inf

    def __init__(self, df: np.ndarray, sigma: np.ndarray):
        self.df, self.sigma = df, sigma

    def at(self, f: Any) -> Any:
        """SciPy's."""
        from scipy import stats

        return stats.t(self.df, f, self.sigma)

    def moments(self, m: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """m, which is the median too; infinite spread up to two degrees of freedom."""
        more = np.where(self.df > 2, self.df / np.maximum(self.df - 2.0, 1e-300), np.inf)
        return m + 0.0 * self.df, s**2 + self.sigma**2 * more

    def typical(self, f: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """f itself."""
        sigma = np.median(
            np.broadcast_to(self.sigma, np.broadcast_shapes(self.sigma.shape, (1, 1)))
        )
        return f, np.hypot(s, sigma)

    def log_density(self, y: np.ndarray, m: np.ndarray, s: np.ndarray) -> np.ndarray:
        """log p(y)."""

        def normal(away: np.ndarray, variance: np.ndarray) -> np.ndarray:
            return -0.5 * (np.log(2.0 * np.pi * variance) + away**2 / variance)

        return self._over_precision(normal, y - m, s)

    def cdf(self, y: np.ndarray, m: np.ndarray, s: np.ndarray) -> np.ndarray:
        """P(Y ≤ y)."""

        def below(away: np.ndarray, variance: np.ndarray) -> np.ndarray:
            return special.log_ndtr(away / np.sqrt(variance))

        return np.exp(self._over_precision(below, y - m, s))

    def _over_precision(self, of: Any, away: np.ndarray, s: np.ndarray) -> np.ndarray:
        shape = away.shape
        away, s = away.ravel(), s.ravel()
        half = 0.5 * np.broadcast_to(self.df, shape).ravel()
        noise = np.broadcast_to(self.sigma, shape).ravel() ** 2
        base = half * np.log(half) - special.gammaln(half)
        found = np.empty(away.size)
        for some in np.split(np.arange(away.size), range(AT_ONCE, away.size, AT_ONCE)):
            parts = [a[some] for a in (away, s**2, half, noise, base)]
            found[some] = _over_precision(of, *parts)
        return found.reshape(shape)


def _over_precision(
    of: Any, away: np.ndarray, v: np.ndarray, half: np.ndarray, noise: np.ndarray, base: np.ndarray
) -> np.ndarray:
    """log ∫ e^of Gamma(λ) dλ along u = log λ, in panels about all that may be narrow."""

    def curve(u: np.ndarray, i: Any) -> np.ndarray:
        gamma = base[i] + half[i] * (u - np.exp(np.minimum(u, 700.0)))
        return gamma + of(away[i], v[i] + noise[i] * np.exp(np.minimum(-u, 600.0)))

    # so many nats down, on both sides of e^(half (u − e^u)), and of an outlier's λ
    nats = 50.0 / half
    many = np.log(1.0 + nats + 2.0 * np.log1p(nats))
    high = np.where(nats < 1.0, np.sqrt(2.0 * nats), many)
    with np.errstate(divide="ignore"):
        outlier = np.log(2.0 * half + 1.0) - np.log(2.0 * half + away**2 / noise)
        crossing = np.log(noise) - np.log(v)
    reach = np.where(3.0 * nats < 1.0, np.sqrt(3.0 * nats), 1.0 + nats)
    low = np.maximum(np.minimum(np.minimum(outlier, crossing), 0.0), -600.0) - reach
    width = 1.0 / np.sqrt(1.0 + half)
    around = np.array([-9.0, -3.0, -1.0, 1.0, 3.0, 9.0])
    edges = [
        low[:, None] + (high - low)[:, None] * np.linspace(0.0, 1.0, 9), width[:, None] * around,
        outlier[:, None] + width[:, None] * around, crossing[:, None] + around[1:5],
    ]  # fmt: skip
    inside = np.clip(np.concatenate(edges, axis=1), low[:, None], high[:, None])
    return log_integral(curve, np.sort(inside, axis=1))


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
