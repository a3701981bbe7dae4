"""GGUF files written by hand: a small one as it should be, and some thirty that should never reach llama.cpp."""

import struct

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
F32, Q8_0 = 0, 8


def text(content: str | bytes) -> bytes:
    encoded = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(encoded)) + encoded


def value(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def number(key: str, amount: int) -> bytes:
    return value(key, UINT32, struct.pack("<I", amount))


def listed(key: str, kind: int, payload: bytes, length: int) -> bytes:
    return value(key, ARRAY, struct.pack("<IQ", kind, length) + payload)


def tensor(name: str | bytes, shape: tuple[int, ...], kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, offset)


def values(template: str = TEMPLATE) -> dict[str, bytes]:
    """The values of a file that is as it should be."""
    return {
        "architecture": value("general.architecture", STRING, text("llama")),
        "blocks": number("llama.block_count", 1),
        "model": value("tokenizer.ggml.model", STRING, text("gpt2")),
        "tokens": listed("tokenizer.ggml.tokens", STRING, text("a") + text("<|end|>"), 2),
        "types": listed("tokenizer.ggml.token_type", INT32, struct.pack("<2i", 1, 3), 2),
        "end": number("tokenizer.ggml.eos_token_id", 1),
        "template": value("tokenizer.chat_template", STRING, text(template)),
    }


def gguf(
    own: dict[str, bytes] | None = None,
    tensors: tuple[bytes, ...] = (tensor("token_embd.weight", (32, 2)), tensor("output_norm.weight", (32,), F32, 256)),
    weights: int = 384,
    start: bytes = b"GGUF" + struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file with `own` values in place of, or besides, those that it should have."""
    entries = list((values() | (own or {})).values())
    n_tensors, n_values = counts or (len(tensors), len(entries))
    header = start + struct.pack("<QQ", n_tensors, n_values) + b"".join(entries) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(weights)


WIDE = tensor("token_embd.weight", (32, 2))
REFUSED = {
    "empty": b"",
    "magic": gguf(start=b"GGML" + struct.pack("<I", 3)),
    "version 0": gguf(start=b"GGUF" + struct.pack("<I", 0)),
    "version 1": gguf(start=b"GGUF" + struct.pack("<I", 1)),
    "version 99": gguf(start=b"GGUF" + struct.pack("<I", 99)),
    "big endian": gguf(start=b"GGUF" + struct.pack(">I", 3)),
    "2^63 values": gguf(counts=(2, 2**63)),
    "-1 tensors": gguf(counts=(2**64 - 1, 7)),
    "no tensor": gguf(tensors=(), weights=0),
    "one value more than there is": gguf(counts=(2, 8)),
    "one tensor more than there is": gguf(counts=(3, 7)),
    "cut in the header": gguf()[:150],
    "cut in the weights": gguf()[:-100],
    "a key twice": gguf({"again": number("llama.block_count", 1)}),
    "an empty key": gguf({"nameless": number("", 1)}),
    "a key that is no text": gguf({"bytes": value(b"\xff\xfe", UINT32, bytes(4))}),
    "a key of 2^63 bytes": gguf({"long": struct.pack("<Q", 2**63) + b"key"}),
    "a text of 2^64-1 bytes": gguf({"long": text("long") + struct.pack("<IQ", STRING, 2**64 - 1)}),
    "an unknown type": gguf({"odd": value("odd", 13, bytes(8))}),
    "a list of lists": gguf({"nested": listed("nested", ARRAY, bytes(24), 1)}),
    "a list of 2^60 numbers": gguf({"long": listed("long", UINT64, bytes(8), 2**60)}),
    "a list of 2^60 texts": gguf({"long": listed("long", STRING, bytes(8), 2**60)}),
    "a truth value of 2": gguf({"odd": value("odd", BOOL, b"\2")}),
    "alignment 13": gguf({"alignment": number("general.alignment", 13)}),
    "alignment 0": gguf({"alignment": number("general.alignment", 0)}),
    "alignment of 64 bits": gguf({"alignment": value("general.alignment", UINT64, struct.pack("<Q", 32))}),
    "tokens that are numbers": gguf({"tokens": listed("tokenizer.ggml.tokens", INT32, bytes(8), 2)}),
    "no tokens": gguf({"tokens": b"", "model": b""}, counts=(2, 5)),
    "fewer types than tokens": gguf({"types": listed("tokenizer.ggml.token_type", INT32, bytes(4), 1)}),
    "an end token out of range": gguf({"end": number("tokenizer.ggml.eos_token_id", 2)}),
    "a template that is a number": gguf({"template": number("tokenizer.chat_template", 1)}),
    "a model of no blocks": gguf({"blocks": number("llama.block_count", 0)}),
    "a tensor twice": gguf(tensors=(WIDE, tensor("token_embd.weight", (32,), F32, 256))),
    "a tensor's name of 64 bytes": gguf(tensors=(tensor("x" * 64, (32,)),)),
    "no dimensions": gguf(tensors=(tensor("w", ()),)),
    "five dimensions": gguf(tensors=(tensor("w", (1, 1, 1, 1, 1)),)),
    "a dimension of 0": gguf(tensors=(tensor("w", (32, 0)),)),
    "2^32 x 2^32 x 2 values": gguf(tensors=(tensor("w", (2**32, 2**32, 2)),)),
    "a tensor of an unknown type": gguf(tensors=(tensor("w", (32,), 99),)),
    "half a block": gguf(tensors=(tensor("w", (33,), Q8_0),)),
    "an offset in the tensor before": gguf(tensors=(WIDE, tensor("w", (32,), F32, 32))),
    "an offset that is not aligned": gguf(tensors=(WIDE, tensor("w", (32,), F32, 257))),
    "an offset beyond the file": gguf(tensors=(WIDE, tensor("w", (32,), F32, 2**62))),
}  # fmt: skip
