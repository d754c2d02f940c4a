"""Ragged tasks: storage, names, selection, splits, buckets, ways in and out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import polars as pl
import pytest
from assertions import close, refuses
from hypothesis import given
from hypothesis import strategies as st

import hierbayes as hb

ragged = st.lists(st.integers(0, 9), min_size=1, max_size=12)
"""Rows of each task, zero and one among them."""


def make(sizes: list[int], *, known_se: bool = False) -> hb.Tasks:
    """Tasks whose outcome counts the rows, so that no row can hide behind another."""
    starts = np.cumsum([0, *sizes])
    arrays = [
        (np.column_stack([np.ones(n), np.arange(n)]), starts[j] + np.arange(n, dtype=float))
        for j, n in enumerate(sizes)
    ]
    se = [np.full(n, 0.1 + j) for j, n in enumerate(sizes)] if known_se else None
    return hb.Tasks.from_arrays(arrays, names=[f"t{j}" for j in range(len(sizes))], known_se=se)


# ---------------------------------------------------------------------- storage


@given(ragged)
def test_rows_lie_flat_task_after_task(sizes):
    tasks = make(sizes)
    assert len(tasks) == tasks.num_tasks == len(sizes)
    assert tasks.num_rows == sum(sizes)
    assert tasks.sizes.tolist() == sizes
    assert tasks.task_of_row.tolist() == [j for j, n in enumerate(sizes) for _ in range(n)]
    assert tasks.outcome.tolist() == list(range(sum(sizes)))


@given(ragged, st.data())
def test_take_gives_these_tasks_in_this_order(sizes, data):
    tasks = make(sizes, known_se=True)
    chosen = data.draw(st.permutations(range(len(sizes))))[: data.draw(st.integers(0, len(sizes)))]
    taken = tasks.take(chosen)
    assert taken.names.tolist() == [f"t{j}" for j in chosen]
    expected = [y for j in chosen for y in range(sum(sizes[:j]), sum(sizes[: j + 1]))]
    assert taken.outcome.tolist() == expected
    assert taken.slots["known_se"].tolist() == [0.1 + j for j in chosen for _ in range(sizes[j])]


def test_selection_by_name():
    tasks = make([2, 0, 3])
    assert tasks["t2"].outcome.tolist() == [2, 3, 4]
    assert tasks[["t2", "t0"]].names.tolist() == ["t2", "t0"]
    assert tasks[np.array(["t0"])].outcome.tolist() == [0, 1]
    assert [(name, one.num_rows) for name, one in tasks] == [("t0", 2), ("t1", 0), ("t2", 3)]
    with refuses("'t9'", "t2"):
        tasks["t9"]


def test_integer_names_are_names_and_not_positions():
    tasks = hb.Tasks.from_arrays([(np.ones((1, 1)), [y]) for y in (5.0, 6.0)], names=[10, 0])
    assert tasks[0].outcome.tolist() == [6.0]
    assert tasks[np.int64(10)].outcome.tolist() == [5.0]


def test_names_that_stand_twice_are_refused():
    with refuses("twice", "'a'"):
        hb.Tasks.from_arrays([(np.ones((1, 1)), [0.0])] * 2, names=["a", "a"])


# ----------------------------------------------------------------------- splits


@given(ragged, st.floats(0.01, 0.99), st.integers(0, 100))
def test_split_keeps_every_row_once_and_a_row_on_either_side(sizes, share, seed):
    tasks = make(sizes)
    support, query = tasks.split(query=share, seed=seed)
    assert sorted([*support.outcome, *query.outcome]) == tasks.outcome.tolist()
    assert support.names.tolist() == query.names.tolist() == tasks.names.tolist()
    for n, s, q in zip(sizes, support.sizes, query.sizes, strict=True):
        assert s + q == n
        assert (s, q) == (0, 1) if n == 1 else n == 0 or min(s, q) >= 1
        assert n < 2 or abs(q - share * n) <= max(0.5, 1 - share * n, 1 - (1 - share) * n) + 1e-9


@given(ragged, st.floats(0.01, 0.99))
def test_hold_out_keeps_one_row_tasks_in_the_training_part(sizes, share):
    train, test = make(sizes).hold_out(share, seed=3)
    for n, kept, held in zip(sizes, train.sizes, test.sizes, strict=True):
        assert kept + held == n
        assert (kept, held) == (1, 0) if n == 1 else n == 0 or min(kept, held) >= 1


def test_splits_follow_the_seed():
    tasks = make([9] * 6)
    first, again, other = (tasks.split(seed=s)[0].outcome.tolist() for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_outside_0_1_is_refused(share):
    with refuses("between 0 and 1"):
        make([3, 3]).split(query=share)
    with refuses("between 0 and 1"):
        make([3, 3]).hold_out(share)


# ---------------------------------------------------------------------- buckets


@given(ragged)
def test_buckets_hold_each_task_once_and_pad_less_than_the_data(sizes):
    tasks = make(sizes, known_se=True)
    blocks = tasks.blocks()
    seen = sorted(int(j) for positions, _ in blocks for j in positions)
    assert seen == [j for j, n in enumerate(sizes) if n]
    cells = sum(block.mask.size for _, block in blocks)
    assert cells < 2 * tasks.num_rows or tasks.num_rows == 0
    for positions, block in blocks:
        width = block.mask.shape[1]
        assert width & (width - 1) == 0, "a power of two"
        for row, j in enumerate(positions):
            n, mask = sizes[j], block.mask[row]
            assert mask.tolist() == [True] * n + [False] * (width - n)
            assert block.outcome[row, :n].tolist() == tasks.take([j]).outcome.tolist()
            assert block.outcome[row, n:].tolist() == [0.0] * (width - n)
            close(block.predictors[row, :n], tasks.take([j]).predictors)
            assert not block.predictors[row, n:].any()
            # a standard error of zero in the filling would make log densities infinite
            assert block.slots["known_se"][row].tolist() == [0.1 + j] * n + [1.0] * (width - n)


def test_log_likelihood_of_buckets_equals_that_of_rows(rng):
    """Two layouts of the same rows; the padded one must add nothing."""
    sizes = [3, 0, 1, 6, 2]
    tasks = make(sizes)
    theta, phi = rng.normal(size=(5, 2)), {"sigma": 0.7}
    likelihood = hb.likelihoods.Gaussian()
    rows = likelihood.log_likelihood_of_rows(theta, phi, tasks.flat(), tasks.task_of_row)
    by_task = np.bincount(tasks.task_of_row, np.asarray(rows, float), minlength=5)
    for positions, block in tasks.blocks():
        for b, j in enumerate(positions):
            one = hb.tasks.Task(
                block.predictors[b], block.shared[b], block.task_predictors[b],
                block.outcome[b], {}, block.mask[b],
            )  # fmt: skip
            # float32 outside the package's float64 context: 1e-5 of sums up to a thousand
            close(likelihood.log_likelihood(theta[j], phi, one).sum(), by_task[j], rtol=1e-5)


# ------------------------------------------------------------------- DataFrames


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "town": ["b", "a", "b", "c", "a", "b"],
            "y": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            "x": [0.0, 1.0, 1.0, 0.0, 2.0, 5.0],
            "z": [True, False, True, True, False, False],
            "size": [7.0, 3.0, 7.0, 9.0, 3.0, 7.0],
            "se": [1.0, 2.0, 1.0, 0.5, 2.0, 1.0],
        }
    )


COLUMNS = dict(task="town", outcome="y", predictors=["x"], shared=["z"], task_predictors=["size"])


def test_from_dataframe_sorts_rows_by_task_in_order_of_first_occurrence(frame):
    tasks = hb.Tasks.from_dataframe(frame, **COLUMNS, known_se="se")
    assert tasks.names.tolist() == ["b", "a", "c"]
    assert tasks.rows.tolist() == [0, 2, 5, 1, 4, 3]
    assert tasks.outcome.tolist() == [1, 3, 6, 2, 5, 4]
    assert tasks.coef == ("Intercept", "x")
    assert tasks.predictors[:, 1].tolist() == [0, 1, 5, 1, 2, 0]
    assert tasks.shared[:, 0].tolist() == [1, 1, 0, 0, 0, 1]
    assert tasks.task_predictors.tolist() == [[7], [3], [9]]
    assert tasks.slots["known_se"].tolist() == [1, 1, 1, 2, 2, 0.5]


def test_categories_keep_their_order(frame):
    frame["town"] = pd.Categorical(frame["town"], categories=["c", "b", "never", "a"])
    tasks = hb.Tasks.from_dataframe(frame, task="town", outcome="y")
    assert tasks.names.tolist() == ["c", "b", "a"]


def test_polars_equals_pandas(frame):
    ours = hb.Tasks.from_dataframe(pl.DataFrame(frame.to_dict("list")), **COLUMNS, known_se="se")
    theirs = hb.Tasks.from_dataframe(frame, **COLUMNS, known_se="se")
    pd.testing.assert_frame_equal(ours.to_dataframe(), theirs.to_dataframe())
    assert ours.names.tolist() == theirs.names.tolist()


def test_to_dataframe_returns_what_came_in(frame):
    back = hb.Tasks.from_dataframe(frame, **COLUMNS).to_dataframe().sort_index()
    for column in ("town", "y", "x", "size"):
        assert back[column].tolist() == frame[column].tolist()


@pytest.mark.parametrize("integers", [[3, 1, 2], [3.0, 1.0, 2.0]])
def test_integer_names_stay_integers(integers):
    data = pd.DataFrame({"g": integers, "y": [1.0, 2.0, 3.0]})
    names = hb.Tasks.from_dataframe(data, task="g", outcome="y").names
    assert names.tolist() == [3, 1, 2]
    assert names.dtype == np.int64


def test_encode_uses_the_training_columns_and_needs_no_outcome(frame):
    tasks = hb.Tasks.from_dataframe(frame, **COLUMNS)
    new = pd.DataFrame({"town": ["z"], "x": [4.0], "z": [True], "size": [1.0], "other": ["?"]})
    encoded = tasks.encode(new)
    assert encoded.outcome is None
    assert encoded.predictors.tolist() == [[1.0, 4.0]]
    assert encoded.coef == tasks.coef
    with refuses("arrays", "from_arrays"):
        make([1, 2]).encode(new)


def test_a_task_predictor_that_varies_within_a_task_is_refused(frame):
    frame.loc[4, "size"] = 4.0
    with refuses("'size'", "varies", "'a'"):
        hb.Tasks.from_dataframe(frame, **COLUMNS)


def test_missing_rows_are_dropped_with_a_warning(frame):
    frame.loc[2, "x"] = np.nan
    frame.loc[3, "town"] = None
    with pytest.warns(hb.FitWarning, match="dropped 2 of 6 rows.*'town'.*'x'"):
        tasks = hb.Tasks.from_dataframe(frame, **COLUMNS, missing="drop")
    assert sorted(tasks.rows.tolist()) == [0, 1, 4, 5]
    assert tasks.names.tolist() == ["b", "a"]


# ---------------------------------------------------------------- odd but normal


def test_images_keep_their_shape():
    images = np.arange(5 * 28 * 28, dtype=np.float32).reshape(5, 28, 28)
    tasks = hb.Tasks.from_arrays([(images[:2], [0.0, 1.0]), (images[2:], [0.0, 1.0, 1.0])])
    assert tasks.predictors.shape == (5, 28, 28)
    assert tasks.predictors.dtype == np.float32
    assert tasks[1].predictors[0, 0, 0] == images[2, 0, 0]
    _, block = tasks.blocks()[-1]
    assert block.predictors.shape[2:] == (28, 28)
    with refuses("28", "(n, d)"):
        hb.likelihoods.Gaussian().check(tasks)


def test_one_task_and_tasks_without_rows_are_tasks():
    assert repr(make([3])) == "Tasks(1 tasks, 3 rows (3 to 3 a task), coef=('x0', 'x1'))"
    empty = make([0, 0])
    assert empty.num_rows == 0
    assert empty.blocks() == []
    support, query = empty.split()
    assert support.num_tasks == query.num_tasks == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(arrays=[]), ["no tasks"]),
        (dict(arrays=[(np.ones((2, 1)), [1.0])]), ["(2, 1)", "(1,)"]),
        (dict(arrays=[(np.ones((1, 1)), [1.0]), (np.ones((1, 2)), [1.0])]), ["task 1", "(1, 2)"]),
        (dict(arrays=[(np.ones((1, 1)), [np.nan])], names=["q"]), ["y of task", "q", "1 NaN"]),
        (dict(arrays=[(np.array([["a"]]), [1.0])]), ["numbers"]),
        (dict(arrays=[(np.ones((1, 1)), [1.0])], names=["a", "b"]), ["names", "2"]),
        (dict(arrays=[(np.ones((1, 2)), [1.0])], coef=["a"]), ["coef", "1", "2"]),
        (dict(arrays=[(np.ones((1, 1)), [1.0])], known_se=[[0.0]]), ["known_se", "positive"]),
        (dict(arrays=[(np.ones((1, 1)), [1.0])], task_predictors=[1.0]), ["task_predictors"]),
        (dict(arrays=[(np.ones((1, 1)), [1.0])], shared=[np.ones((2, 1))]), ["shared", "2 rows"]),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arguments, words):
    with refuses(*words):
        hb.Tasks.from_arrays(**arguments)
