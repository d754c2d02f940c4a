"""A formula from a stranger runs no code and takes no endless time, wherever it comes in.

What may be evaluated is told by a list of what is allowed, so these are examples of the kinds that
are not: each is refused, in words, before anything of it is evaluated.
"""

from __future__ import annotations

import json
import os
import time

import h5py
import numpy as np
import pandas as pd
import pytest
from assertions import close, refuses

import hierbayes as hb
from hierbayes.cli import main

ROWS = pd.DataFrame(
    {
        "y": np.sin(np.arange(12.0)),
        "x": np.linspace(1, 3, 12),
        "z": np.cos(np.arange(12.0)),
        "f": list("abc") * 4,
        "a`b": np.ones(12),
        "g": np.repeat(list("pqrs"), 3),
    }
)
CODE = "__import__('os').getppid()"

HIDDEN = [
    # a backtick inside a string is no quote, nor a string inside backticks
    '{x + ("`" == CODE == "`")}', "{x + ('`' == CODE == \"`\")}", "{x + (`x` == CODE)}",
    "{'''`''' == CODE or '''`'''}", "{x + CODE}", "x + CODE", "{`x` + CODE + `x`}",
    # in the arguments of what is allowed
    "center(CODE)", "center(x, CODE)", "C(f, levels=[CODE])", "C(f, {'a': [CODE]})",
    "C(f, {**CODE})", "C(f, *[CODE])", "C(f, **CODE)", "C(f, contr.custom(CODE))",
    "hashed(f, 3, hash_func=CODE)", "hashed(f, levels=CODE)", "poly(x, degree=CODE)",
    "bs(x, knots=[CODE])", "Q(CODE)", 'Q("x" + CODE)', "np.where(x > 1, CODE, 0)",
    "np.log(x, out=CODE)", "np.log(x, where=CODE)", "np.frompyfunc(CODE, 1, 1)",
    # by other syntax
    "{(lambda: CODE)()}", "{[CODE for i in (1,)]}", "{(y := CODE)}", "{x[CODE]}", "x[CODE]",
    "{x if CODE else x}", "{x and CODE}", "{f'{CODE}'}", "{*CODE}", "{(x, CODE)}",
    # by attributes, and by Python's other spellings
    "{x.__class__}", "x.map(str)", "`x`.values", "log(x).sum()", "np.log.__class__(x)",
    "np.lib.npyio.os.getppid()", "np.load('x')", "np.add.reduce(x)", "contr.treatment.__init__",
    "C(f, contr.__class__)", "ｅｖａｌ(x)", "{__ｉmport__('os')}", "open(x)", "eval(f)",
    # a string that would close the quotes in which formulaic puts it
    'center(f == "a\\"] + CODE + [\\"")', "scale(x, '\"]+CODE')",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_code_runs(monkeypatch):
    ran = []
    monkeypatch.setattr(os, "getppid", lambda: ran.append("the formula ran code"))
    yield
    assert not ran


@pytest.mark.parametrize("term", HIDDEN)
def test_code_is_refused_wherever_it_hides(term):
    term = term.replace("CODE", CODE)
    for formula in (
        f"y ~ 1 + {term} + (1 | g)",
        f"y ~ 1 + (1 + {term} | g)",
        f"{term} ~ 1 + (1 | g)",
    ):
        with refuses("cannot read the formula"):
            hb.from_formula(formula, ROWS)


def test_a_column_named_by_code_is_a_column(monkeypatch):
    """Its name is data: the column's numbers come back, under its own name."""
    names = [CODE, "__class__", "np", "log", "C", "open", "lambda", "True", 'a"]+evil', "_hb_0_"]
    for name in names:
        rows = ROWS.assign(**{name: ROWS["x"]})
        _, tasks = hb.from_formula(f"y ~ 1 + `{name}` + (1 | g)", rows)
        assert tasks.labels.shared == (name,)
        close(tasks.shared[:, 0], ROWS["x"].to_numpy(), rtol=0)
        _, tasks = hb.from_formula(f"y ~ 1 + center(`{name}`) + log(x) + (1 | g)", rows)
        close(tasks.shared[:, 0], ROWS["x"].to_numpy() - 2.0, rtol=0, atol=1e-15)
        close(tasks.shared[:, 1], np.log(ROWS["x"].to_numpy()), rtol=0)


def test_a_string_is_data():
    """Compared with a column, whatever stands in it; formulaic would paste it into code."""
    odd = '"] or 1 #'
    rows = ROWS.assign(f=[odd, "b", "c"] * 4)
    _, tasks = hb.from_formula(f"y ~ 1 + scale(f == '{odd}', scale=False) + (1 | g)", rows)
    close(tasks.shared[:, 0], (rows["f"] == odd).to_numpy() - 1 / 3, rtol=1e-15)


def test_a_crafted_file_runs_no_code(tmp_path):
    path = tmp_path / "fit.nc"
    hb.complete_pooling(*hb.from_formula("y ~ 1 + x + (1 | g)", ROWS)).save(path)
    with h5py.File(path, "r+") as file:
        attributes = file["hierbayes"].attrs
        fit = json.loads(attributes["fit"])
        fit["encoder"]["formula"] = f'y ~ 1 + {{x + ("`" == {CODE} == "`")}} + (1 | g)'
        attributes["fit"] = json.dumps(fit)
    with pytest.raises(hb.InputError):
        hb.load(path)


def test_the_command_line_runs_no_code(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    ROWS.to_csv(path, index=False)
    formula = f'y ~ 1 + {{x + ("`" == {CODE} == "`")}} + (1 | g)'
    assert main(["fit", str(path), "--formula", formula]) == 2
    assert "cannot read the formula" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        ("y ~ {x + 0*(9**9**9)} + (1 | g)", ["not finite"]),
        ("y ~ {x + 2**60} + (1 | g)", ["power"]),
        ("y ~ {x * 10**400} + (1 | g)", ["not finite"]),
        ("y ~ {x + 1" + "0" * 400 + "} + (1 | g)", ["whole number"]),
        ("y ~ {(-8)**(1/3) + x} + (1 | g)", ["not finite"]),
        ("y ~ {x + 1/0} + (1 | g)", ["not finite"]),
        ("y ~ {'a'*10**9} + (1 | g)", ["string"]),
        ("y ~ {[1]*10**9} + (1 | g)", ["List"]),
        ("y ~ (x + z + f)**50 + (1 | g)", ["power", "20"]),
        ("y ~ (x + z + f)**20 + (1 | g)", ["products", "20000"]),
        ("y ~ (x*z*f)**2**9 + (1 | g)", ["power"]),
        ("y ~ " + "*".join(f"I(x+{i})" for i in range(30)) + " + (1 | g)", ["products"]),
        ("y ~ hashed(f, levels=1000000) + (1 | g)", ["levels", "1000", "found 1000000"]),
        ("y ~ poly(x, 500) + (1 | g)", ["degree", "20", "found 500"]),
        ("y ~ bs(x, df=100000) + (1 | g)", ["df", "200", "found 100000"]),
        ("y ~ {" + "-" * 1900 + "x} + (1 | g)", ["nesting"]),
        ("y ~ {" + "-" * 5000 + "x} + (1 | g)", ["too long"]),
        ("y ~ {" + "(" * 900 + "x" + ")" * 900 + "} + (1 | g)", ["nest"]),
        ("y ~ {" + "x." * 900 + "x} + (1 | g)", ["attribute"]),
        ("y ~ x" + "+ x" * 3000 + " + (1 | g)", ["2000"]),
        ("y ~ (x" + "|" * 9000 + " g)", ["more than one bar"]),
        ("p(" + " " * 6000, ["never closed"]),
        ("y ~ x" + " " * 20_000 + "+ (1 | g)", ["characters", "10000"]),
    ],
)  # fmt: skip
def test_endless_work_is_refused_at_once(formula, words):
    started = time.process_time()
    with refuses(*words):
        hb.from_formula(formula, ROWS)
    assert time.process_time() - started < 5  # seconds of this process: each ends in a few tenths


