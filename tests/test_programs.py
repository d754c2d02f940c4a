"""A second fit compiles nothing: other data of the same shape, or with a task more, find programs.

``python -m benchmarks programs`` counts all methods; here stands one of each kind of program.
"""

from __future__ import annotations

import warnings

import jax
import numpy as np
import pandas as pd
import pytest

import hierbayes as hb

EVENT = "/jax/core/compile/backend_compile_duration"
COMPILED = []
"""A listener cannot be taken away again: one for all tests of a process."""


def _heard(event: str, seconds: float, **more: object) -> None:
    del more
    if event == EVENT:
        COMPILED.append(seconds)


jax.monitoring.register_event_duration_secs_listener(_heard)


def tasks_of(num_tasks: int, seed: int, family: str = "gaussian", each: int = 4):
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(num_tasks), each)
    x = rng.normal(size=g.size)
    f = 0.3 + 0.5 * rng.normal(size=num_tasks)[g] + 0.4 * x
    y = rng.normal(f, 0.5) if family == "gaussian" else rng.poisson(np.exp(f))
    frame = pd.DataFrame({"g": g, "x": x, "y": y})
    return hb.from_formula("y ~ x + (x | g)", frame, family=family)


def compiled_by(fitted, *given, **settings) -> int:
    before = len(COMPILED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        np.asarray(fitted(*given, **settings).theta)
    return len(COMPILED) - before


NUTS = dict(method="nuts", num_draws=4, num_warmup=4, num_chains=2, progress=False)


@pytest.mark.parametrize(
    ("method", "settings", "family"),
    [
        (hb.empirical_bayes, dict(num_draws=2), "gaussian"),
        (hb.full_bayes, dict(num_draws=20, num_chains=2), "gaussian"),
        (hb.maml, dict(num_steps=2, num_meta_steps=5), "gaussian"),
        (hb.imaml, dict(num_meta_steps=5), "poisson"),
    ],
    ids=lambda value: getattr(value, "__name__", "") if callable(value) else "",
)
def test_other_data_and_a_task_more_compile_nothing(method, settings, family):
    """21 tasks and 22, of 84 rows and 88, stand on one rung: 22 and 88."""
    compiled_by(method, *tasks_of(21, 0, family), **settings)
    assert compiled_by(method, *tasks_of(21, 1, family), **settings) == 0
    assert compiled_by(method, *tasks_of(22, 2, family), **settings) == 0


def test_joint_nuts_of_the_same_shape_compiles_nothing():
    compiled_by(hb.full_bayes, *tasks_of(5, 0), **NUTS)
    assert compiled_by(hb.full_bayes, *tasks_of(5, 1), seed=3, **NUTS) == 0


def test_episodes_of_the_same_shape_compile_nothing():
    network = hb.likelihoods.Network.mlp([1, 3, 1])
    model = hb.HierarchicalModel(network, hb.priors.Gaussian(correlated=False))
    loop = dict(num_steps=1, num_meta_steps=4, batch_size=2, held_out=3, progress=False)

    def fitted(seed):
        return compiled_by(hb.maml, model, hb.datasets.sinusoids(3), seed=seed, **loop)

    fitted(0)
    assert fitted(1) == 0


def test_another_size_is_compiled():
    """The control: programs are counted."""
    compiled_by(hb.empirical_bayes, *tasks_of(21, 0))
    assert compiled_by(hb.empirical_bayes, *tasks_of(40, 0)) > 0


@pytest.mark.parametrize("kind", ["classes", "unhashable sampler"])
def test_sources_of_every_kind_are_trained_on(kind):
    """What a source draws by is part of a program: labels and a user's object need no hash."""
    rng = np.random.default_rng(0)
    network = hb.likelihoods.Network.mlp([2, 3, 2])
    outcome = hb.likelihoods.Categorical(2)
    if kind == "classes":
        episodes = hb.Episodes.from_classes(
            rng.normal(size=(40, 2)), np.repeat(list("abcd"), 10), ways=2, shots=1, queries=2
        )
        network = hb.likelihoods.Network(network.apply, network.init, outcome)
    else:

        class Sampler:
            __hash__ = None  # type: ignore[assignment]

            def __call__(self, key, num_rows):
                x = jax.random.normal(key, (num_rows, 2))
                return x, x.sum(1)

        episodes = hb.Episodes.from_sampler(Sampler(), 2, 2)
        network = hb.likelihoods.Network.mlp([2, 3, 1])
    model = hb.HierarchicalModel(network, hb.priors.Gaussian(correlated=False))
    fit = hb.maml(model, episodes, num_steps=1, num_meta_steps=2, batch_size=2, held_out=2,
                  progress=False)  # fmt: skip
    assert np.isfinite(fit.phi["mu"]).all()
