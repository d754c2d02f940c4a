"""Sinusoids: MAML, ANIL and a Bayesian last layer learn from the same tasks, a network each.

    python examples/sinusoids.py figures
    python examples/sinusoids.py figures --longer 5

prints errors and scores on fresh tasks and writes pictures into the folder ``figures``, with the
state of every run beside them: called again, it goes on from there. ``--longer 5`` takes five
times as many meta-steps, from the start or on top of what is there.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import hierbayes as hb

INDEPENDENT = hb.priors.Gaussian(correlated=False)
NETWORK = hb.HierarchicalModel(hb.likelihoods.Network.mlp([1, 40, 40, 1]), INDEPENDENT)
LAST_LAYER = hb.HierarchicalModel(hb.likelihoods.LastLayer.mlp([1, 40, 40]), INDEPENDENT)
COLOURS = {"MAML": "#D55E00", "ANIL": "#CC79A7", "Bayesian last layer": "#009E73"}
META_STEPS = {"MAML": 10_000, "ANIL": 5_000, "Bayesian last layer": 2_000}


def learn(folder: Path, longer: int) -> dict[str, hb.Fit]:
    """φ by three methods, each from ten rows to adapt to and ten to be judged by."""
    episodes = hb.datasets.sinusoids(shots=10)
    fits = {}
    for name, num_meta_steps in META_STEPS.items():
        state = folder / f"sinusoids_{name.replace(' ', '_')}.npz"
        known = "goes on from its checkpoint" if state.exists() else "starts"
        training = {"num_meta_steps": num_meta_steps * longer, "checkpoint": state}
        if name == "Bayesian last layer":
            fit = hb.empirical_bayes(LAST_LAYER, episodes, **training)
        else:
            model = NETWORK if name == "MAML" else LAST_LAYER
            fit = hb.maml(model, episodes, num_steps=1, step_size=0.01, **training)
        print(f"{name} {known}: {fit.info['outer_steps']:,} meta-steps, "
              f"{fit.info['seconds']:.0f} s in this call")  # fmt: skip
        fits[name] = fit
    return fits


def scores(fits: dict[str, hb.Fit], num_tasks: int = 300) -> pd.DataFrame:
    """Error, log density and coverage on fresh tasks, with standard errors over tasks."""
    rows = {}
    for shots in (5, 10):
        support, query = hb.datasets.sinusoids(shots, queries=20).draw(num_tasks, seed=7)
        for name, fit in fits.items():
            seen = fit.adapt(support).predict(query)
            values = {
                "mse": (seen.mean - query.outcome) ** 2,
                "log density": seen.log_density(),
                "in 95 % interval": np.abs(seen.pit() - 0.5) <= 0.475,
            }
            by_task = {what: np.reshape(v, (num_tasks, -1)).mean(1) for what, v in values.items()}
            rows[shots, name] = {
                what: f"{v.mean():.3f} ± {v.std(ddof=1) / num_tasks**0.5:.3f}"
                for what, v in by_task.items()
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["rows", "method"])


def curves(fits: dict[str, hb.Fit], shots: int = 5, num_tasks: int = 3) -> plt.Figure:
    """The truth, the rows seen and what two methods make of them, a column a task."""
    support, truth = hb.datasets.sinusoids(shots, queries=200).draw(num_tasks, seed=11)
    shown = ("MAML", "Bayesian last layer")
    figure, axes = plt.subplots(
        len(shown), num_tasks, figsize=(9, 5), sharex=True, sharey="col", layout="constrained"
    )
    for row, name in zip(axes, shown, strict=True):
        seen = fits[name].adapt(support).predict(truth)
        low, high = seen.interval(0.95)
        for j, axis in enumerate(row):
            here = truth.task_of_row == j
            order = np.flatnonzero(here)[np.argsort(truth.predictors[here, 0])]
            x = truth.predictors[order, 0]
            axis.fill_between(x, low[order], high[order], color=COLOURS[name], alpha=0.2, lw=0)
            axis.plot(x, truth.outcome[order], color="black", lw=1, ls="--", label="truth")
            axis.plot(x, seen.mean[order], color=COLOURS[name], label=name)
            mine = support.task_of_row == j
            axis.plot(support.predictors[mine, 0], support.outcome[mine], "ko", ms=5,
                      label="rows seen")  # fmt: skip
        row[0].set_ylabel(f"{name}\ny")
    for axis in axes[-1]:
        axis.set_xlabel("x")
    by_label = {
        handle.get_label(): handle
        for row in axes
        for handle in row[0].get_legend_handles_labels()[0]
    }
    figure.legend(handles=by_label.values(), loc="outside lower center", ncols=len(by_label))
    figure.suptitle(f"Three fresh tasks, {shots} rows each, with 95 % intervals")
    return figure


def main(folder: Path, longer: int) -> None:
    """Learn, score and draw."""
    folder.mkdir(parents=True, exist_ok=True)
    fits = learn(folder, longer)
    print(scores(fits).to_string())
    curves(fits).savefig(folder / "sinusoids.png", dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for pictures and checkpoints")
    parser.add_argument("--longer", type=int, default=1, help="times the meta-steps")
    given = parser.parse_args()
    main(given.folder, given.longer)
