"""Posterior draws of φ and θ as simulation-based calibration takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from hierbayes.checks.quantities import quantities
from hierbayes.errors import InputError, listing
from hierbayes.fit import Fit
from hierbayes.fit.effective import ess
from hierbayes.meta import full_bayes
from hierbayes.meta.full_bayes import LONG_STAY, SURE
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Tasks

Sampler = Callable[[HierarchicalModel, Tasks, int], Any]
"""``sampler(model, tasks, seed)``: a Fit, or draws by name."""

AT_FIRST, PILOTS = 10, 3
"""Draws in the place of one in the first fits, and fits whose autocorrelation is looked at."""

SPARE = 0.1
"""Of the thinning that pilots ask for, which they know no better."""


class Draws(NamedTuple):
    """``phis`` by name, each (S, …), and ``thetas`` (S, J, d)."""

    phis: dict[str, np.ndarray]
    thetas: np.ndarray

    @classmethod
    def of(cls, found: Any, phi: dict[str, np.ndarray], theta: np.ndarray) -> Draws:
        """What a sampler returned; ``phi`` and ``theta`` (1, …) say which names and shapes."""
        if isinstance(found, Fit):
            found = _of_fit(found)
        if not isinstance(found, Mapping):
            raise InputError(
                "a sampler returns a Fit or a mapping of draws by name, found "
                f"{type(found).__name__}"
            )
        wanted = {**phi, "theta": theta}
        if missing := [name for name in wanted if name not in found]:
            raise InputError(f"the sampler's draws lack {listing(missing)}")
        arrays = {name: np.asarray(found[name], dtype=float) for name in wanted}
        size = len(arrays["theta"])
        for name, value in arrays.items():
            expected = (size, *wanted[name].shape[1:])
            if value.shape != expected:
                raise InputError(
                    f"the sampler's draws of {name} have shape {value.shape}, expected {expected}"
                )
        return cls({name: arrays[name] for name in phi}, arrays["theta"])


def _of_fit(fit: Fit) -> dict[str, np.ndarray]:
    """Draws of a fit, chain after chain; a point φ̂ as draws that are all the same."""
    if fit.theta_draws is None:
        raise InputError(f"{fit.method} holds no draws of theta to rank the truth among")
    thetas = np.asarray(fit.theta_draws)
    thetas = thetas.reshape(-1, *thetas.shape[2:])
    phis = {}
    for name, value in fit.phi.items():
        if fit.phi_draws is None:
            phis[name] = np.broadcast_to(value, (len(thetas), *np.shape(value)))
        else:
            drawn = fit.phi_draws[name]
            phis[name] = drawn.reshape(-1, *drawn.shape[2:])
    return {**phis, "theta": thetas}


def thinned(draws: Draws, num_draws: int) -> Draws:
    """So many draws at even distances."""
    size = len(draws.thetas)
    if size < num_draws:
        raise InputError(
            f"the sampler returned {size} draws, at least num_draws={num_draws} are needed"
        )
    kept = ((np.arange(num_draws) + 0.5) * size / num_draws).astype(int)
    return Draws({name: value[kept] for name, value in draws.phis.items()}, draws.thetas[kept])


def full_bayes_sampler(num_draws: int) -> Sampler:
    """:func:`hierbayes.full_bayes` with one chain of so many draws."""

    def sampler(model: HierarchicalModel, tasks: Tasks, seed: int) -> Fit:
        return full_bayes(
            model, tasks, num_draws=num_draws, num_chains=1, seed=seed, progress=False
        )

    return sampler


def surely_independent(fit: Fit) -> bool:
    """Whether independent proposals were accepted so often that draws need no judging."""
    sure = fit.info.get("acceptance", 0.0) >= SURE
    return sure and fit.info.get("longest_stay", LONG_STAY + 1) <= LONG_STAY


def needed_thinning(model: HierarchicalModel, tasks: Tasks, draws: Draws) -> float:
    """Draws of one chain that are worth an independent one, of the worst quantity."""
    found = quantities(model, tasks, draws.phis, draws.thetas)
    sizes = [float(ess(values[None], "mean")) for values in found.values() if np.ptp(values) > 0]
    return len(draws.thetas) / min(sizes, default=1.0) - SPARE
