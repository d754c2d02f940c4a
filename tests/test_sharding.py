"""Tasks spread over eight devices give the results of one, and lie where they should.

The devices are forced on the host of a process of its own, run once; what it found is judged here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded
from hypothesis import given
from hypothesis import strategies as st

import hierbayes as hb
from hierbayes.sharding import num_shares, on_device, padded, place, rung, sharding_over

AGREE = 1e-10


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``eight_devices.py`` prints; where several workers ask, one runs it for all."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return _run_on_eight_devices()
    folder = tmp_path_factory.getbasetemp().parent  # of this run, the same for all its workers
    answer, claim = folder / "eight_devices.json", folder / "eight_devices.claim"
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        ends = time.monotonic() + 500
        while not answer.exists():
            assert time.monotonic() < ends, "the worker that runs eight_devices.py has not ended"
            time.sleep(0.2)
        found = json.loads(answer.read_text())
        assert "failed" not in found, found["failed"]
        return found
    partial = answer.with_suffix(".partial")
    try:
        found = _run_on_eight_devices()
        partial.write_text(json.dumps(found))
    except BaseException as error:
        partial.write_text(json.dumps({"failed": str(error)}))
        raise
    finally:
        partial.replace(answer)  # whole or not at all
    return found


def _run_on_eight_devices() -> dict[str, Any]:
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("eight_devices.py"))],
        capture_output=True, text=True, env=environment, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    print(run.stderr)
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((1,), ("tasks",))


@pytest.mark.slow
def test_every_method_gives_the_results_of_one_device(eight_devices):
    differences = eight_devices["differences"]
    assert len(differences) >= 10
    assert {name: d for name, d in differences.items() if not d <= AGREE} == {}


@pytest.mark.slow
def test_arrays_are_cut_into_eight_parts(eight_devices):
    placing = eight_devices["placing"]
    assert placing["statistics"] == [8, 24, 3], "21 tasks and 3 empty ones, 3 on each device"
    assert placing["collapsed"] == [8, 1280, 160], "150 on each device, filled up to a rung of 160"
    assert placing["rows"] == [8, 8, 1]
    assert placing["task of row"] == [8, 8, 1]
    assert placing["parts keep it"] == [True, True]


@pytest.mark.slow
def test_devices_exchange_sums_and_no_tasks(eight_devices):
    placing = eight_devices["placing"]
    for method in ("evidence", "maml"):
        assert placing[f"{method} all-reduces"] >= 1
        assert placing[f"{method} all-gathers"] == 0


@pytest.mark.slow
def test_rows_are_dealt_evenly(eight_devices):
    placing = eight_devices["placing"]
    rows, largest = placing["rows dealt"], placing["largest task"]
    assert max(rows) <= largest + np.mean(rows) / 2
    assert sum(rows) == int(sharded.two_coefficients()[1].num_rows)


@pytest.mark.slow
def test_the_comparison_sees_a_task_less_and_a_wrong_fill(eight_devices):
    """The control."""
    controls = eight_devices["controls"]
    assert controls["a task less"] > 1e-3
    assert controls["filled with zeros"] <= AGREE
    assert controls["filled with ones"] > 1e-3


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, np.nan], [1.0, np.nan], 0.0),
        ([1.0, np.nan], [1.0, 2.0], np.inf),
        ([1.0, 2.0], [1.0], np.inf),
        ([100.0], [101.0], 0.01),
    ],
)
def test_the_distance_sees_what_differs(one, other, expected):
    """The control."""
    assert sharded.distance(one, other) == pytest.approx(expected)
    assert sharded.furthest({"a": one}, {"b": one}) == np.inf


# -------------------------------------------------------------- on one device


def test_a_mesh_of_one_device_changes_nothing(small, mesh):
    fit = hb.empirical_bayes(small.model, small.tasks)
    spread = hb.empirical_bayes(small.model, small.tasks.shard(mesh))
    assert sharded.furthest(sharded.results(fit), sharded.results(spread)) <= AGREE


def test_parts_are_spread_like_the_whole_and_can_be_taken_back(small, mesh):
    spread = small.tasks.shard(mesh)
    for part in (*spread.split(), *spread.hold_out(), spread.take([0, 2]), spread[["a", "c"]]):
        assert part.sharding == spread.sharding
    assert small.tasks.sharding is None
    assert spread.shard(None).sharding is None


def test_the_mesh_is_not_saved(small, mesh, tmp_path):
    hb.empirical_bayes(small.model, small.tasks.shard(mesh)).save(tmp_path / "fit.nc")
    assert hb.load(tmp_path / "fit.nc").tasks.sharding is None


def test_several_axes_and_axes_with_explicit_types(small):
    explicit = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((1, 1), ("host", "device"), axis_types=(explicit, explicit))
    assert sharding_over(mesh).spec == jax.sharding.PartitionSpec("host")
    both = sharding_over(mesh, ["host", "device"])
    assert both.spec == jax.sharding.PartitionSpec(("host", "device"))
    assert num_shares(both) == 1
    assert set(both.mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert padded(0, both) == 1, "a device without any task holds an empty one"
    placed = place({"a": np.ones((3, 5))}, both, axis=1)["a"]
    assert placed.sharding.spec == jax.sharding.PartitionSpec(None, ("host", "device"))


@pytest.mark.parametrize(
    ("mesh", "axis", "message"),
    [
        ("cpu", None, r"expected a jax.sharding.Mesh, found str; jax.make_mesh"),
        (8, None, r"found int"),
        (None, "task", r"has no axis 'task'; did you mean 'tasks'"),
        (None, ["tasks", "tasks"], r"one or more different axes"),
        (None, [], r"one or more different axes"),
    ],
)
def test_what_is_no_mesh_or_no_axis_is_refused_in_words(small, mesh, axis, message):
    made = jax.make_mesh((1,), ("tasks",)) if mesh is None else mesh
    with pytest.raises(hb.InputError, match=message):
        small.tasks.shard(made, axis)


def test_episodes_of_spread_tasks_are_refused_in_words(small, mesh):
    with pytest.raises(hb.InputError, match=r"drawn on one device.*tasks\.shard\(None\)"):
        hb.Episodes.from_tasks(small.tasks.shard(mesh))


@pytest.mark.slow
def test_the_joint_sampler_says_that_it_makes_no_use_of_the_mesh(schools, mesh):
    with pytest.warns(hb.FitWarning, match="one device of each process"):
        fit = hb.full_bayes(
            schools.model, schools.tasks.shard(mesh), method="nuts", num_draws=5, num_warmup=5,
            num_chains=1,
        )  # fmt: skip
    assert any("makes no use" in remark for remark in fit.warnings)


@given(st.integers(0, 10**9))
def test_the_ladder_of_lengths(length):
    """At least the length, at most an eighth of its octave more, and a rung stays where it is."""
    filled = rung(length)
    assert max(length, 1) <= filled <= max(1, length) * 9 / 8
    assert rung(filled) == filled
    assert rung(length + 1) >= filled


def test_what_is_on_devices_stays_there():
    """Of two processes neither holds all of an array: it can be moved by none of them."""
    there = jnp.ones(3)
    found = on_device({"there": there, "here": np.ones(2), "none": None})
    assert found["there"] is there
    assert isinstance(found["here"], jax.Array)
    assert found["none"] is None
