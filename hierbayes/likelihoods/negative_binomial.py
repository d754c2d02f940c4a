"""The negative binomial likelihood: counts that vary more than Poisson's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy import special

from hierbayes.likelihoods.bernoulli import softplus
from hierbayes.likelihoods.generalised import GeneralisedLinear, count_peak, stirling
from hierbayes.likelihoods.over_normal import LARGEST, Kernel, OfRate, averaged
from hierbayes.likelihoods.poisson import exponential, log_rate
from hierbayes.tasks import Tasks

FAR = 30.0
"""Of f above log y: from there on nothing cancels."""


@dataclass(frozen=True)
class NegativeBinomial(GeneralisedLinear):
    r"""Counts with mean e^f and variance e^f + e^{2f} / concentration.

    .. math:: p(y \mid f) = \frac{\Gamma(y + \kappa)}{y!\, \Gamma(\kappa)}
              \left(\frac{\kappa}{\kappa + e^f}\right)^{\kappa}
              \left(\frac{e^f}{\kappa + e^f}\right)^{y}

    κ is ``concentration`` in φ, by default InverseGamma(0.4, 0.3) a priori; as κ → ∞ the family
    is Poisson's.

    Examples
    --------
    >>> import hierbayes as hb
    >>> hb.likelihoods.NegativeBinomial().parameters()
    ('concentration',)
    """

    log_concave = True
    discrete = True
    log_link = True

    def parameters(self) -> tuple[str, ...]:
        """``concentration``."""
        return ("concentration",)

    def default_priors(self, spread: float) -> dict[str, dist.Distribution]:
        """InverseGamma(0.4, 0.3): next to flat in log κ, off zero."""
        del spread
        return {"concentration": dist.InverseGamma(0.4, 0.3)}

    def _check_outcome(self, tasks: Tasks) -> None:
        self._refuse_non_counts(tasks)

    def best_location(self, outcome: Any, slots: dict[str, Any]) -> Any:
        """The log, half a count standing for none."""
        del slots
        return jnp.log(jnp.maximum(outcome, 0.5))

    def endless(self, tasks: Tasks) -> tuple[np.ndarray, np.ndarray]:
        """Downwards where nothing was counted."""
        return np.zeros(tasks.num_rows, bool), tasks.outcome == 0

    def family(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> dist.Distribution:
        """Negative binomial with log mean f."""
        del slots
        return LogNegativeBinomial(location, phi["concentration"])

    def kernel(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any], outcome: Any
    ) -> Any:
        """y d − (y + κ) log(1 + y (e^d − 1) / (y + κ)) with d = f − log y: less its maximum.

        Of no count, and where e^d is too large, by softplus of the log odds f − log κ.
        """
        del slots
        size, some = phi["concentration"], jnp.where(outcome > 0, outcome, 1.0)
        apart = location - jnp.log(some)
        share = some / (some + size)
        far = (outcome <= 0) | (apart > FAR)
        near = jnp.where(far, 0.0, apart)
        fallen = outcome * near - (outcome + size) * jnp.log1p(share * jnp.expm1(near))
        odds = location - jnp.log(size)
        peak = outcome * (jnp.log(some) - jnp.log(size))
        peak = peak + (outcome + size) * jnp.log1p(-jnp.where(outcome <= 0, 0.0, share))
        plain = outcome * odds - (outcome + size) * softplus(odds) - peak
        return jnp.where(far, plain, fallen)

    def base(self, phi: dict[str, Any], slots: dict[str, Any], outcome: Any) -> Any:
        """log Γ(y + κ) − log Γ(κ) − log y! and the kernel's maximum."""
        del slots
        size = phi["concentration"]
        return count_peak(outcome) + stirling(size) - stirling(outcome + size)

    def predictive(
        self, location: Any, variance: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> Any:
        """Negative binomial averaged over a normal log mean."""
        del slots
        return averaged(SpreadCounts(np.asarray(phi["concentration"])), location, variance)

    def divergence(
        self, location: Any, other: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> jax.Array:
        """With one concentration κ: m (f − f′) − (m + κ) log((m + κ) / (m′ + κ)), m = e^f."""
        del slots
        size, odds = phi["concentration"], location - jnp.log(phi["concentration"])
        moved = other - location
        softer = jnp.logaddexp(odds + moved, 0.0) - jnp.logaddexp(odds, 0.0)
        mean = exponential(location)
        return jnp.asarray(-mean * moved + (mean + size) * softer)

    def curvature_bound(self, phi: dict[str, Any], slots: dict[str, Any]) -> Any:
        """None over all counts: (y + κ) / 4 in a row that counts y."""
        del phi, slots
        return np.inf

    def units(self, tasks: Tasks) -> tuple[float, float]:
        """The log of the overall rate, and one on the log scale."""
        return log_rate(tasks), 1.0


class SpreadCounts(OfRate):
    """y of mean e^f and concentration κ: Y ≤ y where a beta variable (y + 1, κ) is above its p."""

    def __init__(self, size: np.ndarray):
        self.size = size

    def at(self, f: Any) -> Any:
        """SciPy's."""
        from scipy import stats

        return stats.nbinom(self.size, self.size / (self.size + np.exp(np.minimum(f, LARGEST))))

    def spread(self) -> tuple[Any, Any]:
        """The mean, and its square over κ."""
        return 1.0, 1.0 / self.size

    def kernel(self, y: Any) -> Kernel:
        """log p(y | f), by the odds f − log κ."""
        base = -special.betaln(y + 1.0, self.size) - np.log(y + self.size)
        return Kernel(True, y, self.size, base, -np.log(self.size))

    def pivot(self, y: Any) -> Kernel:
        """Of the logit of the beta variable."""
        base = -special.betaln(y + 1.0, self.size)
        return Kernel(True, y + 1.0, self.size, base, -np.log(self.size))


class LogNegativeBinomial(dist.NegativeBinomial2):
    """Negative binomial by the log of its mean."""

    def __init__(self, log_mean: Any, concentration: Any):
        self.log_mean, self.size = log_mean, concentration
        super().__init__(exponential(log_mean), concentration)

    def log_prob(self, value: Any) -> jax.Array:
        """The likelihood's kernel and base."""
        family, phi = NegativeBinomial(), {"concentration": self.size}
        return family.base(phi, {}, value) + family.kernel(self.log_mean, phi, {}, value)
