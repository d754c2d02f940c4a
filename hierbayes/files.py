"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hierbayes.errors import InputError


@contextmanager
def whole_file(path: Any) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block succeeds."""
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"cannot write {str(path)!r}: the folder does not exist")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    """Which permissions new files of this user lack; it can only be read by setting it."""
    current = os.umask(0)
    os.umask(current)
    return current
