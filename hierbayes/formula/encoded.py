"""The columns that formulaic makes of checked terms, now and again of new rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hierbayes.errors import InputError
from hierbayes.formula import new_data
from hierbayes.formula.bars import FormulaError, Parts
from hierbayes.formula.names import Names
from hierbayes.formula.terms import Terms, context, first_line, under_our_names


@dataclass(frozen=True)
class Encoded:
    """One part of the formula as formulaic encoded it.

    ``names`` are the user's for its columns, ``made`` the same in our names.
    """

    spec: Any
    names: tuple[str, ...]
    made: tuple[str, ...]

    @classmethod
    def fit(
        cls, terms: Terms, table: Any, parts: Parts, names: Names
    ) -> tuple[Encoded, np.ndarray]:
        """The part as encoded in the training data, and its columns there."""
        with _formulaic_errors(terms, parts, names):
            matrix = terms.formula.get_model_matrix(
                table, context=context(names), na_action="ignore", output="numpy"
            )
            spec: Any = matrix.model_spec
            new_data.refuse_unseen_levels(spec, table, context(names))
        # treatment-coded and full dummies of one level are the same column: name them alike
        made = tuple(name.replace("[T.", "[") for name in spec.column_names)
        found = cls(spec, tuple(names.show(name) for name in made), made)
        return found, found._finite(matrix)

    def matrix(
        self, table: Any, terms: Terms, parts: Parts, names: Names, training: Any
    ) -> np.ndarray:
        """The columns of new rows."""
        ours = under_our_names(table, names)
        with _formulaic_errors(terms, parts, names, (table, training)):
            new_data.refuse_unseen_levels(self.spec, ours, context(names))
            matrix = self.spec.get_model_matrix(ours, context=context(names))
        return self._finite(matrix)

    def _finite(self, matrix: Any) -> np.ndarray:
        values = np.asarray(matrix, dtype=np.float64)
        for i, name in enumerate(self.names):
            bad = ~np.isfinite(values[:, i])
            if bad.any():
                raise InputError(
                    f"the term {name!r} is NaN or infinite in {bad.sum()} row(s), the first "
                    f"{int(np.flatnonzero(bad)[0])} (counting from 0), though its columns are "
                    "finite; a log of zero perhaps"
                )
        return values


class _formulaic_errors:
    """Formulaic's errors and warnings as sentences that point into the user's formula."""

    def __init__(
        self, terms: Terms, parts: Parts, names: Names, tables: tuple[Any, Any] | None = None
    ):
        self.terms, self.parts, self.names, self.tables = terms, parts, names, tables
        self.quiet = np.errstate(all="ignore")  # log(0): refused by name afterwards

    def __enter__(self) -> None:
        self.quiet.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from formulaic.errors import DataMismatchWarning

        self.quiet.__exit__(kind, error, trace)
        if not isinstance(error, Exception) or isinstance(error, InputError):
            return
        if isinstance(error, (DataMismatchWarning, new_data.UnseenLevels)):
            if self.tables is None:
                place = max(self.parts.text.find("levels"), 0)
                raise FormulaError(
                    self.parts.text, place, "the levels that are listed are not all that the data "
                    f"hold in {self.terms.text!r}"
                ) from error  # fmt: skip
            unseen = new_data.unseen_categories(*self.tables, self.terms.categories)
            raise InputError(
                f"new data hold categories that the training data did not: "
                f"{unseen or self.names.show(str(error))}; "
                "nothing was learned of them: leave these rows out, or learn from data that "
                "hold them"
            ) from error
        problem = self.names.show(first_line(error)) or type(error).__name__
        place = max(self.parts.text.find(self.terms.text), 0)
        raise FormulaError(self.parts.text, place, problem) from error
