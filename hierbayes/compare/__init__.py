"""Several fits side by side: a table, pictures, a report."""

from hierbayes.compare.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
