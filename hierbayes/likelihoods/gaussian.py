"""The Gaussian likelihood, with unknown noise or with known standard errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from hierbayes import inputs
from hierbayes.errors import InputError
from hierbayes.likelihoods.base import Likelihood
from hierbayes.tasks import Tasks
from hierbayes.tasks.container import kept


@dataclass(frozen=True)
class Gaussian(Likelihood):
    r"""Normal outcomes around a linear predictor.

    .. math:: y_{ij} \sim N(o_{ij} + x_{ij}^\top\theta_j + z_{ij}^\top\beta,\; s_{ij}^2)

    with s² = σ² / weight (σ unknown, in φ), or s = the known standard error of each row.

    Parameters
    ----------
    known_se : bool
        Take every row's standard error from the slot ``known_se`` of the tasks; then φ has no
        ``sigma``. This is the meta-analysis model, of eight schools for example.

    Examples
    --------
    >>> import hierbayes as hb
    >>> hb.likelihoods.Gaussian().parameters()
    ('sigma',)
    >>> hb.likelihoods.Gaussian(known_se=True).parameters()
    ()
    """

    log_concave = True
    known_se: bool = False
    gaussian_in_theta = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "known_se", inputs.flag("Gaussian(known_se=…)", self.known_se))

    def parameters(self) -> tuple[str, ...]:
        """Names of the likelihood's own parameters in φ."""
        return () if self.known_se else ("sigma",)

    def check(self, tasks: Tasks) -> None:
        """Refuse tasks whose slots do not fit, or predictors that are not a matrix."""
        if self.known_se and "known_se" not in tasks.slots:
            raise InputError(
                "Gaussian(known_se=True) needs the standard error of every row: pass "
                "`known_se` when making the tasks"
            )
        if not self.known_se and "known_se" in tasks.slots:
            raise InputError(
                "the tasks carry known standard errors, which Gaussian() would ignore: use "
                "Gaussian(known_se=True), or make the tasks without `known_se`"
            )
        self._refuse_slots(tasks, ())

    def noise_sd(self, phi: dict[str, Any], slots: dict[str, Any]) -> Any:
        """Standard deviation of each row given θ: known, or σ/√weight.

        ``sigma_query``, where φ holds one beside known standard errors, is added in quadrature.
        """
        root_weight = jnp.sqrt(slots["weight"]) if "weight" in slots else 1.0
        if not self.known_se:
            return phi["sigma"] / root_weight
        known = slots["known_se"] / root_weight
        return jnp.hypot(known, phi["sigma"]) if "sigma" in phi else known

    def family(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> dist.Distribution:
        """N(f, s²) of every row."""
        return dist.Normal(location, self.noise_sd(phi, slots))

    def predictive(
        self, location: Any, variance: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> Any:
        """N(f, s² + the variance of f) of every row."""
        from scipy import stats  # a third of a second, when first used

        noise = np.asarray(self.noise_sd(phi, slots))
        return stats.norm(location, np.sqrt(noise**2 + variance))

    def curvature_bound(self, phi: dict[str, Any], slots: dict[str, Any]) -> Any:
        """1/s², whatever f."""
        noise = phi if self.known_se else {"sigma": 1.0} | phi
        return 1.0 / self.noise_sd(noise, slots) ** 2

    def units(self, tasks: Tasks) -> tuple[float, float]:
        """Mean and standard deviation of the outcome less its offset."""
        return _units(tasks)


@kept
def _units(tasks: Tasks) -> tuple[float, float]:
    y = tasks.outcome - tasks.slots.get("offset", 0.0)
    return float(y.mean()), float(np.std(y)) or max(float(np.abs(y).max(initial=0.0)), 1.0)
