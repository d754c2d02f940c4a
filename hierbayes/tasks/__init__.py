r"""D_1, …, D_J: the data of many related tasks.

.. math:: D_j = \{(x_{ij}, z_{ij}, y_{ij})\}_{i=1}^{n_j}, \qquad w_j, \qquad j = 1, \dots, J
"""

from hierbayes.tasks.container import Tasks
from hierbayes.tasks.episodes import Episodes
from hierbayes.tasks.views import Encoder, Labels, Task

__all__ = ["Encoder", "Episodes", "Labels", "Task", "Tasks"]
