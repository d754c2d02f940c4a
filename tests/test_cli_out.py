"""``--out`` replaces nothing of the user's: links, devices, files beside results, late comers."""

import os
import re

import numpy as np
import pandas as pd
import pytest

import hierbayes.cli as cli
from hierbayes.cli import main

COMPARE = ["compare", "eight_schools", "--methods", "no_pooling,complete_pooling", "--test", "0"]
FIT = ["fit", "eight_schools", "--method", "complete_pooling"]


@pytest.fixture
def quick(monkeypatch):
    """Folders without pictures: what they show is tested elsewhere."""
    from hierbayes import plots
    from hierbayes.comparison import folder

    class Axes:
        class figure:
            @staticmethod
            def savefig(path, dpi):
                path.write_bytes(b"picture")

    for name in ("shrinkage", "learned_prior", "forest"):
        drawn = lambda *given, coef: Axes  # noqa: E731
        drawn.__name__ = name
        monkeypatch.setattr(plots, name, drawn)
    monkeypatch.setattr(folder.Comparison, "plot", lambda self: [Axes])
    monkeypatch.setattr("matplotlib.pyplot.close", lambda figure: None)
    report = lambda self, path: path.write_text("report")  # noqa: E731
    monkeypatch.setattr(folder.Comparison, "report", report)


@pytest.fixture
def nothing_computes(monkeypatch):
    def computes(*details):
        raise AssertionError("computation began")

    for kind in cli.METHODS.values():
        monkeypatch.setattr(kind, "__call__", computes)


def everything(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


@pytest.mark.parametrize("command", [COMPARE, FIT])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "link to a file"])
def test_links_and_devices_are_refused_before_computing(
    kind, more, command, tmp_path, capsys, nothing_computes
):
    target, out = tmp_path / "target", tmp_path / "out"
    if kind == "link":
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    if kind == "link to a file":
        target.write_text("mine")
    if kind == "pipe":
        os.mkfifo(out)
    else:
        out.symlink_to(target)
    before = everything(tmp_path)
    assert main([*command, "--out", str(out), *more]) == 2
    assert "--out" in capsys.readouterr().err
    assert everything(tmp_path) == before
    assert out.is_symlink() or out.is_fifo()


def test_results_are_replaced_unless_anything_else_lies_there(quick, tmp_path, capsys):
    out = tmp_path / "res.v1"
    arguments = [*COMPARE, "--out", str(out)]
    assert main(arguments) == 0
    first = everything(out)
    assert main(arguments) == 2
    assert main([*arguments, "--overwrite"]) == 0
    assert everything(out) == first
    for name in ("thesis.txt", "fits/mine.nc", "new/deep/mine.txt"):
        mine = out / name
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text("mine")
        capsys.readouterr()
        assert main([*arguments, "--overwrite"]) == 2
        assert "would delete" in capsys.readouterr().err
        assert mine.read_text() == "mine"
        mine.unlink()
    for empty in (out / "new" / "deep", out / "new"):
        empty.rmdir()
    (out / "report.html").write_text("with my notes")  # ours no longer
    assert main([*arguments, "--overwrite"]) == 2
    assert (out / "report.html").read_text() == "with my notes"
    assert everything(tmp_path) == {"res.v1", *(f"res.v1/{name}" for name in first)}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_during_the_run_is_kept(overwrite, quick, tmp_path, capsys, monkeypatch):
    out = tmp_path / "res"
    arguments = [*COMPARE, "--out", str(out)]
    if overwrite:
        assert main(arguments) == 0
        arguments.append("--overwrite")
    real = cli.compare

    def compare(*given, **settings):
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("my work")
        return real(*given, **settings)

    monkeypatch.setattr(cli, "compare", compare)
    capsys.readouterr()
    assert main(arguments) == 0
    assert (out / "thesis.txt").read_text() == "my work"
    said = capsys.readouterr().err
    where = re.search(r"wrote (\S+):", said)
    assert where is not None
    assert where.group(1) == str(tmp_path / "res-2")
    assert (tmp_path / "res-2" / "report.html").exists()
    assert "kept as it is" in said
    assert {p.name for p in tmp_path.iterdir()} == {"res", "res-2"}


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_that_comes_during_the_run_is_kept(before, tmp_path, capsys, monkeypatch):
    out = tmp_path / "fit.nc"
    if before:
        out.write_text(before)
    kind = cli.METHODS["complete_pooling"]
    method = kind.__call__

    def computes(*given):
        out.write_text("my own work")
        return method(*given)

    monkeypatch.setattr(kind, "__call__", computes)
    assert main([*FIT, "--out", str(out), "--overwrite"]) == 0
    assert out.read_text() == "my own work"
    assert f"saved to {tmp_path / 'fit-2.nc'}" in capsys.readouterr().err
    assert everything(tmp_path) == {"fit.nc", "fit-2.nc"}
    monkeypatch.setattr(kind, "__call__", method)
    assert main([*FIT, "--out", str(out), "--overwrite"]) == 0
    assert out.read_bytes()[:4] == b"\x89HDF"


@pytest.mark.slow
def test_dollars_and_long_names_in_groups_and_columns(tmp_path):
    rng = np.random.default_rng(0)
    long = "c" * 300
    data = pd.DataFrame({"price": np.repeat(["$10-$20", "$50_$100", "g" * 300], 5)})
    data[long], data["a$b$c"] = rng.normal(size=15), rng.normal(size=15)
    data["y"] = data[long] + rng.normal(size=15)
    data.to_csv(tmp_path / "p.csv", index=False)
    formula = f"y ~ 1 + {long} + `a$b$c` + (1 + {long} + `a$b$c` || price)"
    out = tmp_path / "out"
    arguments = ["compare", str(tmp_path / "p.csv"), "--formula", formula, "--test", "0"]
    assert main([*arguments, "--methods", "complete_pooling", "--out", str(out)]) == 0
    pictures = [p.name for p in out.glob("forest_*.png")]
    assert len(pictures) == 3
    assert max(map(len, pictures)) < 130


def test_names_of_pictures_are_short_and_all_different():
    from hierbayes.comparison.folder import _file_names

    coefs = ["a b", "a_b", "x" * 300, "x" * 301, "größe", "é" * 200]
    names = _file_names(coefs)
    assert len(set(names)) == len(coefs)
    assert names[4] == "größe"
    assert all(len(name.encode()) < 120 for name in names)
