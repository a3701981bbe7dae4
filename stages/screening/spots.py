"""Places in a text, and the text without them."""

from collections.abc import Iterable

import msgspec


class Spot(msgspec.Struct, frozen=True):
    """Where something was found, as character offsets, and the name of what it is."""

    rule: str
    start: int
    end: int


def apart(spots: Iterable[Spot]) -> list[Spot]:
    """`spots` in the order of the text; those that overlap become one, named after the one that begins first."""
    found: list[Spot] = []
    for spot in sorted(spots, key=lambda spot: spot.start):
        if found and spot.start < found[-1].end:
            found[-1] = Spot(found[-1].rule, found[-1].start, max(found[-1].end, spot.end))
        else:
            found.append(spot)
    return found


def mark(spot: Spot) -> str:
    """What stands for the spot in a text that is shown: "[jwt removed]"."""
    return f"[{spot.rule.lower()} removed]"


def redacted(text: str, spots: Iterable[Spot]) -> str:
    """`text` with a mark in place of each spot. Spots may be in any order and may overlap."""
    parts, end = [], 0
    for spot in apart(spots):
        parts += [text[end : spot.start], mark(spot)]
        end = spot.end
    return "".join(parts) + text[end:]
