r"""Tasks over many devices and hosts, in JAX's own terms.

.. math:: \log p(D \mid \varphi) = \sum_{k=1}^{K} \; \sum_{j \in \text{device } k}
          \log p(D_j \mid \varphi)

Tasks meet in sums alone. Arrays with a task's axis lie spread over a mesh, compiled programs run
on every device's share, and XLA adds the partial sums. Empty tasks fill the axis up to a length
that other data of about the same size have too, so that these compile nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hierbayes.errors import InputError, suggestion
from hierbayes.numerics import to_numpy


def sharding_over(mesh: Any, axis: str | Sequence[str] | None = None) -> NamedSharding:
    """The sharding of a task's axis over one or more axes of a mesh.

    Parameters
    ----------
    mesh : jax.sharding.Mesh
    axis : str or sequence of str, optional
        Axes of the mesh; the first by default. Over the other axes arrays are repeated.

    Returns
    -------
    jax.sharding.NamedSharding

    Raises
    ------
    InputError
        For what is no mesh, a mesh without devices of this process, or an axis that it does not
        have.

    Examples
    --------
    >>> import jax
    >>> from hierbayes.sharding import num_shares, sharding_over
    >>> num_shares(sharding_over(jax.make_mesh((1,), ("tasks",))))
    1
    """
    if not isinstance(mesh, Mesh):
        raise InputError(
            f"expected a jax.sharding.Mesh, found {type(mesh).__name__}; "
            'jax.make_mesh((jax.device_count(),), ("tasks",)) makes one of all devices'
        )
    if not mesh.axis_names:
        raise InputError("the mesh has no axis to spread tasks over")
    if not mesh.local_devices:
        raise InputError(
            f"process {jax.process_index()} has no device in the mesh: make it of jax.devices(), "
            "the devices of all processes"
        )
    axes = (mesh.axis_names[0],) if axis is None else (axis,) if isinstance(axis, str) else axis
    names = tuple(axes)
    for name in names:
        if name not in mesh.axis_names:
            known = [str(known) for known in mesh.axis_names]
            raise InputError(f"the mesh has no axis {name!r}; {suggestion(str(name), known)}")
    if not names or len(set(names)) < len(names):
        raise InputError(f"name one or more different axes of the mesh, found {axis!r}")
    # with explicit axes, jax.make_mesh's default, programs would have to place every intermediate
    # array themselves; XLA does that here
    automatic = Mesh(mesh.devices, mesh.axis_names)
    return NamedSharding(automatic, PartitionSpec(names[0] if len(names) == 1 else names))


def num_shares(sharding: NamedSharding) -> int:
    """Into how many parts a task's axis is cut."""
    (names,) = sharding.spec
    axes = (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in axes)


FINE = 2**13
"""From which on arrays take so long to compute with that they are filled up by less."""


def rung(length: int) -> int:
    """The next of eight lengths an octave, 64 of more than 8192: what arrays are filled up to.

    >>> [rung(n) for n in (0, 7, 13, 17, 85, 919, 100_000)]
    [1, 7, 13, 18, 88, 960, 100352]
    """
    if length <= 8:
        return max(length, 1)
    step = 2 ** max((length - 1).bit_length() - (4 if length <= FINE else 7), 0)
    return -(-length // step) * step


def padded(length: int, sharding: NamedSharding | None) -> int:
    """The length that an axis is filled up to, with as many places on every device."""
    shares = 1 if sharding is None else num_shares(sharding)
    return shares * rung(-(-length // shares))


def place(tree: Any, sharding: NamedSharding | None, axis: int = -1) -> Any:
    """Every array of a pytree on the devices, its ``axis`` of tasks filled up with zeros and cut.

    Each process puts on its own devices only what they hold. Without a sharding arrays stay in
    NumPy.
    """

    def put(values: Any) -> Any:
        values = np.asarray(values)
        at = axis % values.ndim
        filled = filled_up(values, padded(values.shape[at], sharding), at)
        if sharding is None:
            return filled
        filled = filled.astype(jax.dtypes.canonicalize_dtype(filled.dtype), copy=False)
        spec = PartitionSpec(*[None] * at, *sharding.spec)
        spread = NamedSharding(sharding.mesh, spec)
        return jax.make_array_from_callback(filled.shape, spread, lambda index: filled[index])

    return jax.tree.map(put, tree)


def on_device(tree: Any) -> Any:
    """NumPy arrays of a pytree on the device; arrays that are on devices stay as they are.

    ``jnp.asarray`` would compile a copy for every new shape.
    """
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jax.device_put(x), tree)


def filled_up(values: np.ndarray, length: int, axis: int = -1, fill: Any = 0) -> np.ndarray:
    """The array with ``fill`` at the end of an axis, up to this length."""
    at = axis % values.ndim
    if values.shape[at] == length:
        return values
    lacking = [(0, length - n if i == at else 0) for i, n in enumerate(values.shape)]
    return np.pad(values, lacking, constant_values=fill)


def gathered(tree: Any, num_tasks: int, axis: int = 0) -> Any:
    """Every array of a pytree whole, in NumPy, without the tasks that filled up its ``axis``.

    Where devices belong to several processes this is a collective: all must call it.
    """
    cut = (slice(None),) * axis + (slice(num_tasks),)
    return jax.tree.map(lambda values: values[cut], to_numpy(tree))
