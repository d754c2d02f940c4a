"""Several fits side by side: a table, pictures, a report; gradient steps against the posterior."""

from hierbayes.comparison.equivalence import EquivalenceReport, equivalence_report
from hierbayes.comparison.side_by_side import Comparison, compare

__all__ = ["Comparison", "EquivalenceReport", "compare", "equivalence_report"]
