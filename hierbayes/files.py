"""Files that are written whole or not at all, and the folder of compiled programs."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from hierbayes.errors import InputError


def write_whole(path: Any, data: bytes, *, new: bool = False) -> None:
    """Write ``data`` to ``path``, whole or not at all: beside it first, then in its place.

    A link keeps its target, into which the file goes; what is no file is refused. ``new``: with a
    FileExistsError where something is there already.
    """
    path = checked_place(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    temporary = Path(name)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        if not moved(temporary, path, replaces=not new):
            raise FileExistsError(errno.EEXIST, "there is something already", str(path))
        temporary.unlink(missing_ok=True)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def checked_place(path: Any) -> Path:
    """Where a file at ``path`` would lie; refused where a device or a folder is, or no folder."""
    shown = repr(str(path))
    real = Path(os.path.realpath(path))
    if not real.parent.is_dir():
        raise InputError(f"cannot write {shown}: the folder does not exist")
    if real.exists() and not real.is_file():
        kind = "a folder" if real.is_dir() else "no regular file (a device or a pipe)"
        raise InputError(f"cannot write {shown}: it is {kind}; give the path of a file")
    return real


KEPT = "{out} has come or changed during the run, and is kept as it is"


def seen(path: Path) -> tuple[int, ...] | None:
    """What tells a file from another that has taken its place; None where there is none."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


def beside(path: Path) -> Path:
    """The first free name beside one that something else has taken during the run."""
    names = (path.with_name(f"{path.stem}-{k}{path.suffix}") for k in itertools.count(2))
    return next(name for name in names if not os.path.lexists(name))


def moved(file: Path, place: Path, *, replaces: bool) -> bool:
    """Whether the file could be moved there; where it replaces nothing, by a link that cannot."""
    if replaces:
        os.replace(file, place)
        return True
    try:
        os.link(file, place)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if os.path.lexists(place):
            return False
        os.replace(file, place)
    return True


MARK = "hierbayes:sealed"
"""Stands in every sealed file, so that one that has lost its seal is known from an old one."""

_SEAL = b"\n" + MARK.encode() + b":sha256:"
_NOTE = b"\n" + MARK.encode() + b", the SHA-256 of what stands before this:" + b" " * 1024
"""Long enough to be found where a block of it is lost."""


def sealed(data: bytes) -> bytes:
    """``data`` and its SHA-256 behind it, where HDF5 does not look."""
    data += _NOTE
    return data + _SEAL + hashlib.sha256(data).hexdigest().encode() + b"\n"


def unsealed(data: bytes) -> bytes | None:
    """The content of a sealed file, None of one that never was; a ValueError where they differ."""
    length = len(_SEAL) + 65
    content, seal = data[:-length], data[-length:]
    if seal.startswith(_SEAL):
        if hashlib.sha256(content).hexdigest().encode() + b"\n" == seal[len(_SEAL) :]:
            return content.removesuffix(_NOTE)
        raise ValueError("its checksum is not that of its content")
    if MARK.encode() in data:
        raise ValueError("it has lost its checksum")
    return None


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
