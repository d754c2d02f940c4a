"""Where the benchmarks by name write: JSON, CSV and pictures in a folder of their own."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
MARKERS = ("o", "D", "s", "v", "P", "^", "x")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def look(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of the number-th curve."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
    }


def environment() -> dict[str, Any]:
    """What the numbers were taken on."""
    import hierbayes as hb

    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}", "cpus": os.cpu_count(),
        "jax": jax.__version__, "hierbayes": hb.__version__, "python": platform.python_version(),
    }  # fmt: skip


def folder(path: str | Path) -> Path:
    """The folder, made where it is missing."""
    made = Path(path)
    made.mkdir(parents=True, exist_ok=True)
    return made


def write_json(path: Path, figures: Any) -> None:
    """Figures as JSON, arrays as lists."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(figures, file, indent=2, default=lambda value: value.tolist())
        file.write("\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same columns as CSV; columns in the order in which they first come."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def plain_numbers(axis: Any) -> None:
    """Ticks at 1, 2, 5, 10, 20, … of a logarithmic axis, as plain numbers."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def save_figure(figure: Any, path: Path) -> None:
    """The picture as PNG."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=150)
    plt.close(figure)


def options(name: str, about: str | None, quick: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; ``quick`` says what a quick run does."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help=f"{quick}: does it run at all")
    parser.add_argument("--output", default=f"results/{name}")
    return parser
