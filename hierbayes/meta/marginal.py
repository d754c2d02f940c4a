r"""Type-II maximum likelihood and REML on the profiled evidence.

The search is over the relative root covariance Λ, lower triangular within each correlated block,
whose diagonal may reach zero: Λ is where τ = 0 is an ordinary point (see
:mod:`hierbayes.evidence.profile`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from hierbayes.evidence.many import ManyProblems
from hierbayes.evidence.profile import (
    Curved,
    Nearby,
    Plain,
    PlainAt,
    around,
    profile_problem,
    with_criterion,
)
from hierbayes.meta.first_look import Blocks, look, sample_of
from hierbayes.meta.optimum import (
    HELD,
    SINGULAR,
    Minimum,
    Near,
    Optimum,
    ValueAndSlope,
    at_the_boundary,
    curvature,
    descend,
    highest,
    minimise,
    polish,
)
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.phi.space import Space, root_of
from hierbayes.priors.hyperprior import Shape
from hierbayes.statistics import Statistics, placed_statistics
from hierbayes.tasks import Tasks
from hierbayes.tasks.container import kept

SURELY = 20.0
"""How much higher a sample of the tasks has to stand than at Λ = 0 for that not to be tried."""


def maximise_likelihood(model: HierarchicalModel, tasks: Tasks, *, reml: bool) -> Optimum:
    """φ̂ of type-II maximum likelihood or REML, with standard errors."""
    shape, fixed = model.shape(tasks), model.fixed(tasks)
    known_noise = "sigma" not in shape.parameters
    with float64():
        evidence, seen, whole = _laid_out(tasks, shape)
        evidence = with_criterion(evidence, reml=reml, known_noise=known_noise)
        seen = replace(seen, reml=reml, known_noise=known_noise)
        found = _best_root(evidence, shape, seen, whole=whole)
        root = _snap(evidence, found.root, found.value, found.scale)
        nearby = evidence.at(root)
        best = nearby.profile
        sigma = float(best.sigma)
        covariance = sigma**2 * root @ root.T
        phi = fixed.phi(np.asarray(best.fixed)) | _spread(shape, covariance, sigma, known_noise)
        errors, remarks, along = _standard_errors(
            nearby, shape, phi, np.asarray(best.covariance), known_noise, tasks
        )
    errors |= fixed.phi(np.sqrt(np.diag(np.asarray(best.covariance))))
    warnings = ([found.problem] if found.problem else []) + remarks
    along |= fixed_along(fixed, np.asarray(best.covariance))
    return Optimum(phi, float(best.log_evidence), errors, warnings, along=along)


@kept
def _laid_out(tasks: Tasks, shape: Shape) -> tuple[Curved | Plain, ManyProblems, bool]:
    """The evidence of these tasks, and what of them is looked at first: whether it is all."""
    problem = profile_problem(placed_statistics(tasks), shape, reml=False, known_noise=False)
    return around(problem), *sample_of(problem)


def relative_units(stats: Statistics) -> np.ndarray:
    """The standard deviation of a coefficient that matches the noise of one row, (d,)."""
    squares, rows = (stats.x**2).sum(axis=(0, 2)), stats.num_rows.sum()
    return 1.0 / np.sqrt(np.asarray(squares) / np.asarray(rows))


def positions(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of Λ's entries, in the order of the parameters."""
    pairs = [(b[i], b[k]) for b in blocks for i in range(len(b)) for k in range(i + 1)]
    rows, columns = np.array(pairs).T
    return rows, columns


class _Found(NamedTuple):
    root: np.ndarray
    value: float
    problem: str | None
    scale: np.ndarray


