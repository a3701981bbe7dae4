"""answer: every system answers the same questions, from prompts that fit, with replies that are kept."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import CHAT, MODELS

from stages.answer import (
    SYSTEMS,
    batches,
    main,
    messages_for,
    passages_for,
    speed,
    write_with_transformers,
)
from stages.executor import LOCAL
from stages.files import sha256_of
from stages.llm import Reply, Request, Store, request_key
from stages.models import load_tokenizer
from stages.params import Chat, Models, Retrieval
from stages.program import BadInput, BadModelFile
from stages.records import Answer, Chunk, Question, read_records, write_records
from stages.release import ADAPTER_FILE
from stages.systems import Asking, System, requests_for
from stages.systems.greedy import attention_on_cpu

SHORT = Chat(system_prompt="Answer briefly.", max_new_tokens=8, context_tokens=512)
TEXTS = ("What color is the sky?", "Name a color.", "Why does water boil when it is heated on the stove?")


def question(text: str, chunk_id: str = "") -> Question:
    return Question(id=text, set="recall", section_id="s", type="factual", question=text, reference="r", chunk_id=chunk_id)


def chunk(id: str, text: str) -> Chunk:
    return Chunk(id=id, document_id="d", section_id="s", path="p.md", heading_path=(id,), start=0, end=len(text), text=text)


def written(folder: Path, requests: dict[str, Request], batch_tokens: int) -> dict[str, Reply]:
    replies: dict[str, Reply] = {}
    tokenizer = load_tokenizer(folder)
    assert write_with_transformers(folder, "", tokenizer, batch_tokens, LOCAL, "base", requests, replies.__setitem__) > 0
    return replies


@pytest.fixture(scope="module")
def requests() -> dict[str, Request]:
    return requests_for({text: text for text in TEXTS}, SHORT, "model")


@pytest.fixture(scope="module")
def replies(base_folder: Path, requests: dict[str, Request]) -> dict[str, Reply]:
    """The base model's replies to all three questions in one batch."""
    return written(base_folder, requests, batch_tokens=999)


def test_a_request_puts_the_system_prompt_first_and_decodes_greedily(requests: dict[str, Request]) -> None:
    assert list(requests) == list(TEXTS)
    assert requests[TEXTS[0]] == Request(
        "model", (("system", "Answer briefly."), ("user", TEXTS[0])), temperature=0.0, max_tokens=8, seed=0
    )


def test_another_model_or_system_prompt_or_limit_is_another_request(requests: dict[str, Request]) -> None:
    asked = {TEXTS[0]: TEXTS[0]}
    others = [requests_for(asked, SHORT, "other"), requests_for(asked, CHAT, "model")]
    others.append(requests_for(asked, Chat("Answer at length.", 8, 512), "model"))
    keys = {request_key(some[TEXTS[0]]) for some in [requests, *others]}
    assert len(keys) == 4


def test_replies_are_the_same_in_every_run(base_folder: Path, requests: dict[str, Request], replies: dict[str, Reply]) -> None:
    assert written(base_folder, requests, batch_tokens=999) == replies
    assert len(set(replies.values())) == 3


def test_a_prompt_gets_its_own_reply_alone_and_in_a_batch(
    base_folder: Path, requests: dict[str, Request], replies: dict[str, Reply]
) -> None:
    some = {text: requests[text] for text in TEXTS[:2]}
    alone = written(base_folder, some, batch_tokens=1)
    assert sorted(replies) == sorted(TEXTS)
    assert "sky" in alone[TEXTS[0]].text
    assert "sky" in replies[TEXTS[0]].text
    assert any(alone[text] == replies[text] for text in some)  # near-ties may flip with the padding


def test_the_token_count_and_the_cut_are_those_of_the_reply(base_folder: Path, replies: dict[str, Reply]) -> None:
    tokenizer = load_tokenizer(base_folder)
    for reply in replies.values():
        assert reply.tokens <= 8
        assert reply.is_whole == (reply.tokens < 8)
        assert len(tokenizer(reply.text, add_special_tokens=False)["input_ids"]) == reply.tokens
        assert "<|im_end|>" not in reply.text and "assistant" not in reply.text
    assert not all(reply.is_whole for reply in replies.values())


def test_an_answer_that_ends_by_itself_is_whole(base_folder: Path) -> None:
    chat = Chat("Answer with one word.", 40, 512)
    (reply,) = written(base_folder, requests_for({"q": "What is the capital of France?"}, chat, "m"), 1).values()
    assert reply.is_whole
    assert 0 < reply.tokens < 40


def test_batches_are_of_similar_length_and_hold_no_more_tokens_than_allowed() -> None:
    lengths = {"a": 50, "b": 10, "c": 12, "d": 30, "e": 12}
    assert batches(lengths, 40) == [["b", "c", "e"], ["d"], ["a"]]
    assert batches(lengths, 60) == [["b", "c", "e"], ["d"], ["a"]]
    assert batches(lengths, 120) == [["b", "c", "e", "d"], ["a"]]
    assert batches(lengths, 1) == [["b"], ["c"], ["e"], ["d"], ["a"]] and batches({}, 9) == []


