"""Tasks never change: arrays are copies that cannot be written to, and selections are checked."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from assertions import refuses

import hierbayes as hb


def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    g = np.repeat(list("abcdefg"), 4)
    x = rng.normal(size=28)
    y = rng.normal(size=7).repeat(4) + 2 * x + 0.5 * rng.normal(size=28)
    return pd.DataFrame({"g": g, "x": x, "y": y, "w": 1.0 + rng.random(28)})


def read(data: Any = None, **arguments: Any) -> hb.Tasks:
    sound: dict[str, Any] = dict(task="g", outcome="y", predictors=["x"])
    return hb.Tasks.from_dataframe(frame() if data is None else data, **(sound | arguments))


def model() -> hb.HierarchicalModel:
    return hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian(correlated=False))


def evidence(tasks: hb.Tasks) -> float:
    return hb.complete_pooling(model(), tasks).log_evidence


def test_another_outcome_gives_another_answer():
    # a permutation test: the right number is that of Tasks read anew
    tasks = read()
    before = evidence(tasks)
    new = np.random.default_rng(1).permutation(tasks.outcome)
    assert evidence(tasks.replace(outcome=new)) == evidence(read(frame().assign(y=new))) != before
    assert evidence(tasks) == before


def test_no_array_of_tasks_can_be_written_to():
    tasks = read(weight="w", shared=["w"])
    for name in ("predictors", "shared", "task_predictors", "outcome", "starts", "rows", "names"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(tasks, name)[...] = 0
    with pytest.raises(ValueError, match="read-only"):
        tasks.slots["weight"][0] = 2.0
    with pytest.raises(TypeError, match="replace"):
        tasks.slots["weight"] = np.ones(28)


def test_what_comes_in_is_copied_and_stays_the_callers():
    x, y = np.ones((3, 1)), np.arange(3.0)
    made = hb.Tasks.from_arrays([(x, y), (x, y)])
    given = np.arange(6.0)
    swapped = replace(made, outcome=given)
    given[:] = x[:] = y[:] = -1.0  # still writable, and seen by nobody
    assert made.outcome.tolist() == [0.0, 1.0, 2.0] * 2
    assert made.predictors.tolist() == [[1.0]] * 6
    assert swapped.outcome.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    data = frame()
    tasks = read(data)
    data.loc[:, "y"] = 0.0
    assert not (tasks.outcome == 0).any()


def test_row_columns_pass_through_pickling_and_through_jax():
    tasks = read(weight="w")
    again = pickle.loads(pickle.dumps(tasks))
    assert again.slots["weight"].tolist() == tasks.slots["weight"].tolist()
    doubled = jax.tree.map(lambda a: 2 * a, tasks.slots)
    assert doubled["weight"].tolist() == (2 * tasks.slots["weight"]).tolist()


def test_replace_takes_row_columns_and_refuses_what_does_not_fit():
    tasks = read(weight="w")
    assert "weight" not in tasks.replace(weight=None).slots
    assert tasks.replace(offset=np.ones(28)).slots["offset"].sum() == 28
    assert tasks.replace(outcome=None).outcome is None
    for given, words in [
        ({"outcome": np.ones(3)}, ("outcome", "(3,)", "(28,)")),
        ({"outcome": np.full(28, np.nan)}, ("outcome", "28 NaN")),
        ({"outcome": ["a"] * 28}, ("outcome", "<U1")),
        ({"outcome": np.ma.masked_array(np.ones(28), np.arange(28) < 2)}, ("outcome", "2 masked")),
        ({"weight": np.zeros(28)}, ("weight", "positive")),
        ({"predictors": np.ones((28, 3))}, ("predictors", "(28, 2)")),
        ({"outcom": np.ones(28)}, ("'outcom'", "did you mean 'outcome'")),
    ]:  # fmt: skip
        with refuses(*words):
            tasks.replace(**given)


def test_take_counts_from_the_end_and_takes_masks():
    tasks = read()
    assert tasks.take([-1]).names.tolist() == ["g"]
    assert tasks.take([-1]).num_rows == 4
    assert tasks.take(np.arange(7) % 6 == 0).names.tolist() == ["a", "g"]
    assert tasks.take(np.int8(2)).names.tolist() == ["c"]
    assert tasks.take([]).num_tasks == 0
    for asked, words in [
        ([True, False], ("2 truth values", "7 tasks")), ([7], ("7", "out of range")),
        ([-8], ("-8", "out of range")), ([0, 0], ("'a'", "twice")), ([0, -7], ("'a'", "twice")),
        ([0.0], ("positions", "whole")), (["a"], ("positions", "tasks[names]")),
        ([[0]], ("positions", "(1, 1)")), (None, ("positions",)),
    ]:  # fmt: skip
        with refuses(*words):
            tasks.take(asked)


def test_rows_are_kept_by_a_mask_alone():
    tasks = read()
    kept = tasks.keep_rows([True] * 3 + [False] * 25)
    assert kept.num_rows == kept.starts[-1] == 3
    assert kept.num_tasks == 7
    for keep in ([0, 1, 2], [True, False], np.ones(28), None, "x"):
        with refuses("keep must be one truth value for each of 28 rows"):
            tasks.keep_rows(keep)


def test_names_are_asked_for_once_and_one_by_one():
    tasks = read()
    assert tasks[np.array(["a", "c"])].names.tolist() == ["a", "c"]
    assert tasks[pd.Index(["b"])].names.tolist() == tasks[np.array("b")].names.tolist() == ["b"]
    with refuses("'a'", "twice"):
        tasks[["a", "a"]]


def test_a_column_called_intercept_does_not_stand_beside_the_intercept():
    data = frame().assign(Intercept=1.0)
    with refuses("'Intercept'", "intercept=False"):
        read(data, predictors=["Intercept"])
    assert read(data, predictors=["Intercept"], intercept=False).coef == ("Intercept",)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"intercept": 3}, ("intercept", "3")),
        ({"intercept": "no"}, ("intercept", "'no'")),
        ({"predictors": ["x", "x"]}, ("predictors", "'x'", "twice")),
        ({"predictors": [None]}, ("predictors", "None")),
        ({"task": None}, ("task", "None")),
        ({"outcome": np.ones(28)}, ("outcome", "(28,)")),
        ({"missing": None}, ("missing", "None")),
        ({"weight": ["w"]}, ("weight", "['w']")),
    ],
)
def test_arguments_of_from_dataframe_are_refused_by_name(arguments, words):
    with refuses(*words):
        read(**arguments)


def test_arrays_are_numbers_of_one_shape():
    x, y = np.ones((3, 1)), np.arange(3.0)
    masked = np.ma.masked_array([1.0, 2.0, 999.0], [0, 0, 1])
    for arrays, words in [
        ([(x, masked), (x, y)], ("y of task 0", "1 masked")),
        ([(x, y * 1j), (x, y)], ("y of task 0", "complex")),
        ([(x, np.array(["2020"] * 3, "M8[D]"))], ("y of task 0", "datetime64")),
        ([(x, y[:, None])], ("y of task 0", "(3, 1)")),
        ([(x, [1.0, None, 2.0])], ("y of task 0", "1 NaN")),
        ([x, y], ("pair", "entry 0")),
        (3, ("arrays", "3")),
    ]:  # fmt: skip
        with refuses(*words):
            hb.Tasks.from_arrays(arrays)
    with refuses("coef", "'a'", "twice"):
        hb.Tasks.from_arrays([(np.ones((3, 2)), y)] * 2, coef=["a", "a"])
    whole = hb.Tasks.from_arrays([(x, np.ma.masked_array(y, False)), (x.tolist(), [1, 2, True])])
    assert whole.outcome.tolist() == [0.0, 1.0, 2.0, 1.0, 2.0, 1.0]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.int8, np.uint64, np.longdouble, bool])
def test_numbers_of_every_type_give_the_answer_of_float64(kind):
    rng = np.random.default_rng(2)
    pairs = [(rng.integers(0, 2, (6, 1)), rng.integers(0, 2, 6)) for _ in range(5)]
    cast, wide = (hb.Tasks.from_arrays([(x.astype(k), y.astype(k)) for x, y in pairs])
                  for k in (kind, np.float64))  # fmt: skip
    assert evidence(cast) == pytest.approx(evidence(wide), rel=1e-12)  # small whole numbers


def test_names_in_two_roles_lose_no_column():
    rng = np.random.default_rng(3)
    rows, z = rng.normal(size=(3, 1)), rng.normal(size=(3, 1))
    tasks = hb.Tasks.from_arrays([(rows, rows[:, 0])] * 2, coef=["z0"], shared=[z] * 2)
    table = tasks.to_dataframe()
    assert table["z0"].tolist() == rows[:, 0].tolist() * 2
    assert table["z0 (shared)"].tolist() == z[:, 0].tolist() * 2


def test_outcomes_to_be_scored_stand_one_a_row():
    prediction = hb.complete_pooling(model(), read()).predict()
    y = prediction.tasks.outcome
    for bad in (y[:, None], y[:5], np.full(28, np.nan), ["a"] * 28):
        for score in (prediction.log_density, prediction.pit):
            with refuses("outcome"):
                score(bad)
    assert np.isfinite(prediction.log_density(y.astype(np.float32))).all()
