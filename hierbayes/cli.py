"""The command line: ``hierbayes compare``, ``hierbayes fit``, ``hierbayes datasets``.

A table of the user's from a file.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from typer.exceptions import TyperException

from hierbayes.comparison import compare
from hierbayes.comparison.folder import check_folder, check_writable, write_folder
from hierbayes.datasets import CATALOGUE
from hierbayes.errors import InputError, NotApplicable, overhearing, suggestion
from hierbayes.files import KEPT, beside, moved, seen
from hierbayes.fit import Fit
from hierbayes.fit.method import named_methods
from hierbayes.formula import from_formula
from hierbayes.formula.families import FAMILIES
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Tasks


def read_table(name: str, formula: str | None, known: list[str]) -> Any:
    """The rows of a CSV file, refused in words where there are none, or no formula for them."""
    import pandas as pd

    path = Path(name)
    if not path.is_file():
        near = suggestion(name, known)
        raise InputError(f"{name!r} is neither a file nor a shipped data set; {near}")
    if formula is None:
        raise InputError(f'--formula is needed for {path.name}: "y ~ 1 + x + (1 + x | group)"')
    try:
        frame = pd.read_csv(path, sep="\t" if path.suffix in (".tsv", ".tab") else ",")
    except pd.errors.EmptyDataError:
        raise InputError(f"{path.name} is empty") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} cannot be read as CSV: {error}") from error
    if frame.empty:
        raise InputError(f"{path.name} has a header but no rows")
    return frame


EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130

METHODS = {kind.command: kind for kind in named_methods().values() if kind.command}
"""Methods by the name that the command line knows."""

COMPARED = ",".join(command for command, kind in METHODS.items() if kind.compared)

EPILOG = (
    "exit codes: 0 done; 1 a computation failed; 2 bad input or arguments; 130 interrupted. "
    "The table goes to stdout, progress and warnings to stderr, files under --out."
)

app = typer.Typer(
    help="Learn the prior that many related tasks share, in every way, side by side.",
    epilog=EPILOG, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        code = app(arguments, prog_name="hierbayes", standalone_mode=False)
        return code if isinstance(code, int) else EXIT_OK
    except InputError as error:
        _say(f"error: {error}")
        return EXIT_BAD_INPUT
    except TyperException as error:  # an option that is not known, or not a number
        said = getattr(error, "format_message", error.__str__)()
        _say(f"error: {said.rstrip('.')}; hierbayes --help tells what there is")
        return EXIT_BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted; nothing was written")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except (OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        _say(f"error: {type(error).__name__}: {error}")
        return EXIT_FAILED


def _option(about: str, name: str | None = None, **more: Any) -> Any:
    return typer.Option(*([name] if name else []), help=about, **more)


# what every command that reads a table takes
Data = Annotated[str, typer.Argument(help=f"{', '.join(CATALOGUE)}, or a CSV file")]
Formula = Annotated[str | None, _option('"y ~ 1 + x + (1 + x | group)"; needed for a CSV file')]
Family = Annotated[
    str | None, _option(f"distribution of the outcome, of {', '.join(FAMILIES)} (gaussian)")
]
KnownSe = Annotated[str | None, _option("column of known standard errors", metavar="COLUMN")]
Exposure = Annotated[
    str | None, _option("column of exposures of counts: time, area, population", metavar="COLUMN")
]
Offset = Annotated[
    str | None, _option("column of offsets of the linear predictor", metavar="COLUMN")
]
Weights = Annotated[
    str | None,
    _option(
        "column of weights: of precisions (gaussian), else of rows' log likelihoods",
        metavar="COLUMN",
    ),
]
DropMissing = Annotated[bool, _option("leave incomplete rows out", "--drop-missing")]
Draws = Annotated[int, _option("draws a chain, and warm-up")]
Seed = Annotated[int, _option("of all that is random")]
Overwrite = Annotated[bool, _option("replace --out where it exists", "--overwrite")]


def _say_version(wanted: bool) -> None:
    if wanted:
        import hierbayes

        print(f"hierbayes {hierbayes.__version__}")
        raise typer.Exit


@app.callback()
def _hierbayes(
    version: Annotated[
        bool, _option("say the version", "--version", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    del version


@app.command("datasets", epilog=EPILOG)
def _datasets() -> None:
    """List the data sets that ship with the package."""
    for name, data in CATALOGUE.items():
        known = f"  --known-se {data.known_se}" if data.known_se else ""
        print(f"{name:14} {data.about}\n{'':14} {data.formula}{known}")


@app.command("fit", epilog=EPILOG)
def _fit(
    data: Data = "radon",
    formula: Formula = None,
    family: Family = None,
    known_se: KnownSe = None,
    exposure: Exposure = None,
    offset: Offset = None,
    weights: Weights = None,
    drop_missing: DropMissing = False,
    draws: Draws = 1000,
    seed: Seed = 0,
    method: Annotated[str, _option(f"of {', '.join(METHODS)}")] = "full_bayes",
    out: Annotated[Path | None, _option("NetCDF file for the fit", metavar="FILE.nc")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Fit by one method, print its summary, save it."""
    chosen, before = _one("--method", method).with_draws(draws), None
    if out is not None:
        _check_file(out, overwrite)
        before = seen(out)
    read = _read(
        data, formula, drop_missing, family=family, known_se=known_se, exposure=exposure,
        offset=offset, weight=weights,
    )  # fmt: skip
    with _Colleague() as colleague:
        model, tasks = read.build()
        fit = colleague.timed(chosen.name, lambda: chosen(model, tasks, seed))
        if out is not None:
            _save(fit, out, before)
        print(fit.summary([*fit.phi, "theta"]).to_string())


