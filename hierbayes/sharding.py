r"""Tasks over many devices and hosts, in JAX's own terms.

.. math:: \log p(D \mid \varphi) = \sum_{k=1}^{K} \; \sum_{j \in \text{device } k}
          \log p(D_j \mid \varphi)

Tasks meet in sums alone. Arrays with a task's axis lie spread over a mesh, compiled programs run
on every device's share, and XLA adds the partial sums. Empty tasks fill the axis up to a multiple
of the number of devices.
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


def padded(length: int, sharding: NamedSharding) -> int:
    """The next multiple of the number of shares, at least one a share."""
    shares = num_shares(sharding)
    return shares * max(1, -(-length // shares))


def place(tree: Any, sharding: NamedSharding | None, axis: int = -1) -> Any:
    """Every array of a pytree on the devices, its ``axis`` of tasks filled up with zeros and cut.

    Each process puts on its own devices only what they hold. Without a sharding the tree is
    returned as it is.
    """
    if sharding is None:
        return tree

    def put(values: Any) -> jax.Array:
        values = np.asarray(values)
        values = values.astype(jax.dtypes.canonicalize_dtype(values.dtype), copy=False)
        at = axis % values.ndim
        lacking = padded(values.shape[at], sharding) - values.shape[at]
        fill = [(0, lacking if i == at else 0) for i in range(values.ndim)]
        filled = np.pad(values, fill)
        spec = PartitionSpec(*[None] * at, *sharding.spec)
        spread = NamedSharding(sharding.mesh, spec)
        return jax.make_array_from_callback(filled.shape, spread, lambda index: filled[index])

    return jax.tree.map(put, tree)


def gathered(tree: Any, num_tasks: int, axis: int = 0) -> Any:
    """Every array of a pytree whole, in NumPy, without the tasks that filled up its ``axis``.

    Where devices belong to several processes this is a collective: all must call it.
    """
    cut = (slice(None),) * axis + (slice(num_tasks),)
    return jax.tree.map(lambda values: values[cut], to_numpy(tree))
