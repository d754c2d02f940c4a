"""Many tasks of ten rows: empirical Bayes beside lme4, mixedlm and statsmodels; full Bayes too.

``python -m benchmarks many-tasks``: 100,000 tasks, correlated slopes, maximum likelihood. Estimates
are compared before any time is told, to 1e-4 of their size (correlations to 1e-4), and a contestant
that disagrees is refused; one that stopped at the same maximum by its own tolerance, as lme4 does,
is timed and the difference told, and lme4 runs with a tighter one as well. hierbayes is timed from
Tasks whose statistics are formed, and once more from a DataFrame; lme4 inside R with the data
loaded, the fit alone (its model matrices included); mixedlm and statsmodels from data in memory.
statsmodels takes minutes at this size: it has a smaller one, where all take part again. Ratios hold
within one run on one machine.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import agreement, problems
from benchmarks.output import (
    environment,
    folder,
    look,
    options,
    plain_numbers,
    save_figure,
    write_json,
)
from benchmarks.processes import Entry, Record, compete, say

NAME = "many-tasks"
BASE = "hierbayes"
LARGE = (
    Entry(BASE, "hierbayes_ml"),
    Entry("hierbayes, DataFrame", "hierbayes_ml", {"read": True}),
    Entry("lme4", "lme4"),
    Entry("lme4, tighter", "lme4", {"tighter": True}),
    Entry("mixedlm", "mixedlm"),
)
SMALL = (*LARGE, Entry("statsmodels", "statsmodels"))


def contest(size: int, who: tuple[Entry, ...], rounds: int, at_least: float) -> dict[str, Any]:
    """Estimates compared, then times, at one number of tasks."""
    given = problems.given("many", num_tasks=size)
    with tempfile.TemporaryDirectory(prefix="hierbayes-benchmark-") as scratch:
        records = compete(
            who, given, Path(scratch), rounds=rounds, at_least=at_least, most_seconds=60.0
        )
    found = {r.name: r.arrays[-1] for r in records if r.arrays and not r.trouble}
    told = agreement.verdicts(found, agreement.same_estimates)
    best = max(found.values(), key=lambda f: float(f["log_likelihood"]), default=None)
    remarks = {}
    for record in records:
        if verdict := told.get(record.name):
            remark = agreement.stopped_early(found[record.name], best)
            remarks[record.name] = remark or ""
            record.trouble = None if remark else verdict
    rows = [row(r, remarks.get(r.name, "")) for r in records]
    return {"tasks": size, "formula": given.formula, "contestants": rows}


def row(record: Record, remark: str) -> dict[str, Any]:
    """A contestant's numbers; no times where it disagrees."""
    told: dict[str, Any] = {
        "name": record.name, "about": record.about, "versions": dict(record.versions),
        "trouble": record.trouble, "remark": remark,
        "estimates": {k: np.ravel(v).tolist() for a in record.arrays[-1:] for k, v in a.items()},
    }  # fmt: skip
    if record.trouble or not record.rounds:
        return told
    return told | {
        "cold_s": record.cold_s, "warm_s": float(np.median(record.rounds)),
        "rounds_s": record.rounds, "calls": record.calls, "peak_mb": record.peak_mb,
    }  # fmt: skip


def table(told: dict[str, Any]) -> list[str]:
    """A line a contestant."""
    lines = [
        f"Maximum likelihood, {told['tasks']:,} tasks of 10 rows, {told['formula']}",
        f"  {'':22}{'cold s':>9}{'warm s':>10}{'peak MB':>9}{'this / hierbayes':>18}  how",
    ]
    base = next((r.get("warm_s") for r in told["contestants"] if r["name"] == BASE), None)
    for r in told["contestants"]:
        if r["trouble"]:
            lines.append(f"  {r['name']:22}no time: {r['trouble']}")
            continue
        ratio = f"{r['warm_s'] / base:18.1f}" if base else f"{'':18}"
        lines.append(
            f"  {r['name']:22}{r['cold_s']:9.2f}{r['warm_s']:10.3f}{r['peak_mb']:9.0f}{ratio}"
            f"  {r['about']}"
        )
        lines += [f"  {'':22}{r['remark']}"] if r["remark"] else []
    return lines


