"""A contestant's own process: ``python -m benchmarks.worker MODULE FOLDER OPTIONS``.

It is told over standard input when to work and answers over standard output, in lines of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.given import Given


def peak_megabytes() -> dict[str, float]:
    """The most memory that this process held at once."""
    # macOS counts bytes
    unit = 1024.0 if sys.platform != "darwin" else 1024.0**2
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss of a process starts at what its parent held when it was forked; this does not
        lines = status.read_text().splitlines()
        most = next((int(x.split()[1]) for x in lines if x.startswith("VmHWM")), most)
    return {"peak_mb": most / unit}


class Missing(Exception):
    """A peer that is not installed; says what is missing."""


def calls(contestant: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds of calls with seeds of their own; the last one's arrays go to a file."""
    seconds: list[float] = []
    while True:
        seed = asked["seed"] + len(seconds)
        if hasattr(contestant, "before"):
            contestant.before(seed)
        started = time.perf_counter()
        arrays = contestant.run(seed)
        seconds.append(arrays.pop("seconds", time.perf_counter() - started))
        if sum(seconds) >= asked["at_least"] or len(seconds) >= asked["most"]:
            break
    ended = time.time()
    np.savez(asked["file"], **arrays)
    memory = contestant.memory() if hasattr(contestant, "memory") else peak_megabytes()
    return {"seconds": seconds, "ended": ended, **memory}


def main() -> None:
    """Prepare the contestant, then answer one line after another."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a peer prints goes to standard error

    def answer(told: dict[str, Any]) -> None:
        print(json.dumps(told), file=answers, flush=True)

    warnings.simplefilter("ignore")
    module, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    given = Given.read(folder)
    try:
        contestant = importlib.import_module(module).Contestant(given, **options)
    except (ImportError, Missing) as error:
        answer({"missing": f"{type(error).__name__}: {error}"})
        return
    except Exception as error:
        answer({"failed": f"{type(error).__name__}: {error}"})
        return
    answer({"versions": contestant.versions(), "about": contestant.about})
    for line in sys.stdin:
        try:
            answer(calls(contestant, json.loads(line)))
        except Exception as error:
            answer({"failed": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
