"""φ as one vector: there and back, its Jacobian and its errors, and priors with ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from assertions import close

import hierbayes as hb
from hierbayes.numerics import float64
from hierbayes.phi.space import Part, Space, standard_errors

PARTS = [
    Part("mu", ("coef",), (3,), learned=(0, 2)),
    Part("tau", ("coef",), (3,), "spread"),
    Part("corr", ("coef", "coef_bis"), (3, 3), "correlation", blocks=((0, 2),)),
    Part("sigma", (), (), "hyperprior"),
    Part("share", (), (), "hyperprior"),
    Part("size", ("coef",), (3,), "positive"),
]
BELIEFS = {
    "mu": dist.Normal(np.zeros(3), 2.0).to_event(1), "tau": dist.HalfNormal(np.ones(3)).to_event(1),
    "corr": dist.LKJ(2, 2.0), "sigma": dist.HalfNormal(1.0), "share": dist.Uniform(-1.0, 3.0),
    "size": dist.HalfNormal(np.ones(3)).to_event(1),
}  # fmt: skip
CORR = np.array([[1.0, 0.0, 0.3], [0.0, 1.0, 0.0], [0.3, 0.0, 1.0]])
PHI = {
    "mu": np.array([0.5, 0.0, -2.0]), "tau": np.array([0.1, 2.0, 5.0]), "corr": CORR,
    "sigma": np.asarray(0.7), "share": np.asarray(2.5), "size": np.array([0.01, 1.0, 30.0]),
}  # fmt: skip


@pytest.fixture(scope="module")
def space():
    with float64():
        return Space.of(
            PARTS, units={"mu": 2.0, "tau": np.array([1.0, 2.0, 3.0])}, hyperpriors=BELIEFS,
            starts={"sigma": 3.0, "size": 2.0},
        )  # fmt: skip


@pytest.mark.parametrize("bounded", [True, False])
def test_phi_comes_back(space, bounded):
    with float64():
        space = space if bounded else space.opened()
        x = space.x(PHI)
        back = space.phi(x)
    assert len(x) == space.size == 2 + 3 + 1 + 1 + 1 + 3
    for name, value in PHI.items():
        close(np.asarray(back[name]), value, rtol=1e-12, atol=1e-12)
    assert np.isfinite(space.lower).sum() == (3 if bounded else 0)


def test_the_middle_of_a_space_is_where_it_says(space):
    with float64():
        middle = {n: np.asarray(v) for n, v in space.phi(np.zeros(space.size)).items()}
    assert middle["sigma"] == pytest.approx(3.0)
    assert middle["share"] == pytest.approx(1.0)  # of the prior's own range
    close(middle["size"], np.full(3, 2.0), rtol=1e-12)
    assert space.at["no such part"] == slice(0)
    assert "no such part" not in space.at


def test_densities_have_their_jacobians(space):
    """Against the derivative of the entries of φ by JAX, of all parts but the correlations."""
    with float64():
        some = space.only("mu", "tau", "sigma", "share", "size").opened()
        x = some.x(PHI) + 0.1

        def entries(v):
            phi = some.phi(v)
            return jnp.concatenate([p.entries(phi[p.name]) for p in some.parts])

        _, log_det = np.linalg.slogdet(np.asarray(jax.jacfwd(entries)(x)))
        phi = some.phi(x)
        hyperpriors = sum(float(jnp.sum(BELIEFS[n].log_prob(v))) for n, v in phi.items())
        assert float(some.placed(x, BELIEFS).log_density) == pytest.approx(
            hyperpriors + log_det, rel=1e-10
        )


def test_errors_go_by_the_slope_of_phi(space):
    """Var φ = (dφ/dx)² Var x where x's entries are independent; of mu's pinned entry none."""
    with float64():
        x = space.x(PHI)
        spread = np.linspace(0.01, 0.02, space.size)
        along = space.along(x, np.ones(space.size, bool), np.diag(1 / spread**2))
    errors = standard_errors(along)
    assert "corr" not in errors
    close(errors["mu"], np.array([2.0 * spread[0], 0.0, 2.0 * spread[1]]), rtol=1e-9)
    close(errors["sigma"], 0.7 * spread[space.at["sigma"]][0], rtol=1e-9)
    inside = 3.5 * 0.5 / 4.0  # of a logistic between −1 and 3, at 2.5
    close(errors["share"], inside * spread[space.at["share"]][0], rtol=1e-9)


def test_nothing_inside_has_no_errors(space):
    with float64():
        x = space.x(PHI)
        along = space.along(x, np.zeros(space.size, bool), np.zeros((0, 0)))
    assert np.isnan(standard_errors(along)["tau"]).all()


def test_two_spaces_make_one(space):
    with float64():
        both = space.only("mu", "tau", "corr") + space.only("sigma", "share", "size")
        close(both.x(PHI), space.x(PHI), rtol=0, atol=0)
    with pytest.raises(KeyError, match="gamma"):
        _ = space["gamma"]


# ---------------------------------------------------------------------- priors that end


def rows(family="gaussian", num_tasks=10, n=8):
    rng = np.random.default_rng(3)
    task, x = np.repeat(np.arange(num_tasks), n), rng.normal(size=num_tasks * n)
    f = 0.5 * x + rng.normal(size=num_tasks)[task]
    y = f + rng.normal(size=len(x)) if family == "gaussian" else rng.gamma(2.0, np.exp(f) / 2.0)
    return pd.DataFrame({"y": y, "x": x, "g": task})


@pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")
def test_a_prior_that_ends_below_the_estimate_cuts_draws_off():
    """The posterior under Uniform(0, c) is that under Uniform(0, 50) where σ < c.

    c lies below the maximum likelihood σ, where searches would start. Four standard errors, of
    some 1,000 independent draws.
    """
    end = 0.97 * hb.empirical_bayes(*hb.from_formula("y ~ x + (1 | g)", rows())).phi["sigma"]

    def drawn(top):
        given = hb.HyperPrior(sigma=dist.Uniform(0.0, top), tau=dist.HalfNormal(2.0))
        model, tasks = hb.from_formula("y ~ x + (1 | g)", rows(), hyperprior=given)
        draws = hb.full_bayes(model, tasks, progress=False).phi_draws
        return {n: draws[n].reshape(-1) for n in ("mu", "tau", "sigma")}

    cut, whole = drawn(float(end)), drawn(50.0)
    kept = whole["sigma"] < end
    assert kept.sum() > 800
    assert cut["sigma"].max() < end
    for name, values in cut.items():
        error = values.std() * np.hypot(1 / np.sqrt(1_000), 1 / np.sqrt(0.6 * kept.sum()))
        assert abs(values.mean() - whole[name][kept].mean()) < 4 * error, name


def test_an_estimate_at_the_end_of_its_prior_says_so():
    """The shape of gamma outcomes is about 2, and its prior ends at 1.5."""
    given = hb.HyperPrior(extra={"shape": dist.Uniform(0.5, 1.5)})
    model, tasks = hb.from_formula(
        "y ~ x + (1 | g)", rows("gamma"), family="gamma", hyperprior=given
    )
    with pytest.warns(hb.FitWarning, match="shape is estimated as 1.5, an end of where its prior"):
        fit = hb.empirical_bayes(model, tasks, evidence="laplace")
    assert fit.phi["shape"] == pytest.approx(1.5, abs=1e-3)
    assert np.isnan(fit.standard_errors["shape"])
    for name in ("mu", "tau", "beta"):
        assert (fit.standard_errors[name] > 0).all()


@pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")
def test_a_mode_keeps_off_the_end_of_a_prior():
    """The density is that of σ's logit between the ends, which goes to zero there."""
    given = hb.HyperPrior(sigma=dist.Uniform(0.0, 0.8))
    model, tasks = hb.from_formula("y ~ x + (1 | g)", rows(), hyperprior=given)
    fit = hb.empirical_bayes(model, tasks, "map")
    assert 0.7 < fit.phi["sigma"] < 0.8
    assert 0 < fit.standard_errors["sigma"] < 0.05
    assert np.isfinite(fit.standard_errors["mu"]).all()


