"""data/candidates.jsonl + data/chunks.jsonl -> data/judgements.jsonl: a model's ratings of candidates, each against its source chunk.

Off in the CPU profile. A judge that fails its audit is not used, and the stage says so and goes on; `validate` turns low ratings into
rejected rows. Costs one call per candidate and 32 for the audit; replies are kept in data/store, so a rerun asks only what changed.
"""

from pathlib import Path
from typing import Any

from stages.executor import Executor
from stages.files import write_json
from stages.judging import DIMENSIONS, Exhibit, Judging, exhibit_of, judged
from stages.params import Models
from stages.program import BadInput, run, say
from stages.records import Candidate, Chunk, by_id, read_records, write_records


def read_exhibits(candidates: Path, chunks: Path, wordings: int) -> dict[str, Exhibit]:
    """What a judge is shown of the best `wordings` of each fact, by the candidate's id. Raises BadInput when a chunk is missing."""
    chunk_by_id = by_id(read_records(chunks, Chunk))
    claims = [claim for claim in read_records(candidates, Candidate) if claim.wording <= wordings]
    if lost := [claim for claim in claims if claim.chunk_id not in chunk_by_id]:
        raise BadInput(
            f"{candidates}: {lost[0].id} names chunk {lost[0].chunk_id}, which {chunks} does not hold. Re-run: dvc repro generate"
        )
    return {claim.id: exhibit_of(claim.question, claim.answer, chunk_by_id[claim.chunk_id]) for claim in claims}


def main(
    candidates: Path,
    chunks: Path,
    store: Path,
    judgements: Path,
    metrics: Path,
    *,
    judge: Judging,
    models: Models,
    executor: Executor,
) -> None:
    exhibits = read_exhibits(candidates, chunks, judge.wordings) if judge.enabled else {}
    found = judged(exhibits, judge, models.teacher, store, executor)
    write_records(judgements, found.judgements)
    figures: dict[str, Any] = {"used": found.used, "why": found.why} | ({"audit": found.audit} if found.audit else {})
    low = ""
    if found.used:
        too_low = {name: sum(name in one.too_low for one in found.judgements) for name in DIMENSIONS}
        figures |= {"too_low": too_low, **found.counts()}
        low = f"; {sum(1 for one in found.judgements if one.too_low)} rated below {judge.min_score}"
    write_json(metrics, figures)
    say(f"judge: {found.said('candidate')}{low}")


if __name__ == "__main__":
    run(main)
