"""Columns of any name and kind of DataFrame: the same fit as under plain names.

Numbers to compare with come from the same rows under the names x, y, n and g: nothing of a model
depends on what its columns are called, so the two agree to the last bit.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from assertions import close, refuses

import hierbayes as hb
from hierbayes.errors import FitWarning

RNG = np.random.default_rng(11)
TASK = np.repeat(np.arange(8), 6)
ROWS = pd.DataFrame({"g": TASK, "x": RNG.normal(size=48) + 2.0, "n": RNG.integers(5, 9, size=48)})
ROWS["y"] = 2 * ROWS["x"] + RNG.normal(size=8)[TASK] + RNG.normal(size=48)
ROWS["s"] = RNG.integers(1, 5, size=48)

NAMES = [
    "Sepal.Length", "x[1]", "{x}", "len(x)", "1", "0", "1.5", "g (id)", "a/b", "a:b", "a~b", "a|b",
    "two words", " ", "it's", 'say "it"', "a\\", "a\nb", "#", "%in%", "µ", "日本", "ﬁ", "lambda",
    "center(x)", "Intercept ", "np.log", "(", "`".replace("`", "´"),
]  # fmt: skip


def fitted(formula: str, rows: pd.DataFrame, **options):
    return hb.empirical_bayes(*hb.from_formula(formula, rows, **options))


@pytest.fixture(scope="module")
def plain():
    return fitted("y ~ 1 + x + (1 | g)", ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_a_column_of_any_name_is_read(name):
    rows = ROWS.rename(columns={"x": name})
    _, tasks = hb.from_formula(f"y ~ 1 + `{name}` + center(`{name}`):s + (1 | g)", rows)
    expected = hb.from_formula("y ~ 1 + x + center(x):s + (1 | g)", ROWS)[1]
    close(tasks.shared, expected.shared, rtol=0)
    assert tasks.labels.shared[0] == name
    one = tasks.encode(rows.iloc[[5]])
    close(one.shared, expected.encode(ROWS.iloc[[5]]).shared, rtol=0)
    tasks = hb.from_formula(f"`{name}` ~ 1 + log(abs(`{name}`)) + (1 | g)", rows)[1]
    close(tasks.outcome, ROWS["x"].to_numpy(), rtol=0)
    close(tasks.shared[:, 0], np.log(np.abs(ROWS["x"].to_numpy())), rtol=0)
    rows = ROWS.rename(columns={"g": name})
    tasks = hb.from_formula(f"y ~ 1 + x + (1 + x | `{name}`)", rows)[1]
    assert tasks.labels.task == name
    assert tasks.num_tasks == 8
    for count in ("s", "n"):
        rows = ROWS.rename(columns={count: name})
        trials, successes = (name, "s") if count == "n" else ("n", name)
        tasks = hb.from_formula(f"p(`{successes}`, `{trials}`) ~ 1 + (1 | g)", rows)[1]
        close(tasks.slots["trials"], ROWS["n"].to_numpy(), rtol=0)
        close(tasks.outcome, ROWS["s"].to_numpy(), rtol=0)


def test_the_fit_is_that_of_plain_names(plain, tmp_path):
    name = "1"
    rows = ROWS.rename(columns={"x": name})
    fit = fitted(f"y ~ 1 + `{name}` + (1 | g)", rows)
    assert fit.log_evidence == plain.log_evidence
    close(fit.phi["beta"], plain.phi["beta"], rtol=0)
    fit.save(tmp_path / "fit.nc")
    again = hb.load(tmp_path / "fit.nc")
    close(again.predict(rows).mean, plain.predict(ROWS).mean, rtol=0)
    assert again.tasks.labels.shared == (name,)


def test_a_column_called_intercept_does_not_vanish():
    rows = ROWS.rename(columns={"x": "Intercept"})
    for formula in ("y ~ 1 + Intercept + (1 | g)", "y ~ 1 + (1 + Intercept | g)"):
        with refuses("two different columns", "'Intercept'", "rename"):
            hb.from_formula(formula, rows)
    tasks = hb.from_formula("y ~ 0 + Intercept + (0 + Intercept | g)", rows)[1]
    close(tasks.predictors[:, 0], ROWS["x"].to_numpy(), rtol=0)


@pytest.mark.parametrize(
    ("formula", "column"),
    [
        ("y ~ 1 + x:s + `x:s` + (1 | g)", "x:s"),
        ("y ~ 1 + center(x) + (0 + `center(x)` | g)", "center(x)"),
        ("y ~ 1 + f + `f[b]` + (1 | g)", "f[b]"),
    ],
)
def test_a_column_named_as_a_term_is_not_taken_for_it(formula, column):
    rows = ROWS.assign(f=list("abc") * 16, **{column: RNG.normal(size=48)})
    with refuses("two different columns", repr(column), "rename"):
        hb.from_formula(formula, rows)


def test_spellings_that_python_does_not_tell_apart_are_refused_inside_code():
    """Python reads µ (micro) as μ (mu); the column that is there is meant, of two none."""
    micro, mu = "\u00b5", "\u03bc"
    rows = ROWS.rename(columns={"x": micro})
    tasks = hb.from_formula(f"y ~ 1 + log({micro}) + (1 | g)", rows.assign(**{micro: 3.0}))[1]
    close(tasks.shared[:, 0], np.full(48, np.log(3.0)), rtol=1e-15)
    with refuses("several columns", "backticks"):
        hb.from_formula(f"y ~ 1 + log({micro}) + (1 | g)", rows.assign(**{mu: 1.0}))
    both = rows.assign(**{mu: 4.0, micro: 3.0})
    tasks = hb.from_formula(f"y ~ 1 + log(`{micro}`) + log(`{mu}`) + (1 | g)", both)[1]
    close(tasks.shared[0], np.log([3.0, 4.0]), rtol=1e-15)


def test_dotted_names_need_no_backticks_outside_code():
    rows = ROWS.rename(columns={"x": "Sepal.Length"})
    assert hb.from_formula("y ~ Sepal.Length + (1 | g)", rows)[1].labels.shared == ("Sepal.Length",)
    with refuses("'Sepal.Length'", "backticks"):
        hb.from_formula("y ~ log(Sepal.Length) + (1 | g)", rows)


# --------------------------------------------------------------- kinds of DataFrame


def test_columns_named_by_numbers_are_called_by_their_text(plain):
    rows = ROWS.rename(columns={"x": 0, "g": 7, "n": 2.5, "s": True})
    fit = fitted("y ~ 1 + `0` + (1 | `7`)", rows)
    assert fit.log_evidence == plain.log_evidence
    close(fit.predict(rows).mean, plain.predict(ROWS).mean, rtol=0)
    tasks = hb.Tasks.from_dataframe(rows, task=7, outcome="y", predictors=[0], weight=2.5)
    assert (tasks.labels.task, tasks.coef) == ("7", ("Intercept", "0"))
    close(tasks.predictors[:, 1], ROWS["x"].to_numpy(), rtol=0)
    close(tasks.slots["weight"], ROWS["n"].to_numpy(), rtol=0)
    _, tasks = hb.from_formula("y ~ 1 + (1 | `7`)", rows, offset=0)
    close(tasks.slots["offset"], ROWS["x"].to_numpy(), rtol=0)
    with refuses("same name"):
        hb.from_formula("y ~ `0` + (1 | `7`)", rows.assign(**{"0": 1.0}))


@pytest.mark.parametrize(
    ("column", "kind"),
    [("x", "Float64"), ("n", "Int64"), ("g", "Int64"), ("g", "string"), ("c", "string"),
     ("b", "boolean"), ("y", "Float64"), ("x", "object"), ("c", "category")],
)  # fmt: skip
def test_pandas_missing_values_of_every_kind(column, kind):
    """A row without a value is refused by name, or left out as if it had not been there."""
    rows = ROWS.assign(c=list("ab") * 24, b=np.arange(48) % 3 == 0)
    formula = "y ~ 1 + x + n + c + b + (1 | g)"
    expected = hb.from_formula(formula, rows.drop(index=3))[1]
    odd = rows.astype({column: kind})
    whole = hb.from_formula(formula, odd)[1]
    close(whole.shared, hb.from_formula(formula, rows)[1].shared, rtol=0)
    odd.loc[3, column] = pd.NA
    with refuses("missing values", f"1 in column {column!r}"):
        hb.from_formula(formula, odd)
    with pytest.warns(FitWarning, match="dropped 1 of 48 rows"):
        tasks = hb.from_formula(formula, odd, missing="drop")[1]
    close(tasks.shared, expected.shared, rtol=0)
    close(tasks.outcome, expected.outcome, rtol=0)
    assert [str(name) for name in tasks.names] == [str(name) for name in expected.names]
    with pytest.warns(FitWarning, match="dropped 1 of 48 rows"):
        again = whole.encode(odd, missing="drop")
    close(again.shared, expected.shared, rtol=0)


def test_missing_values_in_plain_columns_and_slots():
    odd = ROWS.astype({"x": "Float64", "n": "Int64", "g": "Int64"})
    odd.loc[3, "x"], odd.loc[4, "n"] = pd.NA, pd.NA
    given = dict(task="g", outcome="y", predictors=["x"], weight="n")
    with refuses("missing values", "1 in column 'x'", "1 in column 'n'"):
        hb.Tasks.from_dataframe(odd, **given)
    with pytest.warns(FitWarning, match="dropped 2 of 48 rows"):
        tasks = hb.Tasks.from_dataframe(odd, **given, missing="drop")
    expected = hb.Tasks.from_dataframe(ROWS.drop(index=[3, 4]), **given)
    close(tasks.predictors, expected.predictors, rtol=0)
    close(tasks.slots["weight"], expected.slots["weight"], rtol=0)


@pytest.mark.parametrize("keep", ["bc", "ab", "ac"])
def test_a_category_that_no_row_has_is_left_out(keep):
    """As lme4 does: the same columns as of strings, whichever category is missing."""
    rows = ROWS.assign(c=pd.Categorical(list("abc") * 16))
    some = rows[rows["c"].isin(list(keep))]
    tasks = hb.from_formula("y ~ 1 + c + (1 | g)", some)[1]
    text = hb.from_formula("y ~ 1 + c + (1 | g)", some.assign(c=some["c"].astype(str)))[1]
    assert tasks.labels.shared == text.labels.shared == (f"c[{keep[1]}]",)
    close(tasks.shared, text.shared, rtol=0)
    close(tasks.encode(some.iloc[:5]).shared, tasks.shared[np.argsort(tasks.rows)[:5]], rtol=0)
    with refuses("categories", "in column 'c'"):
        tasks.encode(rows)


def test_a_fit_with_a_category_that_no_row_has(tmp_path):
    rows = ROWS.assign(c=pd.Categorical(list("abc") * 16))
    some = rows[rows["c"] != "a"]
    fit = hb.complete_pooling(*hb.from_formula("y ~ 1 + c + (1 | g)", some))
    text = some.assign(c=some["c"].astype(str))
    plain = hb.complete_pooling(*hb.from_formula("y ~ 1 + c + (1 | g)", text))
    close(fit.phi["beta"], plain.phi["beta"], rtol=0)
    fit.save(tmp_path / "fit.nc")
    close(hb.load(tmp_path / "fit.nc").predict(some).mean, plain.predict(text).mean, rtol=0)


def test_a_category_left_without_rows_by_dropping_is_left_out():
    rows = ROWS.assign(c=pd.Categorical(list("abc") * 16))
    rows.loc[rows["c"] == "a", "x"] = np.nan
    with pytest.warns(FitWarning, match="dropped 16"):
        tasks = hb.from_formula("y ~ 1 + x + c + (1 | g)", rows, missing="drop")[1]
    assert tasks.labels.shared == ("x", "c[c]")


# -------------------------------------------------------------------------- too large


def test_more_columns_than_can_be_fitted_are_refused_before_they_are_made():
    rows = pd.DataFrame({"g": np.arange(6000) % 50, "y": np.sin(np.arange(6000.0))})
    rows["f"] = [f"level {i % 2000}" for i in range(6000)]
    with refuses("2001 shared columns", "2000 of them of 'f'", "at most", "(1 | category)"):
        hb.from_formula("y ~ 1 + f + (1 | g)", rows)
    with refuses("shared columns", "'C(np.round(x))'", "at most"):
        hb.from_formula("y ~ 1 + C(np.round(x)) + (1 | g)", rows.assign(x=np.arange(6000.0)))
    with refuses("varying columns", "at most"):
        hb.from_formula("y ~ 1 + (1 + f | g)", rows)
    many = pd.DataFrame(RNG.normal(size=(500, 100)), columns=[f"x{i}" for i in range(100)])
    many = many.assign(g=np.arange(500) % 5, y=np.sin(np.arange(500.0)))
    slopes = " + ".join(f"x{i}" for i in range(100))
    with refuses("101 varying columns", "at most"):
        hb.from_formula(f"y ~ 1 + (1 + {slopes} | g)", many)
    tasks = hb.from_formula(f"y ~ 1 + {slopes} + (1 | g)", many)[1]
    assert tasks.shared.shape == (500, 100)
    assert hb.from_formula("y ~ 1 + (1 | f)", rows)[1].num_tasks == 2000
