"""How much each column of a model's weights matters, so that quantisation spends its precision there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def importance(merged: Path, texts: Sequence[Sequence[int]], architecture: str) -> dict[str, Any]:
    """Mean squares of what flows into each linear layer of the model in `merged` over the tokens of `texts`.

    By the name of the layer's weight in GGUF files of `architecture` ("llama"), each of the shape (columns,). What llama.cpp's own
    tool computes, which the Python packages do not hold.
    """
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16, trust_remote_code=False)
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], model.config.num_hidden_layers)
    squares: dict[str, Any] = {}

    def add(name: str, given: Any) -> None:
        squares[name] = squares.get(name, 0) + given.float().square().flatten(0, -2).sum(0)

    for module_name, module in model.named_modules():
        name = names.get_name(module_name)
        if name and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _module, inputs, name=name: add(f"{name}.weight", inputs[0]))
    with torch.no_grad():
        for ids in texts:
            model(torch.tensor([list(ids)]))
    tokens = sum(map(len, texts))
    return {name: (total / tokens).numpy() for name, total in squares.items()}
