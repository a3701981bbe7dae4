import csv
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import yaml
from conftest import CHAT

from stages.files import sha256_of, sha256_of_file
from stages.params import Models, Tracking
from stages.program import BadInput, BadModelFile
from stages.records import Example, Message, write_records
from stages.train import Params, curves_of, lora_model, main

TRAIN = Params(
    engine="trl",
    max_length=128,
    load_in_4bit=False,
    r=4,
    lora_alpha=8,
    lora_dropout=0.0,
    target_modules=("q_proj", "down_proj"),
    num_train_epochs=1,
    max_steps=3,
    warmup_steps=0,
    learning_rate=0.01,
    lr_scheduler_type="linear",
    optim="adamw_torch",
    weight_decay=0.0,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=1,
    processes=1,
    logging_steps=1,
    eval_steps=2,
    save_steps=1,
    early_stopping_patience=0,
    seed=1,
)


def example(name: str, *turns: str) -> Example:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[turn % 2], text) for turn, text in enumerate(turns))  # type: ignore[arg-type]
    return Example(id=name, pair_ids=(name,), document_id="d", messages=messages)


EXAMPLES = [
    example("a", "How long does green tea steep?", "For three minutes."),
    example("b", "What is a kettle?", "An electric pot that boils a litre of water in four minutes.", "How much?", "A litre."),
    example("c", "Where does the cat sleep?", "On the piano."),
    example("d", "Who repairs the bicycle?", "The shop behind the town hall repairs it."),
]
DEV = [example("e", "When does the shop open?", "At nine in the morning.")]


def but(**changes: Any) -> Params:
    return msgspec.structs.replace(TRAIN, **changes)


# model


def test_adapters_sit_on_exactly_the_modules_that_params_name(tiny_folder: Path) -> None:
    model = lora_model(tiny_folder, TRAIN)
    adapted = {name.partition(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "down_proj"}
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * 2  # A and B, two modules, two layers
    assert all("lora_" in name for name in trained)
    shapes = {tuple(weight.shape) for name, weight in model.named_parameters() if "q_proj.lora_A" in name}
    assert shapes == {(4, 64)}


@pytest.mark.parametrize("change", [{"load_in_4bit": True}, {"engine": "unsloth"}])
def test_what_needs_cuda_is_one_clear_error_without_it(change: dict[str, Any], tiny_folder: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        return  # a machine with CUDA has nothing to refuse
    (name,) = change
    with pytest.raises(BadModelFile, match=rf"train\.{name}.*needs a CUDA device") as refused:
        Project(tmp_path, tiny_folder, **change).run()
    assert "\n" not in str(refused.value)


# main


class Project:
    """A folder with train.jsonl and dev.jsonl, where `main` runs with the tiny model."""

    def __init__(self, folder: Path, base: Path, **changes: Any) -> None:
        self.folder, self.settings = folder, but(**changes)
        self.train, self.dev = folder / "train.jsonl", folder / "dev.jsonl"
        self.checkpoints, self.adapter = folder / "checkpoints", folder / "adapter"
        self.curves, self.metrics = folder / "curves", folder / "train.json"
        self.models = Models(base=str(base), teacher="", embedder="")
        self.tracking = Tracking(uri=f"sqlite:///{folder}/mlflow.db", experiment="test", model_name="test")
        write_records(self.train, EXAMPLES)
        write_records(self.dev, DEV)

    @property
    def paths(self) -> list[Path]:
        return [self.train, self.dev, self.checkpoints, self.adapter, self.curves, self.metrics]

    def run(self) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            main(*self.paths, train=self.settings, models=self.models, chat=CHAT, tracking=self.tracking)
        metrics: dict[str, Any] = json.loads(self.metrics.read_text())
        return metrics

    def start(self, *program: str) -> subprocess.Popen[str]:
        """`python -m stages.train` in the folder, or another `program`."""
        sections = {"train": self.settings, "models": self.models, "chat": CHAT, "tracking": self.tracking}
        (self.folder / "params.yaml").write_text(yaml.safe_dump(msgspec.to_builtins(sections)))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]), "TQDM_DISABLE": "1"}
        command = [sys.executable, *(program or ("-m", "stages.train")), *map(str, self.paths)]
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def losses(self, split: str) -> dict[int, float]:
        """The loss by step."""
        with (self.curves / f"{split}.csv").open() as lines:
            return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(lines)}


