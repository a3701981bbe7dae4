"""Texts as unit vectors, each embedded once, here or on a cluster."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from stages.executor import LOCAL, Executor, Work, done_on_ray
from stages.models import check_model, load_embedder, model_sha256
from stages.program.errors import ServerFailed

__all__ = ["Embed", "embedding"]

Embed = Callable[[Sequence[str]], Any]  # texts -> unit vectors, shape (n, d)
UNIT = 512  # texts that are embedded together, wherever: a vector's last bits depend on what it was padded with
AT_ONCE = 64  # of those


def embedding(reference: str, executor: Executor = LOCAL) -> Embed:
    """The embedder behind `reference` as a function that loads it when it is first needed, and embeds each text once.

    More than UNIT new texts are embedded where `executor` says, fewer in this process. Raises ServerFailed when a cluster fails.
    """
    import numpy as np

    local = functools.cache(lambda: embedder_of(reference))
    known: dict[str, Any] = {}

    def embed(texts: Sequence[str]) -> Any:
        new = sorted(set(texts) - known.keys())
        parts = [new[first : first + UNIT] for first in range(0, len(new), UNIT)]
        units = {str(place): msgspec.json.encode(part) for place, part in enumerate(parts)}
        if executor.engine == "ray" and len(units) > 1:
            given = (reference, model_sha256(reference))
            found = {}
            for done in done_on_ray(executor, units, embedder_of, given, at_once=1, has_model=True):
                if done.failed:
                    raise ServerFailed(f"texts could not be embedded: {done.failed}. Run again with: dvc repro")
                found[done.name] = done.result
        else:
            found = {name: local()(unit) for name, unit in units.items()}
        for place, part in enumerate(parts):
            vectors = np.frombuffer(found[str(place)], dtype=np.float32).reshape(len(part), -1)
            known.update(zip(part, vectors, strict=True))
        return np.array([known[text] for text in texts])

    return embed


def embedder_of(reference: str, expected_sha256: str = "") -> Work:
    """Work that turns a JSON list of texts into the bytes of their unit vectors in float32. Raises BadModelFile for another model."""
    import numpy as np

    if expected_sha256:
        check_model(reference, expected_sha256)
    model = load_embedder(reference)

    def embed(unit: bytes) -> bytes:
        texts = msgspec.json.decode(unit, type=list[str])
        vectors = model.encode(texts, batch_size=AT_ONCE, normalize_embeddings=True)
        return np.asarray(vectors, dtype=np.float32).tobytes()

    return embed