def test_no_direction_inside_says_so():
    """All means pinned, τ̂ = 0: there is nothing that a standard error could be of."""
    task = np.repeat(np.arange(6), 4)
    frame = pd.DataFrame({"z": np.tile([0.0, 1.0, 0.0, 1.0], 6), "g": task})
    _, tasks = hb.from_formula("z ~ 1 + (1 | g)", frame, family="bernoulli")
    model = hb.HierarchicalModel(
        hb.likelihoods.Bernoulli(), hb.priors.Gaussian(zero_mean=("Intercept",))
    )
    with pytest.warns(hb.FitWarning, match="standard errors of tau are NaN"):
        fit = hb.empirical_bayes(model, tasks)
    assert fit.phi["tau"] == pytest.approx(0.0)
    assert np.isnan(fit.standard_errors["tau"]).all()


# -------------------------------------------------------------------- a model's φ elsewhere


def test_steps_from_an_array_need_no_names_of_the_prior():
    """``zero_mean`` names a coefficient that arrays do not have."""
    model, _ = hb.from_formula("y ~ 1 + (1 + x | g)", rows())
    x = np.column_stack([np.ones(6), np.arange(6.0)])
    found = hb.equivalent_prior(
        model, (x, x @ [1.0, 0.1]), [0.0, 0.0], num_steps=5, step_size=0.01, sigma=1.0
    )
    assert np.isfinite(found.posterior_mean).all()


def test_correlations_of_a_file_do_no_harm_to_a_model_without(tmp_path):
    model, tasks = hb.from_formula("y ~ 1 + x + (1 + x | g)", rows())
    hb.empirical_bayes(model, tasks).save(tmp_path / "fit.nc")
    plain = hb.HierarchicalModel(hb.likelihoods.Gaussian(), hb.priors.Gaussian(correlated=False))
    assert hb.load(tmp_path / "fit.nc", model=plain).phi["corr"].shape == (2, 2)
