"""A network for every task: θ_j are its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from hierbayes import inputs
from hierbayes.errors import InputError
from hierbayes.likelihoods.base import Likelihood
from hierbayes.likelihoods.categorical import Categorical
from hierbayes.likelihoods.gaussian import Gaussian
from hierbayes.likelihoods.neural import (
    Neural,
    check_neural,
    perceptron,
    refuse_extras,
    squeezed,
    without_x,
)
from hierbayes.tasks import Task, Tasks


@dataclass(frozen=True, eq=False)
class Network(Neural):
    r"""Outcomes around what a network with a task's own weights says.

    .. math:: y_{ij} \sim p(y \mid f_{ij}), \qquad f_{ij} = \mathrm{apply}(\theta_j, x_{ij})

    Parameters
    ----------
    apply : callable
        ``apply(params, x)`` → f: x (n, …) of any shape, images too; f (n,) or (n, 1), or (n, C)
        for C classes. Plain JAX, ``flax_module.apply``, or Equinox by
        ``lambda params, x: jax.vmap(eqx.combine(params, static))(x)``. x are rows of one task, and
        of one part of it: f of a row may depend on the others, as under batch norm. It must not
        draw random numbers, as dropout does, nor keep running statistics.
    init : callable or pytree
        ``init(key)`` → params, any pytree of float arrays; or the params to start from.
    outcome : Likelihood
        The family of y around f: ``Gaussian()``, ``Categorical(C)`` or ``Bernoulli()``.
    dtype : str
        "float32" or "float64", for weights and training.

    Examples
    --------
    >>> import jax.numpy as jnp, hierbayes as hb
    >>> def init(key):
    ...     return {"slope": jnp.ones((1,)), "level": jnp.zeros(())}
    >>> line = hb.likelihoods.Network(lambda p, x: x @ p["slope"] + p["level"], init)
    >>> line.weights.names
    ('level', 'slope[0]')

    A ready-made one:

    >>> hb.likelihoods.Network.mlp([1, 40, 40, 1]).weights.size
    1761
    """

    apply: Callable[[Any, Any], Any]
    init: Any
    outcome: Likelihood = field(default_factory=Gaussian)
    dtype: str = "float32"
    linear = False

    def __post_init__(self) -> None:
        check_neural(self)
        if not isinstance(self.outcome, Likelihood) or isinstance(self.outcome, Neural):
            raise InputError(
                "Network(outcome=…) takes the family of the outcomes, hb.likelihoods.Gaussian(), "
                f"Categorical(C) or Bernoulli(); found {inputs.shown(self.outcome)}"
            )

    @staticmethod
    def mlp(
        sizes: Sequence[int],
        outcome: Likelihood | None = None,
        activation: Callable[[Any], Any] = jax.nn.relu,
        dtype: str = "float32",
    ) -> Network:
        """A multilayer perceptron of these layer sizes, input and output included.

        Weights start as truncated normals of sd 1/√(inputs), cut at two sds; biases at zero.
        """
        apply, init = perceptron(sizes, activation)
        return Network(apply, init, Gaussian() if outcome is None else outcome, dtype)

    def location(self, theta: Any, phi: dict[str, Any], task: Task) -> Any:
        """What the network with weights ``theta``, a vector or the pytree itself, says of x."""
        del phi
        params = self.weights.tree(theta) if isinstance(theta, (jax.Array, np.ndarray)) else theta
        return squeezed(self.apply(params, task.predictors), self.outcome)

    def tree(self, theta: Any) -> Any:
        """The pytree that ``apply`` takes, of a vector θ (d,)."""
        return self.weights.tree(theta)

    def vector(self, theta: Any) -> Any:
        """θ (d,) of the pytree that ``apply`` takes."""
        return self.weights.vector(theta)

    def named(self, tasks: Tasks) -> Tasks:
        """The tasks with the weights' names in the place of their columns'."""
        if tasks.labels.coef is self.weights.names:
            return tasks
        return replace(tasks, labels=replace(tasks.labels, coef=self.weights.names))

    def check(self, tasks: Tasks) -> None:
        """Refuse rows that ``apply`` does not take, and outputs that are not the family's."""
        refuse_extras(self, tasks)
        self.outcome.check(without_x(tasks))
        shape = self.output_shape(tasks.predictors)
        if isinstance(self.outcome, Categorical):
            if shape != (2, self.outcome.num_classes):
                raise InputError(
                    f"apply gives an array of shape {shape} for 2 rows; Categorical("
                    f"{self.outcome.num_classes}) needs (2, {self.outcome.num_classes})"
                )
        elif shape not in ((2,), (2, 1)):
            raise InputError(
                f"apply gives an array of shape {shape} for 2 rows; one outcome a row needs (2,) "
                "or (2, 1)"
            )
