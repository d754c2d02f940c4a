"""A method is a value: its fields are its settings, and a refit keeps every one of them."""

from __future__ import annotations

import inspect
import json
import pickle
import warnings
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr
from assertions import refuses

import hierbayes as hb
from hierbayes.checks import leave_one_task_out
from hierbayes.fit.method import METHODS, named_methods
from hierbayes.meta.outer_loop import RUN

ALIASES = {
    "Abml": hb.meta.abml, "CompletePooling": hb.complete_pooling,
    "EmpiricalBayes": hb.empirical_bayes, "FullBayes": hb.full_bayes, "Imaml": hb.imaml,
    "Llama": hb.meta.llama, "Maml": hb.maml, "NoPooling": hb.no_pooling, "Reptile": hb.reptile,
}  # fmt: skip

SETTINGS: dict[str, dict[str, Any]] = {
    "Maml": dict(num_steps=3, loss="mean", derivative="first-order", num_meta_steps=40),
    "Imaml": dict(prior_precision=[2.0, 3.0], num_meta_steps=40),
    "Reptile": dict(num_steps=2, num_meta_steps=40, query=0.4),
    "EmpiricalBayes": dict(criterion="reml", num_draws=5, num_chains=1),
    "FullBayes": dict(num_draws=20, num_warmup=20, num_chains=2),
    "NoPooling": dict(sigma=0.8),
    "CompletePooling": {},
}
"""Of every method on a fixed set of tasks, none of them a default."""


@pytest.fixture(scope="module")
def radon(radon_data):
    return hb.from_formula("log_radon ~ 1 + floor + (1 + floor | county)", radon_data)


@pytest.fixture(scope="module")
def radon_data():
    data = hb.datasets.radon()
    return data[data.county.isin(data.county.value_counts().index[:12])]


def quiet(method, *given, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        return method(*given, **settings)


# ------------------------------------------------------------------------ values


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_the_functions_arguments_are_the_fields(name):
    """Beside the model, the tasks and what belongs to a run, with the same defaults."""
    told = inspect.signature(ALIASES[name]).parameters
    own = {f.name: f.default for f in fields(METHODS[name])}
    said = {
        n: p.default for n, p in told.items() if n not in ("model", "tasks", *RUN)
        and p.kind is not p.VAR_KEYWORD
    }  # fmt: skip
    assert said.items() <= own.items()
    rest = set(own) - set(said)  # the outer loop's, which **outer_loop and **training take
    if rest:
        assert any(p.kind is p.VAR_KEYWORD for p in told.values())
        assert rest <= {f.name for f in fields(hb.meta.Learner)}


def test_every_method_has_an_alias_a_name_and_a_place():
    """A new one is found here until it has them."""
    assert {kind.__name__ for kind in named_methods().values()} == set(ALIASES)
    for name, kind in named_methods().items():
        assert kind.name == name
        assert 0 <= kind.rank <= 1
    names = [*named_methods()]
    assert (names[0], names[-1]) == ("no pooling", "complete pooling")


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_method_is_a_value(name):
    method = METHODS[name](**SETTINGS[name])
    assert method == METHODS[name](**SETTINGS[name]) == pickle.loads(pickle.dumps(method))
    assert hash(method) == hash(METHODS[name](**SETTINGS[name]))
    assert str(method) == method.name
    for f in fields(method)[:1]:
        with pytest.raises(FrozenInstanceError):
            setattr(method, f.name, None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: hb.meta.Maml(0), ("num_steps", "0")),
        (lambda: hb.meta.Maml(query=1.5), ("query", "1.5")),
        (lambda: hb.meta.Reptile(tolerance=-1.0), ("tolerance", "-1")),
        (lambda: hb.meta.FullBayes("gibbs"), ("method", "'gibbs'")),
        (lambda: hb.meta.EmpiricalBayes("aic"), ("criterion", "'aic'")),
        (lambda: hb.meta.Abml(num_samples=0), ("num_samples", "0")),
        (lambda: hb.meta.Llama(weight=-1.0), ("weight", "-1")),
        (lambda: hb.meta.NoPooling(-2.0), ("sigma", "-2")),
    ],
)
def test_a_value_that_cannot_be_is_refused_when_it_is_made(make, words):
    with refuses(*words):
        make()


