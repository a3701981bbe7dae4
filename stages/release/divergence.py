"""`python -m stages.release.divergence <texts.json> <figures.json> <threads> <reference.gguf> <other.gguf>...`, in a process of its
own: native code may crash. Holds the reference's log probabilities: 4 bytes for each word of the vocabulary and each position.
"""

import ctypes
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Text(NamedTuple):
    """Token ids, of which the model's choices from `start` on count: those that an answer consists of."""

    ids: tuple[int, ...]
    start: int


class Divergence(NamedTuple):
    """How far a model's next tokens are from a reference's, over all positions."""

    mean_kl: float  # Kullback-Leibler divergence of the reference from the model, in nats
    same_top: float  # share of positions with the same most likely token
    positions: int


def divergence(reference: Iterable[Any], other: Iterable[Any]) -> Divergence:
    """The Divergence of log probabilities, each text an array of the shape (positions, words)."""
    import numpy as np

    kl, same = [], []
    for expected, found in zip(reference, other, strict=True):
        kl.append((np.exp(expected) * (expected - found)).sum(-1, dtype=np.float64))
        same.append(expected.argmax(-1) == found.argmax(-1))
    every = np.concatenate(kl)
    return Divergence(float(every.mean()), float(np.concatenate(same).mean()), len(every))


def log_probabilities(logits: Any) -> Any:
    """Natural logarithms of the softmax over the last axis."""
    import numpy as np

    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def of_model(gguf: Path, texts: Sequence[Text], threads: int) -> Iterator[Any]:
    """The log probabilities of each text's tokens from `start` on, by llama.cpp. Raises RuntimeError when it cannot."""
    import llama_cpp
    import numpy as np

    model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {gguf}")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = max(len(text.ids) for text in texts)
    settings.n_threads = settings.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, settings)
    words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    try:
        for text in texts:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            batch = llama_cpp.llama_batch_init(len(text.ids), 0, 1)
            batch.n_tokens = len(text.ids)
            for place, token in enumerate(text.ids):
                batch.token[place], batch.pos[place] = token, place
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
                batch.logits[place] = text.start - 1 <= place < len(text.ids) - 1  # each foretells the next token
            status = llama_cpp.llama_decode(context, batch)
            llama_cpp.llama_batch_free(batch)
            if status:
                raise RuntimeError(f"llama.cpp cannot read a text of {len(text.ids)} tokens ({status})")
            shape = (len(text.ids) - text.start, words)
            yield log_probabilities(np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=shape).copy())
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def main(texts: str, figures: str, threads: str, reference: str, *others: str) -> None:
    import llama_cpp
    import numpy as np

    silent = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    given = [Text(tuple(ids), start) for ids, start in json.loads(Path(texts).read_text())]
    expected = list(of_model(Path(reference), given, int(threads)))
    found: dict[str, tuple[float, float, int]] = {}
    if (saved := Path(texts).with_suffix(".npy")).is_file():  # logits of the first text, as transformers has them
        whole = log_probabilities(np.load(saved, allow_pickle=False)[given[0].start - 1 : -1])
        found[Path(reference).stem] = divergence([whole], expected[:1])
    for other in others:
        found[Path(other).stem] = divergence(expected, of_model(Path(other), given, int(threads)))
    Path(figures).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
