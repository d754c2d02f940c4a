"""Sources of tasks: what they draw, that they repeat, and what they refuse."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from assertions import refuses
from hypothesis import given, settings
from hypothesis import strategies as st

import hierbayes as hb

Episodes = hb.Episodes


def lines(key, num_rows):
    """y = a x + b, with a and b of the task."""
    of_x, of_line = jax.random.split(key)
    x = jax.random.normal(of_x, (num_rows, 2))
    a, b = jax.random.normal(of_line, (2,))
    return x, a * x[:, 0] + b


def labelled(sizes=(5, 9, 7, 6), names="abcd", shape=(3,), dtype=float):
    """Examples whose every number is the example's own number, and their classes, mixed."""
    labels = np.repeat(np.array(list(names)), sizes)
    number = np.arange(len(labels)) + 1
    mixed = np.random.default_rng(1).permutation(len(labels))
    x = np.broadcast_to(number.reshape(-1, *[1] * len(shape)), (len(labels), *shape))
    return x[mixed].astype(dtype), labels[mixed]


def marked_tasks(sizes):
    """Tasks whose row i of task j holds x = (j, i) and y = 100 j + i: every row can be told."""
    return hb.Tasks.from_arrays(
        [
            (np.column_stack([np.full(n, j), np.arange(n)]), 100.0 * j + np.arange(n))
            for j, n in enumerate(sizes)
        ]
    )


def batches(count=4, num_tasks=3, rows=5, *, at=None, bad=None):
    """A maker of generators of ``count`` batches; ``bad`` in the place of batch ``at``."""

    def make(seed):
        rng = np.random.default_rng(seed)
        for k in range(count):
            x = rng.normal(size=(num_tasks, 2 * rows, 2))
            y = x.sum(-1)
            batch = (x[:, :rows], y[:, :rows]), (x[:, rows:], y[:, rows:])
            yield bad(batch) if k == at else batch

    return make


def assert_disjoint(support, query):
    """No number of one is a number of the other, and none appears twice."""
    support, query = np.asarray(support).ravel(), np.asarray(query).ravel()
    both = np.concatenate([support, query])
    assert len(np.unique(both)) == len(both), "an example appears twice"


def test_the_assertion_of_disjointness_sees_an_example_that_appears_twice():
    """The control."""
    assert_disjoint([1, 2], [3, 4])
    for support, query in [([1, 2], [2, 3]), ([1, 1], [2, 3]), ([1, 2], [3, 3])]:
        with pytest.raises(AssertionError):
            assert_disjoint(support, query)


# ---------------------------------------------------------------------- a sampler


@pytest.mark.slow
def test_a_sampler_gives_as_many_rows_as_asked_for():
    support, query = Episodes.from_sampler(lines, 4, 6).draw(7)
    assert support.sizes.tolist() == [4] * 7
    assert query.sizes.tolist() == [6] * 7
    assert support.predictors.shape == (28, 2)
    assert support.names.tolist() == query.names.tolist() == list(range(7))
    assert support.coef == ("x0", "x1")
    assert support.outcome.dtype == support.predictors.dtype == np.float64
    _, as_many = Episodes.from_sampler(lines, 4).draw(2)
    assert as_many.sizes.tolist() == [4, 4]


