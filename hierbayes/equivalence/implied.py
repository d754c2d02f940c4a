"""The prior and posterior that gradient steps imply: what :func:`equivalent_prior` returns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import numpy as np

from hierbayes import inputs
from hierbayes.adaptation.descent import Descent, Flow
from hierbayes.equivalence.validity import FLAT, Status, described
from hierbayes.numerics import as_rng
from hierbayes.tasks import Tasks


@dataclass(frozen=True)
class Discrepancy:
    r"""How far K steps are from the MAP estimate under their equivalent prior, one value a task.

    Zero for Gaussian tasks. With L = −log p(D | θ), H its curvature and P the prior's precision:

    Attributes
    ----------
    missed : array (J,)
        ½ρ², ρ² = Gᵀ(H(θ_K) + P)⁻¹G with G = ∇L(θ_K) + P(θ_K − φ): about the nats by which θ_K
        misses the maximum of the posterior under P. Above 0.5 the claim has stopped holding; inf
        where that posterior is not concave at θ_K.
    linearisation : array (J,)
        ‖θ_K − θ_lin‖ in implied posterior sds, with θ_lin the end of the linearised steps.
    curvature_drift : array (J,)
        ‖H(θ_K) − H(φ)‖ / ‖H(φ)‖ (Frobenius).
    predictive_kl : array (J,)
        Mean over the task's rows of KL(p(y | θ_MAP) ‖ p(y | θ_K)), with θ_MAP the converged MAP
        estimate under P; NaN where P is no prior or the climb to θ_MAP did not converge.
    """

    missed: np.ndarray
    linearisation: np.ndarray
    curvature_drift: np.ndarray
    predictive_kl: np.ndarray

    @staticmethod
    def none(num_tasks: int) -> Discrepancy:
        """Of tasks where the steps are the MAP estimate exactly."""
        return Discrepancy(*(np.zeros(num_tasks) for _ in range(4)))

    def take(self, j: int) -> Discrepancy:
        """Of one task."""
        return Discrepancy(**{name: value[j] for name, value in vars(self).items()})


@dataclass(frozen=True, eq=False)
class ImpliedPrior:
    r"""What steps imply along the directions of curvature, whatever form P is kept in.

    Attributes
    ----------
    location : array (J, d)
        Where the prior is centred: φ, where the steps start.
    posterior_mean : array (J, d)
        θ_K.
    curvature : array (J, r)
        λ_i, ascending; r = d unless directions are left out.
    directions : array (J, d, r)
        v_i, in columns.
    filter : array (J, r)
        r_i: the share of φ that the steps leave in each direction; (1 − ηλ_i)^K.
    status : array (J,) of str
        "proper", "overshoots", "flat" or "no prior": see :class:`Status`.
    messages : tuple of str
        What to know before relying on these numbers.
    validity : Discrepancy
        How far θ_K is from the MAP estimate: zero for Gaussian tasks.
    left_out : float or None
        s of the directions that are not kept, whose λ is taken as 0; None where all are kept.
    """

    tasks: Tasks = field(repr=False)
    method: Descent | Flow = field(repr=False)
    location: np.ndarray
    posterior_mean: np.ndarray
    curvature: np.ndarray
    directions: np.ndarray = field(repr=False)
    dual: np.ndarray = field(repr=False)
    filter: np.ndarray
    moved: np.ndarray = field(repr=False)
    pinned: np.ndarray = field(repr=False)
    status: np.ndarray
    messages: tuple[str, ...]
    validity: Discrepancy = field(repr=False)
    left_out: float | None = field(repr=False)

    # -------------------------------------------------------------- directions

    @property
    def shrinkage(self) -> np.ndarray:
        """1 − r_i (J, r): how far each direction goes from φ to the task's own optimum."""
        return np.where(self.pinned, 0.0, 1.0 - self.filter)

    @property
    def strength(self) -> np.ndarray:
        """The prior's precision along each v_i of unit length (J, r); inf where it is pinned.

        p_i itself without a preconditioner, whose v_i are of unit length.
        """
        return self._weights / self._squared

    @property
    def _weights(self) -> np.ndarray:
        """p_i (J, r)."""
        pinned = np.where(self.pinned, np.inf, 0.0)
        return pinned + self.filter / np.where(self.pinned, 1.0, self.moved)

    @property
    def _squared(self) -> np.ndarray:
        """‖v_i‖² (J, r), 1 in directions that only fill up."""
        squared = (self.directions**2).sum(-2)
        return np.where(squared > 0, squared, 1.0)

    @property
    def effective_parameters(self) -> np.ndarray:
        """Σ_i (1 − r_i) (J,): how many parameters the steps have fitted."""
        return self.shrinkage.sum(-1)

    # ------------------------------------------------------------------- tasks

    def __getitem__(self, name: Any) -> Self:
        """Of the task of this name: the same arrays without the task axis."""
        one = self.tasks[name]
        if self.filter.ndim == 1:
            return self
        j = self.tasks.labels.position(name)
        assert j is not None
        arrays = {f: getattr(self, f)[j] for f in ARRAYS}
        return replace(self, tasks=one, validity=self.validity.take(j), **arrays)

    @property
    def table(self) -> Any:
        """A row a task, as a pandas DataFrame: rows, status, the range of each quantity."""
        import pandas as pd

        strength, shrinkage = np.atleast_2d(self.strength), np.atleast_2d(self.shrinkage)
        if self.left_out is not None:
            rest = np.full((len(strength), 1), np.inf if not self.left_out else 1 / self.left_out)
            strength = np.hstack([strength, rest])
            shrinkage = np.hstack([shrinkage, np.zeros_like(rest)])
        none = np.atleast_1d(self.status == Status.NO_PRIOR)
        validity = {name: np.atleast_1d(value) for name, value in vars(self.validity).items()}
        return pd.DataFrame(
            {
                "rows": self.tasks.sizes,
                "status": [str(s) for s in np.atleast_1d(self.status)],
                "largest_curvature": np.atleast_2d(self.curvature / self._squared).max(1),
                "weakest_precision": np.where(none, np.nan, strength.min(1)),
                "strongest_precision": np.where(none, np.nan, strength.max(1)),
                "least_shrinkage": shrinkage.min(1),
                "most_shrinkage": shrinkage.max(1),
                "effective_parameters": np.atleast_1d(self.effective_parameters),
                **validity,
            },
            index=pd.Index(self.tasks.names, name="task"),
        )

    def __str__(self) -> str:
        status = np.atleast_1d(self.status)
        counts = ", ".join(f"{(status == s).sum()} {s}" for s in Status if (status == s).any())
        lines = [f"{described(self.method)} as a Gaussian prior: {len(status)} task(s), {counts}"]
        return "\n".join([*lines, *(f"- {message}" for message in self.messages)])


