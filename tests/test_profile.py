"""profile: the GPU's values and the way back, without losing a comment."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from test_wiring import SECTIONS

import stages
from stages.params import convert_section
from stages.profile import PROFILES, main, merge
from stages.program import BadParams

SHIPPED = Path(stages.__file__).parents[1] / "params.yaml"


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of params.yaml in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "params.yaml"
    path.write_bytes(SHIPPED.read_bytes())
    return path


def settings(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def leaves(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Dotted name -> value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= leaves(value, f"{where}{name}.") if isinstance(value, dict) else {where + name: value}
    return found


def comments(text: str) -> list[str]:
    return [line.split("#", 1)[1] for line in text.splitlines() if "#" in line]


def test_params_as_shipped_are_the_cpu_profile(params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main("cpu")
    assert params.read_bytes() == SHIPPED.read_bytes()
    assert capsys.readouterr().out == "profile: cpu, 0 settings changed in params.yaml. Next: dvc repro\n"


def test_the_gpu_profile_and_back_is_byte_for_byte_what_was_shipped(params: Path) -> None:
    main("gpu")
    assert params.read_bytes() != SHIPPED.read_bytes()
    main("cpu")
    assert params.read_text(encoding="utf-8") == SHIPPED.read_text(encoding="utf-8")


def test_each_profile_sets_the_same_settings() -> None:
    cpu, gpu = (leaves(settings(PROFILES / f"{name}.yaml")) for name in ("cpu", "gpu"))
    assert cpu and cpu.keys() == gpu.keys()


def test_the_gpu_profile_is_the_recipe(params: Path) -> None:
    """The values that the published recipe prints; where they come from is in docs/training.md."""
    main("gpu")
    found = settings(params)
    recipe = {
        "r": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "load_in_4bit": True,
        "max_length": 2048,
        "num_train_epochs": 3,
        "max_steps": 500,
        "warmup_steps": 100,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "linear",
        "optim": "adamw_8bit",
        "weight_decay": 0.01,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "logging_steps": 10,
        "save_steps": 100,
        "seed": 3407,
        "engine": "unsloth",
    }
    assert {name: found["train"][name] for name in recipe} == recipe
    # max_tokens is twice the recipe's 512, since a pair has several wordings and its evidence here
    asked = {"temperature": 0.7, "max_tokens": 2 * 512, "pairs_per_chunk": 2, "types": ["factual", "conceptual", "procedural"]}
    assert {name: found["generate"][name] for name in asked} == asked
    assert found["export"]["quants"] == ["q4_k_m", "q5_k_m", "q8_0"]
    assert found["chat"]["max_new_tokens"] == 256
    assert found["models"]["base"].startswith("hf:unsloth/Llama-3.2-3B-Instruct-bnb-4bit@")


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_every_section_of_a_profile_is_valid(name: str, params: Path) -> None:
    main(name)
    found = settings(params)
    assert found.keys() == SECTIONS.keys()
    for section, structs in SECTIONS.items():
        for struct in structs:
            convert_section(section, found[section], struct, f"{name}.yaml")


def test_comments_survive(params: Path) -> None:
    main("gpu")
    assert comments(params.read_text(encoding="utf-8")) == comments(SHIPPED.read_text(encoding="utf-8")) != []


def test_what_a_profile_does_not_name_stays(params: Path) -> None:
    params.write_text(SHIPPED.read_text(encoding="utf-8").replace("path: docs", "path: ../my docs"), encoding="utf-8")
    main("gpu")
    assert settings(params)["collect"]["sources"]["handbook"]["path"] == "../my docs"


def test_an_unknown_profile_is_one_line_and_changes_nothing(params: Path) -> None:
    with pytest.raises(BadParams, match=r"^there is no profile tpu; known: cpu, gpu$"):
        main("tpu")
    with pytest.raises(BadParams, match="there is no profile"):
        main("../profiles/cpu")
    assert params.read_bytes() == SHIPPED.read_bytes()


def test_a_setting_that_params_lacks_is_refused_by_name() -> None:
    with pytest.raises(BadParams, match=r"^p\.yaml: train: rank is no setting of params\.yaml$"):
        merge({"train": {"r": 8}}, {"train": {"rank": 16}}, "p.yaml")


def test_merge_counts_what_differed() -> None:
    values = {"train": {"r": 8, "optim": "x"}, "seed": 1}
    assert merge(values, {"train": {"r": 16, "optim": "x"}, "seed": 2}, "p.yaml") == 2
    assert values == {"train": {"r": 16, "optim": "x"}, "seed": 2}
