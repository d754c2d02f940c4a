"""lme4's ``lmer`` or ``glmer``, timed inside R with the data loaded: the fit alone.

With its defaults, or with the tighter tolerances that its help page on convergence names;
``glmer`` with as many nodes of adaptive quadrature as ``num_nodes`` says, one being Laplace's.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.given import Given
from benchmarks.worker import Missing

SCRIPT = Path(__file__).with_suffix(".R")


class Contestant:
    """An Rscript that holds the data; ``lmer(REML = FALSE)``, or ``glmer(nAGQ = num_nodes)``."""

    def __init__(self, given: Given, tighter: bool = False, num_nodes: int = 1) -> None:
        call = "lmer(REML = FALSE)" if given.family == "gaussian" else f"glmer(nAGQ = {num_nodes})"
        self.about = f"{call}, timed inside R, data loaded"
        self.about += ", xtol_abs = ftol_abs = 1e-8" if tighter else ""
        if shutil.which("Rscript") is None:
            raise Missing("no Rscript on the path")
        self.given = given
        self.folder = tempfile.TemporaryDirectory(prefix="hierbayes-lme4-")
        columns = given.columns()
        for name, values in columns.items():
            np.asarray(values, float).tofile(Path(self.folder.name) / f"{name}.bin")
        self.process = subprocess.Popen(
            ["Rscript", str(SCRIPT), self.folder.name, given.formula, str(len(given.outcome)),
             ",".join(columns), "tighter" if tighter else "default",
             given.family.replace("bernoulli", "binomial"), str(num_nodes)],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        _, *self.told = self._line().split("|")
        if not self.told:
            raise Missing("R has no package lme4")

    def versions(self) -> dict[str, str]:
        """Of what is timed."""
        return {"lme4": self.told[0], "R": self.told[1].removeprefix("R version ")}

    def run(self, seed: int) -> dict[str, Any]:
        """One fit; the seconds are R's own, exact to a millisecond."""
        assert self.process.stdin is not None
        print("fit", file=self.process.stdin, flush=True)
        values = np.array(self._line().split(), float)
        seconds, self.peak, sigma, log_likelihood = values[:4]
        d, p = self.given.num_coef, self.given.num_shared
        mu, beta, tau, corr = np.split(values[4:], [d, d + p, 2 * d + p])
        found = {"mu": mu, "tau": tau, "log_likelihood": log_likelihood}
        found |= {"sigma": sigma} if self.given.family == "gaussian" else {}
        found |= {"beta": beta} if p else {}
        found |= {"corr": corr} if self.given.corr is not None else {}
        return {"seconds": float(seconds), **found}

    def memory(self) -> dict[str, float]:
        """Of R, the data in it."""
        return {"peak_mb": float(self.peak)}

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()
