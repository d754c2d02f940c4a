r"""ABML: amortised Bayesian meta-learning, a normal posterior of all weights for every task.

.. math:: \varphi^* = \arg\max_{\mu, \tau, \sigma} \sum_j
          \left[\mathbb E_{q_j} \log p(D_j \mid \theta)
          - \mathrm{KL}(q_j \,\Vert\, p(\theta \mid \varphi))\right] + \log p(\varphi)

with q_j what K steps make of the prior on the support rows, D_j all rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from hierbayes import inputs
from hierbayes.adaptation.variational import Variational, divergence, expected
from hierbayes.errors import InputError, NotApplicable
from hierbayes.fit import Fit
from hierbayes.meta.batches import Batches, Outer, Parameters, rows_together
from hierbayes.meta.inner_loop import check_counts, check_steps
from hierbayes.meta.learner import Learner
from hierbayes.meta.outer_loop import Training, parted
from hierbayes.meta.sources import Source
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Task

STARTING_TAU = 0.05
"""Where τ starts, in the units of the weights: small beside weights of order 1/√inputs."""


def abml(
    model: HierarchicalModel,
    tasks: Any,
    num_steps: int = 5,
    step_size: float | None = None,
    *,
    num_samples: int = 5,
    num_tasks: int | None = None,
    precision_prior: tuple[float, float] = (1.0, 0.01),
    query: float = 0.5,
    **training: Unpack[Training],
) -> Fit:
    r"""Amortised Bayesian meta-learning.

    .. math:: \max_{\mu, \tau, \sigma} \sum_j \left[\mathbb E_{q_j} \log p(D_j \mid \theta)
              - \mathrm{KL}(q_j \Vert N(\mu, \operatorname{diag}\tau^2))\right] + \log p(\mu, \tau)

    q_j are K gradient steps from the prior itself on the same objective of the support rows: φ is
    both the prior and where the posterior's parameters start.

    Parameters
    ----------
    model : HierarchicalModel
        With a ``Network`` of any outcome.
    tasks : Episodes or Tasks
    num_steps : int
        K.
    step_size : float, optional
        η on the objective divided by a task's rows; 0.01 by default.
    num_samples : int
        Draws of θ by which expectations under q are taken.
    num_tasks : int, optional
        J, over which log p(φ) is shared out; for a source without end it has no weight.
    precision_prior : (float, float)
        Shape and rate of the Gamma prior on 1/τ²; μ ~ N(0, I).
    query : float
        Share of a task's rows in the query part, where ``tasks`` are a fixed set.
    **training
        See :class:`~hierbayes.meta.outer_loop.Training`.

    Returns
    -------
    Fit
        ``phi`` holds ``mu``, ``tau`` and ``sigma``, learned; ``fit.prior`` is N(μ, diag τ²);
        ``adapt`` gives draws of θ from q.

    References
    ----------
    Ravi and Beatson (2019), Amortized Bayesian meta-learning, ICLR, equation 2 and algorithm 1.

    Examples
    --------
    >>> import hierbayes as hb
    >>> network = hb.likelihoods.Network.mlp([1, 8, 1])
    >>> model = hb.HierarchicalModel(network, hb.priors.Gaussian(correlated=False))
    >>> fit = hb.meta.abml(model, hb.datasets.sinusoids(5), 1, num_samples=1, num_meta_steps=5)
    >>> sorted(fit.phi)
    ['mu', 'sigma', 'tau']
    """
    run, more = parted(training, Abml)
    method = Abml(
        num_steps, step_size, num_samples=num_samples, num_tasks=num_tasks,
        precision_prior=precision_prior, query=query, **more,
    )  # fmt: skip
    return method(model, tasks, **run)


@dataclass(frozen=True)
class Abml(Learner):
    """ABML with these settings; :func:`abml` says what they are."""

    num_steps: int = 5
    step_size: float | None = None
    num_samples: int = field(default=5, kw_only=True)
    num_tasks: int | None = field(default=None, kw_only=True)
    precision_prior: tuple[float, float] = field(default=(1.0, 0.01), kw_only=True)

    name = "ABML"
    rank = 0.4
    no_evidence = "ABML maximises a lower bound of the evidence, in info['history'], a row"

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = "auto" if self.step_size is None else self.step_size
        check_steps(self.num_steps, asked, "mean", "unrolled", None)
        num_tasks = 1 if self.num_tasks is None else self.num_tasks
        check_counts(num_samples=self.num_samples, num_tasks=num_tasks)
        given = inputs.numbers("precision_prior", self.precision_prior, shape=(2,))
        if not (given > 0).all():
            found = self.precision_prior
            raise InputError(f"precision_prior must be a positive shape and rate, found {found!r}")
        object.__setattr__(self, "precision_prior", tuple(given.tolist()))

    def check(self, model: HierarchicalModel) -> None:
        """Networks under a Gaussian prior."""
        model.require_gaussian_prior(
            "abml", "its approximate posteriors and its prior are normal", "use priors.Gaussian()"
        )
        if model.likelihood.linear:
            raise NotApplicable(
                "abml approximates the posterior of a network's weights; tasks that are linear in "
                "θ have exact ones: use hb.empirical_bayes or hb.full_bayes"
            )

    def learn(self, source: Source) -> Fit:
        """φ where the bound on the evidence is highest, a row."""
        assert isinstance(source, Batches)
        model, sample = source.model, source.tasks
        asked = "auto" if self.step_size is None else self.step_size
        eta = source.step_size(asked, {}, "mean")
        outer = Outer(model, len(sample.coef))
        adaptation = Variational(self.num_steps, eta, self.num_samples)
        spread = float(np.std(sample.outcome)) or 1.0

        def start(key: Any) -> Parameters:
            parameters = outer.start(key)
            log_tau = np.log(STARTING_TAU)
            each = jax.tree.map(lambda m: jnp.full_like(m, log_tau), parameters["mu"])
            has_noise = "sigma" in model.likelihood.parameters()
            noise = {"log_sigma": jnp.log(jnp.asarray(spread))} if has_noise else {}
            return parameters | {"log_tau": each} | noise

        described = {
            "num_steps": self.num_steps, "step_size": eta, "num_samples": self.num_samples,
            "num_tasks": self.num_tasks, "precision_prior": list(self.precision_prior),
        }  # fmt: skip
        objective = Bound(outer, adaptation, self)
        found = source.ascend(outer, objective, (), described, start)
        return source.fit(adaptation, found, described)


class Bound(NamedTuple):
    """The bound on log p(D_j | φ) of a batch's tasks, a row."""

    outer: Outer
    adaptation: Variational
    method: Abml

    def __call__(
        self, parameters: Parameters, support: Task, asked: Task, key: Any, given: Any
    ) -> Any:
        """Of every task (B,)."""
        del given
        model, method = self.outer.model, self.method
        phi, rows = self.outer.phi(parameters, {}), rows_together(support, asked)
        steps, draws = jax.random.split(key)
        q = self.adaptation.steps(model, phi, support, jax.random.split(steps, len(rows.mask)))
        shape = (rows.mask.shape[0], method.num_samples, phi["mu"].shape[0])
        noise = jax.random.normal(draws, shape, phi["mu"].dtype)
        bound = jax.vmap(lambda task, m, s, e: expected(model, phi, task, (m, s), e))(
            rows, *q, noise
        ) - jax.vmap(lambda m, s: divergence((m, s), phi))(*q)
        if method.num_tasks is not None:
            bound = bound + log_hyperprior(phi, method.precision_prior) / method.num_tasks
        return bound / jnp.maximum(rows.mask.sum(-1), 1)


def log_hyperprior(phi: dict[str, Any], precision_prior: tuple[float, float]) -> Any:
    """log p(μ, 1/τ²): standard normal and Gamma."""
    of_mu: Any = dist.Normal(0.0, 1.0).log_prob(phi["mu"])
    of_tau: Any = dist.Gamma(*precision_prior).log_prob(phi["tau"] ** -2)
    return of_mu.sum() + of_tau.sum()
