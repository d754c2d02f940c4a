"""What likelihoods around a network share: its weights, its outputs, the family of the outcomes.

What a network's ``apply`` does beside what it says: mix a task's rows, or draw numbers.

A network's weights, any pytree of floats, as one vector with named entries, and back.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from hierbayes import inputs
from hierbayes.errors import InputError, listing
from hierbayes.likelihoods.base import Likelihood
from hierbayes.likelihoods.categorical import Categorical
from hierbayes.numerics import arithmetic, standard_promotion
from hierbayes.tasks import Task, Tasks

NAMED = 100_000
"""Weights up to which each has a name of its own; a million names are a burden, not a help."""


@dataclass(frozen=True, eq=False)
class Weights:
    """The vector θ and the pytree that ``apply`` takes, each from the other.

    ``template``: the pytree, of shapes; ``size``: d.
    """

    template: Any
    size: int

    @staticmethod
    def like(params: Any, dtype: str) -> Weights:
        """Of a pytree of arrays or of their shapes; refused where a leaf is no float array."""
        leaves = jax.tree_util.tree_leaves_with_path(params)
        if not leaves:
            raise InputError("the network has no weights: init gives an empty pytree")
        _refuse_statistics(params)
        for path, leaf in leaves:
            if not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.floating):
                raise InputError(
                    f"the network's weights must be arrays of floats; at "
                    f"{jax.tree_util.keystr(path)!r} init gives {_found(leaf)}. Keep what is not "
                    "learned out of them (in Equinox: eqx.partition(model, eqx.is_inexact_array))"
                )
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.dtype(dtype)), params)
        return Weights(shapes, sum(int(np.prod(s.shape)) for s in jax.tree.leaves(shapes)))

    def tree(self, vector: Any) -> Any:
        """The pytree of a vector (d,), in the vector's own precision."""
        leaves, structure = jax.tree.flatten(self.template)
        ends = np.cumsum([int(np.prod(leaf.shape)) for leaf in leaves])
        parts = jnp.split(jnp.ravel(vector), ends[:-1].tolist())
        return structure.unflatten(
            [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        )

    def vector(self, tree: Any) -> jax.Array:
        """The vector (d,) of a pytree."""
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """A name for each entry, from its place in the pytree: ``layer/w[3, 2]``."""
        if self.size > NAMED:
            return tuple(map(str, range(self.size)))
        names: list[str] = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.template):
            at = jax.tree_util.keystr(path, simple=True, separator="/")
            places = np.ndindex(leaf.shape)
            names += [f"{at}[{', '.join(map(str, i))}]" if i else at for i in places]
        return tuple(names)


STATISTICS = {"batch_stats", "running_mean", "running_var", "running_stats"}
"""What collections of running statistics are called: Linen's, and those written by hand."""


def _refuse_statistics(params: Any) -> None:
    """Refuse running statistics of norms among the weights: inner steps would move them."""
    flax, equinox = sys.modules.get("flax.nnx"), sys.modules.get("equinox")
    kinds: tuple[type, ...] = (flax.BatchStat,) if flax else ()
    kinds += (equinox.nn.State, equinox.nn.StateIndex) if equinox else ()

    def whole(node: Any) -> bool:
        # nnx.to_pure_dict keeps no kinds, only names
        norm = isinstance(node, Mapping) and {"mean", "var"} <= node.keys() <= NORM
        return norm or isinstance(node, kinds)

    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=whole):
        named = {str(getattr(part, "key", getattr(part, "name", ""))) for part in path}
        if jax.tree.leaves(node) and (whole(node) or named & STATISTICS):
            raise InputError(
                f"init gives running statistics of a norm, at {jax.tree_util.keystr(path)!r}, "
                "which are no weights: inner steps would train them. Take a norm without running "
                "statistics (LayerNorm, GroupNorm), or batch statistics of the task's own rows, "
                'and have init give the weights alone (Linen: variables["params"]; nnx: '
                "nnx.split(model, nnx.Param, …); Equinox: without the State)"
            )


