"""Coverage of 95 % intervals of normal means, beside the numbers of an independent simulation.

θ_j ~ N(μ, τ²) and y_j ~ N(θ_j, 1), J tasks: how often intervals of θ_j hold it, averaged over tasks
and data sets, for empirical Bayes at a maximum of the likelihood (ML), of the restricted likelihood
(REML), by Morris's closed form, by the parametric bootstrap, and for full Bayes with flat priors on
μ and τ (by quadrature over τ). ``zero`` is how often τ̂ of ML is exactly zero.
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

import hierbayes as hb
from benchmarks import output
from hierbayes.checks import interval_coverage
from hierbayes.meta.intervals import morris
from hierbayes.meta.many_data_sets import maximise_many, simulated

COLUMNS = ("ml", "reml", "morris", "full_bayes", "zero")

EXPECTED = {
    (5, 0.5): (0.424, 0.540, 0.971, 0.960, 0.49),
    (5, 1.0): (0.535, 0.634, 0.963, 0.962, 0.35),
    (5, 4.0): (0.792, 0.840, 0.952, 0.944, 0.09),
    (8, 1.0): (0.644, 0.712, 0.958, 0.950, 0.23),
    (10, 0.5): (0.573, 0.647, 0.965, 0.940, 0.33),
    (10, 1.0): (0.720, 0.772, 0.951, 0.934, 0.16),
    (10, 4.0): (0.902, 0.915, 0.948, 0.936, 0.01),
    (20, 0.1): (0.453, 0.513, 0.987, 0.974, 0.50),
    (20, 1.0): (0.850, 0.871, 0.943, 0.942, 0.04),
    (50, 0.1): (0.563, 0.599, 0.959, 0.962, 0.38),
    (50, 1.0): (0.922, 0.926, 0.944, 0.936, 0.00),
    (50, 4.0): (0.945, 0.946, 0.949, 0.946, 0.00),
}
"""By (J, τ²), :data:`COLUMNS`; from 4,000 data sets simulated elsewhere, full Bayes 500: ± 0.01."""

Z = float(special.ndtri(0.975))
TOGETHER = 1000


def problem(num_tasks: int) -> tuple[hb.HierarchicalModel, hb.Tasks]:
    """J tasks of one row of known standard error one."""
    data = pd.DataFrame({"task": np.arange(num_tasks), "y": np.arange(num_tasks), "se": 1.0})
    return hb.from_formula("y ~ 1 + (1 | task)", data, known_se="se")


def full_bayes_inside(y: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Whether θ (B, J) lies between the 2.5 % and 97.5 % quantiles of its posterior given y (B, J).

    Flat priors on μ and τ: given τ, everything is normal; over τ = u / (1 − u), 120 Gauss–Legendre
    nodes in u.
    """
    num = y.shape[1]
    nodes, weights = np.polynomial.legendre.leggauss(120)
    u = 0.5 * (nodes + 1)
    total = 1 + (u / (1 - u)) ** 2  # V + τ²
    centre = y.mean(1, keepdims=True)
    away = y - centre
    log_weight = np.log(weights) - 2 * np.log(1 - u) - 0.5 * (num - 1) * np.log(total)
    log_weight = log_weight - 0.5 * (away**2).sum(1, keepdims=True) / total
    share = np.exp(log_weight - log_weight.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    below = np.zeros_like(y)
    for k, shrinkage in enumerate(1 / total):
        sd = np.sqrt(1 - shrinkage + shrinkage / num)  # V(1 − B) + B² (V + τ²) / J
        mean = centre + (1 - shrinkage) * away
        below += share[:, [k]] * special.ndtr((theta - mean) / sd)
    return np.abs(below - 0.5) <= 0.475


def row(num_tasks: int, tau2: float, num_sets: int, num_bootstrapped: int) -> dict[str, Any]:
    """Every coverage for one J and τ²."""
    model, tasks = problem(num_tasks)
    phi = {"mu": np.zeros(1), "tau": np.array([np.sqrt(tau2)])}
    rng = np.random.default_rng([num_tasks, int(10 * tau2)])
    stats, theta = simulated(tasks, phi, num_sets, rng)
    found: dict[str, Any] = {"J": num_tasks, "tau2": tau2}
    for name in ("ml", "reml"):
        many = maximise_many(stats, model.shape(tasks), reml=name == "reml")
        found[name] = float((np.abs(theta - many.mean) <= Z * many.sd).mean())
        if name == "ml":
            found["zero"] = float((many.phi["tau"] == 0).mean())
    y = (stats.y[0] / stats.x[0, 0][:, None]).T
    mean, variance = morris(y, 1.0)
    found["morris"] = float((np.abs(theta[..., 0] - mean) <= Z * np.sqrt(variance)).mean())
    inside = [full_bayes_inside(y[k : k + TOGETHER], theta[k : k + TOGETHER, :, 0])
              for k in range(0, num_sets, TOGETHER)]  # fmt: skip
    found["full_bayes"] = float(np.concatenate(inside).mean())
    if num_bootstrapped:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hb.FitWarning)
            fit = hb.empirical_bayes(model, tasks, num_draws=1, num_chains=1)
        boot = interval_coverage(fit, ["bootstrap"], phi=phi, num_data_sets=num_bootstrapped)
        found["bootstrap"] = boot.coverage.item()
    return found


def main(argv: list[str]) -> int:
    """Print the table beside what is expected; exit 1 where they differ by more than 0.02."""
    parser = output.options("coverage", __doc__, "two rows of 500 data sets")
    parser.add_argument("--sets", type=int, default=20_000, help="data sets a row")
    parser.add_argument("--bootstrapped", type=int, default=500,
                        help="data sets a row for the bootstrap, 200 refits each")  # fmt: skip
    args = parser.parse_args(argv)
    wanted = list(EXPECTED.items())
    sets, boots = args.sets, args.bootstrapped
    if args.quick:
        wanted, sets, boots = wanted[:2], 500, 20
    names = (*COLUMNS, "bootstrap")
    print("  J  tau2  " + "".join(f"{n:>17}" for n in names) + "   seconds")
    rows, worst, began = [], 0.0, time.perf_counter()
    for (num_tasks, tau2), expected in wanted:
        started = time.perf_counter()
        found = row(num_tasks, tau2, sets, boots)
        found["seconds"] = time.perf_counter() - started
        line = f"{num_tasks:3d} {tau2:5.1f}  "
        for name, target in zip(COLUMNS, expected, strict=True):
            worst = max(worst, abs(found[name] - target))
            found[f"{name}_expected"] = target
            line += f"  {found[name]:.3f} ({target:.3f})".rjust(17)
        line += f"{found['bootstrap']:17.3f}" if "bootstrap" in found else " " * 17
        print(f"{line}   {found['seconds']:7.1f}", flush=True)
        rows.append(found)
    seconds = time.perf_counter() - began
    print(f"{sets:,} data sets a row (bootstrap {boots:,}); in brackets what is expected")
    print(f"largest difference {worst:.3f}; {seconds:.0f} s in all")
    folder = output.folder(args.output)
    output.write_csv(folder / "coverage.csv", rows)
    figures = {"environment": output.environment(), "rows": rows, "largest_difference": worst,
               "seconds": seconds}  # fmt: skip
    output.write_json(folder / "coverage.json", figures)
    return 0 if args.quick or worst <= 0.02 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
