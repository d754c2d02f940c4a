"""``python -m benchmarks meta-steps``: how fast MAML's meta-steps are, and how they grow.

One run answers, on one machine:

- meta-steps a second at K = 1 and 5 by ``hb.maml``, by a hand-written ``jax.lax.scan`` and by
  learn2learn and higher in PyTorch, taking turns. First it is checked that all follow the same
  meta-gradient at the same weights and tasks, and that their losses fall alike;
- time against K, and memory of the compiled meta-step against K for every derivative;
- tasks a second against the batch size, until the device is full.

Ratios hold within one run on one machine. hierbayes' rate is that of whole ``hb.maml`` calls after
compilation, scores on held-out tasks included.

PyTorch runs in the interpreter that ``HIERBAYES_TORCH_PYTHON`` names (this one by default); what it
lacks is named and left out. ``pip install torch higher`` gives higher. learn2learn 0.2.0 ships C
files that newer Pythons do not compile; make them anew from its Cython sources::

    pip download --no-deps --no-binary :all: learn2learn==0.2.0
    tar xf learn2learn-0.2.0.tar.gz && cd learn2learn-0.2.0
    pip install cython setuptools wheel && cython -3 learn2learn/data/*.pyx
    pip install --no-deps --no-build-isolation .

Its ``algorithms.MAML`` is loaded without the rest of the package, which would want gym, torchvision
and others.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import meta_step_contest as contest
from benchmarks import meta_step_scaling as scaling
from benchmarks.output import environment, folder, look, plain_numbers, save_figure, write_json

NAME = "meta-steps"
STEPS = (1, 5)
SAME = 1e-4
"""Largest relative difference of meta-gradients, in float32, that counts as none."""
ALIKE = 0.15
"""Largest difference of losses after training, relative, that counts as alike."""


def say(*words: Any) -> None:
    """Progress, on stderr."""
    print(*words, file=sys.stderr, flush=True)


# ----------------------------------------------------------- do all do the same


def slopes(peers: contest.Peers, names: list[str], num_steps: int) -> dict[str, float]:
    """How far each contestant's meta-gradient is from plain JAX's, relative, on the same tasks."""
    weights = jax.tree.map(np.asarray, contest.init(jax.random.key(3)))
    batch = [np.asarray(part) for part in contest.draw(jax.random.key(4))]
    tree = jax.grad(contest.meta_loss)(weights, batch, num_steps)
    reference = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    found = {"hierbayes": contest.hierbayes_slope(num_steps, weights, batch)}
    found |= {name: peers.slope(name, num_steps, weights, batch) for name in names}
    length = np.linalg.norm(reference)
    return {n: float(np.linalg.norm(slope - reference) / length) for n, slope in found.items()}


def losses(
    peers: contest.Peers, names: list[str], num_steps: int, count: int, seeds: int
) -> dict[str, list[float]]:
    """Mean query losses of the last 100 of ``count`` meta-steps, a number a seed."""
    found: dict[str, list[float]] = {name: [] for name in ("hierbayes", "plain JAX", *names)}
    for seed in range(seeds):
        found["hierbayes"].append(contest.hierbayes_losses(num_steps, count, seed))
        plain = contest.PlainJax(num_steps, 10 * seed + 1).train(count)["losses"]
        found["plain JAX"].append(float(plain[-100:].mean()))
        for name in names:
            told = peers.train(name, num_steps, count, seed=seed, threads=1)["losses"]
            found[name].append(float(np.mean(told[-100:])))
    return found


def differ(found: dict[str, list[float]]) -> str | None:
    """Why the losses are not alike; None where they are.

    Means over the seeds may differ by 15 %, or by three standard errors of their difference.
    """
    reference = np.asarray(found["plain JAX"])
    for name, values in found.items():
        both = (np.asarray(values), reference)
        gap = abs(both[0].mean() - both[1].mean())
        se = np.sqrt(sum(v.var(ddof=1) / len(v) for v in both)) if len(reference) > 1 else 0.0
        if not gap <= max(ALIKE * reference.mean(), 3 * se):
            return f"{name} ends at {both[0].mean():.3g}, plain JAX at {both[1].mean():.3g}"
    return None


# -------------------------------------------------------------------- the times


def rates(
    peers: contest.Peers, names: list[str], num_steps: int, seconds: float, rounds: int
) -> dict[str, list[float]]:
    """Meta-steps a second of each contestant, a number a round; they take turns."""
    plain = contest.PlainJax(num_steps)

    def of_plain(count: int) -> float:
        return plain.train(count)["seconds"]

    def of_peer(name: str, threads: int | None) -> Callable[[int], float]:
        return lambda count: peers.train(name, num_steps, count, threads=threads)["seconds"]

    turns = {"plain JAX": of_plain}
    for name in names:
        turns |= {
            f"{name}, threads as they are": of_peer(name, None),
            f"{name}, 1 thread": of_peer(name, 1), f"{name}, 2 threads": of_peer(name, 2),
        }  # fmt: skip
    counts = {}
    for name, work in turns.items():
        work(20)
        counts[name] = max(20, round(20 * seconds / work(20)))
        work(counts[name])  # plain JAX compiles for this length
    found: dict[str, list[float]] = {"hierbayes": [], **{name: [] for name in turns}}
    for i in range(rounds):
        say(f"K = {num_steps}, round {i + 1} of {rounds} …")
        found["hierbayes"].append(contest.hierbayes_rate(num_steps, seconds))
        for name, work in turns.items():
            found[name].append(counts[name] / work(counts[name]))
    return found


def best_threads(medians: dict[str, float], peer: str) -> str:
    """The fastest of a peer's thread settings."""
    return max((name for name in medians if name.startswith(f"{peer},")), key=medians.__getitem__)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Contestants at every K: that they agree, then their rates."""
    peers = contest.Peers()
    try:
        names = [name for name in ("learn2learn", "higher") if peers.versions.get(name)]
        for name in ("learn2learn", "higher"):
            if name not in names:
                say(f"{name} is left out: {peers.versions.get(f'{name} lacks')}")
        found: dict[str, Any] = {"peers": peers.versions}
        for num_steps in STEPS:
            say(f"K = {num_steps}: do all do the same …")
            off = slopes(peers, names, num_steps)
            fallen = losses(peers, names, num_steps, args.check_steps, args.check_seeds)
            wrong = [name for name, value in off.items() if not value <= SAME]
            why = f"meta-gradients differ: {off}" if wrong else differ(fallen)
            found[str(num_steps)] = {"slope_difference": off, "losses": fallen, "differ": why}
            if why is not None:
                say(f"K = {num_steps}: no times, since the contestants differ: {why}")
                continue
            each = rates(peers, names, num_steps, args.seconds, args.rounds)
            found[str(num_steps)]["meta_steps_a_second"] = each
        return found
    finally:
        peers.close()


def table(found: dict[str, Any]) -> list[str]:
    """Medians and how many times as fast as each contestant hierbayes is."""
    head = ("contestant", "meta-steps/s", "(range)", "hierbayes ×")
    rows = ["  K  {:34} {:>12}   {:18} {:>11}".format(*head)]
    for num_steps in STEPS:
        each = found[str(num_steps)].get("meta_steps_a_second")
        if each is None:
            rows.append(f"{num_steps:3}  {found[str(num_steps)]['differ']}")
            continue
        ours = statistics.median(each["hierbayes"])
        for name, values in each.items():
            middle = statistics.median(values)
            span = f"({min(values):.0f} to {max(values):.0f})"
            rows.append(
                f"{num_steps:3}  {name:34} {middle:12.0f}   {span:18} {ours / middle:11.2f}"
            )
    return rows


# --------------------------------------------------------------------- pictures


def draw_contest(found: dict[str, Any], path: Any) -> None:
    """Rates of all contestants, a panel a K."""
    import matplotlib.pyplot as plt

    shown = [k for k in STEPS if "meta_steps_a_second" in found[str(k)]]
    if not shown:
        return
    figure, axes = plt.subplots(
        1, len(shown), figsize=(4.6 * len(shown) + 1, 3.2), layout="constrained", squeeze=False,
        sharey=True,
    )  # fmt: skip
    for ax, num_steps in zip(axes[0], shown, strict=True):
        each = found[str(num_steps)]["meta_steps_a_second"]
        medians = {name: statistics.median(values) for name, values in each.items()}
        peers = [n for n in ("learn2learn", "higher") if any(m.startswith(n) for m in medians)]
        names = ["hierbayes", "plain JAX", *(best_threads(medians, peer) for peer in peers)]
        for i, name in enumerate(reversed(names)):
            low, high = min(each[name]), max(each[name])
            style = look(len(names) - 1 - i) | {"linestyle": "none"}
            error = [[medians[name] - low], [high - medians[name]]]
            ax.errorbar(medians[name], i, xerr=error, capsize=3, markersize=7, **style)
            _, _, threads = name.partition(", ")
            label = f"{medians[name]:,.0f}" + (f" ({threads})" if threads else "")
            ax.annotate(
                label, (medians[name], i), xytext=(0, 8), ha="center",
                textcoords="offset points", fontsize=9,
            )  # fmt: skip
        ax.set_yticks(range(len(names)), [name.partition(", ")[0] for name in reversed(names)])
        ax.set(xscale="log", ylim=(-0.5, len(names) - 0.4), title=f"K = {num_steps}")
        ax.set_xlabel("meta-steps a second")
        ax.margins(x=0.25)
        ax.grid(axis="x", alpha=0.3)
    figure.suptitle(
        "MAML on sinusoids, 25 tasks a meta-step (median, range; PyTorch at its best threads)",
        fontsize=10,
    )
    save_figure(figure, path)


def draw_scaling(found: dict[str, Any], path: Any) -> None:
    """Time and memory against K, tasks a second against the batch size."""
    import matplotlib.pyplot as plt

    panels = [name for name in ("time", "memory", "batches") if name in found]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.4 * len(panels), 3.6), layout="constrained", squeeze=False
    )
    for ax, panel in zip(axes[0], panels, strict=True):
        ax.set(xscale="log", yscale="log")
        ax.grid(alpha=0.3)
        if panel != "batches":
            plain_numbers(ax.xaxis)
            plain_numbers(ax.yaxis)
        told = found[panel]
        if panel == "time":
            sizes = np.asarray(told["num_steps"], float)
            ax.plot(sizes, 1e3 * np.asarray(told["seconds"]), **look(0), label="hb.maml")
            straight = told["line"]["constant"] + told["line"]["slope"] * sizes
            ax.plot(sizes, 1e3 * straight, color="0.4", lw=1, ls=":", label="a + b K")
            ax.set(xlabel="inner steps K", ylabel="ms a meta-step", title="Time")
            ax.legend()
        elif panel == "memory":
            for i, mode in enumerate(scaling.MODES):
                megabytes = np.asarray(told["bytes"][mode]) / 1e6
                ax.plot(told["num_steps"], megabytes, **look(i), markersize=5, label=mode)
            ax.set(xlabel="inner steps K", ylabel="MB", title="Memory of a compiled meta-step")
            ax.legend(title="derivative", fontsize=8)
        else:
            ax.plot(told["batch_size"], told["tasks_a_second"], **look(0))
            ax.set(xlabel="tasks a meta-step", ylabel="tasks a second")
            ax.set_title(f"Batch size (K = {told['inner_steps']})")
    save_figure(figure, path)


# -------------------------------------------------------------------------- run


def grow(args: argparse.Namespace) -> dict[str, Any]:
    """Time, memory and batches, as asked for."""
    found: dict[str, Any] = {}
    if "time" in args.parts:
        say("time against K …")
        sizes = [k for k in (1, 2, 5, 10, 20, 50) if k <= args.most_steps]
        seconds = scaling.times(sizes, args.seconds)
        found["time"] = {
            "num_steps": sizes, "seconds": seconds, "exponent": scaling.exponent(sizes, seconds),
            "line": scaling.line(sizes, seconds),
        }  # fmt: skip
        if (long := [i for i, k in enumerate(sizes) if k >= 5])[1:]:
            found["time"]["exponent_from_5"] = scaling.exponent(
                [sizes[i] for i in long], [seconds[i] for i in long]
            )
    if "memory" in args.parts:
        sizes = [k for k in (1, 2, 5, 10, 20, 50, 100, 200) if k <= 4 * args.most_steps]
        taken = {}
        for mode in scaling.MODES:
            say(f"memory against K, {mode} …")
            taken[mode] = [scaling.memory(mode, k) for k in sizes]
        ends = {m: scaling.exponent(sizes[-4:], taken[m][-4:]) for m in taken}
        found["memory"] = {"num_steps": sizes, "bytes": taken, "exponent_of_last_4": ends}
    if "batches" in args.parts:
        say("tasks a second …")
        sizes = [4**i for i in range(7) if 4**i <= args.most_tasks]
        found["batches"] = {
            "batch_size": sizes, "inner_steps": STEPS[0],
            "tasks_a_second": scaling.tasks_a_second(sizes, STEPS[0], args.seconds),
        }  # fmt: skip
    return found


def told_in_words(found: dict[str, Any]) -> list[str]:
    """What grew, in lines."""
    rows = []
    if "time" in found:
        told = found["time"]
        each = ", ".join(
            f"{k}: {1e3 * s:.3g}" for k, s in zip(told["num_steps"], told["seconds"], strict=True)
        )
        rows += [
            f"ms a meta-step by K: {each}",
            f"time grows as K^{told['exponent']:.2f} over all K"
            + (f", K^{told['exponent_from_5']:.2f} from 5 on" if "exponent_from_5" in told else "")
            + f"; a + b K is off by at most {told['line']['largest_relative_error']:.0%}",
        ]
    if "memory" in found:
        told = found["memory"]
        for mode, taken in told["bytes"].items():
            each = ", ".join(
                f"{k}: {b / 1e6:.3g}" for k, b in zip(told["num_steps"], taken, strict=True)
            )
            power = told["exponent_of_last_4"][mode]
            rows.append(f"MB by K, {mode:15} {each}; at the end K^{power:.2f}")
    if "batches" in found:
        told = found["batches"]
        pairs = zip(told["batch_size"], told["tasks_a_second"], strict=True)
        each = ", ".join(f"{b}: {r:,.0f}" for b, r in pairs)
        rows.append(f"tasks a second by batch size, K = {told['inner_steps']}: {each}")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run, print tables, write JSON and PNG."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {NAME}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parts = ("contest", "time", "memory", "batches")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each timing")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--check-steps", type=int, default=500, help="before losses are compared")
    parser.add_argument("--check-seeds", type=int, default=3)
    parser.add_argument("--most-steps", type=int, default=50, help="largest K in time against K")
    parser.add_argument("--most-tasks", type=int, default=4096, help="largest batch")
    parser.add_argument("--output", default=f"results/{NAME}")
    args = parser.parse_args(argv)
    where, started = folder(args.output), time.perf_counter()
    found: dict[str, Any] = {"environment": environment(), "settings": vars(args)}
    if "contest" in args.parts:
        found["contest"] = compare(args)
        print("\n".join(table(found["contest"])))
        draw_contest(found["contest"], where / "contest.png")
    found |= grow(args)
    if found.keys() & {"time", "memory", "batches"}:
        print("\n".join(told_in_words(found)))
        draw_scaling(found, where / "scaling.png")
    found["seconds"] = time.perf_counter() - started
    write_json(where / "meta_steps.json", found)
    say(f"written to {where} ({found['seconds']:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
