"""data/candidates.jsonl + data/judgements.jsonl -> data/pairs.jsonl + data/rejected.jsonl + Data Docs: every candidate held against the rules.

The rules are data, in validate_suite.yaml beside this file; Great Expectations runs them. Nothing disappears: each candidate is a pair,
with its evidence located in the document, or a rejected row with the names of the rules it broke. Costs seconds.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from stages.evidence import locate, words
from stages.files import new_folder, write_json
from stages.params import NonNegative, Positive, Share, convert_section
from stages.program import BadInput, BadParams, LimitBroken, run, say
from stages.records import Candidate, Chunk, Judgement, Pair, Rejected, by_id, read_records, write_records

SUITE = Path(__file__).with_name("validate_suite.yaml")
PROMPTS = Path(__file__).parent / "recipes" / "prompts.yaml"
SUITE_NAME = "pairs"


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    wordings: Positive
    min_similarity: NonNegative
    max_rejected_share: Share


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of validate_suite.yaml."""

    rule: str
    expectation: str
    kwargs: dict[str, Any]
    severity: Literal["critical", "warning"]
    reason: str


def read_rules(path: Path, validate: Params) -> list[Rule]:
    """The rules in file order, with <validate.name> replaced by the setting's value. Raises BadParams."""
    import yaml

    rules = [
        convert_section(path.stem, entry, Rule, path.name) for entry in yaml.safe_load(path.read_text(encoding="utf-8")) or []
    ]
    if not rules:
        raise BadParams(f"{path.name} holds no rule; a suite that checks nothing cannot pass")
    names = Counter(rule.rule for rule in rules)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise BadParams(f"{path.name}: the rule {repeated[0]} is there twice; names must differ")
    settings = msgspec.structs.asdict(validate)
    return [
        msgspec.structs.replace(rule, kwargs={key: _setting(value, settings, rule.rule) for key, value in rule.kwargs.items()})
        for rule in rules
    ]


def _setting(value: Any, settings: Mapping[str, Any], rule: str) -> Any:
    found = re.fullmatch(r"<validate\.(\w+)>", value) if isinstance(value, str) else None
    if found is None:
        return value
    if found[1] not in settings:
        raise BadParams(f"{SUITE.name}: {rule}: validate.{found[1]} is not a setting; known: {', '.join(settings)}")
    return settings[found[1]]


def table(
    candidates: Sequence[Candidate], chunks: Mapping[str, Chunk], judgements: Mapping[str, Judgement], examples: Iterable[str]
) -> Any:
    """A DataFrame with a row for each candidate in the given order: its fields and the columns that rules ask about.

    A candidate that no judge rated, for whatever reason, is not `rated_` anything: the other rules decide.
    """
    import pandas

    taught = {words(example) for example in examples}
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for candidate in candidates:
        question, answer = words(candidate.question), words(candidate.answer)
        too_low = judgements[candidate.id].too_low if candidate.id in judgements else ()
        rows.append(
            msgspec.structs.asdict(candidate)
            | {
                "quote_is_in_chunk": bool(candidate.quote)
                and locate(candidate.quote, chunks[candidate.chunk_id].text) is not None,
                "question_copies_answer": question == answer or (len(answer) > 20 and answer in question),
                "question_copies_example": question in taught,
                "repeats_earlier_question": question in seen,
                "rated_unfaithful": "faithfulness" in too_low,
                "rated_unanswerable": "answerability" in too_low,
                "rated_useless": "usefulness" in too_low,
            }
        )
        seen.add(question)
    return pandas.DataFrame(rows)


def example_questions(prompts: Path) -> list[str]:
    """Every question that a prompt shows to the teacher."""
    import yaml

    recipes = yaml.safe_load(prompts.read_text(encoding="utf-8")).values()
    examples = [example for recipe in recipes for example in recipe.get("examples", [])]
    return [question for example in examples for question in example.get("questions") or [example["question"]]]


