"""What a saved fit's HDF5 holds, read with suspicion: a file may be damaged, or a stranger's.

Run as a program, it only tries: HDF5 is C code that a damaged file may hang or kill. It imports
nothing of the package, so that the trial is quick.
"""

from __future__ import annotations

import io
import math
import subprocess
import sys
from typing import Any

import numpy as np

GROUPS = (
    "posterior", "sample_stats", "constant_data", "observed_data", "hierbayes",
    "hierbayes/training",
)  # fmt: skip
"""The groups that are read; the others can be made again."""

NAMED = {"constant_data": ("task", "row")}
"""Coordinates that are read; the others only repeat names."""

MOST_MEMBERS = 10_000
DAMAGED = 3
"""The exit code of a trial that has found what cannot be read."""

Arrays = dict[str, dict[str, np.ndarray]]


class Damaged(ValueError):
    """What cannot be a saved fit, and where."""


def read(data: bytes) -> tuple[str | None, Arrays]:
    """(the JSON of the fit or None, arrays by group and name), by no more memory than the file."""
    import h5py

    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            reader = _Reader(data)
            return reader.text(file), reader.groups(file)
    except Damaged:
        raise
    except Exception as error:  # h5py raises whatever HDF5 and NumPy do
        raise Damaged(f"HDF5 cannot read it ({type(error).__name__}: {error})") from error


def marked(data: bytes, mark: str) -> bytes:
    """The file with a mark among the properties that netCDF libraries write anew, not copy."""
    import h5py

    memory = io.BytesIO(data)
    with h5py.File(memory, "r+") as file:
        found = file.attrs.get("_NCProperties", b"version=2")
        known = found.decode() if isinstance(found, bytes) else str(found)
        file.attrs["_NCProperties"] = np.bytes_(f"{known},seal={mark}".encode())
    return memory.getvalue()


def refuse_what_hangs(path: str, seconds: float) -> None:
    """Try to read a file in another process first, for one without a checksum."""
    try:
        run = subprocess.run(
            [sys.executable, "-I", __file__, path],
            capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Damaged(f"HDF5 has not read it in {seconds:g} seconds") from None
    except OSError:
        return  # no other process is to be had
    if run.returncode == DAMAGED:
        raise Damaged(run.stdout.strip())
    if run.returncode < 0:
        raise Damaged(f"HDF5 dies of it (signal {-run.returncode})")


def _group(file: Any, path: str) -> Any:
    import h5py

    at = file
    for name in path.split("/"):
        if name not in at:
            return None
        if not isinstance(at.get(name, getlink=True), h5py.HardLink):
            raise Damaged(f"{path} is a link elsewhere")
        at = at[name]
        if not isinstance(at, h5py.Group):
            raise Damaged(f"{path} is no group")
    return at


class _Reader:
    """Reads arrays until they are larger than the file that they are said to be in."""

    def __init__(self, data: bytes) -> None:
        self.data, self.left = data, len(data)

    def text(self, file: Any) -> str | None:
        group = _group(file, "hierbayes")
        if group is None or "fit" not in group.attrs:
            return None
        if group.attrs.get_id("fit").shape != ():
            raise Damaged("hierbayes.fit is not one text")
        value = group.attrs["fit"]
        if not isinstance(value, str):
            raise Damaged(f"hierbayes.fit is {type(value).__name__} and no text")
        return value

    def groups(self, file: Any) -> Arrays:
        found = {path: _group(file, path) for path in GROUPS}
        return {path: self.arrays(g, path) for path, g in found.items() if g is not None}

    def arrays(self, group: Any, path: str) -> dict[str, np.ndarray]:
        import h5py

        if len(group) > MOST_MEMBERS:
            raise Damaged(f"{path} has {len(group)} members")
        found = {}
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise Damaged(f"{path}/{name} is a link elsewhere")
            member = group[name]
            if isinstance(member, h5py.Group) and f"{path}/{name}" in GROUPS:
                continue
            if not isinstance(member, h5py.Dataset):
                raise Damaged(f"{path}/{name} is no array")
            scale = member.attrs.get("CLASS") in (b"DIMENSION_SCALE", "DIMENSION_SCALE")
            if name != "row_task" and (not scale or name in NAMED.get(path, ())):
                found[name] = self.array(member, f"{path}/{name}")
        return found

    def array(self, dataset: Any, path: str) -> np.ndarray:
        """The values of one array whose bytes lie in the file as they are, and nowhere else."""
        import h5py

        layout = dataset.id.get_create_plist().get_layout()
        if layout not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT) or dataset.external:
            raise Damaged(f"{path} is stored in another way than fits are")
        count = math.prod(map(int, dataset.shape or ()))
        text = h5py.check_string_dtype(dataset.dtype)
        if text is None and dataset.dtype.kind not in "biuf":
            raise Damaged(f"{path} holds {dataset.dtype} where numbers or names belong")
        by_heap = text is not None and text.length is None  # a reference of 16 bytes to each
        self.left -= count * (16 if by_heap else dataset.id.get_type().get_size())
        if self.left >= 0 and by_heap and count:
            self.left -= self.length_of_strings(dataset, path, count)
        if self.left < 0 or dataset.shape is None:
            raise Damaged(f"{path}, of shape {dataset.shape}, is larger than the file")
        if text is not None:
            return np.asarray(dataset.asstr()[()], dtype=object)
        values = np.asarray(dataset[()])
        if dataset.attrs.get("dtype") in (b"bool", "bool"):  # as xarray writes them
            return values.astype(bool)
        return values.astype(values.dtype.newbyteorder("="))

    def length_of_strings(self, dataset: Any, path: str, count: int) -> int:
        """Bytes of all strings by the file's own count, for several may be one long one."""
        offset = dataset.id.get_offset()
        if dataset.file.id.get_create_plist().get_sizes() != (8, 8) or offset is None:
            raise Damaged(f"{path} holds names in another way than fits do")
        entries = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])
        return int(np.frombuffer(self.data, entries, count, offset)["length"].sum(dtype=np.int64))


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as opened:
        content = opened.read()
    try:
        read(content)
    except Damaged as problem:
        print(problem)
        sys.exit(DAMAGED)
