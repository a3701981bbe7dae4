"""A finished run's files with numbers made by hand, for the tests of what shows or judges them."""

import json
from pathlib import Path
from typing import Any

import msgspec

from stages.records import Answer, Coverage, Document, Finding, Question, Rejected, Score, content_id, write_records
from stages.scoreboard import Comparison, Interval, Scoreboard, SetScores, SystemScores
from stages.verdict import Gates

GATES = Gates(
    min_recall_gain=0.0,
    max_gguf_loss=0.03,
    max_general_loss=0.05,
    max_abstention_loss=0.75,  # three questions show no smaller loss
    max_champion_loss=0.03,
    min_questions=5,
)
MEANS = {
    "base": 0.612,
    "tuned": 0.781,
    "base_rag": 0.702,
    "oracle": 0.853,
    "q4_k_m": 0.731,
    "q8_0": 0.774,
    "tuned_rag": 0.823,
}
OF_SET = {"recall": (6, 0.0), "held_out": (3, -0.3), "gold": (4, -0.1), "out_of_scope": (3, 0.0), "general": (2, 0.02)}
DIGEST = {name: content_id(name) * 4 for name in (*MEANS, "chat", "questions")}
PARAMS = """models: {base: "pkg:base/model.gguf"}
report: {samples: 3}  # a comment with ``` in it
"""
METRICS: dict[str, dict[str, Any]] = {
    "train": {"seconds": 754.2, "trainer": "trl", "device": "cpu", "steps": 320, "tokens_per_s": 584.6, "final_loss": 0.4127},
    "export": {
        "files": {
            f"docsmith-{quant}.gguf": {
                "bytes": 144_811_000,
                "quant": quant,
                "sha256": DIGEST[quant],
                "mean_kl": kl,
                "same_top": top,
                "passes": kl < 0.03,
            }
            for quant, kl, top in (("q8_0", 0.0096, 0.961), ("q4_k_m", 0.1798, 0.829))
        },
        "serve": "q8_0",
        "merged_sha256": DIGEST["tuned"],
        "chat_sha256": DIGEST["chat"],
    },
    "answer": {"systems": {"base": {"tokens_per_s": 231.4}, "q8_0": {"tokens_per_s": 86.0}}},
    "validate": {
        "candidates": 1234,
        "pairs": 456,
        "rejected": 778,
        "by_rule": {"answer-too-short": 90, "holds-personal-data": 0, "id-repeats": 0, "quote-not-in-chunk": 700},
        "flagged": {"holds-personal-data": 8},
        "review": {"accepted": 31, "edited": 12, "rejected": 5, "stale": 2},
    },
    "ingest": {"findings": {"hidden-text": 1, "secret": 0, "personal-data": 2}},
    "measure": {"clusters": 1100, "largest_cluster": 7, "with_secrets": 3, "with_personal_data": 8},
    "split": {"pairs": 456, "unused": 41, "unused_by_reason": {"leak-margin": 40, "held-out-limit": 1}},
    "coverage": {
        "sections": 1250,
        "covered": 1237,
        "share": 0.9896,
        "uncovered": {"no-fact": 2, "too_short": 11},
        "pairs_by_type": {"conceptual": 40, "factual": 416},
        "pairs_by_recipe": {"quote-first": 456},
    },
}


def around(mean: float, half: float = 0.04) -> Interval:
    return Interval(round(mean, 6), round(mean - half, 6), round(mean + half, 6))


def scores_of(name: str, has_unknown: bool = True) -> SetScores:
    """The scores of a set: the means of MEANS, moved as OF_SET says; out of scope is told by abstaining alone."""
    n, shift = OF_SET[name]
    measure = "abstained" if name == "out_of_scope" else "similarity"
    others = {"rouge_l": 0.5, "key_facts": 0.7} if name != "out_of_scope" else {}
    systems = {
        system: SystemScores(
            n=n,
            empty=int(system == "base"),
            measures={measure: around(mean + shift), "passed": around(mean / 2)}
            | {other: around(mean * factor + shift) for other, factor in others.items()},
        )
        for system, mean in MEANS.items()
    }
    comparisons = {
        f"{one}-{other}": Comparison(
            n=n,
            sections=12,
            gains={measure: around(MEANS[one] - MEANS[other], 0.02)},
            minimum_effect=0.031,
            won=4,
            lost=1,
            p=0.375,
        )
        for place, other in enumerate(("base", "tuned"))
        for one in list(MEANS)[place + 1 :]
    }
    kinds = ("factual", "procedural") if measure == "similarity" else ()
    by_type = {kind: {system: around(mean + shift, 0.06) for system, mean in MEANS.items()} for kind in kinds}
    unknown = scores_of("general", False) if has_unknown and name == "recall" else None
    return SetScores(n, 12, systems, comparisons, by_type, unknown)


def scoreboard(*names: str) -> Scoreboard:
    """A scoreboard of these sets, or of all."""
    sets = {name: scores_of(name) for name in names or OF_SET}
    models = {system: DIGEST["tuned" if system == "tuned_rag" else system.removesuffix("_rag")] for system in MEANS}
    return Scoreboard(0.95, 3407, sets, models, DIGEST["questions"], DIGEST["chat"], ())


