"""The state of a long run in one file, written whole, read back bit for bit."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hierbayes.errors import InputError
from hierbayes.files import checked_place, sealed, unsealed, write_whole

EVERY = 60.0
"""Seconds between two checkpoints."""


class Checkpoint:
    """A file that holds a pytree and some counters, for one run with its settings.

    ``path`` None keeps nothing.
    """

    def __init__(self, path: Any, method: str, settings: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.described = json.loads(json.dumps({"method": method, **settings}, default=repr))
        self._last = time.monotonic()
        if self.path is not None and not self.path.parent.is_dir():
            raise InputError(f"checkpoint: the folder of {str(path)!r} does not exist")
        if self.path is not None and self.path.is_dir():
            raise InputError(f"checkpoint: {str(path)!r} is a folder; give the path of a file")
        if self.path is not None:
            checked_place(self.path)

    def save(self, state: Any, counters: dict[str, Any], *, force: bool = False) -> None:
        """Write, if a minute has passed since the last time or it is forced."""
        if self.path is None or not (force or time.monotonic() - self._last > EVERY):
            return
        leaves: dict[str, Any] = {
            f"leaf.{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))
        }
        text = json.dumps({"run": self.described, "counters": counters})
        file = io.BytesIO()
        np.savez(file, described=np.array(text), **leaves)
        write_whole(self.path, sealed(file.getvalue()))
        self._last = time.monotonic()

    def load(self, like: Any, own: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """(state, counters) of the file, as ``like`` and ``own`` are; None where none is there."""
        if self.path is None or not self.path.exists():
            return None
        try:
            data = self.path.read_bytes()
            content = unsealed(data)  # None before there was a checksum
            opened = io.BytesIO(data if content is None else content)
            with np.load(opened, allow_pickle=False) as file:
                described = json.loads(str(file["described"]))
                found = [file[f"leaf.{i}"] for i in range(len(file.files) - 1)]
            before, counters = described["run"], described["counters"]
            _check_counters(counters, own)
        except Exception as error:  # NumPy raises whatever unzipping and parsing do
            raise InputError(
                f"{str(self.path)!r} is no checkpoint of hierbayes, or damaged "
                f"({type(error).__name__}: {error}); remove it to start anew"
            ) from error
        if before != self.described:
            names = sorted(before.keys() | self.described.keys())
            other = [
                f"{n}={before.get(n)!r} there, {self.described.get(n)!r} here"
                for n in names
                if before.get(n) != self.described.get(n)
            ]
            raise InputError(
                f"{str(self.path)!r} is the checkpoint of another run ({'; '.join(other)}); give "
                "another path, or remove the file"
            )
        leaves, structure = jax.tree.flatten(like)
        shapes = [(np.shape(x), np.asarray(x).dtype) for x in leaves]
        if shapes != [(x.shape, x.dtype) for x in found]:
            raise InputError(
                f"{str(self.path)!r} holds other weights, or another optimiser's state, than this "
                "run's; give another path, or remove the file"
            )
        return structure.unflatten(found), counters


def _check_counters(found: Any, own: dict[str, Any]) -> None:
    """Refuse counters that are not of the kinds of a run's own."""
    for name, value in own.items():
        there = found[name]
        if isinstance(value, dict):
            _check_counters(there, value)
            continue
        kinds = list if isinstance(value, list) else int if isinstance(value, int) else (int, float)
        if not isinstance(there, kinds) or isinstance(there, bool):
            raise ValueError(f"{name} is {there!r:.40}")
