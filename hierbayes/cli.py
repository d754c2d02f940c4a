"""The command line: ``hierbayes compare``, ``hierbayes fit``, ``hierbayes datasets``.

A table of the user's from a file.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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

COLUMNS = {
    "--known-se": "column of known standard errors",
    "--exposure": "column of exposures of counts: time, area, population",
    "--offset": "column of offsets of the linear predictor",
    "--weights": "column of weights: of precisions (gaussian), else of rows' log likelihoods",
}

COMPARED = ",".join(command for command, kind in METHODS.items() if kind.compared)

EPILOG = """\
exit codes: 0 done; 1 a computation failed; 2 bad input or arguments; 130 interrupted.
The table goes to stdout, progress and warnings to stderr, files under --out.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except InputError as error:
        _say(f"error: {error}")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        _say("interrupted; nothing was written")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except (OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        _say(f"error: {type(error).__name__}: {error}")
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    import hierbayes

    parser = argparse.ArgumentParser(
        prog="hierbayes", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Learn the prior that many related tasks share, in every way, side by side.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"hierbayes {hierbayes.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str) -> Any:
        sub = commands.add_parser(
            name, help=about, description=about, epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(run=run)
        return sub

    one = command("compare", _compare, "fit by every method and hold the fits against each other")
    _data_arguments(one)
    one.add_argument(
        "--methods", default=COMPARED, metavar="A,B,…",
        help=f"methods to compare, of {', '.join(METHODS)} ({COMPARED})",
    )  # fmt: skip
    one.add_argument(
        "--test", type=float, default=0.2, metavar="SHARE",
        help="share of each task's rows held out for scoring; 0 scores tasks left out (0.2)",
    )  # fmt: skip
    one.add_argument("--out", type=Path, metavar="DIR", help="folder for tables, pictures, fits")
    one.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    two = command("fit", _fit, "fit by one method, print its summary, save it")
    _data_arguments(two)
    two.add_argument("--method", default="full_bayes", choices=list(METHODS), help="(full_bayes)")
    two.add_argument("--out", type=Path, metavar="FILE.nc", help="NetCDF file for the fit")
    two.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    command("datasets", _datasets, "list the data sets that ship with the package")
    return parser


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(CATALOGUE)
    parser.add_argument(
        "data", nargs="?", default="radon", help=f"{names}, or a CSV file (radon)", metavar="DATA"
    )
    parser.add_argument(
        "--formula", help='for example "y ~ 1 + x + (1 + x | group)"; needed for a CSV file'
    )
    parser.add_argument(
        "--family", choices=list(FAMILIES), metavar="FAMILY",
        help=f"distribution of the outcome, of {', '.join(FAMILIES)} (gaussian)",
    )  # fmt: skip
    for name, about in COLUMNS.items():
        parser.add_argument(name, metavar="COLUMN", help=about)
    parser.add_argument("--drop-missing", action="store_true", help="leave incomplete rows out")
    parser.add_argument("--draws", type=int, default=1000, help="draws a chain, and warm-up (1000)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")


def _datasets(args: argparse.Namespace) -> int:
    del args
    for name, data in CATALOGUE.items():
        known = f"  --known-se {data.known_se}" if data.known_se else ""
        print(f"{name:14} {data.about}\n{'':14} {data.formula}{known}")
    return EXIT_OK


def _fit(args: argparse.Namespace) -> int:
    before = None
    if args.out is not None:
        _check_file(args.out, args.overwrite)
        before = seen(args.out)
    data = _read(args)
    with _Colleague() as colleague:
        model, tasks = data.build()
        method = METHODS[args.method].with_draws(args.draws)
        fit = colleague.timed(method.name, lambda: method(model, tasks, args.seed))
        if args.out is not None:
            _save(fit, args.out, before)
        print(fit.summary([*fit.phi, "theta"]).to_string())
    return EXIT_OK


def _compare(args: argparse.Namespace) -> int:
    chosen = [name.strip().replace("-", "_") for name in args.methods.split(",") if name.strip()]
    for name in chosen:
        if name not in METHODS:
            raise InputError(f"--methods: {name!r} is not known; {suggestion(name, list(METHODS))}")
    if not chosen:
        raise InputError("--methods names no method")
    if not 0 <= args.test < 1:
        raise InputError(f"--test must lie between 0 and 1, found {args.test}")
    if args.draws < 1:
        raise InputError(f"--draws must be at least 1, found {args.draws}")
    if args.out is not None:
        check_folder(args.out, args.overwrite)
    data = _read(args)
    with _Colleague() as colleague:
        model, train, test = data.split(args.test, args.seed)
        held = "tasks left out" if test is None else f"{test.num_rows} held-out rows"
        _say(f"{train}; scored on {held}")
        fits: dict[str, Fit | str] = {}
        for name in chosen:
            method = METHODS[name].with_draws(args.draws)
            try:
                fitted = colleague.timed(method.name, lambda m=method: m(model, train, args.seed))
            except NotApplicable as error:
                fitted = str(error)
            fits[method.name] = fitted
        if all(isinstance(fit, str) for fit in fits.values()):
            raise InputError("; ".join(f"{label}: {why}" for label, why in fits.items()))
        result = colleague.timed("scores", lambda: compare(fits, test=test))
        if args.out is not None:
            out, said = colleague.timed(
                "tables, pictures, fits", lambda: write_folder(result, args.out)
            )
            for sentence in (*said, f"wrote {out}: open {out / 'report.html'}"):
                _say(sentence)
        print(result)
    return EXIT_OK


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


def _read(args: argparse.Namespace) -> _Data:
    missing = "drop" if args.drop_missing else "raise"
    named = ("family", "known_se", "exposure", "offset")
    given = {name: getattr(args, name) for name in named} | {"weight": args.weights}
    if args.data in CATALOGUE:
        known = CATALOGUE[args.data]
        if args.formula is None and args.known_se is None:
            given["known_se"] = known.known_se
        return _Data(known.load(), args.formula or known.formula, given, missing)
    frame = read_table(args.data, args.formula, list(CATALOGUE))
    return _Data(frame, args.formula, given, missing)


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
