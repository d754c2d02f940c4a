"""What is computed of Tasks once and kept with them, for as long as they live."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from hierbayes.tasks.container import Tasks

Made = TypeVar("Made")

_KEPT: weakref.WeakKeyDictionary[Tasks, dict[Hashable, Any]] = weakref.WeakKeyDictionary()


def kept(function: Callable[..., Made]) -> Callable[..., Made]:
    """Remember ``function(tasks, *key)``: Tasks never change, so neither does what follows.

    The key must be hashable, and the result must not hold the tasks themselves, which would then
    live for ever. What raises is not remembered.
    """

    @functools.wraps(function)
    def remembered(tasks: Tasks, *key: Hashable) -> Made:
        of_tasks = _KEPT.setdefault(tasks, {})
        place = (function, *key)
        if place not in of_tasks:
            of_tasks[place] = function(tasks, *key)
        return of_tasks[place]

    return remembered
