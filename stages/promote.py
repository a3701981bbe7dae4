"""models/gguf + models/adapter + reports/metrics -> a version of the model in MLflow's registry

Checks the files against SHA256SUMS, registers them by reference (nothing is copied) and names the version `challenger`; where the
report's verdict is to promote, also `champion`, and the champion before it `previous`. The same files never make a second version.
Takes a few seconds.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from stages.files import sha256_of_file
from stages.params import Tracking
from stages.program import BadInput, BadModelFile, run, say
from stages.release import SUMS_FILE, Release, read_release
from stages.scoreboard import Scoreboard, read_scoreboard
from stages.tracking import connect, folder_md5, git_commit, tracking_uri, without_secrets
from stages.verdict import Gates, Verdict, judge

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


def check_restored(folder: Path, hashes: dict[str, str]) -> None:
    """Raises BadModelFile when `folder` is not the one in dvc.lock, as after a git pull without a dvc pull."""
    expected = hashes.get(folder.as_posix())
    if expected and folder.is_dir() and (found := folder_md5(folder)) != expected:
        raise BadModelFile(
            f"{folder}: its md5 is {found}, dvc.lock says {expected}, so the scores are not its own. Run: dvc pull {folder}"
        )


def version_tags(release: Release, scores: Scoreboard, verdict: Verdict, sums: dict[str, str]) -> dict[str, str]:
    """What a version says about itself: the files' hashes, what they were made from, and the numbers that judged them."""
    systems = {system: scores.recall.systems[system].similarity.mean for system in ("base", "tuned", release.serve)}
    return {
        "quant": release.serve,
        "base": release.base,
        "base_sha256": release.base_sha256,
        "adapter_sha256": release.adapter_sha256,
        "chat_sha256": release.chat_sha256,
        "verdict": verdict.outcome,
        "verdict_reason": verdict.reason,
        **{f"sha256.{name}": digest for name, digest in sums.items()},
        **{f"recall_similarity.{system}": f"{mean:.4f}" for system, mean in systems.items()},
    }


def register(client: Any, tracking: Tracking, tags: dict[str, str], run_id: str | None) -> str:
    """The version with these tags: the one whose `sha256sums` is the same, with its tags brought up to date, or a new one."""
    import mlflow

    name = tracking.model_name
    for version in client.search_model_versions(f"name = '{name}' and tag.sha256sums = '{tags['sha256sums']}'"):
        for key, value in tags.items():
            client.set_model_version_tag(name, str(version.version), key, value)
        return str(version.version)
    model = mlflow.create_external_model(name, source_run_id=run_id, tags=tags, model_type="gguf")
    return str(mlflow.register_model(f"models:/{model.model_id}", name, tags=tags).version)


def name_version(client: Any, name: str, version: str, verdict: Verdict) -> str:
    """Sets the aliases that `verdict` allows, and returns the line that says so."""
    aliases = {alias: str(number) for alias, number in client.get_registered_model(name).aliases.items()}
    client.set_registered_model_alias(name, "challenger", version)
    champion = aliases.get("champion")
    if verdict.outcome != "promote":
        if champion == version:
            return f"version {version} is champion since an earlier run, and these scores do not support it: {verdict.reason}"
        return f"version {version} is challenger; it is not champion ({verdict.outcome}): {verdict.reason}"
    if champion == version:
        return f"version {version} is champion already: {verdict.reason}"
    if champion:
        client.set_registered_model_alias(name, "previous", champion)
    client.set_registered_model_alias(name, "champion", version)
    return f"version {version} is champion{f', version {champion} is previous' if champion else ''}: {verdict.reason}"


@contextlib.contextmanager
def connected(tracking: Tracking) -> Iterator[Any]:
    """An MlflowClient on the store of `tracking`. What the store refuses becomes a BadInput that names it."""
    from mlflow.exceptions import MlflowException

    try:
        yield connect(tracking)
    except MlflowException as error:
        reason = without_secrets(str(error).splitlines()[0])
        where = without_secrets(tracking_uri(tracking))
        raise BadInput(f"MLflow at {where}: {reason}. Check tracking in params.yaml") from None


def training_run(client: Any, train_metrics: Path) -> str | None:
    """The MLflow run that trained the adapter, where train's metrics name one that this store knows."""
    from mlflow.exceptions import MlflowException

    named = msgspec.json.decode(train_metrics.read_bytes()) if train_metrics.is_file() else {}
    try:
        return client.get_run(named["mlflow_run_id"]).info.run_id if named.get("mlflow_run_id") else None
    except MlflowException:  # trained on another machine, or the store was replaced: the version stands without the link
        say(f"promote: the training run {named['mlflow_run_id']} is not in this MLflow store, so the version is not linked to it")
        return None


def main(
    promote: Gates,
    tracking: Tracking,
    metrics: Path = Path("reports/metrics"),
    gguf: Path = Path("models/gguf"),
    adapter: Path = Path("models/adapter"),
    lock: Path = Path("dvc.lock"),
) -> None:
    sums = verify_checksums(gguf)
    release = read_release(gguf)
    scores = read_scoreboard(metrics / "evaluate.json")
    verdict = judge(scores, release.serve, promote)
    hashes = read_hashes(lock)
    for folder in (gguf, adapter):
        check_restored(folder, hashes)
    tags = version_tags(release, scores, verdict, sums) | {"sha256sums": sha256_of_file(gguf / SUMS_FILE)}
    for name, folder in (("gguf", gguf), ("adapter", adapter)):
        tags[f"{name}_path"] = folder.as_posix()
        if folder.as_posix() in hashes:
            tags[f"{name}_md5"] = hashes[folder.as_posix()]
    if commit := git_commit():
        tags["git_commit"] = commit
    with connected(tracking) as client:
        version = register(client, tracking, tags, training_run(client, metrics / "train.json"))
        say(f"promote: {name_version(client, tracking.model_name, version, verdict)}")


if __name__ == "__main__":
    run(main)
