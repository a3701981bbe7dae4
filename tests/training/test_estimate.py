import io
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT
from test_train import EXAMPLES, Project, but

from stages.models import load_tokenizer
from stages.train import lora_model, main, trainer_of
from stages.training.batches import Tokens, tokenise
from stages.training.estimate import bar, seconds_per_token


def rows_for(folder: Path) -> list[Tokens]:
    return tokenise(EXAMPLES, load_tokenizer(folder), CHAT.system_prompt, 128)


def test_an_estimate_names_steps_tokens_time_and_memory_and_leaves_nothing_behind(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path, tiny_folder, num_train_epochs=3, max_steps=-1, per_device_train_batch_size=1)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"train": project.settings, "models": project.models, "chat": CHAT, "tracking": project.tracking}
    main(*project.paths, **options, estimate=True)
    said = capsys.readouterr().out
    tokens = 3 * sum(len(row.input_ids) for row in rows_for(tiny_folder))
    assert said.startswith(f"train: 12 steps of 1 examples, {tokens:,} tokens, about ")
    assert re.search(r"about \d+\.\d min on this machine \([\d,]+ tokens/s, 6 evaluations\), \d+\.\d GB at the peak; ", said)
    assert said.endswith("are there; nothing was trained\n") and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_pace_of_a_probe_is_that_of_real_steps_on_its_rows(tiny_folder: Path, tmp_path: Path) -> None:
    rows = rows_for(tiny_folder)
    trainer = trainer_of(lora_model, tiny_folder, load_tokenizer(tiny_folder), rows, rows, tmp_path, but())
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters() if "lora_B" in name}
    pace = seconds_per_token(trainer, rows[:2])
    assert 0 < pace < math.inf
    assert trainer.state.global_step == 3 and trainer.state.num_train_epochs == 3  # its two rows are one step
    assert all(not weight.equal(before[name]) for name, weight in trainer.model.named_parameters() if name in before)
    assert not list(tmp_path.iterdir())


def test_the_bar_counts_a_resumed_run_from_its_checkpoint_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerState

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    callback, state = bar(), TrainerState(global_step=60, max_steps=100, is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    callback.on_step_end(None, state, None)
    callback.on_log(None, state, None, logs={"loss": 1.23456})
    callback.close()
    assert "60/100" in shown.getvalue() and "61/100" in shown.getvalue() and "loss=1.235" in shown.getvalue()
