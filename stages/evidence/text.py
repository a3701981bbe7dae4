"""Texts compared without regard to white space, case or marks."""

import re


def fold(text: str) -> str:
    """`text` with every run of white space as one blank."""
    return " ".join(text.split())


def words(text: str) -> str:
    """`text` in lower case without punctuation: what two copies of one question share."""
    return " ".join(re.findall(r"\w+", text.lower()))


def locate(quote: str, text: str) -> tuple[int, int] | None:
    """Where `quote` stands in `text`, as character offsets (start, end), white space compared folded; None when it does not.

    Where it stands with the same white space, that is the place: a search that costs next to nothing.
    """
    if quote.strip() == quote != "" and (start := text.find(quote)) >= 0:
        return start, start + len(quote)
    pattern = r"\s+".join(re.escape(word) for word in quote.split())
    found = re.search(pattern, text) if pattern else None
    return found.span() if found else None
