"""Decompose pictures into layered files: `from layerloop.components.decompose import decompose`."""

from layerloop.components.decompose.run import Outcome, Summary, decompose
from layerloop.components.schema.decomposition import DecomposeOptions

__all__ = ["DecomposeOptions", "Outcome", "Summary", "decompose"]
