"""stages.rules: a suite that cannot run is an error and never a pass, and Data Docs need no network."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pandas
import pytest
import yaml

from stages.program import BadParams, LimitBroken
from stages.rules import checking, read_rules


class Params(msgspec.Struct):
    """A section of params.yaml."""

    wordings: int = 3


def suite(folder: Path, *entries: Any) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(list(entries)) if entries else "# nothing\n")
    return path


def entry(**changes: Any) -> dict[str, Any]:
    kwargs = {"column": "question", "min_value": 10}
    rule = {"rule": "short", "expectation": "expect_column_value_lengths_to_be_between", "kwargs": kwargs}
    return rule | {"severity": "warning", "reason": "too little to say"} | changes


def run(folder: Path, *entries: dict[str, Any], **columns: list[Any]) -> dict[str, list[str]]:
    rows = pandas.DataFrame({"id": ["a", "b"], "question": ["How long is it?", "Why?"], "is_odd": [True, False]} | columns)
    with checking(folder / "docs") as check:
        return check("rows", rows, read_rules(suite(folder, *entries), validate=Params()))


def test_a_rule_gives_the_ids_of_the_rows_that_break_it(tmp_path: Path) -> None:
    odd = entry(rule="odd", expectation="expect_rows_not_to_be", kwargs={"column": "is_odd"}, severity="info")
    unbroken = entry(rule="long", kwargs={"column": "question", "max_value": 99})
    assert run(tmp_path, entry(), odd, unbroken) == {"short": ["b"], "odd": ["a"]}


def test_a_value_in_angle_brackets_is_the_settings(tmp_path: Path) -> None:
    (rule,) = read_rules(suite(tmp_path, entry(kwargs={"column": "x", "max_value": "<validate.wordings>"})), validate=Params(5))
    assert rule.kwargs == {"column": "x", "max_value": 5}


def test_an_empty_suite_cannot_pass(tmp_path: Path) -> None:
    with pytest.raises(BadParams, match="holds no rule"):
        read_rules(suite(tmp_path))


def test_an_empty_table_cannot_pass(tmp_path: Path) -> None:
    with pytest.raises(BadParams, match="the table rows holds no row"):
        run(tmp_path, entry(), id=[], question=[], is_odd=[])


def test_a_rule_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadParams, match="the rule short is there twice"):
        read_rules(suite(tmp_path, entry(), entry(reason="other")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"severity": "fatal"}, "severity"),
        ({"among": "some"}, "among"),
        ({"expectaton": "x"}, "expectaton is not a setting.*Did you mean expectation"),
        (
            {"kwargs": {"column": "wording", "max_value": "<validate.wording>"}},
            "validate.wording is not a setting; known: validate.w",
        ),
    ],
)
def test_a_misspelt_rule_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadParams, match=message):
        read_rules(suite(tmp_path, entry(**change)), validate=Params())


MATCH = "expect_column_values_to_match_regex"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expectation": "expect_column_value_lenghts_to_be_between"}, "short: .* is not an expectation"),
        ({"kwargs": {"column": "questions", "min_value": 10}}, "the rule short could not run"),
        ({"kwargs": {"column": "question", "min_valu": 10}}, "short: kwargs do not fit"),
        ({"kwargs": {"min_value": 10}}, "short: kwargs do not fit"),
        ({"expectation": MATCH, "kwargs": {"column": "question", "regex": "(?"}}, "the rule short could not run"),
        ({"severity": "critical", "kwargs": {"column": "questions", "min_value": 10}}, "the rule short could not run"),
    ],
)
def test_a_rule_that_cannot_run_is_an_error_and_never_a_pass(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadParams, match=message) as refused:
        run(tmp_path, entry(**change))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_row_without_a_value_is_an_error_and_not_skipped(nothing: Any, tmp_path: Path) -> None:
    with pytest.raises(BadParams, match="the rule short could not run: 1 rows have no question"):
        run(tmp_path, entry(), question=["How long is it?", nothing])


def test_a_critical_rule_raises_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(LimitBroken, match="the critical rule short failed for 1 rows, first b: too little to say"):
        run(tmp_path, entry(severity="critical"))


def test_a_critical_rule_may_be_about_the_whole_table(tmp_path: Path) -> None:
    count = entry(expectation="expect_table_row_count_to_be_between", kwargs={"min_value": 3}, severity="critical")
    with pytest.raises(LimitBroken, match="the critical rule short failed for the table"):
        run(tmp_path, count)
    assert run(tmp_path, count | {"kwargs": {"min_value": 2}}) == {}


def test_data_docs_name_rule_and_reason_and_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    run(tmp_path, entry())
    docs = tmp_path / "docs"
    pages = [page.read_text(encoding="utf-8") for page in docs.rglob("*.html")]
    assert len(pages) == 3
    assert sum("short: too little to say" in page for page in pages) == 2
    index = (docs / "index.html").read_text(encoding="utf-8")
    assert "<code>short</code></td><td>warning</td><td class='text-right'>1</td><td>too little to say</td>" in index
    (link,) = re.findall(r"href='([^']+)'", index)
    assert (docs / link).is_file()
    for page in docs.rglob("*.html"):
        loaded = re.findall(r"<(?:link|script|img)\b[^>]*(?:href|src)=\"([^\"]+)\"", page.read_text(encoding="utf-8"))
        assert any(one.endswith("bootstrap.min.css") for one in loaded)
        assert [one for one in loaded if "//" in one or not (page.parent / one).is_file()] == []
    assert not [page for page in pages if str(tmp_path) in page]