def broken_rules(rows: Any, rules: Sequence[Rule], data_docs: Path) -> dict[str, list[str]]:
    """Row id -> names of the rules it broke, in the suite's order; rows without a fault are absent. Writes Data Docs to `data_docs`.

    Raises LimitBroken for a critical rule that failed and BadParams for a rule that could not run: neither may pass as "no fault".
    """
    import great_expectations as gx
    import great_expectations.expectations as gxe

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False, "metric_calculations": False}  # type: ignore[assignment]
    suite = gx.ExpectationSuite(name=SUITE_NAME)
    for rule in rules:
        kind = getattr(gxe, "".join(part.capitalize() for part in rule.expectation.split("_")), None)
        if kind is None:
            raise BadParams(f"{SUITE.name}: {rule.rule}: {rule.expectation} is not an expectation of Great Expectations")
        try:
            expectation = kind(
                **rule.kwargs, severity=rule.severity, meta={"rule": rule.rule}, notes=f"{rule.rule}: {rule.reason}"
            )
        except (TypeError, ValueError) as error:  # pydantic's ValidationError is a ValueError
            raise BadParams(
                f"{SUITE.name}: {rule.rule}: kwargs do not fit {rule.expectation}: {' '.join(str(error).split())[:300]}"
            ) from None
        suite.add_expectation(expectation)
    batch = (
        context.data_sources.add_pandas("candidates")
        .add_dataframe_asset("candidates")
        .add_batch_definition_whole_dataframe("all")
    )
    definition = context.validation_definitions.add(
        gx.ValidationDefinition(name=SUITE_NAME, data=batch, suite=context.suites.add(suite))
    )
    site = {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(data_docs.resolve())},
    }
    context.add_data_docs_site(site_name="pairs", site_config=site)
    checkpoint = gx.Checkpoint(
        name=SUITE_NAME,
        validation_definitions=[definition],
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["id"]},
    )
    outcome = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": rows})
    context.build_data_docs()
    (validation,) = outcome.run_results.values()
    if len(validation.results) != len(rules):
        raise BadParams(f"{SUITE.name}: {len(validation.results)} of {len(rules)} rules ran; all of them must")
    order = {rule.rule: place for place, rule in enumerate(rules)}
    faults: dict[str, list[str]] = {}
    for result in sorted(validation.results, key=lambda result: order[result.expectation_config.meta["rule"]]):
        name = result.expectation_config.meta["rule"]
        if result.exception_info.get("raised_exception") or "unexpected_index_list" not in result.result and not result.success:
            detail = " ".join(str(result.exception_info.get("exception_message") or result.exception_info).split())[:300]
            raise BadParams(f"{SUITE.name}: the rule {name} could not run: {detail}")
        ids = [row["id"] for row in result.result.get("unexpected_index_list") or []]
        if ids and rules[order[name]].severity == "critical":
            raise LimitBroken(
                f"the critical rule {name} failed for {len(ids)} candidates, first {ids[0]}: {rules[order[name]].reason}"
            )
        for row_id in ids:
            faults.setdefault(row_id, []).append(name)
    return faults


def pair_of(candidate: Candidate, chunk: Chunk) -> Pair:
    """`candidate` as a pair, its quote located in the document."""
    place = locate(candidate.quote, chunk.text)
    if place is None:
        raise LimitBroken(
            f"candidate {candidate.id} passed every rule, but its quote is not in chunk {chunk.id}; keep the rule quote-not-in-chunk"
        )
    return Pair(
        id=candidate.id,
        chunk_id=chunk.id,
        fact_id=candidate.fact_id,
        section_id=chunk.section_id,
        document_id=chunk.document_id,
        path=chunk.path,
        heading_path=chunk.heading_path,
        question=candidate.question,
        answer=candidate.answer,
        quote=candidate.quote,
        quote_start=chunk.start + place[0],
        quote_end=chunk.start + place[1],
        type=candidate.type,
        model=candidate.model,
        similarity=candidate.similarity,
        wording=candidate.wording,
    )


def main(
    candidates: Path,
    chunks: Path,
    judgements: Path,
    pairs: Path,
    rejected: Path,
    data_docs: Path,
    metrics: Path,
    *,
    validate: Params,
) -> None:
    chunk_by_id = by_id(read_records(chunks, Chunk))
    judgement_by_id = by_id(read_records(judgements, Judgement))
    # best wordings first, so that of two equal questions the better one stays
    claims = sorted(read_records(candidates, Candidate), key=lambda claim: (claim.wording, -claim.similarity, claim.id))
    if not claims:
        raise BadInput(f"{candidates} holds no candidate; see data/generate_failures.jsonl")
    if lost := [claim for claim in claims if claim.chunk_id not in chunk_by_id]:
        raise BadInput(
            f"{candidates}: {lost[0].id} names chunk {lost[0].chunk_id}, which {chunks} does not hold. Re-run: dvc repro generate"
        )
    rules = read_rules(SUITE, validate)
    with new_folder(data_docs) as draft:
        faults = broken_rules(table(claims, chunk_by_id, judgement_by_id, example_questions(PROMPTS)), rules, draft)
        accepted = [pair_of(claim, chunk_by_id[claim.chunk_id]) for claim in claims if claim.id not in faults]
        refused = [
            Rejected(
                id=claim.id,
                chunk_id=claim.chunk_id,
                question=claim.question,
                answer=claim.answer,
                quote=claim.quote,
                rules=tuple(faults[claim.id]),
            )
            for claim in claims
            if claim.id in faults
        ]
    by_rule = Counter(rule for row in refused for rule in row.rules)
    share = len(refused) / len(claims)
    write_records(rejected, refused)
    write_records(pairs, accepted)
    counts = {"candidates": len(claims), "pairs": len(accepted), "rejected": len(refused), "rejected_share": round(share, 4)}
    covered = {"sections": len({pair.section_id for pair in accepted}), "facts": len({pair.fact_id for pair in accepted})}
    write_json(metrics, counts | covered | {"by_rule": {rule.rule: by_rule.get(rule.rule, 0) for rule in rules}})
    say(
        f"validate: {len(claims)} candidates = {len(accepted)} pairs + {len(refused)} rejected; Data Docs in {data_docs}/index.html"
    )
    if not accepted or share > validate.max_rejected_share:
        worst = ", ".join(f"{rule} {count}" for rule, count in by_rule.most_common(3))
        raise LimitBroken(
            f"{share:.1%} of {len(claims)} candidates were rejected, and validate.max_rejected_share is {validate.max_rejected_share:.0%}; most often: {worst}"
        )


if __name__ == "__main__":
    run(main)
