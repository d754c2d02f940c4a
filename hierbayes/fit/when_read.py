"""Arrays that are made when they are first read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class WhenRead:
    """A field of an array, or of a function that makes it, which is called when first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.place = f"_{name}"

    def __get__(self, fit: Any, owner: type | None = None) -> Any:
        if fit is None:
            return None  # the field's default
        value = fit.__dict__.get(self.place)
        if callable(value):
            value = fit.__dict__[self.place] = value()
        return value

    def __set__(self, fit: Any, value: np.ndarray | Callable[[], np.ndarray] | None) -> None:
        fit.__dict__[self.place] = value
