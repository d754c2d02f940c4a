"""Float64 without touching the user's flags, and small linear algebra that XLA can fuse.

The algebra of one task is d × d with d small, and there may be a million tasks. A LAPACK call a
task costs more than the arithmetic, so for d ≤ 4 the factorisations are written out; the tasks
stand on the last axis, where XLA turns every line into one vectorised loop.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes import inputs

T = TypeVar("T")

UNROLL_UP_TO = 4

LAPACK_UP_TO = 16
"""Above, LAPACK starts threads of its own inside XLA's: on two cores two calls may never end."""


_PROCESS = [os.getpid()]
"""The process in which JAX may compute: which has imported this, or was forked before JAX ran."""


def refuse_fork() -> None:
    """Refuse a fork after JAX has computed: its threads are gone, and all would wait for them."""
    if os.getpid() == _PROCESS[0]:
        return
    try:
        from jax._src.xla_bridge import backends_are_initialized as started
    except ImportError:  # private, so perhaps not there: then the process waits, as others do
        return
    if started():
        raise RuntimeError(
            "this process was forked from one in which JAX had computed already, and would wait "
            "for ever: start processes by multiprocessing.get_context('spawn') or 'forkserver', or "
            "fork before anything is fitted"
        )
    _PROCESS[0] = os.getpid()


def float64() -> Any:
    """Context in which JAX computes in float64, whatever the user's flags say."""
    return arithmetic("float64")


@contextlib.contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Context in which JAX computes in "float32" or "float64", whatever the user's flags say.

    It promotes types and ranks as it does by default: what a user has forbidden of their own code
    is not forbidden of this package's.
    """
    refuse_fork()
    with jax.enable_x64(precision == "float64"), standard_promotion():
        yield


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """Context in which JAX promotes types and ranks by default, in the precision that is set."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def to_numpy(tree: Any) -> Any:
    """Every JAX array of a pytree as a NumPy array.

    A JAX float64 array used outside the context would silently turn to float32; a NumPy array
    does not. An array whose parts lie with several processes is gathered, by all of them.
    """
    return jax.tree.map(lambda x: _whole(x) if isinstance(x, jax.Array) else x, tree)


def _whole(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(x, tiled=True))


def one_behind(values: Iterable[T]) -> Iterator[T]:
    """The same values, each when the next is there: what JAX has begun is not waited for."""
    held: list[T] = []
    for value in values:
        held.append(value)
        if len(held) > 1:
            yield held.pop(0)
    yield from held


def as_key(seed: Any) -> jax.Array:
    """A typed JAX key from an integer seed or a key (an old-style uint32 key too)."""
    refuse_fork()
    seed = inputs.seed(seed)
    if isinstance(seed, int):
        with jax.enable_x64(True):  # in 32 bits 2**32 would be the same seed as 0
            return jax.random.key(seed)
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return seed
    return jax.random.wrap_key_data(seed)


