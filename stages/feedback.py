"""data/feedback.sqlite + models/gguf -> data/feedback.jsonl + data/gold_candidates.jsonl: what users said, for people to judge.

Answers rated down become items of the review page, each with the place in the documentation that is nearest to its question. Answers
rated up become candidates for data/gold.jsonl, where their users agreed to have the texts kept. A person moves those that are right:
gold questions are for evaluation, so nothing adds to them by itself. Costs seconds; the same ratings give the same files.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from stages.evidence import key_facts, words
from stages.params import Models
from stages.program import run, say
from stages.records import MEND, Complaint, Gold, content_id, read_records, write_records
from stages.serving.feedback import Feedback, Rated
from stages.serving.settings import Serve
from stages.serving.sources import Found, Sources, read_passages


def complaint_of(rated: Rated, find: Callable[[str], Found]) -> Complaint | None:
    """The item of an answer rated down, with the nearest place; None where the user left no word that tells what is wrong."""
    about = rated.question or rated.comment
    if not about.strip():
        return None
    found = find(about)
    place = found.sources[0] if found.sources else None
    return Complaint(
        id=rated.answer_id,
        said_at=rated.said_at,
        model=rated.model,
        comment=rated.comment,
        question=rated.question or "",
        answer=rated.answer or "",
        chunk_id=place.passage_id if place else "",
        quote=place.quote if place else "",
        similarity=place.similarity if place else 0.0,
        covered=found.covered,
    )


def gold_of(rated: Rated, find: Callable[[str], Found]) -> Gold | None:
    """A gold question of an answer rated up, with the nearest evidence; None without its texts. Whether it is right, a person says."""
    if not rated.question or not rated.answer:
        return None
    found = find(rated.question)
    place = found.sources[0] if found.covered and found.sources else None
    return Gold(
        id=f"feedback-{content_id(rated.question, rated.answer)}",
        question=rated.question,
        answer=rated.answer,
        quote=place.quote if place else "",
        path=place.path if place else "",
        kind="asked" if place else "out_of_scope",
        key_facts=key_facts(rated.answer, place.quote, rated.question) if place else (),
    )


def by_model(ratings: Iterable[Rated]) -> str:
    """How many thumbs each model version got, as "docsmith/3 has 8 up and 4 down"."""
    counted = Counter((one.model, one.rating) for one in ratings)
    return ", ".join(
        f"{model} has {counted[model, 'up']} up and {counted[model, 'down']} down"
        for model in sorted({model for model, _ in counted})
    )


def main(
    models: Models,
    serve: Serve,
    feedback: Path = Path("data/feedback.sqlite"),
    release: Path = Path("models/gguf"),
    store: Path = Path("data/store"),
    gold: Path = Path("data/gold.jsonl"),
    items: Path = Path("data/feedback.jsonl"),
    gold_candidates: Path = Path("data/gold_candidates.jsonl"),
) -> None:
    if not feedback.exists():
        say(f"feedback: {feedback} is not there, so no answer has been rated yet")
        return
    ratings = Feedback(feedback).all()
    documentation = Sources(read_passages(release), models.embedder, store)

    def find(text: str) -> Found:
        found = documentation.find(text, -1.0)  # what is nearest helps a reviewer also where it is not near
        return Found(found.sources, any(source.similarity >= serve.min_similarity for source in found.sources))

    down = [one for one in ratings if one.rating == "down"]
    complaints = [item for one in down if (item := complaint_of(one, find))]
    write_records(items, complaints)
    known = {words(one.question) for one in read_records(gold, Gold, MEND)} if gold.exists() else set()
    liked = [one for rated in ratings if rated.rating == "up" and (one := gold_of(rated, find))]
    candidates = {one.id: one for one in liked if words(one.question) not in known}  # two users may like one answer
    write_records(gold_candidates, candidates.values())
    silent = len(down) - len(complaints)
    say(
        f"feedback: {by_model(ratings) or 'no ratings'} -> {len(complaints)} in {items} for make review"
        f"{f' ({silent} more without a word)' if silent else ''}, {len(candidates)} in {gold_candidates} to be read and moved to {gold}"
    )


if __name__ == "__main__":
    run(main)
