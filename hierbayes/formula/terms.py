"""The terms of one part of a formula: its tokens checked, its algebra done by formulaic.

Formulaic's own tokens are read one by one. Columns, and terms that are more than a column, stand
under names of our own in what its algebra sees, which is then names, ``+ - * / : **`` and brackets
and nothing else; afterwards every name is given the code that was checked and written anew.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hierbayes.formula.allowed import ALLOWED, FUNCTIONS
from hierbayes.formula.bars import FormulaError, Parts
from hierbayes.formula.expressions import Code, read_code, without_backticks
from hierbayes.formula.names import Names, NotAllowed, unknown

MAX_TERMS = 1_000
"""Terms of one part, products of powers included."""
MAX_TOKENS = 2_000
MAX_POWER = 20
MAX_PRODUCTS = 20_000
"""Products that powers and interactions are worked out from."""
MAX_SHARED, MAX_VARYING = 500, 30
"""Columns outside bars, and in bars, that can be fitted in the memory and time that people have."""
ADVICE = {
    "shared": f"at most {MAX_SHARED} can be fitted: put categories into a bar as tasks, "
    "(1 | category), or merge rare ones",
    "varying": f"at most {MAX_VARYING} can vary between tasks, whose covariances grow as its "
    "square: let fewer vary, and leave the others outside the bar",
}


@dataclass(frozen=True)
class Terms:
    """One part of a formula, ready for formulaic.

    ``categories`` names the columns that are categories whatever they hold, ``codes`` the checked
    code by the expression that formulaic evaluates.
    """

    text: str
    formula: Any
    columns: tuple[str, ...]
    categories: tuple[str, ...]
    codes: dict[str, Code]


def read_terms(
    text: str, parts: Parts, columns: Sequence[str], names: Names, *, intercept: bool = True
) -> Terms:
    """Check a part of a formula and let formulaic work out its terms."""
    from formulaic import Formula
    from formulaic.parser.types import Term

    quoted: dict[str, str] = {}
    tokens = _tokens(text, parts, columns, names, quoted)
    written, codes = _checked(tokens, parts, columns, names, quoted)
    terms = _expanded(written if intercept else ["0 +", *written], text, parts, names)
    made = [Term(_factor(f, codes) for f in term.factors) for term in terms]
    used = {column for code in codes.values() for column in code.columns}
    categories = {column for code in codes.values() for column in code.categories}
    formula: Any = Formula(made)  # type: ignore[abstract]
    return Terms(
        text, formula,
        tuple(c for c in columns if c in used),
        tuple(c for c in columns if c in categories),
        {code.text: code for code in codes.values()},
    )  # fmt: skip


def _tokens(
    text: str, parts: Parts, columns: Sequence[str], names: Names, quoted: dict[str, str]
) -> list[Any]:
    """Formulaic's tokens; the names in backticks are added to ``quoted``."""
    from formulaic.errors import FormulaicError
    from formulaic.parser.algos.tokenize import tokenize

    try:
        tokens: list[Any] = list(tokenize(without_backticks(text, columns, names, quoted)))
    except NotAllowed as refused:
        raise _error(parts, _blamed(str(refused), text), str(refused)) from None
    except FormulaicError as error:
        raise _error(parts, text, names.show(first_line(error))) from error
    if len(tokens) > MAX_TOKENS:
        raise _error(parts, text, f"more than {MAX_TOKENS} columns and operators are too many")
    return tokens


def _checked(
    tokens: list[Any], parts: Parts, columns: Sequence[str], names: Names, quoted: dict[str, str]
) -> tuple[list[str], dict[str, Code]]:
    """Tokens as formulaic's algebra sees them, and the checked code of each name in them."""
    known, codes, written = set(columns), {}, []
    for i, token in enumerate(tokens):
        before = tokens[i - 1].token if i else ""
        try:
            written.append(_written(token, before, known, columns, names, quoted, codes))
        except NotAllowed as refused:
            word = names.show(token.token)
            shown = f" in {_short(word)!r}; {ALLOWED}" if token.kind.value == "python" else ""
            raise _error(parts, _blamed(str(refused), word), f"{refused}{shown}") from None
    return written, codes


