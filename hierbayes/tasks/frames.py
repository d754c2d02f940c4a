"""Columns of a DataFrame as float64 arrays, refused with the column's name when they are not.

Pandas, polars and everything else that narwhals reads go through here; the rest of the package
sees NumPy arrays only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hierbayes import inputs
from hierbayes.errors import InputError, announce, listing, suggestion

if TYPE_CHECKING:
    import narwhals.stable.v1 as nw

Missing = Literal["raise", "drop"]


class Frame:
    """A read-only view of a DataFrame by column, with its rows numbered as they came."""

    def __init__(self, data: Any, rows: np.ndarray | None = None):
        import narwhals.stable.v1 as nw
        from narwhals.exceptions import DuplicateError

        try:
            self.native = nw.from_native(data, eager_only=True)
        except TypeError as error:
            raise InputError(
                f"expected a DataFrame (pandas, polars, …), found {type(data).__name__}"
            ) from error
        except DuplicateError as error:
            raise InputError(f"the DataFrame has columns of the same name: {error}") from error
        self.columns: list[str] = [str(c) for c in self.native.columns]
        odd = any(type(c) is not str for c in self.native.columns)
        if len(set(self.columns)) < len(self.columns):
            twice = sorted({c for c in self.columns if self.columns.count(c) > 1})
            raise InputError(f"the DataFrame has columns of the same name: {listing(twice)}")
        if self.native.shape[0] == 0:
            raise InputError("the DataFrame has no rows")
        if odd:  # a pivoted table's columns are numbers: called by their text everywhere
            renamed: Any = nw.to_native(self.native)
            self.native = nw.from_native(renamed.set_axis(self.columns, axis=1), eager_only=True)
        self.rows = np.arange(len(self)) if rows is None else rows

    def __len__(self) -> int:
        return self.native.shape[0]

    def require(self, columns: Sequence[str], role: str) -> None:
        """Refuse a column that the frame does not hold."""
        for column in columns:
            if column not in self.columns:
                raise InputError(
                    f"{role} {column!r} is not a column; {suggestion(column, self.columns)}"
                )

    def numbers(self, column: str) -> np.ndarray:
        """One column as float64, nulls as NaN; strings, dates and categories are refused."""
        import narwhals.stable.v1 as nw

        series = self.native[column]
        dtype = series.dtype
        if not (dtype.is_numeric() or dtype == nw.Boolean):
            values = series.drop_nulls().to_numpy()
            if dtype in (nw.Object, nw.Unknown) and _all_numbers(values):
                return _with_nan(_values(series))
            raise InputError(
                f"column {column!r} holds {_kind(values)} where numbers belong, for example "
                f"{_first_non_number(values)!r}; convert it, or use from_formula, which encodes "
                "categories"
            )
        return _with_nan(_values(series)) if series.null_count() else _float(series)

    def groups(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """``(names, index)``: the values that occur in a complete column, and each row's number.

        Categories keep their order; other values stand in the order in which they first occur.
        """
        import narwhals.stable.v1 as nw

        series = self.native[column]
        if series.dtype.is_integer() or series.dtype == nw.String:
            return _numbered(series)
        values = _values(series)
        number: dict[Any, int] = {}
        if series.dtype in (nw.Categorical, nw.Enum):
            used = set(values)
            ordered = [c for c in series.cat.get_categories().to_list() if c in used]
            number = {name: i for i, name in enumerate(ordered)}
        index = np.array([number.setdefault(value, len(number)) for value in values], dtype=int)
        return as_names(list(number)), index

    def is_null(self, column: str) -> np.ndarray:
        """Rows in which a column of any kind has no value, (N,) of bool."""
        import narwhals.stable.v1 as nw

        series = self.native[column]
        if not series.null_count() and (series.dtype.is_integer() or series.dtype == nw.String):
            return np.zeros(len(series), dtype=bool)
        if series.dtype.is_float():
            return np.isnan(_with_nan(_values(series)) if series.null_count() else _float(series))
        values = _values(series)
        return np.array([v is None or v != v for v in values], dtype=bool)

    def is_numeric(self, column: str) -> bool:
        """Whether a column holds numbers or truth values."""
        import narwhals.stable.v1 as nw

        series = self.native[column]
        if series.dtype in (nw.Object, nw.Unknown):  # numbers as Python's objects, perhaps
            values = series.drop_nulls().to_numpy()
            return len(values) > 0 and _all_numbers(values)
        return series.dtype.is_numeric() or series.dtype == nw.Boolean

    def is_temporal(self, column: str) -> bool:
        """Whether a column holds dates or times."""
        return self.native[column].dtype.is_temporal()

    def is_categorical(self, column: str) -> bool:
        """Whether a column was declared to hold categories."""
        import narwhals.stable.v1 as nw

        return self.native[column].dtype in (nw.Categorical, nw.Enum)

    def distinct_strings(self, column: str) -> list[str]:
        """The different values of a column, as strings, in order of first occurrence."""
        return list(dict.fromkeys(str(v) for v in _values(self.native[column]) if v is not None))

    def to_pandas(self, columns: Sequence[str]) -> Any:
        """Some columns as a pandas DataFrame; categories keep their order."""
        import pandas as pd

        table = {}
        for column in columns:
            series = self.native[column]
            if self.is_numeric(column):
                table[column] = self.numbers(column)
                continue
            # categories are compared as text, so that they come back from a file as they were
            text = [None if v is None else str(v) for v in _values(series)]
            if self.is_categorical(column):
                order = [str(c) for c in series.cat.get_categories().to_list()]
                table[column] = pd.Categorical(text, categories=order)
            else:
                table[column] = np.array(text, dtype=object)
        return pd.DataFrame(table, index=np.arange(len(self)))

    def take(self, rows: np.ndarray) -> Frame:
        """The frame with only these row numbers."""
        import narwhals.stable.v1 as nw

        return Frame(nw.to_native(self.native[rows.tolist()]), rows=self.rows[rows])


def _numbered(series: nw.Series[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Names in order of first occurrence and each row's number, of whole numbers or strings."""
    import pandas as pd

    found: Any = pd.factorize(series.to_numpy())
    index, values = found
    if values.dtype.kind in "iu" and np.abs(values.astype(float)).max(initial=0) < 2**62:
        return values.astype(np.int64), index
    return as_names(values.tolist()), index


