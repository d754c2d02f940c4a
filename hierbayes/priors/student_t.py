r"""The Student-t prior of tasks: as the Gaussian one, but that some tasks may lie far out.

.. math::

    \theta_j \mid \varphi \sim t_\nu(\mu + \Gamma w_j,\; \Sigma)
    \quad\Longleftrightarrow\quad
    \theta_j \mid \lambda_j \sim N(\mu + \Gamma w_j,\; \Sigma / \lambda_j), \qquad
    \lambda_j \sim \operatorname{Gamma}(\tfrac\nu2,\; \text{rate } \tfrac\nu2)

What λ_j leaves normal is in closed form; over λ_j itself one integral in one dimension is left,
which the trapezoid rule in log λ does to rounding error (see :func:`mixing`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from hierbayes import inputs
from hierbayes.errors import InputError
from hierbayes.priors.base import Phi
from hierbayes.priors.elliptical import Elliptical

RULE_ERROR = 1e-12
"""Relative error of the trapezoid rule, by which its step is chosen."""

FARTHEST, PENALTY, NEGLIGIBLE = 45.0, 400.0, 30.0
"""The rule ends at log λ = −45 (tasks 10⁹ scales out), or where the prior of λ costs 400 nats, and
on either side where e⁻³⁰ of it is left."""


@dataclass(frozen=True)
class StudentT(Elliptical):
    r"""θ_j ~ t_ν(μ + Γ w_j, Σ) with Σ = diag(τ) R diag(τ) its **scale** matrix.

    ``tau`` is a scale, not a standard deviation: that of θ is τ √(ν / (ν − 2)), and there is none
    up to ν = 2. ν is given, not learned: few tasks say next to nothing about it. All coefficients
    of a task share one λ_j, so that a task is far out, or not, as a whole.

    Parameters
    ----------
    df : float
        ν > 0, the degrees of freedom. 4 is a usual choice; from 30 on it is nearly normal.
    correlated : bool or sequence of sequences of str
        True: one correlation matrix over all coefficients. False: uncorrelated coefficients.
        Groups of coefficient names: correlated within a group, uncorrelated between groups.
    zero_mean : sequence of str
        Coefficients whose mean μ is exactly zero: those that stand inside bars only.

    References
    ----------
    Lange, Little and Taylor (1989), Robust statistical modeling using the t distribution, JASA
    84(408). Pinheiro, Liu and Wu (2001), Efficient algorithms for robust estimation in linear
    mixed-effects models using the multivariate t distribution, JCGS 10(2).

    Examples
    --------
    >>> from dataclasses import replace
    >>> import hierbayes as hb
    >>> model, tasks = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(),
    ...                                known_se="se")
    >>> robust = replace(model, prior=hb.priors.StudentT(4, model.prior.correlated))
    >>> fit = hb.empirical_bayes(robust, tasks, "map")
    >>> sorted(fit.phi)
    ['mu', 'tau']
    """

    df: float = 4.0
    correlated: bool | Sequence[Sequence[str]] = True
    zero_mean: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._tidy()
        object.__setattr__(self, "df", degrees_of_freedom(self.df))

    def noncentred(self, dimension: int) -> dist.Distribution:
        """z Student-t of ν degrees of freedom with the unit matrix as its scale."""
        return dist.MultivariateStudentT(self.df, jnp.zeros(dimension), jnp.eye(dimension))

    def noncentred_draws(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """z (…, d) by NumPy: all coefficients of a task over one √λ."""
        return rng.standard_normal(shape) / root_precision(self.df, rng, shape[:-1])

    def distribution(self, phi: Phi, w: Any) -> dist.Distribution:
        """Multivariate t_ν(μ + Γ w, Σ); τ must be positive."""
        return dist.MultivariateStudentT(self.df, self.location(phi, w), self.scale_tril(phi))

    def variance_factors(self, count: int) -> np.ndarray:
        """``count`` equally likely values of 1/λ: its means over strata of equal probability.

        So their mean is ν / (ν − 2), that of 1/λ, itself. The outermost stratum has no mean up to
        ν = 2, and its median stands there.
        """
        from scipy import stats

        half = 0.5 * self.df
        ends = stats.gamma.ppf(np.arange(count + 1) / count, half)  # of λ ν/2
        if half <= 1.0:
            middles = stats.gamma.ppf((np.arange(count) + 0.5) / count, half)
            return half / middles
        shares = np.diff(stats.gamma.cdf(ends, half - 1.0))
        return half / (half - 1.0) * count * shares


def degrees_of_freedom(df: Any) -> float:
    """ν as a number, refused where it is none."""
    try:
        return inputs.positive("priors.StudentT(df=…), a number,", df)
    except InputError as error:
        raise InputError(
            f"{error}; it must be positive and finite, and the limit of many degrees of freedom "
            "is priors.Gaussian()"
        ) from error


def root_precision(df: float, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """√λ (…, 1), λ ~ Gamma(ν/2, rate ν/2)."""
    return np.sqrt(rng.gamma(0.5 * df, 2 / df, shape))[..., None]


class Mixing(NamedTuple):
    """λ_k (K,) and the log of the weights (K,), which sum to one, of a rule for the mixture."""

    precision: np.ndarray
    log_weight: np.ndarray


@functools.lru_cache(maxsize=64)
def mixing(df: float, dimension: int) -> Mixing:
    r"""The trapezoid rule in u = log λ for what Gaussian tasks of ``dimension`` coefficients ask.

    .. math:: \int g(e^u)\, p(u)\, du \approx h \sum_k g(e^{u_k})\, p(u_k), \qquad
              p(u) \propto \exp\left[\tfrac\nu2 (u - e^u)\right]

    Of an integrand λ^{k} e^{−cλ} in u the error is 2 |Γ(k + 2πi/h)| / Γ(k), relative; evidences
    lie between the k of ν/2 and that of (ν + d)/2, the worse one, by which h is chosen.
    """
    from scipy import optimize, special

    half, most = 0.5 * df, 0.5 * (df + dimension)

    def log_error(log_y: float) -> float:
        size = special.loggamma(most + 1j * np.exp(log_y)).real - special.gammaln(most)
        return float(np.log(2.0) + size - np.log(RULE_ERROR))

    widest: Any = optimize.brentq(log_error, np.log(1e-2), np.log(1e3 * np.sqrt(most + 1.0)))
    step = 2 * np.pi / np.exp(widest)
    costly: Any = optimize.brentq(lambda u: half * (np.expm1(u) - u) - PENALTY, -1e3 / half - 99, 0)
    low = -max(2 * NEGLIGIBLE / df if df < 2 else 0.0, min(FARTHEST, -costly))
    top = np.log(most / half)

    def left(u: float) -> float:
        return most * (u - top) - half * (np.exp(u) - np.exp(top)) + NEGLIGIBLE

    high: Any = optimize.brentq(left, top, top + 60.0)
    places = step * np.arange(np.floor(low / step), np.ceil(high / step) + 1)
    log_weight = half * (places - np.expm1(places))
    log_weight -= special.logsumexp(log_weight)
    return Mixing(np.exp(places), log_weight)
