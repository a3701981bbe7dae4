"""compare: what a branch changes, from two commits of a repository with a DVC remote; the numbers are made by hand."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from finished_run import GATES, METRICS, PARAMS, scoreboard, write_run
from markdown_it import MarkdownIt

from stages import report
from stages.compare import changed_answers, difference_rows, in_one_comment, main, paired_rows, unpaired_rows, with_addresses
from stages.pages import MAX_CHARACTERS
from stages.program import BadInput
from stages.records import Answer, Question, Score, read_records, write_records
from stages.scoring import Sampling

SAMPLING = Sampling(confidence=0.95, resamples=200, seed=3407)
PIPELINE = """stages:
  evaluate:
    cmd: "true"
    params: [report.samples]
    outs: [data/scores.jsonl, data/answers]
    metrics:
"""


def call(folder: Path, *command: str) -> None:
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    names = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@example.org",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@example.org",
    }
    done = subprocess.run(command, cwd=folder, env=os.environ | path | names, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def commit_run(folder: Path, message: str) -> None:
    call(folder, "dvc", "commit", "--quiet", "--force")
    call(folder, "dvc", "push", "--quiet")
    call(folder, "git", "add", "--all")
    call(folder, "git", "commit", "--quiet", "--message", message)


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the branches `empty` (no run), `main` (a run) and `edit`, checked out, whose shipped file answers otherwise."""
    folder = tmp_path_factory.mktemp("branches") / "project"
    folder.mkdir()
    call(folder, "git", "init", "--quiet", "--initial-branch", "empty")
    call(folder, "dvc", "init", "--quiet")
    call(folder, "dvc", "config", "core.analytics", "false")
    call(folder, "dvc", "remote", "add", "--quiet", "--default", "store", str(folder.parent / "store"))
    call(folder, "git", "add", "--all")
    call(folder, "git", "commit", "--quiet", "--message", "Set up")
    call(folder, "git", "checkout", "--quiet", "-b", "main")
    paths = write_run(folder)
    names = "".join(f"      - reports/metrics/{name}.json: {{cache: false}}\n" for name in (*METRICS, "evaluate"))
    (folder / "dvc.yaml").write_text(PIPELINE + names)
    (folder / ".gitignore").write_text("/data\n/reports/pull-request.md\n")
    report.main(*paths, report=report.Params(samples=3), promote=GATES)
    commit_run(folder, "A run")
    call(folder, "git", "checkout", "--quiet", "-b", "edit")
    scores = read_records(folder / "data/scores.jsonl", Score)
    write_records(folder / "data/scores.jsonl", [worse(one) for one in scores])
    answers = read_records(folder / "data/answers/q8_0.jsonl", Answer)
    write_records(folder / "data/answers/q8_0.jsonl", [otherwise(one) for one in answers])
    (folder / "params.yaml").write_text(PARAMS.replace("samples: 3", "samples: 5"))
    metrics = (folder / "reports/metrics/coverage.json").read_text()
    (folder / "reports/metrics/coverage.json").write_text(metrics.replace("1237", "1240"))
    exported = (folder / "reports/metrics/export.json").read_text()
    (folder / "reports/metrics/export.json").write_text(exported[:-1] + ', "base_sha256": "' + "a" * 64 + '"}')
    report.main(*paths, report=report.Params(samples=5), promote=GATES)
    commit_run(folder, "An edit")
    return folder


def worse(score: Score) -> Score:
    """Of the shipped file, questions 0 and 1 of recall lose 0.3, and with it their pass."""
    if score.system != "q8_0" or score.question_id not in ("recall0", "recall1"):
        return score
    return msgspec.structs.replace(score, similarity=round((score.similarity or 0) - 0.3, 6), passed=0.0)


def otherwise(answer: Answer) -> Answer:
    texts = {"recall0": "It has no port.", "recall1": "See | <b>the</b> docs\n![x](scores.png)", "gold0": "Port 1."}
    return msgspec.structs.replace(answer, text=texts.get(answer.question_id, answer.text))


def compared(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: str) -> str:
    monkeypatch.chdir(folder)
    main(**options)
    return (folder / "reports/pull-request.md").read_text(encoding="utf-8")


