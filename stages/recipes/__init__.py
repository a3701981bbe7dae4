"""Recipes: what a teacher is asked about a chunk, and what its reply means. Prompts are in prompts.yaml, question forms in forms.py."""

from stages.recipes.asks import (
    Ask,
    Draft,
    Settings,
    asks_about,
    drafts_in,
    faults_of,
    heading_drafts,
    naming,
    repair_of,
    retries_of,
    with_evidence,
)

__all__ = [
    "Ask",
    "Draft",
    "Settings",
    "asks_about",
    "drafts_in",
    "faults_of",
    "heading_drafts",
    "naming",
    "repair_of",
    "retries_of",
    "with_evidence",
]
