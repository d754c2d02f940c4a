"""Take a mixed-model formula apart: outcome, fixed terms, bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hierbayes.errors import InputError, listing

_OPENING, _CLOSING = "([{", ")]}"
MAX_LENGTH = 10_000
"""Characters of a formula."""


@dataclass(frozen=True)
class Bar:
    """``(terms | group)``, or ``(terms || group)`` where ``independent``."""

    terms: str
    group: str
    independent: bool
    start: int


@dataclass(frozen=True)
class Parts:
    """The parts of a formula and where they stand in it."""

    text: str
    outcome: str
    fixed: str
    bars: tuple[Bar, ...]
    group: str


class FormulaError(InputError):
    """A formula that cannot be read; the message points at the place."""

    def __init__(self, text: str, position: int, problem: str):
        caret = " " * position + "^"
        super().__init__(f"cannot read the formula: {problem}\n\n    {text}\n    {caret}")


def split(text: str) -> Parts:
    """Split ``y ~ fixed + (terms | group) + …`` without reading what lies between the bars."""
    depth = depths(text)
    tilde = _tilde(text, depth)
    fixed, bars = [], []
    for begin, end, sign in _terms(text, tilde + 1, depth):
        bar = _bar(text, begin, end, depth)
        if bar is None:
            fixed.append((sign, text[begin:end].strip()))
        elif sign == "-":
            raise FormulaError(text, begin, "a bar cannot be subtracted")
        else:
            bars.append(bar)
    if not bars:
        raise FormulaError(
            text, len(text), "it has no grouping bar; write for example + (1 | county)"
        )
    groups = list(dict.fromkeys(bar.group for bar in bars))
    if len(groups) > 1:
        raise FormulaError(
            text, text.index("|", bars[1].start) if len(bars) > 1 else 0,
            f"two different grouping factors ({listing(groups)}): crossed or nested effects are "
            "not supported yet; use one grouping factor",
        )  # fmt: skip
    joined = " ".join(f"{sign} {term}" for sign, term in fixed)
    outcome = text[:tilde].strip()
    return Parts(text, outcome, joined.removeprefix("+ ") or "1", tuple(bars), groups[0])


def _tilde(text: str, depth: list[int]) -> int:
    """Where the one ~ stands, with an outcome before it."""
    tildes = [i for i, c in enumerate(text) if c == "~" and depth[i] == 0]
    if len(tildes) != 1:
        raise FormulaError(
            text, tildes[1] if tildes else len(text), "it needs one ~ between outcome and terms"
        )
    if not text[: tildes[0]].strip():
        raise FormulaError(text, tildes[0], "the outcome before ~ is missing")
    return tildes[0]


def depths(text: str) -> list[int]:
    """How many brackets are open at each character; quoted text counts as two deeper."""
    _check(text)
    depth, stack, quote, quote_start = [], [], "", 0
    for i, c in enumerate(text):
        if quote:
            depth.append(len(stack) + 2)
            if c == quote == "`" and i == quote_start + 1:
                raise FormulaError(text, i, "these backticks hold no name")
            quote = "" if c == quote else quote
        elif c in "'\"`":
            quote, quote_start = c, i
            depth.append(len(stack) + 2)
        elif c in _OPENING:
            depth.append(len(stack))
            stack.append(i)
        elif c in _CLOSING:
            if not stack or _OPENING.index(text[stack[-1]]) != _CLOSING.index(c):
                raise FormulaError(text, i, f"this {c!r} closes nothing")
            stack.pop()
            depth.append(len(stack))
        else:
            depth.append(len(stack))
    if quote:
        raise FormulaError(text, quote_start, "this quote is never closed")
    if stack:
        raise FormulaError(text, stack[-1], f"this {text[stack[-1]]!r} is never closed")
    return depth


def _check(text: Any) -> None:
    """Refuse what is no string, or too long to be read."""
    if not isinstance(text, str):
        raise InputError(f"a formula is a string, found {type(text).__name__}")
    if len(text) > MAX_LENGTH:
        raise InputError(
            f"a formula of {len(text)} characters is too long: {MAX_LENGTH} at most; give the "
            "columns shorter names, or put several into a transformed one"
        )


def _terms(text: str, start: int, depth: list[int]) -> list[tuple[int, int, str]]:
    """(begin, end, sign) of the terms joined by + and − outside brackets."""
    terms, begin, sign = [], start, "+"
    for i in range(start, len(text) + 1):
        at_end = i == len(text)
        if not at_end and not (text[i] in "+-" and depth[i] == 0):
            continue
        if text[begin:i].strip():
            terms.append((begin, i, sign))
        elif at_end or begin > start:
            raise FormulaError(text, min(i, len(text)), "a term is missing here")
        if not at_end:
            begin, sign = i + 1, text[i]
    return terms


def _bar(text: str, begin: int, end: int, depth: list[int]) -> Bar | None:
    """The bar in text[begin:end], or None where there is none."""
    inner, outermost, in_code = [], begin, False
    for i in range(begin, end):
        if depth[i] == 0 and text[i] in _OPENING:  # braces and calls hold code, no bars
            before = text[outermost:i].strip()[-1:]
            in_code = text[i] != "(" or before.isidentifier() or before.isdigit()
        elif depth[i] == 0 and text[i] in _CLOSING:
            outermost = i
        elif text[i] == "|" and depth[i] == 1 and not in_code:
            inner.append(i)
    if not inner:
        outside = [i for i in range(begin, end) if text[i] == "|" and depth[i] == 0]
        if outside:
            raise FormulaError(text, outside[0], "put the bar and its terms in parentheses")
        return None
    term = text[begin:end].strip()
    if not (term.startswith("(") and term.endswith(")")):
        raise FormulaError(text, begin, "a bar stands alone in its parentheses: + (x | group)")
    first, last = inner[0], inner[-1]
    if len(inner) > 2 or (len(inner) == 2 and last != first + 1):
        raise FormulaError(text, last, "more than one bar in these parentheses")
    opening = text.index("(", begin)
    closing = begin + len(text[begin:end].rstrip()) - 1
    terms, group = text[opening + 1 : first].strip(), text[last + 1 : closing].strip()
    if not terms:
        raise FormulaError(text, first, "terms are missing before the bar; write (1 | group)")
    if not group:
        raise FormulaError(text, last + 1, "the grouping column is missing after the bar")
    quoted, group = is_quoted(group), unquoted(group)
    if not quoted and any(c in group for c in "/:*+()"):
        raise FormulaError(
            text, last + 1,
            f"the grouping factor {group!r} is not one column: nested and crossed factors are "
            "not supported yet; make one column that names the tasks",
        )  # fmt: skip
    return Bar(terms, group, len(inner) == 2, opening)


def is_quoted(name: str) -> bool:
    """Whether a name stands in backticks, all of it."""
    return len(name) > 2 and name[0] == name[-1] == "`" and "`" not in name[1:-1]


def unquoted(name: str) -> str:
    """A column's name without the backticks around it."""
    return name[1:-1] if is_quoted(name) else name
