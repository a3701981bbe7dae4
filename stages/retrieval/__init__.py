"""The chunks that are nearest to a question, and the prompt that shows them to a model: what retrieval-augmented answers are made of."""

from stages.retrieval.nearest import Hit, searcher
from stages.retrieval.prompt import with_passages

__all__ = ["Hit", "searcher", "with_passages"]
