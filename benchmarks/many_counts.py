"""Many tasks of ten counts: empirical Bayes by quadrature beside lme4's ``glmer``.

``python -m benchmarks many-counts``: Poisson with a random intercept and one shared column, 100,000
tasks, maximum likelihood. Estimates are compared before any time is told: they may differ by a
share of their standard errors, since lme4 stops its search earlier; Laplace's approximation
(nAGQ = 1) is another criterion and may lie off by more, which is told. hierbayes is timed from
Tasks whose rows are laid out, and from a DataFrame; lme4 inside R with the data loaded, the fit
alone. Ratios hold within one run on one machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import problems
from benchmarks.many_tasks import BASE, draw, row, table
from benchmarks.output import environment, folder, options, write_json
from benchmarks.processes import Entry, compete, say

NAME = "many-counts"
WHO = (
    Entry(BASE, "hierbayes_ml"),
    Entry("hierbayes, DataFrame", "hierbayes_ml", {"read": True}),
    Entry("glmer, Laplace", "lme4"),
    Entry("glmer, 7 nodes", "lme4", {"num_nodes": 7}),
)
ERRORS = 0.2
"""Standard errors by which estimates of the same criterion may differ."""


def differs(found: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[float, str]:
    """The most by which an estimate is off, in standard errors, and whose it is."""
    off = {
        name: float(np.max(np.abs(np.ravel(found[name]) - base[name]) / base[f"se_{name}"]))
        for name in ("mu", "beta", "tau")
    }
    worst = max(off, key=lambda name: off[name])
    return off[worst], worst


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, write JSON and PNG."""
    parser = options(NAME, __doc__, "small sizes")
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    size, rounds = (2_000, 2) if args.quick else (args.tasks, args.rounds)
    where = folder(args.output)
    given = problems.given("counts", num_tasks=size)
    with tempfile.TemporaryDirectory(prefix="hierbayes-benchmark-") as scratch:
        records = compete(
            WHO, given, Path(scratch), rounds=rounds, at_least=0.0, most_seconds=120.0
        )
    found = {r.name: r.arrays[-1] for r in records if r.arrays and not r.trouble}
    remarks = {}
    for record in records:
        if record.name not in found:
            continue
        off, name = differs(found[record.name], found[BASE])
        remarks[record.name] = f"{name} off by {off:.2g} standard errors" if off > 1e-3 else ""
        if off > ERRORS and "Laplace" not in record.name:
            record.trouble = remarks[record.name]
    told = {"tasks": size, "formula": given.formula}
    told["contestants"] = [row(r, remarks.get(r.name, "")) for r in records]
    print("\n".join(table(told)), flush=True)
    write_json(
        where / f"{NAME}.json",
        {"environment": environment(), "settings": vars(args), "contests": [told]},
    )
    draw([told], where / f"{NAME}.png")
    say(f"written to {where}")
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main())