def test_a_sampler_keeps_each_tasks_rows_together():
    """Support and query of a task lie on one line, y = a x + b; float32 rounding is 1e-7."""
    support, query = Episodes.from_sampler(lines, 4, 6).draw(5, seed=3)
    for j in range(5):
        found = [
            np.polyfit(part.take([j]).predictors[:, 0], part.take([j]).outcome, 1)
            for part in (support, query)
        ]
        assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_equal_seeds_draw_equal_tasks_and_others_draw_others():
    source = Episodes.from_sampler(lines, 3)
    first, again, other = (source.draw(4, seed=s)[0].outcome for s in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.intersect1d(first, other).size
    with_key = source.draw(4, seed=jax.random.key(5))[0].outcome
    assert np.array_equal(with_key, first), "an integer seed is its key"


def test_tasks_of_a_draw_differ_from_one_another():
    outcome = Episodes.from_sampler(lines, 3).draw(50)[0].outcome
    assert len(np.unique(outcome)) == 150


@pytest.mark.slow
def test_with_rows_is_the_same_source_with_other_numbers_of_rows():
    source = Episodes.from_sampler(lines, 3)
    support, query = source.with_rows(8, 2).draw(4)
    assert support.sizes.tolist() == [8] * 4
    assert query.sizes.tolist() == [2] * 4
    assert source.draw(4)[0].sizes.tolist() == [3] * 4, "the source itself is as it was"
    few = Episodes.from_classes(*labelled(), ways=2, shots=1, queries=1).with_rows(2, 3)
    assert few.draw(2)[0].sizes.tolist() == [4, 4]


def test_with_rows_refuses_what_the_data_do_not_hold():
    with refuses("fewer than shots + queries = 4 + 4", "'a'"):
        Episodes.from_classes(*labelled(), ways=2, shots=1, queries=1).with_rows(4, 4)
    with refuses("shots must be a positive integer, found 0"):
        Episodes.from_sampler(lines, 3).with_rows(0)
    with refuses("fewer than shots + queries = 9", "0"):
        Episodes.from_tasks(marked_tasks([6, 7]), shots=2).with_rows(5, 4)


@pytest.mark.slow
def test_drawing_leaves_the_flag_for_float64_alone():
    for flag in (False, True):
        with jax.enable_x64(flag):
            Episodes.from_sampler(lines, 3).draw(2)
            assert jax.config.jax_enable_x64 is flag


@pytest.mark.slow
def test_drawing_works_where_float64_is_the_default():
    code = (
        "import jax, numpy as np, hierbayes as hb\n"
        "assert jax.config.jax_enable_x64\n"
        "s, q = hb.datasets.sinusoids(3).draw(4)\n"
        "assert s.outcome.dtype == np.float64 and jax.config.jax_enable_x64\n"
        "x = np.arange(24.0).reshape(12, 2)\n"
        "c = hb.Episodes.from_classes(x, np.arange(12) % 3, ways=2, shots=1, queries=1).draw(2)\n"
        "print(s.num_rows, c[0].num_rows)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "JAX_ENABLE_X64": "1"},
    )  # fmt: skip
    assert run.stdout.split() == ["12", "4"], run.stderr


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (lambda key, n: jnp.zeros(n), ("must be a JAX function that returns (x, y)",)),
        (lambda key, n: (jnp.zeros(n), jnp.zeros(n)), ("x of shape (6,)", "(6, …)")),
        (lambda key, n: (jnp.zeros((n, 2)), jnp.zeros((n, 1))), ("y of shape (6, 1)", "(6,)")),
        (lambda key, n: (jnp.zeros((3, 2)), jnp.zeros(n)), ("x of shape (3, 2)", "(6, …)")),
        (lambda key, n: ([1.0] * n, [1.0] * n), ("array", "list")),
        (lambda key: None, ("raised TypeError",)),
        (lambda key, n: 1 / 0, ("raised ZeroDivisionError: division by zero",)),
        (lambda key, n: np.asarray(jax.random.normal(key, (n,))), ("raised", "JAX function")),
        ("lines", ("sample must be a function", "'lines'")),
    ],
    ids=["one array", "flat x", "matrix y", "short x", "lists", "no rows", "raises", "numpy",
         "no function"],
)  # fmt: skip
def test_a_sampler_of_the_wrong_kind_is_refused(sample, words):
    with refuses(*words):
        Episodes.from_sampler(sample, 3)


@pytest.mark.parametrize("bad", [0, -1, 2.5, "3", None])
def test_numbers_of_rows_and_tasks_must_be_positive_integers(bad):
    with refuses("shots must be a positive integer", repr(bad)):
        Episodes.from_sampler(lines, bad)
    with refuses("num_tasks must be a positive integer", repr(bad)):
        Episodes.from_sampler(lines, 3).draw(bad)


