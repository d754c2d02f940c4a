"""One array whose entries come from several distributions.

A coefficient may have a prior of its own; a mean may be pinned at zero; correlations may be
confined to blocks. NumPyro sees each as a single site: the parts say where in the array they go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform, biject_to

Part = tuple[dist.Distribution, tuple[Any, ...]]


class _Constant:
    """A pytree without leaves."""

    def tree_flatten(self) -> Any:
        return (), self

    @classmethod
    def tree_unflatten(cls, aux_data: Any, params: Any) -> Any:
        return aux_data


class _Layout:
    """Places and background, compared by value, so that equal layouts share compiled programs."""

    def __init__(self, places: Sequence[tuple[Any, ...]], background: np.ndarray):
        self.places, self.background = tuple(places), background
        self._key = (
            tuple(tuple(map(_token, index)) for index in self.places), _token(background)
        )  # fmt: skip

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Layout) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _token(index: Any) -> Any:
    """Something hashable that tells one index, or one array, from another."""
    if isinstance(index, slice):
        return ("slice", index.start, index.stop, index.step)
    array = np.asarray(index)
    return (array.dtype.str, array.shape, array.tobytes())


class Assembled(dist.Distribution):
    """Independent parts placed in a constant background array.

    Parameters
    ----------
    parts : sequence of (distribution, index)
        Each part's value is written to ``array[index]``; the index names every axis.
    background : array
        The entries that no part covers, and the shape.
    """

    def __init__(self, parts: Sequence[Part], background: Any, *, validate_args: Any = None):
        self.parts = tuple(parts)
        self.background = np.asarray(background, dtype=float)
        super().__init__(
            batch_shape=(), event_shape=self.background.shape, validate_args=validate_args
        )

    def tree_flatten(self) -> Any:
        """The parts' own numbers are leaves; where they stand is structure."""
        layout = _Layout([index for _, index in self.parts], self.background)
        return tuple(part for part, _ in self.parts), layout

    @classmethod
    def tree_unflatten(cls, aux_data: Any, params: Any) -> Any:
        """The distribution again."""
        whole = cls.__new__(cls)
        whole.parts = tuple(zip(params, aux_data.places, strict=True))
        whole.background = aux_data.background
        dist.Distribution.__init__(
            whole, batch_shape=(), event_shape=whole.background.shape, validate_args=False
        )
        return whole

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """Each part in its own support, the background as it is."""
        return _AssembledConstraint(self)

    def sample(self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draw every part and put it in its place."""
        assert key is not None
        keys = jax.random.split(key, max(len(self.parts), 1))
        draws = [p.sample(k, sample_shape) for k, (p, _) in zip(keys, self.parts, strict=False)]
        return self.place(draws, sample_shape)

    def place(self, values: Sequence[Any], lead: tuple[int, ...] = ()) -> jax.Array:
        """The array with ``values`` in the places of the parts."""
        array = jnp.broadcast_to(jnp.asarray(self.background), (*lead, *self.background.shape))
        for value, (_, index) in zip(values, self.parts, strict=True):
            array = array.at[(..., *index)].set(value)
        return array

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        """Sum of the parts' log densities."""
        total = jnp.zeros(jnp.shape(value)[: jnp.ndim(value) - self.event_dim])
        for part, index in self.parts:
            total = total + part.log_prob(value[(..., *index)])
        return total


def _support(part: dist.Distribution) -> Any:
    return part.support


class _AssembledConstraint(_Constant, constraints.Constraint):
    def __init__(self, whole: Assembled):
        self.whole = whole

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        return self.whole.event_dim

    def __call__(self, x: Any) -> Any:
        checks = [_support(p)(x[(..., *index)]) for p, index in self.whole.parts]
        return jnp.all(jnp.stack([jnp.all(c) for c in checks])) if checks else jnp.asarray(True)

    def feasible_like(self, prototype: Any) -> Any:
        parts = [_support(p).feasible_like(prototype[(..., *i)]) for p, i in self.whole.parts]
        return self.whole.place(parts, jnp.shape(prototype)[: -self.event_dim])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _AssembledConstraint) and other.whole is self.whole

    def __hash__(self) -> int:
        return id(self.whole)


class _AssembledTransform(_Constant, Transform):
    """From one unconstrained vector to the array, part by part."""

    def __init__(self, whole: Assembled):
        self.whole = whole
        self.pieces = []
        start = 0
        for part, _ in whole.parts:
            transform = biject_to(part.support)
            shape = transform.inverse_shape(part.shape())
            size = int(np.prod(shape, dtype=int))
            self.pieces.append((transform, shape, slice(start, start + size)))
            start += size
        self.size = start

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.real_vector

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.whole.support

    def __call__(self, x: Any) -> Any:
        lead = jnp.shape(x)[:-1]
        values = [t(x[..., at].reshape(lead + shape)) for t, shape, at in self.pieces]
        return self.whole.place(values, lead)

    def _inverse(self, y: Any) -> Any:
        lead = jnp.shape(y)[: jnp.ndim(y) - self.whole.event_dim]
        flat = [
            t._inverse(y[(..., *index)]).reshape((*lead, -1))
            for (t, _, _), (_, index) in zip(self.pieces, self.whole.parts, strict=True)
        ]
        return jnp.concatenate(flat, axis=-1) if flat else jnp.zeros((*lead, 0))

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Any:
        lead = jnp.shape(x)[:-1]
        total = jnp.zeros(lead)
        for (t, shape, at), (_, index) in zip(self.pieces, self.whole.parts, strict=True):
            value = x[..., at].reshape(lead + shape)
            jacobian = t.log_abs_det_jacobian(value, y[(..., *index)])
            extra = jnp.ndim(jacobian) - len(lead)
            total = total + jnp.sum(jacobian, axis=tuple(range(-extra, 0)))
        return total

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], *self.whole.event_shape)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[: len(shape) - self.whole.event_dim], self.size)


@biject_to.register(_AssembledConstraint)
def _biject_assembled(constraint: _AssembledConstraint) -> _AssembledTransform:
    return _AssembledTransform(constraint.whole)
