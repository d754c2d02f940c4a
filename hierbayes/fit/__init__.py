"""What every method returns: φ, θ, a DataTree, adapt, predict, save."""

from hierbayes.fit.adapted import AdaptedTasks
from hierbayes.fit.fit import Fit
from hierbayes.fit.prediction import Prediction

__all__ = ["AdaptedTasks", "Fit", "Prediction"]
