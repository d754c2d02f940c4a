"""The categorical likelihood: one of C classes, by C logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy import special

from hierbayes import inputs
from hierbayes.errors import InputError, listing
from hierbayes.likelihoods.base import Likelihood
from hierbayes.likelihoods.bernoulli import POSSIBLE
from hierbayes.tasks import Tasks


@dataclass(frozen=True)
class Categorical(Likelihood):
    r"""Classes 0, …, C − 1 with probabilities by the softmax of C outputs.

    .. math:: P(y_i = c) = \frac{e^{f_{ic}}}{\sum_{c'} e^{f_{ic'}}}

    For networks: ``hb.likelihoods.Network(apply, init, hb.likelihoods.Categorical(5))``.

    Parameters
    ----------
    num_classes : int
        C.

    Examples
    --------
    >>> import hierbayes as hb
    >>> hb.likelihoods.Categorical(5).discrete
    True
    """

    log_concave = True
    num_classes: int
    discrete = True

    def __post_init__(self) -> None:
        try:
            num_classes = inputs.count("num_classes", self.num_classes, least=2)
        except InputError as error:
            raise InputError(f"num_classes must be 2 or more: {error}") from error
        object.__setattr__(self, "num_classes", num_classes)

    def check(self, tasks: Tasks) -> None:
        """Refuse outcomes that are no class."""
        if tasks.outcome is None:
            return
        known = np.isin(tasks.outcome, np.arange(self.num_classes))
        if not known.all():
            odd = np.flatnonzero(~known)
            task = tasks.names[tasks.task_of_row[odd[0]]]
            raise InputError(
                f"Categorical({self.num_classes}) takes outcomes 0 to {self.num_classes - 1}; "
                f"{odd.size} row(s) hold others, the first {tasks.outcome[odd[0]]:g} in task "
                f"{listing([task])}"
            )

    def family(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> dist.Distribution:
        """Categorical with logits f (n, C)."""
        del phi, slots
        return _Classes(logits=location)

    def predictive(
        self, location: Any, variance: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> Any:
        """Categorical at f (…, C); a variance of f is not integrated over, so it must be zero."""
        del phi, slots
        if np.max(variance, initial=0.0) > 0:
            raise InputError("class probabilities are computed from draws of θ, not moments")
        location = np.asarray(location, dtype=float)
        if not location.size:  # no rows, and no classes to be counted
            return ClassProbabilities(np.zeros((len(location), 0, self.num_classes)))
        return ClassProbabilities(special.softmax(location, axis=-1))

    def divergence(
        self, location: Any, other: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> jax.Array:
        """KL of two categorical distributions by their logits."""
        del phi, slots
        here, there = jax.nn.log_softmax(location), jax.nn.log_softmax(other)
        return (jnp.exp(here) * (here - there)).sum(-1)

    def curvature_bound(self, phi: dict[str, Any], slots: dict[str, Any]) -> Any:
        """diag(p) − p pᵀ has no eigenvalue above ½."""
        del phi, slots
        return 0.5

    def units(self, tasks: Tasks) -> tuple[float, float]:
        """One logit."""
        del tasks
        return 0.0, 1.0


class _Classes(dist.CategoricalLogits):
    """NumPyro's, for outcomes that are kept as floats."""

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        """The log probability of class ``value``."""
        del intermediates
        logits = jax.nn.log_softmax(self.logits)
        index = jnp.asarray(value).astype(int)[..., None]
        index = jnp.broadcast_to(index, (*jnp.shape(logits)[:-1], 1))
        return jnp.take_along_axis(logits, index, axis=-1)[..., 0]


@dataclass(frozen=True)
class ClassProbabilities:
    """Distributions over classes, (…, N, C), in the place of SciPy's, which has none for these."""

    probabilities: np.ndarray

    def logpmf(self, outcome: Any) -> np.ndarray:
        """Log probability of each observed class (…, N)."""
        index = np.asarray(outcome).astype(int)
        index = np.broadcast_to(index, self.probabilities.shape[:-1])[..., None]
        chance = np.take_along_axis(self.probabilities, index, axis=-1)[..., 0]
        return np.log(np.clip(chance, *POSSIBLE))
