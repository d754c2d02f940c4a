"""PyStan: Stan's default NUTS, one process a chain; the program is the one of Stan's user's guide.

That guide's section on multivariate priors for hierarchical models ends with this non-centred,
vectorised program.
"""

from __future__ import annotations

import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import stan

from benchmarks.peers.given import Belief, Given
from benchmarks.worker import peak_megabytes


def density(belief: Belief) -> str:
    """The right-hand side of a sampling statement; truncation at zero is the parameter's bound."""
    family = belief["family"]
    if family in ("Normal", "HalfNormal"):
        return f"normal({belief.get('loc', 0.0)!r}, {belief['scale']!r})"
    if family == "HalfCauchy":
        return f"cauchy(0, {belief['scale']!r})"
    raise ValueError(f"no Stan density is written down for {family}")


def program(given: Given, *, centred: bool) -> str:
    """The Stan program; numbers of the hyperprior stand in it."""
    correlated, known = given.corr is not None, given.known_se is not None
    root = "diag_pre_multiply(tau, root_corr)" if correlated else "diag_matrix(tau)"
    moved = f"{root} * z" if correlated else "diag_pre_multiply(tau, z)"
    binary, shared = given.family == "bernoulli", given.shared is not None
    location = "rows_dot_product(theta[task], x)" + (" + w * beta" if shared else "")
    by_number = enumerate(zip(given.mu, given.tau, strict=True), 1)
    lines = [
        "data {",
        "  int<lower=1> N; int<lower=1> J; int<lower=1> D;",
        "  matrix[N, D] x; array[N] int<lower=1, upper=J> task;",
        "  array[N] int<lower=0, upper=1> y;" if binary else "  vector[N] y;",
        "  int<lower=1> P; matrix[N, P] w;" if shared else "",
        "  vector<lower=0>[N] se;" if known else "",
        "}",
        "parameters {",
        "  vector[D] mu; vector<lower=0>[D] tau;",
        "  cholesky_factor_corr[D] root_corr;" if correlated else "",
        "" if given.sigma is None else "  real<lower=0> sigma;",
        "  vector[P] beta;" if shared else "",
        "  array[J] vector[D] theta_of;" if centred else "  matrix[D, J] z;",
        "}",
        "transformed parameters {",
        "  matrix[J, D] theta;",
        "  for (j in 1:J) theta[j] = theta_of[j]';"
        if centred
        else f"  theta = (rep_matrix(mu, J) + {moved})';",
        "}",
        "model {",
        *(f"  mu[{k}] ~ {density(m)}; tau[{k}] ~ {density(t)};" for k, (m, t) in by_number),
        f"  root_corr ~ lkj_corr_cholesky({given.corr!r});" if correlated else "",
        "" if given.sigma is None else f"  sigma ~ {density(given.sigma)};",
        f"  theta_of ~ multi_normal_cholesky(mu, {root});"
        if centred
        else "  to_vector(z) ~ std_normal();",
        *(f"  beta[{k}] ~ {density(b)};" for k, b in enumerate(given.beta, 1)),
        f"  y ~ bernoulli_logit({location});"
        if binary
        else f"  y ~ normal({location}, {'se' if known else 'sigma'});",
        "}",
    ]
    return "\n".join(line for line in lines if line) + "\n"


class Watch:
    """The most memory that the processes started by this one held together while it sampled."""

    def __init__(self) -> None:
        self.most = 0.0

    def __enter__(self) -> None:
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.over.wait(0.1):
            self.most = max(self.most, sum(map(_resident, _children())))


def _children() -> list[str]:
    try:
        return [
            child
            for task in Path("/proc/self/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []


def _resident(process: str) -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return float(next((line.split()[1] for line in lines if line.startswith("VmRSS")), 0))


class Contestant:
    """Stan's NUTS through PyStan."""

    def __init__(
        self, given: Given, num_draws: int, num_chains: int, num_warmup: int, centred: bool = False
    ) -> None:
        self.given, self.code = given, program(given, centred=centred)
        self.data = {
            "N": len(given.outcome), "J": given.num_tasks, "D": given.num_coef,
            "x": given.predictors, "y": given.outcome, "task": given.task + 1,
        }  # fmt: skip
        if given.family == "bernoulli":
            self.data["y"] = given.outcome.astype(int)
        if given.shared is not None:
            self.data |= {"P": given.num_shared, "w": given.shared}
        if given.known_se is not None:
            self.data["se"] = given.known_se
        self.chains, self.draws = num_chains, num_draws
        self.settings = dict(num_samples=num_draws, num_chains=num_chains, num_warmup=num_warmup)
        self.watch = Watch()
        self.before(0)  # compiles
        self.about = f"{'' if centred else 'non-'}centred, {num_warmup:,} warm-up draws"

    def versions(self) -> dict[str, str]:
        """Of what is timed."""
        return {name: metadata.version(name) for name in ("pystan", "httpstan")}

    def before(self, seed: int) -> None:
        """A compiled program takes its seed when it is built; the same seed is never sampled."""
        self.built = stan.build(self.code, data=self.data, random_seed=seed + 1)

    def run(self, seed: int) -> dict[str, Any]:
        """Warm up and sample."""
        with self.watch:
            fit = self.built.sample(**self.settings)
        names = ["mu", "tau", "theta"] + ([] if self.given.sigma is None else ["sigma"])
        names += [] if self.given.shared is None else ["beta"]
        draws = {name: self._by_chain(fit[name]) for name in names}
        if self.given.corr is not None:
            roots = self._by_chain(fit["root_corr"])
            corr = roots @ np.swapaxes(roots, -1, -2)
            above = np.triu_indices(self.given.num_coef, 1)
            draws["corr"] = corr[..., above[0], above[1]]
        return draws

    def memory(self) -> dict[str, float]:
        """Of Python, and of its chains together; the C++ compiler's memory is not counted."""
        return {**peak_megabytes(), "child_mb": self.watch.most / 1024.0}

    def _by_chain(self, values: np.ndarray) -> np.ndarray:
        """PyStan's (…, draws × chains), chains next to one another, as (chain, draw, …)."""
        split = values.reshape(*values.shape[:-1], self.draws, self.chains)
        return np.moveaxis(split, (-1, -2), (0, 1))