# ------------------------------------------------------------------------ refits


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_refit_is_the_fit(name, radon, tmp_path):
    """The same numbers again, from the fit's own method and from that of its file."""
    model, tasks = radon
    fit = quiet(ALIASES[name], model, tasks, **SETTINGS[name])
    assert fit.method == METHODS[name](**SETTINGS[name])
    fit.save(tmp_path / "fit.nc")
    for method in (fit.method, hb.load(tmp_path / "fit.nc").method):
        assert method == fit.method
        again = quiet(method, model, tasks, fit.info.get("seed", 0))
        for part, value in fit.phi.items():
            np.testing.assert_array_equal(again.phi[part], value, err_msg=part)


@pytest.mark.parametrize(
    "settings",
    [dict(loss="mean"), dict(derivative="first-order"), dict(learn_step_size="coef"),
     dict(learn_step_size="coef", num_steps=1)],
    ids=str,
)  # fmt: skip
def test_leave_one_task_out_keeps_every_setting(settings, radon):
    """Refits by hand with the same arguments score the same, and not as MAML's defaults do."""
    model, tasks = radon
    tasks = tasks.take(np.arange(4))
    settings = dict(num_steps=2, num_meta_steps=30) | settings
    fit = quiet(hb.maml, model, tasks, **settings)
    found = quiet(leave_one_task_out, fit)["log_density"]
    by_hand = quiet(hb.maml, fit.inside.model, fit.inside.tasks.take(np.arange(1, 4)), **settings)
    score = by_hand.predict(fit.inside.tasks.take([0]), target="new").log_density().sum()
    np.testing.assert_allclose(found[0], score, rtol=1e-12)
    assert np.isfinite(found).all()


def test_other_settings_by_replace(radon):
    model, tasks = radon
    fit = quiet(hb.maml, model, tasks, num_steps=1, num_meta_steps=30)
    other = quiet(replace(fit.method, num_steps=3), model, tasks)
    assert other.info["num_steps"] == 3
    assert other.info["num_meta_steps"] == 30


def test_what_was_made_of_another_fit_is_not_refitted(radon):
    model, tasks = radon
    with refuses("NUTS cannot be refitted"):
        METHODS["Derived"]("NUTS")(model, tasks)


def test_warnings_point_at_the_users_line(radon):
    """However deep inside they are issued, through the alias and through the value."""
    _, tasks = radon
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    for method in (hb.maml, lambda *given, **more: hb.meta.Maml(**more)(*given)):
        with pytest.warns(hb.FitWarning) as heard:
            method(model, tasks, num_steps=500, num_meta_steps=2)
        assert {Path(one.filename) for one in heard} == {Path(__file__)}


# ------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Level(hb.adaptation.ByTask):
    """The mean of a task's rows and of ``weight`` rows at μ."""

    weight: float
    name = "level"

    def of_task(self, model, phi, task):
        """θ (1,)."""
        rows = jnp.where(task.mask, task.outcome, 0.0)
        return ((rows.sum() + self.weight * phi["mu"]) / (task.mask.sum() + self.weight))[:1]


@dataclass(frozen=True)
class ByLevel(hb.meta.Learner):
    """Learns μ through means of its own."""

    weight: float = 3.0
    name = "by level"

    def adaptation(self):
        """The mean with this weight."""
        return Level(self.weight)


@pytest.fixture(scope="module")
def levels():
    rng = np.random.default_rng(0)
    sizes = [3, 7, 1, 5, 9, 4]
    tasks = [(np.ones((n, 1)), rng.normal(rng.normal(2.0), 0.5, n)) for n in sizes]
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    return model, hb.Tasks.from_arrays(tasks)


