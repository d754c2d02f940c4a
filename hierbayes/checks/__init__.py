"""How good a fit is: scores on rows that it has not seen, and on tasks that it has not seen.

And what of its approximations: :func:`laplace_check` holds Laplace's evidence against better ones,
:func:`theta_standard_errors` counts in θ_j what is not known of φ̂,
:func:`interval_coverage` simulates how often intervals at φ̂ hold θ_j.
"""

from hierbayes.checks.interval_coverage import interval_coverage
from hierbayes.checks.laplace_check import laplace_check
from hierbayes.checks.leave_one_task_out import leave_one_task_out
from hierbayes.checks.scores import held_out_scores, theta_differences
from hierbayes.meta.theta_errors import theta_standard_errors

__all__ = [
    "held_out_scores",
    "interval_coverage",
    "laplace_check",
    "leave_one_task_out",
    "theta_differences",
    "theta_standard_errors",
]
