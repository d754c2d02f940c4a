r"""Methods that learn φ through an adaptation: tasks from a source, support rows and query rows.

.. math:: \theta_j = A(D_j^{\text{support}}; \varphi), \qquad
          \max_\varphi \sum_j \log p(D_j^{\text{query}} \mid \theta_j, \varphi)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hierbayes import inputs
from hierbayes.adaptation.base import PointAdaptation
from hierbayes.errors import InputError
from hierbayes.fit import Fit
from hierbayes.fit.outward import Entered, as_given
from hierbayes.meta.all_at_once import all_at_once
from hierbayes.meta.batches import batches, on_episodes
from hierbayes.meta.outer_loop import SHARE, Run, WithOuterLoop
from hierbayes.meta.sources import Source
from hierbayes.model import HierarchicalModel, check_model
from hierbayes.tasks import Tasks


@dataclass(frozen=True)
class Learner(WithOuterLoop):
    r"""A method that learns φ through an adaptation, on a fixed set of tasks and on episodes.

    .. math:: \max_\varphi \sum_j
              \log p(D_j^{\text{query}} \mid A(D_j^{\text{support}}; \varphi), \varphi)

    A subclass says its adaptation, and what else of this differs.

    Attributes
    ----------
    query : float
        Share of each task's rows in the query part, of a fixed set of tasks.
    most_steps : int
        Outer steps on a fixed set of tasks where nothing else is said.
    idle : tuple of str
        Settings that have no place there.
    """

    query: float = field(default=SHARE, kw_only=True)
    most_steps = 500
    idle = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        inputs.share("query", self.query)

    def __call__(
        self, model: HierarchicalModel, tasks: Any, seed: Any = 0, *,
        progress: bool | None = None, checkpoint: Any = None,
    ) -> Fit:  # fmt: skip
        """Learn φ; ``checkpoint`` is the file that a long run on episodes goes on from."""
        run = Run.begun(seed, progress, checkpoint)
        check_model(model)
        self.check(model)
        if on_episodes(model, tasks):
            return self.learn(batches(self, model, tasks, run))
        return self.learn(
            all_at_once(self, self.enter, model, tasks, run, *self.idle, most=self.most_steps)
        )

    def check(self, model: HierarchicalModel) -> None:
        """Refuse a model that the method does not take."""

    def enter(self, model: HierarchicalModel, tasks: Tasks) -> Entered:
        """The columns that a fixed set of tasks is computed in: the user's own."""
        return as_given(model, tasks)

    def adaptation(self) -> PointAdaptation:
        """A, what a task's parameters are under φ."""
        raise InputError(f"{self.name} says neither its adaptation nor how it learns")

    def learn(self, source: Source) -> Fit:
        """φ where adapted tasks predict their query rows best."""
        adaptation = self.adaptation()
        found = source.maximise(adaptation, source.noise(None), {})
        return source.fit(adaptation, found._replace(more=None) if source.whole else found, {})
