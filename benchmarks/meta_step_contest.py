"""The same meta-steps by hierbayes, by plain JAX and by PyTorch: do they agree, how fast are they.

Every contestant trains MAML, second order, on sinusoids: meta-batches of 25, 10 + 10 rows, 2 × 40
ReLU network, Adam of rate 0.001, on tasks that it draws itself.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hierbayes as hb
from hierbayes.tasks.episodes import Feed, Sampled, StreamEnded

SHOTS, BATCH, WIDTH, STEP_SIZE = 10, 25, 40, 0.01
SIZES = [1, WIDTH, WIDTH, 1]


def model() -> hb.HierarchicalModel:
    """The network of the MAML paper for every task."""
    return hb.HierarchicalModel(
        hb.likelihoods.Network.mlp(SIZES), hb.priors.Gaussian(correlated=False)
    )


# ------------------------------------------------------------------- hierbayes


@dataclass(frozen=True, eq=False)
class Timed(Sampled):
    """A source that notes when meta-steps are asked for, and ends after some seconds.

    The outer loop waits for each chunk's result before it asks for the next, so that the times
    between are those of the meta-steps, host work included. The first chunk compiles.
    """

    seconds: float = 1.0
    asked: list[tuple[float, int]] = field(default_factory=list)

    def feed(self, seed: Any, batch_size: int, start: int) -> Feed:
        """The source's own feed, with a clock."""
        return _Clock(self, Sampled.feed(self, seed, batch_size, start))

    def rate(self) -> float:
        """Meta-steps a second, after compilation."""
        (began, _), *_ = warm = self.asked[1:]
        return sum(count for _, count in warm[:-1]) / (warm[-1][0] - began)


@dataclass(frozen=True, eq=False)
class _Clock(Feed):
    source: Timed
    inner: Feed
    most = 1 << 30

    def chunk(self, count: int) -> tuple[Any, int]:
        asked = self.source.asked
        asked.append((time.perf_counter(), count))
        if len(asked) > 4 and asked[-1][0] - asked[1][0] > self.source.seconds:
            raise StreamEnded("the benchmark's seconds are over")
        return self.inner.chunk(count)

    def take(self, chunk: Any, place: Any, key: Any) -> Any:
        return self.inner.take(chunk, place, key)


def hierbayes_rate(
    num_steps: int, seconds: float, batch_size: int = BATCH, **settings: Any
) -> float:
    """Meta-steps a second of ``hb.maml``, warm, from the call's own chunks."""
    plain = hb.datasets.sinusoids(shots=SHOTS)
    timed = Timed(plain.draw_one, plain.data, seconds=seconds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hb.FitWarning)
        hb.maml(
            model(), timed, num_steps, STEP_SIZE, batch_size=batch_size,
            num_meta_steps=10**8, **settings,
        )  # fmt: skip
    return timed.rate()


def hierbayes_losses(num_steps: int, count: int, seed: int) -> float:
    """Mean query loss of held-out tasks after ``count`` meta-steps of ``hb.maml``."""
    fit = hb.maml(
        model(), hb.datasets.sinusoids(shots=SHOTS), num_steps, STEP_SIZE,
        num_meta_steps=count, evaluate_every=100, seed=seed,
    )  # fmt: skip
    return loss_of(fit.info["history"]["score"][-1])


def loss_of(score: float) -> float:
    """The mean squared error behind a log density a row at σ² = ½, log N = −(y − f)² − ½ log π."""
    return -score - 0.5 * float(np.log(np.pi))


def hierbayes_slope(num_steps: int, weights: Any, batch: Any) -> Any:
    """The meta-gradient as ``hb.maml`` follows it: where one outer step of length 1 leads."""
    x, y, x_query, y_query = batch
    parts = ((x, y), (x_query, y_query))
    one = hb.Episodes.from_generator(lambda seed: itertools.repeat(parts))
    plain = hb.likelihoods.Network.mlp(SIZES)
    fixed = hb.HierarchicalModel(
        hb.likelihoods.Network(plain.apply, weights), hb.priors.Gaussian(correlated=False)
    )
    fit = hb.maml(
        fixed, one, num_steps, STEP_SIZE, optimiser=optax.sgd(1.0), num_meta_steps=1, held_out=5
    )
    before = np.asarray(plain.vector(weights), np.float64)
    return before - fit.phi["mu"]


# ------------------------------------------------------------------- plain JAX