def _expanded(written: list[str], text: str, parts: Parts, names: Names) -> list[Any]:
    """The terms that formulaic's algebra makes of a part, refused where they are too many."""
    from formulaic.errors import FormulaicError
    from formulaic.parser import DefaultFormulaParser

    parser, algebra = DefaultFormulaParser(), " ".join(written)
    try:
        tree = parser.get_ast(algebra)
        _refuse_many(tree, text, parts)
        found: Any = parser.get_terms(algebra)
        terms = list(found._simplify())
    except FormulaicError as error:
        raise _error(parts, text, names.show(first_line(error))) from error
    if len(terms) > MAX_TERMS:
        raise _error(parts, text, f"{len(terms)} terms are too many: {MAX_TERMS} at most")
    return terms


def num_columns(terms: Terms, names: Names, table: Any) -> list[tuple[int, str]]:
    """At most how many columns formulaic will make of each term of a part, of this table."""
    counted: dict[str, int] = {}
    found = []
    for term in terms.formula:
        width = 1
        for factor in term.factors:
            if factor.expr in terms.codes:
                if factor.expr not in counted:
                    code = terms.codes[factor.expr]
                    counted[factor.expr] = max(_width(w, names, table) for w in code.widths)
                width *= counted[factor.expr]
        found.append((width, names.show(":".join(factor.expr for factor in term.factors))))
    return found


def refuse_wide(parts: Parts, read: Sequence[Terms], names: Names, table: Any, kind: str) -> None:
    """Refuse more columns than can be fitted, before they are made."""
    most = {"shared": MAX_SHARED, "varying": MAX_VARYING}[kind]
    found = [width for terms in read for width in num_columns(terms, names, table)]
    total = sum(width for width, _ in found)
    if total > most:
        width, term = max(found)
        raise _error(
            parts, read[0].text, f"{total} {kind} columns, {width} of them of {_short(term)!r}, "
            f"are too many; {ADVICE[kind]}"
        )  # fmt: skip


def under_our_names(table: Any, names: Names) -> Any:
    """A table whose columns stand under our names for them."""
    import pandas as pd

    kept = {name: table[c] for name, c in names.columns.items() if c in table.columns}
    return pd.DataFrame(kept, index=table.index)


def context(names: Names) -> dict[str, Any]:
    """What terms see beside the columns and formulaic's transforms."""
    return {**names.texts, **FUNCTIONS}


def _width(width: int | tuple[str, bool], names: Names, table: Any) -> int:
    if isinstance(width, int):
        return width
    code, whatever = width
    if code in names.columns:
        values = table[names.columns[code]]
        numeric = hasattr(values.dtype, "kind") and values.dtype.kind in "fiub"
        return int(values.nunique()) if whatever or not numeric else 1
    return _num_different(code, names, table)


def _num_different(code: str, names: Names, table: Any) -> int:
    """How many values the checked code of a category takes."""
    import pandas as pd
    from formulaic.transforms import TRANSFORMS
    from formulaic.utils.layered_mapping import LayeredMapping
    from formulaic.utils.stateful_transforms import stateful_eval

    seen = LayeredMapping(dict(under_our_names(table, names)), context(names), TRANSFORMS)
    try:
        values = stateful_eval(code, seen, None, None, None)
        return len(pd.unique(pd.Series(values)))
    except Exception:  # formulaic says what is wrong with it
        return 1


def _factor(factor: Any, codes: dict[str, Code]) -> Any:
    """The factor that is evaluated: the checked code of a name, or the constant one."""
    from formulaic.parser.types import Factor

    if factor.expr not in codes:
        return factor
    text = codes[factor.expr].text
    return Factor(text, eval_method="lookup" if text.isidentifier() else "python")