# ------------------------------------------------------------------------ classes


@pytest.mark.slow
def test_episodes_of_classes_hold_ways_classes_with_shots_and_queries_of_each():
    support, query = Episodes.from_classes(*labelled(), ways=3, shots=2, queries=3).draw(20)
    for j in range(20):
        assert sorted(support.take([j]).outcome) == [0, 0, 1, 1, 2, 2]
        assert sorted(query.take([j]).outcome) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.slow
def test_support_and_query_share_no_example_and_classes_are_distinct():
    """Every example has a number of its own, 1 and up: that of 0 would be a row of padding."""
    x, labels = labelled()
    class_of = dict(zip(x[:, 0].astype(int), labels, strict=True))
    support, query = Episodes.from_classes(x, labels, ways=3, shots=2, queries=3).draw(200)
    seen = set()
    for j in range(200):
        parts = [part.take([j]) for part in (support, query)]
        numbers = [part.predictors[:, 0].astype(int) for part in parts]
        assert_disjoint(*numbers)
        names = {
            way: {class_of[n] for part, at in zip(parts, numbers, strict=True)
                  for n in at[part.outcome == way]}
            for way in range(3)
        }  # fmt: skip
        assert all(len(found) == 1 for found in names.values()), "a label is one class"
        assert len(set.union(*names.values())) == 3, "an episode's classes are distinct"
        seen |= {(way, *found) for way, found in names.items()}
    assert len(seen) == 12, "every class stands at every label in some episode"


@pytest.mark.slow
def test_every_example_of_a_class_of_any_size_is_drawn():
    """200 episodes of 2 of 4 classes, 5 of 5 to 9 examples: one is left out with chance 0.7^200."""
    x, labels = labelled()
    support, query = Episodes.from_classes(x, labels, ways=2, shots=2, queries=3).draw(200)
    drawn = np.concatenate([support.predictors[:, 0], query.predictors[:, 0]])
    assert np.unique(drawn).astype(int).tolist() == list(range(1, 28))


@pytest.mark.slow
def test_images_of_bytes_are_taken_and_leave_as_numbers():
    x, labels = labelled(shape=(4, 4, 1), dtype=np.uint8)
    support, _ = Episodes.from_classes(x, labels, ways=2, shots=2, queries=1).draw(3)
    assert support.predictors.shape == (12, 4, 4, 1)
    assert support.predictors.dtype == np.float64
    assert support.coef == ()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["integers", "strings", "objects"])
def test_labels_may_be_of_any_kind(kind):
    x, labels = labelled()
    if kind == "integers":
        labels = np.unique(labels, return_inverse=True)[1] * 7 - 3
    elif kind == "objects":
        labels = labels.astype(object)
    support, _ = Episodes.from_classes(x, labels, ways=4, shots=1, queries=1).draw(2)
    assert sorted(support.take([0]).outcome) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(ways=5), ("5-way episodes need 5 classes", "labels hold 4")),
        (dict(shots=3, queries=4), ("2 of 4 classes", "3 + 4", "'a', 'd'", "the smallest 5")),
        (dict(labels=np.arange(3)), ("labels (N,)", "(3,)")),
        (dict(labels=np.zeros((27, 2))), ("labels (N,)", "(27, 2)")),
        (dict(labels=np.array(["a", 1, None] * 9, dtype=object)), ("labels", "one kind")),
        (dict(labels=np.r_[np.nan, np.zeros(13), np.ones(13)]), ("labels", "NaN")),
        (dict(x=np.arange(27.0)), ("x must be numbers (N, …)", "(27,)")),
        (dict(x=np.full((27, 2), "a")), ("x must be numbers",)),
        (dict(x=np.full((27, 2), np.nan)), ("x has 54 NaN or infinite",)),
        (dict(ways=1), ("ways must be an integer of 2 or more", "found 1")),
        (dict(ways=2.0), ("ways must be an integer", "2.0")),
        (dict(shots=0), ("shots must be an integer of 1 or more", "found 0")),
        (dict(queries=0), ("queries must be an integer of 1 or more", "found 0")),
    ],
    ids=["ways", "few", "short", "matrix", "mixed", "nan label", "flat", "text", "nan",
         "one way", "float", "no shots", "no queries"],
)  # fmt: skip
def test_bad_classes_are_refused(change, words):
    x, labels = labelled()
    arguments = dict(x=x, labels=labels, ways=3, shots=1, queries=1) | change
    with refuses(*words):
        Episodes.from_classes(**arguments)


