r"""The outer loop on a source of tasks: stochastic ascent, many meta-steps inside a compiled call.

.. math:: \varphi_{t+1} = \mathrm{optimiser}\!\left(\varphi_t,\;
          \nabla_\varphi \frac1B \sum_{j \in \text{batch}_t} \text{evidence}_j(\varphi_t)\right)

A meta-step's batch and its other random numbers follow from the seed and its number alone, so that
a run that was cut and resumed ends bit for bit where one that was not would.

The state of a long run in one file, written whole, read back bit for bit.
"""

from __future__ import annotations

import functools
import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hierbayes.errors import InputError
from hierbayes.files import checked_place, sealed, unsealed, write_whole
from hierbayes.numerics import arithmetic, as_key
from hierbayes.sharding import on_device
from hierbayes.tasks import Episodes, Task
from hierbayes.tasks.episodes import StreamEnded

EVERY = 60.0
"""Seconds between two checkpoints."""


class Checkpoint:
    """A file that holds a pytree and some counters, for one run with its settings.

    ``path`` None keeps nothing.
    """

    def __init__(self, path: Any, method: str, settings: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.described = json.loads(json.dumps({"method": method, **settings}, default=repr))
        self._last = time.monotonic()
        if self.path is not None and not self.path.parent.is_dir():
            raise InputError(f"checkpoint: the folder of {str(path)!r} does not exist")
        if self.path is not None and self.path.is_dir():
            raise InputError(f"checkpoint: {str(path)!r} is a folder; give the path of a file")
        if self.path is not None:
            checked_place(self.path)

    def save(self, state: Any, counters: dict[str, Any], *, force: bool = False) -> None:
        """Write, if a minute has passed since the last time or it is forced."""
        if self.path is None or not (force or time.monotonic() - self._last > EVERY):
            return
        leaves: dict[str, Any] = {
            f"leaf.{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))
        }
        text = json.dumps({"run": self.described, "counters": counters})
        file = io.BytesIO()
        np.savez(file, described=np.array(text), **leaves)
        write_whole(self.path, sealed(file.getvalue()))
        self._last = time.monotonic()

    def load(self, like: Any, own: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """(state, counters) of the file, as ``like`` and ``own`` are; None where none is there."""
        if self.path is None or not self.path.exists():
            return None
        try:
            data = self.path.read_bytes()
            content = unsealed(data)  # None before there was a checksum
            opened = io.BytesIO(data if content is None else content)
            with np.load(opened, allow_pickle=False) as file:
                described = json.loads(str(file["described"]))
                found = [file[f"leaf.{i}"] for i in range(len(file.files) - 1)]
            before, counters = described["run"], described["counters"]
            _check_counters(counters, own)
        except Exception as error:  # NumPy raises whatever unzipping and parsing do
            raise InputError(
                f"{str(self.path)!r} is no checkpoint of hierbayes, or damaged "
                f"({type(error).__name__}: {error}); remove it to start anew"
            ) from error
        self._refuse_another(before)
        leaves, structure = jax.tree.flatten(like)
        shapes = [(np.shape(x), np.asarray(x).dtype) for x in leaves]
        if shapes != [(x.shape, x.dtype) for x in found]:
            raise InputError(
                f"{str(self.path)!r} holds other weights, or another optimiser's state, than this "
                "run's; give another path, or remove the file"
            )
        return structure.unflatten(found), counters

    def _refuse_another(self, before: dict[str, Any]) -> None:
        """Refuse the checkpoint of a run with other settings, naming those."""
        if before == self.described:
            return
        other = [
            f"{n}={before.get(n)!r} there, {self.described.get(n)!r} here"
            for n in sorted(before.keys() | self.described.keys())
            if before.get(n) != self.described.get(n)
        ]
        raise InputError(
            f"{str(self.path)!r} is the checkpoint of another run ({'; '.join(other)}); give "
            "another path, or remove the file"
        )


def _check_counters(found: Any, own: dict[str, Any]) -> None:
    """Refuse counters that are not of the kinds of a run's own."""
    for name, value in own.items():
        there = found[name]
        if isinstance(value, dict):
            _check_counters(there, value)
            continue
        kinds = list if isinstance(value, list) else int if isinstance(value, int) else (int, float)
        if not isinstance(there, kinds) or isinstance(there, bool):
            raise ValueError(f"{name} is {there!r:.40}")


LONGEST = 500
"""Meta-steps in one compiled call at most."""

RESPONSE = 1.0
"""Seconds that one compiled call should take: progress is shown, and an interruption heard."""

Score = Callable[[Any, Task, Task, Any, Any], jax.Array]
"""(parameters, support, query, key, given) → score of every task (B,).

As :data:`Direction` and :data:`Measure` hashable by what it does; numbers stand in ``given``. So
one compiled program serves all data of one shape.
"""

Direction = Callable[[Any, Task, Task, Any, Any], tuple[jax.Array, Any]]
"""The same arguments → (score of every task (B,), where to go, like parameters)."""

Measure = Callable[[Any, Task, Task, Any], dict[str, jax.Array]]
"""(parameters, support, query, given) → numbers by name."""


class ToTrain(NamedTuple):
    """Where a run goes, what judges it, and the numbers that both are given.

    ``score`` judges held-out tasks; ``measure`` is what else of them goes into the history.
    """

    direction: Direction
    score: Score
    given: Any
    measure: Measure | None = None


@dataclass
class Trained:
    """Where a run ended: φ's parameters, and how it went.

    ``held_out`` is the score of these parameters on the held-out tasks.
    """

    parameters: Any
    steps: int
    held_out: float
    history: dict[str, list[float]]
    warnings: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


class Ascent(NamedTuple):
    """The direction of steepest ascent of the mean over tasks of ``objective`` (B,)."""

    objective: Score

    def __call__(
        self, parameters: Any, support: Task, query: Task, key: Any, given: Any
    ) -> tuple[Any, Any]:
        """Every task's score, and the slope of their mean."""

        def mean(p: Any) -> tuple[Any, Any]:
            each = self.objective(p, support, query, key, given)
            return each.mean(), each

        (_, each), slope = jax.value_and_grad(mean, has_aux=True)(parameters)
        return each, slope


def train(
    to_train: ToTrain,
    start: Callable[[Any], Any],
    episodes: Episodes,
    chosen: dict[str, Any],
    precision: str,
    method: str,
    described: dict[str, Any],
) -> Trained:
    """Follow a direction from ``start(key)``.

    ``precision`` "float32" or "float64" is what everything is computed in; ``described`` tells
    one run's checkpoint from another's.
    """
    with arithmetic(precision):
        return _Run(to_train, start, episodes, chosen, method, described).go()


class _Program(NamedTuple):
    """What the compiled loop is made of."""

    direction: Direction
    take: Any
    optimiser: Any
    num_tasks: int


@functools.partial(jax.jit, static_argnums=0)
def _many(
    program: _Program, carry: Any, given: Any, chunk: Any, key: Any, first: Any, count: Any
) -> Any:
    """``count`` meta-steps from the ``first``: the carry, every task's score, which were sound."""
    import optax

    optimiser = optax.with_extra_args_support(program.optimiser)

    def one(place: Any, state: Any) -> Any:
        (parameters, memory), scores, sound = state
        draw, other = jax.random.split(jax.random.fold_in(key, first + place))
        support, query = _cast(program.take(chunk, place, draw))
        each, uphill = program.direction(parameters, support, query, other, given)
        downhill = jax.tree.map(jnp.negative, uphill)
        updates, memory = optimiser.update(downhill, memory, parameters)
        parameters = optax.apply_updates(parameters, updates)
        sizes = jnp.stack([optax.tree.norm(downhill), optax.tree.norm(parameters)])
        fine = jnp.isfinite(sizes).all() & jnp.isfinite(each).all()
        return (parameters, memory), scores.at[place].set(each), sound.at[place].set(fine)

    nothing = jnp.zeros((LONGEST, program.num_tasks)), jnp.ones(LONGEST, bool)
    return jax.lax.fori_loop(0, count, one, (carry, *nothing))


@functools.partial(jax.jit, static_argnums=0)
def _scored(score: Score, parameters: Any, held: Any, key: Any, given: Any) -> Any:
    return score(parameters, held[0], held[1], key, given)


@functools.partial(jax.jit, static_argnums=0)
def _measured(measure: Measure, parameters: Any, held: Any, given: Any) -> Any:
    return measure(parameters, held[0], held[1], given)


class _Run:
    """One run: its compiled chunk, its state, and what it does at the end of a chunk."""

    def __init__(
        self,
        to_train: ToTrain,
        start: Callable[[Any], Any],
        episodes: Episodes,
        chosen: dict[str, Any],
        method: str,
        described: dict[str, Any],
    ) -> None:
        import optax

        keys = jax.random.split(as_key(chosen["seed"]), 4)
        self.start_key, self.train_key, self.held_key, self.score_key = keys
        self.chosen, self.method, self.episodes = chosen, method, episodes
        self.to_train = to_train._replace(given=on_device(to_train.given))
        optimiser = self.optimiser = optax.with_extra_args_support(chosen["optimiser"])
        parameters = start(self.start_key)
        self.carry = (parameters, optimiser.init(parameters))
        self.best, self.best_score, self.since_best, self.step = parameters, -np.inf, 0, 0
        self.history: dict[str, list[float]] = {"step": [], "score": [], "held_out": []}
        self.warnings: list[str] = []
        self.recent: list[float] = []
        self.num_tasks: int | None = None
        self.checkpoint = Checkpoint(chosen["checkpoint"], method, described)
        self.held_out = jax.tree.map(
            jnp.asarray, _cast(episodes.batch(chosen["held_out"], self.held_key))
        )

    def _score(self) -> Any:
        """Every held-out task's score at the parameters in hand."""
        given = self.held_out, self.score_key, self.to_train.given
        return _scored(self.to_train.score, self.carry[0], *given)

    def go(self) -> Trained:
        """Run to the end, from the checkpoint where there is one."""
        from tqdm.auto import tqdm

        total = self.chosen["num_meta_steps"]
        self._resume()
        self.feed = self.episodes.feed(self.chosen["seed"], self.chosen["batch_size"], self.step)
        shown = sys.stderr.isatty() if self.chosen["progress"] is None else self.chosen["progress"]
        with tqdm(
            total=total, initial=self.step, desc=self.method, disable=not shown, leave=False,
            delay=1.0,
        ) as bar:  # fmt: skip
            try:
                self._loop(total, bar)
            except BaseException:
                if self.history["step"]:
                    self._save(force=True)
                raise
        self._save(force=True)
        if self.chosen["patience"] is not None:
            return Trained(self.best, self.step, self.best_score, self.history, self.warnings)
        held_out = self.history["held_out"][-1]
        return Trained(self.carry[0], self.step, held_out, self.history, self.warnings)

    def _loop(self, total: int, bar: Any) -> None:
        size = 10
        while True:
            if self.step % self.chosen["evaluate_every"] == 0 or self.step >= total:
                self._evaluate(bar)
            if self.step >= total or self._is_over():
                return
            every = self.chosen["evaluate_every"]
            until = min(total, (self.step // every + 1) * every)
            count = min(size, until - self.step, self.feed.most, LONGEST)
            began = time.perf_counter()
            try:
                chunk, count = self.feed.chunk(count)
            except StreamEnded as ended:
                self.warnings.append(
                    f"{ended}, {total} meta-steps were asked for: {self.method} ends there"
                )
                self._evaluate(bar)
                return
            made = self.to_train.direction, self.feed.take, self.chosen["optimiser"]
            program = _Program(*made, self._batch_size(chunk))
            now = self.to_train.given, chunk, self.train_key, self.step
            carry, scores, sound = _many(program, self.carry, *now, count)
            scores, sound = np.asarray(scores), np.asarray(sound)
            lost = not sound[:count].all()
            if lost:  # up to the first that is not finite
                count = int(np.argmin(sound))
                carry = _many(program, self.carry, *now, count)[0]
            recent = [*self.recent, *scores[:count].mean(1).tolist()]
            # together, so that an interruption finds a state that belongs together
            self.carry, self.step, self.recent = carry, self.step + count, recent
            bar.update(count)
            if lost:
                self._say_where(scores[count])
                self._evaluate(bar)
                return
            self._save()
            seconds = time.perf_counter() - began
            size = max(1, min(LONGEST, int(size * min(4.0, RESPONSE / max(seconds, 1e-6)))))

    def _batch_size(self, chunk: Any) -> int:
        if self.num_tasks is None:
            shapes = jax.eval_shape(lambda c: self.feed.take(c, 0, self.train_key), chunk)
            self.num_tasks = int(shapes[0].outcome.shape[0])
        return self.num_tasks

    def _evaluate(self, bar: Any) -> None:
        if self.history["step"][-1:] == [self.step]:
            return
        each = np.asarray(self._score())
        value = float(each.mean())
        if self.step == 0 and not np.isfinite(value):
            raise InputError(
                f"{self.method}: the score of held-out task(s) is not finite at the initial "
                "weights; check apply, init and the tasks' scale, or take shorter inner steps"
            )
        score = float(np.mean(self.recent)) if self.recent else np.nan
        found = {"step": self.step, "score": score, "held_out": value}
        if self.to_train.measure is not None:
            given = self.carry[0], self.held_out, self.to_train.given
            more = _measured(self.to_train.measure, *given)
            found |= {name: float(number) for name, number in more.items()}
        history = {name: [*self.history.get(name, []), number] for name, number in found.items()}
        best = (self.best, self.best_score, self.since_best + 1)
        if value > self.best_score:
            best = (self.carry[0], value, 0)
        # together, as above
        self.history, self.recent, (self.best, self.best_score, self.since_best) = history, [], best
        bar.set_postfix({"score": f"{score:.4f}", "held out": f"{value:.4f}"})

    def _is_over(self) -> bool:
        patience = self.chosen["patience"]
        return patience is not None and self.since_best >= patience

    def _say_where(self, scores: np.ndarray) -> None:
        lost = np.flatnonzero(~np.isfinite(scores))
        where = f"in task {lost[0]} of its batch" if lost.size else "in the slope, of no one task"
        if lost.size > 1:
            where += f" and {lost.size - 1} more"
        kept = "that of the best held-out score"
        if self.chosen["patience"] is None:
            kept = f"what {self.step} meta-steps gave, the last that is finite"
        if self.checkpoint.path:
            kept += f"; {str(self.checkpoint.path)!r} holds it"
        self.warnings.append(
            f"{self.method} stopped: the objective is not finite at meta-step {self.step}, "
            f"{where}. phi is {kept}. Take a lower outer rate, shorter inner steps or fewer of them"
        )

    # ------------------------------------------------------------- checkpoints

    def _state(self) -> dict[str, Any]:
        return {"carry": self.carry, "best": self.best}

    def _counters(self) -> dict[str, Any]:
        return {
            "step": self.step, "best_score": self.best_score, "since_best": self.since_best,
            "history": self.history, "recent": self.recent, "moves": self._optimiser_moves(),
        }  # fmt: skip

    def _optimiser_moves(self) -> list[str]:
        """What the outer optimiser makes of two fixed slopes: another rate, another answer."""
        import optax

        one = jax.tree.map(jnp.zeros_like, self.carry[0])
        memory, found = self.optimiser.init(one), []
        for slope in (0.1, -0.3):
            slopes = jax.tree.map(lambda x, g=slope: jnp.full_like(x, g), one)
            updates, memory = self.optimiser.update(slopes, memory, one)
            found.append(f"{float(optax.tree.norm(updates)):.4e}")
        return found

    def _save(self, *, force: bool = False) -> None:
        self.checkpoint.save(self._state(), self._counters(), force=force)

    def _resume(self) -> None:
        found = self.checkpoint.load(self._state(), self._counters())
        if found is None:
            return
        state, counters = found
        first = float(np.asarray(self._score()).mean())
        before = counters["history"]["held_out"][0]
        moves = self._optimiser_moves()
        if not np.isclose(first, before, rtol=1e-4, atol=1e-6) or moves != counters["moves"]:
            what = "tasks, network or inner loop" if moves == counters["moves"] else "optimiser"
            raise InputError(
                f"{str(self.checkpoint.path)!r} is the checkpoint of another run: its {what} "
                "differs from this one's; give another path, or remove the file"
            )
        if counters["step"] > self.chosen["num_meta_steps"]:
            self.warnings.append(
                f"the checkpoint is of meta-step {counters['step']}, beyond the "
                f"{self.chosen['num_meta_steps']} asked for: phi is that of the checkpoint"
            )
        self.carry, self.best = state["carry"], state["best"]
        self.step, self.best_score = counters["step"], counters["best_score"]
        self.since_best, self.history = counters["since_best"], counters["history"]
        self.recent = counters["recent"]


def _cast(episode: Any) -> Any:
    """Numbers in the run's precision; pixels and labels may come as integers."""
    floats = jnp.zeros(()).dtype

    def cast(part: Task) -> Task:
        whole = jax.tree.map(lambda x: x.astype(floats), part)
        return replace(whole, mask=part.mask)

    return tuple(map(cast, episode))
