"""What a term of a formula may call, with which arguments, and how large its numbers may be."""

from __future__ import annotations

import ast
import math
import operator
from typing import Any

import numpy as np

from hierbayes.formula.names import NotAllowed

MAX_DEPTH = 100
"""How deep brackets, signs and calls may be nested inside one term."""
MAX_CODE = 2_000
"""Characters of one term that is more than a column."""
MAX_DEGREE = 20
"""Of polynomials and splines."""
MAX_KNOTS = 200
"""Knots and degrees of freedom of splines, scores and levels that are listed."""
MAX_LEVELS = 1_000
"""Of hashed levels."""
WHOLE = 2**53
"""Whole numbers beyond it are none in float64, and powers of whole numbers grow without end."""

WHOLE_NUMBERS = {"size": MAX_LEVELS, "knots": MAX_KNOTS, "degree": MAX_DEGREE, "whole": WHOLE}
"""The largest of each kind of whole number."""

ALLOWED = (
    "terms may use columns, numbers, arithmetic, comparisons, formulaic's transforms such as "
    "center(x) and NumPy's elementwise functions such as np.log(x); make other columns beforehand"
)

ELEMENTWISE = ("log", "log10", "log2", "exp", "exp10", "exp2", "abs")
_SPLINE = {
    "df": "knots", "knots": "numbers", "lower_bound": "number", "upper_bound": "number",
    "constraints": "constraints", "extrapolation": "extrapolation",
}  # fmt: skip
TRANSFORMS: dict[str, dict[str, str]] = {
    "I": {},
    "center": {},
    "scale": {"center": "switch", "scale": "switch", "ddof": "number"},
    "standardize": {"center": "switch", "rescale": "switch", "ddof": "number"},
    "poly": {"degree": "degree", "raw": "truth"},
    "bs": {
        "df": "knots", "knots": "numbers", "degree": "degree", "include_intercept": "truth",
        "lower_bound": "number", "upper_bound": "number", "extrapolation": "extrapolation",
    },
    "cr": _SPLINE,
    "cs": _SPLINE,
    "cc": _SPLINE,
    "lag": {"offset": "whole"},
    "hashed": {"levels": "size", "contrasts": "contrast", "spans_intercept": "truth"},
    "C": {"contrasts": "contrast", "levels": "constants", "spans_intercept": "truth"},
}  # fmt: skip
"""Formulaic's transforms with the arguments that may follow the data, in their order."""
CONTRASTS: dict[str, dict[str, str]] = {
    "contr.treatment": {"base": "constant"},
    "contr.SAS": {"base": "constant"},
    "contr.sum": {},
    "contr.helmert": {"reverse": "truth", "scale": "truth"},
    "contr.diff": {"backward": "truth"},
    "contr.poly": {"scores": "numbers"},
    "contr.custom": {"contrasts": "table", "names": "constants"},
    "Treatment": {"reference": "constant"},
    "Sum": {},
    "Helmert": {"reverse": "truth", "scale": "truth"},
    "Diff": {"backward": "truth"},
    "Poly": {"scores": "numbers"},
}
NUMPY: dict[str, tuple[int, dict[str, str]]] = {
    # how many values come first, and the arguments that may follow
    "where": (3, {}),
    "clip": (1, {"a_min": "value", "a_max": "value"}),
    "round": (1, {"decimals": "whole"}),
    "nan_to_num": (1, {}),
}
EXTRAPOLATION = ("raise", "clip", "na", "zero", "extend")
OPERATIONS: dict[type[ast.operator], Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
ARITHMETIC = (*OPERATIONS, ast.Pow, ast.BitAnd, ast.BitOr)
COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)

FUNCTIONS = {"abs": np.abs, "exp10": lambda x: np.power(10.0, x)}
"""Functions that formulaic lacks, or (exp10) computes otherwise than by its name."""


# --------------------------------------------------------------------- constants


def bounded(value: Any) -> Any:
    """A constant that is finite and, a whole number, one of float64's."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) > WHOLE:
        raise NotAllowed(f"a whole number beyond {WHOLE} is not allowed: write it as 1e20")
    if isinstance(value, complex) or not math.isfinite(value):
        raise NotAllowed("a number that is not finite is not allowed")
    return value


def unary(op: ast.unaryop, value: Any) -> Any:
    """The number of a sign before a number."""
    if value is None:
        return None
    if isinstance(op, ast.Invert):
        raise NotAllowed("~ is for comparisons with a column")
    return bounded(-value if isinstance(op, ast.USub) else +value)


def binary(op: ast.operator, a: Any, b: Any) -> Any:
    """The number of an operation on numbers; it is computed in floats first, which end."""
    if a is None or b is None:
        return None
    if isinstance(op, (ast.BitAnd, ast.BitOr)):
        raise NotAllowed("& and | are for comparisons with a column")
    try:
        if isinstance(op, ast.Pow):
            rough = float(a) ** float(b)
            if not (isinstance(a, int) and isinstance(b, int) and b >= 0):
                return bounded(rough)
            if abs(rough) > WHOLE:
                raise NotAllowed(f"a power of whole numbers beyond {WHOLE} is not allowed")
            return a**b
        return bounded(OPERATIONS[type(op)](a, b))
    except (OverflowError, ZeroDivisionError) as error:
        raise NotAllowed("a number that is not finite is not allowed") from error


# ------------------------------------------------------------------------- calls


def elementwise(name: str) -> tuple[int, dict[str, str]]:
    """How many values a function of values takes, 0 if it may not be called, and what follows."""
    if name in ELEMENTWISE:
        return 1, {}
    module, _, function = name.partition(".")
    if module != "np" or not function:
        return 0, {}
    if function in NUMPY:
        return NUMPY[function]
    made = getattr(np, function, None) if function.isidentifier() else None
    # one result a value; a further argument would be written into
    if isinstance(made, np.ufunc) and made.nout == 1 and made.signature is None:
        return made.nin, {}
    return 0, {}


def num_columns_of(name: str, given: dict[str, ast.expr]) -> int | None:
    """At most how many columns a transform makes; None where as many as its data."""
    size = {
        key: value.value
        for key, value in given.items()
        if isinstance(value, ast.Constant) and isinstance(value.value, int)
    }
    if name == "hashed":
        return size.get("levels", MAX_LEVELS)
    if name == "poly":
        return size.get("degree", 1 if "degree" not in given else MAX_DEGREE)
    if name in ("bs", "cr", "cs", "cc"):
        knots = given.get("knots")
        inner = len(knots.elts) if isinstance(knots, ast.List) else 0
        degree = size.get("degree", 3 if "degree" not in given else MAX_DEGREE)
        return max(size.get("df", 0), inner + degree + 1)
    return None