# -------------------------------------------------------------- a fixed set of tasks


@pytest.mark.slow
@settings(max_examples=6)  # each compiles a program of its own
@given(st.lists(st.integers(0, 12), min_size=4, max_size=4), st.floats(0.05, 0.95))
def test_support_and_query_part_a_tasks_rows(sizes, query):
    """Every row of a drawn task is in one part; tasks of one row or none are never drawn."""
    sizes = [*sizes, 12]
    support, asked = Episodes.from_tasks(marked_tasks(sizes), query=query).draw(8)
    assert support.num_tasks == asked.num_tasks == 8
    for j in range(8):
        parts = [part.take([j]) for part in (support, asked)]
        assert min(part.num_rows for part in parts) >= 1
        task = int(parts[0].predictors[0, 0])
        assert sizes[task] >= 2
        assert_disjoint(*(part.outcome for part in parts))
        together = np.concatenate([part.outcome for part in parts])
        assert sorted(together) == (100 * task + np.arange(sizes[task])).tolist()
        share = parts[1].num_rows / sizes[task]
        assert abs(share - query) <= 0.5 / sizes[task] + 1e-6 or 1 in {p.num_rows for p in parts}
        for part in parts:  # x and y of a row stay together
            assert (100 * part.predictors[:, 0] + part.predictors[:, 1] == part.outcome).all()


def test_fixed_tasks_with_shots_give_these_numbers_of_rows():
    support, query = Episodes.from_tasks(marked_tasks([6, 9, 7]), shots=2, queries=4).draw(30)
    assert support.sizes.tolist() == [2] * 30
    assert query.sizes.tolist() == [4] * 30
    assert_disjoint(support.take([3]).outcome, query.take([3]).outcome)
    assert set(support.predictors[:, 0]) == {0, 1, 2}, "all tasks are drawn"


def test_fixed_tasks_keep_the_names_of_their_coefficients():
    tasks = hb.Tasks.from_arrays(
        [(np.column_stack([np.ones(4), np.arange(4)]), np.arange(4.0))] * 3,
        coef=["Intercept", "dose"],
    )
    support, query = Episodes.from_tasks(tasks).draw(2)
    assert support.coef == query.coef == ("Intercept", "dose")


def test_fixed_tasks_with_images_keep_their_shape():
    tasks = hb.Tasks.from_arrays([(np.ones((4, 3, 3)), np.arange(4.0))] * 3)
    support, _ = Episodes.from_tasks(tasks, shots=1).draw(5)
    assert support.predictors.shape == (5, 3, 3)


def with_extras(**extras):
    arrays = [(np.ones((4, 1)), np.arange(4.0))] * 3
    return hb.Tasks.from_arrays(arrays, **extras)