def apply(params: Any, x: Any) -> Any:
    """f (n,) of the network."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return (x @ params[-1]["w"] + params[-1]["b"])[:, 0]


def init(key: Any) -> Any:
    """Truncated normals of sd 1/√inputs, biases zero."""
    keys = jax.random.split(key, len(SIZES) - 1)
    return [
        {"w": jax.random.truncated_normal(k, -2.0, 2.0, (a, b)) / a**0.5, "b": jnp.zeros(b)}
        for k, a, b in zip(keys, SIZES[:-1], SIZES[1:], strict=True)
    ]


def meta_loss(params: Any, batch: Any, num_steps: int) -> Any:
    """Mean query loss after ``num_steps`` gradient steps of every task."""

    def loss(p: Any, x: Any, y: Any) -> Any:
        return jnp.mean((apply(p, x) - y) ** 2)

    def task(x: Any, y: Any, x_query: Any, y_query: Any) -> Any:
        def step(p: Any, _: None) -> tuple[Any, None]:
            slope = jax.grad(loss)(p, x, y)
            return jax.tree.map(lambda w, g: w - STEP_SIZE * g, p, slope), None

        adapted, _ = jax.lax.scan(step, params, None, num_steps)
        return loss(adapted, x_query, y_query)

    return jax.vmap(task)(*batch).mean()


def draw(key: Any) -> Any:
    """A meta-batch of sinusoids."""
    of_a, of_b, of_x = jax.random.split(key, 3)
    amplitude = jax.random.uniform(of_a, (BATCH, 1), minval=0.1, maxval=5.0)
    phase = jax.random.uniform(of_b, (BATCH, 1), maxval=jnp.pi)
    x = jax.random.uniform(of_x, (BATCH, 2 * SHOTS, 1), minval=-5.0, maxval=5.0)
    y = amplitude * jnp.sin(x[..., 0] - phase)
    return x[:, :SHOTS], y[:, :SHOTS], x[:, SHOTS:], y[:, SHOTS:]


class PlainJax:
    """A hand-written compiled scan over meta-steps; it goes on where it was."""

    def __init__(self, num_steps: int, seed: int = 0) -> None:
        adam = optax.adam(1e-3)
        params = init(jax.random.key(seed))
        self.carry = (params, adam.init(params))
        self.key = jax.random.key(seed + 1)

        def one(carry: Any, key: Any) -> tuple[Any, Any]:
            params, state = carry
            value, slope = jax.value_and_grad(meta_loss)(params, draw(key), num_steps)
            updates, state = adam.update(slope, state)
            return (optax.apply_updates(params, updates), state), value

        self.many = jax.jit(lambda carry, keys: jax.lax.scan(one, carry, keys))

    def train(self, count: int) -> dict[str, Any]:
        """Seconds and losses of ``count`` meta-steps."""
        self.key, key = jax.random.split(self.key)
        keys = jax.block_until_ready(jax.random.split(key, count))
        started = time.perf_counter()
        self.carry, losses = jax.block_until_ready(self.many(self.carry, keys))
        return {"seconds": time.perf_counter() - started, "losses": np.asarray(losses)}


# --------------------------------------------------------------------- PyTorch


class Peers:
    """The process that runs learn2learn and higher; ``versions`` says what it has."""

    def __init__(self) -> None:
        python = os.environ.get("HIERBAYES_TORCH_PYTHON", sys.executable)
        if shutil.which(python) is None:
            print(f"HIERBAYES_TORCH_PYTHON: no interpreter {python!r}; this one is asked for torch")
            python = sys.executable
        script = Path(__file__).parent / "peers" / "torch_maml.py"
        self.process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self.versions = self.ask(what="versions")
        except (BrokenPipeError, EOFError):
            lacks = f"{python} cannot import torch; set HIERBAYES_TORCH_PYTHON"
            self.versions = {name: None for name in ("learn2learn", "higher")} | {
                f"{name} lacks": lacks for name in ("learn2learn", "higher")
            }

    def ask(self, **asked: Any) -> dict[str, Any]:
        """The process's answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise EOFError("the PyTorch process ended")
        return json.loads(line)

    def train(self, peer: str, num_steps: int, count: int, **more: Any) -> dict[str, Any]:
        """Seconds and losses of ``count`` further meta-steps."""
        return self.ask(what="train", count=count, **_described(peer, num_steps), **more)

    def slope(self, peer: str, num_steps: int, weights: Any, batch: Any) -> np.ndarray:
        """The meta-gradient, in the order of the network's own weights."""
        # torch keeps (outputs, inputs), and an outcome column
        given = [a.tolist() for layer in weights for a in (layer["w"].T, layer["b"])]
        x, y, x_query, y_query = (np.asarray(part, np.float64) for part in batch)
        parts = [x, y[..., None], x_query, y_query[..., None]]
        told = self.ask(
            what="slope", weights=given, batch=[p.tolist() for p in parts],
            **_described(peer, num_steps),
        )  # fmt: skip
        arrays = [np.asarray(a).T for a in told["slope"]]
        layers = [{"w": w, "b": b} for w, b in zip(arrays[::2], arrays[1::2], strict=True)]
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(layers)])

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _described(peer: str, num_steps: int) -> dict[str, Any]:
    return {
        "peer": peer, "num_steps": num_steps, "step_size": STEP_SIZE, "width": WIDTH,
        "shots": SHOTS, "batch_size": BATCH,
    }  # fmt: skip
