"""Names of tasks, columns and fits stand in pictures as they are: dollars are no mathematics."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.cbook import is_math_text

import hierbayes as hb
from hierbayes import plots
from hierbayes.plots.labels import named

LONG = "c" * 150 + "d" * 150


@pytest.fixture(scope="module")
def fits():
    rng = np.random.default_rng(0)
    tasks = hb.Tasks.from_arrays(
        [(np.column_stack([np.ones(5), rng.normal(size=5)]), rng.normal(size=5)) for _ in range(4)],
        names=["$10-$20", "$50_$100", "t" * 300, r"a\$b$"],
        coef=["$a_$b^", LONG],
    )
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian(correlated=False))
    fit = hb.complete_pooling(model, tasks)
    return {"$50_$100": fit, LONG: hb.no_pooling(model, tasks)}


PICTURES = {
    "shrinkage": lambda fits, coef: plots.shrinkage(fits, coef=coef),
    "forest": lambda fits, coef: plots.forest(fits, coef=coef),
    "learned_prior": lambda fits, coef: plots.learned_prior(fits, coef=coef),
    "scores": lambda fits, coef: plots.scores(
        pd.DataFrame({"log_density": [0.0, 1.0], "log_density_se": [0.1, 0.1]}, index=[*fits])
    ),
    "adaptation_path": lambda fits, coef: plots.adaptation_path(
        (fit := fits["$50_$100"]).model, fit.tasks.take([1]), [0.0, 0.0], 3, 0.01, sigma=1.0
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_drawn_with_any_names(name, fits):
    for coef in fits["$50_$100"].tasks.coef:
        ax = PICTURES[name](fits, coef)
        ax.figure.canvas.draw()  # mathematics that cannot be parsed raises here
        texts = [t.get_text() for t in ax.figure.findobj(plt.Text)]
        assert not any(map(is_math_text, texts))
        assert max(map(len, texts)) < 150
        plt.close(ax.figure)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("floor", "floor"),
        ("$50_$100", "$50_$100"),
        ("a$", "a$"),
        ("a\nb", "a b"),
        (7, "7"),
        (LONG, "c" * 27 + "…" + "d" * 12),
    ],
)
def test_a_name_is_read_as_it_was_written(name, read):
    """Matplotlib takes the backslash off where a text is no mathematics."""
    text = named(name)
    assert not is_math_text(text)
    assert text.replace(r"\$", "$") == read
