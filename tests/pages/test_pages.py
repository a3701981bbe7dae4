"""pages: a missing figure never reads as 0, and no text breaks the page that shows it."""

from pathlib import Path

import jinja2
import pytest

from stages.pages import clipped, counted, dig, escaped, fenced, markdown_table, measured, read_figures, rule_rows, template

SUITE = """
- {rule: too-short, severity: warning, reason: says nothing}
- {rule: has-address, severity: info, reason: may be private}
- {rule: id-repeats, severity: critical, reason: joins break}
"""


def test_a_missing_figure_is_not_measured_and_a_zero_is_a_zero(tmp_path: Path) -> None:
    assert measured(None) == measured("") == counted(None) == "not measured"
    assert (measured(0), measured(1234, "{:,}"), counted({}), counted({"a": 0})) == ("0", "1,234", "none", "none")
    assert counted({"one": 1, "none": 0, "many": 2000}) == "many 2,000, one 1"
    assert read_figures(tmp_path / "absent.json") == {}
    (tmp_path / "figures.json").write_text('{"review": {"edited": 4}}')
    figures = read_figures(tmp_path / "figures.json")
    assert (dig(figures, "review", "edited"), dig(figures, "review", "stale"), dig(figures, "absent", "edited")) == (
        4,
        None,
        None,
    )


def test_the_rules_that_were_broken_come_with_severity_and_reason_most_often_broken_first(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(SUITE)
    assert rule_rows(tmp_path / "suite.yaml", {"too-short": 3, "id-repeats": 0, "has-address": 1200, "gone": 1}) == [
        ("has-address", "info", "1,200", "may be private"),
        ("too-short", "warning", "3", "says nothing"),
        ("gone", "", "1", ""),
    ]


def test_text_is_escaped_clipped_and_fenced_as_markdown_needs() -> None:
    assert escaped("a_b [c] $d$ ~e~ \\f\ng") == "a\\_b \\[c\\] \\$d\\$ \\~e\\~ \\\\f g"
    assert clipped("abcdef", 4) == "abcd … (2 more characters)" and clipped("abcd", 4) == "abcd"
    assert fenced("a\n```\n") == "````yaml\na\n```\n````"


def test_a_table_holds_one_line_a_row_whatever_its_cells_say() -> None:
    assert (
        markdown_table(["rule", "n"], [("a|b\nc", "1"), ("d", "")], "--:")
        == "| rule | n |\n| :-- | --: |\n| a\\|b c | 1 |\n| d |  |\n"
    )


def test_a_template_refuses_a_name_that_it_was_not_given_and_html_is_escaped() -> None:
    with pytest.raises(jinja2.UndefinedError):
        template("report.md.jinja").render()
    assert template("report.html.jinja").environment.autoescape and not template("report.md.jinja").environment.autoescape
