"""How fast training is, and that it stays exact: rows P5, P6 and P7 -> bench/results.json and a section of bench/RESULTS.md.

    python -m bench.training [--data data/train.jsonl] [--pairs 3] [--steps 24] [--rows 64]

P5: useful tokens a second on the CPU, against TRL as the recipe uses it, each in a process of its own. P6: the same on a GPU, against
Unsloth with its notebooks' settings and against TRL; left out where no GPU is, as P5 and P7 are where one is. P7: loss and gradients of
the batches that training makes, against those of one conversation at a time, in fp32. Model and settings are those of params.yaml. The
conversations are there after `make demo`. Costs about a quarter of an hour on two cores; each row is written as soon as it is known.
"""

import argparse
import copy
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.rows import REPOSITORY, machine, publish, row, section

HEADING = "## Training"
TARGETS = {"P5": ">= 5", "P6": ">= 1", "P7": "<= 1e-4"}
PEER_BATCH, PEER_ACCUMULATED = 2, 4  # conversations, of the recipe and of Unsloth's notebooks
UNSEEN = 32  # conversations, not trained on, that the losses are compared by
KINDS = {  # of torch's operations, by name; an operation is of the first kind that fits
    "attention": r"attention",
    "matrix products": r"::(mm|addmm|bmm|baddbmm|addbmm|matmul|linear|mkldnn_linear)$",
    "copies": r"::(copy_|cat|index\w*|clone|embedding\w*|gather|fill_|zero_|nonzero|constant_pad_nd|slice_backward|select_backward|masked\w*)$",
    "elementwise": r"::(add|sub|mul|div|neg|pow|rsqrt|mean|sum|silu|sigmoid|exp|where|cos|sin|_?log_softmax|nll_loss\w*|\w*softmax\w*|\w+_backward|\w*norm\w*|_foreach\w*)(_\w*)?$",
}


def settings() -> tuple[Any, Any, Any]:
    """The sections train, models and chat of params.yaml."""
    from stages.params import Chat, Models, read_section
    from stages.train import Params

    params = REPOSITORY / "params.yaml"
    return read_section("train", Params, params), read_section("models", Models, params), read_section("chat", Chat, params)


def chosen(path: Path, number: int, folder: Path, train: Any, chat: Any) -> list[Any]:
    """`number` conversations of the file `path` as tokens, the same ones each time."""
    from stages.models import load_tokenizer
    from stages.records import Example, read_records
    from stages.training.batches import tokenise

    examples = read_records(path, Example)
    if len(examples) < number:
        raise SystemExit(f"{path} holds {len(examples)} conversations, and {number} are needed; lower --steps and --rows")
    return tokenise(random.Random(5).sample(examples, number), load_tokenizer(folder), chat.system_prompt, train.max_length)


def dataset(rows: Sequence[Any]) -> Any:
    import msgspec
    from datasets import Dataset

    return Dataset.from_list([msgspec.to_builtins(one) for one in rows])


def docsmith(folder: Path, train: Any, rows: Sequence[Any], scratch: Path) -> Any:
    """The trainer as stages/train.py makes it, for one epoch of `rows`."""
    import msgspec
    import torch

    from stages.models import free_cores, load_tokenizer
    from stages.train import has_unsloth, lora_model, trainer_of, unsloth_model

    torch.set_num_threads(free_cores())
    load_model = unsloth_model if has_unsloth() else lora_model
    once = msgspec.structs.replace(train, num_train_epochs=1, max_steps=-1)
    trainer = trainer_of(load_model, folder, load_tokenizer(folder), rows, rows[:1], scratch, once)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    return trainer


def of_trl(folder: Path, train: Any, rows: Sequence[Any], scratch: Path, model: Any = None) -> Any:
    """The trainer as the recipe makes it, with the adapter, the learning rate and the schedule of `train`.

    TRL's own loss is a Triton kernel, and so are the metrics that it computes beside any other: neither runs without a GPU. There the
    trainer's loss is replaced by the one that it inherits, transformers' cross-entropy of all logits, as TRL itself advises.
    """
    import torch
    from transformers import Trainer
    from trl import SFTConfig, SFTTrainer

    from stages.models import load_tokenizer
    from stages.train import has_bf16, lora_model

    class WithoutTriton(SFTTrainer):  # type: ignore[misc]
        compute_loss = Trainer.compute_loss

    on_gpu = torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(scratch),
        max_length=2048,
        num_train_epochs=1,
        warmup_steps=train.warmup_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        optim="adamw_8bit" if on_gpu else "adamw_torch",
        weight_decay=train.weight_decay,
        per_device_train_batch_size=PEER_BATCH,
        gradient_accumulation_steps=PEER_ACCUMULATED,
        gradient_checkpointing=True,
        bf16=has_bf16(),
        fp16=on_gpu and not has_bf16(),
        use_cpu=not on_gpu,
        logging_steps=10,
        save_strategy="no",
        seed=train.seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )
    return (SFTTrainer if on_gpu else WithoutTriton)(
        model=model or lora_model(folder, train),
        args=arguments,
        train_dataset=dataset(rows),
        processing_class=load_tokenizer(folder),
    )