def full_bayes(size: int, rounds: int, num_draws: int) -> dict[str, Any]:
    """Seconds and ESS of φ of hierbayes' full Bayes; θ as moments where draws are too many."""
    given = problems.given("many", num_tasks=size)
    who = [Entry(BASE, "hierbayes", {"num_draws": num_draws})]
    with tempfile.TemporaryDirectory(prefix="hierbayes-benchmark-") as scratch:
        (record,) = compete(
            who, given, Path(scratch), rounds=rounds, at_least=0.0, most_seconds=120.0
        )
    if record.trouble:
        return {"tasks": size, "trouble": record.trouble}
    phi = [{k: v for k, v in arrays.items() if k != "theta"} for arrays in record.arrays]
    ess, whose = zip(*map(agreement.smallest_ess, phi), strict=True)
    rates = [e / s for e, s in zip(ess, record.rounds, strict=True)]
    return {
        "tasks": size, "trouble": None, "cold_s": record.cold_s,
        "warm_s": float(np.median(record.rounds)), "rounds_s": record.rounds,
        "ess": float(np.median(ess)), "ess_of": whose[0], "ess_per_s": float(np.median(rates)),
        "seconds_for_1000": 1000.0 / float(np.median(rates)), "peak_mb": record.peak_mb,
        "draws": int(np.prod(phi[0]["mu"].shape[:2])), "theta": "theta" in record.arrays[0],
    }  # fmt: skip


def full_bayes_line(told: dict[str, Any]) -> str:
    """In words."""
    start = f"Full Bayes, {told['tasks']:,} tasks of 10 rows: "
    if told["trouble"]:
        return start + f"no time: {told['trouble']}"
    theta = "drawn" if told["theta"] else "as means and covariances"
    return (
        f"{start}cold {told['cold_s']:.1f} s, warm {told['warm_s']:.2f} s for {told['draws']:,} "
        f"draws of φ, θ {theta}; smallest ESS of φ {told['ess']:.0f} ({told['ess_of']}), "
        f"{told['ess_per_s']:.1f} a second, {told['seconds_for_1000']:.1f} s for 1,000; "
        f"peak {told['peak_mb']:.0f} MB"
    )


def draw(contests: list[dict[str, Any]], path: Path) -> None:
    """Warm seconds of every contestant, rounds as points, a panel a size."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["name"] for told in contests for r in told["contestants"]))
    figure, panels = plt.subplots(
        1, len(contests), figsize=(5.5 * len(contests), 3.2), layout="constrained", squeeze=False
    )
    for axes, told in zip(panels[0], contests, strict=True):
        timed = [r for r in told["contestants"] if not r["trouble"]][::-1]
        for place, r in enumerate(timed):
            style = look(names.index(r["name"]))
            times = r["rounds_s"]
            axes.plot(times, [place] * len(times), style["marker"], color=style["color"], alpha=0.4)
            axes.plot(r["warm_s"], place, "|", color=style["color"], markersize=20, mew=2.5)
            axes.annotate(
                f"{r['warm_s']:.3g} s", (r["warm_s"], place), xytext=(0, 11),
                textcoords="offset points", ha="center", fontsize=9,
            )  # fmt: skip
        axes.set_yticks(range(len(timed)), [r["name"] for r in timed])
        axes.set_ylim(-0.6, len(timed) - 0.2)
        axes.set_xscale("log")
        axes.margins(x=0.15)
        plain_numbers(axes.xaxis)
        axes.set_xlabel("seconds, warm (each round, and median)")
        axes.set_title(f"{told['tasks']:,} tasks of 10 rows", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    """Run, print tables, write JSON and PNG."""
    parser = options(NAME, __doc__, "small sizes")
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--small", type=int, default=2_000, help="tasks with statsmodels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-full-bayes", action="store_true")
    args = parser.parse_args(argv)
    large, small, rounds = (2_000, 300, 2) if args.quick else (args.tasks, args.small, args.rounds)
    at_least = 0.2 if args.quick else 1.0
    where = folder(args.output)
    found: dict[str, Any] = {"environment": environment(), "settings": vars(args)}
    found["contests"] = []
    for size, who in ((small, SMALL), (large, LARGE)):
        told = contest(size, who, rounds, at_least)
        found["contests"].append(told)
        print("\n".join(table(told)) + "\n", flush=True)
    if not args.skip_full_bayes:
        draws = 250 if args.quick else 1000
        found["full_bayes"] = full_bayes(large, min(rounds, 3), draws)
        print(full_bayes_line(found["full_bayes"]))
    write_json(where / f"{NAME}.json", found)
    draw(found["contests"], where / f"{NAME}.png")
    say(f"written to {where}")
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main())
