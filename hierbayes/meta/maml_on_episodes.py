r"""MAML and its family on a source of tasks: networks, images, tasks drawn on the fly.

.. math:: \varphi^* = \arg\max_\varphi \; \mathbb E_j \left[
    \log p\!\left(D_j^{\text{query}} \mid \theta_j^K(D_j^{\text{support}}, \varphi)\right)\right]

First-order MAML is another derivative, Meta-SGD a step size a weight, ANIL a likelihood whose θ is
the last layer, iMAML steps on the log posterior with an implicit derivative.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.adaptation import GradientSteps
from hierbayes.evidence import Predictive
from hierbayes.fit import Fit
from hierbayes.meta.episodic import Outer, Parameters, finish, fixed_noise, per_row, run, source
from hierbayes.meta.training import DEFAULTS, ascent_of
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Task, Tasks

STARTING_TAU = 0.3
"""Where a learned 1/√λ starts, in the units of the weights."""


def maximise_predictive(
    method: str,
    model: HierarchicalModel,
    tasks: Any,
    adaptation: GradientSteps,
    *,
    step_size: float | None,
    learn_step_size: bool | str,
    query: float,
    sigma: float | None,
    tau: float | Literal["learn"] | None = None,
    training: dict[str, Any],
) -> Fit:
    """Learn μ, and step sizes if wanted, where adapted tasks predict their query rows best."""
    started = time.perf_counter()
    model = model.without_encoder()
    episodes, sample = source(model, tasks, query, training.get("held_out") or DEFAULTS["held_out"])
    fixed = fixed_noise(model, sigma)
    if isinstance(tau, float):
        fixed["tau"] = np.asarray(tau)
    outer = Outer(model, len(sample.coef), fixed)
    evidence = Predictive(adaptation)

    def start(key: Any) -> Parameters:
        parameters = outer.start(key)
        if learn_step_size and step_size is not None:
            log_eta = jnp.log(jnp.asarray(step_size))
            each = jax.tree.map(lambda m: jnp.full_like(m, log_eta), parameters["mu"])
            parameters["log_step_size"] = each if learn_step_size == "coef" else log_eta
        if tau == "learn":
            parameters["log_tau"] = jnp.log(jnp.asarray(STARTING_TAU))
        return parameters

    def objective(parameters: Parameters, support: Task, asked: Task, key: Any) -> Any:
        del key
        phi = outer.phi(parameters)
        rows = evidence.of_rows(model, phi, (support, None), (asked, None))
        return per_row(rows, asked.mask)

    described = {
        "num_steps": adaptation.num_steps, "step_size": step_size, "loss": adaptation.loss,
        "derivative": adaptation.derivative, "learn_step_size": learn_step_size, "sigma": sigma,
        "tau": tau, "query": query,
    }  # fmt: skip
    implicit = adaptation.derivative == "implicit"

    def residuals(parameters: Parameters, support: Task, asked: Task) -> dict[str, Any]:
        left, solved = adaptation.how_solved(model, outer.phi(parameters), support, asked)
        return {
            "inner_residual": left.max(), "gradient_residual": solved.residual.max(),
            "not_a_maximum": (~solved.definite).mean(),
        }  # fmt: skip

    trained = run(
        outer, ascent_of(objective), objective, episodes, training, method, described, start,
        measure=residuals if implicit else None,
    )  # fmt: skip
    if implicit:
        trained.warnings += _unsolved(method, adaptation, trained.history)
    learned = "sigma" in model.likelihood.parameters()
    fit = finish(
        method, outer, adaptation, trained, sample, episodes, described, started,
        f"{method} maximises the predictive evidence of query rows, in info['history'], not "
        "log p(D | φ)",
        query_deviation(adaptation) if learned else None,
    )  # fmt: skip
    if "tau" in fit.phi:
        fit = replace(fit, phi={**fit.phi, "tau": np.full(len(sample.coef), fit.phi["tau"])})
    return fit


SOLVED, SOLVED_SLOPE = 1e-2, 1e-3
"""Of the inner problem's slope, and of the right-hand side of the gradient's system: what may be
left for the gradient to be right to about as much."""


def _unsolved(method: str, adaptation: GradientSteps, history: dict[str, list[float]]) -> list[str]:
    """What to say where the implicit gradient is not that of a maximum, from held-out tasks."""
    last = {name: values[-1] for name, values in history.items()}
    said = []
    if not last["inner_residual"] <= SOLVED:
        said.append(
            f"{method}: {adaptation.num_steps} inner steps do not reach the maximum whose "
            f"derivative the outer loop takes: up to {last['inner_residual']:.2g} of the slope at "
            f"phi is left at theta in held-out tasks, {SOLVED:g} being little. Take more "
            'or longer steps, a larger prior_precision, or derivative="unrolled", that of the steps'
        )
    if last["not_a_maximum"] > 0:
        said.append(
            f"{method}: in {100 * last['not_a_maximum']:.2g} % of held-out tasks the log posterior "
            "bends upwards somewhere at theta, which is no maximum there and has no implicit "
            "gradient: conjugate gradients stop at that direction, and a share of up to "
            f"{last['gradient_residual']:.2g} of their system is left. Take a larger "
            'prior_precision or more steps, or derivative="unrolled"'
        )
    elif not last["gradient_residual"] <= SOLVED_SLOPE:
        said.append(
            f"{method}: conjugate gradients for the implicit gradient have not converged: a share "
            f"of up to {last['gradient_residual']:.2g} of their system is left in held-out tasks. "
            'Take a larger prior_precision, or dtype="float64" in the likelihood'
        )
    return said


def query_deviation(adaptation: GradientSteps) -> Any:
    """``sigma_query`` at its maximum: the deviation of query rows from what adapted tasks say.

    Tasks whose steps diverged are left out: adapting to one says so. Until then σ stands in its
    place, on which μ does not depend: it scales the loss.
    """

    def learn(
        model: HierarchicalModel, phi: dict[str, Any], support: Tasks, query: Tasks
    ) -> dict[str, Any]:
        thetas = adaptation(model, support, phi).mean
        rows, of_row = model.likelihood.arrange(query)
        f = np.asarray(model.likelihood.locations(thetas, phi, rows, of_row), np.float64)
        residual = (np.asarray(rows.outcome) - f)[np.asarray(rows.mask)]
        return {"sigma_query": np.sqrt(np.mean(residual[np.isfinite(residual)] ** 2))}

    return learn
