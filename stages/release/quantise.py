"""`python -m stages.release.quantise <source.gguf> <target.gguf> <quant> <threads>`, in a process of its own: native code may crash."""

import ctypes
import sys


def quantise(source: str, target: str, quant: str, threads: int) -> int:
    """llama.cpp's status: 0 when `target` holds `source` in the format `quant` ("q8_0", "q4_k_m", ...)."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}")
    params.nthread = threads
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(quantise(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
