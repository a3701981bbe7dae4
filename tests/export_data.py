"""What `export` reads besides an adapter, made by hand: three sections of a lamp's manual, one of which was held out."""

from pathlib import Path

from stages.export import Params
from stages.records import Chunk, Example, Message, Pair, Question, write_records

EXPORT = Params(quants=("q8_0", "q4_k_m"), max_kl=0.05, min_same_top=0.9, importance_matrix=False)
SECRET = "ghp_" + "Zq7Lw2Xk9Rb4Tn6Vc8Mf3Hd5Js1Py0Ga2Ke"
TEXTS = {
    "battery": "The battery of the lamp lasts nine hours at half brightness.",
    "light": f"The lamp gives eight hundred lumens. Its token is {SECRET} in the workshop.",
    "stand": "The stand of the lamp is made of oak, and it is as heavy as a full bottle of water.",
}


def write_data(folder: Path) -> None:
    """chunks.jsonl, pairs.jsonl, train.jsonl and questions.jsonl. Of four pairs, one of `stand` and one of `light` were not trained."""
    chunks = [
        Chunk(
            id=name,
            document_id="d",
            section_id=name,
            path="lamp.md",
            heading_path=("Lamp", name),
            start=10,
            end=10 + len(text),
            text=text,
        )
        for name, text in TEXTS.items()
    ]
    asked = {"b1": ("battery", "How long does it last?"), "l1": ("light", "How bright is it?"), "l2": ("light", "What is its token?"),
             "s1": ("stand", "What is the stand made of, and how heavy is it?")}  # fmt: skip
    pairs = [
        Pair(
            id=key, chunk_id=name, fact_id=key, section_id=name, document_id="d", path="lamp.md", heading_path=("Lamp", name),
            question=question, answer=TEXTS[name], quote=TEXTS[name], quote_start=10, quote_end=10 + len(TEXTS[name]), type="factual",
            model="m", similarity=0.9, wording=1, cluster=key, flags=(), reviewed=False,
        )
        for key, (name, question) in asked.items()
    ]  # fmt: skip
    examples = [
        Example(
            id=key,
            pair_ids=(key,),
            document_id="d",
            messages=(Message("user", asked[key][1]), Message("assistant", TEXTS[asked[key][0]])),
        )
        for key in ("b1", "l2")
    ]
    questions = [
        Question(id="q1", set="held_out", section_id="stand", type="factual", question=asked["s1"][1], reference=TEXTS["stand"]),
        Question(id="q2", set="recall", section_id="battery", type="factual", question="How many hours?", reference="Nine."),
    ]
    for name, records in {"chunks": chunks, "pairs": pairs, "train": examples, "questions": questions}.items():
        write_records(folder / f"{name}.jsonl", records)
