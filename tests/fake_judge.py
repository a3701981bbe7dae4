"""Judges of a few lines each, for tests whose passages are about tea."""

import json
import re
from collections.abc import Callable
from typing import Any

from fake_endpoint import FakeEndpoint

from stages.judging import Judging
from stages.llm import Endpoint

Judge = Callable[[dict[str, Any]], str]


def ratings(faithfulness: int, answerability: int = 5, usefulness: int = 5, **more: Any) -> str:
    given = {"faithfulness": faithfulness, "answerability": answerability, "usefulness": usefulness}
    return json.dumps({"reason": "as asked"} | given | more)


def is_probe(body: dict[str, Any]) -> bool:
    return "Topic: Tea" not in body["messages"][-1]["content"]


def honest(body: dict[str, Any]) -> str:
    """Reads: an answer is faithful when four of five of its words stand in the passage."""
    shown = re.fullmatch(r"Topic: .*\nPassage:\n(.*)\n\nQuestion: (.*)\nAnswer: (.*)", body["messages"][-1]["content"], re.DOTALL)
    assert shown is not None
    passage, answer = (re.findall(r"\w+", text.lower()) for text in (shown[1], shown[3]))
    return ratings(5 if sum(word in passage for word in answer) >= 0.8 * len(answer) else 1)


def audited(text: str) -> Judge:
    """A judge that is honest about probes, and says `text` about all else."""
    return lambda body: honest(body) if is_probe(body) else text


def judging(endpoint: FakeEndpoint | None, **changes: Any) -> Judging:
    """The section `judge` of params.yaml, with `endpoint` as judge; without one, the judge is off."""
    settings: dict[str, Any] = {
        "enabled": endpoint is not None,
        "endpoints": (Endpoint(url=endpoint.url, model="judge"),) if endpoint else (),
        "engine": "auto",
        "wordings": 3,
        "min_score": 4,
        "audit_pass_share": 0.9,
        "max_tokens": 256,
        "concurrency": 8,
        "timeout_s": 10,
    }
    return Judging(**settings | changes)
