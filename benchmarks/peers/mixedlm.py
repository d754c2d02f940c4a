"""mixedlm, lme4's models with a Rust backend: ``lmer`` with its defaults."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import mixedlm
import numpy as np
import pandas as pd

from benchmarks.peers.given import Given


class Contestant:
    """``mixedlm.lmer(REML=False)`` from a DataFrame whose groups are labels already."""

    about = "lmer(REML=False), from a DataFrame"

    def __init__(self, given: Given) -> None:
        self.given = given
        data = pd.DataFrame(given.columns())
        self.data = data.assign(task=data["task"].astype(str).astype("category"))

    def versions(self) -> dict[str, str]:
        """Of what is timed."""
        return {"mixedlm": metadata.version("mixedlm")}

    def run(self, seed: int) -> dict[str, Any]:
        """One fit."""
        fit = mixedlm.lmer(self.given.formula, self.data, REML=False)
        d = self.given.num_coef
        covariance = np.zeros((d, d))
        place = 0
        for group in fit.VarCorr().groups.values():
            block = np.atleast_2d(group.cov)
            size = len(block)
            covariance[place : place + size, place : place + size] = block
            place += size
        tau = np.sqrt(np.diag(covariance))
        found = {
            "mu": np.array(list(fit.fixef().values())), "tau": tau, "sigma": fit.sigma,
            "log_likelihood": float(fit.logLik().value),
        }  # fmt: skip
        if self.given.corr is not None:
            found["corr"] = (covariance / np.outer(tau, tau))[np.triu_indices(d, 1)]
        return found