NORM = {"mean", "var", "scale", "bias"}


def _found(leaf: Any) -> str:
    return f"{leaf.dtype} {leaf.shape}" if hasattr(leaf, "dtype") else type(leaf).__name__


DRAWING = {
    "random_bits", "random_seed", "random_wrap", "random_fold_in", "random_split", "threefry2x32",
    "rng_bit_generator", "rng_uniform",
}  # fmt: skip
"""JAX's operations on keys and random numbers."""

WITHOUT_DRAWS = (
    "apply(params, x) must give the same f for the same weights and rows: switch dropout off "
    "(Linen: deterministic=True; nnx: model.eval(); Equinox: eqx.nn.inference_mode(model))"
)

ROWS, OTHERS = 4, 28
"""Rows of which f is asked, two by two and among others; rows beside them at most."""

SAME = {"float32": 1e-4, "float64": 1e-8}
"""Share of the largest f that rounding may move a row's by, when other rows stand beside it."""


def draws(jaxpr: Any) -> bool:
    """Whether a program of JAX's has random numbers in it, however deep."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in inner.eqns:
        if equation.primitive.name in DRAWING:
            return True
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            if hasattr(getattr(value, "jaxpr", value), "eqns") and draws(value):
                return True
    return False


def asks_for_draws(message: str) -> bool:
    """Whether an error is that of dropout without a key."""
    return any(word in message.lower() for word in ("rng", "dropout", "prng", "'key'"))


def depends_on_other_rows(
    apply: Callable[[Any, Any], Any], initial: Callable[[Any], Any], x: Any, dtype: str
) -> bool:
    """Whether f of some rows of ``x`` (N, …) changes with the rows that stand beside them.

    Rows of zeros, which fill up, and other rows of ``x`` are put beside them, at the initial
    weights and near by: a gate that is shut at the start opens in training. The slope of f in the
    other rows counts too; it is exactly zero where rows are not mixed. An ``apply`` that does not
    take other numbers of rows counts as one that mixes them.
    """
    # may be asked inside a trace: the weights and rows are known there too
    with jax.ensure_compile_time_eval(), arithmetic(dtype):
        rows = jnp.asarray(np.asarray(x), dtype)
        if not len(rows):
            rows = jnp.ones((1, *rows.shape[1:]), dtype)
        own = rows[np.arange(ROWS) % len(rows)]
        others = jnp.concatenate([rows[::-1][:OTHERS], jnp.zeros_like(own)])
        start = initial(jax.random.key(0))
        leaves, structure = jax.tree.flatten(start)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        moved = [
            w + 0.1 * (1 + jnp.abs(w)) * jax.random.normal(k, w.shape, w.dtype)
            for w, k in zip(leaves, keys, strict=True)
        ]
        try:
            return any(
                _changes(apply, weights, own, others, SAME[dtype])
                for weights in (start, structure.unflatten(moved))
            )
        except Exception:  # whatever the user's own function raises
            return True


def _changes(apply: Any, weights: Any, own: Any, others: Any, same: float) -> bool:
    count = len(own)
    run = jax.jit(apply)
    alone = np.concatenate([run(weights, own[i : i + 2]) for i in range(0, count, 2)])
    size = np.abs(np.where(np.isfinite(alone), alone, 0.0)).max(initial=0.0)
    for beside in (others, jnp.zeros_like(others)):
        among = np.asarray(run(weights, jnp.concatenate([own, beside])))[:count]
        if not np.allclose(among, alone, rtol=0, atol=same * size, equal_nan=True):
            return True
    turned = jnp.cos(jnp.arange(alone.size, dtype=own.dtype)).reshape(alone.shape)

    def weighed(beside: Any) -> Any:
        return (turned * apply(weights, jnp.concatenate([own, beside]))[:count]).sum()

    slope = np.nan_to_num(np.asarray(jax.jit(jax.grad(weighed))(others)))
    return bool((slope != 0).any())


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

    def aggregate(self, tasks: Tasks) -> list[tuple[Any, tuple[Task, Any]]]:
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
