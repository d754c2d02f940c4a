"""A network's weights, any pytree of floats, as one vector with named entries, and back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.errors import InputError

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
