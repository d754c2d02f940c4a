"""A formula is data, not a program: what its terms may call.

Formulaic evaluates terms as Python. A formula may come from a file or a stranger, so only column
names, numbers, arithmetic, comparisons, formulaic's own transforms and NumPy's elementwise
functions pass; nothing else reaches the evaluation.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from hierbayes.formula.bars import FormulaError, Parts

_MODULES = ("np", "contr")
_NUMPY = ("where", "clip", "nan_to_num", "round")
_HARMLESS = (
    ast.Expression, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp, ast.BoolOp,
    ast.Compare, ast.Call, ast.keyword, ast.List, ast.Tuple, ast.Dict, ast.Attribute,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip


def refuse_code(formula: Any, parts: Parts, columns: Sequence[str]) -> None:
    """Refuse a parsed formula whose terms do more than transform columns."""
    from formulaic.transforms import TRANSFORMS

    for factor in {str(f.expr) for term in formula for f in term.factors}:
        # names in backticks may be anything: they are columns, and stand for themselves
        text = re.sub(r"`[^`]*`", "_column", factor)
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except SyntaxError:
            continue  # formulaic refuses it, pointing at the place
        for node in ast.walk(tree):
            problem = _problem(node, {*columns, "_column"}, TRANSFORMS)
            if problem:
                place = max(parts.text.find(factor), 0)
                raise FormulaError(parts.text, place, f"{problem} in {factor!r}; {_ALLOWED}")


_ALLOWED = (
    "terms may use columns, numbers, arithmetic, formulaic's transforms such as center(x) and "
    "NumPy's elementwise functions such as np.log(x); make other columns beforehand"
)


def _problem(node: ast.AST, columns: set[str], transforms: Any) -> str | None:
    if not isinstance(node, _HARMLESS):
        return f"{type(node).__name__} is not allowed"
    if isinstance(node, ast.Attribute) and not _is_known_attribute(node):
        return f"the attribute {node.attr!r} is not allowed"
    if isinstance(node, ast.Call) and not isinstance(node.func, ast.Attribute):
        name = ast.unparse(node.func)
        if name in columns or name in dir(builtins) or not isinstance(node.func, ast.Name):
            return f"calling {name} is not allowed"
    if isinstance(node, ast.Name) and node.id not in columns | set(transforms):
        return f"the name {node.id!r} is not allowed" if node.id in dir(builtins) else None
    return None


def _is_known_attribute(node: ast.Attribute) -> bool:
    if not (isinstance(node.value, ast.Name) and node.value.id in _MODULES):
        return False
    if node.attr.startswith("_"):
        return False
    if node.value.id == "contr":
        return True
    return node.attr in _NUMPY or isinstance(getattr(np, node.attr, None), np.ufunc)
