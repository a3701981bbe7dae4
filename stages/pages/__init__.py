"""What reports and the dataset card share: figures in words, text that cannot break Markdown, templates."""

import html
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

NOT_MEASURED = "not measured"
MAX_CELL = 700  # characters of one text in a Markdown table
MAX_FENCED = 16_000
MAX_CHARACTERS = 65_536  # GitHub's limit for one comment

Row = tuple[str, ...]


class QuestionSet(NamedTuple):
    """How a set of questions is shown: its title, what it asks, and the measure that says most about it."""

    title: str
    meaning: str
    measure: str = "similarity"


SETS = {
    "recall": QuestionSet("Recall", "New wordings of facts that were trained: does the model know the documentation?"),
    "held_out": QuestionSet(
        "Held-out sections", "Sections that were never trained: what does the model say about what it cannot know?"
    ),
    "gold": QuestionSet("Gold", "Questions that people wrote: does the model help those who ask in their own words?"),
    "out_of_scope": QuestionSet(
        "Out of scope",
        "What the documentation does not cover: does the model say so, rather than make something up?",
        "abstained",
    ),
    "general": QuestionSet("General", "What any assistant should know: has the training made the model forget it?"),
}
MEASURES = {
    "similarity": "similarity",
    "rouge_l": "ROUGE-L",
    "key_facts": "key facts",
    "evidence": "evidence",
    "judge": "judge",
    "abstained": "abstained",
    "passed": "passed",
}


def read_figures(path: Path) -> dict[str, Any]:
    """The figures in a metrics file; {} where a stage has not written it."""
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.is_file() else {}


def dig(values: Any, *keys: str) -> Any:
    """What lies in nested dicts under `keys`, or None."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def measured(value: Any, form: str = "{}") -> str:
    """`value` in `form`, or `not measured`: a missing figure must not read as 0."""
    return NOT_MEASURED if value is None or value == "" else form.format(value)


def counted(counts: dict[str, int] | None) -> str:
    """`counts` in words, most first, without zeros: `factual 188, conceptual 82`; `none` where they are all 0."""
    if counts is None:
        return NOT_MEASURED
    return ", ".join(f"{name} {count:,}" for name, count in Counter(counts).most_common() if count) or "none"


def chance(p: float) -> str:
    """A p value with three decimals; `< 0.001` where they would all be 0."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def rule_rows(suite: Path, counts: dict[str, int]) -> list[Row]:
    """(rule, severity, number of candidates, reason) of each rule of `counts` that a candidate broke, most often broken first."""
    import yaml

    rules = {rule["rule"]: rule for rule in yaml.safe_load(suite.read_text(encoding="utf-8"))}
    return [
        (name, dig(rules, name, "severity") or "", f"{count:,}", dig(rules, name, "reason") or "")
        for name, count in Counter(counts).most_common()
        if count
    ]


def escaped(text: str) -> str:
    """`text` of a model for a cell of a Markdown table: no markup, no line break, no mention or issue link on GitHub."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", inert(text))


def inert(text: str) -> str:
    """As `escaped`, for inside an HTML element of a Markdown file, where a backslash would be shown."""
    return re.sub(r"([@#])", "\\1\u200b", html.escape(" ".join(text.split()), quote=False))


def clipped(text: str, limit: int) -> str:
    """The first `limit` characters of `text`, and how many are missing where it is longer."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def fenced(text: str) -> str:
    """`text` as a YAML code block with a fence longer than any in it, cut with a line that says so after MAX_FENCED characters."""
    if len(text) > MAX_FENCED:
        text = text[:MAX_FENCED].rpartition("\n")[0] + "\n# … the rest is in params.yaml\n"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = ":--") -> str:
    """A Markdown table of clipped and escaped cells; `align` is that of every column but the first."""
    cells = [[escaped(clipped(cell, MAX_CELL)) for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, [":--", *[align] * (len(head) - 1)], *cells])


def template(name: str) -> Any:
    """The Jinja template `name` of stages/. A name that it uses and does not get is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1]),
        autoescape=".html." in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"escaped": escaped, "inert": inert, "clipped": clipped, "counted": counted, "fenced": fenced}
    environment.globals["table"] = markdown_table
    return environment.get_template(name)
