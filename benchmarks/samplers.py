"""The smallest effective sample size a second, hierbayes beside nutpie, Stan and NumPyro's NUTS.

``python -m benchmarks radon`` (``radon-correlated``, ``uneven``, ``uneven-correlated``,
``schools``, ``contraception``: logistic, 1,934 women in 60 districts). Every contestant has a
process of its own and both cores; all have the same densities, 4 chains and as many draws kept.
Their posteriors are compared before any time is told, and one that disagrees is refused. ESS is
ArviZ's bulk ESS, the smallest over every scalar of φ and every θ, outside the timed part. *Cold* is
a first fit in a fresh process, imports and compiling included, nothing cached. *Warm* is a later
call with everything compiled, warm-up included. Ratios hold within one run on one machine.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import agreement, problems
from benchmarks.output import environment, folder, look, plain_numbers, save_figure, write_json
from benchmarks.processes import Entry, Record, compete, say

NAMES = ("radon", "radon-correlated", "uneven", "uneven-correlated", "schools", "contraception")


def entries(draws: int, warmup: int, *, also_centred: bool) -> list[Entry]:
    """Who takes part: each as its own manual recommends."""
    kept: dict[str, Any] = {"num_draws": draws, "num_chains": 4}
    nuts = {**kept, "num_warmup": warmup}
    who = [
        Entry("hierbayes", "hierbayes", kept),
        Entry("nutpie", "nutpie", nuts),
        # nutpie tunes for 400 steps where it is not told: a shorter run, in its favour
        Entry("nutpie, own tuning", "nutpie", {**nuts, "num_warmup": None}),
        Entry("Stan", "stan", nuts),
        Entry("NumPyro NUTS", "numpyro_nuts", nuts),
    ]
    if also_centred:
        who += [
            Entry("nutpie, centred", "nutpie", {**nuts, "centred": True}),
            Entry("Stan, centred", "stan", {**nuts, "centred": True}),
        ]
    return who


def judged(record: Record) -> dict[str, Any]:
    """A record's numbers: medians over rounds; ESS a second round by round."""
    told: dict[str, Any] = {
        "name": record.name, "about": record.about, "versions": dict(record.versions),
        "trouble": record.trouble,
    }  # fmt: skip
    if record.trouble or not record.arrays:
        return told
    ess, whose = zip(*map(agreement.smallest_ess, record.arrays), strict=True)
    rate = [e / s for e, s in zip(ess, record.rounds, strict=True)]
    worst = agreement.summarise(pooled(record))
    return told | {
        "cold_s": record.cold_s, "warm_s": float(np.median(record.rounds)),
        "rounds_s": record.rounds, "calls": record.calls, "ess": float(np.median(ess)),
        "ess_rounds": list(ess), "ess_of": whose[int(np.argsort(ess)[len(ess) // 2])],
        "ess_per_s": float(np.median(rate)), "rhat": float(np.nanmax(worst.rhat)),
        "draws": int(np.prod(record.arrays[0]["mu"].shape[:2])),
        "peak_mb": record.peak_mb, "child_mb": record.child_mb,
    }  # fmt: skip


def pooled(record: Record) -> dict[str, np.ndarray]:
    """Draws of all rounds, as further chains."""
    names = record.arrays[0]
    return {name: np.concatenate([arrays[name] for arrays in record.arrays]) for name in names}


def table(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """A line a contestant; its ratio is hierbayes' ESS a second over its own."""
    lines = [
        f"{name}: smallest bulk ESS over φ and θ a second",
        f"  {'':20}{'draws':>7}{'cold s':>9}{'warm s':>10}{'ESS':>8}  {'of':14}{'R̂':>6}"
        f"{'ESS / s':>11}{'peak MB':>9}{'children':>9}{'hierbayes / this':>18}",
    ]
    base = next((r.get("ess_per_s") for r in rows if r["name"] == "hierbayes"), None)
    for row in rows:
        if row["trouble"]:
            lines.append(f"  {row['name']:20}no time: {row['trouble']}")
            continue
        ratio = f"{base / row['ess_per_s']:18.1f}" if base and row["ess_per_s"] else f"{'':>18}"
        child = "" if not row["child_mb"] > 0 else f"{row['child_mb']:.0f}"
        lines.append(
            f"  {row['name']:20}{row['draws']:>7,}{row['cold_s']:9.2f}{row['warm_s']:10.3f}"
            f"{row['ess']:8.0f}  {row['ess_of'].replace(' ', ''):14}{row['rhat']:6.3f}"
            f"{row['ess_per_s']:11.1f}{row['peak_mb']:9.0f}{child:>9}{ratio}"
        )
    return lines


def draw(name: str, rows: list[dict[str, Any]], path: Path) -> None:
    """ESS a second of every contestant, rounds as points."""
    import matplotlib.pyplot as plt

    timed = [row for row in rows if not row["trouble"]]
    if not timed:
        return
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(timed) + 1.4), layout="constrained")
    for place, row in enumerate(reversed(timed)):
        style = look([r["name"] for r in rows].index(row["name"]))
        rates = [e / s for e, s in zip(row["ess_rounds"], row["rounds_s"], strict=True)]
        axes.plot(rates, [place] * len(rates), style["marker"], color=style["color"], alpha=0.4)
        axes.plot(row["ess_per_s"], place, "|", color=style["color"], markersize=22, mew=2.5)
        rounded = float(f"{row['ess_per_s']:.3g}")
        axes.annotate(
            f"{rounded:,.10g}", (row["ess_per_s"], place), xytext=(0, 12),
            textcoords="offset points", ha="center", fontsize=9,
        )  # fmt: skip
    axes.set_yticks(range(len(timed)), [row["name"] for row in reversed(timed)])
    axes.set_ylim(-0.6, len(timed) - 0.2)
    axes.set_xscale("log")
    axes.margins(x=0.1)
    plain_numbers(axes.xaxis)
    axes.set_xlabel(f"smallest effective sample size a second, {name} (each round, and median)")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    """Run one or several problems, print tables, write JSON and PNG."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("problem", choices=NAMES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=1000, help="draws kept a chain")
    parser.add_argument("--warmup", type=int, default=1000, help="warm-up draws a chain of NUTS")
    parser.add_argument("--only", nargs="+", help="contestants by name; hierbayes always runs")
    parser.add_argument("--also-centred", action="store_true", help="nutpie and Stan centred too")
    parser.add_argument(
        "--most-seconds", type=float, default=120.0,
        help="a contestant whose first call takes longer gets one further round only",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all")
    parser.add_argument("--output", help="folder, results/NAME unless given")
    args = parser.parse_args(argv)
    draws, warmup, rounds = (300, 300, 2) if args.quick else (args.draws, args.warmup, args.rounds)
    who = entries(draws, warmup, also_centred=args.also_centred)
    if args.only:
        unknown = {*args.only} - {entry.name for entry in who}
        if unknown:
            parser.error(f"no contestant is named {', '.join(sorted(unknown))}")
        who = [entry for entry in who if entry.name in ("hierbayes", *args.only)]
    where = folder(args.output or f"results/{args.problem}")
    given = problems.given(args.problem, quick=args.quick)
    with tempfile.TemporaryDirectory(prefix="hierbayes-benchmark-") as scratch:
        records = compete(
            who, given, Path(scratch), rounds=rounds,
            at_least=0.2 if args.quick else 1.0, most_seconds=args.most_seconds,
        )  # fmt: skip
    say("comparing posteriors …")
    found = {r.name: agreement.summarise(pooled(r)) for r in records if r.arrays and not r.trouble}
    for record in records:
        if record.name in found:
            told = agreement.verdicts(found, agreement.same_posterior)[record.name]
            record.trouble = told
    rows = [judged(record) for record in records]
    print("\n".join(table(args.problem, rows)))
    write_json(where / f"{args.problem}.json", {
        "environment": environment(), "settings": vars(args), "rows": len(given.outcome),
        "tasks": given.num_tasks, "formula": given.formula,
        "hyperprior": {k: getattr(given, k) for k in ("mu", "tau", "corr", "sigma")},
        "contestants": rows,
    })  # fmt: skip
    draw(args.problem, rows, where / f"{args.problem}.png")
    say(f"written to {where}")
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main())
