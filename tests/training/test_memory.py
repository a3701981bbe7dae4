import functools
import gc
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT
from test_train import EXAMPLES, Project, but, example

from stages.models import load_tokenizer
from stages.program import OutOfMemory
from stages.records import write_records
from stages.train import lora_model, trainer_of
from stages.training.batches import tokenise
from stages.training.memory import fitting, step_bytes

# what a stage maps before its first step; the rest is for the batch
LIMITED = """
import resource, sys
import datasets, mlflow, peft, torch, transformers, trl
import stages.train
torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 1_500_000_000,) * 2)
stages.train.run(stages.train.main)
"""


@pytest.mark.parametrize("size", [8, "auto"])
def test_memory_that_runs_out_is_one_line_for_a_number_and_a_smaller_batch_for_auto(
    size: int | str, tiny_folder: Path, tmp_path: Path
) -> None:
    project = Project(tmp_path, tiny_folder, per_device_train_batch_size=size, max_length=500, max_steps=2, save_steps=9)
    write_records(project.train, [example(f"e{n}", f"What is {n}?", "word and other words " * 60) for n in range(8)])
    said, complaints = (child := project.start("-c", LIMITED)).communicate(timeout=180)
    half = r"train\.per_device_train_batch_size {0} 4 and train\.gradient_accumulation_steps {0} 2, which learns the same"
    short = (
        r"train: out of memory: ([\d.]+) GB of address space \(ulimit -v\) are there, and a batch of 8 needs about ([\d.]+) GB; "
    )
    if size == 8:
        assert child.returncode == 1
        found = re.fullmatch(short + "set " + half.format("to") + ", or the first to auto\n", complaints)
        assert found, complaints
    else:
        assert child.returncode == 0, complaints
        found = re.match(short + "goes on with " + half.format("=") + "\n", said)
        assert found, said
        metrics = json.loads(project.metrics.read_text())
        assert metrics["per_device_train_batch_size"] in (1, 2, 4) and metrics["steps"] == 2 and metrics["epochs"] == 2
    assert 1 < float(found[1]) < float(found[2]) < 3 * float(found[1])


def trainer_for(folder: Path, place: Path) -> Any:
    """Builds trainers for the tiny model, as `fitting` wants it."""
    tokenizer = load_tokenizer(folder)
    rows = tokenise(EXAMPLES, tokenizer, CHAT.system_prompt, 128)
    return rows, functools.partial(trainer_of, lora_model, folder, tokenizer, rows, rows, place)


def too_much(trainer: Any) -> tuple[int, int]:
    """The batch size and how many are summed; memory holds no batch above 2."""
    import torch

    if trainer.args.per_device_train_batch_size > 2:
        torch.empty(10**15)
    return trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps


def test_auto_halves_from_8_until_it_fits_and_keeps_the_effective_batch(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, build = trainer_for(tiny_folder, tmp_path)
    train = but(per_device_train_batch_size="auto", gradient_accumulation_steps=3)
    assert fitting(train, build, too_much, rows) == (2, 12)
    said = capsys.readouterr().out.splitlines()
    assert [re.findall(r"= (\d+)", line) for line in said] == [["4", "6"], ["2", "12"]]


@pytest.mark.parametrize(("size", "advice"), [(8, ("4", "2")), (6, ("3", "2")), (3, ("1", "3"))])
def test_a_number_stops_with_the_half_of_it(size: int, advice: tuple[str, str], tiny_folder: Path, tmp_path: Path) -> None:
    rows, build = trainer_for(tiny_folder, tmp_path)
    with pytest.raises(OutOfMemory, match=r"GB of .* are there, and a batch of \d needs about \d+\.\d GB; set train") as stopped:
        fitting(but(per_device_train_batch_size=size), build, too_much, rows)
    assert tuple(re.findall(r" to (\d)", str(stopped.value))) == advice


def test_a_batch_of_one_that_does_not_fit_names_other_settings(tiny_folder: Path, tmp_path: Path) -> None:
    rows, build = trainer_for(tiny_folder, tmp_path)

    def never(_: Any) -> None:
        raise MemoryError

    with pytest.raises(OutOfMemory, match="lower split.turns or train.r"):
        fitting(but(per_device_train_batch_size=1), build, never, rows)


def test_another_error_goes_up_as_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    rows, build = trainer_for(tiny_folder, tmp_path)

    def fails(_: Any) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="^shapes differ$"):
        fitting(but(per_device_train_batch_size="auto"), build, fails, rows)


def test_what_a_step_needs_grows_with_the_answer_and_nothing_of_it_stays(tiny_folder: Path, tmp_path: Path) -> None:
    import torch

    rows, build = trainer_for(tiny_folder, tmp_path)
    trainer = build(but())
    needed = []
    alive = []
    for row in (rows[0], rows[1]):
        needed.append(step_bytes(trainer, [row])[0])
        gc.collect()
        alive.append(sum(1 for one in gc.get_objects() if type(one) is torch.Tensor))
    scores = [sum(label != -100 for label in row.labels) * trainer.model.config.vocab_size * 4 for row in rows[:2]]
    assert scores[0] < scores[1]
    assert all(4 * score < bytes_ < 8 * score for score, bytes_ in zip(scores, needed, strict=True))
    assert alive[0] == alive[1]