@pytest.mark.parametrize(
    ("tasks", "arguments", "words"),
    [
        (with_extras(shared=[np.ones((4, 1))] * 3), {}, ("no effects that tasks share", "'z0'")),
        (with_extras(task_predictors=np.ones((3, 1))), {}, ("no effects that tasks share", "'w0'")),
        (with_extras(), dict(shots=3), ("3 of 3 tasks", "shots + queries = 6", "smallest 4")),
        (with_extras(), dict(shots=0), ("shots", "positive", "0")),
        (with_extras(), dict(shots=1.5), ("shots", "positive integer", "1.5")),
        (with_extras(), dict(queries=2), ("queries is given without shots",)),
        (with_extras(), dict(query=1.0), ("query must lie between 0 and 1", "1.0")),
        (marked_tasks([1, 1, 0]), {}, ("no task has two rows",)),
        ([1, 2], {}, ("expected Tasks", "list")),
    ],
    ids=["shared", "task predictors", "too many", "no shots", "half a shot",
         "queries alone", "share", "single rows", "a list"],
)  # fmt: skip
def test_bad_fixed_tasks_are_refused(tasks, arguments, words):
    with refuses(*words):
        Episodes.from_tasks(tasks, **arguments)


# ------------------------------------------------------------------------ a generator


def drawn_by(source, seed, start, count):
    """The outcomes of ``count`` batches that an outer loop would see from ``start`` on."""
    feed = source.feed(seed, 0, start)
    chunk, found = feed.chunk(count)
    return [np.asarray(feed.take(chunk, k, None)[0].outcome) for k in range(found)]


def test_a_generator_hands_in_its_batches_in_order():
    source = Episodes.from_generator(batches(6))
    expected = [support[1] for support, _ in batches(6)(3)]
    found = drawn_by(source, 3, 0, 6)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_generator_goes_on_where_it_was_by_skipping():
    source = Episodes.from_generator(batches(6))
    whole, rest = drawn_by(source, 3, 0, 6), drawn_by(source, 3, 4, 2)
    assert np.array_equal(np.stack(whole[4:]), np.stack(rest))


def test_large_batches_come_in_few_at_a_time(monkeypatch):
    """A batch holds 2 · 3 · 5 · (2 + 1) float64 and 30 bools, 750 bytes: two fit into 1600."""
    monkeypatch.setattr("hierbayes.tasks.episodes.CHUNK_BYTES", 1600)
    feed = Episodes.from_generator(batches(5)).feed(3, 0, 0)
    sizes = []
    while sum(sizes) < 5:
        chunk, found = feed.chunk(64)
        assert len(chunk[0].outcome) == 2, "every chunk has the same shape"
        sizes.append(found)
    assert sizes == [2, 2, 1]


def test_tasks_of_a_generator_come_from_as_many_batches_as_needed():
    support, query = Episodes.from_generator(batches(4, num_tasks=3)).draw(7, seed=2)
    expected = np.concatenate([asked[1] for _, asked in batches(4)(2)])[:7]
    assert support.num_tasks == query.num_tasks == 7
    assert np.array_equal(query.outcome.reshape(7, 5), expected)


def test_a_generator_takes_lists_of_images_of_bytes():
    def make(seed):
        rng = np.random.default_rng(seed)
        while True:
            x = rng.integers(0, 255, (2, 3, 4, 4), dtype=np.uint8)
            yield (x, [[0, 1, 1]] * 2), (x, [[0, 1, 0]] * 2)

    support, _ = Episodes.from_generator(make).draw(4)
    assert support.predictors.shape == (12, 4, 4)
    assert support.outcome.reshape(4, 3)[0].tolist() == [0, 1, 1]