@app.command("compare", epilog=EPILOG)
def _compare(
    data: Data = "radon",
    formula: Formula = None,
    family: Family = None,
    known_se: KnownSe = None,
    exposure: Exposure = None,
    offset: Offset = None,
    weights: Weights = None,
    drop_missing: DropMissing = False,
    draws: Draws = 1000,
    seed: Seed = 0,
    methods: Annotated[
        str, _option(f"methods to compare, of {', '.join(METHODS)}", metavar="A,B,…")
    ] = COMPARED,
    test: Annotated[
        float, _option("share of each task's rows held out for scoring; 0 scores tasks left out")
    ] = 0.2,
    out: Annotated[Path | None, _option("folder for tables, pictures, fits", metavar="DIR")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Fit by every method and hold the fits against each other."""
    chosen = _chosen(methods)
    if not 0 <= test < 1:
        raise InputError(f"--test must lie between 0 and 1, found {test}")
    if draws < 1:
        raise InputError(f"--draws must be at least 1, found {draws}")
    if out is not None:
        check_folder(out, overwrite)
    read = _read(
        data, formula, drop_missing, family=family, known_se=known_se, exposure=exposure,
        offset=offset, weight=weights,
    )  # fmt: skip
    with _Colleague() as colleague:
        model, train, held_out = read.split(test, seed)
        held = "tasks left out" if held_out is None else f"{held_out.num_rows} held-out rows"
        _say(f"{train}; scored on {held}")
        fits = _fits(colleague, [kind.with_draws(draws) for kind in chosen], model, train, seed)
        result = colleague.timed("scores", lambda: compare(fits, test=held_out))
        if out is not None:
            place, said = colleague.timed(
                "tables, pictures, fits", lambda: write_folder(result, out)
            )
            for sentence in (*said, f"wrote {place}: open {place / 'report.html'}"):
                _say(sentence)
        print(result)


def _chosen(methods: str) -> list[Any]:
    """The classes of methods that are named, with commas between them."""
    names = [name.strip().replace("-", "_") for name in methods.split(",") if name.strip()]
    if not names:
        raise InputError("--methods names no method")
    return [_one("--methods", name) for name in names]


def _one(option: str, name: str) -> Any:
    """The class of a method by its name."""
    if name not in METHODS:
        raise InputError(f"{option}: {name!r} is not known; {suggestion(name, list(METHODS))}")
    return METHODS[name]


def _fits(
    colleague: _Colleague, methods: list[Any], model: HierarchicalModel, tasks: Tasks, seed: int
) -> dict[str, Fit | str]:
    """Each method's fit, or why it has none; refused where none has one."""
    fits: dict[str, Fit | str] = {}
    for method in methods:
        try:
            fits[method.name] = colleague.timed(method.name, lambda m=method: m(model, tasks, seed))
        except NotApplicable as error:
            fits[method.name] = str(error)
    if all(isinstance(fit, str) for fit in fits.values()):
        raise InputError("; ".join(f"{label}: {why}" for label, why in fits.items()))
    return fits


# ------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class _Data:
    """A table and the model asked for."""

    frame: Any
    formula: str
    arguments: dict[str, Any]
    missing: Any

    def build(self, frame: Any = None) -> tuple[HierarchicalModel, Tasks]:
        return from_formula(
            self.formula, self.frame if frame is None else frame, **self.arguments,
            missing=self.missing,
        )  # fmt: skip

    def split(self, share: float, seed: int) -> tuple[HierarchicalModel, Tasks, Tasks | None]:
        """Model, training tasks and held-out rows; transforms learn from the training rows."""
        model, tasks = self.build()
        if share == 0:
            return model, tasks, None
        train, test = tasks.hold_out(share, seed)
        held = np.zeros(len(self.frame), dtype=bool)
        held[test.rows] = True
        kept = np.zeros(len(self.frame), dtype=bool)
        kept[train.rows] = True
        moved = held & self._only_there(kept)
        if moved.any():
            _say(f"{moved.sum()} held-out row(s) stay in training: no other row has their category")
        held, kept = held & ~moved, kept | moved
        if not held.any():
            return model, tasks, None
        with overhearing():  # dropped rows: said of the whole table
            model, again = self.build(self.frame[kept])
            return model, again, again.encode(self.frame[held], missing=self.missing)

    def _only_there(self, kept: np.ndarray) -> np.ndarray:
        """Rows with a category, in any column, that no kept row has."""
        alone = np.zeros(len(self.frame), dtype=bool)
        for column in self.frame.columns:
            values = self.frame[column]
            if values.dtype.kind not in "fiub":
                alone |= ~values.isin(values[kept].unique()).to_numpy()
        return alone


def _read(data: str, formula: str | None, drop_missing: bool, **given: Any) -> _Data:
    """A shipped data set or a file; ``given`` are arguments of ``from_formula``."""
    missing = "drop" if drop_missing else "raise"
    if data in CATALOGUE:
        known = CATALOGUE[data]
        if formula is None and given["known_se"] is None:
            given = given | {"known_se": known.known_se}
        return _Data(known.load(), formula or known.formula, given, missing)
    frame = read_table(data, formula, list(CATALOGUE))
    assert formula is not None
    return _Data(frame, formula, given, missing)


# ------------------------------------------------------------------------ writing


def _check_file(out: Path, overwrite: bool) -> None:
    shown = repr(str(out))
    if out.is_symlink():
        raise InputError(f"--out {shown} is a link to {os.readlink(out)!r}; name the file itself")
    if out.is_dir():
        raise InputError(f"--out {shown} is a folder; name a file")
    if out.exists() and not out.is_file():
        raise InputError(f"--out {shown} is a device or a pipe; name a file")
    if out.exists() and not overwrite:
        raise InputError(f"--out {shown} exists; choose another or pass --overwrite")
    check_writable(out.absolute().parent)


def _save(fit: Fit, out: Path, before: tuple[int, ...] | None) -> None:
    """Save a fit where ``before`` still is, or beside what has come there meanwhile."""
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    place = out
    if seen(out) != before:
        place = beside(out)
    handle, name = tempfile.mkstemp(dir=out.absolute().parent, prefix=".hierbayes-", suffix=".nc")
    os.close(handle)
    try:
        fit.save(name)
        while not moved(Path(name), place, replaces=place == out and before is not None):
            place = beside(out)
    finally:
        Path(name).unlink(missing_ok=True)
    if place != out:
        _say(KEPT.format(out=out))
    _say(f"saved to {place}")


# ---------------------------------------------------------------------- speaking


class _Colleague:
    """Says on stderr what is being done, and collects the fits' warnings until it is done."""

    def __enter__(self) -> _Colleague:
        self.listening = overhearing()
        self.heard = self.listening.__enter__()
        self.said = 0
        return self

    def timed(self, label: str, work: Callable[[], Any]) -> Any:
        if sys.stderr.isatty():
            print(f"{label} …", file=sys.stderr, end="\r", flush=True)
        started = time.perf_counter()
        self.pass_on()
        try:
            result = work()
        finally:
            _say(f"{label}: {time.perf_counter() - started:.1f} s")
            self.pass_on()
        return result

    def pass_on(self) -> None:
        """Say the warnings that have come since the last time."""
        for warning in self.heard[self.said :]:
            _say(f"  warning: {warning}")
        self.said = len(self.heard)

    def __exit__(self, *details: Any) -> None:
        self.pass_on()
        self.listening.__exit__(*details)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
