"""A saved fit is what was saved, or refused: damage, tampering, strangers' files, full disks."""

import errno
import io
import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

import hierbayes as hb
from hierbayes.files import sealed, unsealed, write_whole
from hierbayes.meta import loading

OLD = Path(__file__).parent / "references" / "eight_schools_format_3.nc"
"""Complete pooling of the eight schools, as the package wrote it before there was a checksum."""


@pytest.fixture(scope="module")
def fit():
    data = hb.datasets.sleepstudy()
    return hb.full_bayes(
        *hb.from_formula("reaction ~ 1 + days + (1 + days | subject)", data),
        num_draws=8, num_warmup=8, num_chains=1, progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(fit, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "fit.nc"
    fit.save(path)
    return path.read_bytes()


def refused(path, content, *words):
    path.write_bytes(content)
    with pytest.raises(hb.InputError) as caught:
        hb.load(path)
    for word in (path.name, *words):
        assert word in str(caught.value)


def crafted(whole, *, described=None, arrays=None):
    """The file with other JSON or other arrays, and a checksum that is right."""
    file = io.BytesIO(unsealed(whole))
    with h5py.File(file, "r+") as opened:
        if described is not None:
            plain = json.loads(opened["hierbayes"].attrs["fit"])
            changed = described(plain)
            text = changed if isinstance(changed, str) else json.dumps(plain)
            opened["hierbayes"].attrs["fit"] = text
        if arrays is not None:
            arrays(opened)
    return sealed(file.getvalue())


def test_damage_anywhere_is_refused_before_hdf5_reads(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(loading.hdf5, "read", lambda data: pytest.fail("HDF5 reads it"))
    monkeypatch.setattr(
        loading.hdf5, "refuse_what_hangs", lambda *given: pytest.fail("HDF5 reads it")
    )
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.nc"
    for start in (*rng.integers(len(whole) - 512, size=10), 0, len(whole) - 512):
        zeroed, bit = bytearray(whole), bytearray(whole)
        zeroed[start : start + 512] = bytes(512)
        bit[start] ^= 1 << int(rng.integers(8))
        for content in (zeroed, bit):
            if content == whole:  # zeros were there already
                continue
            refused(path, bytes(content), "damaged")
    with_more = whole + b"more"
    refused(path, with_more, "damaged")


def test_a_file_cut_short_is_refused(whole, tmp_path):
    for end in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        refused(tmp_path / "short.nc", whole[:end])


def test_a_change_by_another_program_is_refused(whole, tmp_path):
    path = tmp_path / "changed.nc"
    path.write_bytes(whole)
    with h5py.File(path, "r+") as opened:
        opened["hierbayes/phi.mu"][0] = 1.0
    refused(path, path.read_bytes(), "damaged")


def gone(*way):
    def change(plain):
        for step in way[:-1]:
            plain = plain[step]
        del plain[way[-1]]

    return change


def put(value, *way):
    def change(plain):
        for step in way[:-1]:
            plain = plain[step]
        plain[way[-1]] = value

    return change


JSONS = {
    "no encoder": (gone("encoder"), "encoder"),
    "no labels": (gone("labels"), "labels"),
    "no format": (gone("format"), "format"),
    "format as text": (put("x", "format"), "format"),
    "not an object": (lambda plain: "[1]", "hierbayes.fit"),
    "no JSON": (lambda plain: "{", "hierbayes.fit"),
    "deep": (lambda plain: "[" * 100_000, "hierbayes.fit"),
    "unknown family": (put("nope", "model", "likelihood", "kind"), "likelihood: kind"),
    "no such setting": (put(1, "model", "likelihood", "settings", "x"), "settings.x"),
    "truth as text": (put("no", "model", "likelihood", "settings", "known_se"), "known_se"),
    "no prior": (gone("model", "prior"), "prior"),
    "coefficient unknown to the prior": (
        put(["zzz"], "model", "prior", "settings", "zero_mean"), "zero_mean"
    ),
    "hyperprior that is a function": (
        put({"kind": "enable_validation", "parameters": {}}, "model", "hyperprior", "sigma"),
        "hyperprior",
    ),
    "hyperprior of a huge shape": (
        put({"kind": "LKJ", "dimension": 10**6, "concentration": 1.0},
            "model", "hyperprior", "corr"),
        "hyperprior",
    ),
    "hyperprior with NaN": (
        put({"kind": "HalfNormal", "parameters": {"scale": float("nan")}},
            "model", "hyperprior", "sigma"),
        "scale",
    ),
    "unknown adaptation": (put("System", "adaptation", "kind"), "adaptation: kind"),
    "endless work": (
        put({"kind": "GradientSteps", "settings": {
            "num_steps": 10**12, "step_size": 0.1, "loss": "sum", "optimiser": None,
            "derivative": "unrolled", "proximal": False}}, "adaptation"),
        "num_steps",
    ),
    "other coefficients": (put(["a", "b"], "labels", "coef"), "labels"),
    "a coefficient twice": (put(["days", "days"], "labels", "coef"), "coef"),
    "code in the formula": (
        put("reaction ~ 1 + __import__('os').getcwd() + (1 + days | subject)",
            "encoder", "formula"),
        "encoder",
    ),
    "columns of nobody": (put(["a"], "encoder", "columns"), "encoder"),
    "draws of what is not there": (put(["mu", "zzz"], "phi_draws"), "phi_draws"),
    "no draws": (put([], "phi_draws"), "phi_draws"),
    "warnings that are no text": (put([1], "warnings"), "warnings"),
    "evidence as text": (put("1", "evidence"), "evidence"),
    "evidence NaN": (put(float("nan"), "evidence"), "evidence"),
    "info that is no mapping": (put([], "info"), "info"),
}  # fmt: skip


@pytest.mark.parametrize("name", JSONS)
def test_a_description_that_cannot_be_is_refused_by_field(name, whole, tmp_path):
    change, word = JSONS[name]
    refused(tmp_path / "crafted.nc", crafted(whole, described=change), word)


def array(path, make):
    def change(opened):
        values = opened[path][()]
        del opened[path]
        make(opened, path, values)

    return change


def as_data(function):
    return lambda opened, path, values: opened.create_dataset(path, data=function(values))


def huge(opened, path, values):
    opened.create_dataset(path, shape=(10**6, 10**6), dtype="f8", chunks=(1000, 1000))


def huge_and_empty(opened, path, values):
    """Contiguous, of 8 TB, none of which is in the file."""
    opened.create_dataset(path, shape=(10**12,), dtype="f8")


def squeezed(opened, path, values):
    opened.create_dataset(path, data=np.zeros(10**6), compression="gzip")


def of_another_file(opened, path, values):
    opened[path] = h5py.ExternalLink("/etc/hostname", "/")


def outside(opened, path, values):
    """Bytes of any other file that the reader may read."""
    opened.create_dataset(path, shape=(2,), dtype="f8", external=[("/etc/passwd", 0, 16)])


PATHS = (
    "hierbayes/phi.mu", "hierbayes/phi.corr", "posterior/theta", "posterior/mu",
    "sample_stats/lp", "constant_data/starts", "constant_data/predictors", "constant_data/row",
    "constant_data/task", "observed_data/y", "hierbayes/training/column0",
)  # fmt: skip
MADE = {
    "gone": lambda opened, path, values: None,
    "huge": huge,
    "huge and empty": huge_and_empty,
    "compressed": squeezed,
    "a link": of_another_file,
    "bytes of another file": outside,
    "a group": lambda opened, path, values: opened.create_group(path),
    "complex": as_data(lambda v: np.ones(v.shape, complex)),
    "one more axis": as_data(lambda v: np.zeros((*v.shape, 2))),
}


@pytest.mark.parametrize(
    ("name", "path"),
    # a statistic of the sampler may be gone: nothing needs it
    [(n, p) for p in PATHS for n in MADE if (n, p) != ("gone", "sample_stats/lp")],
)
def test_an_array_that_cannot_be_is_refused(name, path, whole, tmp_path):
    content = crafted(whole, arrays=array(path, MADE[name]))
    refused(tmp_path / "crafted.nc", content, path.split("/")[-1].split(".")[-1])


@pytest.mark.parametrize(
    ("path", "change", "word"),
    [
        ("hierbayes/phi.mu", lambda v: v * np.nan, "mu"),
        ("hierbayes/phi.tau", lambda v: -v, "tau"),
        ("hierbayes/phi.corr", lambda v: v + 3.0, "corr"),
        ("hierbayes/phi.mu", lambda v: np.full(v.shape, "x", dtype="S1"), "mu"),
        ("posterior/theta", lambda v: v * np.nan, "theta"),
        ("posterior/theta", lambda v: v[:, :3], "posterior"),
        ("constant_data/starts", lambda v: v[::-1], "starts"),
        ("constant_data/starts", lambda v: v + 10**9, "starts"),
        ("constant_data/row", lambda v: -v, "row"),
        ("constant_data/predictors", lambda v: v + np.inf, "predictors"),
        ("constant_data/task", lambda v: v * 0, "task"),
        ("observed_data/y", lambda v: v[:-1], "predictors"),
    ],
)
def test_numbers_that_cannot_be_are_refused(path, change, word, whole, tmp_path):
    content = crafted(whole, arrays=array(path, as_data(change)))
    refused(tmp_path / "crafted.nc", content, word)


def test_names_that_are_one_long_one_many_times_fill_no_memory(whole, tmp_path):
    """A thousand references to one megabyte: a gigabyte, were they read."""

    def bomb(opened):
        del opened["constant_data/task"]
        names = opened.create_dataset("constant_data/task", (1000,), dtype=h5py.string_dtype())
        names[0] = "x" * 10**6
        at = names.id.get_offset()
        opened.flush()
        reference = file.getvalue()[at : at + 16]
        places.append((at, reference * 1000))

    file, places = io.BytesIO(unsealed(whole)), []
    with h5py.File(file, "r+") as opened:
        bomb(opened)
    content = bytearray(file.getvalue())
    at, references = places[0]
    content[at : at + len(references)] = references
    refused(tmp_path / "bomb.nc", sealed(bytes(content)), "task", "larger than the file")


def test_files_of_earlier_formats_load(tmp_path):
    path = tmp_path / "old.nc"
    data = hb.datasets.eight_schools()
    model, tasks = hb.from_formula("y ~ 1 + (1 | school)", data, known_se="se")
    right = hb.complete_pooling(model, tasks)

    def described(change):
        path.write_bytes(OLD.read_bytes())
        with h5py.File(path, "r+") as opened:
            plain = json.loads(opened["hierbayes"].attrs["fit"])
            change(plain, plain["model"])
            opened["hierbayes"].attrs["fit"] = json.dumps(plain)

    def second(plain, own):
        plain["format"] = 2
        own |= own.pop("prior")["settings"]

    def first(plain, own):
        second(plain, own)
        plain["format"] = 1
        own |= own.pop("likelihood")["settings"]

    for change in (lambda plain, own: None, second, first):
        described(change)
        again = hb.load(path)
        np.testing.assert_array_equal(again.phi["mu"], right.phi["mu"])
        assert again.model.likelihood == right.model.likelihood
        assert again.model.prior == right.model.prior
        np.testing.assert_array_equal(again.theta.values, right.theta.values)


def test_hdf5_may_hang_on_an_old_file_and_the_reader_does_not(tmp_path, monkeypatch):
    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(loading.hdf5, "__file__", str(slow))
    monkeypatch.setattr(loading, "SECONDS", 0.5)
    refused(tmp_path / "old.nc", OLD.read_bytes(), "has not read it in")
    slow.write_text("import os; os.kill(os.getpid(), 11)")
    monkeypatch.setattr(loading, "SECONDS", 20.0)
    refused(tmp_path / "old.nc", OLD.read_bytes(), "dies of it")


def test_arviz_and_xarray_read_what_is_saved(fit, whole, tmp_path):
    import xarray as xr

    path = tmp_path / "fit.nc"
    path.write_bytes(whole)
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        np.testing.assert_array_equal(tree["posterior"]["theta"].values, fit.theta_draws)


# ------------------------------------------------------------------------- writing


def test_a_full_disk_is_an_error_and_leaves_the_old_file(fit, tmp_path, monkeypatch):
    """The system says so when bytes are written or flushed: the file there before stays whole."""
    path = tmp_path / "fit.nc"
    path.write_bytes(b"before")

    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fit.save(path)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["fit.nc"]


def test_a_link_keeps_its_target_and_a_device_is_refused(fit, tmp_path):
    target, link, pipe = tmp_path / "target.nc", tmp_path / "link.nc", tmp_path / "pipe"
    target.write_bytes(b"before")
    link.symlink_to(target)
    write_whole(link, b"after")
    assert link.is_symlink()
    assert target.read_bytes() == b"after"
    os.mkfifo(pipe)
    with pytest.raises(hb.InputError, match="no regular file"):
        fit.save(pipe)
    with pytest.raises(hb.InputError, match="a folder"):
        fit.save(tmp_path)


def test_a_new_file_replaces_nothing(tmp_path):
    write_whole(tmp_path / "a", b"1", new=True)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "a", b"2", new=True)
    assert (tmp_path / "a").read_bytes() == b"1"
    assert os.listdir(tmp_path) == ["a"]
