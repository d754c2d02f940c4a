r"""NUTS over all weights of a few small tasks, under a learned prior: the reference for the others.

.. math:: p(\theta_j \mid D_j, \varphi) \propto p(D_j \mid \theta_j, \varphi)\,
          N(\theta_j; \mu, \operatorname{diag} \tau^2)
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from hierbayes import inputs
from hierbayes.adaptation import Adaptation, Draws
from hierbayes.errors import InputError, announce
from hierbayes.fit import Fit
from hierbayes.fit.adapted import locations
from hierbayes.fit.fit import check_fit
from hierbayes.fit.method import Derived
from hierbayes.meta.diagnostics import remarks
from hierbayes.meta.sampling import GivenPhi, run_nuts
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import as_key, float64
from hierbayes.tasks import Tasks


def nuts(
    fit: Fit,
    tasks: Any,
    *,
    tau: float | None = None,
    sigma: float | None = None,
    num_draws: int = 500,
    num_chains: int = 4,
    num_warmup: int = 500,
    target_accept: float = 0.8,
    seed: int | jax.Array = 0,
    progress: bool | None = None,
) -> Fit:
    r"""The posterior of a network's weights, by NUTS, under the prior that ``fit`` has learned.

    .. math:: p(\theta_j \mid D_j, \varphi) \propto p(D_j \mid \theta_j, \sigma)\,
              N(\theta_j; \mu, \operatorname{diag} \tau^2)

    For a few small tasks, to hold the cheaper posteriors against. The posterior of weights has many
    equivalent modes, between which chains may not travel: R̂ of weights may be large where R̂ of
    what they predict is not.

    Parameters
    ----------
    fit : Fit
        Of a network, whose ``phi`` gives μ, and τ and σ where it holds them.
    tasks : Tasks
        The tasks whose weights are sampled.
    tau : float, optional
        Prior deviation of every weight, where φ has none: MAML and Reptile learn no shared prior;
        √(Kη / n) is the one that K short steps on the mean of n rows imply.
    sigma : float, optional
        Noise, in the place of φ's.
    num_draws, num_chains, num_warmup, target_accept
        Of NUTS, a chain.
    seed : int or JAX key
    progress : bool, optional
        Show a progress bar; by default where stderr is a terminal.

    Returns
    -------
    Fit
        With draws of ``theta`` of these tasks; ``predict`` averages over them.

    Examples
    --------
    >>> import hierbayes as hb
    >>> network = hb.likelihoods.Network.mlp([1, 4, 1])
    >>> model = hb.HierarchicalModel(network, hb.priors.Gaussian(correlated=False))
    >>> episodes = hb.datasets.sinusoids(5)
    >>> fit = hb.maml(model, episodes, num_steps=1, num_meta_steps=20, batch_size=5)
    >>> support, query = episodes.draw(1)
    >>> sampled = hb.meta.nuts(fit, support, tau=0.3, sigma=0.5, num_draws=50, num_chains=2,
    ...                        num_warmup=50, progress=False)  # doctest: +SKIP
    """
    started = time.perf_counter()
    check_fit(fit)
    num_draws, num_chains, num_warmup = inputs.counts(
        num_draws=num_draws, num_chains=num_chains, num_warmup=num_warmup
    )
    target_accept = inputs.share("target_accept", target_accept)
    progress, seed = inputs.optional_flag("progress", progress), inputs.seed(seed)
    tasks = _tasks(fit.model, tasks)
    phi = _prior(fit, tau, sigma)
    adaptation = ByNuts(num_draws, num_chains, num_warmup, target_accept, seed, progress)
    theta, stats = adaptation.sample(fit.model, tasks, phi)
    adapted = adaptation.read(fit.model, tasks, phi, theta, stats)
    return Fit(
        Derived("NUTS"), fit.model, tasks, phi, adaptation, adapted,
        theta_draws=theta, sample_stats=stats,
        no_evidence="phi was taken from another fit", warnings=announce(adapted.remarks),
        info={"num_draws": num_draws, "num_chains": num_chains, "num_warmup": num_warmup,
              "phi_from": fit.method.name, "seconds": time.perf_counter() - started},
    )  # fmt: skip


def _tasks(model: HierarchicalModel, tasks: Any) -> Tasks:
    """The tasks whose weights are sampled; refused where there are none, or no outcomes."""
    if model.likelihood.linear:
        raise InputError("nuts samples the weights of a network; for other tasks use hb.full_bayes")
    tasks = model.tasks(tasks)
    model.likelihood.check(tasks)
    if tasks.outcome is None:
        raise InputError(f"the tasks hold no outcome {tasks.labels.outcome!r} to learn from")
    model.require_gaussian_prior(
        "nuts over weights", "it samples under N(μ, diag τ²)", "use priors.Gaussian()"
    )
    return tasks


def _prior(fit: Fit, tau: float | None, sigma: float | None) -> dict[str, np.ndarray]:
    """μ, τ and σ, of the fit or as given."""
    phi = {name: np.asarray(fit.phi[name]) for name in ("mu", "tau", "sigma") if name in fit.phi}
    for name, value in (("tau", tau), ("sigma", sigma)):
        if value is not None:
            phi[name] = np.asarray(inputs.positive(name, value))
    if "sigma" not in fit.model.likelihood.parameters() and sigma is not None:
        raise InputError("sigma has no place in this likelihood; leave it out")
    if "sigma_query" in fit.phi and sigma is None:
        raise InputError(
            f"phi's sigma sets the units of {fit.method}'s steps and is no estimate of the noise: "
            "pass sigma=…, the deviation of a row given its task's weights"
        )
    if "tau" not in phi:
        raise InputError(
            f"{fit.method} learns no prior that all tasks share: pass tau=…, the prior deviation "
            "of every weight"
        )
    return phi | {"tau": np.broadcast_to(phi["tau"], phi["mu"].shape)}


@dataclass(frozen=True)
class ByNuts(Adaptation):
    """A(D; φ) = draws of p(θ | D, φ), all weights of all tasks in one run of NUTS."""

    num_draws: int
    num_chains: int
    num_warmup: int
    target_accept: float
    seed: Any = 0
    progress: bool | None = None
    name = "NUTS"

    def __call__(self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]) -> Draws:
        """Draws of θ and their mean; ``remarks`` hold what the diagnostics say."""
        return self.read(model, tasks, phi, *self.sample(model, tasks, phi))

    def sample(
        self, model: HierarchicalModel, tasks: Tasks, phi: dict[str, Any]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """θ (chain, draw, J, d) and sample statistics."""
        rows, of_row = model.likelihood.arrange(tasks)
        shape = (tasks.num_tasks, len(phi["mu"]))
        location = np.broadcast_to(phi["mu"], shape)
        data = dict(phi), location, phi["tau"], rows, of_row
        with float64():
            key, other = jax.random.split(as_key(self.seed))
            start = {"z": 0.1 * jax.random.normal(other, (self.num_chains, *shape))}
            draws, stats = run_nuts(
                GivenPhi(model.without_encoder()), data, key, start, dense=False,
                num_draws=self.num_draws, num_chains=self.num_chains, num_warmup=self.num_warmup,
                target_accept=self.target_accept, progress=self.progress,
            )  # fmt: skip
        return phi["mu"] + phi["tau"] * draws["z"], stats

    def read(
        self,
        model: HierarchicalModel,
        tasks: Tasks,
        phi: dict[str, Any],
        theta: np.ndarray,
        stats: dict[str, np.ndarray],
    ) -> Draws:
        """The draws; judged by what they say of the tasks' rows, since weights may be permuted."""
        flat = theta.reshape(-1, *theta.shape[2:])
        f = locations(model, flat, phi, tasks)
        judged = {"f": f.reshape(*theta.shape[:2], -1)}
        said = remarks(judged, None, stats, tasks, {"f": ("row",)})
        return Draws.of(flat, tuple(said))
