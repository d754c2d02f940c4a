"""What every likelihood of the package answers."""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from hierbayes.errors import InputError
from hierbayes.tasks import Task, Tasks


class Likelihood(abc.ABC):
    """p(y | f, φ) with f = f(x; θ), row by row.

    A subclass gives the family of the outcomes around f; f itself is the linear predictor unless
    :meth:`location` says otherwise. One task is written, the package maps over tasks.
    """

    gaussian_in_theta: bool = False
    """True where log p(D_j | θ, φ) is quadratic in θ: the evidence is then exact."""

    discrete: bool = False
    """True where outcomes are counts or categories: central intervals then say little."""

    @abc.abstractmethod
    def family(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> dist.Distribution:
        """The distribution of the outcomes (n,) given what θ says of each row, f (n,)."""

    @abc.abstractmethod
    def predictive(
        self, location: Any, variance: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> Any:
        """The outcomes' distribution where f is normal with these moments, as a SciPy one."""

    @abc.abstractmethod
    def curvature_bound(self, phi: dict[str, Any], slots: dict[str, Any]) -> Any:
        """The largest −∂² log p(y | f) / ∂f² that a row can have, (n,) or one number."""

    @abc.abstractmethod
    def units(self, tasks: Tasks) -> tuple[float, float]:
        """Where f lies and how far it spreads, on f's own scale: the units of default priors."""

    @abc.abstractmethod
    def check(self, tasks: Tasks) -> None:
        """Refuse tasks that this likelihood cannot describe."""

    def divergence(
        self, location: Any, other: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> jax.Array:
        """KL(p(y | f) ‖ p(y | f′)) of each row (n,), for f = ``location`` and f′ = ``other``."""
        here, there = self.family(location, phi, slots), self.family(other, phi, slots)
        return jnp.asarray(dist.kl_divergence(here, there))

    def parameters(self) -> tuple[str, ...]:
        """Names of the likelihood's own parameters in φ."""
        return ()

    def plug_in(self, phi: dict[str, Any]) -> dict[str, Any]:
        """φ for scoring rows at a point θ: with ``sigma_query`` in the place of ``sigma``."""
        return phi | {"sigma": phi["sigma_query"]} if "sigma_query" in phi else phi

    def location(self, theta: Any, phi: dict[str, Any], task: Task) -> Any:
        """What θ says of each row: f (n,) for one θ (d,), or for each row's own θ (n, d)."""
        location = (task.predictors * theta).sum(-1) + task.slots.get("offset", 0.0)
        return location + task.shared @ phi["beta"] if "beta" in phi else location

    def distribution(self, theta: Any, phi: dict[str, Any], task: Task) -> dist.Distribution:
        """The distribution of the outcomes (n,), under one θ (d,) or each row's own θ (n, d)."""
        return self.family(self.location(theta, phi, task), phi, task.slots)

    def log_likelihood(self, theta: Any, phi: dict[str, Any], task: Task) -> jax.Array:
        """log p(y_i | x_i, θ, φ) of each row (n,), zero in rows that fill up a bucket."""
        rows = self.distribution(theta, phi, task).log_prob(task.outcome)
        return jnp.where(task.mask, rows, 0.0)

    def log_likelihood_of_rows(
        self, thetas: Any, phi: dict[str, Any], rows: Task, task_of_row: Any
    ) -> jax.Array:
        """log p(y_i | x_i, θ_j(i), φ) of flat rows (N,), each under its own task's θ.

        ``thetas`` (J, …) is a pytree with tasks on the leading axis. No row is padded; the slope
        in ``thetas`` is each task's own.
        """
        own = jax.tree.map(lambda theta: theta[task_of_row], thetas)
        return self.log_likelihood(own, phi, rows)

    def _refuse_slots(self, tasks: Tasks, slots: tuple[str, ...]) -> None:
        """Refuse columns that this likelihood would ignore, and predictors that are no matrix."""
        for slot in slots:
            if slot in tasks.slots:
                raise InputError(
                    f"the tasks carry `{slot}`, which the {type(self).__name__} likelihood would "
                    "ignore; make the tasks without it"
                )
        if np.ndim(tasks.predictors) != 2:
            raise InputError(
                f"the {type(self).__name__} likelihood takes X of shape (n, d), found rows of "
                f"shape {tasks.predictors.shape[1:]}"
            )
