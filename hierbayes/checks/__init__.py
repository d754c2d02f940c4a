"""How good a fit is: scores on rows that it has not seen, and on tasks that it has not seen.

And what of its assumptions and approximations: :func:`task_effects` asks whether tasks are as
Gaussian as their prior, :func:`laplace_check` holds Laplace's evidence against better ones,
:func:`theta_standard_errors` counts in θ_j what is not known of φ̂, :func:`interval_coverage`
simulates how often intervals at φ̂ hold θ_j. Whether a model and a method find what data were
simulated from asks :func:`hierbayes.check_calibration`.
"""

from hierbayes.checks.differences import score_differences
from hierbayes.checks.interval_coverage import interval_coverage
from hierbayes.checks.laplace_check import laplace_check
from hierbayes.checks.leave_out import leave_one_row_out, leave_one_task_out
from hierbayes.checks.new_tasks import new_task_scores
from hierbayes.checks.scores import held_out_scores, theta_differences
from hierbayes.checks.task_effects import TaskEffects, task_effects
from hierbayes.meta.theta_errors import theta_standard_errors

__all__ = [
    "TaskEffects",
    "held_out_scores",
    "interval_coverage",
    "laplace_check",
    "leave_one_row_out",
    "leave_one_task_out",
    "new_task_scores",
    "score_differences",
    "task_effects",
    "theta_differences",
    "theta_standard_errors",
]
