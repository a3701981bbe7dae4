"""The chunks that are nearest to a question, and the prompt that shows them to a model: what retrieval-augmented answers are made of."""

from stages.retrieval.nearest import Hit, kept_vectors, nearest_places, searched, searcher
from stages.retrieval.prompt import with_passages

__all__ = ["Hit", "kept_vectors", "nearest_places", "searched", "searcher", "with_passages"]
