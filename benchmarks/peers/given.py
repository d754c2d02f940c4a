"""What a contestant is given: arrays and the hyperprior in words, read with NumPy alone.

A peer's process imports nothing of hierbayes, so that its memory and its first seconds are its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Belief = Mapping[str, Any]
"""``{"family": "Normal", "loc": 0.0, "scale": 5.0}``: a density that every peer can write."""


@dataclass(frozen=True)
class Given:
    """y_i ~ N(f_i, σ²) or N(·, se_i²), f_i = x_iᵀ θ_j(i) + z_iᵀ β, θ_j ~ N(μ, Σ); beliefs about φ.

    ``family`` "bernoulli" or "poisson" has y_i around f_i by its usual link. ``predictors`` (n, d)
    with a first column of ones, ``outcome`` (n,), ``task`` (n,) of 0 … J - 1, sorted; ``known_se``
    (n,) or None; ``shared`` (n, p), z, with beliefs ``beta``. ``mu`` and ``tau`` hold a belief a
    coefficient, ``corr`` the concentration of the LKJ density or None where coefficients are
    independent.
    """

    name: str
    predictors: np.ndarray
    outcome: np.ndarray
    task: np.ndarray
    known_se: np.ndarray | None
    mu: list[Belief]
    tau: list[Belief]
    corr: float | None
    sigma: Belief | None
    family: str = "gaussian"
    shared: np.ndarray | None = None
    beta: list[Belief] = field(default_factory=list)

    @property
    def num_tasks(self) -> int:
        """J."""
        return int(self.task[-1]) + 1

    @property
    def num_coef(self) -> int:
        """d."""
        return self.predictors.shape[1]

    @property
    def num_shared(self) -> int:
        """p."""
        return 0 if self.shared is None else self.shared.shape[1]

    @property
    def formula(self) -> str:
        """The model in lme4's language, of columns y, x1, x2, … and task."""
        terms = " + ".join(["1", *(f"x{k}" for k in range(1, self.num_coef))])
        fixed = " + ".join([terms, *(f"z{k}" for k in range(self.num_shared))])
        bar = "|" if self.corr is not None or self.num_coef == 1 else "||"
        return f"y ~ {fixed} + ({terms} {bar} task)"

    def columns(self) -> dict[str, np.ndarray]:
        """The columns of a table of rows."""
        table = {f"x{k}": self.predictors[:, k] for k in range(1, self.num_coef)}
        if self.shared is not None:
            table |= {f"z{k}": column for k, column in enumerate(self.shared.T)}
        table |= {"y": self.outcome, "task": self.task}
        return table if self.known_se is None else table | {"se": self.known_se}

    def write(self, folder: Path) -> None:
        """Into a folder, for another process."""
        told = asdict(self)
        names = ("predictors", "outcome", "task", "known_se", "shared")
        arrays = {k: told.pop(k) for k in names}
        np.savez(folder / "given.npz", **{k: v for k, v in arrays.items() if v is not None})
        (folder / "given.json").write_text(json.dumps(told), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Given:
        """What :meth:`write` left in a folder."""
        told = json.loads((folder / "given.json").read_text(encoding="utf-8"))
        with np.load(folder / "given.npz") as arrays:
            return cls(**{"known_se": None, **told, **arrays})


def alike(beliefs: list[Belief]) -> tuple[str, dict[str, np.ndarray]]:
    """The one family of several beliefs, and its parameters as vectors."""
    families = {belief["family"] for belief in beliefs}
    if len(families) != 1:
        raise ValueError(f"the peers are written for one family a vector, found {families}")
    names = [name for name in beliefs[0] if name != "family"]
    return families.pop(), {n: np.array([belief[n] for belief in beliefs]) for n in names}
