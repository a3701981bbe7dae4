import json
import re
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stages.pages import NOT_MEASURED
from stages.program import BadInput, BadParams, LimitBroken
from stages.records import Answer, Coverage, Document, Finding, Question, Rejected, Score, content_id, write_records
from stages.report import MAX_CHARACTERS, Params, duration, finding_rows, main, run_rows, spread
from stages.scoreboard import Interval, Scoreboard, SetScores, SystemScores
from stages.verdict import Gates

GATES = Gates(min_recall_gain=0.0, max_gguf_loss=0.03)
MEANS = {"base": 0.612, "tuned": 0.781, "q8_0": 0.774, "q4_k_m": 0.731}
HOSTILE = "Use | or <script>alert(1)</script> and `code`, *now*: @team #1\n![x](http://example.org/x.png)"
PARAMS = """models: {base: "pkg:base/model.gguf"}
export: {serve: q8_0}
report: {samples: 3}  # a comment with ``` in it
"""
METRICS: dict[str, dict[str, Any]] = {
    "train": {"seconds": 754.2, "trainer": "trl", "device": "cpu", "steps": 320, "tokens_per_s": 584.6, "final_loss": 0.4127},
    "export": {"files": {"docsmith-q8_0.gguf": {"bytes": 144_811_000}}},
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
    "split": {"unused": 41, "unused_by_reason": {"leak-margin": 40, "held-out-limit": 1}},
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
    return Interval(mean, round(mean - half, 6), round(mean + half, 6))


def scores_of(n: int, shift: float = 0.0) -> SetScores:
    return SetScores(
        sections=9,
        systems={
            name: SystemScores(n=n, empty=0, similarity=around(mean + shift), rouge_l=around(mean / 2 + shift))
            for name, mean in MEANS.items()
        },
        gains={
            f"{one}-{other}": around(MEANS[one] - MEANS[other], 0.02)
            for other, rest in (("base", ("tuned", "q8_0", "q4_k_m")), ("tuned", ("q8_0", "q4_k_m")))
            for one in rest
        },
    )


def write_run(folder: Path, reply: str = "It listens on port 5000.", questions: int = 9) -> list[Path]:
    """A finished pipeline's files in `folder`, and the paths that dvc.yaml gives to report."""
    asked, answers, scores = [], [], []
    for number in range(questions):
        of_set: Any = "held_out" if number % 3 == 2 else "recall"
        question = Question(
            id=f"q{number:03}",
            set=of_set,
            pair_id=f"p{number}",
            section_id=f"s{number % 4}",
            type="factual",
            question=f"Which port does the server of chapter {number} listen on?",
            reference=f"The server listens on port 500{number}.",
        )
        asked.append(question)
        for system, mean in MEANS.items():
            same = {"question_id": question.id, "system": system}
            text = "" if (system, number) == ("base", 0) else reply
            answers.append(Answer(id=content_id(question.id, system), text=text, **same))
            # tuned gains most on the first question and least on the last
            similarity = mean if system == "base" else mean - 0.01 * number
            rest = {"set": of_set, "section_id": question.section_id, "type": "factual", "rouge_l": 0.5}
            scores.append(Score(id=content_id(question.id, system), similarity=similarity, **same, **rest))
    data, metrics = folder / "data", folder / "reports/metrics"
    write_records(data / "questions.jsonl", asked)
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
    metrics.mkdir(parents=True)
    for name, figures in METRICS.items():
        (metrics / f"{name}.json").write_text(json.dumps(figures))
    write_scores(folder, Scoreboard(confidence=0.95, recall=scores_of(6), held_out=scores_of(3, -0.3)))
    curves = folder / "reports/curves"
    curves.mkdir(exist_ok=True)
    trained = [f"{step},{2.5 / (1 + step / 40):.3f},{0.001 * (1 - step / 325):.5f},0.5" for step in range(5, 325, 5)]
    (curves / "train.csv").write_text("\n".join(["step,loss,learning_rate,grad_norm", *trained]) + "\n")
    unseen = [f"{step},{2.6 / (1 + step / 60):.3f}" for step in range(40, 325, 40)]
    (curves / "dev.csv").write_text("\n".join(["step,loss", *unseen]) + "\n")
    (folder / "params.yaml").write_text(PARAMS)
    written = ["report.md", "report.html", "loss.png", "scores.png"]
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


def write_report(paths: list[Path], samples: int = 3, gates: Gates = GATES) -> tuple[str, str]:
    main(*paths, report=Params(samples=samples), promote=gates)
    return paths[5].read_text(encoding="utf-8"), paths[6].read_text(encoding="utf-8")


def test_the_report_opens_with_the_verdict_and_shows_scores_rejections_figures_and_lineage(tmp_path: Path) -> None:
    markdown, page = write_report(write_run(tmp_path))
    lines = markdown.splitlines()
    assert lines[0] == "# Docsmith: promote"
    assert lines[2].startswith(
        "tuned - base on recall is 0.169 (95 % 0.149 to 0.189), all above 0.000, and q8\\_0 - tuned is -0.007"
    )
    recall = [line for line in lines if line.startswith("| tuned | 6 |")]
    assert recall == [
        "| tuned | 6 | 0 | 0.781 \\[0.741 to 0.821\\] | 0.391 \\[0.350 to 0.430\\] | 0.169 \\[0.149 to 0.189\\] |  |"
    ]
    assert "| q4\\_k\\_m | 3 | 0 | 0.431" in markdown
    assert "Of 1,234 candidates 456 became pairs and 778 were rejected." in markdown
    assert markdown.count("| quote-not-in-chunk, answer-too-short | Port? |") == 5
    assert "| Training time | 12 min 34 s |" in markdown and "| Size of docsmith-q8\\_0.gguf | 144.8 MB |" in markdown
    assert "| handbook | 7 | files without a revision |" in markdown and "| documents.jsonl | 7 | " in markdown
    assert "````yaml\nmodels: {base" in markdown and "![Scores by system with intervals](scores.png)" in markdown
    for text in ("Docsmith: promote", "0.781 [0.741 to 0.821]", "144.8 MB", "quote-not-in-chunk, answer-too-short"):
        assert text in page


def test_broken_rules_are_shown_with_severity_and_reason_and_the_others_are_not(tmp_path: Path) -> None:
    markdown, page = write_report(write_run(tmp_path))
    rows = re.findall(r"^\| ([\w-]+) \| (warning|info|critical) \| (\d+) \| (.+) \|$", markdown, flags=re.M)
    assert [row[:3] for row in rows] == [
        ("quote-not-in-chunk", "warning", "700"),
        ("answer-too-short", "warning", "90"),
        ("holds-personal-data", "info", "8"),
    ]
    assert rows[1][3] == "fewer than 20 characters explain nothing"
    assert "<td>answer-too-short</td><td>warning</td><td>90</td><td>fewer than 20 characters explain nothing</td>" in page


def test_findings_reviews_and_unused_pairs_are_counted_and_what_was_found_is_never_shown(tmp_path: Path) -> None:
    markdown, page = write_report(write_run(tmp_path))
    figures = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", markdown.split("## Data quality")[1].split("\n## ")[0], flags=re.M))
    assert figures["Findings in the documents"] == "personal-data 2, hidden-text 1"
    assert (figures["Clusters of like candidates"], figures["Candidates in the largest cluster"]) == ("1,100", "7")
    assert (figures["Candidates with a secret"], figures["Candidates with personal data"]) == ("3", "8")
    assert [figures[f"Review: {name}"] for name in ("accepted", "edited", "rejected")] == ["31", "12", "5"]
    assert figures["Review: evidence no longer there"] == "2"
    assert (figures["Pairs not used"], figures["Why not used"]) == ("41", "leak-margin 40, held-out-limit 1")
    assert "| personal-data | 2 | handbook/page0.md, handbook/page1.md |" in markdown
    assert "<td>hidden-text</td><td>1</td><td>handbook/page0.md</td>" in page
    assert "what-was-found" not in markdown + page and "| findings.jsonl | 3 | " in markdown


def test_many_files_with_one_kind_of_finding_are_counted_beyond_the_first() -> None:
    assert finding_rows([finding("secret", number) for number in range(7)]) == [
        ("secret", "7", ", ".join(f"handbook/page{number}.md" for number in range(5)) + ", and 2 more")
    ]
    assert finding_rows([]) == []


def test_the_report_says_whether_a_judge_was_used_and_why(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    said = "The LLM judge was not used: "
    assert f"{said}not measured." in write_report(paths)[0]
    (paths[1] / "judge.json").write_text(json.dumps({"used": False, "why": "the audit failed: 0 of 16"}))
    markdown, page = write_report(paths)
    assert f"{said}the audit failed: 0 of 16." in markdown and f"{said}the audit failed: 0 of 16." in page
    (paths[1] / "judge.json").write_text(json.dumps({"used": True, "why": "the audit passed"}))
    assert "The LLM judge was used: the audit passed." in write_report(paths)[0]


def test_coverage_is_shown_with_its_picture_and_the_sections_that_lost_most_candidates(tmp_path: Path) -> None:
    markdown, page = write_report(write_run(tmp_path))
    said = "Of 1,250 sections 1,237 have a pair (99.0 %). Pairs by type: factual 416, conceptual 40. Pairs by recipe: quote-first 456."
    part = markdown.split("## Coverage\n\n")[1].split("\n## ")[0]
    assert (
        part.startswith(f"{said}\n\n![Number of pairs of each section, by document](coverage.png)\n\n<details>") and said in page
    )
    assert "<summary>13 sections without a pair</summary>\n\nMain reasons: too\\_short 11, no-fact 2.\n\n" in part
    rows = re.findall(r"\| too\\_short \| (\d+) \| page.md &gt; Page &gt; Part (\d+) \|", part)
    assert rows == [(str(number), str(number)) for number in range(14, 4, -1)]
    assert "\nThe other 3 are in coverage.jsonl.\n\n</details>\n" in part and "| coverage.jsonl | 15 |" in markdown
    assert (
        "data:image/png;base64,iVBORyBvZiB0aGUgbWFw" in page and "page.md &gt; Page &gt; Part 5" in page and "Part 4" not in page
    )


def test_few_sections_without_a_pair_are_all_listed_and_none_need_no_fold(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    write_records(paths[0] / "coverage.jsonl", [section(number) for number in (0, 1, 2)])
    markdown, page = write_report(paths)
    assert "<summary>1 section without a pair</summary>" in markdown and "are in coverage.jsonl" not in markdown + page
    write_records(paths[0] / "coverage.jsonl", [section(number) for number in (0, 1)])
    assert "without a pair" not in "".join(write_report(paths))


def test_a_figure_that_is_missing_reads_as_not_measured_and_never_as_zero(tmp_path: Path) -> None:
    rows = dict(run_rows({"steps": 0}, {"files": {"a.gguf": {}}}, {}, ["base"]))
    assert rows["Steps"] == "0"
    assert {rows[name] for name in rows if name != "Steps"} == {NOT_MEASURED}
    assert "Size of a.gguf" in rows and "Inference speed, base" in rows
    paths = write_run(tmp_path)
    for name in METRICS:
        (paths[1] / f"{name}.json").unlink()
    markdown, _ = write_report(paths)
    for name in (
        "Findings in the documents",
        "Clusters of like candidates",
        "Review: accepted",
        "Pairs not used",
        "Why not used",
    ):
        assert f"| {name} | not measured |" in markdown
    assert "Of not measured candidates" in markdown and "| Training time | not measured |" in markdown
    assert "Of not measured sections not measured have a pair (not measured). Pairs by type: not measured." in markdown


def test_the_verdict_is_the_one_that_promote_acts_on(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    assert write_report(paths, gates=Gates(0.16, 0.03))[0].startswith("# Docsmith: not enough evidence\n")
    assert write_report(paths, gates=Gates(0.0, 0.001))[0].startswith("# Docsmith: do not promote\n")


def test_one_section_and_no_held_out_questions_are_said_in_words(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    alone = SystemScores(n=6, empty=0, similarity=Interval(0.5, None, None), rouge_l=Interval(0.25, None, None))
    gains = {pair: Interval(0.1, None, None) for pair in scores_of(6).gains}
    write_scores(tmp_path, Scoreboard(confidence=0.95, recall=SetScores(1, dict.fromkeys(MEANS, alone), gains)))
    markdown, page = write_report(paths)
    assert markdown.startswith("# Docsmith: not enough evidence\n")
    assert (
        "Questions come from 1 section, so there are no intervals." in markdown
        and "Held-out sections" not in page.split("Data quality")[0]
    )
    assert "| base | 6 | 0 | 0.500 | 0.250 |  |  |" in markdown


def test_what_a_model_says_cannot_break_the_table_or_the_page(tmp_path: Path) -> None:
    markdown, page = write_report(write_run(tmp_path, reply=HOSTILE))
    cell = (
        "Use \\| or &lt;script&gt;alert(1)&lt;/script&gt; and \\`code\\`, \\*now\\*: @\u200bteam #\u200b1 "
        "!\\[x\\](http://example.org/x.png)"
    )
    assert f"| tuned | {cell} | 0.781 |" in markdown
    assert "<script" not in markdown and "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page) == []


def test_samples_go_from_the_greatest_gain_to_the_greatest_loss_and_a_third_is_held_out(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    summaries = re.findall(r"<summary>(.*): Which port does the server of chapter (\d)", write_report(paths, samples=3)[0])
    # recall is 0, 1, 3, 4, 6, 7 and held out 2, 5, 8; tuned gains less from question to question
    assert summaries == [("Recall", "0"), ("Recall", "7"), ("Held-out sections", "5")]
    assert "<summary>Recall" not in write_report(paths, samples=0)[0]
    assert "| base | (empty) | 0.612 |" in write_report(paths, samples=3)[0]


def test_spread_takes_both_ends_and_what_lies_evenly_between() -> None:
    assert spread([0, 1, 2, 3, 4], 3) == [0, 2, 4]
    assert spread([0, 1, 2, 3, 4], 1) == [2]
    assert spread([0, 1], 5) == [0, 1] and spread([], 1) == [] and spread([0, 1], 0) == []


def test_a_long_report_leaves_samples_out_until_a_comment_holds_it_and_says_so(tmp_path: Path) -> None:
    paths = write_run(tmp_path, reply="<|&" * 400, questions=60)
    paths[3].write_text(PARAMS + "# filler\n" * 20_000)
    markdown, page = write_report(paths, samples=40)
    assert 50_000 < len(markdown) <= MAX_CHARACTERS
    shown = markdown.count("<summary>Recall") + markdown.count("<summary>Held-out")
    assert 0 < shown < 40 and f"\n{40 - shown} of 40 samples are left out here, as a comment holds 65,536 characters" in markdown
    assert "(500 more characters)" in markdown and "# … the rest is in params.yaml" in markdown
    assert page.count('<section class="sample">') == 40 and page.count("# filler") == 20_000


def test_a_report_that_no_comment_can_hold_is_an_error(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    (paths[1] / "validate.json").write_text(json.dumps({"by_rule": {f"rule{number}" * 20: 1 for number in range(1000)}}))
    with pytest.raises(LimitBroken, match="characters without any sample; a comment holds 65,536"):
        write_report(paths)


def test_two_runs_give_the_same_bytes_and_pictures_name_no_software(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    write_report(paths)
    first = [path.read_bytes() for path in paths[5:]]
    write_report(paths)
    assert [path.read_bytes() for path in paths[5:]] == first
    for picture in first[2:]:
        width, height = struct.unpack(">II", picture[16:24])
        assert picture.startswith(b"\x89PNG") and width > 900 and height > 400 and b"matplotlib" not in picture


def test_a_changed_loss_or_score_changes_its_picture(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    write_report(paths)
    loss, scores = paths[7].read_bytes(), paths[8].read_bytes()
    (paths[2] / "train.csv").write_text("step,loss,learning_rate,grad_norm\n5,2.0,0.001,0.5\n")
    write_scores(tmp_path, Scoreboard(confidence=0.95, recall=scores_of(6)))
    write_report(paths)
    assert paths[7].read_bytes() != loss and paths[8].read_bytes() != scores


@pytest.mark.parametrize("line", ["5,low", "5", ",2.0"])
def test_a_line_that_is_not_a_loss_is_named(tmp_path: Path, line: str) -> None:
    paths = write_run(tmp_path)
    (paths[2] / "dev.csv").write_text(f"step,loss\n1,2.0\n{line}\n")
    with pytest.raises(BadInput, match=r"dev.csv:3: .* does not begin with step,loss"):
        write_report(paths)


def test_params_that_ship_no_file_are_refused(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    paths[3].write_text("models: {base: x}\n")
    with pytest.raises(BadParams, match=r"export.serve is missing"):
        write_report(paths)


def test_durations_read_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (5.23, 754.2, 3725.0, None)] == ["5.2 s", "12 min 34 s", "1 h 2 min", "not measured"]
