"""Rows that a formula's transforms cannot read, refused by column and category."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from hierbayes.errors import InputError, listing, suggestion
from hierbayes.tasks.frames import Frame


def check_new_columns(frame: Frame, needed: Sequence[str], training: Any) -> None:
    """Refuse rows that lack a column that is needed, or hold another kind of values in it.

    ``training`` is the table of the columns that the formula was learned from.
    """
    for column in needed:
        if column not in frame.columns:
            raise InputError(
                f"the new data lack column {column!r}, which the formula needs; "
                f"{suggestion(column, frame.columns)}"
            )
        if frame.is_null(column).all():
            continue  # refused as missing values, or left out
        numbers, numeric = is_numeric(training[column]), frame.is_numeric(column)
        if numbers and not numeric:
            others = frame.distinct_strings(column)
            kind = "dates or times" if frame.is_temporal(column) else "strings or categories"
            raise InputError(
                f"column {column!r} of the new data holds {kind} ({listing(others, 3)}), but "
                "numbers in the training data; convert it to numbers"
            )
        if numeric and not numbers:
            raise InputError(
                f"column {column!r} of the new data holds numbers, but categories in the training "
                f"data ({listing(known_categories(training[column]))}); give it the same categories"
            )


def without_idle_categories(table: Any, training: Any) -> Any:
    """The table, its columns of categories without those that no row has and training had not."""
    idle = {}
    for column in table.columns:
        values = table[column]
        if hasattr(values, "cat"):
            known, used = known_categories(training[column]), set(values.tolist())
            keep = known + [c for c in values.cat.categories if c in used and c not in known]
            idle[column] = values.cat.set_categories(keep)
    return table.assign(**idle)


def unseen_categories(table: Any, text: str, training: Any) -> str | None:
    """Which column holds which categories that the training data did not; None if none does.

    Categories are the values of columns that are no numbers, and of numbers inside ``C(…)``.
    """
    found = []
    for column in table.columns:
        if is_numeric(training[column]) and not re.search(
            rf"(?<![\w.])C\(\s*`?{re.escape(column)}`?\s*[,)]", text
        ):
            continue
        known = known_categories(training[column])
        new = [v for v in dict.fromkeys(table[column].tolist()) if v not in known]
        if new:
            found.append(f"{listing(new)} in column {column!r} (known there: {listing(known)})")
    return "; ".join(found) or None


def refuse_unseen_levels(spec: Any, table: Any, text: str, training: Any) -> None:
    """Refuse values outside the levels that a term was encoded with.

    Formulaic would encode them as zeros, with a warning that only filters of the whole process
    could turn into an error.
    """
    from formulaic.materializers import FormulaMaterializer

    evaluator: Any = FormulaMaterializer.for_data(table)(table, context={})
    levels = {e: s["categories"] for e, (_, s) in spec.encoder_state.items() if "categories" in s}
    factors = {f.expr: f for term in spec.formula for f in term.factors}
    for expression, known in levels.items():
        values = evaluator._evaluate_factor(factors[expression], spec, set()).values
        there = {*known}
        new = [v for v in dict.fromkeys(np.asarray(values).tolist()) if v not in there]
        if new:
            unseen = unseen_categories(table, text, training)
            found = unseen or f"{listing(new)} in {expression} (known there: {listing(known)})"
            raise InputError(
                f"new data hold categories that the training data did not: {found}; nothing was "
                "learned of them: leave these rows out, or learn from data that hold them"
            )


def is_numeric(values: Any) -> bool:
    """Whether a column of the training table holds numbers."""
    return hasattr(values.dtype, "kind") and values.dtype.kind in "fiub"


def known_categories(values: Any) -> list[Any]:
    """The categories of a column of the training table."""
    return list(values.cat.categories if hasattr(values, "cat") else dict.fromkeys(values.tolist()))


def refuse_spoiled_numbers(frame: Frame, column: str) -> None:
    """A column of strings that are mostly numbers is a column of numbers gone wrong."""
    if frame.is_temporal(column):
        raise InputError(
            f"column {column!r} holds dates or times; make a column of numbers of it beforehand, "
            "days since a start for example"
        )
    if frame.is_numeric(column) or frame.is_categorical(column):
        return
    values = frame.distinct_strings(column)
    numbers = [v for v in values if re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", v)]
    others = [v for v in values if v not in numbers]
    if len(numbers) > 2 and len(numbers) >= len(values) / 2:
        besides = f", beside {listing(others, 3)}" if others else ""
        raise InputError(
            f"column {column!r} holds strings where numbers belong ({listing(numbers, 2)}"
            f"{besides}); convert it to numbers, or, if it names categories, give them names "
            "that are not numbers"
        )
