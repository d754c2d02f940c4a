r"""From K gradient steps to the full posterior, one change at a time.

.. math::

    N(\theta_K, \Sigma_K) \;\to\; \text{MAP under } T \;\to\; p(\theta_j \mid D_j, \hat\varphi)
    \;\to\; p(\theta_j \mid D_{1..J})

The first step replaces the prior that the steps imply by the learned one, the second moves φ to
where the evidence is largest (and, where tasks are not Gaussian, takes the posterior itself in the
place of the normal at its mode), the third averages over φ.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes import inputs
from hierbayes.adaptation import (
    Adaptation,
    Conjugate,
    Draws,
    EquivalentPrior,
    Laplace,
    Posterior,
    equivalent_steps,
)
from hierbayes.adaptation.implied_posterior import ImpliedPosterior
from hierbayes.adaptation.step_length import largest_curvature
from hierbayes.errors import InputError, overhearing
from hierbayes.fit import Fit
from hierbayes.fit.method import Derived
from hierbayes.meta import empirical_bayes
from hierbayes.meta.diagnostics import remarks
from hierbayes.meta.inner_loop import check_inner_step, nth_seed
from hierbayes.meta.sampling import GivenPhi, run_nuts
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import as_key, as_rng, float64
from hierbayes.tasks import Tasks

STEPS, MODE, POINT, FULL = "gradient steps", "MAP, learned prior", "empirical Bayes", "full Bayes"

CAUSES = {
    (STEPS, MODE): "the shape of the prior (and where tasks that are not Gaussian are linearised)",
    (
        MODE,
        POINT,
    ): "where phi stands, sigma included (and the exact posterior in the place of a normal)",
    (POINT, FULL): "the uncertainty of phi",
}
"""What changes between one rung and the next."""

_CENTRE = ("mu", "gamma", "beta", "sigma")
_SPREAD = ("tau", "corr")


def build_ladder(
    start: Fit,
    posterior: Fit,
    point: Fit | None,
    num_steps: int | None,
    step_size: float | str | None,
    num_chains: int,
    num_draws: int,
    seed: int | jax.Array,
) -> tuple[dict[str, Fit], EquivalentPrior]:
    """The four rungs as fits of the same tasks, with draws of θ, and what the steps imply."""
    model, tasks = posterior.model, posterior.tasks
    model.require_gaussian_prior(
        "equivalence_report", "the prior that gradient steps imply is Gaussian",
        "fit with priors.Gaussian()",
    )  # fmt: skip
    gaussian = model.likelihood.gaussian_in_theta
    if point is None and gaussian:
        with overhearing():  # they are in the fit that is returned
            point = empirical_bayes(model, tasks, num_draws=num_draws, num_chains=num_chains)
    learned = posterior if point is None else point
    centre = {k: np.asarray(start.phi[k]) for k in _CENTRE if k in start.phi}
    spread = {k: np.asarray(learned.phi[k]) for k in _SPREAD if k in learned.phi}
    loss: Any = getattr(start.adaptation, "loss", "sum")
    count, size = _steps(start, num_steps, step_size)
    inside = None
    if step_size is None and start.at is not None and "num_steps" in start.info:
        size, inside = start.at.steps(size)
        inside = np.asarray(inside).tolist()
    steps = ImpliedPosterior(count, size, loss, inside)
    exact: Adaptation = Conjugate() if gaussian else Laplace()
    draws = (num_chains, num_draws)
    implied = steps.prior(model, tasks, centre)
    both = centre | spread
    at_mode = exact(model, tasks, both)
    rungs = {
        STEPS: _drawn(STEPS, model, tasks, centre, steps, steps.read(implied), draws, seed),
        MODE: _drawn(MODE, model, tasks, both, exact, at_mode, draws, nth_seed(seed, 1)),
    }
    if point is None:
        point = _sampled(model, tasks, posterior.phi, draws, nth_seed(seed, 2))
    return {**rungs, POINT: point, FULL: posterior}, implied


def _steps(start: Fit, num_steps: int | None, step_size: float | str | None) -> tuple[int, float]:
    """K and η as asked, as the fit took them, or as they come closest to the fit's prior."""
    if num_steps is not None:
        num_steps = inputs.count("num_steps", num_steps)
    if isinstance(step_size, str) or not (step_size is None or np.iterable(step_size)):
        check_inner_step(step_size)
    if num_steps is None and "num_steps" not in start.info and step_size is not None:
        raise InputError(f"{start.method} takes no gradient steps: pass num_steps with step_size")
    if num_steps is None and "num_steps" not in start.info and np.any(start.phi.get("tau", 0) > 0):
        table = equivalent_steps(start.model, start.tasks, start.phi).table
        finite = table[np.isfinite(table.index)]
        best = finite["risk_ratio"].idxmin()
        return int(best), float(finite.loc[best, "step_size"])
    if num_steps is None and "num_steps" not in start.info:
        raise InputError(f"{start.method} takes no gradient steps: pass num_steps and step_size")
    if getattr(start.adaptation, "optimiser", None) is not None:
        raise InputError(
            f"the inner loop of {start.method} had an optimiser of its own; the report is for "
            "plain gradient steps"
        )
    size: Any = step_size
    if size is None:
        size = start.phi.get("step_size", start.info.get("step_size", "auto"))
    if np.ndim(size):
        raise InputError(f"step_size must be one number for all steps, found {size!r}")
    if size == "auto":
        loss = getattr(start.adaptation, "loss", "sum")
        size = 1 / float(largest_curvature(start.model, start.tasks, dict(start.phi), loss).max())
    if num_steps is None:
        num_steps = int(start.info["num_steps"])
    return num_steps, float(size)


