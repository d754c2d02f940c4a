"""Pictures of fits; every function takes ``ax=`` and returns axes, as matplotlib users expect."""

from hierbayes.plots.adaptation_path import adaptation_path
from hierbayes.plots.calibration import calibration
from hierbayes.plots.forest import forest
from hierbayes.plots.ladder import ladder
from hierbayes.plots.prior import learned_prior
from hierbayes.plots.prior_strength import prior_strength
from hierbayes.plots.scores import scores
from hierbayes.plots.shrinkage import shrinkage
from hierbayes.plots.shrinkage_filters import shrinkage_filters
from hierbayes.plots.task_effects import task_effects

__all__ = [
    "adaptation_path",
    "calibration",
    "forest",
    "ladder",
    "learned_prior",
    "prior_strength",
    "scores",
    "shrinkage",
    "shrinkage_filters",
    "task_effects",
]
