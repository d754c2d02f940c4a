"""What a user forbids JAX of their own code, promotion of types and ranks, does not stop a fit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import hierbayes as hb


def fitted(family: str) -> list[Any]:
    """φ̂, and a prediction for new tasks: of one function, so that both runs ask the same."""
    rows = hb.datasets.sleepstudy().assign(slow=lambda d: (d.reaction > 300).astype(int))
    outcome = {"gaussian": "reaction", "bernoulli": "slow"}[family]
    model, tasks = hb.from_formula(f"{outcome} ~ 1 + days + (1 | subject)", rows, family=family)
    fit = hb.empirical_bayes(model, tasks)
    new = fit.predict(tasks, target="new")
    return [*fit.phi.values(), fit.theta.values, fit.log_evidence, new.mean]


@pytest.mark.parametrize("family", ["gaussian", pytest.param("bernoulli", marks=pytest.mark.slow)])
def test_strict_promotion_changes_nothing(family):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        strict = fitted(family)
    for here, there in zip(strict, fitted(family), strict=True):
        np.testing.assert_array_equal(here, there)  # the same programs


def test_full_bayes_simulates_and_samples_under_strict_promotion():
    schools = hb.from_formula("y ~ 1 + (1 | school)", hb.datasets.eight_schools(), known_se="se")
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        fit = hb.full_bayes(*schools, num_draws=50, num_chains=2)
        simulated = hb.simulation.simulate(*schools).tasks
        assert np.isfinite(fit.adapt(simulated).theta.values).all()
