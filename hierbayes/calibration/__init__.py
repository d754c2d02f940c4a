"""Whether a model and a method find what data were simulated from."""

from hierbayes.calibration.check import check_calibration
from hierbayes.calibration.result import Calibration

__all__ = ["Calibration", "check_calibration"]
