"""What hierbayes says when something is wrong: errors at the boundary, warnings with the result."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any


class InputError(ValueError):
    """Bad input, refused before any computation."""


class NotApplicable(InputError):
    """A method that cannot serve these tasks, though others may."""


class FitWarning(UserWarning):
    """What a careful colleague would say about a fit; also kept in ``fit.warnings``."""


def announce(messages: Iterable[str], stacklevel: int = 3) -> tuple[str, ...]:
    """Issue each message as a :class:`FitWarning` and return them as a tuple."""
    messages = tuple(messages)
    for message in messages:
        warnings.warn(message, FitWarning, stacklevel=stacklevel)
    return messages


def listing(items: Sequence[object], limit: int = 5) -> str:
    """``'a', 'b' and 3 more``: at most ``limit`` items, quoted."""
    shown = ", ".join(repr(_plain(item)) for item in items[:limit])
    rest = len(items) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown


def suggestion(name: str, known: Sequence[str]) -> str:
    """``did you mean 'county'?`` where something close is known, else the known names."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {listing(list(known), 12)}"


def _plain(item: Any) -> object:
    """NumPy scalars print as ``np.str_('a')``; their Python values print as people write them."""
    return item.item() if hasattr(item, "item") and getattr(item, "ndim", 1) == 0 else item
