r"""Methods that learn φ by an outer loop: what they are told of it, and what belongs to one run.

.. math:: \varphi_{t+1} = \mathrm{optimiser}\!\left(\varphi_t, \nabla_\varphi\right)
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import jax

from hierbayes import inputs
from hierbayes.errors import InputError, listing
from hierbayes.fit.method import Method
from hierbayes.meta.inner_loop import check_counts, check_optimiser, refuse_idle

if TYPE_CHECKING:
    import optax


class OuterLoop(TypedDict, total=False):
    """Settings of the outer loop on episodes, of every method that learns from them.

    Attributes
    ----------
    batch_size : int
        B, tasks a meta-step; 25 by default. A generator's batches decide for themselves.
    held_out : int
        Fresh tasks, the same throughout, on which the score is taken along the way; 200. Of a fixed
        set of tasks other splits of the same tasks, which cannot show overfitting to them.
    evaluate_every : int
        Meta-steps between those scores; 500.
    patience : int
        Stop when so many scores in a row have not improved on the best, and take φ of the best.
        By default the run goes to its end and takes the last φ.
    checkpoint : path
        A file to which the state goes every minute, at the end and when the run is interrupted;
        if it is there at the start, the run goes on from it, to bit-equal results.
    """

    batch_size: int
    held_out: int
    evaluate_every: int
    patience: int | None
    checkpoint: Any


class Training(OuterLoop, total=False):
    """The same, with the settings that methods on fixed tasks have too.

    Attributes
    ----------
    num_meta_steps : int
        Outer steps at most; 10,000 by default.
    optimiser : optax.GradientTransformation
        Of the outer loop; ``optax.adam(1e-3)`` by default.
    seed : int or JAX key
        Of initial weights, tasks and held-out tasks.
    progress : bool
        Show a progress bar; by default where stderr is a terminal.
    """

    num_meta_steps: int
    optimiser: optax.GradientTransformation
    seed: int | jax.Array
    progress: bool | None


DEFAULTS: dict[str, Any] = {
    "num_meta_steps": 10_000, "batch_size": 25, "held_out": 200, "evaluate_every": 500,
    "patience": None,
}  # fmt: skip

SHARE = 0.5
"""Share of a task's rows in the query part, where nothing else is said."""


class Run(NamedTuple):
    """What belongs to one run of a method and is no part of it."""

    seed: Any
    progress: bool | None
    checkpoint: Any
    started: float

    @classmethod
    def begun(cls, seed: Any, progress: Any, checkpoint: Any = None) -> Run:
        """Now, with a seed that can be one."""
        started = time.perf_counter()
        return cls(
            inputs.seed(seed), inputs.optional_flag("progress", progress), checkpoint, started
        )


RUN = ("seed", "progress", "checkpoint")


def parted(given: Mapping[str, Any], kind: type[Method]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what belongs to a run, settings of the method), of arguments by name."""
    own = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    for name in given:
        if name not in own | {*RUN}:
            known = listing(sorted(own | {*RUN}), 20)
            raise InputError(f"{kind.name} takes no argument {name!r}; it takes {known}")
    run = {name: value for name, value in given.items() if name in RUN}
    return run, {name: value for name, value in given.items() if name not in RUN}


@functools.cache
def adam() -> optax.GradientTransformation:
    """One and the same for all runs, which then share a compiled program."""
    import optax

    return optax.adam(1e-3)


@dataclass(frozen=True)
class WithOuterLoop(Method):
    """A method with the outer loop's settings; None stands for what its source takes by default."""

    optimiser: optax.GradientTransformation | None = field(default=None, kw_only=True)
    num_meta_steps: int | None = field(default=None, kw_only=True)
    batch_size: int | None = field(default=None, kw_only=True)
    held_out: int | None = field(default=None, kw_only=True)
    evaluate_every: int | None = field(default=None, kw_only=True)
    patience: int | None = field(default=None, kw_only=True)

    query = SHARE
    num_splits = 1
    no_evidence = "this method does not compute the evidence"

    def __post_init__(self) -> None:
        check_optimiser(self.optimiser)
        given = {name: getattr(self, name) for name in DEFAULTS}
        check_counts(**{name: value for name, value in given.items() if value is not None})

    def refuse_batches(self, run: Run, *more: str) -> None:
        """Refuse what has no place where all tasks are fitted at once; ``more`` names others."""
        names = ("batch_size", "held_out", "evaluate_every", "patience", *more)
        idle = {name: getattr(self, name) for name in names}
        refuse_idle(idle | {"checkpoint": run.checkpoint}, self.name)

    def outer_optimiser(self) -> optax.GradientTransformation:
        """That of batches: Adam of rate 0.001 by default."""
        return self.optimiser or adam()

    def outer_settings(self, run: Run) -> dict[str, Any]:
        """All that the outer loop on batches is told, defaults filled in."""
        given = {name: getattr(self, name) for name in DEFAULTS}
        chosen = DEFAULTS | {name: value for name, value in given.items() if value is not None}
        return chosen | {
            "optimiser": self.outer_optimiser(), "seed": run.seed, "progress": run.progress,
            "checkpoint": run.checkpoint,
        }  # fmt: skip
