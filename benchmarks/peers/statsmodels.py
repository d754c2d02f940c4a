"""statsmodels' ``MixedLM``: fitted by maximum likelihood with its defaults."""

from __future__ import annotations

from typing import Any

import numpy as np
import statsmodels
from statsmodels.regression.mixed_linear_model import MixedLM

from benchmarks.peers.given import Given


class Contestant:
    """``MixedLM(y, x, groups, exog_re=x).fit(reml=False)``."""

    about = "MixedLM(…).fit(reml=False)"

    def __init__(self, given: Given) -> None:
        if given.corr is None and given.num_coef > 1:
            raise ValueError("written for correlated coefficients")
        self.given = given

    def versions(self) -> dict[str, str]:
        """Of what is timed."""
        return {"statsmodels": statsmodels.__version__}

    def run(self, seed: int) -> dict[str, Any]:
        """One fit, the model's set-up included."""
        x = self.given.predictors
        fit = MixedLM(self.given.outcome, x, self.given.task, exog_re=x).fit(reml=False)
        covariance = np.atleast_2d(fit.cov_re)
        tau = np.sqrt(np.diag(covariance))
        found = {
            "mu": np.asarray(fit.fe_params), "tau": tau, "sigma": np.sqrt(fit.scale),
            "log_likelihood": float(fit.llf),
        }  # fmt: skip
        if self.given.corr is not None:
            above = np.triu_indices(len(tau), 1)
            found["corr"] = (covariance / np.outer(tau, tau))[above]
        return found