def _written(
    token: Any, before: str, known: set[str], columns: Sequence[str], names: Names,
    quoted: dict[str, str], codes: dict[str, Code],
) -> str:  # fmt: skip
    """A token of the user's as formulaic's algebra sees it."""
    text, kind = token.token, token.kind.value
    if kind == "name":
        text = quoted.get(text) or text
        if text not in known:
            raise unknown(text, columns)
        name = names.column(text)
        codes[name] = Code(name, (text,), (), ((name, False),))
        return name
    if kind == "python":
        code = read_code(text, columns, names, quoted)
        name = code.text if code.text.isidentifier() else names.term(code.text)
        codes[name] = code
        return name
    if kind == "value":
        if before in ("**", "^"):
            if re.fullmatch("[0-9]{1,2}", text) and 1 <= int(text) <= MAX_POWER:
                return text
            raise NotAllowed(f"the power {_short(text)!r} is not a whole number up to {MAX_POWER}")
        if text in ("0", "1"):
            return text
        if text == ".":
            raise NotAllowed("'.' is not read as all other columns: name them")
        if text[0] in "'\"":
            raise NotAllowed(f"the string {_short(text)} is no term; quote columns in backticks")
        raise NotAllowed(
            f"the number {_short(text)} is not allowed here: only 1 and 0 stand for a term, the "
            "intercept with or without; write {2 * x} to scale a column"
        )
    if kind == "operator" and text == "in":
        return "%in%"
    if kind == "operator" and re.fullmatch(r"[-+]{1,4}|[*/:^]|\*\*|(\*\*|[*/:^])[-+]", text):
        return text
    if kind == "context" and text in "()":
        return text
    raise NotAllowed(f"{_short(text)!r} is not allowed here")


def _refuse_many(tree: Any, text: str, parts: Parts) -> None:
    """Refuse a tree of terms whose expansion would not end."""
    sizes: dict[int, int] = {}
    waiting = [(tree, False)]
    while waiting:
        node, ready = waiting.pop()
        arguments = list(getattr(node, "args", ()))
        if arguments and not ready:
            waiting.append((node, True))
            waiting.extend((argument, False) for argument in arguments)
            continue
        size = 1
        if len(arguments) == 1:
            size = sizes[id(arguments[0])]
        elif arguments:
            left, right = (sizes[id(argument)] for argument in arguments)
            symbol = node.operator.symbol
            if symbol in ("**", "^"):
                power = str(arguments[1])
                if not re.fullmatch("[0-9]{1,2}", power):
                    raise _error(parts, text, "a power is one whole number, as in (x + z)**2")
                size = left ** int(power)
            else:
                size = left + right + (left * right if symbol not in "+-" else 0)
        if size > MAX_PRODUCTS:
            raise _error(
                parts, text, f"more than {MAX_PRODUCTS} products of terms are too many; write "
                "out those that are meant"
            )  # fmt: skip
        sizes[id(node)] = size


def _error(parts: Parts, blamed: str, problem: str) -> FormulaError:
    """The error, pointing at the first place where the word blamed stands by itself."""
    word = re.search(rf"(?<!\w){re.escape(blamed)}(?!\w)", parts.text) if blamed else None
    place = word.start() if word else max(parts.text.find(blamed), 0)
    return FormulaError(parts.text, place, problem)


def _blamed(problem: str, word: str) -> str:
    """What to point at: the name that is unknown, or else the token."""
    named = re.match(r"'(\w{1,100})' is neither", problem)
    return named[1] if named else word


def first_line(error: BaseException) -> str:
    """The first line of what formulaic says, without its marks."""
    return re.sub(r"\x1b\[[\d;]*m|[⧛⧚]", "", str(error)).partition("\n")[0]


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}…"