def as_rng(seed: Any) -> np.random.Generator:
    """A NumPy generator from an integer seed or a JAX key."""
    seed = inputs.seed(seed)
    if isinstance(seed, int):
        return np.random.default_rng(seed)
    return np.random.default_rng(np.asarray(jax.random.key_data(as_key(seed))))


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Product over the two leading axes, (i, k, …) · (k, l, …) → (i, l, …)."""
    if a.ndim == 2:
        return a @ b
    if a.shape[1] > UNROLL_UP_TO:
        return (a[:, :, None] * b[None, :, :]).sum(1)
    return total(a[:, k, None] * b[None, k] for k in range(a.shape[1]))


def matvec(a: jax.Array, x: jax.Array) -> jax.Array:
    """Product over the leading axes, (i, k, …) · (k, …) → (i, …)."""
    if a.shape[1] > UNROLL_UP_TO:
        return (a * x[None]).sum(1)
    return total(a[:, k] * x[None, k] for k in range(a.shape[1]))


def total(terms: Iterable[jax.Array]) -> jax.Array:
    """The sum written out, which XLA fuses into one pass; a reduction it would loop over."""
    return functools.reduce(operator.add, terms)


def cholesky(a: jax.Array) -> jax.Array:
    """Lower Cholesky factor of (d, d, …) matrices, the batch on the trailing axes."""
    d = a.shape[0]
    if d > UNROLL_UP_TO:
        factor = jnp.linalg.cholesky(jnp.moveaxis(a, (0, 1), (-2, -1)))
        return jnp.moveaxis(factor, (-2, -1), (0, 1))
    zero = jnp.zeros_like(a[0, 0])
    rows: list[list[jax.Array]] = [[zero] * d for _ in range(d)]
    for j in range(d):
        pivot = a[j, j]
        for k in range(j):
            pivot = pivot - rows[j][k] ** 2
        rows[j][j] = jnp.sqrt(pivot)
        for i in range(j + 1, d):
            value = a[i, j]
            for k in range(j):
                value = value - rows[i][k] * rows[j][k]
            rows[i][j] = value / rows[j][j]
    return jnp.stack([jnp.stack(row) for row in rows])


def eliminate(a: jax.Array, b: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """d rows C_i (P, …) and pivots p_i (…) with bᵀ a⁻¹ b = Σ_i C_i C_iᵀ / p_i and |a| = ∏ p_i.

    Gauss's elimination of positive definite (d, d, …) matrices from (d, P, …) columns: what a
    Cholesky factor gives, without its roots and with a division a pivot. Lists, because what is
    stacked XLA writes to memory.
    """
    if a.shape[0] > UNROLL_UP_TO:
        factor = cholesky(a)
        diagonal = jnp.stack([factor[i, i] for i in range(len(factor))])
        return list(solve_lower(factor, b) * diagonal[:, None]), list(diagonal**2)
    columns, pivots, _ = _eliminated(a, list(b))
    return columns, pivots


def normal_draw(precision: jax.Array, pull: jax.Array, white: jax.Array) -> list[jax.Array]:
    """x ~ N(P⁻¹ r, P⁻¹) for (d, d, …) precisions P, d rows, from (d, …) pulls r and white noise."""
    d = precision.shape[0]
    if d > UNROLL_UP_TO:
        factor = cholesky_without_threads(precision)
        return list(solve_upper(factor, solve_lower(factor, pull) + white))
    columns, pivots, multiples = _eliminated(precision, list(pull))
    x: list[Any] = [None] * d
    for i in reversed(range(d)):
        inverse = 1.0 / pivots[i]
        x[i] = columns[i] * inverse + white[i] * jnp.sqrt(inverse)
        for k in range(i + 1, d):
            x[i] = x[i] - multiples[k, i] * x[k]
    return x


def _eliminated(
    a: jax.Array, columns: list[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array], dict[tuple[int, int], jax.Array]]:
    """Rows after elimination, pivots, and the multiple (i, k) of row k taken from row i."""
    d, columns, multiples = len(a), list(columns), {}
    rows = [[a[i, j] for j in range(i + 1)] for i in range(d)]
    for k in range(d):
        inverse = 1.0 / rows[k][k]
        for i in range(k + 1, d):
            multiples[i, k] = rows[i][k] * inverse
            columns[i] = columns[i] - multiples[i, k] * columns[k]
            for j in range(k + 1, i + 1):
                rows[i][j] = rows[i][j] - multiples[i, k] * rows[j][k]
    return columns, [rows[i][i] for i in range(d)], multiples


def cholesky_without_threads(a: jax.Array) -> jax.Array:
    """:func:`cholesky`, for large d column by column: for what needs no derivative.

    Every line is one loop over the trailing axes; a derivative would keep all columns' states.
    """
    if len(a) <= LAPACK_UP_TO:
        return cholesky(a)
    places = jnp.arange(len(a)).reshape(-1, *(1,) * (a.ndim - 2))

    def column(factor: jax.Array, j: Any) -> tuple[jax.Array, None]:
        rest = a[:, j] - (factor * factor[j][None]).sum(1)
        found = jnp.where(places >= j, rest, 0.0) / jnp.sqrt(rest[j])
        return factor.at[:, j].set(found), None

    return jax.lax.scan(column, jnp.zeros_like(a), jnp.arange(len(a)))[0]


def semidefinite_root(a: jax.Array) -> jax.Array:
    """Lower root L of one positive semidefinite (…, d, d) matrix, L Lᵀ = a; a may be singular.

    A pivot that is zero but for rounding becomes zero, and its column with it, so that nothing is
    divided by it; where the matrix is definite this is the Cholesky factor.
    """
    d = a.shape[-1]
    if d > UNROLL_UP_TO:
        factor = jnp.linalg.cholesky(a)
        singular = ~jnp.isfinite(factor).all((-2, -1), keepdims=True)
        # eigenvectors have no derivative where eigenvalues coincide, and none is needed there
        values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(a))
        rows = jnp.swapaxes(vectors * jnp.sqrt(jnp.maximum(values, 0.0))[..., None, :], -1, -2)
        triangle = jnp.swapaxes(jnp.linalg.qr(rows, mode="r"), -1, -2)
        return jnp.where(singular, triangle, factor)
    zero = jnp.zeros_like(a[..., 0, 0])
    rows_of: list[list[jax.Array]] = [[zero] * d for _ in range(d)]
    for j in range(d):
        pivot = a[..., j, j]
        for k in range(j):
            pivot = pivot - rows_of[j][k] ** 2
        positive = pivot > 1e-14 * a[..., j, j]
        root = jnp.sqrt(jnp.where(positive, pivot, 1.0))
        rows_of[j][j] = jnp.where(positive, root, 0.0)
        for i in range(j + 1, d):
            value = a[..., i, j]
            for k in range(j):
                value = value - rows_of[i][k] * rows_of[j][k]
            rows_of[i][j] = jnp.where(positive, value / root, 0.0)
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows_of], axis=-2)


def solve_lower(factor: jax.Array, b: jax.Array) -> jax.Array:
    """Solve L x = b for (d, d, J) lower factors and (d, J) or (d, P, J) right-hand sides."""
    d = factor.shape[0]
    if d > UNROLL_UP_TO:
        return _solve_lapack(factor, b, transpose=False)
    x: list[jax.Array] = []
    for i in range(d):
        value = b[i]
        for k in range(i):
            value = value - factor[i, k] * x[k]
        x.append(value / factor[i, i])
    return jnp.stack(x)


def solve_upper(factor: jax.Array, b: jax.Array) -> jax.Array:
    """Solve Lᵀ x = b for (d, d, J) lower factors and (d, J) or (d, P, J) right-hand sides."""
    d = factor.shape[0]
    if d > UNROLL_UP_TO:
        return _solve_lapack(factor, b, transpose=True)
    x: list[Any] = [None] * d
    for i in reversed(range(d)):
        value = b[i]
        for k in range(i + 1, d):
            value = value - factor[k, i] * x[k]
        x[i] = value / factor[i, i]
    return jnp.stack(x)


def _solve_lapack(factor: jax.Array, b: jax.Array, *, transpose: bool) -> jax.Array:
    if b.ndim == 3:
        return _substitute(factor, b, transpose=transpose)
    if len(b) > LAPACK_UP_TO:
        return _substitute(factor, b[:, None], transpose=transpose)[:, 0]
    matrices = jnp.moveaxis(factor, (0, 1), (-2, -1))
    columns = jnp.moveaxis(b[:, None], (0, 1), (-2, -1))
    solved = jax.scipy.linalg.solve_triangular(matrices, columns, trans=int(transpose), lower=True)
    return jnp.moveaxis(solved[..., 0], -1, 0)


def _substitute(factor: jax.Array, b: jax.Array, *, transpose: bool) -> jax.Array:
    """Many right-hand sides a task, row by row; LAPACK's own solve is threaded for matrices."""
    matrix = jnp.swapaxes(factor, 0, 1) if transpose else factor
    order = jnp.arange(len(b))

    def row(solved: jax.Array, i: Any) -> tuple[jax.Array, None]:
        value = b[i] - (matrix[i][:, None] * solved).sum(0)
        return solved.at[i].set(value / matrix[i, i]), None

    return jax.lax.scan(row, jnp.zeros_like(b), order[::-1] if transpose else order)[0]