class Trained(NamedTuple):
    project: Project
    metrics: dict[str, Any]


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of three steps."""
    project = Project(tmp_path_factory.mktemp("trained"), tiny_folder)
    return Trained(project, project.run())


def test_a_run_leaves_an_adapter_of_safetensors_whose_weights_have_moved(trained: Trained) -> None:
    from safetensors.torch import load_file

    adapter = trained.project.adapter
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(TRAIN.target_modules)  # PEFT's set would give other bytes in the next run
    weights = load_file(adapter / "adapter_model.safetensors")
    moved = [name for name, weight in weights.items() if "lora_B" in name and weight.abs().max() > 1e-3]
    assert len(moved) == 4
    assert len(weights) == 8
    assert not trained.project.checkpoints.exists()


def test_the_curves_have_a_row_for_each_step_that_was_logged(trained: Trained) -> None:
    losses = trained.project.losses("train")
    assert list(losses) == [1, 2, 3]
    assert list(trained.project.losses("dev")) == [2, 3]
    assert losses[3] < losses[1]
    assert trained.metrics["final_loss"] == pytest.approx(losses[3], rel=1e-3)


def test_the_metrics_say_what_was_trained(trained: Trained) -> None:
    metrics = trained.metrics
    assert (metrics["steps"], metrics["examples"], metrics["trainer"], metrics["epochs"]) == (3, 4, "trl", 1.5)
    assert metrics["dev_loss"] > 1
    assert metrics["tokens_per_s"] > 0
    assert metrics["peak_memory_mb"] > 100


def test_mlflow_has_settings_curves_datasets_and_tags_of_the_run(trained: Trained) -> None:
    import mlflow

    client = mlflow.MlflowClient(trained.project.tracking.uri)
    found = client.get_run(trained.metrics["mlflow_run_id"])
    assert found.info.status == "FINISHED"
    assert found.data.params["cfg.learning_rate"] == "0.01"
    assert found.data.params["cfg.base"] == trained.project.models.base
    assert {f"cfg.{name}" for name in msgspec.structs.asdict(TRAIN)} <= set(found.data.params)
    steps = {
        name: [point.step for point in client.get_metric_history(found.info.run_id, name)] for name in ("train_loss", "dev_loss")
    }
    assert steps["train_loss"] == [1, 2, 3]
    assert steps["dev_loss"] == [2, 3]
    for curve in ("learning_rate", "grad_norm", "tokens_per_s"):
        points = client.get_metric_history(found.info.run_id, curve)
        assert [point.step for point in points] == [1, 2, 3], curve
        assert all(point.value > 0 for point in points), curve
    assert found.data.metrics["system/system_memory_usage_megabytes"] > 100
    assert found.data.metrics["final.final_loss"] == trained.metrics["final_loss"]
    datasets = {(entry.dataset.name, entry.tags[0].value): entry.dataset.digest for entry in found.inputs.dataset_inputs}
    assert datasets == {
        ("train", "training"): sha256_of_file(trained.project.train)[:36],
        ("dev", "validation"): sha256_of_file(trained.project.dev)[:36],
    }
    assert found.data.tags["dvc.stage"] == "train"
    assert found.data.tags["trainer"] == "trl"
    assert found.data.tags["version.torch"] == importlib.metadata.version("torch")
    assert found.data.tags["adapter.path"] == trained.project.adapter.as_posix()
    assert found.data.tags["adapter.dvc_md5"].endswith(".dir")
    assert found.data.tags["adapter.sha256"] == sha256_of_file(trained.project.adapter / "adapter_model.safetensors")


def test_two_runs_with_one_seed_give_one_adapter_and_another_seed_another(
    trained: Trained, tiny_folder: Path, tmp_path: Path
) -> None:
    same, other = (
        Project(tmp_path / name, tiny_folder, seed=seed)
        for name, seed in (("same", 1), ("other", 2))
        if (tmp_path / name).mkdir() is None
    )
    for project in (same, other):
        project.tracking = trained.project.tracking
        project.run()
    digests = [sha256_of_file(project.adapter / "adapter_model.safetensors") for project in (trained.project, same, other)]
    assert digests[0] == digests[1] != digests[2]


def test_accumulated_batches_give_the_loss_of_one_large_batch(tiny_folder: Path, tmp_path: Path) -> None:
    losses = []
    for size, accumulated in ((4, 1), (2, 2), (1, 4)):
        folder = tmp_path / str(size)
        folder.mkdir()
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        losses.append(Project(folder, tiny_folder, max_steps=1, **changes).run()["final_loss"])
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=2e-3)  # bf16 where the processor has it


def test_early_stopping_ends_the_training_and_keeps_the_adapter_of_the_lowest_dev_loss(tiny_folder: Path, tmp_path: Path) -> None:
    same: dict[str, Any] = {"lr_scheduler_type": "constant", "eval_steps": 2, "learning_rate": 0.05}
    for name in ("stopped", "until_best"):
        (tmp_path / name).mkdir()
    stopped = Project(tmp_path / "stopped", tiny_folder, early_stopping_patience=2, max_steps=200, **same)
    metrics = stopped.run()
    dev = stopped.losses("dev")
    best = min(dev, key=lambda step: dev[step])
    assert metrics["best_step"] == best < metrics["steps"] == list(dev)[-1] == best + 4 < 200
    assert metrics["dev_loss"] == pytest.approx(dev[best], rel=1e-4)
    until_best = Project(tmp_path / "until_best", tiny_folder, max_steps=best, **same)
    assert until_best.run()["best_step"] == best
    assert sha256_of(stopped.adapter) == sha256_of(until_best.adapter)


@pytest.mark.parametrize("empty", ["train", "dev"])
def test_a_file_without_an_example_is_an_error(empty: str, tiny_folder: Path, tmp_path: Path) -> None:
    project = Project(tmp_path, tiny_folder)
    write_records(tmp_path / f"{empty}.jsonl", [])
    with pytest.raises(BadInput, match=rf"{empty}\.jsonl holds no example"):
        project.run()


def test_a_loss_that_was_never_logged_is_not_called_a_broken_one(trained: Trained, tiny_folder: Path, tmp_path: Path) -> None:
    project = Project(tmp_path, tiny_folder, logging_steps=50)
    project.tracking = trained.project.tracking
    metrics = project.run()
    assert metrics["final_loss"] > 1


def test_the_curves_have_a_row_for_each_logged_loss() -> None:
    log = [
        {"loss": 2.5, "step": 5, "learning_rate": 0.001, "grad_norm": 0.25},
        {"eval_loss": 2.25, "step": 5},
        {"loss": 1.0000004, "step": 10, "learning_rate": 0.0005, "grad_norm": 1.0},
        {"train_runtime": 3.0, "step": 10},
    ]
    assert curves_of(log) == {
        "train.csv": "step,loss,learning_rate,grad_norm\n5,2.5,0.001,0.25\n10,1,0.0005,1\n",
        "dev.csv": "step,loss\n5,2.25\n",
    }
    assert curves_of([])["dev.csv"] == "step,loss\n"