def test_a_long_cell_is_refused_at_once():
    """Backtracking would need some 10^10 steps for a cell of 100,000 digits and an x."""
    rows = ROWS.assign(q=["1", "2", "3", "1" * 100_000 + "x"] * 3)
    started = time.process_time()
    with refuses("column 'q' holds strings where numbers belong"):
        hb.from_formula("y ~ q + (1 | g)", rows)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("term", "column"),
    [
        ("abs(z)", lambda d: d["z"].abs()),
        ("exp10(x)", lambda d: 10.0 ** d["x"]),  # formulaic's own is x to the tenth
        ("{x ** (1/3)}", lambda d: np.cbrt(d["x"])),
        ('{f == "a"}', lambda d: d["f"] == "a"),
        ("{(x > 2) | (z > 0)}", lambda d: (d["x"] > 2) | (d["z"] > 0)),
        ("np.where(f == 'a', x, -z)", lambda d: np.where(d["f"] == "a", d["x"], -d["z"])),
        ("{x * np.pi}", lambda d: d["x"] * np.pi),
        ("np.clip(x, 1.5, 2.5)", lambda d: d["x"].clip(1.5, 2.5)),
        ("np.maximum(x, z)", lambda d: np.maximum(d["x"], d["z"])),
        ('Q("x")', lambda d: d["x"]),
    ],
)
def test_what_is_allowed_is_computed(term, column):
    _, tasks = hb.from_formula(f"y ~ 1 + {term} + (1 | g)", ROWS)
    close(tasks.shared[:, 0], np.asarray(column(ROWS), dtype=float), rtol=1e-14)


@pytest.mark.parametrize(
    "formula",
    [
        "y ~ 1 + x + `` + (1 | g)", "y ~ . + (1 | g)", "y ~ 'x' + (1 | g)", "y ~ 2:x + (1 | g)",
        "y ~ x**x + (1 | g)", "y ~ {1} + (1 | g)", "y ~ [x] + (1 | g)", "y ~ x $ z + (1 | g)",
        "y ~ {x ^ 2} + (1 | g)", "y ~ {1 < x < 2} + (1 | g)", "y ~ {x in [1]} + (1 | g)",
        "y ~ np.log(x, x) + (1 | g)", "y ~ C(f, levels=['a']) + (1 | g)", "y ~ C(f, [1]) + (1 | g)",
        "y ~ {x\0} + (1 | g)", "y ~ {x + \ud800} + (1 | g)", "y ~ x %o% z + (1 | g)",
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_words(formula):
    with refuses("cannot read the formula"):
        hb.from_formula(formula, ROWS)
