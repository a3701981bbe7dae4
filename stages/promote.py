"""models/gguf + models/adapter + data + reports/metrics -> a version of the model in MLflow's registry

Checks that the files are those that were scored, holds the scores against the gates, and asks the present champion the same
questions. A model that passes is registered as `challenger` and becomes `champion`, and the champion before it `previous`; one
without enough evidence stays challenger; one that fails a gate is not registered, unless --force gives a reason. Files are
registered by reference and never twice. --rollback makes `previous` champion again. Takes seconds, and minutes where the champion
must be asked.
"""

import contextlib
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from stages.files import sha256_of_file
from stages.llm import Store, request_key
from stages.models import load_embedder
from stages.pages import markdown_table, read_figures
from stages.params import Chat, Models, Tracking
from stages.program import BadInput, BadModelFile, Busy, LimitBroken, run, say
from stages.records import Answer, Question, Score, by_id, content_id, read_records
from stages.registry import CHALLENGER, CHAMPION, PREVIOUS, aliases, change, changing, connected, mend, version_named, version_of
from stages.registry.answers import kept_answers, log_table, table_of
from stages.registry.release import release_of
from stages.release import CARD_FILE, SUMS_FILE, Release, gguf_name, plain_text, read_release
from stages.scoreboard import Scoreboard, brief, in_order, read_scoreboard
from stages.scoring import Scoring, score_answers
from stages.systems import Asking, ask_llama, requests_for
from stages.tracking import experiment_of, folder_md5, git_commit
from stages.verdict import Gate, Gates, Verdict, champion_gate, judge, outcome_of

MAX_DESCRIPTION = 5000  # characters that MLflow's table of versions holds
SCORED = ("export", "answer", "evaluate")  # the stages between an adapter and its scores


def verify_checksums(gguf: Path) -> dict[str, str]:
    """The SHA-256 of each file that SHA256SUMS in `gguf` lists, by name. Raises BadModelFile for a file that differs or is unlisted."""
    sums = gguf / SUMS_FILE
    if not sums.is_file():
        raise BadModelFile(f"{sums} is missing, so the model files cannot be trusted. Build it with: dvc repro export")
    listed = {}
    for number, line in enumerate(sums.read_text(encoding="utf-8").splitlines(), start=1):
        expected, _, name = line.partition("  ")
        if len(expected) != 64 or not name or Path(name).name != name:
            raise BadModelFile(f"{sums}:{number}: {line!r} is not '<SHA-256>  <file name>'. Rebuild: dvc repro --force export")
        found = sha256_of_file(gguf / name)
        if found != expected:
            raise BadModelFile(
                f"{gguf / name}: its SHA-256 is {found}, SHA256SUMS says {expected}. Restore it with: dvc checkout"
            )
        listed[name] = expected
    if unlisted := sorted({path.name for path in gguf.glob("*.gguf")} - listed.keys()):
        raise BadModelFile(f"{gguf / unlisted[0]} is not listed in SHA256SUMS. Rebuild the folder with: dvc repro --force export")
    return listed


def read_hashes(lock: Path) -> dict[str, str]:
    """DVC's md5 of every output by path, from dvc.lock; {} where there is no dvc.lock.

    Raises BadInput when an input of export, answer or evaluate has changed since: then the scores are another model's.
    """
    import yaml

    stages = yaml.safe_load(lock.read_text(encoding="utf-8")).get("stages", {}) if lock.is_file() else {}
    hashes = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", ()) if "md5" in out}
    for name in SCORED:
        for used in stages.get(name, {}).get("deps", ()):
            if used.get("md5") != hashes.get(used["path"], used.get("md5")):
                raise BadInput(f"{used['path']} has changed since {name} ran, so the scores are another model's. Run: dvc repro")
    return hashes


def check_restored(path: Path, hashes: Mapping[str, str]) -> None:
    """Raises BadModelFile when the file or folder is not the one in dvc.lock, as after a git pull without a dvc pull."""
    expected = hashes.get(path.as_posix())
    if expected and path.exists() and (found := md5_of(path)) != expected:
        raise BadModelFile(
            f"{path}: its md5 is {found}, dvc.lock says {expected}, so the scores are not its own. Run: dvc pull {path}"
        )


def md5_of(path: Path) -> str:
    """DVC's md5 of a file or folder."""
    if path.is_dir():
        return folder_md5(path)
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


