"""Eight schools: how far to trust each school, by four methods.

    python examples/eight_schools.py figures

writes two pictures into the folder ``figures``.
"""

import sys
from pathlib import Path

import numpyro.distributions as dist

import hierbayes as hb


def main(folder: str) -> None:
    """Fit, print and draw."""
    schools = hb.datasets.eight_schools()
    model, tasks = hb.from_formula(
        "y ~ 1 + (1 | school)",
        schools,
        known_se="se",
        hyperprior=hb.HyperPrior(mu=dist.Normal(0, 5), tau=dist.HalfCauchy(5)),
    )
    default, _ = hb.from_formula("y ~ 1 + (1 | school)", schools, known_se="se")
    fits = {
        "no pooling": hb.no_pooling(model, tasks),
        "full Bayes": hb.full_bayes(model, tasks, seed=0),
        "empirical Bayes, map": hb.empirical_bayes(default, tasks, criterion="map"),
        "empirical Bayes, ml": hb.empirical_bayes(model, tasks),
        "complete pooling": hb.complete_pooling(model, tasks),
    }
    for name, fit in fits.items():
        effects = fit.theta.sel(coef="Intercept").round(1).values
        print(f"{name:21s}", dict(zip(tasks.names.tolist(), effects.tolist(), strict=True)))
    print(fits["full Bayes"].summary(["mu", "tau"])[["mean", "sd", "ess_bulk", "r_hat"]].round(2))

    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for name, plot in {"shrinkage": hb.plots.shrinkage, "forest": hb.plots.forest}.items():
        plot(fits).figure.savefig(out / f"eight_schools_{name}.png", dpi=150)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python eight_schools.py FOLDER")
    main(sys.argv[1])
