"""A fit goes through pickle, cloudpickle and deepcopy, to other processes and into caches."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hierbayes as hb
from hierbayes.fit.method import Derived

QUICK = dict(num_draws=20, num_warmup=20, num_chains=1, progress=False)


def of(data, formula, likelihood=None, prior=None, **arguments):
    model, tasks = hb.from_formula(formula, data, likelihood, **arguments)
    if prior is not None:
        model = hb.HierarchicalModel(model.likelihood, prior, model.hyperprior, model.encoder)
    return model, tasks


def sleep():
    return of(hb.datasets.sleepstudy(), "reaction ~ 1 + days + (1 + days | subject)")


def schools(likelihood=None, prior=None):
    data = hb.datasets.eight_schools()
    return of(
        data, "y ~ 1 + (1 | school)", likelihood, prior, known_se=None if likelihood else "se"
    )


def network():
    rng = np.random.default_rng(0)
    arrays = [(rng.normal(size=(6, 1)), rng.normal(size=6)) for _ in range(4)]
    return (
        hb.HierarchicalModel(
            hb.likelihoods.Network.mlp([1, 3, 1], activation=jnp.tanh), hb.priors.Gaussian()
        ),
        hb.Tasks.from_arrays(arrays),
    )


def implied():
    network = hb.likelihoods.Network.mlp([1, 3, 1])
    model = hb.HierarchicalModel(network, hb.priors.Gaussian(correlated=False))
    episodes = hb.datasets.sinusoids(5)
    fit = hb.maml(model, episodes, num_steps=1, num_meta_steps=2, batch_size=5, progress=False)
    return hb.meta.implied_posterior(fit, *episodes.draw(4))


def at_a_point():
    model, tasks = network()
    size = model.likelihood.weights.size
    phi = {"mu": np.linspace(-1, 1, size), "sigma": np.asarray(0.7)}
    steps = hb.adaptation.GradientSteps(2, 0.05)
    return hb.fit.Fit(Derived("steps"), model, model.tasks(tasks), phi, steps)


FITS = {
    "no pooling": lambda: hb.no_pooling(*sleep()),
    "complete pooling": lambda: hb.complete_pooling(*sleep()),
    "bootstrap": lambda: hb.empirical_bayes(*schools(), intervals="bootstrap"),
    "a key for a seed": lambda: hb.empirical_bayes(*schools(), seed=jax.random.key(3)),
    "full Bayes": lambda: hb.full_bayes(*schools(), **QUICK),
    "MAML": lambda: hb.maml(*sleep(), num_meta_steps=3),
    "Student-t prior": lambda: hb.empirical_bayes(*schools(prior=hb.priors.StudentT())),
    "Student-t likelihood": lambda: hb.complete_pooling(*schools("student_t")),
    "network at a point": at_a_point,
    "network": lambda: hb.maml(*network(), num_steps=2, num_meta_steps=2, progress=False),
    "its implied posterior": implied,
}


def through_cloudpickle(fit):
    import cloudpickle

    return pickle.loads(cloudpickle.dumps(fit))


COSTLY = {"network", "its implied posterior", "Student-t prior", "Student-t likelihood", "MAML"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in COSTLY else []) for name in FITS],
)
def test_every_kind_of_fit_comes_back_equal(name):
    """Fresh, and after everything that is made when first read has been made."""
    fit = FITS[name]()
    fresh = pickle.dumps(fit)
    said = fit.predict()
    for again in (
        pickle.loads(fresh), pickle.loads(pickle.dumps(fit)), through_cloudpickle(fit),
        copy.deepcopy(fit),
    ):  # fmt: skip
        assert again.method == fit.method
        for key in fit.phi:
            np.testing.assert_array_equal(again.phi[key], fit.phi[key])
        np.testing.assert_array_equal(again.theta.values, fit.theta.values)
        found = again.predict()
        np.testing.assert_array_equal(found.mean, said.mean)
        np.testing.assert_array_equal(found.sd, said.sd)
