"""Names of our own for what a formula names, and the words that it was named by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from hierbayes.errors import InputError, suggestion


class NotAllowed(InputError):
    """Part of a term that may not be evaluated, and why."""


@dataclass
class Names:
    """Names of our own for a formula's columns, strings and transformed columns.

    A column called ``log`` or ``1`` or ``a b`` cannot be mistaken for anything else under them.
    """

    prefix: str = "_hb_"
    columns: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)
    made: dict[tuple[str, str], str] = field(default_factory=dict)
    terms: set[str] = field(default_factory=set)

    @classmethod
    def beside(cls, columns: Sequence[str]) -> Names:
        """Names that no column has."""
        prefix = "_hb_"
        while any(prefix in column for column in columns):
            prefix += "_"
        return cls(prefix)

    def column(self, column: str, *, inside: bool = False) -> str:
        """The name of a column, shown as it is or, ``inside`` code, in backticks where needed."""
        shown = f"`{column}`" if inside and not column.isidentifier() else column
        name = self._name("column", shown, shown)
        self.columns[name] = column
        return name

    def text(self, text: str) -> str:
        """The name of a string."""
        name = self._name("text", text, repr(text))
        self.texts[name] = text
        return name

    def term(self, code: str) -> str:
        """The name of a transformed column."""
        name = self._name("term", code, code)
        self.terms.add(name)
        return name

    def show(self, text: str) -> str:
        """A text with the user's words for our names."""

        def words(found: re.Match[str]) -> str:
            word = self.shown.get(found[0], found[0])
            return self.show(word) if found[0] in self.terms else word

        return re.sub(rf"{self.prefix}\d+_", words, text)

    def _name(self, kind: str, key: str, shown: str) -> str:
        name = self.made.setdefault((kind, key), f"{self.prefix}{len(self.made)}_")
        self.shown[name] = shown
        return name


def unknown(name: str, columns: Sequence[str]) -> NotAllowed:
    """What is said of a name that stands for nothing."""
    return NotAllowed(
        f"{name!r} is neither a column nor a known function; {suggestion(name, columns)}"
    )
