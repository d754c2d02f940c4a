r"""LLAMA: MAML on Laplace's approximation of the evidence, with Laplace's posterior for new tasks.

.. math:: \varphi^* = \arg\max_\varphi \sum_j \left[\log p(D_j^{\text{query}} \mid \theta_j^K)
          - \frac{w}{2} \log\det(I + K\eta \hat H_j)\right]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Unpack

import jax.numpy as jnp

from hierbayes import inputs
from hierbayes.adaptation.linearised import LinearisedSteps
from hierbayes.errors import NotApplicable
from hierbayes.evidence import Predictive
from hierbayes.fit import Fit
from hierbayes.meta.batches import Batches, Outer, Parameters
from hierbayes.meta.implied import scale_of
from hierbayes.meta.inner_loop import check_steps
from hierbayes.meta.learner import Learner
from hierbayes.meta.outer_loop import Training, parted
from hierbayes.meta.sources import Source
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Task


def llama(
    model: HierarchicalModel,
    tasks: Any,
    num_steps: int = 1,
    step_size: float | None = None,
    *,
    weight: float = 1.0,
    query: float = 0.5,
    sigma: float | None = None,
    **training: Unpack[Training],
) -> Fit:
    r"""Lightweight Laplace approximation for meta-adaptation.

    .. math:: \max_\varphi \sum_j \left[\log p(D_j^{\text{query}} \mid \theta_j^K)
              - \frac{w}{2} \log\det(I + K\eta \hat H_j)\right]

    The determinant is that of the n × n matrix of the query rows and exact for the Gauss–Newton
    Ĥ; the paper approximates it by Kronecker factors.

    Parameters
    ----------
    model : HierarchicalModel
        With a ``Network`` of Gaussian outcomes.
    tasks : Episodes or Tasks
    num_steps : int
        K.
    step_size : float, optional
        η on the mean log likelihood of a task's rows; 0.01 by default.
    weight : float
        w of the determinant. 1 is Laplace's approximation; the paper reports results at 1e-6,
        where it is all but switched off.
    query : float
        Share of a task's rows in the query part, where ``tasks`` are a fixed set.
    sigma : float, optional
        Noise that sets the units of the steps; √½ by default: they climb minus the mean squared
        error.
    **training
        See :class:`~hierbayes.meta.outer_loop.Training`.

    Returns
    -------
    Fit
        ``phi`` holds ``mu``, ``sigma`` and ``sigma_query``, which scales the predictive
        distribution, noise and the uncertainty of θ alike; ``adapt`` gives K steps with Laplace's
        posterior under N(φ, Kη I), and predictions the variance of f under it.

    References
    ----------
    Grant, Finn, Levine, Darrell and Griffiths (2018), Recasting gradient-based meta-learning as
    hierarchical Bayes, ICLR, section 4.

    Examples
    --------
    >>> import hierbayes as hb
    >>> network = hb.likelihoods.Network.mlp([1, 8, 1])
    >>> model = hb.HierarchicalModel(network, hb.priors.Gaussian(correlated=False))
    >>> fit = hb.meta.llama(model, hb.datasets.sinusoids(5), num_meta_steps=20, batch_size=5)
    >>> support, query = hb.datasets.sinusoids(5).draw(3)
    >>> bool((fit.adapt(support).predict(query).sd > fit.phi["sigma_query"]).all())
    True
    """
    run, more = parted(training, Llama)
    method = Llama(num_steps, step_size, weight=weight, query=query, sigma=sigma, **more)
    return method(model, tasks, **run)


@dataclass(frozen=True)
class Llama(Learner):
    """LLAMA with these settings; :func:`llama` says what they are."""

    num_steps: int = 1
    step_size: float | None = None
    weight: float = field(default=1.0, kw_only=True)
    sigma: float | None = field(default=None, kw_only=True)

    name = "LLAMA"
    rank = 0.15
    no_evidence = (
        "LLAMA maximises the predictive evidence of query rows less Laplace's determinant, in "
        "info['history'], not log p(D | φ)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = "auto" if self.step_size is None else self.step_size
        check_steps(self.num_steps, asked, "mean", "unrolled", None)
        weight = inputs.positive("weight", self.weight, or_zero=True)
        object.__setattr__(self, "weight", float(weight))

    def check(self, model: HierarchicalModel) -> None:
        """Networks with Gaussian outcomes, under a Gaussian prior."""
        model.require_gaussian_prior(
            "llama", "the prior that its steps imply is Gaussian", "use priors.Gaussian()"
        )
        if model.likelihood.linear or "sigma" not in model.likelihood.parameters():
            raise NotApplicable(
                "llama takes a Network with Gaussian outcomes; for other outcomes use hb.meta.abml "
                "or hb.maml, for a last layer hb.empirical_bayes, which is exact"
            )

    def learn(self, source: Source) -> Fit:
        """φ where the query rows, less half the log determinant at θ_K, are most likely."""
        assert isinstance(source, Batches)
        model, noise = source.model, source.noise(self.sigma)
        asked = "auto" if self.step_size is None else self.step_size
        eta = source.step_size(asked, noise, "mean")
        outer = Outer(model, len(source.tasks.coef))
        adaptation = LinearisedSteps(self.num_steps, eta, "mean", spread="laplace")
        objective = LessDeterminant(outer, Predictive(adaptation, determinant=self.weight))
        described = {
            "num_steps": self.num_steps, "step_size": eta, "loss": "mean", "weight": self.weight,
            "sigma": self.sigma,
        }  # fmt: skip
        found = source.ascend(outer, objective, noise, described, fixed=noise)
        return source.fit(adaptation, found, described, scale_of(adaptation))


class LessDeterminant(NamedTuple):
    """LLAMA's evidence of a batch's tasks, a row."""

    outer: Outer
    evidence: Predictive

    def __call__(
        self, parameters: Parameters, support: Task, asked: Task, key: Any, given: Any
    ) -> Any:
        """Of every task (B,); ``given`` is the part of φ that is not learned."""
        del key
        phi = self.outer.phi(parameters, given)
        each = self.evidence.of_tasks(self.outer.model, phi, support, asked)
        return each / jnp.maximum(asked.mask.sum(-1), 1)
