"""The gamma likelihood: positive outcomes whose spread grows with their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy import special

from hierbayes.likelihoods.generalised import GeneralisedLinear, mean_offset, shortfall, stirling
from hierbayes.likelihoods.over_normal import LARGEST, Kernel, OfRate, averaged
from hierbayes.likelihoods.poisson import exponential
from hierbayes.tasks import Tasks


@dataclass(frozen=True)
class Gamma(GeneralisedLinear):
    r"""Positive outcomes with a linear predictor of the log mean.

    .. math:: y_{ij} \sim \text{Gamma}\!\left(\text{shape} = \alpha,\;
              \text{rate} = \alpha\, e^{-f_{ij}}\right)

    α is ``shape`` in φ, by default InverseGamma(0.4, 0.3) a priori; the coefficient of variation
    is 1 / √α.

    Examples
    --------
    >>> import hierbayes as hb
    >>> hb.likelihoods.Gamma().parameters()
    ('shape',)
    """

    log_concave = True
    log_link = True

    def parameters(self) -> tuple[str, ...]:
        """``shape``."""
        return ("shape",)

    def default_priors(self, spread: float) -> dict[str, dist.Distribution]:
        """InverseGamma(0.4, 0.3): next to flat in log α, off zero."""
        del spread
        return {"shape": dist.InverseGamma(0.4, 0.3)}

    def _check_outcome(self, tasks: Tasks) -> None:
        self._refuse_rows(
            tasks, ~(tasks.outcome > 0), "numbers above zero",
            "leave such rows out, or model whether there is an amount by a Bernoulli family",
        )  # fmt: skip

    def best_location(self, outcome: Any, slots: dict[str, Any]) -> Any:
        """The log."""
        del slots
        return jnp.log(outcome)

    def family(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> dist.Distribution:
        """Gamma with log mean f."""
        del slots
        return LogGamma(location, phi["shape"])

    def kernel(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any], outcome: Any
    ) -> Any:
        """−α (f + y e^−f), less what it is at its maximum."""
        del slots
        return -phi["shape"] * shortfall(jnp.log(outcome) - location)

    def base(self, phi: dict[str, Any], slots: dict[str, Any], outcome: Any) -> Any:
        """α log α − α − log Γ(α) − log y."""
        del slots
        return stirling(phi["shape"]) - jnp.log(outcome)

    def predictive(
        self, location: Any, variance: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> Any:
        """Gamma averaged over a normal log mean."""
        del slots
        return averaged(Amounts(np.asarray(phi["shape"])), location, variance)

    def divergence(
        self, location: Any, other: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> jax.Array:
        """With one shape α: α (e^(f − f′) − 1 − (f − f′))."""
        del slots
        apart = location - other
        return jnp.asarray(phi["shape"] * (jnp.expm1(apart) - apart))

    def curvature_bound(self, phi: dict[str, Any], slots: dict[str, Any]) -> Any:
        """None: α y e^−f grows without bound."""
        del phi, slots
        return np.inf

    def units(self, tasks: Tasks) -> tuple[float, float]:
        """The log of the mean outcome, and one on the log scale."""
        return float(np.log(np.mean(tasks.outcome))) - mean_offset(tasks), 1.0


class Amounts(OfRate):
    """y of mean e^f and shape α: α y e^−f is a gamma variable of shape α."""

    discrete = False

    def __init__(self, shape: np.ndarray):
        self.shape = shape

    def at(self, f: Any) -> Any:
        """SciPy's."""
        from scipy import stats

        return stats.gamma(self.shape, scale=np.exp(np.minimum(f, LARGEST)) / self.shape)

    def spread(self) -> tuple[Any, Any]:
        """The square of the mean over α."""
        return 0.0, 1.0 / self.shape

    def kernel(self, y: Any) -> Kernel:
        """log p(y | f)."""
        return self.pivot(y)._replace(base=-special.gammaln(self.shape) - np.log(y))

    def pivot(self, y: Any) -> Kernel:
        """Of the log of the gamma variable, by which f lies below log α y."""
        above = np.log(self.shape * y)
        return Kernel(False, self.shape, 1.0, -special.gammaln(self.shape), above, -1.0)


class LogGamma(dist.Gamma):
    """Gamma by the log of its mean."""

    def __init__(self, log_mean: Any, shape: Any):
        self.log_mean, self.alpha = log_mean, shape
        super().__init__(shape, shape * exponential(-log_mean))

    def log_prob(self, value: Any) -> jax.Array:
        """The likelihood's kernel and base."""
        family, phi = Gamma(), {"shape": self.alpha}
        return family.base(phi, {}, value) + family.kernel(self.log_mean, phi, {}, value)
