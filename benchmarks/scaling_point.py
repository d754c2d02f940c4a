"""One size in a process of its own: ``python -m benchmarks.scaling_point '{"what": …}'``."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.worker import peak_megabytes


def forget_peak() -> None:
    """Begin the count of the most memory anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def repeated(work: Callable[[int], Any], calls: int, at_least: float) -> tuple[list[float], Any]:
    """Seconds of a few calls, more where they are short, and the last result."""
    seconds, result = [], None
    while len(seconds) < calls or (sum(seconds) < at_least and len(seconds) < 20):
        took, result = timed(lambda: work(1 + len(seconds)))
        seconds.append(took)
    return seconds, result


def measure(what: str, num_tasks: int, rows: int, calls: int) -> dict[str, Any]:
    """Forming Tasks and their statistics, then ``empirical_bayes`` or ``full_bayes``."""
    import pandas as pd

    import hierbayes as hb
    from benchmarks import agreement, problems
    from hierbayes.statistics import statistics as statistics_of

    def table(of: int) -> tuple[str, pd.DataFrame]:
        given = problems.given("many", num_tasks=of, rows=rows)
        return given.formula, pd.DataFrame(given.columns())

    hb.from_formula(*table(10))  # imports what reads formulas
    read = table(num_tasks)
    forming, (model, tasks) = timed(lambda: hb.from_formula(*read))
    forming_peak = peak_megabytes()["peak_mb"]
    read = None
    reducing, _ = timed(lambda: statistics_of(tasks))
    forget_peak()
    told: dict[str, Any] = {
        "forming_s": forming, "forming_peak_mb": forming_peak, "statistics_s": reducing,
    }  # fmt: skip
    if what == "full":
        # as the samplers' contest has it, so that all sizes have one and the same hyperprior
        model = hb.HierarchicalModel(model.likelihood, model.prior, problems.simple(True))

        def fit(seed: int) -> hb.Fit:
            return hb.full_bayes(model, tasks, seed=seed, progress=False)
    else:

        def fit(seed: int) -> hb.Fit:
            return hb.empirical_bayes(model, tasks, seed=seed)

    told["cold_s"], _ = timed(lambda: fit(0))
    seconds, last = repeated(fit, calls, 0.0 if what == "full" else 1.0)
    told |= {"warm_s": statistics.median(seconds), "seconds": seconds, **peak_megabytes()}
    if what == "full":
        above = np.triu_indices(2, 1)
        draws = {k: np.asarray(v) for k, v in last.phi_draws.items()}
        draws["corr"] = draws["corr"][..., above[0], above[1]]
        told["ess"], told["ess_of"] = agreement.smallest_ess(draws)
        told["theta"] = last.theta_draws is not None
    return told


def main() -> None:
    """Measure what is asked for; a line of JSON on standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    print(json.dumps(measure(**json.loads(sys.argv[1]))), file=answers, flush=True)


if __name__ == "__main__":
    main()
