import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from stages.program import BadModelFile
from stages.training.batches import pack
from stages.training.packed import pack_model

SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def adapted(base: Any, **options: Any) -> Any:
    """`base` with adapters that already change something: a zero B gives A no gradient."""
    torch.manual_seed(3)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(base, lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
        if name.endswith(".bias"):
            torch.nn.init.normal_(weight, std=0.1)
    return model


def rows(shared: int) -> list[dict[str, list[int]]]:
    """Conversations of 8 to 28 tokens with two answers each, the same up to `shared`."""
    made = []
    for number in range(5):
        ids = list(range(40, 40 + shared)) + [(number * 17 + place * 5) % 40 for place in range(8 + 5 * number - shared // 2)]
        answers = {*range(shared + 2, shared + 4), *range(len(ids) - 2, len(ids))}
        made.append({"input_ids": ids, "labels": [token if place in answers else -100 for place, token in enumerate(ids)]})
    return made


def plain_loss(model: Any, conversations: list[dict[str, list[int]]]) -> Any:
    """The sum over the answers, one conversation at a time, by the library's own forward pass."""
    total: Any = 0.0
    for one in conversations:
        logits = model(input_ids=torch.tensor([one["input_ids"]])).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(one["labels"][1:]), ignore_index=-100, reduction="sum")
    return total


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize(
    "base",
    [lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL))],
    ids=["llama", "qwen2"],
)
def test_loss_and_gradients_are_those_of_one_conversation_at_a_time(base: Any, shared: int) -> None:
    torch.manual_seed(1)
    plain = adapted(base())
    packed = copy.deepcopy(plain)
    pack_model(packed)
    conversations = rows(shared)
    batch = pack(conversations)
    assert batch["input_ids"].shape[1] == sum(len(one["input_ids"]) for one in conversations) - 4 * shared

    expected, loss = plain_loss(plain, conversations), packed(**batch)
    assert abs(loss.item() - expected.item()) <= 1e-4 * expected.item()
    wanted, found = gradients(plain, expected), gradients(packed, loss)
    assert len(wanted) == 2 * 3 * 2  # A and B, three modules, two layers
    for name, gradient in wanted.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_in_bf16_the_loss_is_that_of_the_plain_path_within_its_precision(tiny_folder: Path) -> None:
    plain = adapted(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16))
    packed = copy.deepcopy(plain)
    pack_model(packed)
    expected = plain_loss(plain, rows(6)).item()
    assert packed(**pack(rows(6))).item() == pytest.approx(expected, rel=0.01)


def test_what_other_rows_say_changes_nothing() -> None:
    torch.manual_seed(1)
    model = adapted(LlamaForCausalLM(LlamaConfig(**SMALL)))
    pack_model(model)
    conversations = rows(6)
    together = model(**pack(conversations)).item()
    assert sum(model(**pack([one])).item() for one in conversations) == pytest.approx(together, rel=1e-5)


def test_dropout_goes_on_dropping() -> None:
    torch.manual_seed(1)
    model = adapted(LlamaForCausalLM(LlamaConfig(**SMALL)), lora_dropout=0.5)
    pack_model(model)
    batch = pack(rows(6))
    model.train()
    assert model(**batch).item() != model(**batch).item()
    model.eval()
    assert model(**batch).item() == model(**batch).item()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"final_logit_softcapping": 30.0}, "a model with final_logit_softcapping"),
        ({"logit_scale": 0.1}, "a model with logit_scale"),
    ],
)
def test_a_model_of_another_kind_is_refused_in_one_line(change: dict[str, float], said: str) -> None:
    config = LlamaConfig(**SMALL)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(BadModelFile, match=rf"^train: {said} is not supported on the CPU; choose another models\.base$"):
        pack_model(adapted(LlamaForCausalLM(config)))


def test_a_batch_wider_than_the_window_of_attention_is_refused() -> None:
    torch.manual_seed(1)
    window = Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=0)
    model = adapted(Qwen2ForCausalLM(window))
    pack_model(model)
    with pytest.raises(BadModelFile, match="attention in a window of 16 tokens"):
        model(**pack(rows(6)))
