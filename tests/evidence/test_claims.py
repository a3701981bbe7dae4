"""stages.evidence.claims: what an answer says that its source does not."""

import pytest

from stages.evidence import invented, key_facts


@pytest.mark.parametrize(
    ("answer", "source", "kinds"),
    [
        ("It takes 1,500 rows.", "takes 1500 rows", []),
        ("It takes 2 rows.", "takes two rows", []),
        ("It takes two rows.", "takes one row", []),  # words are the embedding's business
        ("Use port 8080.", "port 80800", ["number"]),
        ("Version v2 of utf-8 and 3D.", "nothing", []),  # names, not numbers
        ("Run it with -f or --force.", "use -f, --force-all", ["flag"]),
        ("A well-known by-product.", "nothing", []),
        ("See data/pairs.jsonl there.", "pairs.jsonl", ["file_name"]),
        ("For example, e.g. this.", "nothing", []),
        ("Call `dvc  repro` now.", "call dvc repro", []),
        ("Do:\n\n```bash\ndvc repro\n```", "Do: ```bash dvc repro ```", []),
        ("Do:\n\n```bash\ndvc pull\n```", "Do: ```bash dvc repro ```", ["code"]),
        ("At https://a.example/b.", "(https://a.example/b)", []),
        ("At https://a.example/c.html.", "(https://a.example/b)", ["url"]),
    ],
)
def test_what_an_answer_invents_is_named(answer: str, source: str, kinds: list[str]) -> None:
    assert [name.removesuffix("_is_invented") for name, is_so in invented(answer, source).items() if is_so] == kinds


@pytest.mark.parametrize(
    ("answer", "source", "question", "facts"),
    [
        ("Use port 8080 of 2.", "port 8080", "Which port?", ("8080",)),
        ("Use port 8080.", "port 80800", "Which port?", ()),
        ("Use port 8080.", "port 8080", "What is 8080?", ()),
        ("It takes 1,500 rows.", "takes 1,500 rows", "How many?", ("1,500",)),
        (
            "Run `dvc  repro --force` here.",
            "Run `dvc repro\n--force` here.",
            "How?",
            ("dvc repro --force",),
        ),  # the flag is a part of it
        ("With -f and --all.", "-f, --all", "How?", ("-f", "--all")),
        ("With --all.", "--all-tags", "How?", ()),
        (
            "See data/pairs.jsonl at https://a.example/b.",
            "https://a.example/b data/pairs.jsonl",
            "Where?",
            ("data/pairs.jsonl", "https://a.example/b"),
        ),
        ("Do:\n\n```bash\ndvc add a\ndvc push\n```", "Do: ```bash dvc add a dvc push ```", "How?", ("dvc add a", "dvc push")),
        ("1. Open it.\n2. Close it.", "1. Open it. 2. Close it.", "How?", ()),
        ("Nothing to hold on to.", "Nothing to hold on to.", "What?", ()),
    ],
)
def test_key_facts_are_what_an_answer_has_from_its_source_and_not_from_the_question(
    answer: str, source: str, question: str, facts: tuple[str, ...]
) -> None:
    assert key_facts(answer, source, question) == facts
