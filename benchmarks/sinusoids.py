"""``python -m benchmarks sinusoids``: few-shot regression on sinusoids, as in the MAML paper.

Protocol of Finn, Abbeel and Levine (2017), section 5.1: A ~ U(0.1, 5), b ~ U(0, π), x ~ U(−5, 5),
no noise; a 2 × 40 ReLU network; K = 1 step of 0.01 on 10 rows when training, meta-batches of 25
and 70,000 meta-steps of Adam at 0.001; tested at 5, 10 and 20 rows after 0 to 10 steps. The paper's
step size is 0.01 and its code's default 0.001: both are run. The loss of the steps is the mean
squared error, so that a step size means the same at every number of rows.

Other methods see the same tasks; how many meta-steps each takes is in ``PLAN``. At 5 rows, where
little is known, predictive distributions are scored too. Methods that end in a point get the
deviation, and the number of steps, that are best on fresh tasks of 5 rows which are not scored;
LLAMA and MAML's implied posterior get the scale of their spread from the same tasks. ABML and the
Bayesian last layer have a noise that they learned themselves, from 10 rows on.

An oracle beside them regresses on sin x and cos x: sinusoids are linear in these two features and
free of noise, so that it is exact from two rows on. No method here is given them.

Trained fits are kept in the output folder, and a run that was cut goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optax

import hierbayes as hb
from benchmarks import sinusoid_anchors as anchors
from benchmarks import sinusoid_figures as figures
from benchmarks import sinusoid_scores as scoring
from benchmarks.output import environment, folder, write_csv, write_json
from hierbayes.adaptation import GradientSteps
from hierbayes.adaptation.linearised import LinearisedSteps
from hierbayes.meta.implied import scale_of

NAME = "sinusoids"
SHOTS = (5, 10, 20)
MOST_STEPS = 10
TEST_SEED, TUNING_SEED = 90_001, 90_002

Model = hb.HierarchicalModel


def network() -> Model:
    """The paper's network, all of it a task's own."""
    return Model(hb.likelihoods.Network.mlp([1, 40, 40, 1]), hb.priors.Gaussian(correlated=False))


def head() -> Model:
    """The same network with its last layer alone a task's own."""
    return Model(hb.likelihoods.LastLayer.mlp([1, 40, 40]), hb.priors.Gaussian(correlated=False))


@dataclass(frozen=True)
class Plan:
    """How a method is trained: its meta-steps, as a share of MAML's, and the call."""

    share: float
    model: Callable[[], Model]
    fit: Callable[..., hb.Fit]


PLAN = {
    "MAML, 0.01": Plan(1.0, network, lambda m, e, **k: hb.maml(m, e, 1, 0.01, **k)),
    "MAML, 0.001": Plan(1.0, network, lambda m, e, **k: hb.maml(m, e, 1, 0.001, **k)),
    "first-order MAML": Plan(
        1.0, network, lambda m, e, **k: hb.maml(m, e, 1, 0.01, derivative="first-order", **k)
    ),
    "Meta-SGD": Plan(
        1.0, network, lambda m, e, **k: hb.maml(m, e, 1, 0.01, learn_step_size="coef", **k)
    ),
    "ANIL": Plan(1.0, head, lambda m, e, **k: hb.maml(m, e, 1, 0.01, **k)),
    "iMAML": Plan(
        0.2, network,
        lambda m, e, **k: hb.imaml(m, e, prior_precision=1.0, num_steps=16, step_size=0.01, **k),
    ),
    "Reptile": Plan(
        0.5, network,
        lambda m, e, **k: hb.reptile(m, e, 10, 0.02, optimiser=optax.sgd(0.1), **k),
    ),
    "LLAMA": Plan(0.1, network, lambda m, e, **k: hb.meta.llama(m, e, 1, 0.01, weight=1.0, **k)),
    "ABML": Plan(0.05, network, lambda m, e, **k: hb.meta.abml(m, e, 5, 0.01, **k)),
    "Bayesian last layer": Plan(0.5, head, lambda m, e, **k: hb.empirical_bayes(m, e, **k)),
}  # fmt: skip