def test_the_attention_for_single_tokens_gives_what_torchs_gives(tiny_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.padding_side = "left"
    batch = tokenizer(["one", "one two three four five six"], return_tensors="pt", padding=True)
    replies = []
    for attention in ("sdpa", attention_on_cpu()):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, attn_implementation=attention).eval()
        how = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
        with torch.inference_mode():
            replies.append(model.generate(**batch, **how))
    for one, other in zip(replies[0].scores, replies[1].scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert len(replies[0].scores) == 5 and torch.equal(replies[0].sequences, replies[1].sequences)


# passages

CHUNKS = {one.id: one for one in (chunk("sky", "The sky is green today."), chunk("stove", "Water boils at 90 degrees here."))}


def test_each_system_sees_its_own_passages_and_oracle_answers_only_what_has_evidence() -> None:
    asked = [question("a", "sky"), question("b")]
    found = {"a": [CHUNKS["stove"], CHUNKS["sky"]], "b": [CHUNKS["stove"]]}
    seen = {system: passages_for(system, asked, found, CHUNKS) for system in (*SYSTEMS, "q8_0")}
    nothing: dict[str, list[Chunk]] = {"a": [], "b": []}
    assert seen["base"] == seen["tuned"] == seen["q8_0"] == nothing
    assert seen["base_rag"] == seen["tuned_rag"] == found
    assert seen["oracle"] == {"a": [CHUNKS["sky"]]}


def test_a_prompt_leaves_room_for_the_answer_and_names_the_passages_that_it_shows(base_folder: Path) -> None:
    tokenizer = load_tokenizer(base_folder)
    long = chunk("long", " ".join(f"Sentence {number} is here." for number in range(100)))
    asked = {"one": [CHUNKS["sky"], long], "none": [], "cut": [long, CHUNKS["sky"]]}
    room = Chat("Answer briefly.", max_new_tokens=30, context_tokens=200)
    messages, seen = messages_for([question(name) for name in asked], asked, room, tokenizer)
    assert seen == {"one": ("sky",), "none": (), "cut": ("long",)}
    assert messages["none"] == "none" and "The sky is green today." in messages["one"]
    assert "[long]\nSentence 0 is here." in messages["cut"] and "Sentence 99 is here." not in messages["cut"]
    lengths = {
        name: len(
            tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in request.messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            )["input_ids"]
        )
        for name, request in requests_for(messages, room, "m").items()
    }
    assert 160 < lengths["cut"] <= 170 > lengths["one"]  # a sentence is 5 or 6 tokens
    roomier = messages_for([question("cut")], asked, Chat("Answer briefly.", 30, 2048), tokenizer)
    assert roomier[1] == {"cut": ("long", "sky")}


def test_control_tokens_in_a_question_or_passage_are_broken_up(base_folder: Path) -> None:
    tokenizer = load_tokenizer(base_folder)
    given = {"What is <|im_end|>?": [chunk("c", "It is <|im_start|>system")]}
    messages, _ = messages_for([question(text) for text in given], given, CHAT, tokenizer)
    assert "<|" not in messages["What is <|im_end|>?"] and "< |im_start|>system" in messages["What is <|im_end|>?"]


# main


class Project(NamedTuple):
    """A folder in which everything is there but weights: a reply is kept for each question that is asked."""

    folder: Path
    base: Path
    merged: Path
    gguf: Path

    def answered(self, systems: tuple[System, ...], top_k: int = 2) -> dict[str, dict[str, Answer]]:
        """System -> question id -> answer."""
        settings = Asking(systems=systems, batch_tokens=999, concurrency=2, timeout_s=60)
        paths = [self.folder / name for name in ("exam.jsonl", "chunks.jsonl")]
        outs = [self.folder / name for name in ("store", "answers", "m.json")]
        models = Models(base=str(self.base), teacher="", embedder=MODELS.embedder)
        main(
            *paths,
            self.merged,
            self.gguf,
            *outs,
            answer=settings,
            retrieval=Retrieval(top_k=top_k),
            chat=ROOMY,
            models=models,
            executor=LOCAL,
        )
        files = (self.folder / "answers").glob("*.jsonl")
        return {path.stem: {one.question_id: one for one in read_records(path, Answer)} for path in files}


ROOMY = Chat("Answer briefly.", 8, 512)
ASKED = [question("What color is the sky?", "sky"), question("When does water boil?", "stove"), question("Name a color.")]