def check_scored(board: Scoreboard, release: Release, sums: Mapping[str, str], exam: Path) -> None:
    """Raises BadInput when the scoreboard was made with other model files, another chat or other questions than those that are here."""
    rescore = "so the scores are another run's. Run: dvc repro"
    for quant in release.quants:
        name = gguf_name(quant)
        if board.models.get(quant) != sums[name]:
            raise BadInput(
                f"{name} has SHA-256 {sums[name][:12]}…, the scored one {board.models.get(quant, 'none')[:12]}…, {rescore}"
            )
    if board.chat_sha256 != release.chat_sha256:
        raise BadInput(
            f"release.json has the chat {release.chat_sha256[:12]}…, questions were asked in {board.chat_sha256[:12]}…, {rescore}"
        )
    if (found := sha256_of_file(exam)) != board.questions_sha256:
        raise BadInput(f"{exam} has SHA-256 {found[:12]}…, the scored questions {board.questions_sha256[:12]}…, {rescore}")


def against_champion(
    champion: Any,
    mine: Sequence[Score],
    questions: Mapping[str, Question],
    store: Path,
    how: tuple[Gates, Asking, Scoring, Models],
) -> Gate:
    """The gate `champion`: this model's scores against those of the version `champion` on the same recall questions.

    Not enough evidence where the champion can neither be asked nor be known by the answers that were kept of it.
    """
    gates, answer, evaluate, models = how
    recall = {key: question for key, question in questions.items() if question.set == "recall"}
    try:
        theirs = champion_answers(champion, recall, store, answer)
    except BadModelFile as error:
        theirs = [one for one in kept_answers(champion.tags) if one.question_id in recall]
        said = f"it cannot be asked ({error}), so its kept answers to {len(theirs)} of {len(recall)} questions stand for it"
        say(f"promote: version {champion.version} is champion; {said}")
    scores = score_answers(recall, theirs, load_embedder(models.embedder), evaluate.pass_similarity) if theirs else []
    gate = champion_gate(mine, scores, gates, confidence=evaluate.confidence, resamples=evaluate.resamples, seed=evaluate.seed)
    if gate.outcome == "not measured":
        return Gate(
            "champion", "not enough evidence", f"version {champion.version} is champion and cannot be compared: {gate.reason}"
        )
    return gate


def champion_answers(champion: Any, questions: Mapping[str, Question], store: Path, answer: Asking) -> list[Answer]:
    """The answers of the version `champion` as it ships, from the store of replies, else from its file. Raises BadModelFile."""
    try:
        release = msgspec.json.decode(champion.tags.get("release", ""), type=Release)
    except msgspec.DecodeError:
        raise BadModelFile("its tags do not say how to ask it, since another version of Docsmith registered it") from None
    name, quant = gguf_name(release.serve), release.serve
    chat = Chat(release.system_prompt, release.max_new_tokens, release.context_tokens)
    messages = {key: plain_text(question.question, release.control_tokens) for key, question in questions.items()}
    requests = requests_for(messages, chat, champion.tags[f"sha256.{name}"])
    keyed = {request_key(request): request for request in requests.values()}
    with contextlib.closing(Store(store, "answer")) as kept:
        replies = kept.find(keyed)
        if len(replies) < len(keyed):
            with release_of(champion.tags) as folder:
                replies, tally = ask_llama(folder / name, keyed, kept, chat, answer)
            if tally.failed:
                reason = next(reply.failed for reply in replies.values() if reply.failed)
                raise LimitBroken(
                    f"the champion left {tally.failed} of {tally.requests} questions unanswered ({reason}). Run it again"
                )
    return [
        Answer(id=content_id(key, quant), question_id=key, system=quant, text=replies[request_key(request)].text.strip())
        for key, request in requests.items()
    ]


def version_tags(
    release: Release,
    board: Scoreboard,
    verdict: Verdict,
    sums: Mapping[str, str],
    hashes: Mapping[str, str],
    paths: Mapping[str, Path],
) -> dict[str, str]:
    """What a version says about itself: the verdict and what each gate found, the scores, the files' hashes and their origin."""
    tags = {"verdict": verdict.outcome, "verdict_reason": verdict.reason, "quant": release.serve}
    tags |= {f"gate.{gate.name}": f"{gate.outcome}: {gate.reason}" for gate in verdict.gates}
    for name, scores in board.sets.items():
        for measure in ("similarity", "abstained") if name == "out_of_scope" else ("similarity",):
            found = [(system, scores.systems[system].measures.get(measure)) for system in in_order(list(scores.systems))]
            tags[f"{measure}.{name}"] = ", ".join(f"{system} {brief(one)}" for system, one in found if one)
    tags |= {f"{name}_path": path.as_posix() for name, path in paths.items()}
    tags |= {f"{name}_md5": hashes[path.as_posix()] for name, path in paths.items() if path.as_posix() in hashes}
    tags |= {f"sha256.{name}": digest for name, digest in sums.items()}
    tags |= {
        "git_commit": git_commit(),
        "base": release.base,
        "base_sha256": release.base_sha256,
        "adapter_sha256": release.adapter_sha256,
        "chat_sha256": release.chat_sha256,
        "release": msgspec.json.encode(release).decode(),
    }
    return {key: value for key, value in tags.items() if value}


