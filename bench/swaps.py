"""A soak: questions to a server for minutes, during which its champion is replaced and rolled back twice -> what failed, and the memory.

    python -m bench.swaps --gguf models/gguf [--minutes 10] [--clients 4]

The two versions are one model under two checksums, so that an answer tells which of them gave it and costs the same.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.rows import REPOSITORY

sys.path[:0] = [str(REPOSITORY)]

NAME = "docsmith"
START_S = 120  # two imports of MLflow on busy cores
QUESTIONS = ("What is a chunk?", "How is a model promoted?", "Which file keeps the settings?", "What does export write?")


@contextlib.contextmanager
def two_versions(gguf: Path, project: Path) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """A registry in `project` with two versions of the release in `gguf`, of which version 1 is champion.

    Gives the functions that make version 2 champion, and that roll back to version 1.
    """
    from stages.files import sha256_of_file
    from stages.params import Tracking
    from stages.promote import register, roll_back, run_of_version
    from stages.registry import CHAMPION, PREVIOUS, change, changing, connected
    from stages.release import SUMS_FILE, read_release, write_release

    tracking = Tracking(f"sqlite:///{project}/mlflow.db", "soak", NAME)
    release = read_release(gguf)
    with connected(tracking) as client:
        for number in ("1", "2"):
            folder = project / f"version-{number}"
            shutil.copytree(gguf, folder, copy_function=_link)
            (folder / "VERSION").write_text(number, encoding="utf-8")
            for name in ("release.json", SUMS_FILE):
                (folder / name).unlink()  # else the original is written to through the link
            write_release(folder, release)
            tags = {
                "verdict": "promote",
                "verdict_reason": "a soak",
                "quant": release.serve,
                "gguf_path": str(folder),
                "sha256sums": sha256_of_file(folder / SUMS_FILE),
            }
            assert register(client, tracking, tags, run_of_version(client, tracking, "", tags["sha256sums"])) == number

        def promote(version: str, before: str | None) -> None:
            with changing(client, NAME):
                change(client, NAME, {CHAMPION: version} | ({PREVIOUS: before} if before else {}), {})

        promote("1", None)
        yield lambda: promote("2", "1"), lambda: print(f"  {roll_back(client, NAME)}", flush=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copy(source, target)


@contextlib.contextmanager
def serving(gguf: Path, project: Path, parallel: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A `serve` process that follows the champion in `project`, and its address."""
    import yaml

    from stages.release import read_release

    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    params["chat"]["system_prompt"] = read_release(gguf).system_prompt
    params["tracking"] = {"uri": f"sqlite:///{project}/mlflow.db", "experiment": "soak", "model_name": NAME}
    params["serve"] |= {"model": f"models:/{NAME}@champion", "port": 0, "parallel": parallel, "requests_per_minute": 10**9}
    (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    command = [sys.executable, "-m", "stages.serve"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (project / "serve.log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(command, cwd=project, env=environment, stdout=log, stderr=log, text=True)
        try:
            deadline = time.monotonic() + START_S
            while not (found := re.search(r"http://[\w.:]+", (project / "serve.log").read_text(encoding="utf-8"))):
                if server.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"serve did not start: {(project / 'serve.log').read_text(encoding='utf-8')}")
                time.sleep(0.1)
            yield server, found[0]
        finally:
            server.terminate()
            server.wait()


def soak(gguf: Path, minutes: float = 10, clients: int = 4) -> dict[str, Any]:
    """What became of the questions that `clients` asked without a pause, while version 2 became champion and was rolled back, twice.

    Memory in MB: the median of the server with its engines, in the first fifth (after one warm tenth) and the last fifth.
    """
    import httpx

    answered: list[tuple[float, float, str]] = []  # when, seconds, version
    failed: list[str] = []
    memory: list[tuple[float, float]] = []
    with (
        tempfile.TemporaryDirectory(prefix="docsmith-soak-") as folder,
        two_versions(gguf, Path(folder)) as (promote, roll_back),
        serving(gguf, Path(folder), clients) as (server, address),
    ):
        began = time.monotonic()
        over = threading.Event()

        def ask(number: int) -> None:
            with httpx.Client(timeout=120, trust_env=False) as client:
                while not over.is_set():
                    asked = time.monotonic()
                    try:
                        reply = client.post(f"{address}/chat", json={"question": QUESTIONS[number % len(QUESTIONS)]})
                        reply.raise_for_status()
                        answered.append((asked - began, time.monotonic() - asked, reply.json().get("model", "")))
                    except (httpx.HTTPError, ValueError) as error:
                        failed.append(f"{asked - began:.1f} s: {error}")
                        time.sleep(0.5)
                    number += 1

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        swaps = [(minutes * 12 * place, act) for place, act in enumerate((promote, roll_back, promote, roll_back), start=1)]
        try:
            while (now := time.monotonic() - began) < minutes * 60:
                memory.append((now, memory_mb(server.pid)))
                if swaps and now > swaps[0][0]:
                    swaps.pop(0)[1]()
                time.sleep(min(1.0, minutes))
        finally:
            over.set()
            for thread in threads:
                thread.join()
        said = (Path(folder) / "serve.log").read_text(encoding="utf-8").splitlines()
    seconds = sorted(took for _, took, _ in answered)
    versions = [version for _, _, version in sorted(answered)]
    return {
        "minutes": minutes,
        "clients": clients,
        "answered": len(answered),
        "failed": len(failed),
        "failures": failed[:10],
        "p50_s": round(statistics.median(seconds), 2) if seconds else None,
        "p99_s": round(seconds[int(len(seconds) * 0.99)], 2) if seconds else None,
        "answered_by": {version: versions.count(version) for version in sorted(set(versions))},
        "swaps": sum("answers now" in line for line in said),
        "memory_mb": [_median(memory, minutes * 6, minutes * 12), _median(memory, minutes * 54, minutes * 60)],
    }


def memory_mb(pid: int) -> float:
    """The proportional memory of a process and its descendants, in MB: two engines share the file that both have mapped."""
    waiting, total = [pid], 0
    while waiting:
        one = waiting.pop()
        with contextlib.suppress(OSError, ProcessLookupError):  # it has just ended
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text(encoding="ascii")
            total += int(re.search(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)[1])  # type: ignore[index]
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += map(int, (task / "children").read_text(encoding="ascii").split())
    return total / 1024


def _median(memory: list[tuple[float, float]], first: float, last: float) -> float | None:
    found = [mb for at, mb in memory if first <= at <= last]
    return round(statistics.median(found)) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, default=Path("models/gguf"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=4)
    options = parser.parse_args()
    found = soak(options.gguf.resolve(), options.minutes, options.clients)
    print(json.dumps(found, indent=2))
    sys.exit(1 if found["failed"] or found["swaps"] != 4 or len(found["answered_by"]) != 2 else 0)


if __name__ == "__main__":
    main()
