"""How good a fit is: scores on rows that it has not seen, and on tasks that it has not seen."""

from hierbayes.checks.leave_one_task_out import leave_one_task_out
from hierbayes.checks.scores import held_out_scores, theta_differences

__all__ = ["held_out_scores", "leave_one_task_out", "theta_differences"]
