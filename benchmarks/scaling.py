"""How time and memory grow with the number of tasks, and with the rows of each.

``python -m benchmarks scaling``. Correlated slopes; every size in a fresh process. ``empirical
Bayes`` and ``full Bayes`` are timed warm, from Tasks whose statistics are formed; forming Tasks
from a DataFrame and their statistics are timed beside them, each once. Peak memory is the most that
the process held during the fits, the Tasks in it. The exponent is the slope of log seconds on log
size by least squares, over all sizes; where a fixed cost rules the small ones the steepest step
between neighbours says more, and stands beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.output import environment, folder, look, options, save_figure, write_csv, write_json
from benchmarks.processes import ROOT, say

NAME = "scaling"
CURVES = {
    "empirical Bayes": ("ml", "warm_s"),
    "full Bayes": ("full", "warm_s"),
    "forming Tasks": ("ml", "forming_s"),
    "statistics": ("ml", "statistics_s"),
}
"""What is drawn: which measurement, and which of its seconds."""


def point(what: str, num_tasks: int, rows: int, calls: int, limit: float) -> dict[str, Any]:
    """One measurement in a fresh process; how it failed where it did."""
    say(f"{what}, {num_tasks:,} tasks of {rows:,} rows …")
    asked = {"what": what, "num_tasks": num_tasks, "rows": rows, "calls": calls}
    told: dict[str, Any] = {"what": what, "tasks": num_tasks, "rows": rows}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.scaling_point", json.dumps(asked)],
            cwd=ROOT, text=True, capture_output=True, timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return told | {"trouble": f"more than {limit:.0f} s"}
    if done.returncode:
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return told | {"trouble": error}
    return told | {"trouble": None} | json.loads(done.stdout)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Slope of log seconds on log size: by least squares, and of the steepest step."""
    if len(sizes) < 2:
        return float("nan"), float("nan")
    x, y = np.log(sizes), np.log(seconds)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return float(slope), float(np.max(np.diff(y) / np.diff(x)))


def curve(points: list[dict[str, Any]], name: str, by: str) -> tuple[list[float], list[float]]:
    """Sizes and seconds of one curve."""
    what, key = CURVES[name]
    kept = [p for p in points if p["what"] == what and not p["trouble"]]
    return [p[by] for p in kept], [p[key] for p in kept]


def table(points: list[dict[str, Any]]) -> list[str]:
    """A line a measurement."""
    lines = [
        f"  {'':6}{'tasks':>10}{'rows each':>10}{'forming s':>11}{'statistics s':>13}"
        f"{'cold s':>9}{'warm s':>10}{'peak MB':>9}{'forming MB':>11}{'ESS of φ':>10}"
        f"{'ESS / s':>9}"
    ]
    for p in points:
        start = f"  {p['what']:6}{p['tasks']:>10,}{p['rows']:>10,}"
        if p["trouble"]:
            lines.append(f"{start}  no time: {p['trouble']}")
            continue
        line = (
            f"{start}{p['forming_s']:11.3f}{p['statistics_s']:13.3f}{p['cold_s']:9.2f}"
            f"{p['warm_s']:10.4f}{p['peak_mb']:9.0f}{p['forming_peak_mb']:11.0f}"
        )
        if "ess" in p:
            line += f"{p['ess']:10.0f}{p['ess'] / p['warm_s']:9.1f}"
        lines.append(line)
    return lines


def exponent_lines(points: list[dict[str, Any]], by: str) -> tuple[list[str], dict[str, Any]]:
    """The growth of every curve, in words and numbers."""
    lines, found = [], {}
    for name in CURVES:
        sizes, seconds = curve(points, name, by)
        if len(sizes) < 2:
            continue
        slope, steepest = exponent(sizes, seconds)
        found[name] = {"exponent": slope, "steepest": steepest}
        lines.append(
            f"  {name}: seconds grow as {by} to the power {slope:.2f}; steepest step {steepest:.2f}"
        )
    return lines, found


def draw(panels: list[tuple[str, str, list[dict[str, Any]]]], path: Path) -> None:
    """Log-log curves, a panel for what grows, the exponents in the legend."""
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, len(panels), figsize=(11, 4.2), layout="constrained")
    for axes, (by, title, points) in zip(all_axes, panels, strict=True):
        for number, name in enumerate(CURVES):
            sizes, seconds = curve(points, name, by)
            if not sizes:
                continue
            slope, _ = exponent(sizes, seconds)
            axes.plot(sizes, seconds, label=f"{name}, exponent {slope:.2f}", **look(number))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(title)
        axes.set_ylabel("seconds")
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    """Measure, print tables, write JSON, CSV and PNG."""
    parser = options(NAME, __doc__, "small sizes")
    parser.add_argument(
        "--tasks", type=int, nargs="+",
        default=[1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000],
    )  # fmt: skip
    parser.add_argument("--rows", type=int, nargs="+", default=[10, 30, 100, 300, 1_000])
    parser.add_argument("--fixed", type=int, default=10_000, help="tasks while rows grow")
    parser.add_argument("--calls", type=int, default=3, help="warm calls at least, of which median")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds a process may take")
    parser.add_argument("--what", nargs="+", choices=("ml", "full"), default=("ml", "full"))
    args = parser.parse_args(argv)
    if args.quick:
        args.tasks, args.rows, args.fixed, args.calls = [100, 1_000], [10, 100], 100, 1
    where = folder(args.output)
    by_tasks = [
        point(what, tasks, 10, args.calls, args.limit) for what in args.what for tasks in args.tasks
    ]
    by_rows = [
        point(what, args.fixed, rows, args.calls, args.limit)
        for what in args.what
        for rows in args.rows
    ]
    growth = {}
    for by, points in (("tasks", by_tasks), ("rows", by_rows)):
        print("\n".join([f"Growth with {by}", *table(points)]))
        lines, growth[by] = exponent_lines(points, by)
        print("\n".join(lines) + "\n")
    write_json(
        where / f"{NAME}.json",
        {
            "environment": environment(), "settings": vars(args), "growth": growth,
            "by_tasks": by_tasks, "by_rows": by_rows,
        },
    )  # fmt: skip
    write_csv(where / f"{NAME}.csv", by_tasks + by_rows)
    draw(
        [
            ("tasks", "tasks of 10 rows", by_tasks),
            ("rows", f"rows a task, {args.fixed:,} tasks", by_rows),
        ],
        where / f"{NAME}.png",
    )
    say(f"written to {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
