"""Contestants in processes of their own, asked in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.given import Given

ROOT = Path(__file__).parents[1]
CACHES = {"XDG_CACHE_HOME": "cache", "NUMBA_CACHE_DIR": "numba"}
"""Where peers keep what they compiled, by the variable that says so, in a folder of the run."""


@dataclass(frozen=True)
class Entry:
    """Who takes part: a module of ``benchmarks.peers`` and how it is set up."""

    name: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def python(self) -> str:
        """The interpreter of ``HIERBAYES_NUTPIE_PYTHON``, say; else this one."""
        return os.environ.get(f"HIERBAYES_{self.module.upper()}_PYTHON", sys.executable)


class Contestant:
    """A running process: ready, or missing, or failed."""

    def __init__(self, entry: Entry, given: Path, scratch: Path) -> None:
        self.entry, self.name = entry, entry.name
        self.scratch = scratch / entry.name.replace(" ", "-").replace(",", "")
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.told: dict[str, Any] = {"seconds": [], "rounds": []}
        self.trouble: str | None = None
        self.count = 0
        self.spawned = time.time()
        command = [entry.python, "-m", "benchmarks.worker", f"benchmarks.peers.{entry.module}"]
        self.log = (self.scratch / "log").open("w")
        self.process = subprocess.Popen(
            [*command, str(given), json.dumps(dict(entry.options))], text=True, cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=self._environment(),
        )  # fmt: skip
        hello = self._answer()
        self.ready_s = time.time() - self.spawned
        self.told |= hello

    def _environment(self) -> dict[str, str]:
        given = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        for variable, name in CACHES.items():
            given[variable] = str(self.scratch / name)
        given["PYTENSOR_FLAGS"] = f"base_compiledir={self.scratch / 'pytensor'}"
        return given

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        told = json.loads(line) if line else {"failed": f"its process ended; see {self.log.name}"}
        if "missing" in told:
            self.trouble = f"not installed ({told['missing']})"
        elif "failed" in told:
            self.trouble = f"failed: {told['failed']}"
        return told

    def run(self, at_least: float, most: int) -> dict[str, np.ndarray]:
        """One round: calls until some seconds are over; arrays of the last one."""
        assert self.process.stdin is not None
        file = self.scratch / "arrays.npz"
        # seeds that no call of this contestant had before
        asked = {"seed": 1000 * self.count, "at_least": at_least, "most": most, "file": str(file)}
        self.count += 1
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        told = self._answer()
        if self.trouble:
            return {}
        self.told |= {k: told[k] for k in ("peak_mb", "child_mb") if k in told}
        self.last_seconds = told["seconds"]
        self.last_ended = told["ended"]
        with np.load(file) as arrays:
            return dict(arrays)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


@dataclass
class Record:
    """What one contestant did: the cold seconds, and a list of rounds."""

    name: str
    about: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    trouble: str | None = None
    cold_s: float = float("nan")
    first_call_s: float = float("nan")
    rounds: list[float] = field(default_factory=list)
    calls: int = 0
    arrays: list[dict[str, np.ndarray]] = field(default_factory=list, repr=False)
    peak_mb: float = float("nan")
    child_mb: float = float("nan")


def say(*words: Any) -> None:
    """Progress, on stderr."""
    print(*words, file=sys.stderr, flush=True)


def compete(
    entries: Sequence[Entry],
    given: Given,
    scratch: Path,
    *,
    rounds: int,
    at_least: float,
    most_seconds: float,
) -> list[Record]:
    """Every contestant's cold call, one after the other, then rounds in turns.

    A contestant whose first call took more than ``most_seconds`` has that call for its only round
    if it compiles ahead, else one further call: hours would be spent on it.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    given.write(scratch)
    running: list[tuple[Contestant, Record]] = []
    records = []
    try:
        for entry in entries:
            say(f"{given.name}: {entry.name}, cold …")
            contestant, record = _first(entry, scratch)
            records.append(record)
            if record.trouble:
                say(f"{entry.name}: {record.trouble}")
                contestant.close()
            else:
                running.append((contestant, record))
        for number in range(rounds):
            # who begins changes from round to round
            begin = number % max(len(running), 1)
            for contestant, record in running[begin:] + running[:begin]:
                if record.trouble or (number and record.first_call_s > most_seconds):
                    continue
                say(f"{given.name}: round {number + 1} of {rounds}, {record.name} …")
                arrays = contestant.run(at_least, 20)
                record.trouble = contestant.trouble
                if record.trouble:
                    continue
                record.arrays.append(arrays)
                record.rounds.append(float(np.median(contestant.last_seconds)))
                record.calls += len(contestant.last_seconds)
                record.peak_mb = contestant.told.get("peak_mb", float("nan"))
                record.child_mb = contestant.told.get("child_mb", float("nan"))
    finally:
        for contestant, _ in running:
            contestant.close()
    return records


def _first(entry: Entry, scratch: Path) -> tuple[Contestant, Record]:
    contestant = Contestant(entry, scratch, scratch)
    record = Record(entry.name, trouble=contestant.trouble)
    if contestant.trouble:
        return contestant, record
    record.about, record.versions = contestant.told["about"], contestant.told["versions"]
    contestant.run(0.0, 1)
    record.trouble = contestant.trouble
    if not record.trouble:
        record.first_call_s = contestant.last_seconds[0]
        record.cold_s = contestant.last_ended - contestant.spawned
    return contestant, record
