"""The command line: tables on stdout, talk on stderr, files whole or not at all, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import hierbayes as hb
from hierbayes.cli import METHODS, main

FAST = ["--methods", "no_pooling,complete_pooling,empirical_bayes"]
CSV = "y ~ 1 + x + (1 | g)"


@pytest.fixture
def houses(tmp_path):
    df = hb.datasets.sleepstudy().rename(columns={"subject": "g", "days": "x", "reaction": "y"})
    path = tmp_path / "houses.csv"
    df.to_csv(path, index=False)
    return path


def test_compare_a_csv_file(houses, tmp_path, capsys):
    out = tmp_path / "results"
    assert main(["compare", str(houses), "--formula", CSV, *FAST, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "empirical Bayes" in said.out
    assert "log_density" in said.out
    assert "empirical Bayes:" in said.err  # what was done, and how long it took
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert {"table.csv", "table.txt", "tasks.csv", "report.html", "comparison.png",
            "shrinkage_Intercept.png", "forest_Intercept.png", "learned_prior_Intercept.png",
            "fits/empirical_Bayes.nc"} <= names  # fmt: skip
    table = pd.read_csv(out / "table.csv", index_col="method")
    assert list(table.index) == ["no pooling", "complete pooling", "empirical Bayes"]
    fit = hb.load(out / "fits" / "empirical_Bayes.nc")
    assert fit.tasks.num_tasks == 18
    tasks = pd.read_csv(out / "tasks.csv")
    assert len(tasks) == 3 * 18
    assert sorted(p.name for p in tmp_path.iterdir()) == ["houses.csv", "results"]  # no left-overs


@pytest.mark.slow
def test_eight_schools_without_rows_to_spare(capsys):
    methods = ["--methods", "no_pooling,maml,reptile,empirical_bayes"]
    assert main(["compare", "eight_schools", *methods]) == 0
    said = capsys.readouterr()
    assert "—" in said.out
    assert "no task has two rows" in said.out
    assert "exactly 0" in said.err  # tau-hat = 0 under ML is not passed over in silence


def test_fit_and_datasets(houses, tmp_path, capsys):
    out = tmp_path / "fit.nc"
    arguments = ["fit", str(houses), "--formula", CSV, "--method", "empirical_bayes"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert "tau[Intercept]" in capsys.readouterr().out
    assert hb.load(out).method.name == "empirical Bayes"
    assert main(["datasets"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("radon", "eight_schools", "rats", "sleepstudy"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "raddon"], ["raddon", "radon"]),
        (["compare", "HOUSES"], ["--formula"]),
        (["compare", "HOUSES", "--formula", "y ~ 1 + (1 | gg)"], ["gg"]),
        (["compare", "HOUSES", "--formula", "y ~ (1 | g"], ["closed"]),
        (["compare", "radon", "--methods", "mammal"], ["mammal", "maml"]),
        (["compare", "radon", "--methods", ","], ["--methods"]),
        (["compare", "radon", "--test", "1.5"], ["--test"]),
        (["compare", "radon", "--draws", "0"], ["--draws"]),
        (["compare", "EMPTY", "--formula", CSV], ["empty"]),
        (["compare", "HEADER", "--formula", CSV], ["no rows"]),
        (["compare", "radon", "--out", "HOUSES"], ["--out", "is a file"]),
        (["compare", "radon", "--out", "FULL"], ["--out", "not empty"]),
        (["compare", "radon", "--out", "FULL", "--overwrite"], ["--out", "would delete"]),
        (["compare", "radon", "--out", "/proc/nowhere/here"], ["--out"]),
        (["fit", "radon", "--out", "/proc/nowhere.nc"], ["--out"]),
    ],
)
def test_bad_input_is_code_two_before_any_computation(
    arguments, words, houses, tmp_path, capsys, monkeypatch
):
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("y,x,g\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    places = {"HOUSES": houses, "EMPTY": tmp_path / "empty.csv", "HEADER": tmp_path / "header.csv",
              "FULL": tmp_path / "full"}  # fmt: skip

    def computes(*details):
        raise AssertionError("computation began")

    for kind in METHODS.values():
        monkeypatch.setattr(kind, "__call__", computes)
    assert main([str(places.get(a, a)) for a in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    for word in words:
        assert word in said.err
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep me"


@pytest.mark.slow
def test_a_failure_half_way_leaves_nothing(houses, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results"

    def fails(*details):
        raise OSError("disk full")

    monkeypatch.setattr(hb.Comparison, "report", fails)
    assert main(["compare", str(houses), "--formula", CSV, *FAST, "--out", str(out)]) == 1
    assert "disk full" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["houses.csv"]


@pytest.mark.slow
def test_overwrite_replaces_results_and_nothing_else(houses, tmp_path):
    out = tmp_path / "results"
    arguments = ["compare", str(houses), "--formula", CSV, "--methods", "complete_pooling"]
    assert main([*arguments, "--out", str(out)]) == 0
    first = (out / "report.html").stat().st_ino
    assert main([*arguments, "--out", str(out)]) == 2  # not without being asked
    assert main([*arguments, "--out", str(out), "--overwrite"]) == 0
    assert (out / "report.html").stat().st_ino != first
    (out / "thesis.txt").write_text("mine")
    assert main([*arguments, "--out", str(out), "--overwrite"]) == 2
    assert (out / "thesis.txt").read_text() == "mine"
    assert (out / "report.html").exists()


@pytest.mark.slow
def test_module_and_help_run_as_a_user_types_them():
    run = subprocess.run(
        [sys.executable, "-m", "hierbayes", "--help"], capture_output=True, text=True,
        env={**os.environ, "MPLBACKEND": "Agg"}, check=False,
    )  # fmt: skip
    assert run.returncode == 0
    assert "exit codes" in run.stdout
    assert "compare" in run.stdout


def test_dropped_rows_are_said(houses, capsys):
    df = pd.read_csv(houses)
    df.loc[3, "x"] = float("nan")
    df.to_csv(houses, index=False)
    arguments = ["compare", str(houses), "--formula", CSV, "--methods", "complete_pooling"]
    assert main(arguments) == 2  # missing values are refused, by name
    assert "'x'" in capsys.readouterr().err
    assert main([*arguments, "--drop-missing"]) == 0
    assert "dropped 1 of 180 rows" in capsys.readouterr().err


def test_a_category_of_one_row_stays_in_training(houses, capsys):
    df = pd.read_csv(houses).assign(kind=lambda d: ["a", "b"] * 90)
    for row in range(0, 180, 9):  # twenty categories of one row each: some would be held out
        df.loc[row, "kind"] = f"only{row}"
    df.to_csv(houses, index=False)
    formula = "y ~ 1 + x + kind + (1 | g)"
    assert (
        main(["compare", str(houses), "--formula", formula, "--methods", "complete_pooling"]) == 0
    )
    assert "stay in training" in capsys.readouterr().err


@pytest.mark.slow
def test_a_method_that_cannot_serve_these_tasks_shows_a_dash(tmp_path, capsys):
    # two rows a task and two coefficients: nothing within tasks tells the noise
    df = hb.datasets.sleepstudy().rename(columns={"subject": "g", "days": "x", "reaction": "y"})
    path = tmp_path / "pairs.csv"
    df[df["x"] < 2].to_csv(path, index=False)
    methods = ["--methods", "no_pooling,empirical_bayes", "--test", "0"]
    formula = "y ~ 1 + x + (1 + x | g)"
    assert main(["compare", str(path), "--formula", formula, *methods]) == 0
    said = capsys.readouterr().out
    assert "no pooling: sigma cannot be estimated within tasks" in said


def test_a_fit_makes_the_folder_that_it_is_saved_in(houses, tmp_path):
    out = tmp_path / "new" / "folder" / "fit.nc"
    arguments = ["fit", str(houses), "--formula", CSV, "--method", "complete_pooling"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert out.exists()


def test_families_and_columns_of_rows_come_from_the_command_line(tmp_path):
    """As from_formula has them: the same φ, of counts with exposures, and of weighted rows."""
    rng = np.random.default_rng(2)
    df = pd.DataFrame({"g": np.repeat(np.arange(8), 5), "time": rng.uniform(1, 4, size=40)})
    df["count"] = rng.poisson(df["time"] * np.exp(0.5 * rng.normal(size=8))[df["g"]])
    df["w"], df["log_time"] = rng.uniform(1, 2, size=40), np.log(df["time"])
    path = tmp_path / "counts.csv"
    df.to_csv(path, index=False)
    formula = "count ~ 1 + (1 | g)"
    for options, given in (
        (["--exposure", "time"], {"exposure": "time"}),
        (["--offset", "log_time", "--weights", "w"], {"offset": "log_time", "weight": "w"}),
    ):
        out = tmp_path / f"{options[0]}.nc"
        options = [*options, "--family", "poisson", "--method", "complete_pooling"]
        assert main(["fit", str(path), "--formula", formula, *options, "--out", str(out)]) == 0
        expected = hb.complete_pooling(*hb.from_formula(formula, df, family="poisson", **given))
        np.testing.assert_array_equal(hb.load(out).phi["mu"], expected.phi["mu"])


def test_a_family_that_is_probably_meant_is_named(tmp_path, capsys):
    df = pd.DataFrame({"g": np.repeat(np.arange(6), 4), "bad": [0, 1, 1, 0, 1, 0] * 4})
    path = tmp_path / "loans.csv"
    df.to_csv(path, index=False)
    arguments = ["fit", str(path), "--formula", "bad ~ 1 + (1 | g)", "--method", "complete_pooling"]
    assert main(arguments) == 0
    assert "--family" in (said := capsys.readouterr().err)
    assert 'family="bernoulli"' in said
    assert main([*arguments, "--family", "gaussian"]) == 0
    assert "--family" not in capsys.readouterr().err
    assert main([*arguments, "--family", "weibull"]) == 2
    assert "bernoulli" in capsys.readouterr().err  # what there is


def test_options_that_are_not_known_are_bad_input(capsys):
    """In words on stderr, with code 2, as every bad input."""
    for wrong in (["--famly", "poisson"], ["--draws", "many"], ["radon", "again"]):
        assert main(["fit", *wrong]) == 2
        said = capsys.readouterr()
        assert wrong[-1] in said.err or wrong[0] in said.err
        assert said.out == ""
    assert main(["--version"]) == 0
    assert hb.__version__ in capsys.readouterr().out
