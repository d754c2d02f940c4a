"""A comparison as a folder of tables, pictures and fits, which replaces only its own kind."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hierbayes.comparison.side_by_side import Comparison
from hierbayes.errors import InputError, listing
from hierbayes.files import KEPT, beside

MOST_LETTERS = 100
"""Bytes of a coefficient's name in the name of a picture; file systems allow 255 in all."""

MANIFEST = "written_by_hierbayes.txt"
"""Names and SHA-256 of the files in a folder of results, as ``sha256sum -c`` reads them: only what
it lists, unchanged, is the program's to replace."""


def check_folder(out: Path, overwrite: bool) -> None:
    """Refuse a folder that could not be written, before any computation."""
    shown = repr(str(out))
    if out.is_symlink():
        raise InputError(f"--out {shown} is a link to {os.readlink(out)!r}; name the folder itself")
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"--out {shown} is a file; name a folder")
    check_writable(out.absolute().parent)
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise InputError(f"--out {shown} is not empty; choose another or pass --overwrite")
    if strange := _not_ours(out):
        raise InputError(
            f"--out {shown} holds other things than results of hierbayes ({listing(strange, 3)}), "
            "which --overwrite would delete; choose another folder, or move them away"
        )


def _not_ours(folder: Path) -> list[str]:
    """What a folder holds beside the files that its manifest lists, as they were written."""
    ours = _manifest(folder)
    strange = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            strange.append(name)
        elif path.is_dir():
            strange += [name] * (not any(n.startswith(f"{name}/") for n in ours))
        elif name != MANIFEST and ours.get(name) != _digest(path):
            strange.append(name)
    return strange if ours else strange or [MANIFEST]


def _manifest(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_writable(folder: Path) -> None:
    """Refuse a folder in which nothing can be written."""
    existing = next(f for f in (folder, *folder.parents) if f.exists())
    try:
        handle, name = tempfile.mkstemp(dir=existing, prefix=".hierbayes-")
    except OSError as error:
        raise InputError(f"--out: cannot write in {str(existing)!r}: {error.strerror}") from error
    os.close(handle)
    os.unlink(name)


def write_folder(result: Comparison, out: Path) -> tuple[Path, list[str]]:
    """Everything into a folder beside ``out``, which then takes its place: whole or not at all.

    Where it lies now, ``out`` or beside it where something has come there meanwhile, and what there
    is to say of that.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=".hierbayes-"))
    try:
        folder.chmod(0o755)
        result.table.to_csv(folder / "table.csv", index_label="method")
        (folder / "table.txt").write_text(f"{result}\n", encoding="utf-8")
        _estimates(result).to_csv(folder / "tasks.csv", index=False)
        (folder / "fits").mkdir()
        for label, fit in result.fits.items():
            fit.save(folder / "fits" / f"{label.replace(' ', '_')}.nc")
        _draw(result, folder)
        result.report(folder / "report.html")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
        (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")
        return _placed(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _draw(result: Comparison, folder: Path) -> None:
    """The pictures of every coefficient and of the scores, as PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from hierbayes import plots

    coefs = next(iter(result.fits.values())).tasks.coef
    for coef, safe in zip(coefs, _file_names(coefs), strict=True):
        for draw in (plots.shrinkage, plots.learned_prior, plots.forest):
            ax = draw(result.fits, coef=coef)
            ax.figure.savefig(folder / f"{draw.__name__}_{safe}.png", dpi=150)
            plt.close(ax.figure)
    axes = result.plot()
    axes[0].figure.savefig(folder / "comparison.png", dpi=150)
    plt.close(axes[0].figure)


def _placed(folder: Path, out: Path) -> tuple[Path, list[str]]:
    """The folder in the place of ``out``, where that is empty or holds old results alone."""
    old = None
    if out.is_dir() and not out.is_symlink() and any(out.iterdir()) and not _not_ours(out):
        old = Path(tempfile.mkdtemp(dir=out.parent, prefix=".hierbayes-old-"))
        os.rename(out, old)
    place = out
    while True:
        try:
            # replaces an empty folder and nothing else, in one step
            os.rename(folder, place)
            break
        except OSError:
            if not os.path.lexists(place):
                raise
            place = beside(out)
    said = []
    if place != out:
        said.append(KEPT.format(out=out))
    if old is not None:
        said += _remove_ours(old, out)
    return place, said


def _remove_ours(old: Path, out: Path) -> list[str]:
    """Delete old results, file by file, and nothing that has come among them."""
    strange = {*_not_ours(old)}
    for path in [p for p in old.rglob("*") if p.is_file() and not p.is_symlink()]:
        if path.relative_to(old).as_posix() not in strange:
            path.unlink()
    for path in sorted((p for p in old.rglob("*") if p.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    if any(old.iterdir()):
        kept = beside(out)
        os.rename(old, kept)
        return [f"what had come into {out} meanwhile is kept in {kept}"]
    old.rmdir()
    return []


def _file_names(coefs: Sequence[str]) -> list[str]:
    """A name of letters and digits for each coefficient, short, and no two alike."""
    safe = ["".join(c if c.isalnum() else "_" for c in coef) for coef in coefs]
    names = []
    for coef, name in zip(coefs, safe, strict=True):
        if safe.count(name) > 1 or len(name.encode()) > MOST_LETTERS:
            short = name.encode()[:MOST_LETTERS].decode(errors="ignore")
            name = f"{short}_{hashlib.sha256(coef.encode()).hexdigest()[:8]}"
        names.append(name)
    return names


def _estimates(result: Comparison) -> Any:
    """θ_j of every method in long form: task, coef, method, estimate, sd."""
    import pandas as pd

    pieces = []
    for label, fit in result.fits.items():
        table = fit.theta.to_dataframe("estimate").reset_index()
        table["sd"] = fit.adapted.sd.values.ravel()
        table.insert(2, "method", label)
        pieces.append(table)
    return pd.concat(pieces, ignore_index=True)
