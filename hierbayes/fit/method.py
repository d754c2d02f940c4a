r"""A way of learning the prior, as a value.

.. math:: \text{method}(\text{model}, D_1, \dots, D_J) \to \varphi
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

from hierbayes.errors import InputError


class Method(abc.ABC):
    """A way of learning φ; subclasses are frozen dataclasses whose fields are its settings.

    ``fit.method`` is the method of a fit: ``fit.method(model, other_tasks)`` fits again with every
    setting, and ``dataclasses.replace(fit.method, num_steps=3)`` is the same method with another.

    Attributes
    ----------
    name : str
        What tables and pictures call it.
    command : str or None
        What the command line calls it, where it knows it.
    colour, marker : str or None
        In pictures; those without are given colours that are free.
    rank : float
        Its place in pictures, from 0 (each task alone) to 1 (one θ for all).
    compared : bool
        Whether the command line compares it where nothing is said.
    learns_all, draws_phi : bool
        Whether its φ holds everything that the model has; whether it is drawn from a posterior.
    """

    name: str
    command: str | None = None
    colour: str | None = None
    marker: str | None = None
    rank: float = 0.5
    compared: bool = False
    learns_all: bool = False
    draws_phi: bool = False

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        own = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
        if own and "name" in {*vars(cls), *vars(cls).get("__annotations__", {})}:
            METHODS[cls.__name__] = cls

    @abc.abstractmethod
    def __call__(
        self, model: Any, tasks: Any, seed: Any = 0, *, progress: bool | None = None
    ) -> Any:
        """Learn φ from these tasks; returns a :class:`~hierbayes.Fit`.

        What belongs to a run and not to the method is said here: the seed, and whether progress is
        shown.
        """

    def __str__(self) -> str:
        return self.name

    @classmethod
    def with_draws(cls, num_draws: int) -> Method:
        """The method with its defaults, and so many draws a chain where it has any."""
        del num_draws
        return cls()

    def for_phi_alone(self) -> Method:
        """A method that finds the same φ, and nothing beside it that takes time; for refits."""
        return self

    def scores_without(self, fit: Any) -> Any:
        """log p(D_j | D_−j) of every task (J,), where that takes no refits; None where it does."""
        del fit


METHODS: dict[str, type[Method]] = {}
"""The package's own, by the name of their class: what a file of a fit may name."""


def named_methods() -> dict[str, type[Method]]:
    """Those that learn φ from tasks, by name, from each task alone to one θ for all."""
    known = [kind for kind in METHODS.values() if isinstance(getattr(kind, "name", None), str)]
    return {kind.name: kind for kind in sorted(known, key=lambda kind: kind.rank)}


@dataclass(frozen=True)
class Derived(Method):
    """What was made of another fit by a function of its own, and is not fitted to tasks."""

    name: str

    def __call__(
        self, model: Any, tasks: Any, seed: Any = 0, *, progress: bool | None = None
    ) -> Any:
        """Refused."""
        del model, tasks, seed, progress
        raise InputError(
            f"{self.name} cannot be refitted: its fit was made of another one, which can"
        )
