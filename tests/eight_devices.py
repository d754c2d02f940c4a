"""Run by test_sharding.py in a process of its own with eight devices: prints JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
import sharded
from jax.sharding import Mesh

import hierbayes as hb
from hierbayes.adaptation.exact import collapse
from hierbayes.evidence import Exact, Predictive
from hierbayes.meta.collapsed import Collapsed
from hierbayes.numerics import float64
from hierbayes.statistics import placed_statistics, statistics
from hierbayes.tasks.layout import dealt, on_devices

EXPECTED = 8


def differences(mesh: Mesh) -> dict[str, float]:
    """Every method, sharded and not."""
    model, tasks = sharded.two_coefficients()
    fit = hb.empirical_bayes(model, tasks)
    found = sharded.compare(
        sharded.two_coefficients, mesh,
        {
            "ml": hb.empirical_bayes,
            "maml": lambda m, t: hb.maml(m, t, num_steps=3, num_splits=2),
            "reptile": lambda m, t: hb.reptile(m, t, num_steps=3),
            "complete pooling": hb.complete_pooling,
            "adapt": lambda m, t: sharded.adapted(fit, t.take([4, 19, 2])),
            "evidence and draws": lambda m, t: sharded.evidence_and_draws(fit, t),
        },
    )  # fmt: skip
    found |= sharded.compare(
        sharded.few_with_known_errors, mesh,
        {
            "reml": lambda m, t: hb.empirical_bayes(m, t, criterion="reml"),
            "map": lambda m, t: hb.empirical_bayes(m, t, criterion="map"),
            "full Bayes": lambda m, t: hb.full_bayes(m, t, num_draws=50, num_chains=2, seed=3),
            "iMAML": lambda m, t: hb.imaml(m, t, prior_precision=0.5),
            "kass-steffey": lambda m, t: hb.empirical_bayes(m, t, intervals="kass-steffey"),
        },
    )  # fmt: skip
    return found | sharded.compare(
        sharded.binary, mesh,
        {
            "Laplace": sharded.laplace,
            "Laplace's evidence": lambda m, t: hb.empirical_bayes(m, t, evidence="laplace"),
            "maml by Adam": lambda m, t: hb.maml(
                m, t.take(np.flatnonzero(t.sizes > 1)), num_steps=3, num_meta_steps=20,
                inner_optimiser=optax.adam(0.1), optimiser=optax.adam(0.05),
            ),
        },
    )  # fmt: skip


def parts(array: Any) -> list[int]:
    """Number of devices, the whole length of the axis that is cut, and of its part on one."""
    part = array.addressable_shards[0].data.shape
    axis = next((i for i, n in enumerate(part) if n != array.shape[i]), 0)
    return [len(array.sharding.device_set), array.shape[axis], part[axis]]


def placing(mesh: Mesh) -> dict[str, Any]:
    """Where arrays lie, what programs send, and how evenly rows are dealt."""
    model, tasks = sharded.two_coefficients()
    spread = tasks.shard(mesh)
    fit = hb.empirical_bayes(model, tasks)
    with float64():
        stats = placed_statistics(spread)
        rows, of_row = on_devices(model.likelihood.arrange(spread), spread)

        def total(stats: Any) -> Any:
            return collapse(stats, model.prior, dict(fit.phi)).log_normaliser.sum()

        program = jax.jit(total).lower(stats).compile().as_text() or ""
        support, query = spread.split(seed=0)
        maml = Predictive(hb.adaptation.GradientSteps(3, 0.01))
        data = maml.arrange(model, support, query)
        phi = {**fit.phi, "sigma_query": fit.phi["sigma"]}
        inner = jax.jit(lambda d: maml.of_rows(model.without_encoder(), phi, *d).sum())
        steps = inner.lower(data).compile().as_text() or ""
        many = hb.Tasks.from_arrays([(np.ones((1, 1)), np.array([float(j)])) for j in range(1200)])
        collapsed = Collapsed(model.resolve(many), many.shard(mesh)).problem
    skewed = tasks.take(np.argsort(-tasks.sizes)).shard(mesh)
    order = dealt(skewed, skewed.sizes)
    assert order is not None
    dealt_out = np.where(order >= 0, skewed.sizes[order], 0).reshape(mesh.size, -1).sum(1)
    return {
        "statistics": parts(stats.x), "rows": parts(rows.outcome), "task of row": parts(of_row),
        "collapsed": parts(collapsed.y),
        "evidence all-reduces": program.count("all-reduce("),
        "evidence all-gathers": program.count("all-gather("),
        "maml all-reduces": steps.count("all-reduce("),
        "maml all-gathers": steps.count("all-gather("),
        "rows dealt": dealt_out.tolist(), "largest task": int(tasks.sizes.max()),
        "parts keep it": [part.sharding == spread.sharding for part in spread.split()],
    }  # fmt: skip


def controls(mesh: Mesh) -> dict[str, float]:
    """What must not agree."""
    model, tasks = sharded.two_coefficients()
    fit = hb.empirical_bayes(model, tasks)
    fewer = tasks.take(np.arange(1, tasks.num_tasks)).shard(mesh)
    with float64():
        stats = statistics(tasks)
        wrong = replace(stats, num_rows=np.pad(stats.num_rows, (0, 3), constant_values=1.0))
        wrong = replace(
            wrong,
            **{
                name: np.pad(getattr(stats, name), [(0, 0)] * (at - 1) + [(0, 3)])
                for name, at in {"x": 3, "z": 3, "y": 2, "log_scale": 1}.items()
            },
            task_predictors=np.pad(stats.task_predictors, [(0, 0), (0, 3)]),
        )
        right = replace(wrong, num_rows=np.pad(stats.num_rows, (0, 3)))
        alone, filled, misled = (
            float(collapse(s, model.prior, dict(fit.phi)).log_normaliser.sum())
            for s in (stats, right, wrong)
        )
    return {
        "a task less": abs(Exact()(model, fewer, dict(fit.phi)).sum() - alone),
        "filled with zeros": abs(filled - alone), "filled with ones": abs(misled - alone),
    }  # fmt: skip


if __name__ == "__main__":
    sharded.quietly()
    assert jax.device_count() == EXPECTED
    mesh = jax.make_mesh((EXPECTED,), ("tasks",))
    print(
        json.dumps(
            {
                "differences": differences(mesh),
                "placing": placing(mesh),
                "controls": controls(mesh),
            }
        )
    )
