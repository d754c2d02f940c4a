"""hierbayes' empirical Bayes by maximum likelihood, from Tasks or from a DataFrame."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import pandas as pd

import hierbayes as hb
from benchmarks.peers.given import Given
from hierbayes.rows import rows_of
from hierbayes.statistics import statistics


class Contestant:
    """``hb.empirical_bayes``; ``read=True`` times ``hb.from_formula`` with it."""

    def __init__(self, given: Given, read: bool = False) -> None:
        self.given, self.read = given, read
        self.data = pd.DataFrame(given.columns())
        self.about = 'empirical_bayes(criterion="ml"), from '
        self.about += "a DataFrame" if read else "Tasks, their rows added up"
        if not read:
            self.model, self.tasks = self.formed()
            if given.family == "gaussian":
                statistics(self.tasks)
            else:
                rows_of(self.tasks, self.model.likelihood)

    def formed(self) -> tuple[hb.HierarchicalModel, hb.Tasks]:
        """From the DataFrame."""
        return hb.from_formula(self.given.formula, self.data, family=self.given.family)

    def versions(self) -> dict[str, str]:
        """Of what is timed."""
        return {"hierbayes": hb.__version__, "python": platform.python_version()}

    def run(self, seed: int) -> dict[str, Any]:
        """One fit, with the posterior of every task."""
        if self.read:
            fit = hb.empirical_bayes(*self.formed(), seed=seed)
        else:
            fit = hb.empirical_bayes(self.model, self.tasks, seed=seed)
        phi = {name: np.asarray(value) for name, value in fit.phi.items()}
        if "corr" in phi:
            phi["corr"] = phi["corr"][np.triu_indices(self.given.num_coef, 1)]
        phi |= {f"se_{n}": np.asarray(v) for n, v in fit.standard_errors.items() if n in phi}
        return {**phi, "log_likelihood": np.asarray(fit.log_evidence)}
