"""``python -m benchmarks``: how long each method takes, cold (compiling) and warm.

``python -m benchmarks NAME`` runs a benchmark of a file of its own, with arguments of its own
(``--help`` tells them): ``radon``, ``radon-correlated``, ``uneven``, ``uneven-correlated`` and
``schools``, ``contraception`` (:mod:`benchmarks.samplers`), ``many-tasks``, ``many-counts``,
``scaling``, ``cold-start``, ``import``, ``coverage``, ``programs``, ``meta-steps``, ``sinusoids``.
``python -m benchmarks --quick`` runs all but the last two at small sizes, to see that they work; a
peer that is not installed is named and skipped.
Ratios hold within one run on one machine; do not compare seconds between machines.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

import hierbayes as hb
from benchmarks.samplers import NAMES

CONTESTS = {
    **{name: ("samplers", name) for name in NAMES},
    "many-tasks": ("many_tasks",),
    "many-counts": ("many_counts",),
    "scaling": ("scaling",),
    "cold-start": ("cold_start",),
    "import": ("import_time",),
    "coverage": ("coverage",),
    "programs": ("programs",),
}
"""hierbayes beside its peers: the file that runs it, and its first arguments."""
NAMED = {"meta-steps": ("meta_steps",), "sinusoids": ("sinusoids",), **CONTESTS}
"""Benchmarks of their own files, by the name that the command line takes."""


def seconds(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """(first call, median of the further ones)."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times[0], statistics.median(times[1:])


def radon() -> dict[str, Callable[[], hb.Fit]]:
    """Every method on radon: 919 rows, 85 counties, correlated slopes."""
    model, tasks = hb.from_formula(
        "log_radon ~ 1 + floor + (1 + floor | county)", hb.datasets.radon()
    )
    return {
        "no_pooling": lambda: hb.no_pooling(model, tasks),
        "complete_pooling": lambda: hb.complete_pooling(model, tasks),
        "maml": lambda: hb.maml(model, tasks),
        "imaml": lambda: hb.imaml(model, tasks),
        "reptile": lambda: hb.reptile(model, tasks),
        "empirical_bayes": lambda: hb.empirical_bayes(model, tasks),
        "full_bayes collapsed": lambda: hb.full_bayes(model, tasks, "collapsed", progress=False),
        "full_bayes nuts": lambda: hb.full_bayes(model, tasks, "nuts", progress=False),
    }


def many(num_tasks: int) -> dict[str, Callable[[], hb.Fit]]:
    """Empirical Bayes on many tasks of ten rows, correlated slopes."""
    rng = np.random.default_rng(0)
    x = np.stack([np.ones((num_tasks, 10)), rng.normal(size=(num_tasks, 10))], axis=-1)
    theta = np.array([1.0, -0.5]) + rng.normal(size=(num_tasks, 2)) @ np.array(
        [[0.8, 0.2], [0, 0.4]]
    )
    y = np.einsum("jik,jk->ji", x, theta) + rng.normal(size=(num_tasks, 10))
    tasks = hb.Tasks.from_arrays(list(zip(x, y, strict=True)))
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    return {f"empirical_bayes, {num_tasks:,} tasks": lambda: hb.empirical_bayes(model, tasks)}


def equivalence(num_tasks: int = 10_000, num_coef: int = 5) -> dict[str, Callable[[], Any]]:
    """The prior that five gradient steps imply, for many tasks of ten rows at once."""
    rng = np.random.default_rng(0)
    tasks = hb.Tasks.from_arrays(
        [(rng.normal(size=(10, num_coef)), rng.normal(size=10)) for _ in range(num_tasks)]
    )
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    phi = {"mu": np.zeros(num_coef), "sigma": 1.0}

    def work() -> Any:
        implied = hb.equivalent_prior(model, tasks, phi, num_steps=5, step_size=0.01)
        return implied.precision, implied.covariance, implied.posterior_covariance

    return {f"equivalent_prior, {num_tasks:,} tasks, d = {num_coef}": work}


def run_named(name: str, arguments: list[str]) -> int:
    """A benchmark of a file of its own."""
    file, *first = NAMED[name]
    return importlib.import_module(f"benchmarks.{file}").main([*first, *arguments])


def main() -> int:
    """Run, print a table to stdout."""
    if sys.argv[1:] and sys.argv[1] in NAMED:
        return run_named(sys.argv[1], sys.argv[2:])
    if sys.argv[1:] == ["--quick"]:
        return max(run_named(name, ["--quick"]) for name in CONTESTS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=100_000, help="tasks of the large case")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    warnings.simplefilter("ignore", hb.FitWarning)
    figures = {}
    for name, work in {**radon(), **equivalence(), **many(args.tasks)}.items():
        print(f"{name} …", file=sys.stderr)
        figures[name] = dict(zip(("cold_s", "warm_s"), seconds(work, args.repeats), strict=True))
    base = figures["full_bayes nuts"]["warm_s"]
    for name, figure in figures.items():
        ratio = base / figure["warm_s"]
        print(f"{name:42} cold {figure['cold_s']:8.2f} s   warm {figure['warm_s']:8.3f} s"
              f"   joint NUTS / this {ratio:8.1f}")  # fmt: skip
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
