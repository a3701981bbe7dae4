import os
import pty
import subprocess
import sys
from pathlib import Path

from conftest import CHAT, Exported

from stages.chat import last_turns, printable, stream_answer
from stages.records import Message
from stages.release import running_release

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
COMMAND = [sys.executable, "-m", "stages.chat"]


def test_piped_questions_are_answered_until_quit_without_prompts(exported: Exported) -> None:
    questions = "What color is the sky?\n\n  \nAnd the sea?\n/quit\nNever asked\n"
    done = subprocess.run(
        COMMAND, check=False, cwd=exported.project, env=ENVIRONMENT, input=questions, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "you>" not in done.stdout
    assert done.stdout.strip() != ""


def test_the_end_of_input_leaves(exported: Exported) -> None:
    done = subprocess.run(
        COMMAND, check=False, cwd=exported.project, env=ENVIRONMENT, input="", capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_terminal_gets_a_prompt_and_ctrl_d_leaves(exported: Exported) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(COMMAND, cwd=exported.project, env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while not said.endswith(b"you> "):
        said += os.read(ours, 100)
    os.write(ours, b"\x04")
    assert process.wait(timeout=20) == 0
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
