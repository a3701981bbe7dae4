"""How calls grow with the workers of a Ray cluster: P16 on Ray -> the row P16 of bench/results.json, and a section of bench/RESULTS.md.

    python -m bench.cluster [--calls 800] [--pairs 3]

Three nodes with four CPUs in all run on this machine, and a fake endpoint takes 50 ms a call. One worker, which makes one call at a time, is
followed by two and by four. The pace is that of the second half of the calls, when all workers are there: on so few cores they start
seconds apart, however many calls follow. Costs about three minutes a pair on two cores.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.generation import LATENCY_S, page, run_stages, set_params
from bench.rows import REPOSITORY, machine, publish, row

NODES = (2, 1, 1)  # their CPUs
HEADING = "## Work on Ray"
TARGET = 3.6


def pace(folder: Path, workers: int) -> tuple[float, bytes]:
    """Calls a second by `workers` on Ray, or in the stage's own process where that is 0; and the bytes that `generate` wrote."""
    from fake_endpoint import FakeEndpoint, chosen

    times: list[float] = []

    def answered(body: dict[str, Any]) -> str:
        times.append(time.monotonic())
        return chosen(body)

    shutil.rmtree(folder / "data/store", ignore_errors=True)
    with FakeEndpoint(text=answered, latency_s=LATENCY_S) as fake:
        settings = {"pairs_per_chunk": 1, "wordings": 1, "min_similarity": 0.0, "concurrency": 1}
        set_params(folder, folder / "docs", [{"url": fake.url, "model": "fake"}], **settings)
        if workers:
            params = (folder / "params.yaml").read_text(encoding="utf-8")
            (folder / "params.yaml").write_text(
                params.replace("engine: local", "engine: ray").replace("workers: 4", f"workers: {workers}"), encoding="utf-8"
            )
        run_stages(folder, "generate")
    written = b"".join((folder / "data" / name).read_bytes() for name in ("candidates.jsonl", "generate_failures.jsonl"))
    second_half = sorted(times)[len(times) // 2 :]
    return (len(second_half) - 1) / (second_half[-1] - second_half[0]), written


def measured(folder: Path, calls: int, pairs: int) -> tuple[dict[str, Any], str]:
    """What the row P16 holds of Ray, and the section's text."""
    from ray_cluster import ray_cluster

    (folder / "docs").mkdir()
    for number in range(1, calls + 1):
        (folder / f"docs/machine-{number:04}.md").write_text(page(number), encoding="utf-8")
    set_params(folder, folder / "docs")
    run_stages(folder, "collect", "ingest", "chunk")
    local, expected = pace(folder, 0)
    paces: dict[int, list[float]] = {1: [], 2: [], 4: []}
    is_equal = True
    with ray_cluster(*NODES) as cluster:
        os.environ |= cluster.environment
        for turn in range(pairs):
            for workers in paces:
                found, written = pace(folder, workers)
                paces[workers].append(found)
                is_equal = is_equal and written == expected
            said = ", ".join(f"{workers}: {values[-1]:.1f}" for workers, values in paces.items())
            print(f"P16 on Ray {turn + 1}/{pairs}, calls/s by workers: {said}", flush=True)
    ratios = [four / one for one, four in zip(paces[1], paces[4], strict=True)]
    found = row(ratios, statistics.median(paces[4]) * LATENCY_S / 4)
    middle = {workers: statistics.median(values) for workers, values in paces.items()}
    text = (
        f"{HEADING}\n\n`python -m bench.cluster` on {machine()}: {len(NODES)} nodes of Ray on this machine, a fake endpoint that takes "
        f"{1000 * LATENCY_S:.0f} ms a call, {calls} calls, {pairs} interleaved rounds, load {found['load']}. The pace is that of the second half of the calls, when all workers are there.\n\n"
        "| workers, with one call at a time each | calls/s, median | over one worker |\n|---|---|---|\n"
        + f"| 1, in the stage's own process | {local:.1f} | - |\n"
        + "".join(f"| {workers}, on Ray | {value:.1f} | {value / middle[1]:.2f} |\n" for workers, value in middle.items())
        + f"\nP16 on Ray: {found['ratio']:.2f} ({found['spread'][0]:.2f} to {found['spread'][1]:.2f}; target {TARGET}), "
        f"{found['limit_fraction']} of 4 workers that never wait in between. "
        + ("All outputs are equal to those of the local run, byte for byte." if is_equal else "The outputs are NOT equal.")
    )
    return {"ray": found | {"is_equal": is_equal}}, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=800)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    known = json.loads((REPOSITORY / "bench/results.json").read_text(encoding="utf-8"))["P16"]
    with tempfile.TemporaryDirectory(prefix="docsmith-bench-") as scratch:
        found, text = measured(Path(scratch), arguments.calls, arguments.pairs)
    publish({"P16": known | found}, text)
    print(text)


if __name__ == "__main__":
    main()
