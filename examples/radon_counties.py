"""Radon in 85 counties: five methods on one model, judged on houses that none has seen.

    python examples/radon_counties.py figures

prints the comparison and writes pictures and a report into the folder ``figures``.
"""

import sys
from pathlib import Path

import hierbayes as hb


def main(folder: str) -> None:
    """Fit, compare and draw."""
    model, tasks = hb.from_formula(
        "log_radon ~ 1 + floor + (1 + floor | county)", hb.datasets.radon()
    )
    train, test = tasks.hold_out(0.2, seed=0)
    fits = {
        "no pooling": hb.no_pooling(model, train),
        "MAML": hb.maml(model, train, num_steps=5, num_splits=10),
        "empirical Bayes": hb.empirical_bayes(model, train),
        "full Bayes": hb.full_bayes(model, train, num_draws=500, num_warmup=500, seed=2),
        "complete pooling": hb.complete_pooling(model, train),
    }
    comparison = hb.compare(fits, test=test)
    print(comparison)

    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    comparison.report(out / "radon.html")
    comparison.plot()[0].figure.savefig(out / "radon_comparison.png", dpi=150)
    for coef in tasks.coef:
        axes = hb.plots.forest(fits, coef=coef)
        axes.figure.savefig(out / f"radon_forest_{coef}.png", dpi=150)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python radon_counties.py FOLDER")
    main(sys.argv[1])
