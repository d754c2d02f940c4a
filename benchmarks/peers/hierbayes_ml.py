"""hierbayes' empirical Bayes by maximum likelihood, from Tasks or from a DataFrame."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import pandas as pd

import hierbayes as hb
from benchmarks.peers.given import Given
from hierbayes.statistics import statistics


class Contestant:
    """``hb.empirical_bayes``; ``read=True`` times ``hb.from_formula`` with it."""

    def __init__(self, given: Given, read: bool = False) -> None:
        self.given, self.read = given, read
        self.data = pd.DataFrame(given.columns())
        self.about = 'empirical_bayes(criterion="ml"), from '
        self.about += "a DataFrame" if read else "Tasks whose statistics are formed"
        if not read:
            self.model, self.tasks = hb.from_formula(given.formula, self.data)
            statistics(self.tasks)

    def versions(self) -> dict[str, str]:
        """Of what is timed."""
        return {"hierbayes": hb.__version__, "python": platform.python_version()}

    def run(self, seed: int) -> dict[str, Any]:
        """One fit, with the posterior of every task."""
        if self.read:
            fit = hb.empirical_bayes(*hb.from_formula(self.given.formula, self.data), seed=seed)
        else:
            fit = hb.empirical_bayes(self.model, self.tasks, seed=seed)
        phi = {name: np.asarray(value) for name, value in fit.phi.items()}
        if "corr" in phi:
            phi["corr"] = phi["corr"][np.triu_indices(self.given.num_coef, 1)]
        return {**phi, "log_likelihood": np.asarray(fit.log_evidence)}