def as_names(values: Sequence[Any]) -> np.ndarray:
    """Task names as one array: integers stay integers, everything else becomes strings."""
    plain = [v.item() if isinstance(v, np.generic) else v for v in values]
    if plain and all(
        isinstance(v, int) and not isinstance(v, bool) and abs(v) < 2**62 for v in plain
    ):
        return np.array(plain, dtype=np.int64)
    if plain and all(isinstance(v, float) and v.is_integer() and abs(v) < 2**62 for v in plain):
        return np.array([int(v) for v in plain], dtype=np.int64)
    # 1.0 is task "1" whether or not a task 2.5 stands beside it
    return np.array([f"{v:.15g}" if isinstance(v, float) else str(v) for v in plain], dtype=np.str_)


def complete_rows(columns: dict[str, np.ndarray], missing: Missing) -> np.ndarray:
    """Which rows have finite values everywhere; refuses the others or drops them with a warning.

    Infinite values are refused whatever ``missing`` says: a dropped row may hide a log of zero.
    """
    inputs.one_of("missing", missing, ("raise", "drop"))
    for name, values in columns.items():
        infinite = np.isinf(values)
        if infinite.any():
            raise InputError(
                f"column {name!r} has {infinite.sum()} infinite value(s), the first in row "
                f"{np.flatnonzero(infinite)[0]} (counting from 0); mend or remove these rows"
            )
    gaps = {name: int(np.isnan(v).sum()) for name, v in columns.items() if np.isnan(v).any()}
    if not gaps:
        return np.ones(len(next(iter(columns.values()))), dtype=bool)
    found = ", ".join(f"{count} in column {name!r}" for name, count in gaps.items())
    if missing == "raise":
        raise InputError(
            f'missing values (NaN): {found}; impute them, or pass missing="drop" to leave '
            "these rows out"
        )
    keep = ~np.any([np.isnan(v) for v in columns.values()], axis=0)
    if not keep.any():
        raise InputError(f"no complete row is left; missing values (NaN): {found}")
    dropped = f"dropped {(~keep).sum()} of {len(keep)} rows with missing values ({found})"
    announce([dropped])
    return keep


def _values(series: nw.Series[Any]) -> list[Any]:
    """Values as Python has them, None where there is none, whatever the DataFrame writes there."""
    values = series.to_list()
    if not series.null_count():
        return values
    nulls = series.is_null().to_list()
    return [None if null else value for value, null in zip(values, nulls, strict=True)]


def _float(series: nw.Series[Any]) -> np.ndarray:
    return np.array(series.to_numpy(), dtype=np.float64)


def _with_nan(values: list[Any]) -> np.ndarray:
    return np.array([np.nan if v is None else float(v) for v in values], dtype=np.float64)


def _all_numbers(values: np.ndarray) -> bool:
    return all(isinstance(v, (int, float, np.number)) for v in values)


def _first_non_number(values: np.ndarray) -> object:
    return next(
        (v for v in values.tolist() if not isinstance(v, (int, float))), values.tolist()[:1]
    )


def _kind(values: np.ndarray) -> str:
    kinds = {type(v).__name__ for v in values.tolist()}
    return "strings" if kinds == {"str"} else "values of type " + ", ".join(sorted(kinds))
