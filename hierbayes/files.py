"""Files that are written whole or not at all, and the folder of compiled programs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

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


_FOUND: dict[str, Any] = {}
"""JAX's own settings, as they were before the first call of :func:`compilation_cache`."""


def compilation_cache(path: str | Path | Literal[False] | None = None) -> Path | None:
    """Keep compiled programs on disk, so that the next process need not compile them again.

    Sets JAX's persistent compilation cache for this process, from now on, for all that JAX
    compiles. It is off unless asked for: by this call, or by JAX's own environment variables.
    Programs are found again where the code, the shapes, the versions and the machine agree.

    Parameters
    ----------
    path : str, Path, False or None
        The folder, made if need be; ``hierbayes`` in the user's cache folder by default
        (``$XDG_CACHE_HOME``, else ``~/.cache``). Loading a program runs it, so the folder must be
        one that only trusted users write to. False gives JAX its settings back.

    Returns
    -------
    Path or None
        The folder, None after False.

    Examples
    --------
    >>> import tempfile
    >>> import hierbayes as hb
    >>> folder = hb.compilation_cache(tempfile.mkdtemp())
    >>> folder.is_dir()
    True
    >>> hb.compilation_cache(False)
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache as cache

    wanted: dict[str, Any] = {
        "jax_enable_compilation_cache": True,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    folder = None
    if path is False:
        wanted = dict(_FOUND)
        _FOUND.clear()
    else:
        user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(user, "hierbayes") if path is None else Path(path)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        wanted["jax_compilation_cache_dir"] = str(folder)
        for name in wanted:
            _FOUND.setdefault(name, getattr(jax.config, name))
    for name, value in wanted.items():
        jax.config.update(name, value)
    cache.reset_cache()  # JAX decides once, at its first program, whether there is a cache
    return folder


def _umask() -> int:
    """Which permissions new files of this user lack; it can only be read by setting it."""
    current = os.umask(0)
    os.umask(current)
    return current
