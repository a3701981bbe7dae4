"""params.yaml: every wrong setting is named, with what was found and what would be right."""

from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from stages.params import Count, Positive, Share, convert_section, read_section
from stages.program import BadParams


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    depth: Positive


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_tokens: Annotated[int, msgspec.Meta(ge=16)]
    share: Share
    seed: Count
    name: str
    inner: Inner


GOOD = "chunk: {max_tokens: 64, share: 0.5, seed: 0, name: a, inner: {depth: 2}}\n"


def read(tmp_path: Path, text: str, name: str = "chunk") -> Section:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return read_section(name, Section, path)


def test_a_section_is_read_with_its_types_and_its_nested_section(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD) == Section(64, 0.5, 0, "a", Inner(2))


def test_a_whole_number_will_do_for_a_share(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD.replace("0.5", "1")).share == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("max_tokens", "max_token"), "chunk.max_token is not a setting of chunk. Did you mean max_tokens?"),
        (GOOD.replace("seed", "xyz"), "chunk.xyz is not a setting of chunk. Known: inner, max_tokens, name, seed, share"),
        (GOOD.replace("depth", "dept"), "chunk.inner.dept is not a setting of chunk.inner. Did you mean depth?"),
        (GOOD.replace("64", "'64'"), "chunk.max_tokens: expected `int`, got `str`"),
        (GOOD.replace("64", "64.5"), "chunk.max_tokens: expected `int`, got `float`"),
        (GOOD.replace("64", "15"), "chunk.max_tokens: expected `int` >= 16"),
        (GOOD.replace("0.5", "1.5"), "chunk.share: expected `float` <= 1.0"),
        (GOOD.replace("0.5", ".nan"), "chunk.share: "),
        (GOOD.replace("seed: 0", "seed: -1"), "chunk.seed: expected `int` >= 0"),
        (GOOD.replace("seed: 0", "seed: true"), "chunk.seed: expected `int`, got `bool`"),
        (GOOD.replace("seed: 0", "seed:"), "chunk.seed: expected `int`, got `null`"),
        (GOOD.replace("depth: 2", "depth: 0"), "chunk.inner.depth: expected `int` >= 1"),
        (GOOD.replace("seed: 0, ", ""), "chunk: object missing required field `seed`"),
        ("chunk: 3\n", "chunk: expected `object`, got `int`"),
        ("chunk:\n", "chunk: expected `object`, got `null`"),
        (GOOD.replace("chunk", "chunks"), "the section chunk is missing. Did you mean chunks?"),
        ("", "the section chunk is missing"),
        ("- chunk\n", "the section chunk is missing"),
        ("chunk: {seed: [1\n", " is not valid YAML: "),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadParams) as raised:
        read(tmp_path, text)
    said = str(raised.value)
    assert said.startswith(f"{tmp_path / 'params.yaml'}") and message in said and "\n" not in said


def test_a_folder_without_params_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadParams, match="is missing; run the command in the folder that holds it"):
        read_section("chunk", Section, tmp_path / "params.yaml")


def test_values_from_another_file_are_blamed_on_that_file() -> None:
    with pytest.raises(BadParams, match=r"^suite\.yaml: rule\.dept is not a setting of rule\. Did you mean depth\?$"):
        convert_section("rule", {"dept": 1}, Inner, "suite.yaml")
