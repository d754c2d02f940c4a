"""``"log_radon ~ 1 + floor + (1 + floor | county)"`` → (model, tasks).

A small splitter takes the bars out; formulaic reads everything between them.
"""

from hierbayes.formula.encoder import FormulaEncoder, from_formula

__all__ = ["FormulaEncoder", "from_formula"]
