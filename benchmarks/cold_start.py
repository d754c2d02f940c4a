"""Eight schools from a cold start: a script in a fresh interpreter, from import to summary.

``python -m benchmarks cold-start``. Wall seconds of the whole process, in turns. The first script
finds nothing that an earlier one compiled; the second finds what the package itself keeps on disk
(PyStan its compiled program, PyTensor and numba theirs; JAX keeps nothing unless asked). Posterior
means of the scripts are compared before any time is told.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.output import (
    environment,
    folder,
    look,
    options,
    plain_numbers,
    save_figure,
    write_json,
)
from benchmarks.processes import CACHES, ROOT, say

NAME = "cold-start"
DATA = """
y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
se = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
"""
SCRIPTS = {
    "hierbayes": """
import hierbayes as hb
import numpyro.distributions as dist
belief = hb.HyperPrior(mu=dist.Normal(0, 5), tau=dist.HalfCauchy(5))
model, tasks = hb.from_formula(
    "y ~ 1 + (1 | school)", hb.datasets.eight_schools(), known_se="se", hyperprior=belief
)
fit = hb.full_bayes(model, tasks, progress=False)
print(fit.summary())
mu, tau = fit.phi_draws["mu"], fit.phi_draws["tau"]
""",
    "nutpie": """
import arviz, nutpie, pymc as pm
with pm.Model() as model:
    mu = pm.Normal("mu", 0, 5)
    tau = pm.HalfCauchy("tau", 5)
    z = pm.Normal("z", shape=8)
    theta = pm.Deterministic("theta", mu + tau * z)
    pm.Normal("y", theta, se, observed=y)
trace = nutpie.sample(
    nutpie.compile_pymc_model(model), draws=1000, tune=1000, chains=4, progress_bar=False
)
print(arviz.summary(trace, var_names=["mu", "tau", "theta"]))
mu, tau = trace.posterior["mu"].values, trace.posterior["tau"].values
""",
    "Stan": '''
import arviz, stan
program = """
data { int J; vector[J] y; vector[J] se; }
parameters { real mu; real<lower=0> tau; vector[J] z; }
transformed parameters { vector[J] theta = mu + tau * z; }
model { mu ~ normal(0, 5); tau ~ cauchy(0, 5); z ~ std_normal(); y ~ normal(theta, se); }
"""
fit = stan.build(program, data={"J": 8, "y": y, "se": se}, random_seed=SEED).sample()
print(arviz.summary(arviz.from_pystan(fit), var_names=["mu", "tau", "theta"]))
mu, tau = fit["mu"], fit["tau"]
''',
    "NumPyro NUTS": """
import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
numpyro.set_host_device_count(4)
numpyro.enable_x64()
from numpyro.infer import MCMC, NUTS
def model():
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", 8):
        z = numpyro.sample("z", dist.Normal(0, 1))
        theta = numpyro.deterministic("theta", mu + tau * z)
        numpyro.sample("y", dist.Normal(theta, jnp.array(se)), obs=jnp.array(y))
mcmc = MCMC(NUTS(model), num_warmup=1000, num_samples=1000, num_chains=4, progress_bar=False)
mcmc.run(jax.random.key(0))
mcmc.print_summary()
mu, tau = mcmc.get_samples()["mu"], mcmc.get_samples()["tau"]
""",
}
END = """
import numpy
print("MEANS", numpy.mean(mu), numpy.mean(tau))
"""


def run(name: str, caches: Path, seed: int) -> tuple[float, list[float], str]:
    """Wall seconds, posterior means of μ and τ, and what went wrong."""
    named = name.upper().replace(" ", "_")
    python = os.environ.get(f"HIERBAYES_{named}_PYTHON", sys.executable)
    code = f"SEED = {seed}\n" + DATA + SCRIPTS[name] + END
    kept = {variable: str(caches / of) for variable, of in CACHES.items()}
    kept["PYTENSOR_FLAGS"] = f"base_compiledir={caches / 'pytensor'}"
    given = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    started = time.perf_counter()
    done = subprocess.run(
        [python, "-W", "ignore", "-c", code], env=given | kept, cwd=ROOT, text=True,
        capture_output=True,
    )  # fmt: skip
    took = time.perf_counter() - started
    told = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("MEANS")]
    if done.returncode or not told:
        return took, [], (done.stderr.strip().splitlines() or ["no answer"])[-1]
    return took, [float(x) for x in told[0]], ""


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, write JSON and PNG."""
    parser = options(NAME, __doc__, "one round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    where = folder(args.output)
    found: dict[str, Any] = {
        name: {"first": [], "second": [], "means": [], "trouble": None} for name in SCRIPTS
    }
    for number in range(1 if args.quick else args.rounds):
        for name, told in found.items():
            if told["trouble"]:
                continue
            say(f"round {number + 1}, {name} …")
            with tempfile.TemporaryDirectory(prefix="hierbayes-benchmark-") as caches:
                for which in ("first", "second"):
                    took, means, error = run(name, Path(caches), 1 + len(told["means"]))
                    if error:
                        told["trouble"] = error
                        break
                    told[which].append(took)
                    told["means"].append(means)
    compare(found)
    print(f"Eight schools, import to summary\n  {'':16}{'nothing cached s':>18}{'second s':>10}")
    for name, told in found.items():
        if told["trouble"]:
            print(f"  {name:16}no time: {told['trouble']}")
            continue
        first, second = (statistics.median(told[which]) for which in ("first", "second"))
        print(f"  {name:16}{first:18.2f}{second:10.2f}")
    write_json(where / f"{NAME}.json", {"environment": environment(), "contestants": found})
    draw(found, where / f"{NAME}.png")
    say(f"written to {where}")
    return 0


def compare(found: dict[str, Any]) -> None:
    """Refuse a script whose means of μ and τ are not what the others' are."""
    means = {n: np.mean(told["means"], axis=0) for n, told in found.items() if told["means"]}
    if not means:
        return
    middle = np.median(list(means.values()), axis=0)
    for name, mean in means.items():
        # both have posterior standard deviations of about 3.2, hence errors of some 0.1 a script
        if not np.all(np.abs(mean - middle) < 0.4):
            found[name]["trouble"] = f"its means of mu and tau are {mean.round(2)}, not {middle}"


def draw(found: dict[str, Any], path: Path) -> None:
    """First and second scripts, every run a point."""
    import matplotlib.pyplot as plt

    timed = {name: told for name, told in found.items() if not told["trouble"]}
    figure, axes = plt.subplots(figsize=(6.5, 0.5 * len(timed) + 1.2), layout="constrained")
    for number, which in enumerate(("first", "second")):
        style, label = look(number), ("nothing cached", "second script")[number]
        for place, told in enumerate(reversed(timed.values())):
            axes.plot(
                told[which], [place] * len(told[which]), style["marker"], color=style["color"],
                alpha=0.6, label=label if place == 0 else None,
            )  # fmt: skip
    axes.set_yticks(range(len(timed)), list(reversed(timed)))
    axes.set_ylim(-0.6, len(timed) - 0.4)
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set_xlabel("wall seconds of the script, eight schools")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
