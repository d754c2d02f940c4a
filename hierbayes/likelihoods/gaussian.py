"""The Gaussian likelihood, with unknown noise or with known standard errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist

from hierbayes.errors import InputError
from hierbayes.likelihoods.base import Likelihood
from hierbayes.tasks import Task, Tasks


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

    known_se: bool = False
    gaussian_in_theta = True

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
        if tasks.predictors.ndim != 2:
            raise InputError(
                f"the Gaussian likelihood takes X of shape (n, d), found rows of shape "
                f"{tasks.predictors.shape[1:]}"
            )

    def mean(self, theta: Any, phi: dict[str, Any], task: Task) -> Any:
        """The linear predictor (n,) for one θ (d,), or for each row's own θ (n, d)."""
        mean = (task.predictors * theta).sum(-1) + task.slots.get("offset", 0.0)
        return mean + task.shared @ phi["beta"] if "beta" in phi else mean

    def noise_sd(self, phi: dict[str, Any], slots: dict[str, Any]) -> Any:
        """Standard deviation of each row given θ: known, or σ/√weight.

        ``sigma_query``, where φ holds one beside known standard errors, is added in quadrature.
        """
        root_weight = jnp.sqrt(slots["weight"]) if "weight" in slots else 1.0
        if not self.known_se:
            return phi["sigma"] / root_weight
        known = slots["known_se"] / root_weight
        return jnp.hypot(known, phi["sigma"]) if "sigma" in phi else known

    def distribution(self, theta: Any, phi: dict[str, Any], task: Task) -> dist.Distribution:
        """Normal distribution of the outcomes (n,) of one task."""
        return dist.Normal(self.mean(theta, phi, task), self.noise_sd(phi, task.slots))