def run_of_version(client: Any, tracking: Tracking, trained_by: str, key: str) -> str:
    """The id of the MLflow run `trained_by`, which trained the adapter; where this store has it not, of one for the version `key`."""
    from mlflow.exceptions import MlflowException

    if trained_by:
        try:
            return str(client.get_run(trained_by).info.run_id)
        except MlflowException:  # trained on another machine, or the store was replaced
            say(f"promote: the training run {trained_by} is not in this MLflow store, so the version gets a run of its own")
    experiment = experiment_of(client, tracking.experiment)
    found = client.search_runs([experiment], f"tags.sha256sums = '{key}'")
    if found:
        return str(found[0].info.run_id)
    made = client.create_run(experiment, tags={"sha256sums": key}, run_name=f"{tracking.model_name}-{key[:8]}").info.run_id
    client.set_terminated(made)
    return str(made)


def log_datasets(client: Any, run_id: str, used: Mapping[str, tuple[Path, str]]) -> None:
    """Links datasets to the run, {context: (path, digest)}; one that it has already is linked once."""
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.data.sources import LocalArtifactDatasetSource  # type: ignore[attr-defined]
    from mlflow.entities import DatasetInput, InputTag

    inputs = []
    for context, (path, digest) in used.items():
        dataset = MetaDataset(LocalArtifactDatasetSource(str(path)), name=path.stem, digest=digest)  # type: ignore[abstract]
        inputs.append(DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", context)]))
    client.log_inputs(run_id, inputs)


def register(client: Any, tracking: Tracking, tags: dict[str, str], run_id: str, description: str) -> str:
    """The version with these tags: the one whose `sha256sums` is the same, with its tags brought up to date, or a new one."""
    import mlflow

    name = tracking.model_name
    if known := version_of(client, name, tags["sha256sums"]):
        version = str(known.version)
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, value)
    else:
        # one without a version is left where a promotion was killed in between
        experiment = experiment_of(client, tracking.experiment)
        left = client.search_logged_models([experiment], f"tags.sha256sums = '{tags['sha256sums']}'")
        model = left[0] if left else mlflow.create_external_model(name, source_run_id=run_id, tags=tags, model_type="gguf")
        with contextlib.redirect_stderr(io.StringIO()):  # MLflow's own lines about what the last line says
            version = str(mlflow.register_model(f"models:/{model.model_id}", name, tags=tags).version)
    client.update_model_version(name, version, description)
    return version


def described(gguf: Path, tags: Mapping[str, str]) -> str:
    """What MLflow shows of a version: the verdict, and the release's model card with the scores, which export could not know."""
    card = gguf / CARD_FILE
    text = card.read_text(encoding="utf-8").partition("\n---\n")[2].partition("\n## Scores\n")[0] if card.is_file() else ""
    scores = [[*key.split("."), tags[key]] for key in sorted(tags) if key.startswith(("similarity.", "abstained."))]
    table = markdown_table(["measure", "set", "means with intervals"], scores)
    return f"{tags['verdict']}: {tags['verdict_reason']}\n{text}\n## Scores\n\n{table}"[:MAX_DESCRIPTION]


def roll_back(client: Any, name: str) -> str:
    """Makes the version `previous` champion, and the champion `previous`. Returns the line that says so."""
    with changing(client, name) as turn:
        if turn.finished.keys() == {CHAMPION, PREVIOUS}:  # it was killed in the middle, and doing it again would undo it
            return rolled_back(turn.finished)
        named = aliases(client, name)
        champion, previous = named.get(CHAMPION), named.get(PREVIOUS)
        if not champion or not previous or champion == previous:
            raise BadInput(f"the model {name} has no previous champion to go back to. Nothing was changed")
        to = {CHAMPION: previous, PREVIOUS: champion}
        change(client, name, to, {champion: {"rolled_back": turn.at}, previous: {"champion_since": turn.at}})
        return rolled_back(to)


def rolled_back(to: Mapping[str, str]) -> str:
    """The line that says what a rollback did."""
    return f"version {to[CHAMPION]} is champion again, version {to[PREVIOUS]} is previous"


