"""run: a signature becomes a command line, an error one line and an exit code, and no stage outlives its parent."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import stages

STAGES = Path(stages.__file__).parent
COMMANDS = sorted(path.stem for path in STAGES.glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8"))
HEAVY = {"torch", "transformers", "mlflow", "pandas", "great_expectations", "matplotlib"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(STAGES.parent)}
PROBE = '''"""copies one file -> another

Costs nothing.
"""

import os
import sys
import time
from pathlib import Path

import msgspec

from stages.program import BadInput, LimitBroken, run, say


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    times: int


def main(source: Path, word: str, probe: Params, max_files: int = 3, folder: Path = Path("out"), loud: bool = False) -> None:
    if word == "wait":
        try:
            Path("pid.tmp").write_text(str(os.getpid()))
            os.replace("pid.tmp", "pid")
            time.sleep(60)
        finally:
            Path("unwound").write_text("yes")
    if word == "input":
        raise BadInput(f"{source}: is empty; give a text")
    if word == "limit":
        raise LimitBroken("9 of 10 were rejected")
    if word == "bug":
        raise KeyError("a bug")
    if word == "read":
        source.read_text()
    say(f"{source!r} {word!r} {probe.times} {max_files} {folder!r} {loud}")


if __name__ == "__main__":
    run(main)
'''
COMMAND = [sys.executable, "probe.py"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with params.yaml, .dvc and a small stage, probe.py."""
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    (tmp_path / "params.yaml").write_text("probe: {times: 7}\n", encoding="utf-8")
    (tmp_path / ".dvc").mkdir()
    return tmp_path


def probe(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=project, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


def wait_for(is_so: Callable[[], object], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_signature_gives_arguments_options_a_flag_and_the_section_of_params(project: Path) -> None:
    done = probe(project, "a.txt", "hello")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "PosixPath('a.txt') 'hello' 7 3 PosixPath('out') False\n"
    done = probe(project, "a.txt", "hello", "--max-files", "5", "--folder", "there", "--loud")
    assert done.stdout == "PosixPath('a.txt') 'hello' 7 5 PosixPath('there') True\n"


def test_a_missing_argument_is_a_usage_error_and_exits_with_2(project: Path) -> None:
    done = probe(project, "a.txt")
    assert done.returncode == 2 and "word" in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("input", "probe: a.txt: is empty; give a text\n"),
        ("limit", "probe: 9 of 10 were rejected\n"),
        ("read", "probe: a.txt: No such file or directory. Build it with: dvc repro\n"),
    ],
)
def test_an_error_a_user_can_act_on_is_one_line_and_exits_with_1(project: Path, word: str, line: str) -> None:
    done = probe(project, "a.txt", word)
    assert (done.returncode, done.stderr, done.stdout) == (1, line, "")


def test_a_wrong_setting_is_one_line_and_exits_with_1(project: Path) -> None:
    (project / "params.yaml").write_text("probe: {time: 7}\n", encoding="utf-8")
    done = probe(project, "a.txt", "hello")
    assert done.stderr == "probe: params.yaml: probe.time is not a setting of probe. Did you mean times?\n"
    assert (done.returncode, done.stdout) == (1, "")


def test_a_bug_keeps_its_traceback_and_does_not_exit_with_0(project: Path) -> None:
    done = probe(project, "a.txt", "bug")
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and done.stderr.endswith("KeyError: 'a bug'\n")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_stage_cleans_up_and_says_so_by_its_exit_code(project: Path, sent: signal.Signals, code: int) -> None:
    stage = subprocess.Popen([*COMMAND, "a.txt", "wait"], cwd=project, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for((project / "pid").exists)
        stage.send_signal(sent)
        _, said = stage.communicate(timeout=20)
    finally:
        stage.kill()
    assert stage.returncode == code
    assert (project / "unwound").read_text() == "yes"
    assert said == ("probe: interrupted; finished work is kept. Resume with: dvc repro\n" if code == 130 else "")


def test_a_stage_ends_when_its_parent_is_killed(project: Path) -> None:
    launcher = "import subprocess, sys; subprocess.Popen([sys.executable, 'probe.py', 'a.txt', 'wait']).wait()"
    parent = subprocess.Popen([sys.executable, "-c", launcher], cwd=project, env=ENVIRONMENT)
    try:
        wait_for((project / "pid").exists)
        stage = int((project / "pid").read_text())
        assert is_running(stage)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not is_running(stage))
    assert (project / "unwound").read_text() == "yes"


def test_a_second_run_at_once_exits_with_75_and_names_the_first(project: Path) -> None:
    first = subprocess.Popen([*COMMAND, "a.txt", "wait"], cwd=project, env=ENVIRONMENT)
    try:
        wait_for((project / "pid").exists)
        second = probe(project, "a.txt", "hello")
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 75 and not second.stdout
    assert second.stderr == f"probe: another run of it (pid {first.pid}) is at work here; wait or stop it\n"
    assert probe(project, "a.txt", "hello").returncode == 0  # a killed run holds nothing


def test_there_are_commands_to_ask_for_help() -> None:
    assert {"collect", "train", "report", "promote", "serve", "chat", "doctor"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_without_a_heavy_import(name: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", f"stages.{name}", "--help"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    imported = re.findall(r"^import time: .*\| +(\S+)$", done.stderr, flags=re.MULTILINE)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m stages.{name}")
    assert "stages.program" in imported
    assert not HEAVY & {module.split(".")[0] for module in imported}


def test_a_stage_without_paths_takes_those_of_dvc_yaml(tmp_path: Path) -> None:
    program = tmp_path / "copy.py"
    program.write_text(
        "from pathlib import Path\nfrom stages.program import run\ndef main(one: Path, two: Path, loud: bool = False) -> None:\n    print(one, two, loud)\nrun(main)\n"
    )
    (tmp_path / "dvc.yaml").write_text("stages:\n  copy:\n    cmd: python -m stages.copy data/a.txt 'data/b c.txt'\n")

    def output(*arguments: str) -> tuple[int, str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr.splitlines()[-1] if done.stderr else done.stdout

    assert output("--loud") == (0, "data/a.txt data/b c.txt True\n")
    assert output("x", "y") == (0, "x y False\n")
    code, words = output("x")
    assert code == 2 and words.endswith("the following arguments are required: two")
    (tmp_path / "dvc.yaml").unlink()
    code, words = output()
    assert code == 2 and words.endswith("the following arguments are required: one, two")
