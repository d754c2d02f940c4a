"""The rows of all tasks, as log p(D_j | θ_j, φ) and its slopes go over them."""

from hierbayes.rows.binary import BinaryRows
from hierbayes.rows.blocks import Curved, Rows
from hierbayes.rows.layout import rows_of
from hierbayes.rows.whole import Whole

__all__ = ["BinaryRows", "Curved", "Rows", "Whole", "rows_of"]