def of_unsloth(folder: Path, train: Any, rows: Sequence[Any], scratch: Path) -> Any:
    """The trainer as Unsloth's notebooks make it: 4 bits, no dropout, its checkpointing. Needs CUDA."""
    import msgspec

    from stages.train import unsloth_model

    notebook = msgspec.structs.replace(train, max_length=2048, load_in_4bit=True, lora_dropout=0.0)
    return of_trl(folder, train, rows, scratch, unsloth_model(folder, notebook))


SIDES = {"docsmith": docsmith, "trl": of_trl, "unsloth": of_unsloth}


def kind(event: Any) -> str:
    """What sort of work an event of torch's profiler is."""
    above = event
    while above is not None:
        if above.name.startswith("Optimizer.step"):
            return "optimizer"
        above = above.cpu_parent
    return next((name for name, pattern in KINDS.items() if re.search(pattern, event.name)), "other")


def timed(trainer: Any) -> dict[str, Any]:
    """Trains, and what the steps between the first and the last took; the last one is profiled.

    tokens: of the conversations; answer_tokens: of them, those that are learned; computed_tokens: those that the model was given,
    padding included and shared beginnings once. loss: the mean of the steps' losses. where: shares of the last step's time.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import PrinterCallback, TrainerCallback

    from stages.training.batches import IGNORED

    collate, counts, ends = trainer.data_collator, [], []
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    profiler = profile(activities=activities)

    def counting(rows: Sequence[Mapping[str, list[int]]]) -> Any:
        learned = sum(label != IGNORED for one in rows for label in one["labels"])
        batch = collate(rows)
        counts.append((sum(len(one["input_ids"]) for one in rows), learned, batch["input_ids"].numel()))
        return batch

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == state.max_steps - 1:
                profiler.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.monotonic())
            if state.global_step == state.max_steps:
                profiler.stop()

    trainer.data_collator = counting
    trainer.add_callback(Clock())
    trainer.remove_callback(PrinterCallback)
    loss = trainer.train().training_loss
    accumulated = trainer.args.gradient_accumulation_steps
    inner = counts[accumulated : accumulated * (len(ends) - 1)]
    spent: dict[str, float] = {}
    for event in profiler.events():
        spent[kind(event)] = spent.get(kind(event), 0.0) + event.self_cpu_time_total
    return {
        "seconds": ends[-2] - ends[0],
        "tokens": sum(count[0] for count in inner),
        "answer_tokens": sum(count[1] for count in inner),
        "computed_tokens": sum(count[2] for count in inner),
        "batch_tokens": statistics.median(count[2] for count in inner),
        "batch_answers": statistics.median(count[1] for count in inner),
        "examples": len(trainer.train_dataset),
        "steps": len(ends),
        "loss": loss,
        "where": {name: used / sum(spent.values()) for name, used in sorted(spent.items(), key=lambda one: -one[1])},
    }


def shapes(model: Any) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """(out, in) of each linear layer of the base model without its head, and those of the head."""
    import torch

    base = model.get_base_model()
    head = base.get_output_embeddings()
    body = [
        (layer.out_features, layer.in_features)
        for name, layer in base.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not head and "lora_" not in name
    ]
    return body, tuple(head.weight.shape)


def multiplies(out: int, into: int, tokens: int, dtype: Any, device: str) -> float:
    """Floating-point operations a second of a product of these shapes, best of 10."""
    import torch

    x, weight = torch.randn(tokens, into, device=device, dtype=dtype), torch.randn(out, into, device=device, dtype=dtype)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * out * into * tokens / min(times)


def limits(model: Any, found: Mapping[str, Any]) -> dict[str, float]:
    """gemm: operations a second, the median over the model's linear layers, weighted by their operations.

    limit_fraction: 4 (N_body T + N_head T_answer) over gemm and over the time; T is the tokens of the conversations. computed_fraction:
    the same for the tokens that the model was given. LoRA needs no gradient of the weights, hence 4 operations for each and not 6.
    """
    body, head = shapes(model)
    weight = next(model.parameters())
    layers = [(shape, body.count(shape), int(found["batch_tokens"])) for shape in set(body)] + [
        (head, 1, int(found["batch_answers"]))
    ]
    rates = sorted(
        (multiplies(*shape, tokens, weight.dtype, weight.device.type), shape[0] * shape[1] * count * tokens)
        for shape, count, tokens in layers
    )
    half = sum(work for _, work in rates) / 2
    reached = itertools.accumulate(work for _, work in rates)
    gemm = next(rate for (rate, _), so_far in zip(rates, reached, strict=True) if so_far >= half)

    def fraction(tokens: int) -> float:
        work = sum(out * into for out, into in body) * tokens + head[0] * head[1] * found["answer_tokens"]
        return float(4 * work / gemm / found["seconds"])

    return {
        "gemm": gemm,
        "limit_fraction": fraction(found["tokens"]),
        "computed_fraction": fraction(found["computed_tokens"]),
    }


def plainly(model: Any, one: Mapping[str, list[int]]) -> Any:
    """The sum of the losses of a conversation's answers, by transformers' own forward pass."""
    import torch
    import torch.nn.functional as F

    device = next(model.parameters()).device
    ids, labels = (torch.tensor([one[name]], device=device) for name in ("input_ids", "labels"))
    return F.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), labels[0, 1:], reduction="sum")


def one_side(side: str, folder: Path, train: Any, rows: Sequence[Any], scratch: Path) -> dict[str, Any]:
    """What `timed` finds for `side` on `rows` but the last UNSEEN, and the mean loss of the answers in these afterwards."""
    import msgspec
    import torch

    from stages.training.batches import IGNORED, pack

    torch.manual_seed(train.seed)
    trainer = SIDES[side](folder, train, rows[:-UNSEEN], scratch)
    found = timed(trainer)
    model = trainer.model.eval()
    is_packed = side == "docsmith" and not torch.cuda.is_available()
    with torch.no_grad():
        unseen = [msgspec.to_builtins(one) for one in rows[-UNSEEN:]]
        losses = [float(model(**pack([one])) if is_packed else plainly(model, one)) for one in unseen]
    learned = sum(label != IGNORED for one in unseen for label in one["labels"])
    return found | limits(model, found) | {"unseen_loss": sum(losses) / learned}


def differences(folder: Path, train: Any, rows: Sequence[Any], scratch: Path) -> list[dict[str, float]]:
    """For each batch that training makes of `rows`: relative differences of its loss and its gradients from one-by-one's, in fp32."""
    import torch

    from stages.models import load_tokenizer
    from stages.train import lora_model, training_arguments
    from stages.training.batches import pack
    from stages.training.packed import PackedTrainer, pack_model

    torch.manual_seed(train.seed)
    plain = lora_model(folder, train).float().eval()
    for name, weight in plain.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the gradients of A
            torch.nn.init.normal_(weight, std=0.02)
    packed = copy.deepcopy(plain)
    pack_model(packed)
    arguments = training_arguments(train, scratch)
    arguments.eval_strategy = "no"
    batches = PackedTrainer(
        model=packed,
        args=arguments,
        train_dataset=dataset(rows),
        processing_class=load_tokenizer(folder),
        data_collator=list,  # the rows themselves
    ).get_train_dataloader()

    def gradients(model: Any) -> Any:
        flat = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])
        model.zero_grad()
        return flat

    found = []
    for batch in batches:
        one_by_one = 0.0
        for one in batch:
            loss = plainly(plain, one)
            loss.backward()
            one_by_one += loss.item()
        together = packed(**pack(batch))
        together.backward()
        right, mine = gradients(plain), gradients(packed)
        found.append(
            {
                "loss": abs(together.item() - one_by_one) / one_by_one,
                "gradients": float((mine - right).norm() / right.norm()),
            }
        )
    return found


