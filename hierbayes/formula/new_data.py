"""Rows that a formula's transforms cannot read, refused by column and category."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from hierbayes.errors import InputError, listing, suggestion
from hierbayes.tasks.frames import Frame

NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
"""Each character has one place in it, so that no text takes long to refuse."""


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


def with_used_categories(table: Any) -> Any:
    """The table, its columns of categories without those that no row has, as lme4 reads them."""
    used = {c: table[c].cat.remove_unused_categories() for c in table if hasattr(table[c], "cat")}
    return table.assign(**used)


def unseen_categories(table: Any, training: Any, categories: Sequence[str]) -> str | None:
    """Which column holds which categories that the training data did not; None if none does.

    Categories are the values of columns that are no numbers, and of ``categories``: of numbers
    inside ``C(…)``.
    """
    found = []
    for column in table.columns:
        if is_numeric(training[column]) and column not in categories:
            continue
        known = known_categories(training[column])
        new = [v for v in dict.fromkeys(table[column].tolist()) if v not in known]
        if new:
            found.append(f"{listing(new)} in column {column!r} (known there: {listing(known)})")
    return "; ".join(found) or None


class UnseenLevels(Exception):
    """Values outside the levels that a term was encoded with."""


def refuse_unseen_levels(spec: Any, table: Any, context: Any) -> None:
    """Raise :class:`UnseenLevels` where the table holds values that a term has no levels for.

    Formulaic would encode them as zeros, with a warning that only filters of the whole process
    could turn into an error.
    """
    from formulaic.materializers import FormulaMaterializer

    evaluator: Any = FormulaMaterializer.for_data(table)(table, context=context)
    levels = {e: s["categories"] for e, (_, s) in spec.encoder_state.items() if "categories" in s}
    factors = {f.expr: f for term in spec.formula for f in term.factors}
    for expression, known in levels.items():
        values = evaluator._evaluate_factor(factors[expression], spec, set()).values
        there = {*known}
        new = [v for v in dict.fromkeys(np.asarray(values).tolist()) if v not in there]
        if new:
            raise UnseenLevels(f"{listing(new)} in {expression} (known there: {listing(known)})")


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
    numbers = [v for v in values if NUMBER.fullmatch(v.strip())]
    others = [v for v in values if not NUMBER.fullmatch(v.strip())]
    if len(numbers) > 2 and len(numbers) >= len(values) / 2:
        besides = f", beside {listing(others, 3)}" if others else ""
        raise InputError(
            f"column {column!r} holds strings where numbers belong ({listing(numbers, 2)}"
            f"{besides}); convert it to numbers, or, if it names categories, give them names "
            "that are not numbers"
        )
