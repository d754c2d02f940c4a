"""What callers pass, checked at the boundary: one function a kind of argument.

Each takes the argument's name and its value, and returns the value as the package wants it, or
refuses it by that name, before anything is computed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hierbayes.errors import InputError, listing

SMALLEST, LARGEST = 1e-100, 1e100
"""Positive numbers lie between: what is squared and divided by must stay a number."""

LARGEST_COUNT = 2**31
"""Numbers of things lie below: no array of the package is longer."""

LARGEST_SEED = 2**63
"""Seeds lie below: JAX's keys are made of so many bits."""


def count(name: str, value: Any, least: int | None = None) -> int:
    """A whole number of ``least`` or more, of 1 by default; no bool, and no float."""
    number = _whole(value) if isinstance(value, (int, np.integer)) else None
    if number is not None and number >= LARGEST_COUNT:
        raise InputError(f"{name} must be below 2**31, found {shown(value)}")
    if number is None or number < (1 if least is None else least):
        kind = "a positive integer" if least is None else f"an integer of {least} or more"
        raise InputError(f"{name} must be {kind}, found {shown(value)}")
    return number


def counts(**given: Any) -> tuple[int, ...]:
    """Positive integers, each under its name."""
    return tuple(count(name, value) for name, value in given.items())


def share(name: str, value: Any) -> float:
    """A number strictly between 0 and 1."""
    number = _real(value)
    if number is None or not 0 < number < 1:
        raise InputError(f"{name} must lie between 0 and 1, found {shown(value)}")
    return number


def positive(name: str, value: Any, *, or_zero: bool = False) -> float:
    """A finite number above zero, or zero too."""
    number = _real(value)
    if number is None or not np.isfinite(number) or number < 0 or (number == 0 and not or_zero):
        what = "zero or positive" if or_zero else "positive"
        what = f"a {what} number" if number is None else what
        raise InputError(f"{name} must be {what}, found {shown(value)}")
    if number and not SMALLEST <= number <= LARGEST:
        raise InputError(
            f"{name} must be positive and lie between {SMALLEST:g} and {LARGEST:g}, found {number}"
        )
    return number


def number(name: str, value: Any, what: str = "a number") -> float:
    """One real number, described by ``what``; NaN and infinity are left to the caller."""
    found = _real(value)
    if found is None:
        raise InputError(f"{name} must be {what}, found {shown(value)}")
    return found


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if isinstance(value, (bool, np.bool_)) or _whole(value) in (0, 1):
        return bool(value)
    raise InputError(f"{name} must be True or False, found {shown(value)}")


def optional_flag(name: str, value: Any) -> bool | None:
    """True, False or None."""
    return None if value is None else flag(name, value)


def one_of(name: str, value: Any, known: Iterable[str]) -> Any:
    """One of some words."""
    words = tuple(known)
    if isinstance(value, str) and value in words:
        return value
    quoted = [f'"{word}"' for word in words]
    choice = " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
    choice = f"one of {choice}" if len(quoted) > 3 else choice
    raise InputError(f"{name} must be {choice}, found {shown(value)}")


def seed(value: Any, name: str = "seed") -> Any:
    """An integer from 0 to 2⁶³ − 1, as a plain one, or a JAX key (typed, or an old uint32 one)."""
    number = _whole(value)
    if number is not None and 0 <= number < LARGEST_SEED:
        return number
    if number is None and _is_key(value):
        return value
    raise InputError(
        f"{name} must be an integer from 0 to 2**63 - 1, or one JAX key, jax.random.key(0); "
        f"found {shown(value)}"
    )


def _is_key(value: Any) -> bool:
    import jax

    if not isinstance(value, (jax.Array, np.ndarray)):
        return False
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value.shape == ()
    expected = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return value.dtype == expected.dtype and value.shape == expected.shape


