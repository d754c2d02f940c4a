"""A table of the user's from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hierbayes.errors import InputError, suggestion


def read_table(name: str, formula: str | None, known: list[str]) -> Any:
    """The rows of a CSV file, refused in words where there are none, or no formula for them."""
    import pandas as pd

    path = Path(name)
    if not path.is_file():
        near = suggestion(name, known)
        raise InputError(f"{name!r} is neither a file nor a shipped data set; {near}")
    if formula is None:
        raise InputError(f'--formula is needed for {path.name}: "y ~ 1 + x + (1 + x | group)"')
    try:
        frame = pd.read_csv(path, sep="\t" if path.suffix in (".tsv", ".tab") else ",")
    except pd.errors.EmptyDataError:
        raise InputError(f"{path.name} is empty") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} cannot be read as CSV: {error}") from error
    if frame.empty:
        raise InputError(f"{path.name} has a header but no rows")
    return frame
