"""Text as evidence: what is equal, where a quote stands, which sentences can be an answer, what an answer invents or has from its source."""

from stages.evidence.claims import CODE, FENCED, ITEM, invented, key_facts
from stages.evidence.passages import SENTENCE_END, Passage, lead_of, passages_of, readable, sentences_of
from stages.evidence.text import fold, locate, words

__all__ = [
    "CODE",
    "FENCED",
    "ITEM",
    "SENTENCE_END",
    "Passage",
    "fold",
    "invented",
    "key_facts",
    "lead_of",
    "locate",
    "passages_of",
    "readable",
    "sentences_of",
    "words",
]
