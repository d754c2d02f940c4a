"""A formula is data, not a program: what a term may be.

Formulaic evaluates terms as Python, and a formula may come from a file or a stranger. So every term
is read into Python's own syntax tree, node by node, and what is evaluated is written anew from the
nodes that passed: columns and strings under names of our own making, numbers, arithmetic,
comparisons, and calls that stand in the tables of what is allowed. Anything else is refused, and so
is what would take endless time or memory.
"""

from __future__ import annotations

import ast
import builtins
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hierbayes.formula.allowed import (
    ARITHMETIC,
    COMPARISONS,
    CONTRASTS,
    ELEMENTWISE,
    EXTRAPOLATION,
    MAX_CODE,
    MAX_DEPTH,
    MAX_KNOTS,
    TRANSFORMS,
    WHOLE_NUMBERS,
    binary,
    bounded,
    elementwise,
    num_columns_of,
    unary,
)
from hierbayes.formula.names import Names, NotAllowed, unknown


@dataclass(frozen=True)
class Code:
    """A term that may be evaluated.

    ``widths`` bounds the number of its columns: numbers, and codes whose different values count
    (of a code marked True whatever they are, else where they are no numbers).
    """

    text: str
    columns: tuple[str, ...]
    categories: tuple[str, ...]
    widths: tuple[int | tuple[str, bool], ...]


def read_code(text: str, columns: Sequence[str], names: Names, quoted: dict[str, str]) -> Code:
    """The Python of a term, checked and written anew; raises :class:`NotAllowed`.

    ``quoted`` tells which columns stood in backticks, by the names that they have in the text.
    """
    if len(text) > MAX_CODE:
        raise NotAllowed(f"a term of {len(text)} characters is too long ({MAX_CODE} at most)")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise NotAllowed(f"it is no expression: {names.show(error.msg)}") from error
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise NotAllowed("it is nested too deep, or no expression") from error
    reader = _Reader(columns, names, quoted)
    value = reader.value(tree.body, 0)
    if not reader.used:
        raise NotAllowed("it uses no column")
    code = ast.unparse(ast.fix_missing_locations(value.node))
    if code in names.columns:  # a column alone, by the name that it has outside code
        code = names.column(names.columns[code])
        value = _Value(value.node, ((code, False),))
    return Code(code, tuple(reader.used), tuple(reader.categories), tuple(value.widths))


def without_backticks(
    text: str, columns: Sequence[str], names: Names, quoted: dict[str, str]
) -> str:
    """The text with our names in place of those in backticks; strings stay as they are."""

    def named(found: re.Match[str]) -> str:
        if not found[0].startswith("`"):
            return found[0]
        column = found[0][1:-1]
        if column not in columns:
            raise unknown(column, columns)
        name = names.column(column, inside=True)
        quoted[name] = column
        return f" {name} "

    return re.sub(r"`[^`]*`|'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", named, text)


@dataclass(frozen=True)
class _Value:
    """A checked node; its number where it is a constant."""

    node: ast.expr
    widths: tuple[int | tuple[str, bool], ...] = (1,)
    constant: float | int | bool | None = None


