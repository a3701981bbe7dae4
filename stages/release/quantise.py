"""`python -m stages.release.quantise <source.gguf> <target.gguf> <quant> <threads> [<importance.npz>]`.

In a process of its own: native code may crash.
"""

import ctypes
import sys
from typing import Any


def quantise(source: str, target: str, quant: str, threads: int, importance: str = "") -> int:
    """llama.cpp's status: 0 when `target` holds `source` in the format `quant` ("q8_0", "q4_k_m", ...)."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}")
    params.nthread = threads
    if importance:
        rows, _columns = matrix(importance)
        params.imatrix = rows
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))


def matrix(path: str) -> tuple[Any, Any]:
    """The importance of each column of each tensor, from a .npz file, as the array that llama.cpp takes, and what it points to.

    An empty row ends the array.
    """
    import llama_cpp
    import numpy as np

    with np.load(path, allow_pickle=False) as saved:
        columns = {name: np.ascontiguousarray(saved[name], dtype=np.float32) for name in saved.files}
    rows = (llama_cpp.llama_model_imatrix_data * (len(columns) + 1))()
    for row, (name, values) in zip(rows, columns.items(), strict=False):
        pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        row.name, row.data, row.size = name.encode(), pointer, values.size
    return rows, columns


if __name__ == "__main__":
    source, target, quant, threads, *importance = sys.argv[1:]
    sys.exit(quantise(source, target, quant, int(threads), *importance))
