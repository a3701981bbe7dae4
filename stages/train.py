"""data/train.jsonl + data/dev.jsonl -> models/adapter: a LoRA adapter, trained on the answers only and tracked in MLflow.

TRL and PEFT train on the CPU or a GPU, Unsloth on CUDA; both write PEFT's adapter format. Checkpoints in models/checkpoints are no
output: a stopped run resumes from the last one when data and settings are the same. The longest stage: minutes on two cores.
"""

import contextlib
import csv
import functools
import importlib.metadata
import io
import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from stages.files import new_folder, sha256_of_file, write_json, write_text
from stages.models import as_hf_folder, free_cores, load_tokenizer, model_sha256
from stages.params import Chat, Count, Models, NonNegative, Positive, Share, Tracking
from stages.program import BadInput, BadModelFile, BadParams, LimitBroken, run, say
from stages.records import Example, content_id, read_records
from stages.tracking import dvc_md5, folder_md5, git_commit
from stages.tracking.recorder import Recorder, recording
from stages.training.batches import Tokens, pack, tokenise
from stages.training.checkpoints import epochs_of, last_checkpoint, resumable
from stages.training.estimate import bar, estimate_of
from stages.training.memory import fitting
from stages.training.ranks import first_says, is_one_of_several, join_ranks, rank, start_ranks, threads, wait_for_all


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names and meanings are those of transformers' TrainingArguments and peft's LoraConfig."""

    engine: Literal["auto", "trl", "unsloth"]
    max_length: Positive
    load_in_4bit: bool
    r: Positive
    lora_alpha: Positive
    lora_dropout: Share
    target_modules: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    num_train_epochs: Annotated[float, msgspec.Meta(gt=0)]
    max_steps: Annotated[int, msgspec.Meta(ge=-1)]  # -1: as many as the epochs take
    warmup_steps: Count
    learning_rate: Annotated[float, msgspec.Meta(gt=0)]
    lr_scheduler_type: str
    optim: str
    weight_decay: NonNegative
    per_device_train_batch_size: Positive | Literal["auto"]  # auto: as many, up to 8, as memory holds
    gradient_accumulation_steps: Positive
    processes: Positive
    logging_steps: Positive
    eval_steps: Positive
    save_steps: Positive
    early_stopping_patience: Count  # of evaluations; above 0, the adapter of the lowest dev loss is kept
    seed: Count


def has_bf16() -> bool:
    """Whether this machine multiplies bf16 matrices in hardware: else fp32 is faster on a CPU, and fp16 on a GPU."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def has_unsloth() -> bool:
    """Whether Unsloth can run here: it is installed and there is a CUDA device."""
    import importlib.util

    import torch

    return torch.cuda.is_available() and importlib.util.find_spec("unsloth") is not None


def lora_model(folder: Path, train: Params) -> Any:
    """The base model in `folder` with fresh LoRA adapters, by PEFT: in 4 bits on CUDA if asked for, else in bf16 or fp32."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if has_bf16() else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}
    if train.load_in_4bit:
        if not torch.cuda.is_available():
            raise BadModelFile(
                "train.load_in_4bit needs a CUDA device, and none is here; set it to false or run: make profile PROFILE=cpu"
            )
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if train.load_in_4bit:
        model = prepare_model_for_kbit_training(model)  # type: ignore[no-untyped-call]
    lora = LoraConfig(
        r=train.r,
        lora_alpha=train.lora_alpha,
        lora_dropout=train.lora_dropout,
        target_modules=list(train.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def unsloth_model(folder: Path, train: Params) -> Any:
    """As `lora_model`, by Unsloth, with the recipe's options. Needs CUDA."""
    from unsloth import FastLanguageModel  # first of all: it patches transformers when it is imported

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder), max_seq_length=train.max_length, dtype=None, load_in_4bit=train.load_in_4bit
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=train.r,
        lora_alpha=train.lora_alpha,
        lora_dropout=train.lora_dropout,
        target_modules=list(train.target_modules),
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=train.seed,
        use_rslora=False,
        loftq_config=None,
    )


def training_arguments(train: Params, checkpoints: Path) -> Any:
    """TRL's SFTConfig for `train`."""
    import torch
    from trl import SFTConfig  # type: ignore[attr-defined]

    on_gpu = torch.cuda.is_available()
    at_once: Any = train.per_device_train_batch_size  # `auto` is a number by now
    return SFTConfig(
        output_dir=str(checkpoints),
        max_length=None,  # `tokenise` has refused what is too long
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps,
        warmup_steps=train.warmup_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        optim=train.optim,
        weight_decay=train.weight_decay,
        per_device_train_batch_size=at_once,
        per_device_eval_batch_size=at_once,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        train_sampling_strategy="group_by_length",
        logging_steps=train.logging_steps,
        eval_strategy="steps",
        eval_steps=train.eval_steps,
        save_steps=train.eval_steps if train.early_stopping_patience else train.save_steps,
        load_best_model_at_end=train.early_stopping_patience > 0,
        metric_for_best_model="eval_loss",
        save_total_limit=2,  # the one before is there until a new one is whole
        seed=train.seed,
        bf16=on_gpu and has_bf16(),  # on a CPU the weights are bf16 already, and autocast would only cost
        fp16=on_gpu and not has_bf16(),
        use_cpu=not on_gpu,
        gradient_checkpointing=on_gpu,
        packing=False,
        report_to="none",
        disable_tqdm=True,  # `bar` knows where a resumed run begins
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
    )