def test_a_fresh_clone_compares_question_by_question_with_what_the_remote_holds(
    branches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(tmp_path, "git", "clone", "--quiet", "--branch", "edit", str(branches), "clone")
    clone = tmp_path / "clone"
    call(clone, "dvc", "pull", "--quiet")
    shutil.copy(branches / "data/exam.jsonl", clone / "data")
    markdown = compared(clone, monkeypatch, against="origin/main", pictures="https://example.org/raw/1/reports/")
    verdict, gates, against, scores = (markdown.index(one) for one in ("# Docsmith: ", "| gate |", "## Against", "## Scores"))
    assert verdict == 0 < gates < against < scores
    part = markdown[against:scores]
    assert "The verdict there was: promote." in part
    # of 6 questions two lost 0.3: 0.749 before, 0.649 now
    assert "| Recall, similarity | 6 | 0.749 | 0.649 | -0.100 \\[" in part and "| 0.500 to 0.167 | 0 / 2 | 0.500 |" in part
    assert "| Gold, similarity | 4 | 0.759 | 0.759 | 0.000 \\[0.000 to 0.000\\] |" in part
    assert "<summary>3 of 18 answers differ</summary>" in part
    assert re.findall(r"^(?:Recall|Gold): .*chapter (\d)", part, flags=re.M) == ["0", "1", "0"]
    assert "| before | It listens on port 5000. | 0.774 | yes |\n| now | It has no port. | 0.474 | no |" in part
    assert "| now | See \\| &lt;b&gt;the&lt;/b&gt; docs !\\[x\\](scores.png) | 0.464 | no |" in part
    assert "| report.samples | 3 | 5 | +2 |" in part and "<summary>1 setting differs</summary>" in part
    assert (
        "| reports/metrics/coverage.json covered | 1237 | 1240 | +3 |" in part
        and "evaluate.json" not in part
        and "export.json" not in part
    )
    assert "| tuned | Recall, similarity | 6 | 0.756 | 0.756 | 0.000" in part.split("<summary>The other systems")[1]
    assert markdown.count("](https://example.org/raw/1/reports/") == 3 and len(markdown) <= MAX_CHARACTERS
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(markdown)
    assert html.count("<details>") == html.count("</details>") == markdown.count("<details>") > 6
    assert not re.search(r"(?m)^\||^<p>\|", html) and "<b>" not in html


def test_without_answers_of_the_other_commit_means_are_compared_and_it_says_so(
    branches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(tmp_path, "git", "clone", "--quiet", "--branch", "edit", str(branches), "clone")
    clone = tmp_path / "clone"
    assert "data/scores.jsonl is not here; fetch it with dvc pull" in compared(clone, monkeypatch, against="origin/main")
    call(clone, "dvc", "pull", "--quiet")
    shutil.rmtree(clone / ".dvc/cache")
    store = branches.parent / "store"
    store.rename(branches.parent / "away")
    try:
        markdown = compared(clone, monkeypatch, against="origin/main")
    finally:
        (branches.parent / "away").rename(store)
    assert "Only means are compared, as there are no single answers to compare (dvc get: " in markdown
    assert "| Recall, similarity | 6 | 0.774 \\[0.734 to 0.814\\] | 0.774 \\[0.734 to 0.814\\] | 0.000 |" in markdown
    assert "answers differ" not in markdown and "| report.samples | 3 | 5 | +2 |" in markdown
    assert "![Scores by system with intervals](scores.png)" in markdown


def test_a_commit_without_a_run_is_nothing_to_compare_with(branches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    markdown = compared(branches, monkeypatch, against="empty")
    part = markdown.split("## Against empty")[1].split("## Scores")[0].strip()
    assert re.fullmatch(r"The commit [0-9a-f]{8}, which .* in common, holds no run, so there is nothing to compare\.", part)


def test_without_a_report_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    markdown = compared(tmp_path, monkeypatch)
    assert markdown.splitlines() == [
        "There is no reports/report.md, so there is nothing to compare. Make and commit a run: dvc repro"
    ]


def test_a_revision_that_is_not_there_is_named(branches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"^nowhere is not a revision of this repository\. Fetch it with git, or name another"):
        compared(branches, monkeypatch, against="nowhere")


def test_only_questions_that_both_runs_asked_are_paired(tmp_path: Path) -> None:
    write_run(tmp_path)
    scores = read_records(tmp_path / "data/scores.jsonl", Score)
    before = [one for one in scores if one.question_id not in ("recall0", "recall5") and one.set != "gold"]
    rows = paired_rows(scores, before, "q8_0", "q8_0", SAMPLING)
    assert [row[:2] for row in rows] == [
        ("Recall, similarity", "4 of 6"),
        ("Held-out sections, similarity", "3"),
        ("Out of scope, abstained", "3"),
        ("General, similarity", "2"),
    ]
    assert rows[2][2:4] == ("0.764", "0.764")
    assert paired_rows(scores, before, "q8_0", "q4_k_m", SAMPLING)[0][2:4] == ("0.706", "0.749")
    assert paired_rows(scores, [], "q8_0", "q8_0", SAMPLING) == []


def test_means_are_compared_where_both_boards_have_the_set_and_the_system() -> None:
    now, then = scoreboard("recall", "gold"), scoreboard("recall", "general")
    assert unpaired_rows(now, then, "q8_0", "q4_k_m") == [
        ("Recall, similarity", "6", "0.731 [0.691 to 0.771]", "0.774 [0.734 to 0.814]", "0.043")
    ]
    assert unpaired_rows(now, then, "q8_0", "q2_k") == []


def test_an_answer_that_differs_in_white_space_alone_has_not_changed(tmp_path: Path) -> None:
    write_run(tmp_path)
    asked = read_records(tmp_path / "data/exam.jsonl", Question)
    scores = {one.id: one for one in read_records(tmp_path / "data/scores.jsonl", Score)}
    now = {one.question_id: (one, scores[one.id]) for one in read_records(tmp_path / "data/answers/q8_0.jsonl", Answer)}
    spaced = {key: (msgspec.structs.replace(one, text=f" {one.text}\n"), score) for key, (one, score) in now.items()}
    assert changed_answers(asked, spaced, now) == []
    changed = changed_answers(
        asked, now, {"out_of_scope0": (msgspec.structs.replace(now["gold0"][0], text=""), now["out_of_scope0"][1])}
    )
    assert changed == [
        {
            "set": "Out of scope",
            "question": "Which port does the out_of_scope server of chapter 0 listen on?",
            "rows": [
                ("reference", "(that the documentation does not cover it)", "", ""),
                ("before", "(empty)", "", "yes"),
                ("now", "It listens on port 5000.", "", "yes"),
            ],
        }
    ]


def test_differences_of_every_type_are_shown() -> None:
    found = {"params.yaml": {"b.on": {"old": False, "new": True}, "a.rate": {"old": 0.1, "new": 0.30000001, "diff": 0.20000001}}}
    found["m.json"] = {"n": {"new": 12}}
    assert difference_rows(found) == [
        ("m.json n", "", "12", ""),
        ("a.rate", "0.1", "0.3", "+0.2"),
        ("b.on", "False", "True", ""),
    ]


def test_only_pictures_of_the_report_get_an_address() -> None:
    text = "![Loss](loss.png)\n| !\\[x\\](loss.png) |\n![Away](https://example.org/a.png)\n"
    assert with_addresses(text, "https://h/r") == text.replace("![Loss](", "![Loss](https://h/r/")
    assert with_addresses(text, "") == text


def test_sections_that_a_comment_cannot_hold_are_left_out_from_the_end_and_named() -> None:
    head = "# Docsmith: promote\n\nwhy\n\n"
    settings = "<details><summary>params.yaml</summary>\n\n```yaml\n" + "## not a section\n" * 100 + "```\n\n</details>\n"
    text = head + "## Scores\n\n" + "x" * 40_000 + "\n\n## Lineage\n\n" + "y" * 20_000 + "\n\n" + settings
    assert in_one_comment("## Against main\n\n", text) == text.replace("## Scores", "## Against main\n\n## Scores")
    found = in_one_comment("## Against main\n\n" + "z" * 5_000 + "\n\n", text)
    assert len(found) <= MAX_CHARACTERS and "yyy" in found and "```" not in found and "not a section" not in found
    assert found.endswith("Left out here, as a comment holds 65,536 characters, and in reports/report.md: params.yaml.\n")
    shorter = in_one_comment("## Against main\n\n" + "z" * 20_000 + "\n\n", text)
    assert "yyy" not in shorter and "xxx" in shorter and shorter.endswith("in reports/report.md: Lineage, params.yaml.\n")