def _drawn(
    rung: str,
    model: HierarchicalModel,
    tasks: Tasks,
    phi: dict[str, np.ndarray],
    adaptation: Adaptation,
    adapted: Posterior,
    draws: tuple[int, int],
    seed: int | jax.Array,
) -> Fit:
    """A fit at this φ, with draws from its normal posterior."""
    values = adapted.draw(as_rng(seed), draws[0] * draws[1])
    return Fit(
        Derived(rung), model, tasks, phi, adaptation, adapted,
        theta_draws=values.reshape(*draws, *adapted.mean.shape),
        no_evidence="phi was taken from another fit", warnings=adapted.remarks,
        info={k: v for k, v in vars(adaptation).items() if k in ("num_steps", "step_size")},
    )  # fmt: skip


def _sampled(
    model: HierarchicalModel, tasks: Tasks, phi: Any, draws: tuple[int, int], seed: int | jax.Array
) -> Fit:
    """The posterior of every θ_j at this φ, by NUTS."""
    phi = {name: np.asarray(value) for name, value in phi.items()}
    rows, of_row = model.likelihood.arrange(tasks)
    with float64():
        root = model.prior.scale_tril(phi)
        location = jnp.asarray(model.prior.location(phi, tasks.task_predictors))
        start = {"z": jnp.zeros((draws[0], *location.shape))}
        found, stats = run_nuts(
            GivenPhi(model.without_encoder()), (phi, location, root, rows, of_row),
            as_key(seed), start, dense=False, num_draws=draws[1], num_chains=draws[0],
            num_warmup=500, target_accept=0.9, progress=None,
        )  # fmt: skip
    theta = np.asarray(location) + found["z"] @ np.asarray(root).T
    flat = theta.reshape(-1, *theta.shape[2:])
    return Fit(
        Derived("posterior at a point"), model, tasks, phi, Laplace(), Draws.of(flat),
        theta_draws=theta, sample_stats=stats,
        no_evidence="phi was taken from the full posterior's mean",
        warnings=(
            "tasks are not Gaussian, and their evidence has no closed form: the third rung is the "
            "posterior of theta at the full posterior's mean of phi, drawn by NUTS",
            *remarks({"theta": theta}, None, stats, tasks, {}),
        ),
    )  # fmt: skip
