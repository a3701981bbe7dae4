"""What every bench writes: its rows of bench/results.json and its section of bench/RESULTS.md."""

import json
import os
import re
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]


def row(ratios: Sequence[float], limit_fraction: float | None) -> dict[str, Any]:
    """An entry of results.json."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "ratio": round(statistics.median(ratios), 5),
        "spread": [round(min(ratios), 5), round(max(ratios), 5)],
        "limit_fraction": None if limit_fraction is None else round(limit_fraction, 3),
        "pairs": len(ratios),
        "load": round(os.getloadavg()[0], 2),
        "commit": commit,
    }


def machine() -> str:
    """The processor, its cores that may be used, and its vector units."""
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = re.search(r"model name\s*: (.+)", facts)
    flags = sorted(set(re.findall(r"\b(avx2|avx512f|avx512_bf16|amx_bf16)\b", facts)))
    return (
        f"{len(os.sched_getaffinity(0))} cores of {name[1] if name else 'an unknown processor'} ({', '.join(flags) or 'no AVX2'})"
    )


def section(opening: Sequence[str], rows: Mapping[str, Any], targets: Mapping[str, str], remarks: Sequence[str]) -> str:
    """A Markdown section: the lines of `opening`, its heading first; a table of `rows`; and the remarks."""
    lines = [*opening, ""]
    lines += ["| row | ratio | target | spread | fraction of the limit | pairs | load |", "|---|---|---|---|---|---|---|"]
    for name in sorted(rows, key=lambda name: int(name[1:])):
        one = rows[name]
        fraction = "-" if one["limit_fraction"] is None else one["limit_fraction"]
        lines.append(
            f"| {name} | {one['ratio']} | {targets[name]} | {one['spread'][0]} to {one['spread'][1]} | {fraction} | {one['pairs']} | {one['load']} |"
        )
    return "\n".join([*lines, "", *(line for remark in remarks for line in (remark, ""))])


def with_section(page_text: str, new: str) -> str:
    """`page_text` with the section that has the heading of `new` replaced by `new`, or with `new` at its end."""
    before, heading, after = page_text.partition(f"{new.partition(chr(10))[0]}\n")
    rest = after.find("\n## ") if heading else -1
    return f"{before.rstrip()}\n\n{new.rstrip()}\n" + (after[rest:] if rest >= 0 else "")


def add_rows(results: Path, rows: Mapping[str, Any]) -> None:
    """Sets `rows` in the file `results`; the other rows stay."""
    known = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    results.write_text(json.dumps(known | dict(rows), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def publish(rows: Mapping[str, Any], text: str) -> None:
    """Sets `rows` in results.json, and `text`, a section, in RESULTS.md."""
    add_rows(REPOSITORY / "bench/results.json", rows)
    page = REPOSITORY / "bench/RESULTS.md"
    page.write_text(with_section(page.read_text(encoding="utf-8"), text), encoding="utf-8")
