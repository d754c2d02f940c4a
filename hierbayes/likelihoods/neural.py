"""What likelihoods around a network share: its weights, its outputs, the family of the outcomes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from hierbayes import inputs
from hierbayes.errors import InputError, listing
from hierbayes.likelihoods.base import Likelihood
from hierbayes.likelihoods.categorical import Categorical
from hierbayes.likelihoods.probing import (
    WITHOUT_DRAWS,
    asks_for_draws,
    depends_on_other_rows,
    draws,
)
from hierbayes.likelihoods.weights import Weights
from hierbayes.numerics import arithmetic, standard_promotion
from hierbayes.tasks import Task, Tasks


class Neural(Likelihood):
    """A network and the family of the outcomes around what it says."""

    apply: Callable[[Any, Any], Any]
    init: Any
    outcome: Likelihood
    dtype: str

    @functools.cached_property
    def weights(self) -> Weights:
        """The network's weights as a vector and as the pytree that ``apply`` takes."""
        if not _is_function(self.init):
            return Weights.like(self.init, self.dtype)
        try:
            with standard_promotion():
                drawn = jax.eval_shape(self.init, jax.random.key(0))
        except Exception as error:
            raise InputError(
                "init(key) must be a JAX function that returns the weights, a pytree of float "
                f"arrays; it raised {type(error).__name__}: {_first_line(error)}"
            ) from error
        return Weights.like(drawn, self.dtype)

    def initial(self, key: Any) -> Any:
        """Weights to start from, a pytree in ``dtype``: drawn by ``init``, or as given."""
        drawn = self.init(key) if _is_function(self.init) else self.init
        return jax.tree.map(lambda x: jnp.asarray(x, dtype=self.dtype), drawn)

    @property
    def precision(self) -> str:  # type: ignore[override]
        """What the training of φ computes in."""
        return self.dtype

    def output_shape(self, x: Any, num_rows: int = 2) -> tuple[int, ...]:
        """The shape of ``apply`` on ``num_rows`` rows like ``x``, without computing; or refused."""
        rows = jax.ShapeDtypeStruct((num_rows, *np.shape(x)[1:]), jnp.dtype(self.dtype))
        try:
            with arithmetic(self.dtype):
                traced = jax.make_jaxpr(self.apply, return_shape=True)
                jaxpr, out = traced(self.weights.template, rows)
        except Exception as error:
            said = f"{type(error).__name__}: {_first_line(error)}".rstrip(".")
            hint = f". {WITHOUT_DRAWS}" if asks_for_draws(said) else ""
            raise InputError(
                f"apply does not take these tasks' rows: x of shape {rows.shape} gives {said}{hint}"
            ) from error
        if not hasattr(out, "shape"):
            raise InputError(
                f"apply must return one array, f of every row; it returns {type(out).__name__}"
            )
        if draws(jaxpr):
            raise InputError(
                f"apply draws random numbers, as dropout and noise do. {WITHOUT_DRAWS}; what stays "
                "as it was drawn once, draw outside of apply"
            )
        return tuple(out.shape)

    # ------------------------------------------------------- many tasks at once

    def mixes_rows(self, x: Any) -> bool:
        """Whether f of a row depends on the task's other rows, as under batch norm or attention.

        Tried on rows like ``x`` (N, …), once for each shape of a row.
        """
        shape = np.shape(x)[1:]
        if shape not in self._mixing:
            self._mixing[shape] = depends_on_other_rows(self.apply, self.initial, x, self.dtype)
        return self._mixing[shape]

    @functools.cached_property
    def _mixing(self) -> dict[tuple[int, ...], bool]:
        return {}

    def blocks(self, tasks: Tasks) -> list[tuple[np.ndarray, Task]]:
        """(positions of tasks, these side by side), tasks without rows in none.

        Tasks of one size, and whatever their sizes where rows depend on one another, as they are;
        others filled up to powers of two.
        """
        exact = _of_one_size(tasks) or self.mixes_rows(tasks.predictors)
        return tasks.alike() if exact else tasks.blocks()

    def arrange(self, tasks: Tasks) -> tuple[Task, None]:
        """Tasks side by side, filled up to the longest: a network is run once for a task.

        Refused where tasks of several sizes would have to be filled up and rows depend on others.
        """
        if not _of_one_size(tasks) and self.mixes_rows(tasks.predictors):
            refuse_filling(tasks.sizes)
        width = int(tasks.sizes.max(initial=1))
        return tasks.block(np.arange(tasks.num_tasks), width), None

    def arrange_alike(self, tasks: Tasks) -> list[tuple[Any, tuple[Task, Any]]]:
        """As :meth:`blocks`."""
        return [(positions, (block, None)) for positions, block in self.blocks(tasks)]

    @property
    def discrete(self) -> bool:  # type: ignore[override]
        """True where outcomes are counts or categories."""
        return self.outcome.discrete

    def parameters(self) -> tuple[str, ...]:
        """Names of the family's own parameters in φ."""
        return self.outcome.parameters()

    def family(
        self, location: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> dist.Distribution:
        """The family of the outcomes around f."""
        return self.outcome.family(location, phi, slots)

    def predictive(
        self, location: Any, variance: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> Any:
        """The outcomes' distribution where f is normal with these moments."""
        return self.outcome.predictive(location, variance, phi, slots)

    def divergence(
        self, location: Any, other: Any, phi: dict[str, Any], slots: dict[str, Any]
    ) -> jax.Array:
        """KL(p(y | f) ‖ p(y | f′)) of each row."""
        return self.outcome.divergence(location, other, phi, slots)

    def curvature_bound(self, phi: dict[str, Any], slots: dict[str, Any]) -> Any:
        """The largest curvature in f; none is known in θ."""
        return self.outcome.curvature_bound(phi, slots)

    def units(self, tasks: Tasks) -> tuple[float, float]:
        """Where f lies and how far it spreads."""
        return self.outcome.units(tasks)


def _of_one_size(tasks: Tasks) -> bool:
    return len(np.unique(tasks.sizes[tasks.sizes > 0])) <= 1


def refuse_filling(sizes: Any) -> None:
    """Refuse tasks of these sizes for a network whose rows depend on one another."""
    some = np.unique(np.asarray(sizes)[np.asarray(sizes) > 0])
    raise InputError(
        "what apply says of a row depends on the task's other rows (batch norm, or attention over "
        f"them), and these tasks have {listing(some.tolist())} rows: side by side the shorter ones "
        "would be filled up with rows that are not theirs. Give tasks of one size, or "
        "hb.Episodes.from_tasks(tasks, shots=…, queries=…), which draws as many rows of each"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _is_function(init: Any) -> bool:
    """Whether ``init`` makes weights; a module that holds some (Equinox's) can be called too."""
    leaves = [] if isinstance(init, jax.tree_util.Partial) else jax.tree.leaves(init)
    return callable(init) and not any(isinstance(x, (jax.Array, np.ndarray)) for x in leaves)


def squeezed(f: Any, outcome: Likelihood) -> Any:
    """f (n,) of one output a row; (n, C) of classes as it is."""
    single = f.ndim == 2 and f.shape[-1] == 1 and not isinstance(outcome, Categorical)
    return f[:, 0] if single else f


def check_neural(likelihood: Any) -> None:
    """Refuse an ``apply`` that is no function, and another precision than the two."""
    if not callable(likelihood.apply):
        raise InputError(f"apply must be a function of (params, x), found {likelihood.apply!r}")
    inputs.one_of("dtype", likelihood.dtype, ("float32", "float64"))


def refuse_extras(likelihood: Likelihood, tasks: Tasks) -> None:
    """Refuse shared columns, task covariates and slots, which a network would ignore."""
    extra = [*tasks.labels.shared, *tasks.labels.task_predictors, *tasks.slots]
    if extra:
        raise InputError(
            f"{type(likelihood).__name__} takes x and y alone and would ignore "
            f"{', '.join(map(repr, extra))}; make the tasks without, or as columns of x"
        )


def without_x(tasks: Tasks) -> Tasks:
    """The tasks for a family to judge their outcomes; x may be images, which the network reads."""
    return replace(tasks, predictors=np.zeros((tasks.num_rows, 0)))


def perceptron(
    sizes: Any, activation: Callable[[Any], Any]
) -> tuple[Callable[[Any, Any], Any], Callable[[Any], Any]]:
    """(apply, init) of a multilayer perceptron."""
    try:
        read = tuple(inputs.count("sizes", size) for size in sizes)
    except (TypeError, InputError):
        read = ()
    if len(read) < 2:
        found = inputs.shown(sizes)
        raise InputError(f"sizes must be two or more positive numbers, found {found}")
    sizes = read

    # partials, for functions made here could not be pickled
    # and JAX's functions by their names, for those do not find themselves where pickle looks
    name, rooms = getattr(activation, "__name__", ""), {"numpy": jnp, "nn": jax.nn}
    found = [room for room, m in rooms.items() if getattr(m, name, None) is activation]
    chosen = (found[0], name) if found else activation
    return functools.partial(_apply, chosen), functools.partial(_initial, sizes)


def _initial(sizes: tuple[int, ...], key: Any) -> Any:
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [
        {"w": jax.random.truncated_normal(k, -2.0, 2.0, (a, b)) / a**0.5, "b": jnp.zeros(b)}
        for k, a, b in shapes
    ]


def _apply(activation: Any, params: Any, x: Any) -> Any:
    if isinstance(activation, tuple):
        room, name = activation
        activation = getattr(jnp if room == "numpy" else jax.nn, name)
    *hidden, last = params
    for layer in hidden:
        x = activation(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]
