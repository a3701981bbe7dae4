"""Rules as data: a YAML suite that Great Expectations runs over a table, and Data Docs that a person can read without a network.

An entry of a suite:
  rule: the name that rejected.jsonl and the report use          expectation, kwargs: Great Expectations' own, or
  expect_rows_not_to_be with a column of booleans, none of which may be true
  severity: critical stops the stage, warning rejects the row, info is reported          reason: why the rule is there
  among: all rows, or `sound`: only those that broke no other rule          waivable: whether a reviewer may accept the row all the same
A value in angle brackets, as <validate.wordings>, is taken from params.yaml.
"""

import contextlib
import html
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from stages.files import write_text
from stages.params import convert_section
from stages.program.errors import BadParams, LimitBroken

# What Data Docs load from elsewhere -> the same file in the package Bootstrap-Flask; everything else from elsewhere is decoration.
OFFLINE = {
    "bootstrap.min.css": "css/bootstrap.min.css",
    "jquery-3.7.1.min.js": "jquery.min.js",
    "popper.min.js": "umd/popper.min.js",
    "bootstrap.min.js": "js/bootstrap.min.js",
}
# in place of an icon font, and without the advertisement at the foot
MARKS = ".fa-check-circle::before{content:'✓'}.fa-times::before,.fa-exclamation-circle::before{content:'✗'}.fa-exclamation-triangle::before{content:'!'}footer{display:none}"
FROM_ELSEWHERE = re.compile(
    r"<link\b[^>]*href=\"https?://[^>]*>|<script\b[^>]*src=\"https?://[^>]*></script>|<img\b[^>]*src=\"https?://[^>]*>"
)

Check = Callable[[str, Any, Sequence["Rule"]], dict[str, list[str]]]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of a suite."""

    rule: str
    expectation: str
    kwargs: dict[str, Any]
    severity: Literal["critical", "warning", "info"]
    reason: str
    among: Literal["all", "sound"] = "all"
    waivable: bool = True


def read_rules(path: Path, **sections: msgspec.Struct) -> list[Rule]:
    """The rules in file order, with <section.name> replaced by the setting's value. Raises BadParams."""
    import yaml

    rules = [
        convert_section(path.stem, entry, Rule, path.name) for entry in yaml.safe_load(path.read_text(encoding="utf-8")) or []
    ]
    if not rules:
        raise BadParams(f"{path.name} holds no rule; a suite that checks nothing cannot pass")
    names = Counter(rule.rule for rule in rules)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise BadParams(f"{path.name}: the rule {repeated[0]} is there twice; names must differ")
    settings = {
        f"{name}.{key}": value for name, section in sections.items() for key, value in msgspec.structs.asdict(section).items()
    }

    def filled(rule: Rule) -> Rule:
        kwargs = dict(rule.kwargs)
        for key, value in rule.kwargs.items():
            if isinstance(value, str) and (found := re.fullmatch(r"<(\w+\.\w+)>", value)):
                if found[1] not in settings:
                    raise BadParams(f"{path.name}: {rule.rule}: {found[1]} is not a setting; known: {', '.join(settings)}")
                kwargs[key] = settings[found[1]]
        return msgspec.structs.replace(rule, kwargs=kwargs)

    return [filled(rule) for rule in rules]


@contextlib.contextmanager
def checking(data_docs: Path) -> Iterator[Check]:
    """A function (name of the table, its DataFrame with a column `id`, rules) -> rule -> ids of the rows that break it, in table order.

    Rules that nothing breaks are absent. On leaving, Data Docs of all tables are written to `data_docs`. The function raises LimitBroken
    for a critical rule that failed, and BadParams for a rule that could not run or had nothing to run on: neither may pass as "no fault".
    """
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False, "metric_calculations": False}  # type: ignore[assignment]
    pandas_source = context.data_sources.add_pandas("tables")
    site = {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(data_docs.resolve())},
    }
    context.add_data_docs_site(site_name="docsmith", site_config=site)  # type: ignore[arg-type]
    tables: list[tuple[str, int, Sequence[Rule], dict[str, list[str]]]] = []

    def check(name: str, rows: Any, rules: Sequence[Rule]) -> dict[str, list[str]]:
        if rows.empty:
            raise BadParams(f"the table {name} holds no row; a suite that checks nothing cannot pass")
        suite = gx.ExpectationSuite(name=name)
        for rule in rules:
            suite.add_expectation(_expectation(rule, rows))
        batch = pandas_source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        definition = gx.ValidationDefinition(name=name, data=batch, suite=context.suites.add(suite))
        checkpoint = gx.Checkpoint(
            name=name,
            validation_definitions=[context.validation_definitions.add(definition)],
            result_format={
                "result_format": "COMPLETE",
                "unexpected_index_column_names": [column for column in ("id", "question") if column in rows],
            },
        )
        outcome = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": rows})
        (validation,) = outcome.run_results.values()
        if len(validation.results) != len(rules):
            raise BadParams(f"{len(validation.results)} of {len(rules)} rules for {name} ran; all of them must")
        by_name = {result.expectation_config.meta["rule"]: result for result in validation.results}  # type: ignore[union-attr]
        broken = {rule.rule: _broken_by(rule, by_name[rule.rule]) for rule in rules}
        tables.append((name, len(rows), rules, broken))
        return {rule: ids for rule, ids in broken.items() if ids}

    yield check
    context.build_data_docs()
    _without_network(data_docs)
    write_text(data_docs / "index.html", _index(tables, data_docs))


