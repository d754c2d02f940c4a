r"""φ̂ without one task, where the evidence is an integral without a closed form.

.. math:: \hat\varphi_{-j} = \arg\max_\varphi \sum_{i \ne j} \log \hat p(D_i \mid \varphi)
          \left[+ \log p(\varphi)\right]

One program serves all tasks: the sum leaves one of them out, and starts from the fit to all.
"""

from __future__ import annotations

import numpy as np

from hierbayes.adaptation import Integrable
from hierbayes.evidence import Integrated
from hierbayes.meta.criterion import Criterion
from hierbayes.meta.posterior_mode import off_the_boundary
from hierbayes.model import HierarchicalModel
from hierbayes.numerics import float64
from hierbayes.tasks import Tasks

SHRUNK = 1e-3
"""Share of the identity in the correlations that a search sets out from, for none to be ±1."""


class WithoutOne:
    """The summed evidence of all tasks but some, from what a fit to all of them has found."""

    def __init__(self, model: HierarchicalModel, tasks: Tasks, adaptation: Integrable):
        self.model, self.tasks, self.adaptation = model, tasks, adaptation

    def scores(self, phi: dict[str, np.ndarray], *, with_belief: bool) -> np.ndarray:
        """log p̂(D_j | φ̂_{−j}) of each task with rows (J,), NaN of the others."""
        scores = np.full(self.tasks.num_tasks, np.nan)
        known = {name: np.asarray(value) for name, value in phi.items()}
        with float64():
            criterion = Criterion(self.model, self.tasks, self.adaptation, with_belief=with_belief)
            begin = criterion.space.x(known, shrunk=SHRUNK)
            for j in np.flatnonzero(self.tasks.sizes > 0):
                criterion.counted = np.arange(self.tasks.num_tasks) != j
                x = off_the_boundary(criterion, [begin], criterion.space).x
                found = Integrated(self.adaptation)(self.model, self.tasks, criterion.phi(x))
                scores[j] = found[j]
        return scores