def say(*words: Any) -> None:
    """Progress, on stderr."""
    print(*words, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------ train


def trained(name: str, num_meta_steps: int, seed: int, where: Path) -> hb.Fit:
    """The method's fit: read if it was kept, trained further from its checkpoint if not."""
    plan = PLAN[name]
    steps = max(1, round(plan.share * num_meta_steps))
    stem = f"{name.replace(', ', '-').replace(' ', '-')}-{steps}-{seed}"
    kept, model = where / f"{stem}.nc", plan.model()
    if kept.exists():
        try:
            return hb.load(kept, model=model)
        except KeyError as error:  # a kind of adaptation that files do not know
            say(f"{name}: {kept} cannot be read ({error}); on from its checkpoint")
    say(f"{name}: {steps:,} meta-steps …")
    fit = plan.fit(
        model, hb.datasets.sinusoids(shots=10), num_meta_steps=steps, seed=seed,
        checkpoint=where / f"{stem}.checkpoint.npz",
    )  # fmt: skip
    fit.save(kept)
    return fit


# ------------------------------------------------------------------------ score


def curves(fit: hb.Fit, num_tasks: int, queries: int) -> dict[str, list[dict[str, float]]]:
    """Test error after 0 … 10 steps, with its 95 % interval, by the number of rows."""
    found = {}
    for shots in SHOTS:
        support, query = scoring.fresh_tasks(shots, queries, num_tasks, TEST_SEED)
        rows = []
        for k, each in enumerate(scoring.errors(fit, support, query, MOST_STEPS)):
            error = scoring.Mean.over(each)
            low, high = error.interval
            rows.append({"step": k, "mse": error.mean, "se": error.se, "low": low, "high": high})
        found[str(shots)] = rows
    return found


def oracle_errors(num_tasks: int, queries: int) -> dict[str, float]:
    """Test error of regression on sin x and cos x, by the number of rows."""
    found = {}
    for shots in SHOTS:
        support, query = scoring.fresh_tasks(shots, queries, num_tasks, TEST_SEED)
        x, y = (np.float64(a) for a in (support.predictors[..., 0], support.outcome))
        said = anchors.oracle(x, y, np.float64(query.predictors[..., 0]))
        found[str(shots)] = float(np.mean((said - query.outcome) ** 2))
    return found


def predictive(name: str, fit: hb.Fit, num_tasks: int, queries: int) -> list[dict[str, Any]]:
    """Scores of predictions at 5 rows; a point fit's after tuning, and MAML's with its bands."""
    given = scoring.fresh_tasks(5, queries, num_tasks, TEST_SEED)
    tuning = scoring.fresh_tasks(5, queries, min(num_tasks, 1000), TUNING_SEED)
    steps = fit.adaptation
    point = isinstance(steps, GradientSteps) and not isinstance(steps, LinearisedSteps)
    some = [fit.model.tasks(scoring.as_tasks(scoring.first(part, 500))) for part in tuning]
    if point:
        variants = {name: scoring.tuned(fit, *tuning, MOST_STEPS)}
    elif isinstance(steps, LinearisedSteps):
        scale = scale_of(steps)(fit.model, dict(fit.phi), *some)
        variants = {name: replace(fit, phi={**fit.phi, **scale}, training=None)}
    else:
        variants = {name: fit}
    if name.startswith("MAML"):
        variants[f"{name}, implied posterior"] = hb.meta.implied_posterior(variants[name], *some)
    return [
        {
            "method": label,
            "spread": "plug-in" if point and label == name else "posterior",
            "steps": getattr(one.adaptation, "num_steps", None),
            **scoring.scores(one, *given),
        }
        for label, one in variants.items()
    ]


# -------------------------------------------------------------------- in words


def curve_table(found: dict[str, Any], shots: int) -> list[str]:
    """Test errors after some steps, ± half a 95 % interval."""
    shown = (0, 1, 2, 5, 10)
    rows = [
        f"Test MSE at {shots} rows after so many steps (± half of a 95 % interval over tasks)",
        f"  {'method':22}" + "".join(f"{k:>17}" for k in shown),
    ]
    for name, told in found["methods"].items():
        each = told["curves"][str(shots)]
        if len(each) == 1:
            cells = [f"no steps: {each[0]['mse']:.4f} ± {1.96 * each[0]['se']:.4f}"]
        else:
            cells = [f"{each[k]['mse']:8.4f} ± {1.96 * each[k]['se']:6.4f}" for k in shown]
        rows.append(f"  {name:22}" + "".join(f"{cell:>17}" for cell in cells))
    rows.append(f"  {'oracle (sin x, cos x)':22}   {found['oracle'][str(shots)]:.1e}")
    return rows


def score_table(rows: list[dict[str, Any]]) -> list[str]:
    """Predictive scores at 5 rows, best log score first."""
    lines = [
        "Predictions at 5 rows (± standard error over tasks); plug-in: steps and deviation tuned on"
        " fresh tasks of 5 rows",
        f"  {'method':32}{'spread':>10}{'steps':>6}{'log score':>18}{'RMSE':>16}"
        f"{'50 %':>8}{'80 %':>8}{'95 %':>8}",
    ]
    for row in sorted(rows, key=lambda r: -r["log_score"]):
        score = f"{row['log_score']:.3f} ± {row['log_score_se']:.3f}"
        rmse = f"{row['rmse']:.3f} ± {row['rmse_se']:.3f}"
        steps = "" if row["steps"] is None else row["steps"]
        lines.append(
            f"  {row['method']:32}{row['spread']:>10}{steps:>6}{score:>18}{rmse:>16}"
            + "".join(f"{row[f'coverage_{level}']:8.3f}" for level in (50, 80, 95))
        )
    return lines


def anchor_lines(found: dict[str, Any]) -> list[str]:
    """The anchors, and who is below what no one can know."""
    floor = found["anchors"]["unadapted"]
    rows = [
        f"Anchors by integration: zero predictor {found['anchors']['zero']:.3f}, best function that"
        f" has seen no row {floor:.3f}"
    ]
    for name, told in found["methods"].items():
        for shots, each in told["curves"].items():
            if len(each) > 1 and anchors.leaks(each[0]["mse"], each[0]["se"], floor):
                rows.append(
                    f"LEAK: {name} at {shots} rows has {each[0]['mse']:.3f} before any step"
                )
    return rows


def as_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The curves as rows of a table."""
    return [
        {"method": name, "rows": int(shots), **point}
        for name, told in found["methods"].items()
        for shots, each in told["curves"].items()
        for point in each
    ]


# -------------------------------------------------------------------------- run


def evaluate(name: str, args: argparse.Namespace, where: Path) -> dict[str, Any]:
    """One method trained and scored; its numbers are kept, and read where they are there."""
    kept = where / "fits" / (
        f"{name.replace(', ', '-').replace(' ', '-')}-{args.meta_steps}-{args.seed}"
        f"-{args.tasks}x{args.queries}.json"
    )  # fmt: skip
    if kept.exists() and not args.again:
        return json.loads(kept.read_text(encoding="utf-8"))
    fit = trained(name, args.meta_steps, args.seed, where / "fits")
    say(f"{name}: scoring …")
    told = {
        "meta_steps": fit.info["outer_steps"], "seconds": fit.info["seconds"],
        "warnings": list(fit.warnings), "curves": curves(fit, args.tasks, args.queries),
        "scores": predictive(name, fit, min(args.scored, args.tasks), args.queries),
    }  # fmt: skip
    write_json(kept, told)
    return told


def main(argv: list[str] | None = None) -> int:
    """Train, score, print tables, write JSON, CSV and PNG."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {NAME}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--meta-steps", type=int, default=70_000, help="MAML's; others a share")
    parser.add_argument("--tasks", type=int, default=6000, help="fresh tasks to be judged by")
    parser.add_argument("--scored", type=int, default=1000, help="of these, with their spread")
    parser.add_argument("--queries", type=int, default=100, help="rows each is judged by")
    parser.add_argument("--only", nargs="+", choices=tuple(PLAN), default=tuple(PLAN))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="score again what was scored")
    parser.add_argument("--output", default=f"results/{NAME}")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore", hb.FitWarning)
    where, started = folder(args.output), time.perf_counter()
    folder(where / "fits")
    found: dict[str, Any] = {
        "environment": environment(), "settings": vars(args),
        "anchors": {"zero": anchors.zero_error(), "unadapted": anchors.unadapted_error()},
        "oracle": oracle_errors(args.tasks, args.queries), "methods": {},
    }  # fmt: skip
    for name in args.only:
        try:
            found["methods"][name] = evaluate(name, args, where)
        except Exception as error:  # one method must not cost the others
            say(f"{name} failed: {type(error).__name__}: {error}")
            found.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"
    rows = [row for told in found["methods"].values() for row in told["scores"]]
    for shots in SHOTS:
        print("\n".join(curve_table(found, shots)) + "\n")
    print("\n".join(score_table(rows)) + "\n")
    print("\n".join(anchor_lines(found)))
    write_csv(where / "curves.csv", as_rows(found))
    write_csv(where / "scores.csv", rows)
    figures.draw_curves(found, SHOTS, where / "curves.png")
    figures.draw_scores(rows, where / "scores.png")
    found["seconds"] = time.perf_counter() - started
    write_json(where / "sinusoids.json", found)
    say(f"written to {where} ({found['seconds']:.0f} s)")
    return 1 if "failed" in found else 0


if __name__ == "__main__":
    sys.exit(main())
