"""Text as evidence: what counts as equal, where a quote stands, which sentences can stand as an answer, and what an answer invents."""

from stages.evidence.claims import CODE, FENCED, ITEM, invented
from stages.evidence.passages import Passage, lead_of, passages_of, readable, sentences_of
from stages.evidence.text import fold, locate, words

__all__ = [
    "CODE",
    "FENCED",
    "ITEM",
    "Passage",
    "fold",
    "invented",
    "lead_of",
    "locate",
    "passages_of",
    "readable",
    "sentences_of",
    "words",
]