def main(
    promote: Gates,
    tracking: Tracking,
    answer: Asking,
    evaluate: Scoring,
    models: Models,
    rollback: bool = False,
    force: str = "",
    data: Path = Path("data"),
    metrics: Path = Path("reports/metrics"),
    gguf: Path = Path("models/gguf"),
    adapter: Path = Path("models/adapter"),
    lock: Path = Path("dvc.lock"),
) -> None:
    name = tracking.model_name
    if force and (rollback or not force.strip()):
        raise BadInput("--force needs a reason, which is kept with the version, and has no meaning beside --rollback")
    if rollback:
        with connected(tracking) as client:
            say(f"promote: {roll_back(client, name)}")
        return
    sums, release = verify_checksums(gguf), read_release(gguf)
    board = read_scoreboard(metrics / "evaluate.json")
    exam, answers = data / "exam.jsonl", data / "answers"
    hashes = read_hashes(lock)
    for path in (gguf, adapter, exam, answers, data / "scores.jsonl"):
        check_restored(path, hashes)
    check_scored(board, release, sums, exam)
    figures = {path.stem: read_figures(path) for path in metrics.glob("*.json")}
    verdict = judge(board, release.serve, promote, figures)
    questions = by_id(read_records(exam, Question))
    said = [one for path in sorted(answers.glob("*.jsonl")) for one in read_records(path, Answer)]
    scores = by_id(read_records(data / "scores.jsonl", Score))
    table = table_of(questions, said, scores)
    key = sha256_of_file(gguf / SUMS_FILE)
    with connected(tracking) as client:
        mend(client, name)
        own, champion = version_of(client, name, key), version_named(client, name, CHAMPION)
        refuse(own, champion, verdict, force)
        if champion is None or (own and own.version == champion.version):
            gate = Gate("champion", "not measured", "it is champion itself" if champion else "there is no champion yet")
        else:
            mine = [one for one in scores.values() if one.system == release.serve]
            gate = against_champion(champion, mine, questions, data / "store", (promote, answer, evaluate, models))
        verdict = Verdict(outcome_of([*verdict.gates, gate]), (*verdict.gates, gate))
        refuse(own, champion, verdict, force)
        paths = {"gguf": gguf, "adapter": adapter, "train": data / "train.jsonl", "exam": exam}
        tags = version_tags(release, board, verdict, sums, hashes, paths) | {"sha256sums": key}
        with changing(client, name) as turn:
            if (found := aliases(client, name).get(CHAMPION)) != (str(champion.version) if champion else None):
                raise Busy(f"version {found} became champion while this model was compared. Nothing was registered. Run it again")
            run_id = run_of_version(client, tracking, figures.get("train", {}).get("mlflow_run_id", ""), key)
            log_datasets(client, run_id, {"evaluation": (exam, hashes.get(exam.as_posix()) or board.questions_sha256[:36])})
            version = register(client, tracking, tags | log_table(client, run_id, table), run_id, described(gguf, tags))
            say(f"promote: {name_version(client, name, version, verdict, force, turn.at)}")


def refuse(own: Any | None, champion: Any | None, verdict: Verdict, force: str) -> None:
    """Raises LimitBroken for a model that may not be registered, or whose version may not change; nothing stops one with `force`."""
    if force:
        return
    if own and own.tags.get("rolled_back", "") > own.tags.get("champion_since", ""):
        raise LimitBroken(
            f"version {own.version} was rolled back at {own.tags['rolled_back']}. Nothing was changed; "
            "--force REASON makes it champion again"
        )
    if own and champion and own.version == champion.version and verdict.outcome != "promote":
        raise LimitBroken(
            f"version {own.version} is champion since an earlier run, and these scores do not support it "
            f"({verdict.outcome}): {verdict.reason}. Nothing was changed"
        )
    if verdict.outcome == "reject":
        raise LimitBroken(f"{verdict.reason}. Nothing was registered; --force REASON registers it all the same")


def name_version(client: Any, name: str, version: str, verdict: Verdict, force: str, now: str) -> str:
    """Points the aliases to `version` as the verdict allows, and returns the line that says so."""
    champion = aliases(client, name).get(CHAMPION)
    if champion == version:
        return f"version {version} is champion already: {verdict.reason}"
    if verdict.outcome != "promote" and not force:
        change(client, name, {CHALLENGER: version}, {})
        return f"version {version} is challenger; it is not champion ({verdict.outcome}): {verdict.reason}"
    change(
        client,
        name,
        {CHALLENGER: version, CHAMPION: version} | ({PREVIOUS: champion} if champion else {}),
        {version: {"champion_since": now} | ({"forced": force.strip()} if verdict.outcome != "promote" else {})},
    )
    became = f"version {version} is champion{f', version {champion} is previous' if champion else ''}"
    return (
        f"{became}: {verdict.reason}"
        if verdict.outcome == "promote"
        else f"{became}, forced ({verdict.outcome}): {verdict.reason}"
    )


if __name__ == "__main__":
    run(main)
