"""Kinds of posteriors, by the same questions: f of rows, draws, and other columns."""

from __future__ import annotations

import numpy as np
import pytest
from assertions import close

from hierbayes.adaptation import Draws, FlatPrior, Mixture, Normal, Point, WithShared
from hierbayes.priors.column_map import Column, ColumnMap

J, D, P = 5, 2, 1
RNG = np.random.default_rng(0)
MEAN = RNG.normal(size=(J, D))
ROOTS = RNG.normal(size=(J, D, D))
SPREAD = ROOTS @ ROOTS.swapaxes(1, 2)
TASKS, OF_ROW = np.array([3, 0]), np.array([0, 0, 1])
X = RNG.normal(size=(3, D))
CENTRES = MEAN + RNG.normal(size=(40, J, D))
SPREADS = np.broadcast_to(0.3 * SPREAD, (40, J, D, D))
MAP = ColumnMap((Column(), Column(mean=3.0, sd=2.0)), (Column(sd=5.0),), (), (0, 1.0))
"""Of an intercept and a column x' = (x − 3) / 2."""


def normals(positions):
    return CENTRES[:, positions], SPREADS[:, positions]


def moments():
    mean = CENTRES.mean(0)
    away = CENTRES - mean
    return mean, np.einsum("sji,sjk->jik", away, away) / len(CENTRES) + SPREADS[0]


KINDS = {
    "point": Point(MEAN),
    "normal": Normal(MEAN, SPREAD),
    "flat prior": FlatPrior(MEAN, SPREAD, np.zeros((J, D, D)), np.zeros((J, D), bool)),
    "mixture": Mixture(*moments(), normals, together=False),
    "draws": Draws.of(CENTRES),
}


@pytest.mark.parametrize("kind", KINDS)
def test_f_has_the_mean_that_theta_has(kind):
    posterior = KINDS[kind]
    f = posterior.linear(X, TASKS, OF_ROW)
    at = TASKS[OF_ROW]
    close(f.mean.mean(0), np.einsum("nk,nk->n", X, posterior.mean[at]), rtol=1e-12, atol=1e-12)
    if posterior.covariance is None:
        assert f.variance is None
        assert not posterior.is_distribution
        return
    # the variance within cases, and that between them
    total = np.mean(f.variance * np.ones_like(f.mean), axis=0) + f.mean.var(0)
    size = len(f.mean)
    total *= size / (size - 1) if kind == "draws" else 1.0
    close(total, np.einsum("ni,nij,nj->n", X, posterior.covariance[at], X), rtol=1e-9, atol=1e-12)
    close(posterior.sd**2, np.diagonal(posterior.covariance, axis1=1, axis2=2), rtol=1e-12)


@pytest.mark.parametrize("kind", ["normal", "mixture"])
def test_drawn_thetas_have_the_moments(kind):
    """Four standard errors, of 20,000 independent draws."""
    thetas = KINDS[kind].linear(X, TASKS, OF_ROW).thetas
    drawn = thetas(np.zeros(20_000, int), np.random.default_rng(1))
    sd = KINDS[kind].sd[TASKS]
    assert (np.abs(drawn.mean(0) - KINDS[kind].mean[TASKS]) < 4 * sd / np.sqrt(20_000)).all()
    assert (np.abs(drawn.std(0) / sd - 1) < 4 / np.sqrt(2 * 20_000)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_f_is_the_same_in_other_columns(kind):
    """xᵀθ of a row does not know in which columns it is written."""
    posterior = KINDS[kind]
    inside = np.column_stack([np.ones(3), X[:, 1]])
    outside = np.column_stack([np.ones(3), 3.0 + 2.0 * X[:, 1]])
    here = posterior.linear(inside, TASKS, OF_ROW)
    there = posterior.outward(MAP, None).linear(outside, TASKS, OF_ROW)
    close(there.mean, here.mean, rtol=1e-9, atol=1e-9)
    if here.variance is not None:
        close(np.asarray(there.variance), np.asarray(here.variance), rtol=1e-9, atol=1e-9)


def test_what_is_shared_moves_with_theta():
    """θ outside is P θ' + S β': the variance of that, written out."""
    cross, of_shared = RNG.normal(size=(J, D, P)), np.array([[2.0]])
    found = WithShared(MEAN, SPREAD, cross, of_shared).outward(MAP, np.array([[0.5]]))
    joint = np.block([
        [SPREAD, cross], [cross.swapaxes(1, 2), np.broadcast_to(of_shared, (J, P, P))]
    ])  # fmt: skip
    to = np.column_stack([MAP.of_theta, MAP.from_shared])
    close(found.covariance, to @ joint @ to.T, rtol=1e-12, atol=1e-12)


def test_rows_that_lean_on_nothing_are_told():
    blind = np.zeros((J, D, D))
    blind[0, 1, 1] = 1.0
    posterior = FlatPrior(MEAN, SPREAD, blind, np.zeros((J, D), bool))
    x = np.array([[1.0, 0.0], [1.0, 0.5], [1.0, 0.5]])
    assert posterior.unidentified(x, np.array([0, 0, 1])).tolist() == [False, True, False]
    assert posterior.identified.sum() == J * D - 1
    assert np.isnan(posterior.sd[0, 1])


def test_one_draw_has_no_covariance():
    assert Draws.of(CENTRES[:1]).covariance is None
    with pytest.raises(ValueError, match="no distribution"):
        Point(MEAN).draw(np.random.default_rng(0), 3)
