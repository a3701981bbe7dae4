import json
from pathlib import Path

import pytest
from conftest import CHAT, MODELS

from stages.answer import main, speed, write_with_transformers
from stages.files import sha256_of
from stages.llm import Reply, Request, Store, request_key
from stages.models import load_tokenizer
from stages.params import Chat
from stages.program import BadInput
from stages.records import Question, write_records
from stages.systems import Asking, requests_for

SHORT = Chat(system_prompt="Answer briefly.", max_new_tokens=8, context_tokens=512)
TEXTS = ("What color is the sky?", "Name a color.", "Why does water boil when it is heated on the stove?")


def question(text: str) -> Question:
    return Question(id=text, set="recall", pair_id="p", section_id="s", type="factual", question=text, reference="r")


def written(folder: Path, requests: dict[str, Request], batch_size: int) -> dict[str, Reply]:
    replies: dict[str, Reply] = {}
    assert write_with_transformers(folder, batch_size, requests, replies.__setitem__) > 0
    return replies


@pytest.fixture(scope="module")
def requests() -> dict[str, Request]:
    return requests_for({text: text for text in TEXTS}, SHORT, "model")


@pytest.fixture(scope="module")
def replies(base_folder: Path, requests: dict[str, Request]) -> dict[str, Reply]:
    """The base model's replies to all three questions in one batch."""
    return written(base_folder, requests, batch_size=3)


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
    assert written(base_folder, requests, batch_size=3) == replies
    assert len(set(replies.values())) == 3


def test_a_prompt_gets_its_own_reply_alone_and_in_a_batch(
    base_folder: Path, requests: dict[str, Request], replies: dict[str, Reply]
) -> None:
    some = {text: requests[text] for text in TEXTS[:2]}
    alone = written(base_folder, some, batch_size=1)
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


def test_no_question_is_an_error_before_any_model_is_loaded(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    write_records(questions, [])
    settings = Asking(batch_size=2, concurrency=2, timeout_s=60)
    with pytest.raises(BadInput, match=r"questions\.jsonl holds no question"):
        main(
            questions,
            tmp_path,
            tmp_path,
            tmp_path / "store",
            tmp_path / "answers",
            tmp_path / "m.json",
            answer=settings,
            chat=SHORT,
            models=MODELS,
        )
    assert not (tmp_path / "answers").exists()


def test_a_folder_without_gguf_files_is_an_error(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    write_records(questions, [question(TEXTS[0])])
    settings = Asking(batch_size=2, concurrency=2, timeout_s=60)
    with pytest.raises(BadInput, match=r"holds no \.gguf file"):
        main(
            questions,
            tmp_path,
            tmp_path,
            tmp_path / "store",
            tmp_path / "answers",
            tmp_path / "m.json",
            answer=settings,
            chat=SHORT,
            models=MODELS,
        )


def test_kept_answers_are_written_for_every_system_without_a_model_or_a_server(tmp_path: Path) -> None:
    base, merged, gguf = tmp_path / "base", tmp_path / "merged", tmp_path / "gguf"
    for folder, name in ((base, "model.safetensors"), (merged, "model.safetensors"), (gguf, "docsmith-q8_0.gguf")):
        folder.mkdir()
        (folder / name).write_text(f"no weights of {folder.name}")
    questions = tmp_path / "questions.jsonl"
    asked = [question(text) for text in TEXTS]
    write_records(questions, asked)
    store = Store(tmp_path / "store", "answer")
    for system, path in {"base": base, "tuned": merged, "q8_0": gguf / "docsmith-q8_0.gguf"}.items():
        for text, request in requests_for({one.id: one.question for one in asked}, SHORT, sha256_of(path)).items():
            store.keep(request_key(request), Reply(f" {system}: {text} "))
    store.close()
    settings = Asking(batch_size=2, concurrency=2, timeout_s=60)
    models = type(MODELS)(base=str(base), teacher="", embedder="")
    main(
        questions,
        merged,
        gguf,
        tmp_path / "store",
        tmp_path / "answers",
        tmp_path / "m.json",
        answer=settings,
        chat=SHORT,
        models=models,
    )
    assert sorted(path.name for path in (tmp_path / "answers").iterdir()) == ["base.jsonl", "q8_0.jsonl", "tuned.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "answers" / "q8_0.jsonl").read_text().splitlines()]
    assert {row["question_id"]: row["text"] for row in rows} == {text: f"q8_0: {text}" for text in TEXTS}
    nothing_new = {"questions": 3, "new": 0, "tokens": 0, "seconds": 0.0, "tokens_per_s": None}
    assert json.loads((tmp_path / "m.json").read_text())["systems"]["q8_0"] == nothing_new


def test_a_speed_is_tokens_over_seconds_and_null_when_nothing_was_asked() -> None:
    assert speed(10, 4, 90, 2.0) == {"questions": 10, "new": 4, "tokens": 90, "seconds": 2.0, "tokens_per_s": 45.0}
    assert speed(10, 0, 0, 0.1)["tokens_per_s"] is None
