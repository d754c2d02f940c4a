"""Ranks and coverage of one simulated data set after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hierbayes.checks.coverage import covered_by_draws, covered_by_normal, normal_posterior
from hierbayes.checks.draws import (
    AT_FIRST,
    PILOTS,
    Draws,
    Sampler,
    full_bayes_sampler,
    needed_thinning,
    surely_independent,
    thinned,
)
from hierbayes.checks.quantities import quantities, rank
from hierbayes.errors import InputError
from hierbayes.fit import Fit
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Tasks

FULL_BAYES, SAMPLER = "full Bayes", "sampler"

HOPELESS = 20
"""Data sets that may be refused before any was accepted."""

MANY = 0.1
"""Share of refused data sets from which on the hyperprior is spoken of."""


class Gathered:
    """Ranks and coverage, data set after data set, and what was refused on the way."""

    def __init__(
        self, model: HierarchicalModel, num_draws: int, rng: np.random.Generator,
        sampler: Sampler | None, by_interval: Mapping[str, Sampler],
    ):  # fmt: skip
        self.model, self.num_draws, self.rng = model, num_draws, rng
        self.sampler, self.by_interval = sampler, by_interval
        self.label = FULL_BAYES if sampler is None else SAMPLER
        self.thinning = 1 if sampler is not None else AT_FIRST
        self.ranks: dict[str, list[int]] = {}
        self.covered: dict[str, list[np.ndarray]] = {}
        self.refused: dict[str, list[str]] = {}
        self.warned: dict[str, list[str]] = {}
        self.accepted = 0
        self._needed: list[float] = []

    def on(
        self, tasks: Tasks, phi: dict[str, np.ndarray], theta: np.ndarray, *, ranked: bool
    ) -> None:
        """One data set, by every method; ``phi`` and ``theta`` with a leading axis of one."""
        seed = int(self.rng.integers(2**31))
        if not np.isfinite(tasks.outcome).all():
            names = [self.label] * ranked + list(self.by_interval)
            for name in names:
                self._refuse(name, "counts whose rate lies beyond 1e15")
            return
        if ranked:
            self._rank(tasks, phi, theta, seed)
        for name, method in self.by_interval.items():
            fit = self._fitted(name, method, tasks, seed)
            if fit is not None:
                self._note(name, fit)
                covered = covered_by_normal(theta[0], *normal_posterior(fit))
                self.covered.setdefault(name, []).append(covered)

    def _rank(self, tasks: Tasks, phi: dict[str, np.ndarray], theta: np.ndarray, seed: int) -> None:
        own = self.sampler is None
        sampler = self.sampler or full_bayes_sampler(self.num_draws * self.thinning)
        found = self._fitted(self.label, sampler, tasks, seed)
        if found is None:
            return
        draws = Draws.of(found, phi, theta)
        if own and self.thinning < AT_FIRST and not surely_independent(found):
            # these data make a harder posterior than the pilots': more draws for those that remain
            more = full_bayes_sampler(self.num_draws * AT_FIRST)
            found = self._fitted(self.label, more, tasks, seed)
            if found is None:
                return
            draws = Draws.of(found, phi, theta)
        self._note(self.label, found)
        if own and len(self._needed) < PILOTS:
            self._needed.append(needed_thinning(self.model, tasks, draws))
            if len(self._needed) == PILOTS:
                self.thinning = int(np.clip(np.ceil(np.median(self._needed)), 1, AT_FIRST))
        draws = thinned(draws, self.num_draws)
        together = {name: np.concatenate([phi[name], draws.phis[name]]) for name in phi}
        values = quantities(self.model, tasks, together, np.concatenate([theta, draws.thetas]))
        for label, v in values.items():
            if np.isnan(v).any():
                raise InputError(f"{label} is not a number in {np.isnan(v).sum()} draw(s)")
        truth = {label: float(v[0]) for label, v in values.items()}
        for label, r in rank({n: v[1:] for n, v in values.items()}, truth, self.rng).items():
            self.ranks.setdefault(label, []).append(r)
        covered = covered_by_draws(theta[0], draws.thetas, self.rng)
        self.covered.setdefault(self.label, []).append(covered)

    def _fitted(self, name: str, method: Sampler, tasks: Tasks, seed: int) -> Any:
        """What the method makes of the tasks; None where it refuses them."""
        try:
            found = method(self.model, tasks, seed)
        except InputError as error:
            self._refuse(name, str(error))
            return None
        self.accepted += 1
        return found

    def _note(self, name: str, found: Any) -> None:
        """Keep what a fit warned of."""
        if isinstance(found, Fit) and found.warnings:
            self.warned.setdefault(name, []).append(found.warnings[0])

    def _refuse(self, name: str, why: str) -> None:
        self.refused.setdefault(name, []).append(why)

    def refuse_hopeless(self, num: int) -> None:
        """Stop where nothing has been accepted."""
        if not self.accepted and num >= HOPELESS:
            self._refuse_all(num)

    def _refuse_all(self, num: int) -> None:
        why = next(iter(self.refused.values()))[0]
        raise InputError(f"the model refused each of the first {num} simulated data sets: {why}")

    def remarks(self, num: int) -> list[str]:
        """What to know, in sentences."""
        if not self.accepted:
            self._refuse_all(num)
        remarks = []
        for name, why in self.refused.items():
            more = (
                "; tighter priors make the simulated data more like real ones"
                if len(why) > MANY * num else ""
            )  # fmt: skip
            remarks.append(
                f"{name} refused {len(why)} of {num} simulated data sets, which are left out (the "
                f'first: "{why[0]}"). What it does with such data has not been checked{more}'
            )
        for name, said in self.warned.items():
            remarks.append(
                f"{len(said)} of {num} fits by {name} came with warnings, the first: {said[0]}"
            )
        return remarks
