"""stages.evidence.claims: what an answer says that its source does not."""

import pytest

from stages.evidence import invented


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
