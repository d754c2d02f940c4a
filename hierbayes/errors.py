"""What hierbayes says when something is wrong: errors at the boundary, warnings with the result."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class InputError(ValueError):
    """Bad input, refused before any computation."""


class NotApplicable(InputError):
    """A method that cannot serve these tasks, though others may."""


class FitWarning(UserWarning):
    """What a careful colleague would say about a fit; also kept in ``fit.warnings``."""


PACKAGE = f"{__name__.partition('.')[0]}."

_HEARD: ContextVar[list[str] | None] = ContextVar("hierbayes_heard", default=None)
"""Who listens to :func:`announce` in this thread; None where warnings go to Python."""


def announce(messages: Iterable[str]) -> tuple[str, ...]:
    """Issue each message as a :class:`FitWarning`, at the user's line, and return them all."""
    messages, heard = tuple(messages), _HEARD.get()
    if heard is not None:
        heard.extend(messages)
        return messages
    for message in messages:
        warnings.warn(message, FitWarning, stacklevel=_steps_out_of_the_package())
    return messages


def _steps_out_of_the_package() -> int:
    """The ``stacklevel`` of the first frame above :func:`announce` that is not the package's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(PACKAGE):
        frame, level = frame.f_back, level + 1
    return level


@contextmanager
def overhearing() -> Iterator[list[str]]:
    """What is announced inside goes to the list alone: whoever says it otherwise, or once.

    Python's own filters belong to the whole process: ``warnings.catch_warnings`` in two threads at
    once leaves those of one of them behind for good.
    """
    heard: list[str] = []
    token = _HEARD.set(heard)
    try:
        yield heard
    finally:
        _HEARD.reset(token)


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
