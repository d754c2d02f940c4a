"""The search for φ̂ where the evidence is an integral: slopes of all of φ, samples, start of draws.

Rung (b): finite differences. Rung (c): a search that begins on a sample ends where one without it
does; a rough density is Laplace's.
"""

import jax
import numpy as np
import pandas as pd
import pytest
from assertions import close, gradient

import hierbayes as hb
from hierbayes.adaptation import Laplace, Quadrature
from hierbayes.adaptation.quadrature import grid
from hierbayes.meta import approximate_evidence, by_quadrature
from hierbayes.meta.approximate_evidence import maximise_approximate
from hierbayes.meta.by_evidence import phi_and_density
from hierbayes.meta.criterion import Criterion
from hierbayes.numerics import float64


def data(family, num_tasks, rows=4, seed=0):
    """Rows with a task's own column, and one that all tasks share."""
    rng = np.random.default_rng(seed)
    n = num_tasks * rows
    g = np.repeat(np.arange(num_tasks), rows)
    x, z = rng.normal(size=n), rng.integers(0, 2, n) * 1.0
    theta = np.array([0.3, -0.2]) + rng.normal(size=(num_tasks, 2)) * [0.7, 0.4]
    f = theta[g, 0] + theta[g, 1] * x + 0.5 * z
    y = {
        "bernoulli": lambda: rng.random(n) < 1 / (1 + np.exp(-f)),
        "poisson": lambda: rng.poisson(np.exp(f)),
        "negative_binomial": lambda: rng.poisson(np.exp(f) * rng.gamma(3.0, 1 / 3.0, n)),
        "gamma": lambda: rng.gamma(2.0, np.exp(f) / 2.0),
    }[family]()
    return pd.DataFrame({"y": 1.0 * y, "x": x, "z": z, "g": g})


@pytest.mark.parametrize(
    "family",
    [
        "poisson",
        *(
            pytest.param(f, marks=pytest.mark.slow)
            for f in ("bernoulli", "negative_binomial", "gamma")
        ),
    ],
)
def test_slopes_of_all_of_phi_are_differences(family):
    """μ, β, τ, correlation and the family's own: to the nodes' error, 1e-6 of the slope."""
    frame = data(family, 6)
    model, tasks = hb.from_formula("y ~ x + z + (1 + x | g)", frame, family=family)
    with float64():
        how = Quadrature(21)
        criterion = Criterion(model.resolve(tasks), tasks, how, with_hyperprior=False)
        at = np.linspace(0.2, 0.9, criterion.space.size)
        claimed = criterion(at)[1]
        gradient(lambda v: criterion(v)[0], at, claimed, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")
@pytest.mark.parametrize("with_hyperprior", [False, True])
def test_a_sample_shows_the_way_and_nothing_else(with_hyperprior, monkeypatch):
    """2,000 tasks of which 125 are the sample: the same maximum, to 1e-6 of a standard error."""
    model, tasks = hb.from_formula("y ~ 1 + z + (1 | g)", data("poisson", 2000), family="poisson")
    kind = dict(quadrature=True, with_hyperprior=with_hyperprior)
    resolved = model.resolve(tasks)
    whole = maximise_approximate(resolved, tasks, **kind)
    monkeypatch.setattr(approximate_evidence, "LEAST_SAMPLE", 100)
    sampled = []
    take = hb.Tasks.take
    monkeypatch.setattr(
        hb.Tasks, "take", lambda self, at: sampled.append(len(at)) or take(self, at)
    )
    found = maximise_approximate(resolved, tasks, **kind)
    assert sampled == [125]
    for name, error in whole.optimum.standard_errors.items():
        gap = np.abs(found.optimum.phi[name] - whole.optimum.phi[name]) / error
        assert gap.max() < 1e-6
    close(found.optimum.log_evidence, whole.optimum.log_evidence, rtol=1e-10)


@pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")
def test_a_sample_without_spread_leaves_the_boundary_to_all_tasks(monkeypatch):
    """No spread between tasks: τ̂ = 0, found with and without a sample."""
    rng = np.random.default_rng(4)
    frame = pd.DataFrame({"g": np.repeat(np.arange(1600), 2), "y": rng.poisson(2.0, 3200) * 1.0})
    frame["y"] = np.minimum(frame["y"], 3.0)  # less spread than Poisson's own
    model, tasks = hb.from_formula("y ~ 1 + (1 | g)", frame, family="poisson")
    monkeypatch.setattr(approximate_evidence, "LEAST_SAMPLE", 100)
    with pytest.warns(hb.FitWarning, match="tau"):
        fit = hb.empirical_bayes(model, tasks, evidence="quadrature", num_draws=1)
    assert fit.phi["tau"][0] == 0


def test_nodes_are_those_of_gauss_and_hermite():
    """Moments of a standard normal, which n nodes have exactly up to order 2n − 1."""
    for d, n in ((1, 5), (2, 5), (3, 5)):
        rule = grid(n, d)
        places = rule.places[: rule.count]
        weights = np.exp(rule.log_weights[: rule.count] - 0.5 * (places**2).sum(1))
        close(weights.sum(), 1.0, rtol=1e-12)
        close(weights @ places[:, 0] ** 4, 3.0, rtol=1e-12)
        close(weights @ np.prod(places**2, axis=1), 1.0, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")
def test_a_rough_density_is_laplaces_where_draws_are():
    """Two Newton steps from where modes are expected, against climbs: 1e-4 for nine in ten draws.

    What is left is accepted or refused by the density itself.
    """
    model, tasks = hb.from_formula(
        "y ~ x + z + (1 + x | g)", data("bernoulli", 40, rows=12), family="bernoulli"
    )
    resolved = model.resolve(tasks)
    with float64():
        target = by_quadrature.ByQuadrature(resolved, tasks)
        x = target.start
        target.prepare(target.units, x)
        rng = np.random.default_rng(0)
        xs = x + 0.3 * rng.normal(size=(50, len(x)))
        rough = target.points(target.units, xs, xs[:, :0], rough=True)
        given, made = target.data, target.made

        @jax.jit
        def laplace(point):
            phi, total = phi_and_density(made, given.around, point)
            return total + Laplace.given(made.model, phi, given.tasks.rows).log_normaliser.sum()

        right = np.array([float(laplace(point)) for point in xs])
        gap = np.abs(rough.log_density - right)
        assert np.quantile(gap, 0.9) < 1e-4
        dear = target.points(target.units, xs, xs[:, :0])
        assert np.std(dear.log_density - rough.log_density) < 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hierbayes.FitWarning")
@pytest.mark.parametrize(("kind", "seed"), [("laplace", 11), ("laplace", 18), ("quadrature", 11)])
def test_more_freedom_is_never_worse(kind, seed):
    """τ = 0 is stationary; here a search that stayed there had a larger model fit worse."""
    rng = np.random.default_rng(seed)
    g, x = np.repeat(np.arange(12), 15), rng.normal(size=180)
    f = rng.normal(0.3, 0.3, 12)[g] + 0.4 * x
    s = rng.binomial(6, 1 / (1 + np.exp(-f)))
    frame = pd.DataFrame({"g": g, "x": x, "n": 6, "s": s})
    values = [
        hb.empirical_bayes(
            *hb.from_formula(f"p(s, n) ~ 1 + x + {bar}", frame), evidence=kind, num_draws=1
        ).log_evidence
        for bar in ("(1 | g)", "(1 + x || g)", "(1 + x | g)")
    ]
    assert np.diff(values).min() > -1e-4  # the nodes' error
