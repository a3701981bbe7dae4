"""report: what a pull request shows, from a finished run's files."""

import json
import re
import struct
from pathlib import Path

import msgspec
import pytest
from finished_run import GATES, METRICS, PARAMS, finding, questions_of, scoreboard, section, write_run, write_scores

from stages.pages import MAX_CHARACTERS, NOT_MEASURED
from stages.program import BadInput, LimitBroken
from stages.records import Question, Score, read_records, write_records
from stages.report import Params, duration, finding_rows, main, pick_samples, run_rows, spread
from stages.scoreboard import Interval, Rated
from stages.verdict import Gates

HOSTILE = "Use | or <script>alert(1)</script> and `code`, *now*: @team #1\n![x](http://example.org/x.png)"


def write_report(paths: list[Path], samples: int = 3, gates: Gates = GATES) -> tuple[str, str]:
    main(*paths, report=Params(samples=samples), promote=gates)
    return paths[5].read_text(encoding="utf-8"), paths[6].read_text(encoding="utf-8")


def table_after(markdown: str, heading: str) -> dict[str, list[str]]:
    """The first table after `heading`, as first cell -> the other cells."""
    rows = re.search(r"^\|.*?(?=^$)", markdown.split(heading, 1)[1], flags=re.M | re.S)
    assert rows is not None
    cells = [[cell.strip().replace("\\", "") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[0].splitlines()]
    return {name: rest for name, *rest in cells}


def test_the_report_opens_with_the_verdict_and_the_gates_and_shows_rejections_figures_and_lineage(tmp_path: Path) -> None:
    markdown, page = write_report(write_run(tmp_path))
    lines = markdown.splitlines()
    assert lines[0] == "# Docsmith: promote"
    assert lines[2] == "tuned - base on 6 recall questions is 0.169 (95 % 0.149 to 0.189), all above 0.000."
    gates = table_after(markdown, "# Docsmith")
    assert list(gates)[2:] == ["data", "leaks", "secrets", "files", "questions", "recall", "general", "abstention", "gguf"]
    assert gates["recall"][:3] == ["passed", "0.169 [0.149 to 0.189]", "0"]
    assert gates["gguf"][:3] == ["passed", "-0.007 [-0.027 to 0.013]", "-0.03"]
    assert gates["questions"] == ["passed", "", "5", "recall has 6 questions of 12 sections"]
    assert "Of 1,234 candidates 456 became pairs and 778 were rejected." in markdown
    assert markdown.count("| quote-not-in-chunk, answer-too-short | Port? |") == 5
    assert (
        "| Training time | 12 min 34 s |" in markdown
        and "| docsmith-q8\\_0.gguf | 144.8 MB | 0.0096 | 96.1% | ships: the smallest that passes |" in markdown
    )
    assert "| handbook | 7 | files without a revision |" in markdown and "| documents.jsonl | 7 | " in markdown
    assert "````yaml\nmodels: {base" in markdown and "![Scores by system with intervals](scores.png)" in markdown
    for text in ("Docsmith: promote", "0.781 [0.741 to 0.821]", "144.8 MB", "quote-not-in-chunk, answer-too-short"):
        assert text in page


def test_every_question_set_has_a_table_of_its_own_in_the_measure_that_tells(tmp_path: Path) -> None:
    markdown, page = write_report(write_run(tmp_path))
    titles = ["Recall", "Held-out sections", "Gold", "Out of scope", "General"]
    assert re.findall(r"^### (.+)$", markdown, flags=re.M) == re.findall(r"<h3>([^<]+)</h3>", page) == titles
    recall = table_after(markdown, "### Recall")
    assert recall["system"] == ["similarity", "passed", "similarity over base", "won / lost", "p"]
    assert recall["tuned"] == ["0.781 [0.741 to 0.821]", "0.391 [0.350 to 0.430]", "0.169 [0.149 to 0.189]", "4 / 1", "0.375"]
    assert recall["base"][2:] == ["", "", ""] and recall["tuned_rag"][2] == "0.211 [0.191 to 0.231]"
    assert "6 questions from 12 sections. A gain of tuned over base below 0.031 would mostly go unseen" in markdown
    unknown = table_after(markdown, "### Out of scope")
    assert unknown["system"][0] == "abstained" and unknown["q8_0"][0] == "0.774 [0.734 to 0.814]"
    assert table_after(markdown, "### General")["oracle"][0] == "0.873 [0.833 to 0.913]"


def test_folds_hold_the_other_measures_the_question_types_and_what_base_did_not_know(tmp_path: Path) -> None:
    markdown, page = write_report(write_run(tmp_path))
    recall = markdown.split("### Recall")[1].split("### Held-out")[0]
    others = table_after(recall, "<details>")
    assert others["system"] == ["empty", "ROUGE-L", "key facts", "similarity over tuned"]
    assert others["base"][0] == "1" and others["q8_0"][3] == "-0.007 [-0.027 to 0.013]"
    types = table_after(recall, "Similarity by question type:")
    assert types["system"] == ["factual", "procedural"] and types["tuned"][1] == "0.781 [0.721 to 0.841]"
    assert table_after(recall, "which passed none of these 2:")["tuned"][0] == "0.801 [0.761 to 0.841]"
    out = markdown.split("### Out of scope")[1].split("### General")[0]
    assert "by question type" not in out and "unknown to base" not in out and "ROUGE-L" not in out
    assert page.count("unknown to base") == 1 and page.count("Similarity by question type:") == 4


def test_a_failed_gate_is_the_verdict_and_stands_out(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    (paths[1] / "validate.json").unlink()
    markdown, page = write_report(paths)
    assert markdown.startswith("# Docsmith: reject\n\nthe metrics of validate are missing")
    assert '<td class="bad">failed</td>' in page and '<header class="verdict refuse">' in page


def test_report_json_says_the_same_to_programs(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    markdown, _ = write_report(paths)
    found = json.loads(paths[7].read_text(encoding="utf-8"))
    assert found["verdict"]["outcome"] == "promote" and markdown.splitlines()[2] == f"{found['verdict']['reason']}."
    assert [gate["name"] for gate in found["verdict"]["gates"]][-1] == "gguf" and found["served"] == "q8_0"
    assert ["Training time", "12 min 34 s"] in found["run"] and found["by_rule"][0][:3] == [
        "quote-not-in-chunk",
        "warning",
        "700",
    ]


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


def test_the_report_says_how_many_answers_were_rated_or_why_none_and_shows_ratings_where_there_are_any(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    board = scoreboard()
    texts = write_report(paths)
    assert all("No judge rated the answers: no judge was asked." in text for text in texts)
    assert "| judge |" not in texts[0] and "<th>judge</th>" not in texts[1]
    systems = {
        name: msgspec.structs.replace(one, measures=one.measures | {"judge": Interval(3.25, 2.5, 4.0)})
        for name, one in board.sets["recall"].systems.items()
    }
    recall = msgspec.structs.replace(board.sets["recall"], systems=systems)
    rated = Rated(used=True, why="the audit passed", asked=1200, scored=1190, unparsed=7, failed=3)
    write_scores(tmp_path, msgspec.structs.replace(board, sets=board.sets | {"recall": recall}, judge=rated))
    said = "A judge rated 1,190 of 1,200 answers from 1 to 5, and 7 replies were unparsed and 3 calls failed: the audit passed."
    markdown, page = write_report(paths)
    assert said in markdown and said in page
    others = {part.split("\n")[0]: part.split("<details>")[1].split("</details>")[0] for part in markdown.split("\n### ")[1:]}
    assert "| judge |" in others["Recall"] and r"3.250 \[2.500 to 4.000\]" in others["Recall"]
    assert "judge" not in others["General"] and page.count("<th>judge</th>") == 1


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
    rows = dict(run_rows({"steps": 0}, {}, ["base"]))
    assert rows["Steps"] == "0"
    assert {rows[name] for name in rows if name != "Steps"} == {NOT_MEASURED}
    assert "Inference speed, base" in rows
    paths = write_run(tmp_path)
    for name in METRICS.keys() - {"export"}:
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
    changed = {"min_recall_gain": 0.16}, {"min_recall_gain": 0.19}
    verdicts = [write_report(paths, gates=msgspec.structs.replace(GATES, **one))[0].splitlines()[0] for one in changed]
    assert verdicts == ["# Docsmith: not enough evidence", "# Docsmith: reject"]


def test_one_section_and_no_other_sets_are_said_in_words(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    board = scoreboard("recall")
    recall = board.sets["recall"]
    alone = Interval(0.5, None, None)
    systems = {name: msgspec.structs.replace(one, measures={"similarity": alone}) for name, one in recall.systems.items()}
    pairs = {
        name: msgspec.structs.replace(one, gains={"similarity": alone}, minimum_effect=None)
        for name, one in recall.comparisons.items()
    }
    board.sets["recall"] = msgspec.structs.replace(
        recall, sections=1, systems=systems, comparisons=pairs, by_type={}, unknown=None
    )
    write_scores(tmp_path, board)
    markdown, page = write_report(paths)
    assert markdown.startswith("# Docsmith: not enough evidence\n")
    assert "6 questions from 1 section, so there are no intervals." in markdown and "would mostly go unseen" not in markdown
    assert "Held-out sections" not in page.split("Data quality")[0] and "Similarity by question type" not in page
    assert table_after(markdown, "### Recall")["tuned"] == ["0.500", "", "0.500", "4 / 1", "0.375"]


def test_what_a_model_says_cannot_break_the_table_or_the_page(tmp_path: Path) -> None:
    markdown, page = write_report(write_run(tmp_path, reply=HOSTILE))
    cell = (
        "Use \\| or &lt;script&gt;alert(1)&lt;/script&gt; and \\`code\\`, \\*now\\*: @\u200bteam #\u200b1 "
        "!\\[x\\](http://example.org/x.png)"
    )
    assert f"| tuned | {cell} | 0.7" in markdown
    assert "<script" not in markdown and "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page) == []


def test_samples_come_from_every_set_and_go_from_the_greatest_gain_to_the_greatest_loss(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    asked, scores = read_records(paths[0] / "exam.jsonl", Question), read_records(paths[0] / "scores.jsonl", Score)

    def picked(count: int) -> list[str]:
        return [one.id for one in pick_samples(asked, scores, count)]

    # tuned gains less from question to question; a set's only sample is the middle one
    assert picked(6) == ["recall0", "recall5", "held_out1", "gold2", "out_of_scope1", "general1"]
    assert picked(4) == ["recall3", "held_out1", "gold2", "out_of_scope1"]
    assert len(picked(100)) == 18 and picked(0) == []
    markdown, _ = write_report(paths, samples=6)
    summaries = re.findall(r"<summary>(.*): Which port does the \w+ server of chapter (\d)", markdown)
    assert summaries[1:3] == [("Recall", "5"), ("Held-out sections", "1")] and len(summaries) == 6
    assert "| base | (empty) | 0.612 | no |" in markdown and "| tuned | It listens on port 5000. |  | yes |" in markdown
    assert "| reference | (that the documentation does not cover it) |  |  |" in markdown


def test_a_set_that_cannot_be_scored_by_its_measure_is_sampled_all_the_same() -> None:
    nothing = {"set": "gold", "section_id": "s", "type": "factual", "similarity": None, "rouge_l": None, "key_facts": None}
    nothing |= {"evidence": None, "judge": None, "abstained": 0.0, "passed": 0.0}
    asked = [one for one in questions_of() if one.set == "gold"]
    scores = [
        Score(id=f"{one.id}{system}", question_id=one.id, system=system, **nothing)
        for one in asked
        for system in ("base", "tuned")
    ]
    assert [one.id for one in pick_samples(asked, scores, 2)] == ["gold0", "gold3"]


def test_spread_takes_both_ends_and_what_lies_evenly_between() -> None:
    assert spread([0, 1, 2, 3, 4], 3) == [0, 2, 4]
    assert spread([0, 1, 2, 3, 4], 1) == [2]
    assert spread([0, 1], 5) == [0, 1] and spread([], 1) == [] and spread([0, 1], 0) == []


def test_a_long_report_leaves_samples_out_until_a_comment_holds_it_and_says_so(tmp_path: Path) -> None:
    paths = write_run(tmp_path, reply="<|&" * 400, copies=4)
    paths[3].write_text(PARAMS + "# filler\n" * 20_000)
    markdown, page = write_report(paths, samples=40)
    assert 50_000 < len(markdown) <= MAX_CHARACTERS
    shown = len(re.findall(r"<summary>[\w -]+: Which port", markdown))
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
    for picture in first[3:]:
        width, height = struct.unpack(">II", picture[16:24])
        assert picture.startswith(b"\x89PNG") and width > 900 and height > 400 and b"matplotlib" not in picture


def test_a_changed_loss_or_score_changes_its_picture(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    write_report(paths)
    loss, scores = paths[8].read_bytes(), paths[9].read_bytes()
    (paths[2] / "train.csv").write_text("step,loss,learning_rate,grad_norm\n5,2.0,0.001,0.5\n")
    write_scores(tmp_path, scoreboard("recall"))
    write_report(paths)
    assert paths[8].read_bytes() != loss and paths[9].read_bytes() != scores


@pytest.mark.parametrize("line", ["5,low", "5", ",2.0"])
def test_a_line_that_is_not_a_loss_is_named(tmp_path: Path, line: str) -> None:
    paths = write_run(tmp_path)
    (paths[2] / "dev.csv").write_text(f"step,loss\n1,2.0\n{line}\n")
    with pytest.raises(BadInput, match=r"dev.csv:3: .* does not begin with step,loss"):
        write_report(paths)


def test_an_export_that_ships_no_file_is_refused(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    (paths[1] / "export.json").unlink()
    with pytest.raises(BadInput, match=r"export.json does not say which file ships"):
        write_report(paths)


def test_durations_read_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (5.23, 754.2, 3725.0, None)] == ["5.2 s", "12 min 34 s", "1 h 2 min", "not measured"]