def exactness(folder: Path, train: Any, rows: Sequence[Any], scratch: Path) -> tuple[dict[str, Any], str]:
    """Row P7: the largest difference of a batch."""
    found = differences(folder, train, rows, scratch)
    losses, gradients = ([one[name] for one in found] for name in ("loss", "gradients"))
    figures = {
        "ratio": float(f"{max(losses):.2g}"),
        "spread": [float(f"{edge(losses):.2g}") for edge in (min, max)],
        "gradients": float(f"{max(gradients):.2g}"),
        "batches": len(found),
    }
    said = (
        f"P7: the largest relative difference of {len(found)} batches, all that an epoch of {len(rows)} conversations has, in fp32: "
        f"loss {figures['ratio']:.1e}, gradients of the adapter {figures['gradients']:.1e} (length of the difference over length)."
    )
    return row([0.0], None) | figures | {"pairs": len(found)}, said


def against(peers: Sequence[str], pairs: int, data: Path, steps: int) -> tuple[dict[str, Any], str]:
    """Row P5 or P6: Docsmith's useful tokens a second over those of the first of `peers`."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in ("docsmith", *peers)}
    for turn in range(pairs):
        for side in list(runs)[:: -1 if turn % 2 else 1]:
            with tempfile.TemporaryDirectory(prefix="docsmith-bench-") as scratch:
                out = Path(scratch) / "found.json"
                command = [sys.executable, "-m", "bench.training", "--data", str(data), "--steps", str(steps), "--side", side]
                done = subprocess.run([*command, "--out", str(out)], cwd=REPOSITORY, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{side} ended with code {done.returncode}: {done.stderr.strip()[-2000:]}")
                runs[side].append(json.loads(out.read_text(encoding="utf-8")))
            last = runs[side][-1]
            print(
                f"{turn + 1}/{pairs} {side}: {last['tokens'] / last['seconds']:.0f} tokens/s in {last['seconds']:.0f} s",
                flush=True,
            )

    def middle(side: str, name: str) -> float:
        return statistics.median(one[name] for one in runs[side])

    def pace(one: Mapping[str, Any]) -> float:
        return float(one["tokens"] / one["seconds"])

    ratios = {
        peer: [pace(mine) / pace(theirs) for mine, theirs in zip(runs["docsmith"], runs[peer], strict=True)] for peer in peers
    }
    told = "; ".join(
        f"{side} {statistics.median(map(pace, runs[side])):.0f} tokens/s ({middle(side, 'steps'):.0f} steps for {middle(side, 'examples'):.0f} conversations, "
        f"{middle(side, 'computed_tokens') / middle(side, 'tokens'):.2f} tokens computed for each of a conversation, "
        f"mean loss of the steps {middle(side, 'loss'):.4f}, of {UNSEEN} other conversations afterwards {middle(side, 'unseen_loss'):.4f})"
        for side in runs
    )
    where = "; ".join(
        f"{side} {', '.join(f'{name} {share:.0%}' for name, share in runs[side][-1]['where'].items())}" for side in runs
    )
    fractions = {side: [middle(side, name) for name in ("limit_fraction", "computed_fraction")] for side in runs}
    said = (
        f"Median: {told}. Each side is a process of its own and starts from the same adapter; the first step and start-up do not count. "
        f"The fraction is 4 (N_body T + N_head T_answer) over the time and over {middle('docsmith', 'gemm') / 1e12:.2f} TFLOP/s, the speed of the products alone. "
        f"For T the tokens that the model was really given, shared beginnings once and padding included, "
        f"it is {', '.join(f'{computed:.2f} ({side})' for side, (_, computed) in fractions.items())}. "
        f"Time of the last step on the processor: {where}."
    )
    first, *others = peers
    more = {f"{peer}_ratio": round(statistics.median(ratios[peer]), 3) for peer in others}
    return row(ratios[first], fractions["docsmith"][0]) | more | {
        "computed_fraction": round(fractions["docsmith"][1], 3),
        "unseen_loss": {side: round(middle(side, "unseen_loss"), 4) for side in runs},
    }, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=REPOSITORY / "data/train.jsonl", help="conversations, as `split` writes them"
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="of the peer, 8 conversations each")
    parser.add_argument("--rows", type=int, default=64, help="conversations of P7")
    parser.add_argument("--dry", action="store_true", help="write nothing into the repository")
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        raise SystemExit(f"{arguments.data} is missing; run `make demo` first, or name other conversations with --data")
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if arguments.side == "unsloth":
        import unsloth  # noqa: F401  # before transformers, as its notebooks do
    import torch

    from stages.models import as_hf_folder
    from stages.train import has_unsloth

    train, models, chat = settings()
    folder = as_hf_folder(models.base)
    with tempfile.TemporaryDirectory(prefix="docsmith-bench-") as scratch:
        if arguments.side:
            trained = arguments.steps * PEER_BATCH * PEER_ACCUMULATED
            rows = chosen(arguments.data, trained + UNSEEN, folder, train, chat)
            found = one_side(arguments.side, folder, train, rows, Path(scratch))
            arguments.out.write_text(json.dumps(found), encoding="utf-8")
            return
        opening = [
            HEADING,
            "",
            f"`python -m bench.training --steps {arguments.steps} --pairs {arguments.pairs}` on {machine()}.",
        ]
        rows_: dict[str, Any] = {}
        remarks: list[str] = []

        def keep(name: str, measured: tuple[dict[str, Any], str]) -> None:
            rows_[name] = measured[0]
            remarks.append(measured[1])
            if not arguments.dry:
                publish({name: measured[0]}, section(opening, rows_, TARGETS, remarks))

        def compared(name: str, *peers: str) -> None:
            keep(name, against(peers, arguments.pairs, arguments.data.resolve(), arguments.steps))

        if has_unsloth():
            compared("P6", "unsloth", "trl")
        else:
            print("P6 is left out: it needs a GPU and Unsloth", flush=True)
        if not torch.cuda.is_available():
            sample = chosen(arguments.data, arguments.rows, folder, train, chat)
            keep("P7", exactness(folder, train, sample, Path(scratch)))
            compared("P5", "trl")
    print(section(opening, rows_, TARGETS, remarks))


if __name__ == "__main__":
    main()
