"""Small linear algebra against NumPy's dense one."""

import jax
import numpy as np
import pytest
from assertions import close

from hierbayes.numerics import eliminate, float64, normal_draw

SIZES = [1, 2, 3, 4, 5, 18]
"""Written out up to 4, LAPACK up to 16, then column by column."""


@pytest.fixture
def batch(rng, request):
    """Seven positive definite matrices, the batch last, and columns to go with them."""
    d = request.param
    roots = rng.normal(size=(7, d, d))
    matrices = roots @ roots.transpose(0, 2, 1) + 0.5 * np.eye(d)
    return matrices, rng.normal(size=(7, d, 3))


# 1e-9: condition numbers up to 1e4, times rounding, with room
@pytest.mark.parametrize("batch", SIZES, indirect=True)
def test_elimination_gives_quadratic_forms_and_determinants(batch):
    matrices, columns = batch
    with float64():
        a, b = np.moveaxis(matrices, 0, -1), np.moveaxis(columns, 0, -1)
        rows, pivots = jax.jit(eliminate)(a, b)
        found = sum(
            np.einsum("kn,mn,n->nkm", row, row, 1 / pivot)
            for row, pivot in zip(np.asarray(rows), np.asarray(pivots), strict=True)
        )
        log_det = np.log(np.asarray(pivots)).sum(0)
    expected = np.swapaxes(columns, 1, 2) @ np.linalg.solve(matrices, columns)
    close(found, expected, rtol=1e-9, atol=1e-9)
    close(log_det, np.linalg.slogdet(matrices)[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", SIZES, indirect=True)
def test_a_normal_draw_is_the_mean_and_a_root_of_the_covariance_times_noise(batch):
    matrices, columns = batch
    d = matrices.shape[1]
    with float64():
        precision, pull = np.moveaxis(matrices, 0, -1), columns[:, :, 0].T
        draw = jax.jit(normal_draw)
        mean = np.stack(draw(precision, pull, np.zeros((d, 7))))
        root = np.stack(
            [np.stack(draw(precision, np.zeros((d, 7)), np.outer(unit, np.ones(7))))
             for unit in np.eye(d)], axis=1,
        )  # fmt: skip
        both = np.stack(draw(precision, pull, np.ones((d, 7))))
    close(mean.T, np.linalg.solve(matrices, columns[:, :, :1])[:, :, 0], rtol=1e-9, atol=1e-9)
    close(np.einsum("ikn,jkn->nij", root, root), np.linalg.inv(matrices), rtol=1e-9, atol=1e-9)
    close(both, mean + root.sum(1), rtol=1e-9, atol=1e-9)