def curves_of(log: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The trainer's log as CSV for `dvc plots`: train.csv (step, loss, learning_rate, grad_norm) and dev.csv (step, loss)."""
    kinds = {"train": {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm"}, "dev": {"eval_loss": "loss"}}
    curves = {}
    for split, columns in kinds.items():
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["step", *columns.values()])
        writer.writerows(
            [entry["step"], *(f"{entry[name]:.6g}" for name in columns)] for entry in log if columns.keys() <= entry.keys()
        )
        curves[f"{split}.csv"] = table.getvalue()
    return curves


def recording_callback(recorder: Recorder, tokens: int) -> Any:
    """A trainer callback that records each logged figure, the tokens per second since the one before, and the machine's load.

    An epoch trains `tokens` tokens; the time of evaluations and checkpoints does not count.
    """
    from transformers import TrainerCallback

    names = {"loss": "train_loss", "eval_loss": "dev_loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm"}
    began = epoch = seconds = 0.0

    class ToMlflow(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal epoch
            epoch = state.epoch or 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal began
            began = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal seconds
            seconds += time.monotonic() - began
            recorder.look(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
            nonlocal epoch, seconds
            figures = {names[name]: float(value) for name, value in (logs or {}).items() if name in names}
            if "train_loss" in figures and seconds:
                figures["tokens_per_s"] = tokens * (state.epoch - epoch) / seconds
                epoch, seconds = state.epoch, 0.0
            recorder.points(figures, state.global_step)

    return ToMlflow()


def trainer_of(
    load_model: Callable[[Path, Params], Any],
    folder: Path,
    tokenizer: Any,
    rows: Sequence[Tokens],
    dev_rows: Sequence[Tokens],
    checkpoints: Path,
    train: Params,
    callbacks: Sequence[Any] = (),
) -> Any:
    """A trainer for the base model in `folder` with fresh adapters: with one seed, always the same."""
    import torch

    torch.manual_seed(train.seed)
    model = load_model(folder, train)
    from datasets import Dataset  # after Unsloth
    from transformers import EarlyStoppingCallback, PrinterCallback

    from stages.training.shared import SharedTrainer

    trainer_class: Any = SharedTrainer
    if not torch.cuda.is_available():
        from stages.training.packed import PackedTrainer, keep_memory, pack_model

        keep_memory()
        pack_model(model)
        trainer_class = functools.partial(PackedTrainer, data_collator=pack)
    trainer = trainer_class(
        model=model,
        args=training_arguments(train, checkpoints),
        train_dataset=Dataset.from_list([msgspec.to_builtins(row) for row in rows]),
        eval_dataset=Dataset.from_list([msgspec.to_builtins(row) for row in dev_rows]),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    if train.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(train.early_stopping_patience))
    trainer.remove_callback(PrinterCallback)  # it prints a line for each logged step; MLflow has them
    return trainer


def main(
    train_examples: Path,
    dev_examples: Path,
    checkpoints: Path,
    adapter: Path,
    curves: Path,
    metrics: Path,
    *,
    train: Params,
    models: Models,
    chat: Chat,
    tracking: Tracking,
    estimate: bool = False,
) -> None:
    import torch

    is_shared = train.processes > 1 or is_one_of_several()
    if train.engine == "unsloth" and is_shared:
        raise BadParams("train.engine unsloth trains in one process alone; set it to trl, or train.processes to 1")
    if train.processes > 1 and not is_one_of_several() and not estimate:
        paths = (train_examples, dev_examples, checkpoints, adapter, curves, metrics)
        start_ranks(train.processes, main, *paths, train=train, models=models, chat=chat, tracking=tracking)
        return
    by_unsloth = train.engine == "unsloth" or (train.engine == "auto" and not is_shared and has_unsloth())
    if by_unsloth and not has_unsloth():
        raise BadModelFile("train.engine is unsloth, which needs a CUDA device and the package unsloth; set it to trl or auto")
    join_ranks()
    folder = first_says(lambda: as_hf_folder(models.base))
    tokenizer = load_tokenizer(folder)
    conversations, unseen = (read_records(path, Example) for path in (train_examples, dev_examples))
    if not conversations or not unseen:
        raise BadInput(f"{dev_examples if conversations else train_examples} holds no example; see reports/metrics/split.json")
    rows = tokenise(conversations, tokenizer, chat.system_prompt, train.max_length)
    dev_rows = tokenise(unseen, tokenizer, chat.system_prompt, train.max_length)
    tokens = sum(len(row.input_ids) for row in rows)

    torch.set_num_threads(threads())
    base_sha256 = model_sha256(models.base)
    fingerprint = content_id(sha256_of_file(train_examples), sha256_of_file(dev_examples), train, chat, base_sha256)
    load_model = unsloth_model if by_unsloth else lora_model
    build = functools.partial(trainer_of, load_model, folder, tokenizer, rows, dev_rows, checkpoints)

    def finish(trainer: Any) -> tuple[Any, float, float]:
        """`trainer` at its end, the epochs that it did now, and their seconds."""
        resumed = first_says(lambda: last_checkpoint(checkpoints, fingerprint))
        if resumed and rank() == 0:
            say(f"train: resumes from {resumed}")
        earlier_epochs = epochs_of(Path(resumed)) if resumed else 0.0
        started = time.monotonic()
        with contextlib.closing(bar()) as shown:
            trainer.add_callback(shown)
            trainer.train(resume_from_checkpoint=resumed)
        wait_for_all()
        return trainer, trainer.state.epoch - earlier_epochs, time.monotonic() - started

    if estimate:
        say(f"train: {fitting(train, build, lambda trainer: estimate_of(trainer, rows), rows)}; nothing was trained")
        with contextlib.suppress(OSError):  # the trainer has made it; with checkpoints in it, it stays
            checkpoints.rmdir()
        return
    if rank() > 0:
        fitting(train, functools.partial(build, callbacks=[resumable()]), finish, rows)
        return
    resumes = last_checkpoint(checkpoints, fingerprint) is not None
    with recording(tracking, f"train-{fingerprint[:8]}", resumes) as recorder:
        settings = msgspec.to_builtins(train) | {"base": models.base, "base_sha256": base_sha256}
        versions = {f"version.{name}": importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft")}
        recorder.note(
            params={f"cfg.{name}": value for name, value in settings.items()},
            tags={"dvc.stage": "train", "git.commit": git_commit(), "trainer": "unsloth" if by_unsloth else "trl"} | versions,
            datasets=[
                (path.stem, str(path), dvc_md5(path.as_posix()) or sha256_of_file(path)[:36], context)
                for path, context in ((train_examples, "training"), (dev_examples, "validation"))
            ],
        )
        callbacks = [recording_callback(recorder, tokens), resumable()]
        trainer, epochs, seconds = fitting(train, functools.partial(build, callbacks=callbacks), finish, rows)
        log = trainer.state.log_history
        # a run shorter than logging_steps has its mean alone
        losses = [entry["loss"] for entry in log if "loss" in entry] or [
            entry["train_loss"] for entry in log if "train_loss" in entry
        ]
        best = trainer.state.best_global_step if train.early_stopping_patience else trainer.state.global_step
        dev_loss = next(entry["eval_loss"] for entry in reversed(log) if entry["step"] == best and "eval_loss" in entry)
        if not losses or not all(loss == loss and abs(loss) < 1e4 for loss in [*losses, dev_loss]):
            raise LimitBroken(
                f"the loss is not a number after {trainer.state.global_step} steps; lower train.learning_rate ({train.learning_rate})"
            )
        for config in trainer.model.peft_config.values():
            if isinstance(config.target_modules, set):  # whose order, and so the file, would differ between runs
                config.target_modules = sorted(config.target_modules)
        with new_folder(adapter) as draft:
            trainer.model.save_pretrained(draft)
            (draft / "README.md").unlink(missing_ok=True)  # peft's empty model card
        with new_folder(curves) as draft:
            for name, text in curves_of(log).items():
                write_text(draft / name, text)
        on_gpu = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        figures = {
            "seconds": round(seconds, 1),
            "tokens_per_s": round(tokens * epochs / seconds, 1),
            "peak_memory_mb": round(peak),
            "final_loss": round(losses[-1], 4),
            "dev_loss": round(dev_loss, 4),
        }
        facts = {
            "steps": trainer.state.global_step,
            "best_step": best,  # the one whose adapter is kept
            "epochs": round(trainer.state.epoch, 2),
            "examples": len(rows),
            "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
            "trainer": "unsloth" if by_unsloth else "trl",
            "device": torch.cuda.get_device_name()
            if on_gpu
            else f"CPU, {free_cores()} cores, {'bf16' if has_bf16() else 'fp32'}",
        }
        recorder.points({f"final.{name}": value for name, value in figures.items()}, trainer.state.global_step)
        weights = sha256_of_file(adapter / "adapter_model.safetensors")
        recorder.note(
            tags={"adapter.path": adapter.as_posix(), "adapter.sha256": weights, "adapter.dvc_md5": folder_md5(adapter)}
        )
    write_json(metrics, figures | facts | {"mlflow_run_id": recorder.run_id})
    shutil.rmtree(checkpoints, ignore_errors=True)
    say(
        f"train: {facts['steps']} steps, loss {losses[0]:.2f} -> {figures['final_loss']:.2f}, dev {figures['dev_loss']:.2f}; {recorder.outcome}"
    )


if __name__ == "__main__":
    run(main)