ARRAYS = (
    "location", "posterior_mean", "curvature", "directions", "dual", "filter", "moved", "pinned",
    "status",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class EquivalentPrior(ImpliedPrior):
    r"""Gradient steps from φ as a Gaussian prior centred at φ, one a task.

    .. math:: P = \sum_i p_i\, \tilde v_i \tilde v_i^\top, \quad
              \Sigma_K = \sum_i s_i\, v_i v_i^\top, \quad
              p_i = r_i / s_i, \quad s_i = (1 - r_i) / \lambda_i

    with λ_i, v_i the curvatures and directions of the task's log likelihood at φ (ṽ_i dual to v_i;
    the same without a preconditioner). All in units of the summed log likelihood. Arrays have the
    tasks on their leading axis, or none for one task given as (X, y) or taken by ``prior[name]``.

    Attributes
    ----------
    location : array (J, d)
        Where the prior is centred: φ, where the steps start.
    posterior_mean : array (J, d)
        θ_K.
    curvature : array (J, d)
        λ_i, ascending; of the preconditioned task (v_iᵀ H v_i) where there is a preconditioner.
    directions : array (J, d, d)
        v_i, in columns.
    filter : array (J, d)
        r_i: the share of φ that the steps leave in each direction; (1 − ηλ_i)^K.
    status : array (J,) of str
        "proper", "overshoots", "flat" or "no prior": see :class:`Status`.
    messages : tuple of str
        What to know before relying on these numbers.
    validity : Discrepancy
        How far θ_K is from the MAP estimate: zero for Gaussian tasks.
    """

    # ---------------------------------------------------------------- matrices

    @property
    def precision(self) -> np.ndarray:
        """P (J, d, d); zero in pinned directions, whose precision is infinite."""
        return _spectral(self.dual, np.where(self.pinned, 0.0, self._weights))

    @property
    def covariance(self) -> np.ndarray:
        """P⁻¹ (J, d, d); zero in pinned directions.

        NaN without a prior; where a flat direction touches a coefficient, inf on the diagonal and
        NaN beside it.
        """
        strength = self._weights
        flat = np.abs(self.filter) <= FLAT
        finite = _spectral(self.directions, np.where(flat, 0.0, 1.0 / np.where(flat, 1, strength)))
        touched = (np.abs(self.directions) * flat[..., None, :]).max(-1) > 1e-12
        both = touched[..., :, None] | touched[..., None, :]
        diagonal = np.eye(finite.shape[-1], dtype=bool)
        finite = np.where(both, np.where(diagonal, np.inf, np.nan), finite)
        none = np.asarray(self.status == Status.NO_PRIOR)[..., None, None]
        return np.where(none, np.nan, finite)

    @property
    def posterior_covariance(self) -> np.ndarray:
        """Σ_K (J, d, d): the covariance of the posterior under P, of mean θ_K."""
        return _spectral(self.directions, self.moved)

    def draws(self, num_draws: int = 1000, seed: int | jax.Array = 0) -> np.ndarray:
        """Draws (num_draws, J, d) from the implied posterior N(θ_K, Σ_K)."""
        num_draws = inputs.count("num_draws", num_draws)
        white = as_rng(seed).standard_normal((num_draws, *self.filter.shape))
        scaled = white * np.sqrt(self.moved)
        return self.posterior_mean + np.einsum("...ki,...i->...k", self.directions, scaled)


def _spectral(vectors: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.einsum("...ki,...i,...li->...kl", vectors, values, vectors, optimize=True)
