"""Text as evidence: what counts as equal, where a quote stands, and which sentences of a page can stand as an answer."""

from stages.evidence.passages import Passage, lead_of, passages_of, readable, sentences_of
from stages.evidence.text import fold, locate, words

__all__ = ["Passage", "fold", "lead_of", "locate", "passages_of", "readable", "sentences_of", "words"]