def lost(batch, part, name, value):
    """The batch with one number of one array spoiled."""
    spoiled = [[np.array(a, dtype=float) for a in side] for side in batch]
    spoiled[part][name].flat[3] = value
    return tuple(map(tuple, spoiled))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda b: b[0], ("batch 2", "support and query")),
        (lambda b: b[0][0], ("batch 2", "support and query")),
        (lambda b: None, ("batch 2", "support and query")),
        (lambda b: ((b[0][0], b[0][1][:, :4]), b[1]), ("batch 2", "(3, 5, 2)", "(3, 4)")),
        (lambda b: ((b[0][0][:2], b[0][1][:2]), b[1]), ("batch 2", "same B tasks")),
        (lambda b: ((b[0][0][..., 0], b[0][1]), b[1]), ("batch 2", "(3, 5)", "(B, n, …)")),
        (lambda b: ((b[0][0][:, :4], b[0][1][:, :4]), b[1]),
         ("changed shape at batch 2", "(3, 4, 2)", "(3, 5, 2)")),
        (lambda b: lost(b, 0, 1, np.nan), ("batch 2", "y", "support", "1 NaN")),
        (lambda b: lost(b, 1, 0, np.inf), ("batch 2", "x", "query", "1 NaN or infinite")),
        (lambda b: ((b[0][0].astype(str), b[0][1]), b[1]), ("batch 2", "x", "numbers")),
    ],
    ids=["half", "an array", "nothing", "rows", "tasks", "flat", "shape", "nan", "inf", "text"],
)  # fmt: skip
def test_a_bad_batch_is_refused_by_its_number(bad, words):
    source = Episodes.from_generator(batches(4, at=2, bad=bad))
    with refuses(*words):
        source.draw(12)


def test_a_generator_that_ends_too_soon_says_how_many_tasks_it_gave():
    with refuses("stopped after 12 tasks", "13 were asked for"):
        Episodes.from_generator(batches(4, num_tasks=3)).draw(13)


def test_what_makes_no_iterator_is_refused():
    with refuses("function of a seed", "generator"):
        Episodes.from_generator(batches(3)(0))
    with refuses("make(seed)", "iterator", "int"):
        Episodes.from_generator(lambda seed: 3).draw(2)


# ----------------------------------------------------- what rows carry, and own parameters


def carried(family, sizes=(12, 8, 15, 9, 11, 7)):
    """Tasks of a family, each of its rows with a column beside x and y that can be told from y."""
    rng = np.random.default_rng(2)
    g = np.repeat(np.arange(len(sizes)), sizes)
    x, n = rng.normal(size=g.size), rng.integers(3, 9, g.size)
    f = 0.3 + rng.normal(0, 0.5, len(sizes))[g] + 0.4 * x
    frame = pd.DataFrame({"g": g, "x": x, "n": n})
    if family == "binomial":
        frame["y"] = rng.binomial(n, 1 / (1 + np.exp(-f)))
        return hb.from_formula("p(y, n) ~ x + (x | g)", frame)
    frame["y"] = rng.negative_binomial(5, 5 / (5 + np.exp(f)))
    return hb.from_formula("y ~ x + (x | g)", frame, family="negative_binomial")


def test_a_rows_trials_go_with_it():
    """Every drawn row is one of the tasks', found by its x, with its own y and n."""

    def by_x(tasks):
        x = tasks.predictors[:, 1].astype(np.float32).tolist()  # as they are drawn
        rows = zip(tasks.outcome.tolist(), tasks.slots["trials"].tolist(), strict=True)
        return dict(zip(x, rows, strict=True))

    _, tasks = carried("binomial")
    known = by_x(tasks)
    for part in Episodes.from_tasks(tasks).draw(5, seed=0):
        drawn = by_x(part)
        assert len(drawn) > 10
        assert drawn.items() <= known.items()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["binomial", "negative_binomial"])
def test_a_familys_own_parameters_and_trials_on_episodes(family):
    """φ is where that of all tasks at once is, as far as other splits and a last η allow: 0.25.

    The dispersion of 500 drawn tasks, the same few again, is that of these few to 0.3 of it.
    """
    model, tasks = carried(family, sizes=(20,) * 30)
    given = dict(num_steps=3, step_size=0.01)
    loop = dict(num_meta_steps=2000, batch_size=30, loss="sum", seed=1, progress=False)
    found = hb.maml(model, Episodes.from_tasks(tasks), **given, **loop)
    whole = hb.maml(model, tasks, **given, num_splits=5)
    assert np.abs(found.phi["mu"] - whole.phi["mu"]).max() < 0.25
    assert set(found.phi) == set(whole.phi)
    for name in set(whole.phi) - {"mu"}:
        assert abs(found.phi[name] / whole.phi[name] - 1) < 0.3
