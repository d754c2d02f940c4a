"""Python's warning filters belong to the whole process: nothing here may touch them."""

import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import hierbayes as hb
from hierbayes.errors import announce, overhearing


@pytest.fixture
def untouched(monkeypatch):
    """Modules that enter ``catch_warnings``, whose two overlapping uses leave a filter for good."""
    entered: list[str] = []
    enter = warnings.catch_warnings.__enter__

    def noted(self):
        caller = "/".join(Path(sys._getframe(1).f_code.co_filename).parts[-3:])
        if "hierbayes" in caller or "arviz" in caller:  # the others hide nothing of a fit's
            entered.append(caller)
        return enter(self)

    monkeypatch.setattr(warnings.catch_warnings, "__enter__", noted)
    return entered


def some_rows():
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"g": np.repeat(list("abcdefg"), 4), "x": rng.normal(size=28)})
    data["kind"] = np.tile(list("uvuv"), 7)
    data["y"] = rng.normal(size=7).repeat(4) + 2 * data.x + 0.5 * rng.normal(size=28)
    return data


@pytest.mark.parametrize(
    "method",
    [
        hb.complete_pooling,
        pytest.param(hb.empirical_bayes, marks=pytest.mark.slow),
        pytest.param(
            lambda m, t: hb.full_bayes(m, t, num_draws=50, num_warmup=50, progress=False),
            id="full Bayes", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_fits_comparisons_and_new_rows_leave_the_filters_alone(untouched, method):
    data = some_rows()
    model, tasks = hb.from_formula("y ~ 1 + x + kind + np.log(x**2) + (1 | g)", data)
    fit = method(model, tasks)
    table = hb.compare({"one": fit, "pooled": hb.complete_pooling(model, tasks)}).table
    fit.predict(data.head(3))
    assert np.isfinite(table["log_density"]).all()
    assert untouched == []


def test_what_is_overheard_in_one_thread_is_said_in_another():
    """Two contexts that overlap as two threads' do: each hears its own, and nothing is left."""
    inside, done = threading.Event(), threading.Event()
    heard = []

    def work():
        with overhearing() as mine:
            inside.set()
            done.wait(10)
            announce(["of the thread"])
        heard.extend(mine)

    before = list(warnings.filters)
    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(10)
    with pytest.warns(hb.FitWarning, match="of the main thread"):
        announce(["of the main thread"])
    done.set()
    thread.join()
    assert heard == ["of the thread"]
    assert warnings.filters == before


def test_unseen_levels_are_refused_without_a_filter(untouched):
    data = some_rows()
    for formula, new in (
        ("y ~ 1 + kind + (1 | g)", {"kind": "w"}),
        ("y ~ 1 + C(np.floor(x)) + (1 | g)", {"x": 99.0}),
    ):
        fit = hb.complete_pooling(*hb.from_formula(formula, data))
        with pytest.raises(hb.InputError, match="categories that the training data did not"):
            fit.predict(data.head(3).assign(**new))
    assert untouched == []
