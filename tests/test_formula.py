"""Formulas keep lme4's meaning; terms between bars are formulaic's; errors point at the place."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from assertions import close, refuses
from hypothesis import given
from hypothesis import strategies as st

import hierbayes as hb
from hierbayes.formula.bars import split


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    n = 40
    return pd.DataFrame(
        {
            "y": rng.normal(size=n),
            "x": rng.normal(5.0, 2.0, size=n),
            "z": rng.normal(size=n),
            "f": np.array(["lo", "mid", "hi"])[rng.integers(3, size=n)],
            "g": np.repeat(list("abcdefgh"), 5),
            "two words": rng.normal(size=n),
        }
    )


def read(formula: str, data: pd.DataFrame):
    model, tasks = hb.from_formula(formula, data)
    return model.prior, tasks


# ---------------------------------------------------------------- lme4's meaning


@pytest.mark.parametrize(
    ("formula", "coef", "shared", "zero_mean", "blocks"),
    [
        # the table of Bates et al. (2015), JSS 67(1), section 2.1, and design.md section 3
        ("y ~ 1 + (1 | g)", ["Intercept"], [], [], [(0,)]),
        ("y ~ (1 | g)", ["Intercept"], [], [], [(0,)]),
        ("y ~ x + (x | g)", ["Intercept", "x"], [], [], [(0, 1)]),
        ("y ~ 1 + x + (1 + x | g)", ["Intercept", "x"], [], [], [(0, 1)]),
        ("y ~ 1 + x + (1 + x || g)", ["Intercept", "x"], [], [], [(0,), (1,)]),
        ("y ~ 1 + x + (1 | g) + (0 + x | g)", ["Intercept", "x"], [], [], [(0,), (1,)]),
        ("y ~ 1 + x + z + (1 + x | g)", ["Intercept", "x"], ["z"], [], [(0, 1)]),
        ("y ~ 1 + x + (1 | g)", ["Intercept"], ["x"], [], [(0,)]),
        ("y ~ 1 + (1 + x | g)", ["Intercept", "x"], [], ["x"], [(0, 1)]),
        ("y ~ 0 + (1 | g)", ["Intercept"], [], ["Intercept"], [(0,)]),
        ("y ~ 0 + x + (0 + x | g)", ["x"], [], [], [(0,)]),
        ("y ~ x - 1 + (x - 1 | g)", ["x"], [], [], [(0,)]),
        ("y ~ x + (0 + x | g)", ["x"], ["Intercept"], [], [(0,)]),
        ("y ~ x + z + (1 + x | g) + (0 + z | g)", ["Intercept", "x", "z"], [], [], [(0, 1), (2,)]),
        ("y ~ (1 | g) + x", ["Intercept"], ["x"], [], [(0,)]),
        ("y ~ 1 + x * z + (1 | g)", ["Intercept"], ["x", "z", "x:z"], [], [(0,)]),
        ("y ~ 1 + x + (1 + x + x:z | g)", ["Intercept", "x", "x:z"], [], ["x:z"], [(0, 1, 2)]),
    ],
)
def test_bars_mean_what_lme4_means(data, formula, coef, shared, zero_mean, blocks):
    prior, tasks = read(formula, data)
    assert list(tasks.coef) == coef
    assert list(tasks.labels.shared) == shared
    assert list(prior.zero_mean) == zero_mean
    assert list(prior.blocks(tasks.coef)) == blocks
    assert prior.free_mean(tasks.coef).tolist() == [c not in zero_mean for c in coef]


def test_categories_are_named_alike_in_both_parts(data):
    """Formulaic writes f[T.mid] beside an intercept and f[mid] without: one column, one name."""
    prior, tasks = read("y ~ 1 + f + (1 + f | g)", data)
    assert tasks.coef == ("Intercept", "f[lo]", "f[mid]")
    assert prior.zero_mean == ()
    assert tasks.labels.shared == ()
    prior, tasks = read("y ~ f + (0 + f | g)", data)
    assert tasks.coef == ("f[hi]", "f[lo]", "f[mid]")
    assert prior.zero_mean == ("f[hi]",), "in the fixed part 'hi' is the reference level"
    assert tasks.labels.shared == ("Intercept",)


def test_interactions_with_a_category_are_named_alike(data):
    prior, tasks = read("y ~ 1 + x:f + (0 + x:f | g)", data)
    assert set(tasks.coef) == {"x:f[hi]", "x:f[lo]", "x:f[mid]"}
    assert prior.zero_mean == ()


def test_columns_and_outcome_hold_the_numbers(data):
    _, tasks = read("np.exp(y) ~ 1 + np.log(x**2) + (1 | g)", data)
    order = tasks.rows
    close(tasks.outcome, np.exp(data["y"].to_numpy()[order]))
    close(tasks.shared[:, 0], np.log(data["x"].to_numpy()[order] ** 2), rtol=1e-12)


# ------------------------------------------------------------ transforms that stay


@pytest.mark.parametrize(
    "term", ["center(x)", "scale(x)", "poly(x, 2)", "bs(x, df=4)", "center(x):z", "x:f"]
)
def test_transforms_remember_the_training_data(data, term):
    """A row alone is encoded as it was among the training rows."""
    _, tasks = read(f"y ~ {term} + ({term} | g)", data)
    for row in (0, 17, 39):
        alone = tasks.encode(data.iloc[[row]])
        at = int(np.flatnonzero(tasks.rows == row)[0])
        close(alone.predictors[0], tasks.predictors[at], rtol=1e-12, atol=1e-14)
        assert alone.coef == tasks.coef


def test_center_subtracts_the_training_mean(data):
    _, tasks = read("y ~ center(x) + (1 | g)", data)
    new = tasks.encode(pd.DataFrame({"g": ["new"], "x": [100.0]}))
    close(new.shared[0, 0], 100.0 - data["x"].mean(), rtol=1e-12)
    assert new.outcome is None


def test_unseen_categories_are_refused(data):
    _, tasks = read("y ~ 1 + f + (1 | g)", data)
    new = pd.DataFrame({"g": ["a"], "f": ["other"]})
    with refuses("categories", "other"):
        tasks.encode(new)


def test_backticks_quote_column_names(data):
    _, tasks = read("y ~ 1 + `two words` + (1 + `two words` | g)", data)
    assert tasks.coef == ("Intercept", "two words")
    _, tasks = read("y ~ 1 + (1 | `my group`)", data.rename(columns={"g": "my group"}))
    assert tasks.labels.task == "my group"


def test_a_grouping_column_may_hold_a_bar_in_quotes(data):
    _, tasks = read("y ~ 1 + `a|b` + (1 | g)", data.assign(**{"a|b": data["z"]}))
    assert tasks.labels.shared == ("a|b",)


# ---------------------------------------------------------------------- splitter

name = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True)
term = st.one_of(
    name, name.map(lambda n: f"center({n})"), st.tuples(name, name).map(":".join),
    name.map("`{} |~+ {}`".format("w", "{}").format), name.map(lambda n: f"poly({n}, 2)"),
)  # fmt: skip
sum_of_terms = st.lists(term, min_size=1, max_size=3).map(" + ".join)


@given(
    outcome=term,
    fixed=st.lists(term, max_size=4),
    bars=st.lists(st.tuples(sum_of_terms, st.booleans()), min_size=1, max_size=3),
    group=name,
    data=st.data(),
)
def test_splitting_gives_back_what_was_joined(outcome, fixed, bars, group, data):
    texts = [f"({t} {'||' if independent else '|'} {group})" for t, independent in bars]
    pieces = data.draw(st.permutations([(True, t) for t in texts] + [(False, t) for t in fixed]))
    parts = split(f"{outcome} ~ " + " + ".join(text for _, text in pieces))
    kept = [text for is_bar, text in pieces if not is_bar]
    assert parts.outcome == outcome
    assert parts.group == group
    assert parts.fixed == (" + ".join(kept) or "1")
    expected = sorted((t, independent) for t, independent in bars)
    assert sorted((bar.terms, bar.independent) for bar in parts.bars) == expected
    for bar in parts.bars:
        assert parts.text[bar.start] == "("


# ------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("formula", "pointed_at", "words"),
    [
        # `pointed_at`: what stands above the caret
        ("y + x + (1 | g)", "", ["~"]),
        ("y ~ x ~ (1 | g)", "~ (1", ["~"]),
        (" ~ 1 + (1 | g)", "~", ["outcome"]),
        ("y ~ 1 + x", "", ["grouping bar"]),
        ("y ~ 1 + + (1 | g)", "+ (1", ["term is missing"]),
        ("y ~ 1 + (1 | g) +", "", ["term is missing"]),
        ("y ~ 1 + (1 | g", "(1 | g", ["never closed"]),
        ("y ~ 1 + (1 | g))", ")", ["closes nothing"]),
        ("y ~ 1 + (1 | g] + x", "] + x", ["closes nothing"]),
        ("y ~ `x + (1 | g)", "`x", ["quote", "never closed"]),
        ("y ~ 1 + x | g", "| g", ["parentheses"]),
        ("y ~ 1 + (| g)", "| g", ["before the bar"]),
        ("y ~ 1 + (1 | )", " )", ["after the bar"]),
        ("y ~ 1 + (1 | g | h)", "| h", ["more than one bar"]),
        ("y ~ 1 + (1 | g) + (1 | h)", "| h", ["two different grouping factors", "'h'"]),
        ("y ~ 1 + (1 | g/h)", " g/h", ["nested"]),
        ("y ~ 1 + (1 | g:h)", " g:h", ["nested and crossed"]),
        ("y ~ 1 + (1 + x | g) + (x | g)", "(x | g)", ["two bars", "'Intercept'"]),
        ("y ~ 1 + wat + (1 | g)", "wat", ["'wat'", "neither a column"]),
        ("y ~ 1 + nofun(x) + (1 | g)", "nofun", ["'nofun'"]),
    ],
)
def test_errors_point_at_the_place(data, formula, pointed_at, words):
    with pytest.raises(hb.InputError) as caught:
        hb.from_formula(formula, data)
    *_, shown, caret = str(caught.value).splitlines()
    assert shown.strip() == formula.strip()
    column = caret.index("^")
    assert shown[column:].startswith(pointed_at)
    assert bool(pointed_at) == (column < len(shown)), "an empty place is the end of the formula"
    for word in words:
        assert word in str(caught.value)


def test_a_bar_is_not_subtracted(data):
    with refuses("subtracted"):
        hb.from_formula("y ~ 1 - (1 | g)", data)


@pytest.mark.parametrize("formula", [None, 3, ["y ~ x"]])
def test_a_formula_is_a_string(data, formula):
    with refuses("a formula is a string"):
        hb.from_formula(formula, data)


def test_an_outcome_of_several_columns_is_refused(data):
    with refuses("outcome", "'f'"):
        hb.from_formula("f ~ 1 + (1 | g)", data)


def test_a_term_that_is_not_finite_is_named(data):
    with refuses("np.log(w)", "1 row"):
        hb.from_formula("y ~ np.log(w) + (1 | g)", data.assign(w=np.r_[0.0, np.ones(39)]))


# ---------------------------------------------------------------------- security

secret = "only the caller may know"


@pytest.mark.parametrize(
    "term",
    [
        "len(secret)", "secret", "{secret}", "data", "locals()['secret']", "read(secret)",
        "{x + caller}", "I(caller)", "{globals()['secret']}", "{vars()['secret']}",
    ],
)  # fmt: skip
def test_terms_see_columns_and_not_the_callers_variables(data, term):
    """Formulaic gets an empty context; its own functions (center, np, …) are all there is."""
    secret = "nor this one"
    with pytest.raises(hb.InputError) as caught:
        hb.from_formula(f"y ~ 1 + {term} + (1 | g)", data)
    assert not re.search("only the caller|nor this one", str(caught.value))
    del secret


# --------------------------------------------------------------------- words for new data


@pytest.fixture(scope="module")
def known(data):
    """A fit of columns of every kind, and four new rows."""
    rng = np.random.default_rng(4)
    wide = data.assign(
        colour=pd.Categorical(np.where(rng.random(40) < 0.5, "red", "blue")),
        level=rng.integers(3, size=40),
    )
    text = "y ~ 1 + center(x) + f + colour + C(level) + `two words` + (1 + z | g)"
    return hb.complete_pooling(*hb.from_formula(text, wide)), wide.iloc[:4]


@pytest.mark.parametrize("column", ["x", "f", "colour", "level", "two words", "z"])
def test_a_missing_column_of_new_data_is_named(known, column):
    fit, new = known
    with refuses("new data lack column", f"'{column}'", "known: 'y'"):
        fit.predict(new.drop(columns=column))


def test_a_missing_column_that_is_misspelt_is_suggested(known):
    fit, new = known
    with refuses("lack column 'colour'", "did you mean 'color'?"):
        fit.predict(new.rename(columns={"colour": "color"}))
    with refuses("grouping column 'g'"):
        fit.predict(new.drop(columns="g"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": list("abcd")}, ("'x'", "strings", "'a'", "numbers in the training data")),
        ({"x": ["1", "2", "3", "4"]}, ("'x'", "strings", "'1'", "convert")),
        ({"x": pd.Categorical(list("abcd"))}, ("'x'", "categories", "numbers")),
        ({"z": pd.date_range("2020", periods=4)}, ("'z'", "dates", "numbers")),
        ({"level": ["0", "1", "2", "0"]}, ("'level'", "strings", "numbers")),
        # without the check numbers would stand where an indicator of one category does
        ({"f": [1.0, 2.0, 3.0, 4.0]}, ("'f'", "holds numbers", "'lo'", "'mid'", "'hi'")),
        ({"colour": [0, 1, 0, 1]}, ("'colour'", "holds numbers", "'blue', 'red'")),
        ({"y": list("abcd")}, ("'y'", "strings", "numbers")),
        ({"f": ["lo", "new", "hi", "odd"]}, ("categories", "'new', 'odd' in column 'f'", "'lo'")),
        ({"colour": pd.Categorical(["red", "green", "red", "red"])},
         ("'green' in column 'colour'", "'blue', 'red'")),
        ({"colour": "green", "f": "new"}, ("'new' in column 'f'", "'green' in column 'colour'")),
        ({"level": [0, 1, 2, 7]}, ("7.0 in column 'level'", "leave these rows out")),
        ({"f": None}, ("missing values", "'f'")),
        ({"x": None}, ("missing values", "'x'")),
    ],
)  # fmt: skip
def test_new_data_that_training_did_not_see_are_refused_by_name(known, changes, words):
    fit, new = known
    with refuses(*words):
        fit.predict(new.assign(**changes))


def test_new_data_that_training_did_see_are_read(known):
    """The control: fewer categories than in training, more declared than used, no outcome."""
    fit, new = known
    expected = fit.predict(new).mean
    np.testing.assert_array_equal(fit.predict(new.drop(columns="y")).mean, expected)
    declared = pd.Categorical(new["colour"].astype(str), categories=["red", "green", "blue"])
    np.testing.assert_array_equal(fit.predict(new.assign(colour=declared)).mean, expected)
    alike = new.assign(f="lo", colour="red")
    assert np.isfinite(fit.predict(alike).mean).all()


def test_a_category_inside_a_comparison_may_be_new(data):
    """I(f == "lo") is a number for every f: a new one is no more than not "lo"."""
    fit = hb.complete_pooling(*hb.from_formula('y ~ 1 + I(f == "lo") + (1 | g)', data))
    new = data.iloc[:3]
    found = fit.predict(new.assign(f="odd")).mean
    np.testing.assert_array_equal(found, fit.predict(new.assign(f="mid")).mean)


def test_a_prediction_of_known_and_unknown_tasks_asks_what_is_meant(known):
    fit, new = known
    mixed = new.assign(g=["a", "q", "b", "r"])
    with refuses("'q', 'r'", "2 other(s)", 'target="new"', 'target="population"', "fit.adapt"):
        fit.predict(mixed)
    with refuses("'q', 'r'", "2 other(s)"):
        fit.predict(mixed, target="known")
    with refuses("'q'", "fit.adapt"):
        fit.predict(new.assign(g="q"))
    assert fit.predict(mixed, target="population").target == "population"
    with refuses("target", "'old'", "known"):
        fit.predict(new, target="old")