def test_a_method_of_ones_own_on_a_fixed_set_of_tasks(levels, tmp_path):
    """θ_j are the means in closed form; it is compared, saved, read and fitted again."""
    model, tasks = levels
    fit = quiet(ByLevel(weight=2.0), model, tasks)
    sums = np.add.reduceat(tasks.outcome, tasks.starts[:-1])
    expected = (sums + 2.0 * fit.phi["mu"]) / (tasks.sizes + 2.0)
    np.testing.assert_allclose(fit.theta.values[:, 0], expected, rtol=1e-6)
    table = hb.compare({"own": fit, "empirical Bayes": quiet(hb.empirical_bayes, model, tasks)})
    assert np.isfinite(table.table.loc["own", "log_density"])
    fit.save(tmp_path / "own.nc")
    again = hb.load(tmp_path / "own.nc", method=ByLevel)
    assert again.method == fit.method
    assert again.adaptation == fit.adaptation
    np.testing.assert_array_equal(again.theta.values, fit.theta.values)
    np.testing.assert_array_equal(quiet(again.method, model, tasks).phi["mu"], fit.phi["mu"])
    assert "ByLevel" not in METHODS  # a file's name resolves among the package's own
    with refuses("one of yours", "method=ByLevel"):
        hb.load(tmp_path / "own.nc")
    with refuses("ByLevel", "Maml was passed"):
        hb.load(tmp_path / "own.nc", method=hb.meta.Maml)


def test_a_setting_that_no_file_keeps_is_named(levels, tmp_path):
    @dataclass(frozen=True)
    class Odd(ByLevel):
        work: Any = print

    fit = quiet(Odd(), *levels)
    with refuses("setting 'work'", "no file keeps"):
        fit.save(tmp_path / "odd.nc")
    assert not (tmp_path / "odd.nc").exists()


def test_an_outer_optimiser_is_not_kept_and_says_so(levels, tmp_path):
    model, tasks = levels
    fit = quiet(hb.maml, model, tasks, optimiser=optax.adam(0.1), num_meta_steps=5)
    fit.save(tmp_path / "fit.nc")
    again = hb.load(tmp_path / "fit.nc").method
    with refuses("outer optimiser", "not kept", "optimiser="):
        again(model, tasks)
    told = replace(again, optimiser=fit.method.optimiser)
    assert told == fit.method


@pytest.mark.parametrize(
    "damage",
    [
        lambda told: told["settings"].pop("num_steps"),
        lambda told: told["settings"].update(mine=1),
        lambda told: told["settings"].update(num_steps=-3),
        lambda told: told.update(kind="os.system"),
        lambda told: told.update(kind="Fit"),
        lambda told: told.update(kind="Learner"),
        lambda told: told.update(settings=[]),
    ],
    ids=["without", "more", "wrong", "path", "class", "base", "list"],
)
def test_a_files_method_is_checked(damage, levels, tmp_path):
    fit = quiet(hb.maml, *levels, num_meta_steps=5)
    described = described_by(fit, tmp_path)
    damage(described["method"])
    with refuses():
        hb.load(written(described, tmp_path))


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - {"NoPooling"}))
def test_files_with_a_name_in_the_place_of_a_method(name, radon, tmp_path):
    """Up to format 3 the settings stand among what the fit tells; what it tells is kept."""
    model, tasks = radon
    fit = quiet(ALIASES[name], model, tasks, **SETTINGS[name])
    described = described_by(fit, tmp_path)
    described |= {"method": fit.method.name, "format": 3}
    method: Any = hb.load(written(described, tmp_path)).method
    assert type(method) is type(fit.method)
    for setting, value in SETTINGS[name].items():
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(method, setting) == expected, setting


def described_by(fit, folder):
    fit.save(folder / "fit.nc")
    with xr.open_datatree(folder / "fit.nc", engine="h5netcdf") as tree:
        return json.loads(tree["hierbayes"].attrs["fit"])


def written(described, folder):
    """The file of :func:`described_by` again, with another description and no checksum."""
    tree = xr.open_datatree(folder / "fit.nc", engine="h5netcdf").load()
    tree.close()
    tree["hierbayes"].attrs["fit"] = json.dumps(described)
    tree.to_netcdf(folder / "other.nc", engine="h5netcdf")
    return folder / "other.nc"
