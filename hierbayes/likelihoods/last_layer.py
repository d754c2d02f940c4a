"""Linear tasks on features that a network shared by all tasks learns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.errors import InputError
from hierbayes.likelihoods.base import Likelihood
from hierbayes.likelihoods.gaussian import Gaussian
from hierbayes.likelihoods.neural import (
    Neural,
    check_neural,
    perceptron,
    refuse_extras,
    without_x,
)
from hierbayes.numerics import arithmetic
from hierbayes.phi import Part
from hierbayes.tasks import Task, Tasks


@dataclass(frozen=True, eq=False)
class LastLayer(Neural):
    r"""Normal outcomes, linear in θ_j on features whose weights ω all tasks share.

    .. math:: y_{ij} \sim N\!\left(h(x_{ij}; \omega)^\top \theta_j,\; \sigma^2\right), \qquad
              \omega = \varphi_{\text{features}}

    θ_j is the last layer alone, so that evidence and posterior are exact given φ. With
    ``hb.empirical_bayes`` this is ALPaCA, and deep-kernel transfer with a linear kernel; with
    ``hb.maml`` it is ANIL, whose inner loop moves the last layer only.

    Parameters
    ----------
    apply : callable
        ``apply(params, x)`` → h (n, d), the features of every row.
    init : callable or pytree
        ``init(key)`` → params, any pytree of float arrays; or the params to start from.
    intercept : bool
        Put a constant feature 1 before the d.
    dtype : str
        "float32" or "float64" for the network; the algebra of θ is float64 always.

    References
    ----------
    Harrison, Sharma and Pavone (2018), Meta-learning priors for efficient online Bayesian
    regression (ALPaCA). Patacchiola et al. (2020), Bayesian meta-learning for the few-shot setting
    via deep kernels (DKT). Raghu et al. (2020), Rapid learning or feature reuse? (ANIL), ICLR.

    Examples
    --------
    >>> import hierbayes as hb
    >>> head = hb.likelihoods.LastLayer.mlp([1, 40, 40])
    >>> head.weights.size, head.gaussian_in_theta
    (1720, True)
    """

    apply: Callable[[Any, Any], Any]
    init: Any
    intercept: bool = True
    dtype: str = "float32"
    outcome: Likelihood = field(default_factory=Gaussian)
    linear, gaussian_in_theta = True, True

    def __post_init__(self) -> None:
        check_neural(self)
        if not isinstance(self.outcome, Gaussian) or self.outcome.known_se:
            raise InputError("LastLayer is exact for hb.likelihoods.Gaussian() outcomes only")

    @staticmethod
    def mlp(
        sizes: Sequence[int],
        activation: Callable[[Any], Any] = jax.nn.relu,
        intercept: bool = True,
        dtype: str = "float32",
    ) -> LastLayer:
        """Features by a multilayer perceptron; its last layer is activated too."""
        apply, init = perceptron(sizes, activation)
        return LastLayer(lambda params, x: activation(apply(params, x)), init, intercept, dtype)

    def parts(self, shared: Sequence[str]) -> list[Part]:
        """What every likelihood owns of φ, and the features' weights."""
        features = Part("features", ("weight",), (self.weights.size,))
        return [*Likelihood.parts(self, shared), features]

    def features(self, phi: dict[str, Any], x: Any) -> Any:
        """h (n, d) of rows x under φ, the constant included."""
        weights = jnp.asarray(phi["features"])
        h = self.apply(self.weights.tree(weights), jnp.asarray(x, weights.dtype))
        return jnp.concatenate([jnp.ones((len(h), 1), h.dtype), h], 1) if self.intercept else h

    def location(self, theta: Any, phi: dict[str, Any], task: Task) -> Any:
        """hᵀθ (n,), for one θ (d,) or each row's own (n, d)."""
        return (self.features(phi, task.predictors) * theta).sum(-1)

    def num_features(self, x: Any) -> int:
        """d, the length of θ, from the shapes of rows x."""
        shape = self.output_shape(x)
        if len(shape) != 2 or shape[0] != 2:
            raise InputError(
                f"apply gives an array of shape {shape} for 2 rows; features need (2, d)"
            )
        return shape[1] + self.intercept

    def named(self, tasks: Tasks) -> Tasks:
        """The tasks with the features' names in the place of their columns'."""
        names = _names(self.num_features(tasks.predictors), self.intercept)
        if tasks.labels.coef == names:
            return tasks
        return replace(tasks, labels=replace(tasks.labels, coef=names))

    def design(self, tasks: Tasks, phi: dict[str, Any]) -> Tasks:
        """The tasks with their features in the place of x: ordinary linear tasks under φ."""
        if tasks.num_rows == 0:
            d = self.num_features(tasks.predictors)
            return replace(tasks, predictors=np.zeros((0, d)))
        weights = np.asarray(phi["features"], dtype=self.dtype)
        x = np.asarray(tasks.predictors, dtype=self.dtype)
        h = np.zeros((tasks.num_rows, self.num_features(x)))
        with arithmetic(self.dtype):
            for positions, block in self.blocks(replace(tasks, predictors=x)):
                found = np.asarray(_features(self, weights, block.predictors), dtype=np.float64)
                sizes = tasks.sizes[positions]
                # rows of one task stand together, in the order of the block's
                rows = np.repeat(tasks.starts[positions], sizes) + _within(sizes)
                h[rows] = found[np.asarray(block.mask)]
        return replace(tasks, predictors=h)

    def check(self, tasks: Tasks) -> None:
        """Refuse rows that ``apply`` does not take."""
        refuse_extras(self, tasks)
        self.outcome.check(without_x(tasks))
        self.num_features(tasks.predictors)


@functools.partial(jax.jit, static_argnums=0)
def _features(likelihood: LastLayer, weights: Any, x: Any) -> Any:
    """h (J, n, d) of tasks side by side: apply sees one task at a time."""
    return jax.vmap(lambda rows: likelihood.features({"features": weights}, rows))(x)


def _within(sizes: np.ndarray) -> np.ndarray:
    """0, …, n_j − 1 for each of some sizes, one after another."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


@functools.lru_cache(maxsize=64)
def _names(d: int, intercept: bool) -> tuple[str, ...]:
    named = [f"h{i}" for i in range(d - intercept)]
    return ("Intercept", *named) if intercept else tuple(named)
