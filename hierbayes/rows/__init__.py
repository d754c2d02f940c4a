"""The rows of all tasks, as log p(D_j | θ_j, φ) and its slopes go over them."""

from hierbayes.rows.binary import BinaryRows as BinaryRows
from hierbayes.rows.blocks import Curved as Curved
from hierbayes.rows.blocks import Rows as Rows
from hierbayes.rows.layout import rows_of as rows_of
from hierbayes.rows.whole import Whole as Whole
