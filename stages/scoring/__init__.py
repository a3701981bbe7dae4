"""Scores of single answers, and what many of them say together: means with intervals, and one system against another."""

from stages.scoring.answers import abstains, is_empty, score_answers
from stages.scoring.intervals import Sampling, Scoring, compare, interval, means, minimum_effect

__all__ = ["Sampling", "Scoring", "abstains", "compare", "interval", "is_empty", "means", "minimum_effect", "score_answers"]
