"""The header of a GGUF file, read strictly, before a program in C++ opens a file that came from outside.

The `gguf` package's own reader takes seconds for a real vocabulary, and does not end on an array that claims 2^60 elements.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages.program.errors import BadModelFile

VERSIONS = (2, 3)
MAX_HEADER_BYTES = 64_000_000  # a vocabulary of 256,000 tokens with its merges takes 15 MB
MAX_ENTRIES = 100_000
MAX_STRINGS = 2_000_000
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 63
MAX_DIMENSIONS = 4
NO_TOKEN = 2**32 - 1
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # types of values
UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9
# type of a tensor: values in a block, bytes of a block (ggml's type traits)
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98),
    19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8),
    28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip
# what llama.cpp takes for granted, and may read another type's memory for
NEEDED = {"general.architecture": STRING, "tokenizer.ggml.model": STRING, "tokenizer.ggml.tokens": (ARRAY, STRING)}
TYPED = NEEDED | {
    "general.alignment": UINT32,
    "general.license": STRING,
    "tokenizer.chat_template": STRING,
    "tokenizer.ggml.merges": (ARRAY, STRING),
    "tokenizer.ggml.scores": (ARRAY, FLOAT32),
    "tokenizer.ggml.token_type": (ARRAY, INT32),
}
SIZES = ("block_count", "context_length", "embedding_length", "vocab_size")  # of <architecture>.<name>
PER_TOKEN = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")


class Array(NamedTuple):
    """A list in a header, which is skipped: the type of its elements and their number."""

    kind: int
    length: int


class Header(NamedTuple):
    """What a GGUF file says about itself: values by key, and the shape of each tensor by name."""

    values: Mapping[str, Any]  # an Array in place of a list
    tensors: Mapping[str, tuple[int, ...]]


def read_gguf(path: Path) -> Header:
    """The header of the model in `path`, when all of it is as the format and llama.cpp demand, tensors within the file included.

    Reads no weights: a tenth of a second, whatever the size. Raises BadModelFile with what is wrong.
    """
    try:
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _header(_Reader(content))
    except (_Fault, ValueError) as fault:  # ValueError: an empty file, or text that is not UTF-8
        raise BadModelFile(f"{path} is not a GGUF model that is safe to open: {fault}; get the file anew") from None


class _Fault(Exception):
    pass


class _Reader:
    """Reads from the start of a file to its end; never beyond it, nor beyond MAX_HEADER_BYTES."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at, self.size = content, 0, len(content)
        self.strings = 0

    def skip(self, count: int) -> int:
        """Where the `count` bytes that are skipped begin."""
        start, self.at = self.at, self.at + count
        if self.at > min(self.size, MAX_HEADER_BYTES):
            raise _Fault(f"its header does not end within {min(self.size, MAX_HEADER_BYTES):,} bytes")
        return start

    def number(self, form: str) -> Any:
        return struct.unpack_from(f"<{form}", self.content, self.skip(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        length = self.number("Q")
        start = self.skip(length)
        return self.content[start : start + length].decode()

    def skip_texts(self, count: int) -> None:
        self.strings += count
        if self.strings > MAX_STRINGS:
            raise _Fault(f"it has more than {MAX_STRINGS:,} texts")
        content, at, last = self.content, self.at, min(self.size, MAX_HEADER_BYTES) - 8
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > last:
                raise _Fault(f"its header does not end within {last + 8:,} bytes")
            at += 8 + length_at(content, at)[0]
        self.skip(at - self.at)


def _header(reader: _Reader) -> Header:
    if reader.content[:4] != b"GGUF":
        raise _Fault("it does not begin with GGUF")
    reader.skip(4)
    if (version := reader.number("I")) not in VERSIONS:
        raise _Fault(f"its version is {version}, not {' or '.join(map(str, VERSIONS))}")
    n_tensors, n_values = reader.number("Q"), reader.number("Q")
    if not 0 < n_tensors <= MAX_ENTRIES or not 0 < n_values <= MAX_ENTRIES:
        raise _Fault(f"it claims {n_tensors:,} tensors and {n_values:,} values")
    values: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    for _ in range(n_values):
        key = reader.text()
        if not 0 < len(key.encode()) <= MAX_KEY_BYTES or key in values:
            raise _Fault(f"a key is empty, too long or there twice: {key[:60]!r}")
        values[key], kinds[key] = _value(reader, key)
    _check_values(values, kinds)
    return Header(values, _tensors(reader, n_tensors, values.get("general.alignment", 32)))


def _value(reader: _Reader, key: str) -> tuple[Any, Any]:
    """The value and its type, (ARRAY, type of the elements) for a list."""
    kind = reader.number("I")
    if kind == STRING:
        return reader.text(), kind
    if kind in SCALARS:
        return _scalar(reader, kind, key), kind
    if kind != ARRAY:
        raise _Fault(f"{key[:60]!r} has the unknown type {kind}")
    inner, length = reader.number("I"), reader.number("Q")
    if inner == STRING:
        reader.skip_texts(length)
    elif inner in SCALARS:
        reader.skip(length * struct.calcsize(f"<{SCALARS[inner]}"))
    else:
        raise _Fault(f"{key[:60]!r} is a list of the type {inner}")
    return Array(inner, length), (ARRAY, inner)


def _scalar(reader: _Reader, kind: int, key: str) -> Any:
    if SCALARS[kind] == "?" and reader.content[reader.skip(0) : reader.at + 1] not in (b"\0", b"\1", b""):
        raise _Fault(f"{key[:60]!r} is neither true nor false")
    return reader.number(SCALARS[kind])


def _check_values(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for key, kind in TYPED.items():
        if kinds.get(key, kind if key not in NEEDED else None) != kind:
            raise _Fault(f"{key} is missing or of another type")
    alignment, tokens = values.get("general.alignment", 32), values["tokenizer.ggml.tokens"].length
    if alignment < 8 or alignment & (alignment - 1):
        raise _Fault(f"general.alignment is {alignment}, not a power of two from 8 on")
    for name in SIZES:
        key = f"{values['general.architecture']}.{name}"
        if kinds.get(key, UINT32) != UINT32 or values.get(key, 1) == 0:
            raise _Fault(f"{key} is 0 or of another type")
    if not tokens or any(values[key].length != tokens for key in PER_TOKEN if key in values):
        raise _Fault(f"it has {tokens:,} tokens, and not a score and a type for each")
    for key, value in values.items():
        is_token = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        if is_token and (kinds[key] != UINT32 or (value >= tokens and value != NO_TOKEN)):
            raise _Fault(f"{key} is {value!r}, and there are {tokens:,} tokens")


def _tensors(reader: _Reader, count: int, alignment: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    end = 0  # of the tensors so far, from the start of the weights
    for _ in range(count):
        name, n_dimensions = reader.text(), reader.number("I")
        if not 0 < len(name.encode()) <= MAX_NAME_BYTES or name in shapes:
            raise _Fault(f"a tensor's name is empty, too long or there twice: {name[:80]!r}")
        if not 0 < n_dimensions <= MAX_DIMENSIONS:
            raise _Fault(f"{name} has {n_dimensions} dimensions")
        shape = tuple(reader.number("Q") for _ in range(n_dimensions))
        kind, offset = reader.number("I"), reader.number("Q")
        if kind not in BLOCKS:
            raise _Fault(f"{name} has the unknown type {kind}")
        block, block_bytes = BLOCKS[kind]
        if 0 in shape or math.prod(shape) >= 2**63 or shape[0] % block:
            raise _Fault(f"{name} cannot have the shape {shape}")
        if offset != end:
            raise _Fault(f"{name} begins at {offset:,}, and the tensor before it ends at {end:,}")
        end += math.prod(shape) // block * block_bytes
        last, end = end, -(-end // alignment) * alignment
        shapes[name] = shape
    weights = -(-reader.at // alignment) * alignment
    if weights + last > reader.size:
        raise _Fault(f"its tensors end at {weights + last:,}, and the file at {reader.size:,}")
    return shapes