def instance(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    """An object of a kind, described by ``what``."""
    if isinstance(value, kind):
        return value
    kept = f"{type(value).__name__} {shown(value)}"
    found = f"the class {value.__name__} itself" if isinstance(value, type) else kept
    raise InputError(f"{name} must be {what}, found {found}")


def mapping(name: str, value: Any, what: str) -> Mapping[Any, Any]:
    """A mapping, described by ``what``."""
    return instance(name, value, Mapping, what)


def column(name: str, value: Any) -> str:
    """The name of one column; columns may be numbered."""
    if not isinstance(value, (str, int, float, np.number)) or isinstance(value, bool):
        raise InputError(f"{name} must be the name of a column, found {shown(value)}")
    return str(value)


def names(name: str, value: Any) -> tuple[str, ...]:
    """Names, in order and each once; one string is one name."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (Mapping, set, bytes)) or hasattr(value, "columns"):
        raise InputError(f"{name} must be a sequence of names, found {shown(value)}")
    try:
        found = tuple(value)
    except TypeError as error:
        raise InputError(f"{name} must be a sequence of names, found {shown(value)}") from error
    text = tuple(column(f"each entry of {name}", each) for each in found)
    if twice := sorted({each for each in text if text.count(each) > 1}):
        raise InputError(f"{name} holds {listing(twice)} twice; each name stands for one column")
    return text


def numbers(
    name: str, value: Any, *, ndim: int | None = None, shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """Finite numbers as a float array, of float32 as they came and of float64 else; a copy.

    Masked and missing entries, strings, dates and complex numbers are refused, and so are other
    numbers of dimensions than ``ndim``, or other shapes than ``shape``.
    """
    masked = isinstance(value, np.ma.MaskedArray)
    if masked and np.ma.count_masked(value):
        raise InputError(
            f"{name} has {np.ma.count_masked(value)} masked value(s); leave these rows out"
        )
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is no array of numbers: {error}") from error
    if array.dtype.kind == "O":
        array = _of_objects(name, array)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} holds {array.dtype} where numbers belong")
    array = np.array(array, dtype=np.float32 if array.dtype == np.float32 else np.float64)
    if ndim is not None and array.ndim != ndim:
        raise InputError(f"{name} has shape {array.shape}; expected {ndim} dimension(s)")
    if shape is not None and array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}; expected {shape}")
    if bad := int((~np.isfinite(array)).sum()):
        raise InputError(f"{name} has {bad} NaN or infinite value(s)")
    return array


def real_array(value: Any) -> np.ndarray:
    """An array of anything but complex numbers, which would lose a part in silence."""
    array = np.asarray(value)
    if array.dtype.kind not in "biufO":
        raise TypeError(f"{array.dtype} where real numbers belong")
    return array


def _of_objects(name: str, array: np.ndarray) -> np.ndarray:
    """Python's numbers as float64, what is missing as NaN; anything else is refused."""
    found = np.empty(array.shape)
    for at in np.ndindex(array.shape):
        item = array[at]
        number = float(item) if isinstance(item, (bool, np.bool_)) else _real(item)
        if number is None and not (item is None or type(item).__name__ in ("NAType", "NaTType")):
            raise InputError(
                f"{name} holds {type(item).__name__} where numbers belong, for example "
                f"{shown(item)}"
            )
        found[at] = np.nan if number is None else number
    return found


def shown(value: Any) -> str:
    """A value as a message quotes it: NumPy scalars as plain ones, long ones cut short."""
    if isinstance(value, np.generic):
        value = value.item()
    shape = getattr(value, "shape", ())
    if isinstance(shape, tuple) and shape:
        return f"{type(value).__name__} of shape {shape}"
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}…"


def _whole(value: Any) -> int | None:
    """A plain integer, where the value is one."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _real(value: Any) -> float | None:
    """A plain float, where the value is one real number; no bool and no string."""
    if isinstance(value, (bool, np.bool_, str, bytes, complex, np.complexfloating)):
        return None
    kind = getattr(getattr(value, "dtype", None), "kind", "f")
    if getattr(value, "ndim", 0) != 0 or kind not in "iufO":
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
