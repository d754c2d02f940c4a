"""Several fits side by side: a table, pictures, a report; gradient steps against the posterior."""

from hierbayes.compare.comparison import Comparison, compare
from hierbayes.compare.equivalence import EquivalenceReport, equivalence_report

__all__ = ["Comparison", "EquivalenceReport", "compare", "equivalence_report"]
