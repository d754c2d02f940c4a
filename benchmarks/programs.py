"""Programs compiled by a first fit, and by fits to other data of the same or about the same size.

``python -m benchmarks programs``. Counted by JAX's own monitoring events, and named by its log. A
second call on other data of the same shape, and one with a row or a task more, should compile
nothing: a user who fits again should not wait for what was compiled before.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pandas as pd
from jax import monitoring

import hierbayes as hb
from benchmarks.output import environment, folder, options, write_json
from benchmarks.processes import say

NAME = "programs"
EVENT = "/jax/core/compile/backend_compile_duration"
CALLS = ("first", "other data", "a row more", "a task more")

METHODS: dict[str, Callable[[Any, Any], hb.Fit]] = {
    "empirical Bayes, ml": lambda m, t: hb.empirical_bayes(m, t, num_draws=10),
    "empirical Bayes, reml": lambda m, t: hb.empirical_bayes(m, t, "reml", num_draws=10),
    "empirical Bayes, map": lambda m, t: hb.empirical_bayes(m, t, "map", num_draws=10),
    "full Bayes, collapsed": lambda m, t: hb.full_bayes(m, t, num_draws=100),
    "full Bayes, NUTS": lambda m, t: hb.full_bayes(
        m, t, "nuts", num_draws=20, num_warmup=20, num_chains=2, progress=False
    ),
    "MAML": lambda m, t: hb.maml(m, t),
    "iMAML": lambda m, t: hb.imaml(m, t),
    "Reptile": lambda m, t: hb.reptile(m, t),
}  # fmt: skip


class Counted:
    """Programs compiled inside :meth:`during`: how many by JAX's events, which by its log."""

    def __init__(self) -> None:
        self.count, self.names = 0, Counter[str]()
        monitoring.register_event_duration_secs_listener(self._heard)
        jax.config.update("jax_log_compiles", True)
        handler = logging.Handler()
        handler.emit = self._logged  # type: ignore[method-assign]
        for name in ("jax._src.interpreters.pxla", "jax._src.dispatch", "jax._src.compiler"):
            logger = logging.getLogger(name)
            logger.propagate, logger.handlers = False, [handler]

    def _heard(self, event: str, _: float, **more: Any) -> None:
        del more
        self.count += event == EVENT

    def _logged(self, record: logging.LogRecord) -> None:
        found = re.match(r"Compiling (\S+)", record.getMessage())
        if found:
            self.names[found.group(1)] += 1

    @contextmanager
    def during(self) -> Iterator[dict[str, Any]]:
        """A dict that holds ``count`` and ``names`` afterwards."""
        self.count, self.names, told = 0, Counter[str](), dict[str, Any]()
        yield told
        told |= {"count": self.count, "names": dict(self.names)}


def frame(family: str, num_tasks: int, more: int, seed: int) -> pd.DataFrame:
    """Rows with a varying slope, six to twelve a task and ``more`` in the first."""
    rng = np.random.default_rng(seed)
    sizes = 6 + np.arange(num_tasks) % 7
    g = np.sort(np.append(np.repeat(np.arange(num_tasks), sizes), np.zeros(more, int)))
    x = rng.normal(size=g.size)
    f = 0.5 + rng.normal(0, 0.6, num_tasks)[g] + (0.4 + rng.normal(0, 0.3, num_tasks)[g]) * x
    y = rng.normal(f, 0.5) if family == "gaussian" else rng.poisson(np.exp(f)).astype(float)
    return pd.DataFrame({"g": g, "x": x, "y": y})


def of_tasks(counted: Counted, family: str, fit_by: Callable[..., hb.Fit]) -> list[dict[str, Any]]:
    """A call after another: the fit, what it predicts, and its adaptation to new tasks."""
    calls = []
    for seed, (num_tasks, more) in enumerate([(49, 0), (49, 0), (49, 1), (50, 0)]):
        given = {} if family == "gaussian" else {"family": family}
        model, tasks = hb.from_formula(
            "y ~ x + (x | g)", frame(family, num_tasks, more, seed), **given
        )
        new = frame(family, 19, more, seed + 9).assign(g=lambda df: df.g + 100)
        told: dict[str, Any] = {"call": CALLS[seed]}
        with counted.during() as told["fit"]:
            fit = fit_by(model, tasks)
            fit.theta  # noqa: B018
        with counted.during() as told["predict"]:
            fit.predict(tasks).interval(0.9)
        with counted.during() as told["adapt"]:
            fit.adapt(new).predict(new).log_density()
        calls.append(told)
    return calls


def on_episodes(counted: Counted, kind: str) -> list[dict[str, Any]]:
    """MAML, iMAML or Reptile of a network on episodes, twice."""
    network = hb.likelihoods.Network.mlp([1, 8, 1])
    model = hb.HierarchicalModel(network, hb.priors.Gaussian(correlated=False))
    calls = []
    for seed, call in enumerate(CALLS[:2]):
        told: dict[str, Any] = {"call": call}
        with counted.during() as told["fit"]:
            fit = getattr(hb, kind)(
                model, hb.datasets.sinusoids(5), num_steps=1, num_meta_steps=20, batch_size=5,
                seed=seed, progress=False,
            )  # fmt: skip
        support, query = hb.datasets.sinusoids(5).draw(20, seed=seed)
        with counted.during() as told["adapt"]:
            fit.adapt(support).predict(query).log_density()
        calls.append(told)
    return calls


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, write JSON."""
    parser = options(NAME, __doc__, "Gaussian empirical Bayes and MAML alone")
    parser.add_argument("--methods", nargs="+", help="names of the table")
    args = parser.parse_args(argv)
    where, counted = folder(args.output), Counted()
    chosen = args.methods or list(METHODS)
    if args.quick:
        chosen = ["empirical Bayes, ml", "MAML"]
    found: dict[str, list[dict[str, Any]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        for family in ("gaussian",) if args.quick else ("gaussian", "poisson"):
            for name in chosen:
                if family == "poisson" and "reml" in name:
                    continue
                found[f"{name}, {family}"] = of_tasks(counted, family, METHODS[name])
                show(f"{name}, {family}", found[f"{name}, {family}"])
        for kind in () if args.quick or args.methods else ("maml", "imaml", "reptile"):
            found[f"{kind}, episodes"] = on_episodes(counted, kind)
            show(f"{kind}, episodes", found[f"{kind}, episodes"])
    write_json(where / f"{NAME}.json", {"environment": environment(), "programs": found})
    say(f"written to {where}")
    return 0


def show(name: str, calls: list[dict[str, Any]]) -> None:
    """A line a call, with the names of what was compiled after the first."""
    for told in calls:
        counts = {part: told[part]["count"] for part in ("fit", "predict", "adapt") if part in told}
        line = f"  {name:34}{told['call']:12}" + "".join(f"{n:4d} {p}" for p, n in counts.items())
        again = sum((Counter(told[p]["names"]) for p in counts), Counter[str]())
        print(line if told["call"] == "first" else f"{line}  {dict(again) or ''}", flush=True)
