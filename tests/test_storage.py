"""A saved fit comes back equal, in one file that ArviZ reads too, or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray as xr
from assertions import refuses
from numpyro.distributions import constraints
from numpyro.distributions.transforms import PowerTransform

import hierbayes as hb
from hierbayes.meta import loading
from hierbayes.priors.serialise import hyperprior_from_plain, hyperprior_to_plain

FITS = ["radon_no_pooling", "radon_complete_pooling", "radon_ml", "radon_map", "radon_maml",
        "radon_imaml", "radon_reptile", "radon_full", "schools_full"]  # fmt: skip


@pytest.mark.parametrize("name", FITS)
def test_a_fit_comes_back_equal(name, request, tmp_path):
    fit: hb.Fit = request.getfixturevalue(name)
    fit.save(tmp_path / "fit.nc")
    again = hb.load(tmp_path / "fit.nc")
    assert again.method == fit.method
    assert again.warnings == fit.warnings
    assert set(again.phi) == set(fit.phi)
    for key in fit.phi:
        np.testing.assert_array_equal(again.phi[key], fit.phi[key])
    for key in fit.standard_errors:
        np.testing.assert_array_equal(again.standard_errors[key], fit.standard_errors[key])
    assert again.evidence == fit.evidence
    assert again.log_posterior == fit.log_posterior
    assert again.model.likelihood == fit.model.likelihood
    assert again.model.prior == fit.model.prior
    for group in fit.datatree.children:
        xr.testing.assert_equal(
            again.datatree[group].to_dataset(), fit.datatree[group].to_dataset()
        )


def test_transforms_of_the_formula_come_back(tmp_path):
    df = hb.datasets.radon().assign(
        kind=lambda d: pd.Categorical(np.where(d.index % 3, "b", "a"), categories=["b", "a"])
    )
    model, tasks = hb.from_formula("log_radon ~ center(floor) + kind + (1 | county)", df)
    fit = hb.complete_pooling(model, tasks)
    fit.save(tmp_path / "fit.nc")
    again = hb.load(tmp_path / "fit.nc")
    new = df.iloc[:7].drop(columns="log_radon")
    # center() of seven rows alone would differ: the training mean must have come back
    np.testing.assert_array_equal(again.predict(new).mean, fit.predict(new).mean)
    with refuses("categories", "z"):
        again.predict(new.assign(kind="z"))


def test_tasks_from_columns_encode_after_loading(tmp_path):
    df = hb.datasets.sleepstudy()
    tasks = hb.Tasks.from_dataframe(df, task="subject", outcome="reaction", predictors=["days"])
    model = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian())
    fit = hb.complete_pooling(model, tasks)
    fit.save(tmp_path / "fit.nc")
    again = hb.load(tmp_path / "fit.nc")
    assert again.tasks.names.dtype.kind == "i"  # subjects stay numbers
    new = again.tasks.encode(df.iloc[:3])
    np.testing.assert_array_equal(again.predict(new).mean, fit.predict(tasks).mean[:3])


def test_arviz_reads_the_file(radon_full, tmp_path):
    import arviz_stats

    radon_full.save(tmp_path / "fit.nc")
    tree = xr.open_datatree(tmp_path / "fit.nc", engine="h5netcdf")
    assert {"posterior", "sample_stats", "log_likelihood", "observed_data"} <= set(tree.children)
    table: Any = arviz_stats.summary(tree, var_names=["mu", "tau"])
    assert "mu[Intercept]" in table.index
    tree.close()


def test_a_failed_save_leaves_the_old_file(radon_complete_pooling, tmp_path, monkeypatch):
    path = tmp_path / "fit.nc"
    radon_complete_pooling.save(path)
    before = path.read_bytes()

    def fails(*arguments: Any, **settings: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(xr.DataTree, "to_netcdf", fails)
    with pytest.raises(OSError, match="disk full"):
        radon_complete_pooling.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["fit.nc"]  # no half-written file beside it


def test_what_is_no_fit_is_refused(radon_complete_pooling, tmp_path):
    with refuses("no file"):
        hb.load(tmp_path / "nothing.nc")
    xr.Dataset({"x": ("i", [1.0])}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with refuses("not a fit"):
        hb.load(tmp_path / "other.nc")
    with refuses("folder does not exist"):
        radon_complete_pooling.save(tmp_path / "nowhere" / "fit.nc")


BELIEFS = {
    "normal": dist.Normal(1.0, 2.0),
    "half-Cauchy": dist.HalfCauchy(5.0),
    "gamma": dist.Gamma(2.0, 0.1),
    "inverse gamma": dist.InverseGamma(2.0, 3.0),
    "log-normal": dist.LogNormal(0.5, 0.3),
    "truncated": dist.TruncatedNormal(0.0, 2.0, low=0.0),
    "on the variance": dist.TransformedDistribution(dist.Gamma(2.0, 3.0), PowerTransform(0.5)),
    "vector": dist.Normal(np.zeros(2), np.array([1.0, 3.0])),
    "to_event": dist.Normal(np.zeros(2), 1.0).to_event(1),
    "expanded": dist.HalfNormal(2.0).expand([3]),
}


@pytest.mark.parametrize("name", BELIEFS)
def test_hyperpriors_survive_as_json(name):
    import json

    hyperprior = BELIEFS[name]
    plain = json.loads(json.dumps(hyperprior_to_plain(hb.HyperPrior(mu=hyperprior))))
    again: Any = hyperprior_from_plain(plain).mu
    value = np.full(hyperprior.shape(), 0.7)
    # the same floats go through the same code, but for their round trip through text, exact too
    np.testing.assert_array_equal(again.log_prob(value), hyperprior.log_prob(value))


@pytest.mark.slow
def test_improper_and_lkj_survive():
    flat = dist.ImproperUniform(constraints.positive, (), ())
    again = hyperprior_from_plain(
        hyperprior_to_plain(hb.HyperPrior(tau=flat, corr=dist.LKJ(3, concentration=1.5)))
    )
    assert again.tau.support is constraints.positive or again.tau.support == flat.support
    np.testing.assert_allclose(again.corr.log_prob(np.eye(3)), dist.LKJ(3, 1.5).log_prob(np.eye(3)))


def test_a_hyperprior_that_no_file_can_keep_is_named():
    class Mine(dist.Normal):
        pass

    with refuses("Mine", "datatree"):
        hyperprior_to_plain(hb.HyperPrior(mu=Mine(0.0, 1.0)))


def test_format_of_a_newer_package_is_refused(radon_complete_pooling, tmp_path, monkeypatch):
    radon_complete_pooling.save(tmp_path / "fit.nc")
    monkeypatch.setattr(loading, "FORMAT", 0)
    with refuses("newer"):
        hb.load(tmp_path / "fit.nc")
