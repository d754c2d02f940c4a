r"""Reptile on a source of tasks: φ follows, batch by batch, where tasks go from it.

.. math:: \Delta_\varphi = \frac1B \sum_{j \in \text{batch}} (\theta_j^K - \varphi)
"""

from __future__ import annotations

import time
from typing import Any

import jax

from hierbayes.adaptation import GradientSteps
from hierbayes.errors import InputError
from hierbayes.evidence import Predictive
from hierbayes.fit import Fit
from hierbayes.likelihoods import LastLayer
from hierbayes.meta.episodic import (
    Outer,
    Parameters,
    finish,
    fixed_noise,
    per_row,
    rows_together,
    run,
    source,
)
from hierbayes.meta.maml_on_episodes import query_deviation
from hierbayes.meta.training import DEFAULTS
from hierbayes.model import HierarchicalModel
from hierbayes.tasks import Task


def follow_moves(
    model: HierarchicalModel,
    tasks: Any,
    adaptation: GradientSteps,
    step_size: float,
    query: float,
    sigma: float | None,
    training: dict[str, Any],
) -> Fit:
    """Move φ along the mean move of each batch's tasks, all their rows in the inner loop."""
    import optax

    started = time.perf_counter()
    model = model.without_encoder()
    if isinstance(model.likelihood, LastLayer):
        raise InputError(
            "Reptile moves φ to where tasks take θ, and tasks do not move features that all share: "
            "use hb.maml (ANIL) or hb.empirical_bayes with a LastLayer"
        )
    episodes, sample = source(model, tasks, query, training.get("held_out") or DEFAULTS["held_out"])
    outer = Outer(model, len(sample.coef), fixed_noise(model, sigma))
    evidence = Predictive(adaptation)

    def direction(parameters: Parameters, support: Task, asked: Task, key: Any) -> Any:
        del key
        phi, rows = outer.phi(parameters), rows_together(support, asked)
        thetas = adaptation.steps(model, phi, rows, None)
        move = (thetas - phi["mu"]).mean(0)
        each = model.likelihood.log_likelihood_of_rows(thetas, phi, rows, None)
        return per_row(each, rows.mask), {"mu": _like(parameters["mu"], move, model)}

    def score(parameters: Parameters, support: Task, asked: Task, key: Any) -> Any:
        del key
        rows = evidence.of_rows(model, outer.phi(parameters), (support, None), (asked, None))
        return per_row(rows, asked.mask)

    described = {
        "num_steps": adaptation.num_steps, "step_size": step_size, "loss": adaptation.loss,
        "sigma": sigma, "query": query,
    }  # fmt: skip
    training = training | {"optimiser": training.get("optimiser") or optax.sgd(0.1)}
    trained = run(outer, direction, score, episodes, training, "Reptile", described)
    return finish(
        "Reptile", outer, adaptation, trained, sample, episodes, described, started,
        "Reptile follows a direction and maximises nothing",
        query_deviation(adaptation) if "sigma" in model.likelihood.parameters() else None,
    )  # fmt: skip


def _like(parameters: Any, move: jax.Array, model: HierarchicalModel) -> Any:
    """A move of θ as the parameters are: a network's are the pytree that it takes."""
    tree = model.likelihood.tree(move)
    return jax.tree.map(lambda p, m: m.reshape(p.shape).astype(p.dtype), parameters, tree)