def _expectation(rule: Rule, rows: Any) -> Any:
    import great_expectations.expectations as gxe

    column = rule.kwargs.get("column")
    if column in rows and rows[column].isna().any():  # expectations skip what is null, and so would pass
        raise BadParams(f"the rule {rule.rule} could not run: {rows[column].isna().sum()} rows have no {column}")
    name, kwargs = rule.expectation, rule.kwargs
    if name == "expect_rows_not_to_be":
        name, kwargs = "expect_column_values_to_be_in_set", kwargs | {"value_set": [False]}
    kind = getattr(gxe, "".join(part.capitalize() for part in name.split("_")), None)
    if kind is None:
        raise BadParams(f"{rule.rule}: {name} is not an expectation of Great Expectations")
    said = f"{rule.rule}: {rule.reason}"
    try:
        return kind(**kwargs, severity=rule.severity, meta={"rule": rule.rule}, description=said, notes=said)
    except (TypeError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        detail = " ".join(str(error).split())[:300]
        raise BadParams(f"{rule.rule}: kwargs do not fit {name}: {detail}") from None


def _broken_by(rule: Rule, result: Any) -> list[str]:
    raised = (
        result.exception_info.get("raised_exception") if "raised_exception" in result.exception_info else result.exception_info
    )
    if raised or ("unexpected_index_list" not in result.result and not result.success and rule.severity != "critical"):
        detail = " ".join(str(result.exception_info.get("exception_message") or result.exception_info).split())[:300]
        raise BadParams(f"the rule {rule.rule} could not run: {detail}")
    ids = [row["id"] for row in result.result.get("unexpected_index_list") or []]
    if rule.severity == "critical" and not result.success:
        where = f"for {len(ids)} rows, first {ids[0]}" if ids else "for the table"
        raise LimitBroken(f"the critical rule {rule.rule} failed {where}: {rule.reason}")
    return ids


def _index(tables: Sequence[tuple[str, int, Sequence[Rule], dict[str, list[str]]]], data_docs: Path) -> str:
    """The start page, in place of Great Expectations' own, which is empty without a network: each rule with its reason and count."""
    parts = []
    for name, count, rules, broken in tables:
        page = next((data_docs / "validations" / name).rglob("*.html")).relative_to(data_docs).as_posix()
        lines = [
            f"<tr><td><code>{rule.rule}</code></td><td>{rule.severity}</td><td class='text-right'>{len(broken[rule.rule]):,}</td>"
            f"<td>{html.escape(rule.reason)}</td></tr>"
            for rule in sorted(rules, key=lambda rule: -len(broken[rule.rule]))
        ]
        parts.append(
            f"<h2 class='h4 mt-4'>{html.escape(name.capitalize())}: {count:,} rows</h2><p><a href='{html.escape(page)}'>Values and ids</a></p>"
            "<table class='table table-sm'><thead><tr><th>Rule</th><th>Severity</th><th class='text-right'>Rows that break it</th>"
            f"<th>Reason</th></tr></thead><tbody>{''.join(lines)}</tbody></table>"
        )
    return (
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        '<title>Data Docs</title><link rel="stylesheet" href="static/bootstrap.min.css"></head>'
        f"<body class='container py-4'><h1 class='h3'>Data Docs</h1>{''.join(parts)}</body></html>\n"
    )


def _without_network(data_docs: Path) -> None:
    """Makes the pages ask nothing of other hosts: Bootstrap is put beside them, and the rest of what they would load is left out."""
    import flask_bootstrap

    shipped = Path(flask_bootstrap.__file__).parent / "static" / "bootstrap4"
    for name, inside in OFFLINE.items():
        shutil.copyfile(shipped / inside, data_docs / "static" / name)

    for page in data_docs.rglob("*.html"):
        static = "../" * (len(page.relative_to(data_docs).parts) - 1) + "static/"  # the pages' own is one level short

        def local(found: re.Match[str], static: str = static) -> str:
            name = re.split(r"[?\"]", found[0].partition('="http')[2])[0].rsplit("/", 1)[-1]
            return re.sub(r"(href|src)=\"[^\"]*\"", rf'\1="{static}{name}"', found[0]) if name in OFFLINE else ""

        text = FROM_ELSEWHERE.sub(local, page.read_text(encoding="utf-8")).replace("</head>", f"<style>{MARKS}</style></head>")
        page.write_text(re.sub(r"\"(?:\./|(?:\.\./)+)static/", f'"{static}', text), encoding="utf-8")