def _best_root(
    evidence: Curved | Plain, shape: Shape, seen: ManyProblems, *, whole: bool
) -> _Found:
    rows, columns = positions(shape.blocks)
    diagonal = rows == columns
    first = look(seen, shape.blocks)
    scale, size = first.unit, len(first.unit)
    unit = scale[rows]

    def unpacked(scaled: np.ndarray) -> np.ndarray:
        root = np.zeros((size, size))
        root[rows, columns] = scaled * unit
        return root

    def packed(root: np.ndarray) -> np.ndarray:
        return root[rows, columns] / unit

    def criterion_of(evidence: Curved | Plain) -> tuple[ValueAndSlope, Near]:
        def near(x: np.ndarray) -> ValueAndSlope:
            nearby = evidence.at(unpacked(x))

            def value_and_slope(scaled: np.ndarray) -> tuple[float, np.ndarray]:
                value, (slope, _) = nearby.value_and_slope(unpacked(scaled))
                return -value, -slope[rows, columns] * unit

            return value_and_slope

        return lambda x: near(x)(x), near

    value_and_slope, near = criterion_of(evidence)
    lower = np.where(diagonal, 0.0, -np.inf)

    def climbed(start: np.ndarray) -> Minimum:
        best = None
        if isinstance(evidence, Curved):
            # Newton steps on ever more tasks: a sample's maximum lies a few standard errors off
            chunks = evidence.num_chunks
            samples = [evidence.sample(n) for n in (chunks // 64, chunks // 8) if n >= 4]
            end = start
            for some, near_some in map(criterion_of, samples or [evidence]):
                end = descend(some, end, lower, near_some)
            best = polish(value_and_slope, end, lower, near)
        # Where a bound is near, or nothing was found, the search is done with more patience.
        if best is None or best.problem is not None or (np.abs(best.x[diagonal]) < 0.01).any():
            best = minimise(value_and_slope, [start], lower, near)
        # A zero column of Λ is always stationary; where more variance would help, it is no maximum.
        for _ in range(size):
            flat = diagonal & (best.x <= 1e-8)
            if not flat.any():
                break
            stuck = np.zeros_like(flat)
            stuck[flat] = np.diag(curvature(near(best.x), best.x, flat)) < -1e-8
            if not stuck.any():
                break
            again = minimise(value_and_slope, [np.where(stuck, 0.3, best.x)], lower, near)
            if not again.value < best.value:
                break
            best = again
        return best

    rivals: list[np.ndarray] = []
    if first.at_zero[0] < first.loss[0] + SURELY:
        rivals.append(np.zeros(len(rows)))
    best = highest(climbed, packed(first.root[:, :, 0]), rivals, value_and_slope)
    if whole and size > 1:
        again = look(seen, shape.blocks, unpacked(best.x)).root[:, :, 0]
        best = highest(climbed, best, [packed(again)], value_and_slope)
    return _Found(unpacked(best.x), best.value, best.problem, scale)


def _snap(
    evidence: Curved | Plain, root: np.ndarray, value: float, scale: np.ndarray
) -> np.ndarray:
    """Rows of Λ that are zero but for rounding become exactly zero, where that costs nothing."""
    small = np.linalg.norm(root, axis=1) < SINGULAR * scale
    trial = np.where(small[:, None], 0.0, root)
    if not small.any():
        return root
    at_zero = -float(evidence.at(trial).profile.log_evidence)
    return trial if at_zero <= value + 1e-7 * max(1.0, abs(value)) else root


def _spread(
    shape: Shape, covariance: np.ndarray, sigma: float, known_noise: bool
) -> dict[str, np.ndarray]:
    tau = np.sqrt(np.diag(covariance))
    phi = {"tau": tau}
    if shape.correlated:
        safe = np.where(tau > 0, tau, 1.0)
        corr = covariance / np.outer(safe, safe)
        phi["corr"] = np.where(np.eye(len(tau), dtype=bool), 1.0, np.clip(corr, -1.0, 1.0))
    if not known_noise:
        phi["sigma"] = np.asarray(sigma)
    return phi


def fixed_along(fixed: Space, covariance: np.ndarray) -> dict[str, np.ndarray]:
    """How the fixed effects move along independent normal directions, by name (…, r)."""
    each = [fixed.phi(column) for column in root_of(covariance).T]
    if not each:
        return {}
    return {name: np.stack([one[name] for one in each], -1) for name in each[0]}


def _standard_errors(
    nearby: Nearby | PlainAt,
    shape: Shape,
    phi: dict[str, np.ndarray],
    covariance: np.ndarray,
    known_noise: bool,
    tasks: Tasks,
) -> tuple[dict[str, np.ndarray], list[str], dict[str, np.ndarray]]:
    """Standard errors of τ and σ: the inverse Hessian of the evidence with b profiled out.

    With remarks, and the directions of τ and the correlations that they are made of.
    """
    tau, remarks = phi["tau"], []
    errors: dict[str, np.ndarray] = {"tau": np.full(len(tau), np.nan)}
    inside = tau > 0
    if not inside.all():
        zero = ", ".join(repr(c) for c, free in zip(tasks.coef, inside, strict=True) if not free)
        remarks.append(
            f"the standard error of tau for {zero} is NaN: at the boundary tau = 0 the "
            "likelihood is not a parabola"
        )
    blocks = tuple(kept for b in shape.blocks if (kept := tuple(i for i in b if inside[i])))
    corr = phi.get("corr", np.eye(len(tau)))
    singular = at_the_boundary(corr, blocks)
    if singular:
        remarks.append(HELD)
    free_corr = () if singular else tuple(b for b in blocks if len(b) > 1)
    spread = _Spread(nearby, tau, corr, inside, free_corr, phi.get("sigma"))
    start = spread.vector()
    along = {"tau": np.full((len(tau), 1), np.nan)}
    if not start.size:
        return errors, remarks, along
    hessian = curvature(spread.value_and_slope, start, np.ones(len(start), bool))
    if not np.linalg.eigvalsh(hessian)[0] > 0:
        remarks.append(
            "the standard errors of tau and sigma are NaN: the profiled evidence is not "
            "concave at the estimate, so the data hardly determine the prior's spread"
        )
        if not known_noise:
            errors["sigma"] = np.asarray(np.nan)
        return errors, remarks, along
    covariance = np.linalg.inv(hessian)
    se = np.sqrt(np.diag(covariance)) * spread.units()
    errors["tau"][inside] = se[: inside.sum()]
    if not known_noise:
        errors["sigma"] = np.asarray(se[inside.sum()])
    return errors, remarks, spread.along(root_of(covariance))


class _Spread:
    """The evidence as a function of (τ inside the boundary, σ, correlations), in relative units.

    Each row of the correlations' root is free below its unit diagonal and scaled to length one.
    """

    def __init__(
        self,
        nearby: Nearby | PlainAt,
        tau: np.ndarray,
        corr: np.ndarray,
        inside: np.ndarray,
        free_corr: Blocks,
        sigma: np.ndarray | None,
    ):
        self.nearby, self.tau = nearby, tau
        self.sigma = None if sigma is None else float(sigma)
        self.inside = np.flatnonzero(inside)
        self.corr_root = _cholesky(corr)
        pairs = [(b[i], b[k]) for b in free_corr for i in range(len(b)) for k in range(i)]
        self.rows = np.array([i for i, _ in pairs], int)
        self.columns = np.array([k for _, k in pairs], int)

    def units(self) -> np.ndarray:
        sigma = [] if self.sigma is None else [self.sigma]
        return np.concatenate([self.tau[self.inside], sigma, np.ones(len(self.rows))])

    def vector(self) -> np.ndarray:
        sigma = [] if self.sigma is None else [1.0]
        below = self.corr_root[self.rows, self.columns] / self.corr_root[self.rows, self.rows]
        return np.concatenate([np.ones(len(self.inside)), sigma, below])

    def along(self, directions: np.ndarray) -> dict[str, np.ndarray]:
        """How τ and the correlations move along directions of the vector (n, r)."""
        num, k = directions.shape[1], len(self.inside)
        tau = np.full((len(self.tau), num), np.nan)
        tau[self.inside] = self.tau[self.inside][:, None] * directions[:k]
        root = self.corr_root
        below = np.zeros((*root.shape, num))
        # each row is the unit row times its length, one over its diagonal entry
        moved = directions[len(directions) - len(self.rows) :]
        below[self.rows, self.columns] = root[self.rows, self.rows][:, None] * moved
        change = below - np.einsum("ikr,ik,il->ilr", below, root, root)
        corr = np.einsum("ikr,jk->ijr", change, root)
        return {"tau": tau, "corr": corr + corr.swapaxes(0, 1)}

    def value_and_slope(self, v: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the evidence and its slope, by the chain rule through Λ = diag(τ) C / σ."""
        k, tau = len(self.inside), self.tau.copy()
        tau[self.inside] *= v[:k]
        sigma, at = (1.0, k) if self.sigma is None else (self.sigma * v[k], k + 1)
        below = self.corr_root.copy()
        free = np.unique(self.rows)
        below[free] = below[free] / np.diag(self.corr_root)[free][:, None]
        below[self.rows, self.columns] = v[at:]
        length = np.linalg.norm(below, axis=1)
        corr_root = below / length[:, None]
        root = tau[:, None] * corr_root / sigma
        value, (by_root, by_sigma) = self.nearby.value_and_slope(root, sigma)
        by_tau = (by_root * corr_root).sum(1)[self.inside] / sigma * self.tau[self.inside]
        by_noise = []
        if self.sigma is not None:
            by_noise = [(float(by_sigma) - (by_root * root).sum() / sigma) * self.sigma]
        by_corr = by_root * tau[:, None] / sigma
        along = (by_corr * corr_root).sum(1)[:, None] * corr_root
        by_below = ((by_corr - along) / length[:, None])[self.rows, self.columns]
        return -value, -np.concatenate([by_tau, by_noise, by_below])


def _cholesky(corr: np.ndarray) -> np.ndarray:
    """A lower root of a correlation matrix that may be singular."""
    values, vectors = np.linalg.eigh(corr)
    root = (vectors * np.sqrt(np.maximum(values, 0))).T
    triangle = np.asarray(np.linalg.qr(root, mode="r")).T
    return triangle * np.where(np.diag(triangle) < 0, -1.0, 1.0)