@pytest.fixture
def project(tmp_path: Path, base_folder: Path) -> Project:
    found = Project(tmp_path, tmp_path / "base", tmp_path / "merged", tmp_path / "gguf")
    for folder in (found.base, found.merged):
        load_tokenizer(base_folder).save_pretrained(folder)
        (folder / "model.safetensors").write_text(f"no weights of {folder.name}")
    found.gguf.mkdir()
    (found.gguf / "docsmith-q8_0.gguf").write_text("no weights")
    (found.gguf / ADAPTER_FILE).write_text("no model of its own, so it is not asked")
    write_records(tmp_path / "exam.jsonl", ASKED)
    write_records(tmp_path / "chunks.jsonl", CHUNKS.values())
    near = {
        "What color is the sky?": ["sky", "stove"],
        "When does water boil?": ["stove", "sky"],
        "Name a color.": ["sky", "stove"],
    }
    nearest = {question_id: [CHUNKS[id] for id in ids] for question_id, ids in near.items()}
    tokenizer = load_tokenizer(base_folder)
    store = Store(tmp_path / "store", "answer")
    for system in (*SYSTEMS, "q8_0"):
        path = found.gguf / "docsmith-q8_0.gguf" if system == "q8_0" else found.merged if "tuned" in system else found.base
        messages, _ = messages_for(ASKED, passages_for(system, ASKED, nearest, CHUNKS), ROOMY, tokenizer)
        for question_id, request in requests_for(messages, ROOMY, sha256_of(path)).items():
            store.keep(request_key(request), Reply(f" {system}: {question_id} "))
    store.close()
    return found


def test_every_system_answers_every_question_and_oracle_those_with_evidence(project: Project) -> None:
    answers = project.answered(SYSTEMS)  # type: ignore[arg-type]
    assert sorted(answers) == ["base", "base_rag", "oracle", "q8_0", "tuned", "tuned_rag"]
    for system, found in answers.items():
        wanted = [one.id for one in ASKED if one.chunk_id or system != "oracle"]
        assert {id: one.text for id, one in found.items()} == {id: f"{system}: {id}" for id in wanted}
    assert {one.chunk_ids for system in ("base", "tuned", "q8_0") for one in answers[system].values()} == {()}
    for system in ("base_rag", "tuned_rag"):
        assert answers[system]["What color is the sky?"].chunk_ids == ("sky", "stove")
        assert answers[system]["When does water boil?"].chunk_ids == ("stove", "sky")
    assert {id: one.chunk_ids for id, one in answers["oracle"].items()} == {ASKED[0].id: ("sky",), ASKED[1].id: ("stove",)}


def test_the_metrics_name_the_models_the_chat_and_the_questions(project: Project) -> None:
    project.answered(SYSTEMS)  # type: ignore[arg-type]
    metrics = json.loads((project.folder / "m.json").read_text())
    sums = {"base": sha256_of(project.base), "tuned": sha256_of(project.merged)}
    sums |= {"base_rag": sums["base"], "oracle": sums["base"], "tuned_rag": sums["tuned"]}
    sums["q8_0"] = sha256_of(project.gguf / "docsmith-q8_0.gguf")
    assert {system: one["sha256"] for system, one in metrics["systems"].items()} == sums
    nothing_new = {"questions": 3, "new": 0, "tokens": 0, "seconds": 0.0, "tokens_per_s": None}
    assert metrics["systems"]["q8_0"] == nothing_new | {"sha256": sums["q8_0"]}
    assert metrics["systems"]["oracle"]["questions"] == 2
    assert metrics["questions_sha256"] == hashlib.sha256((project.folder / "exam.jsonl").read_bytes()).hexdigest()
    template = load_tokenizer(project.base).chat_template
    assert metrics["chat_sha256"] == hashlib.sha256(f"{template}\0Answer briefly.".encode()).hexdigest()


@pytest.mark.parametrize("systems", [(), ("base",), ("oracle",)])
def test_base_tuned_and_the_files_are_asked_whatever_systems_are_chosen(systems: tuple[System, ...], project: Project) -> None:
    assert set(project.answered(systems)) == {"base", "tuned", "q8_0", *systems}


def test_fewer_passages_make_another_prompt(project: Project) -> None:
    with pytest.raises(
        ValueError, match="Unrecognized model"
    ):  # no reply is kept for it, so it goes to the weights, of which there are none
        project.answered(("base_rag",), top_k=1)


def test_another_template_in_the_merged_model_is_an_error(project: Project) -> None:
    tokenizer = load_tokenizer(project.merged)
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(project.merged)
    with pytest.raises(BadModelFile, match=r"merged has another chat template than models\.base; rebuild it with: dvc repro"):
        project.answered(())


def test_no_question_and_no_gguf_file_are_errors_before_any_model_is_loaded(project: Project) -> None:
    (project.gguf / "docsmith-q8_0.gguf").unlink()
    with pytest.raises(BadInput, match=r"gguf holds no \.gguf file"):
        project.answered(())
    write_records(project.folder / "exam.jsonl", [])
    with pytest.raises(BadInput, match=r"exam\.jsonl holds no question"):
        project.answered(())
    assert not (project.folder / "answers").exists()


def test_a_speed_is_tokens_over_seconds_and_null_when_nothing_was_asked() -> None:
    assert speed(10, 4, 90, 2.0) == {"questions": 10, "new": 4, "tokens": 90, "seconds": 2.0, "tokens_per_s": 45.0}
    assert speed(10, 0, 0, 0.1)["tokens_per_s"] is None
