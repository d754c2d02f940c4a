"""A formula is data: what it may call, and what never reaches the evaluation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from assertions import refuses

import hierbayes as hb

ROWS = pd.DataFrame(
    {
        "y": np.arange(12.0) ** 2,
        "x": np.linspace(1, 3, 12),
        "f": list("abc") * 4,
        "my x": np.ones(12),
        "g": np.repeat(list("pqrs"), 3),
    }
)


@pytest.mark.parametrize(
    "term",
    [
        "{x + __import__('os').getpid()}",
        "__import__('os').getpid()",
        "{x + [c for c in ().__class__.__base__.__subclasses__()].__len__()}",
        "{x * open('secret').read()}",
        "np.load('x.npy', allow_pickle=True)",
        "np.core.records",
        "{x + eval('1')}",
        "{(lambda: x)()}",
        "{x.__class__}",
        "x.map(str)",
        "{x + getattr(x, 'sum')()}",
    ],
)
def test_code_is_refused_before_it_runs(term, monkeypatch):
    import os

    def ran(*details):
        raise AssertionError("the formula ran code")

    monkeypatch.setattr(os, "getpid", ran)
    monkeypatch.setattr("builtins.open", ran)
    with pytest.raises(hb.InputError, match="formula"):
        hb.from_formula(f"y ~ 1 + {term} + (1 | g)", ROWS)


def test_code_in_the_outcome_and_in_bars_is_refused():
    with refuses("not allowed"):
        hb.from_formula("{y + __import__('os').getpid()} ~ 1 + (1 | g)", ROWS)
    with refuses("not allowed"):
        hb.from_formula("y ~ 1 + (1 + {x.__class__} | g)", ROWS)


@pytest.mark.parametrize(
    "term",
    ["np.log(x)", "log(x)", "center(x)", "poly(x, 2)", "I(x ** 2)", "{x - 1}", "bs(x, df=4)",
     "C(f)", "scale(x):f", "np.where(x > 2, 1, 0)", "C(f, contr.treatment('b'))",
     "np.log1p(np.abs(x))"],
)  # fmt: skip
def test_transforms_pass(term):
    _, tasks = hb.from_formula(f"y ~ 1 + {term} + (1 | g)", ROWS)
    assert tasks.num_rows == 12


def test_a_column_of_any_name_passes_in_backticks():
    _, tasks = hb.from_formula("y ~ 0 + `my x` + (0 + `my x` | g)", ROWS)
    assert tasks.coef == ("my x",)