class _Reader:
    """Checks a tree from its leaves upwards, and keeps which columns it uses."""

    def __init__(self, columns: Sequence[str], names: Names, quoted: dict[str, str]):
        self.names, self.quoted = names, quoted
        self.columns = columns
        # Python reads identifiers in their compatible form: a column of another form is meant
        self.spelt: dict[str, list[str]] = {}
        for column in columns:
            self.spelt.setdefault(unicodedata.normalize("NFKC", column), []).append(column)
        self.used: dict[str, None] = {}
        self.categories: dict[str, None] = {}

    # ------------------------------------------------------------------ values

    def value(self, node: ast.AST, depth: int) -> _Value:
        """A column, number, arithmetic, comparison or call."""
        if depth > MAX_DEPTH:
            raise NotAllowed(f"more than {MAX_DEPTH} levels of nesting are not allowed")
        if isinstance(node, ast.Constant):
            return self._number(node)
        if isinstance(node, ast.Name):
            return self._column(node)
        if isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not):
            inner = self.value(node.operand, depth + 1)
            made = ast.UnaryOp(node.op, inner.node)
            return _Value(made, inner.widths, unary(node.op, inner.constant))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ARITHMETIC):
            left, right = self.value(node.left, depth + 1), self.value(node.right, depth + 1)
            made = ast.BinOp(left.node, node.op, right.node)
            return _Value(
                made, left.widths + right.widths, binary(node.op, left.constant, right.constant)
            )
        if isinstance(node, ast.Compare):
            return self._comparison(node, depth)
        if isinstance(node, ast.Call):
            return self._call(node, depth)
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        raise NotAllowed(_refusal(node))

    def _number(self, node: ast.Constant) -> _Value:
        value = node.value
        if isinstance(value, str):
            raise NotAllowed(
                f"the string {value!r} is not allowed here: strings are compared with a column, or "
                "are arguments of transforms"
            )
        if not isinstance(value, (bool, int, float)):
            raise NotAllowed(f"{type(value).__name__} is not allowed")
        return _Value(ast.Constant(value), constant=bounded(value))

    def _column(self, node: ast.Name) -> _Value:
        if node.id in self.quoted:
            column, name = self.quoted[node.id], node.id
        else:
            meant = self.spelt.get(node.id, [])
            if len(meant) > 1:
                raise NotAllowed(
                    f"{node.id!r} may stand for several columns, which Python's spelling does not "
                    "tell apart: put the name in backticks"
                )
            if not meant:
                raise unknown(node.id, self.columns)
            column = meant[0]
            name = self.names.column(column, inside=True)
        self.used[column] = None
        return _Value(ast.Name(name, ast.Load()), ((name, False),))

    def _comparison(self, node: ast.Compare, depth: int) -> _Value:
        if len(node.ops) > 1:
            raise NotAllowed("write (a < x) & (x < b): two comparisons at once are not allowed")
        if not isinstance(node.ops[0], COMPARISONS):
            raise NotAllowed(f"the comparison {type(node.ops[0]).__name__} is not allowed")
        sides: list[ast.expr] = [node.left, node.comparators[0]]
        texts = [isinstance(s, ast.Constant) and isinstance(s.value, str) for s in sides]
        if all(texts):
            raise NotAllowed("two strings are compared, and no column")
        made: list[ast.expr] = []
        for side, text in zip(sides, texts, strict=True):
            if not text:
                made.append(self.value(side, depth + 1).node)
            else:
                made.append(self._text(ast.literal_eval(side)))
        if any(texts) and not isinstance(made[0 if texts[1] else 1], ast.Name):
            raise NotAllowed("a string is compared with a column, and nothing else")
        return _Value(ast.Compare(made[0], node.ops, [made[1]]))

    def _attribute(self, node: ast.Attribute) -> _Value:
        dotted = _dotted(node)
        if dotted in ("np.pi", "np.e"):
            constant = math.pi if node.attr == "pi" else math.e
            return _Value(_name(dotted), constant=constant)
        if dotted is not None and dotted in self.columns:
            raise NotAllowed(
                f"the name {dotted!r} is not allowed inside a term: put it in backticks"
            )
        raise NotAllowed(f"the attribute {node.attr!r} is not allowed")

    def _text(self, text: str) -> ast.expr:
        return ast.Name(self.names.text(text), ast.Load())

    # ------------------------------------------------------------------- calls

    def _call(self, node: ast.Call, depth: int) -> _Value:
        name = _dotted(node.func)
        if name is None:
            raise NotAllowed(f"calling {type(node.func).__name__} is not allowed")
        if name == "Q":
            return self._quoted_column(node)
        if name in TRANSFORMS:
            return self._transform(node, name, depth)
        first, following = elementwise(name)
        if first == 0:
            if "." in name or name in dir(builtins) or name.startswith("_"):
                raise NotAllowed(f"calling {name} is not allowed")
            raise unknown(name, [*TRANSFORMS, *ELEMENTWISE])
        if len(node.args) < first or (not following and len(node.args) > first):
            raise NotAllowed(f"{name} takes {first} value(s), found {len(node.args)}")
        values = [self.value(arg, depth + 1) for arg in node.args[:first]]
        more, keywords = self._arguments(node, name, following, first, depth)
        widths = tuple(width for value in values for width in value.widths)
        made = ast.Call(_name(name), [*(value.node for value in values), *more], keywords)
        return _Value(made, widths)

    def _quoted_column(self, node: ast.Call) -> _Value:
        """``Q("any name")``: the column of that name."""
        text = node.args[0] if len(node.args) == 1 and not node.keywords else None
        if not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
            raise NotAllowed('Q takes the name of a column: Q("a name")')
        if text.value not in self.columns:
            raise unknown(text.value, self.columns)
        self.used[text.value] = None
        name = self.names.column(text.value, inside=True)
        return _Value(ast.Name(name, ast.Load()), ((name, False),))

    def _transform(self, node: ast.Call, name: str, depth: int) -> _Value:
        if not node.args:
            raise NotAllowed(f"{name} needs the column that it transforms, first")
        data = self.value(node.args[0], depth + 1)
        if name == "C":
            self.categories.update(dict.fromkeys(_columns_of(data.node, self.names)))
        more, keywords = self._arguments(node, name, TRANSFORMS[name], 1, depth)
        made = ast.Call(_name(name), [data.node, *more], keywords)
        given = dict(zip(TRANSFORMS[name], more, strict=False))
        given |= {str(k.arg): k.value for k in keywords}
        if name == "C":
            return _Value(made, ((ast.unparse(ast.fix_missing_locations(data.node)), True),))
        width = num_columns_of(name, given)
        return _Value(made, data.widths if width is None else (width,))

    def _arguments(
        self, node: ast.Call, name: str, kinds: dict[str, str], first: int, depth: int
    ) -> tuple[list[ast.expr], list[ast.keyword]]:
        """The arguments that follow the data, each checked by its kind."""
        given = node.args[first:]
        if len(given) > len(kinds):
            raise NotAllowed(f"{name} takes {first + len(kinds)} argument(s) at most")
        order = list(kinds)
        more = [
            self._argument(arg, kinds[kind], f"{name}'s {kind}", depth)
            for kind, arg in zip(order, given, strict=False)
        ]
        keywords = []
        for keyword in node.keywords:
            if keyword.arg not in kinds:
                told = "**" if keyword.arg is None else repr(keyword.arg)
                known = f"known: {', '.join(kinds)}" if kinds else "it takes none"
                raise NotAllowed(f"the argument {told} of {name} is not allowed; {known}")
            told = f"{name}'s {keyword.arg}"
            made = self._argument(keyword.value, kinds[keyword.arg], told, depth)
            keywords.append(ast.keyword(keyword.arg, made))
        return more, keywords

    def _argument(self, node: ast.expr, kind: str, told: str, depth: int) -> ast.expr:
        if isinstance(node, ast.Constant) and node.value is None:
            return ast.Constant(None)
        if kind == "value":
            return self.value(node, depth + 1).node
        if kind == "contrast":
            return self._contrast(node, depth)
        if kind == "extrapolation":
            if isinstance(node, ast.Constant) and node.value in EXTRAPOLATION:
                return self._text(str(node.value))
            raise NotAllowed(f"{told} is one of {', '.join(EXTRAPOLATION)}")
        if kind == "constraints" and isinstance(node, ast.Constant):
            if node.value == "center":
                return self._text("center")
            raise NotAllowed(f'{told} is "center", or rows of numbers')
        if kind in ("constraints", "table"):
            return self._table(node, told, depth)
        if kind in ("numbers", "constants"):
            if not isinstance(node, (ast.List, ast.Tuple)):
                raise NotAllowed(f"{told} is a list, such as [1, 2]")
            if len(node.elts) > MAX_KNOTS:
                raise NotAllowed(f"{told} holds more than {MAX_KNOTS} values")
            kind = {"numbers": "number", "constants": "constant"}[kind]
            parts = [self._argument(part, kind, f"a value of {told}", depth) for part in node.elts]
            return ast.List(parts, ast.Load())
        return self._constant(node, kind, told, depth)

    def _constant(self, node: ast.expr, kind: str, told: str, depth: int) -> ast.expr:
        """One number, truth value or string."""
        if kind == "constant" and isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self._text(node.value)
        value = self.value(node, depth + 1)
        found = value.constant
        if found is None:
            raise NotAllowed(f"{told} is a number, not a column")
        if kind == "truth" and not isinstance(found, bool):
            raise NotAllowed(f"{told} is True or False, found {found!r}")
        if kind in WHOLE_NUMBERS:
            most = WHOLE_NUMBERS[kind]
            least = -most if kind == "whole" else 0
            if not isinstance(found, int) or isinstance(found, bool):
                raise NotAllowed(f"{told} is a whole number, found {found!r}")
            if not least <= found <= most:
                raise NotAllowed(f"{told} lies between {least} and {most}, found {found}")
        return value.node

    def _contrast(self, node: ast.expr, depth: int) -> ast.expr:
        if isinstance(node, (ast.List, ast.Tuple, ast.Dict)):
            return self._table(node, "contrasts", depth)
        name = _dotted(node.func if isinstance(node, ast.Call) else node)
        if name is None or name not in CONTRASTS:
            raise NotAllowed(f"contrasts are one of {', '.join(CONTRASTS)}, or rows of numbers")
        if not isinstance(node, ast.Call):
            return _name(name)
        more, keywords = self._arguments(node, name, CONTRASTS[name], 0, depth + 1)
        return ast.Call(_name(name), more, keywords)

    def _table(self, node: ast.expr, told: str, depth: int) -> ast.expr:
        """Rows of numbers, or columns of numbers by name."""
        if isinstance(node, ast.Dict):
            keys: list[Any] = [
                self._constant(key, "constant", f"a name in {told}", depth) if key else None
                for key in node.keys
            ]
            if None in keys:
                raise NotAllowed(f"** in {told} is not allowed")
            rows = [self._argument(v, "numbers", f"a column of {told}", depth) for v in node.values]
            return ast.Dict(keys, rows)
        if not isinstance(node, (ast.List, ast.Tuple)):
            raise NotAllowed(f"{told} are rows of numbers, such as [[1, 0], [0, 1], [-1, -1]]")
        nested = [isinstance(row, (ast.List, ast.Tuple)) for row in node.elts]
        if not all(nested):
            return self._argument(node, "numbers", told, depth)
        rows = [self._argument(row, "numbers", f"a row of {told}", depth) for row in node.elts]
        return ast.List(rows, ast.Load())


def _columns_of(node: ast.AST, names: Names) -> list[str]:
    found = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    return [names.columns[name] for name in found if name in names.columns]


def _dotted(node: ast.AST) -> str | None:
    """``np.log`` of a name, or of one attribute of a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return None


def _name(dotted: str) -> ast.expr:
    first, *rest = dotted.split(".")
    made: ast.expr = ast.Name(first, ast.Load())
    return ast.Attribute(made, rest[0], ast.Load()) if rest else made


def _refusal(node: ast.AST) -> str:
    if isinstance(node, (ast.BoolOp, ast.UnaryOp)):
        return "and, or and not are not allowed: write (x > 1) & (z > 1), | or ~"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor):
        return "^ is not allowed inside a term: write x ** 2"
    if isinstance(node, ast.BinOp):
        return f"the operator {type(node.op).__name__} is not allowed"
    return f"{type(node).__name__} is not allowed"
