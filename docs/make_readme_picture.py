"""Draw the README's two pictures: run it after changing a method or one of these plots."""

from pathlib import Path

import matplotlib.pyplot as plt

import hierbayes as hb

model, tasks = hb.from_formula("log_radon ~ 1 + floor + (1 + floor | county)", hb.datasets.radon())
fits = {
    "no pooling": hb.no_pooling(model, tasks),
    "MAML": hb.maml(model, tasks, num_steps=5),
    "empirical Bayes": hb.empirical_bayes(model, tasks),
    "full Bayes": hb.full_bayes(model, tasks),
    "complete pooling": hb.complete_pooling(model, tasks),
}
figure, axes = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[1.7, 1], layout="constrained")
hb.plots.shrinkage(fits, ax=axes[0])
hb.plots.learned_prior(fits, ax=axes[1])
axes[0].set_ylabel("log radon in a basement, θ_j")
axes[0].set_title("85 counties: from each alone to all as one", loc="left")
axes[1].set_xlabel("log radon in a basement")
folder = Path(__file__).parent / "figures"
figure.savefig(folder / "readme.png", dpi=110)

full = fits["full Bayes"]
figure, axis = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
hb.plots.adaptation_path(
    model, tasks["ANOKA"], full.phi, num_steps=200, step_size=0.002, posterior=full, ax=axis
)
axis.set_xlabel("log radon in a basement")
axis.set_ylabel("change on the first floor")
axis.set_title("Anoka county, 52 houses: 200 gradient steps from φ", loc="left")
figure.savefig(folder / "adaptation_path.png", dpi=110)
