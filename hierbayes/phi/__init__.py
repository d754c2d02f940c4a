"""φ: what is learned from all tasks together, and its coordinates."""

from hierbayes.phi.space import Part, Space

__all__ = ["Part", "Space"]
