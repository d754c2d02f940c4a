"""``import hierbayes`` beside ``import numpyro``, each in fresh interpreters, in turns.

``python -m benchmarks import``. The ratio of medians; a first round fills the disk's cache and is
not counted.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.output import environment, folder, look, options, save_figure, write_json
from benchmarks.processes import ROOT, say

NAME = "import"
CONTESTANTS = {"hierbayes": "import hierbayes", "numpyro": "import numpyro", "nothing": "pass"}


def seconds(code: str) -> float:
    """Wall seconds of an interpreter that runs this and ends."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    return time.perf_counter() - started


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, write JSON and PNG."""
    parser = options(NAME, __doc__, "two rounds")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    where = folder(args.output)
    taken: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for number in range(1 + (2 if args.quick else args.rounds)):
        say(f"round {number} …")
        for name, code in CONTESTANTS.items():
            took = seconds(code)
            if number:
                taken[name].append(took)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    ratio = medians["hierbayes"] / medians["numpyro"]
    for name, median in medians.items():
        print(f"  {CONTESTANTS[name]:18}{median:8.3f} s  (fastest {min(taken[name]):.3f} s)")
    print(f"  import hierbayes / import numpyro: {ratio:.3f}")
    write_json(
        where / f"{NAME}.json",
        {"environment": environment(), "seconds": taken, "medians": medians, "ratio": ratio},
    )
    draw(taken, ratio, where)
    say(f"written to {where}")
    return 0


def draw(taken: dict[str, list[float]], ratio: float, where: object) -> None:
    """Every interpreter a point, medians as bars."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 2.2), layout="constrained")
    for place, times in enumerate(reversed(taken.values())):
        style = look(place)
        axes.plot(times, [place] * len(times), style["marker"], color=style["color"], alpha=0.5)
        axes.plot(statistics.median(times), place, "|", color=style["color"], ms=20, mew=2.5)
    axes.set_yticks(range(len(taken)), [CONTESTANTS[name] for name in reversed(taken)])
    axes.set_ylim(-0.6, len(taken) - 0.4)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"seconds of a fresh interpreter; hierbayes / numpyro = {ratio:.2f}")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, folder(str(where)) / f"{NAME}.png")


if __name__ == "__main__":
    sys.exit(main())
