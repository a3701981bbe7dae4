"""data/candidates.jsonl + data/chunks.jsonl + data/review.jsonl -> data/measurements.jsonl: what the rules of validate need and is costly.

For each candidate, as reviewers left it: whether the evidence carries the answer, the languages, secrets and personal data, and which
candidates are alike. Costs an embedding of each question, answer and quote: about a minute for 10,000 candidates on two cores.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from stages.decisions import with_decisions
from stages.embedding import embedding
from stages.evidence import locate, words
from stages.executor import Executor
from stages.files import write_json
from stages.likeness import clusters
from stages.models import load_cross_encoder
from stages.params import Models, Share
from stages.program import BadModelFile, run, say
from stages.records import MEND, Candidate, Chunk, Decision, Measurement, by_id, read_records, write_records
from stages.screening import personal_data_in, secrets_in

MIN_WORD_CHARS = 4  # shorter ones are in every text
NEAR_CHARS = 200
MIN_LANGUAGE_CHARS = 40  # shorter texts are told apart badly
MIN_LANGUAGE_SHARE = 0.8  # probability


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    min_cosine: Share
    nli: str


def languages(texts: Sequence[str]) -> list[str]:
    """ISO 639-1 of each text without its code; "" for one that is too short or not certain."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def language(text: str) -> str:
        prose = re.sub(r"```.*?```|`[^`]*`|https?://\S+|[\w./-]*[\d_/.][\w./-]*", " ", text, flags=re.DOTALL)
        if len(" ".join(prose.split())) < MIN_LANGUAGE_CHARS:
            return ""
        name, share = identifier.classify(prose)
        return name if share >= MIN_LANGUAGE_SHARE else ""

    known = {text: language(text) for text in sorted(set(texts))}
    return [known[text] for text in texts]


def around(quote: str, text: str) -> str:
    """The place of `quote` in `text` with what stands near it, as an answer may say more than its quote; "" where it is not there."""
    place = locate(quote, text)
    return text[max(0, place[0] - NEAR_CHARS) : place[1] + NEAR_CHARS] if place else ""


def share_of_words(answer: str, source: str) -> float:
    """The share of the different longer words of `answer` that `source` has."""
    said = {word for word in words(answer).split() if len(word) >= MIN_WORD_CHARS}
    return len(said & set(words(source).split())) / len(said) if said else 0.0


def entailed(pairs: Sequence[tuple[str, str]], reference: str) -> list[float]:
    """The probability of each (evidence, answer) that the one entails the other, by the cross-encoder `reference`. Raises BadModelFile."""
    model = load_cross_encoder(reference)
    labels = {name.lower(): place for place, name in model.model.config.id2label.items()}
    if "entailment" not in labels:
        raise BadModelFile(f"measure.nli: {reference} has no label entailment (found {', '.join(sorted(labels))})")
    shares = model.predict(list(pairs), apply_softmax=True, show_progress_bar=False)
    return [float(row[labels["entailment"]]) for row in shares]


def main(
    candidates: Path,
    chunks: Path,
    review: Path,
    measurements: Path,
    metrics: Path,
    *,
    measure: Params,
    models: Models,
    executor: Executor,
) -> None:
    chunk_by_id = by_id(read_records(chunks, Chunk))
    claims = with_decisions(read_records(candidates, Candidate), read_records(review, Decision, MEND), chunk_by_id).candidates
    claims.sort(key=lambda claim: claim.id)
    embed = embedding(models.embedder, executor)
    answers, quotes = embed([claim.answer for claim in claims]), embed([claim.quote for claim in claims])
    if measure.nli:
        entailment = entailed([(claim.quote, claim.answer) for claim in claims], measure.nli)
    else:
        shared = [share_of_words(claim.answer, around(claim.quote, chunk_by_id[claim.chunk_id].text)) for claim in claims]
        entailment = [max(float(cosine), share) for cosine, share in zip((answers * quotes).sum(1), shared, strict=True)]
    questions = [claim.question for claim in claims]
    alike = clusters(questions, [claim.answer for claim in claims], embed(questions), answers, measure.min_cosine)
    written = languages([chunk_by_id[claim.chunk_id].text for claim in claims])
    asked, told = languages(questions), languages([claim.answer for claim in claims])
    both = languages([f"{claim.question} {claim.answer}" for claim in claims])
    spoken = [
        next((one for one in some if one not in ("", source)), some[-1])
        for *some, source in zip(asked, told, both, written, strict=True)
    ]
    texts = [f"{claim.question}\n{claim.answer}\n{claim.quote}" for claim in claims]
    found = [
        Measurement(
            id=claim.id,
            entailment=round(entailment[place], 4),
            language=spoken[place],
            source_language=written[place],
            secrets=tuple(sorted({spot.rule for spot in secrets_in(texts[place])})),
            personal_data=tuple(sorted({spot.rule for spot in personal_data_in(texts[place])})),
            cluster=claims[alike[place]].id,
        )
        for place, claim in enumerate(claims)
    ]
    write_records(measurements, found)
    sizes = Counter(one.cluster for one in found)
    counts = {
        "candidates": len(found),
        "clusters": len(sizes),
        "largest_cluster": max(sizes.values(), default=0),
        "with_secrets": sum(bool(one.secrets) for one in found),
        "with_personal_data": sum(bool(one.personal_data) for one in found),
        "languages": dict(sorted(Counter(one.language or "not certain" for one in found).items())),
        "entailed_by": measure.nli or models.embedder,
    }
    write_json(metrics, counts)
    say(
        f"measure: {len(found)} candidates in {len(sizes)} clusters of like ones; "
        f"{counts['with_secrets']} with secrets, {counts['with_personal_data']} with personal data"
    )


if __name__ == "__main__":
    run(main)