def questions_of() -> list[Question]:
    return [
        Question(
            id=f"{name}{number}",
            set=name,  # type: ignore[arg-type]
            section_id=f"s{number % 4}",
            type="factual",
            question=f"Which port does the {name} server of chapter {number} listen on?",
            reference="" if name == "out_of_scope" else f"The server listens on port 500{number}.",
        )
        for name, (n, _) in OF_SET.items()
        for number in range(n)
    ]


def write_run(folder: Path, reply: str = "It listens on port 5000.", copies: int = 1) -> list[Path]:
    """A finished pipeline's files in `folder`, `copies` of every question, and the paths that dvc.yaml gives to report.

    tuned gains most on the first question of a set and least on the last.
    """
    data, metrics = folder / "data", folder / "reports/metrics"
    asked = [msgspec.structs.replace(one, id=f"{one.id}{'x' * copy}") for one in questions_of() for copy in range(copies)]
    answers, scores = [], []
    for question in asked:
        number = int(question.id.rstrip("x")[-1])
        for system, mean in MEANS.items():
            same: dict[str, Any] = {"id": content_id(question.id, system), "question_id": question.id, "system": system}
            answers.append(Answer(text="" if (system, question.id) == ("base", "recall0") else reply, **same))
            value = mean if system == "base" else round(mean - 0.01 * number, 6)
            is_out = question.set == "out_of_scope"
            of_answer = {"similarity": None, "abstained": value} if is_out else {"similarity": value, "abstained": 0.0}
            rest: dict[str, Any] = {"set": question.set, "section_id": question.section_id, "type": question.type}
            rest |= {"rouge_l": None, "key_facts": None, "evidence": None, "judge": None, "passed": float(value > 0.75)}
            scores.append(Score(**same, **rest, **of_answer))
    write_records(data / "exam.jsonl", asked)
    for system in MEANS:
        write_records(data / f"answers/{system}.jsonl", [answer for answer in answers if answer.system == system])
    write_records(data / "scores.jsonl", scores)
    broken = {"chunk_id": "c1", "section_id": "s1", "question": "Port?", "answer": reply, "quote": "", "type": "factual"}
    rules = ("quote-not-in-chunk", "answer-too-short")
    lost = [Rejected(id=f"r{number:02}", similarity=0.5, rules=rules, waivable=True, **broken) for number in range(20)]
    write_records(data / "rejected.jsonl", lost)
    write_records(data / "findings.jsonl", [finding("hidden-text", 0), finding("personal-data", 1), finding("personal-data", 0)])
    write_records(data / "coverage.jsonl", [section(number) for number in range(15)])
    (folder / "reports").mkdir(exist_ok=True)
    (folder / "reports/coverage.png").write_bytes(b"\x89PNG of the map")
    page = {"source": "handbook", "sha256": "f00", "revision": "", "title": "Page", "text": "Text"}
    write_records(data / "documents.jsonl", [Document(id=f"d{number}", path=f"page{number}.md", **page) for number in range(7)])
    metrics.mkdir(parents=True, exist_ok=True)
    for name, figures in METRICS.items():
        (metrics / f"{name}.json").write_text(json.dumps(figures))
    write_scores(folder, scoreboard())
    curves = folder / "reports/curves"
    curves.mkdir(exist_ok=True)
    trained = [f"{step},{2.5 / (1 + step / 40):.3f},{0.001 * (1 - step / 325):.5f},0.5" for step in range(5, 325, 5)]
    (curves / "train.csv").write_text("\n".join(["step,loss,learning_rate,grad_norm", *trained]) + "\n")
    unseen = [f"{step},{2.6 / (1 + step / 60):.3f}" for step in range(40, 325, 40)]
    (curves / "dev.csv").write_text("\n".join(["step,loss", *unseen]) + "\n")
    (folder / "params.yaml").write_text(PARAMS)
    written = ["report.md", "report.html", "report.json", "loss.png", "scores.png"]
    return [
        data,
        metrics,
        curves,
        folder / "params.yaml",
        folder / "reports/coverage.png",
        *(folder / "reports" / name for name in written),
    ]


def finding(kind: Any, page: int) -> Finding:
    place: dict[str, Any] = {"parent_id": f"d{page}", "source": "handbook", "path": f"page{page}.md", "start": 3, "end": 9}
    return Finding(id=content_id(kind, page), kind=kind, rule="email", shown="what-was-found", **place)


def section(number: int) -> Coverage:
    """Sections 0 and 1 have pairs, and 14 lost most candidates."""
    counts = {"chunks": 1, "facts": 1, "candidates": number, "pairs": int(number < 2), "rejected": number if number > 1 else 0}
    nothing: dict[str, Any] = {"pairs_by_type": {}, "pairs_by_recipe": {}, "rejected_by_rule": {}, "failures_by_reason": {}}
    place: dict[str, Any] = {"source": "handbook", "path": "page.md", "heading_path": ("Page", f"Part {number}"), "start": number}
    return Coverage(id=f"s{number:02}", reason="" if number < 2 else "too_short", retried=False, **counts, **nothing, **place)


def write_scores(folder: Path, scores: Scoreboard) -> None:
    (folder / "reports/metrics/evaluate.json").write_bytes(msgspec.json.encode(scores))
