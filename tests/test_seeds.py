"""Seeds: integers from 0 to 2⁶³ − 1 or one JAX key; all else is refused before any computation."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from assertions import refuses

import hierbayes as hb

BAD = [1.5, "1", None, -1, True, 2**63, np.float32(2.0), [1], np.array([1, 2]),
       jax.random.split(jax.random.key(0), 2)]  # fmt: skip


@cache
def schools() -> Any:
    return hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(), known_se="se")


@cache
def point() -> hb.Fit:
    return hb.empirical_bayes(*schools(), num_draws=10, num_chains=1)


@cache
def network() -> hb.HierarchicalModel:
    return hb.HierarchicalModel(
        hb.likelihoods.Network.mlp([1, 4, 1]), hb.priors.Gaussian(correlated=False)
    )


@cache
def waves() -> hb.Episodes:
    """One source: its sampler is compiled once."""
    return hb.datasets.sinusoids(3)


DOORS = {
    "full_bayes": lambda s: hb.full_bayes(*schools(), seed=s),
    "empirical_bayes": lambda s: hb.empirical_bayes(*schools(), seed=s),
    "maml": lambda s: hb.maml(*schools(), seed=s),
    "maml on episodes": lambda s: hb.maml(network(), waves(), seed=s),
    "imaml": lambda s: hb.imaml(*schools(), seed=s),
    "reptile": lambda s: hb.reptile(*schools(), seed=s),
    "reptile on episodes": lambda s: hb.reptile(network(), waves(), seed=s),
    "llama": lambda s: hb.meta.llama(network(), waves(), seed=s),
    "abml": lambda s: hb.meta.abml(network(), waves(), seed=s),
    "split": lambda s: schools()[1].split(seed=s),
    "hold_out": lambda s: schools()[1].hold_out(seed=s),
    "Episodes.draw": lambda s: waves().draw(2, seed=s),
    "simulate": lambda s: hb.simulation.simulate(*schools(), seed=s),
    "check_calibration": lambda s: hb.check_calibration(*schools(), seed=s),
    "interval_coverage": lambda s: hb.checks.interval_coverage(point(), seed=s),
    "laplace_check": lambda s: hb.checks.laplace_check(point(), seed=s),
    "equivalence_report": lambda s: hb.equivalence_report(point(), point(), seed=s),
    "adapt": lambda s: point().adapt(schools()[1], seed=s),
    "on": lambda s: point().on(schools()[1], seed=s),
    "Prediction.draws": lambda s: point().predict().draws(seed=s),
    "LearnedPrior.draws": lambda s: point().prior.draws(3, seed=s),
}


@pytest.mark.parametrize("place", DOORS)
def test_what_is_no_seed_is_refused_by_name_at_every_door(place):
    for bad in BAD:
        with refuses("seed must be an integer from 0 to 2**63 - 1"):
            DOORS[place](bad)


def test_integers_of_any_kind_and_keys_are_seeds():
    tasks = schools()[1]
    rows = [waves().draw(1, seed=s)[0].outcome
            for s in (7, np.int8(7), np.uint64(7), np.array(7), jax.numpy.asarray(7))]  # fmt: skip
    assert all(np.array_equal(rows[0], other) for other in rows)
    typed, old = jax.random.key(7), jax.random.PRNGKey(7)
    parts = [tasks.hold_out(0.5, seed=s)[0].rows.tolist() for s in (typed, old)]
    assert parts[0] == parts[1]


def test_a_large_seed_is_not_the_small_one_that_32_bits_leave_of_it():
    draws = [waves().draw(1, seed=s)[0].outcome for s in (5, 2**32 + 5)]
    assert not np.array_equal(*draws)