def triangle(rows: np.ndarray) -> np.ndarray:
    """R of the QR factorisation of many rows (N, P): of blocks that fit the cache, then of theirs.

    Signs of its rows are arbitrary; N < P gives (N, P).
    """
    num_rows, width = rows.shape
    block = max(1000, 10 * width)
    if num_rows < 2 * block or not width:
        return np.asarray(np.linalg.qr(rows, mode="r"))
    whole = num_rows // block * block
    parts = np.asarray(np.linalg.qr(rows[:whole].reshape(-1, block, width), mode="r"))
    return triangle(np.concatenate([parts.reshape(-1, width), rows[whole:]]))


def log_diagonal_sum(factor: jax.Array) -> jax.Array:
    """Σ_i log L_ii of (d, d, …) triangular factors: half the log determinant."""
    return log_product([factor[i, i] for i in range(factor.shape[0])])


def log_product(values: list[jax.Array]) -> jax.Array:
    """Σ_i log v_i, two at a time, since a logarithm is dearer than all the rest of a small task.

    Values are to be far from the square roots of what overflows.
    """
    pairs = [jnp.log(v * w) for v, w in zip(values[::2], values[1::2], strict=False)]
    return total(pairs + [jnp.log(v) for v in values[len(pairs) * 2 :]])
