import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from conftest import BASE, MODELS
from crafted_gguf import STRING, TEMPLATE, gguf, text, value

from stages import registry
from stages.chats import chat_sha256
from stages.files import sha256_of_file
from stages.llm import Reply, Store, request_key
from stages.models import find_model
from stages.models.gguf import read_gguf
from stages.params import Chat, Tracking
from stages.program import BadInput, BadModelFile, Busy, LimitBroken
from stages.promote import champion_answers, main, md5_of, verify_checksums
from stages.records import Answer, Question, Score, content_id, write_records
from stages.registry import changing
from stages.registry.answers import kept_answers
from stages.registry.release import release_of
from stages.release import Release, read_release, write_release
from stages.scoreboard import Comparison, Interval, Scoreboard, SetScores, SystemScores
from stages.scoring import Scoring
from stages.systems import Asking, requests_for
from stages.verdict import Gates

CHAT_SHA256, OTHER_CHAT = chat_sha256(TEMPLATE, "Be brief."), chat_sha256(TEMPLATE, "Be long.")
GATES = Gates(
    min_recall_gain=0.0,
    max_gguf_loss=0.03,
    max_general_loss=0.03,
    max_abstention_loss=0.1,
    max_champion_loss=0.05,
    min_questions=10,
)
ASKING = Asking(systems=(), batch_tokens=999, concurrency=2, timeout_s=60)
SCORING = Scoring(confidence=0.95, resamples=200, seed=1, pass_similarity=0.7)
PARAMS = {"promote": GATES, "answer": ASKING, "evaluate": SCORING, "models": MODELS}
GAIN = Interval(0.142, 0.11, 0.17)
UNSURE = Interval(0.02, -0.01, 0.05)
WORSE = Interval(-0.1, -0.2, -0.05)
COLORS = ("red", "blue", "green", "black", "white", "pink", "brown", "grey", "gold", "violet", "orange", "silver")
QUESTIONS = [
    Question(
        id=f"q{place:02}",
        set="recall",
        section_id=f"s{place}",
        type="factual",
        question=f"Which color has lamp {place}?",
        reference=f"Lamp {place} shines in {color}.",
    )
    for place, color in enumerate(COLORS)
]
RIGHT = {question.id: question.reference for question in QUESTIONS}
WRONG = {question.id: "I like bananas." for question in QUESTIONS}


class Project(NamedTuple):
    """The folder of a finished pipeline, and the store that it promotes to."""

    folder: Path
    tracking: Tracking
    client: Any

    def path(self, name: str) -> Path:
        return self.folder / name

    def promote(self, force: str = "", rollback: bool = False) -> None:
        main(
            tracking=self.tracking,
            force=force,
            rollback=rollback,
            data=Path("data"),
            **PARAMS,  # type: ignore[arg-type]
        )

    def aliases(self) -> dict[str, str]:
        return registry.aliases(self.client, self.tracking.model_name)

    def versions(self) -> list[Any]:
        found = self.client.search_model_versions(f"name = '{self.tracking.model_name}'")
        return sorted(found, key=lambda version: int(version.version))

    def is_at_rest(self) -> bool:
        """Nothing is locked."""
        return not self.client.search_registered_models(f"name = '{self.tracking.model_name}.lock'")


def model_file(weights: str) -> bytes:
    return gguf({"weights": value("docsmith.weights", STRING, text(weights))})


def write_model(folder: Path, weights: str = "weights", says: dict[str, str] = RIGHT, similarity: float = 0.9) -> None:
    """Model files, questions, answers, scores and metrics in `folder`. The store of replies keeps what the shipped file `says`."""
    for name in ("models/gguf", "models/adapter", "reports/metrics", "data/answers"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "models/adapter/adapter_config.json").write_text("{}")
    models = folder / "models/gguf"
    (models / "docsmith-q8_0.gguf").write_bytes(model_file(weights))
    release = Release(
        base="pkg:base",
        base_sha256="b1",
        adapter_sha256="a1",
        chat_sha256=CHAT_SHA256,
        system_prompt="Be brief.",
        control_tokens=("<|end|>",),
        quants=("q8_0",),
        serve="q8_0",
        context_tokens=64,
        max_new_tokens=8,
    )
    (models / "README.md").write_text("---\nlicense: x\n---\n\n# Card of the lamps\n\n## Scores\n\nthose of MLflow\n")
    write_release(models, release)
    write_records(folder / "data/exam.jsonl", QUESTIONS)
    (folder / "data/train.jsonl").write_text("")
    scores = []
    for system in ("base", "tuned", "q8_0"):
        answers = [
            Answer(
                id=content_id(one.id, system),
                question_id=one.id,
                system=system,
                text=says[one.id] if system == "q8_0" else system,
            )
            for one in QUESTIONS
        ]
        write_records(folder / f"data/answers/{system}.jsonl", answers)
        scores += [score_of(answer, similarity) for answer in answers]
    write_records(folder / "data/scores.jsonl", scores)
    served = models / "docsmith-q8_0.gguf"
    write_metrics(
        folder,
        validate={"pairs": 30},
        split={"pairs": 30},
        train={"mlflow_run_id": ""},
        export={
            "files": {served.name: {"quant": "q8_0", "sha256": sha256_of_file(served)}},
            "merged_sha256": "m1",
            "chat_sha256": CHAT_SHA256,
        },
    )
    write_board(folder)
    store = Store(folder / "data/store", "answer")
    asked = requests_for(
        {question.id: question.question for question in QUESTIONS}, Chat("Be brief.", 8, 64), sha256_of_file(served)
    )
    for key, request in asked.items():
        store.keep(request_key(request), Reply(says[key]))
    store.close()


def score_of(answer: Answer, similarity: float) -> Score:
    section = next(question.section_id for question in QUESTIONS if question.id == answer.question_id)
    return Score(
        id=answer.id, question_id=answer.question_id, set="recall", section_id=section, type="factual", system=answer.system,
        similarity=similarity, rouge_l=0.5, key_facts=None, evidence=None, judge=None, abstained=0.0, passed=1.0,
    )  # fmt: skip


def write_metrics(folder: Path, **figures: Any) -> None:
    for stage, values in figures.items():
        (folder / f"reports/metrics/{stage}.json").write_bytes(msgspec.json.encode(values))


def write_board(folder: Path, gain: Interval = GAIN, **changed: Any) -> None:
    """A scoreboard of the files in `folder`, with `changed` fields."""

    def comparison(interval: Interval) -> Comparison:
        return Comparison(n=12, sections=12, gains={"similarity": interval}, minimum_effect=None, won=3, lost=1, p=0.6)

    one = SystemScores(n=12, empty=0, measures={"similarity": Interval(0.6821, 0.65, 0.7), "rouge_l": Interval(0.3, 0.2, 0.4)})
    tuned = msgspec.structs.replace(one, measures={"similarity": Interval(0.8241, 0.8, 0.85)})
    recall = SetScores(
        questions=12,
        sections=12,
        systems={"base": one, "q8_0": one, "tuned": tuned},
        comparisons={"tuned-base": comparison(gain), "q8_0-tuned": comparison(Interval(-0.011, -0.02, 0.004))},
        by_type={},
    )
    board = Scoreboard(
        confidence=0.95,
        seed=1,
        sets={"recall": recall},
        models={"base": "b1", "tuned": "m1", "q8_0": sha256_of_file(folder / "models/gguf/docsmith-q8_0.gguf")},
        questions_sha256=sha256_of_file(folder / "data/exam.jsonl"),
        chat_sha256=CHAT_SHA256,
        leaks=(),
    )
    write_metrics(folder, evaluate=msgspec.structs.replace(board, **changed))


def write_lock(scored: str = "") -> tuple[str, str]:
    """dvc.lock of the current folder; `scored` is the hash that answer saw. Returns the hashes of GGUF and adapter folder."""
    gguf, adapter, exam, train = (
        md5_of(Path(path)) for path in ("models/gguf", "models/adapter", "data/exam.jsonl", "data/train.jsonl")
    )
    Path("dvc.lock").write_text(
        f"""schema: '2.0'
stages:
  split: {{cmd: s, outs: [{{path: data/train.jsonl, md5: {train}}}]}}
  exam: {{cmd: x, outs: [{{path: data/exam.jsonl, md5: {exam}}}]}}
  train: {{cmd: t, outs: [{{path: models/adapter, hash: md5, md5: {adapter}}}]}}
  export: {{cmd: e, deps: [{{path: models/adapter, md5: {adapter}}}], outs: [{{path: models/gguf, md5: {gguf}}}]}}
  answer: {{cmd: a, deps: [{{path: models/gguf, md5: {scored or gguf}}}, {{path: stages/answer.py, md5: '44'}}]}}
"""
    )
    return gguf, adapter


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(registry, "LOOK_AGAIN_S", 0.05)
    write_model(tmp_path)
    return tmp_path


def project_at(folder: Path, uri: str) -> Project:
    from mlflow import MlflowClient

    name = f"docsmith-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"  # tests share a server
    return Project(folder, Tracking(uri=uri, experiment=name, model_name=name), MlflowClient(uri, uri))


@pytest.fixture
def local(folder: Path, fresh_store: Path) -> Project:
    """A project with the store that is the default: an SQLite file of its own."""
    shutil.copy(fresh_store, folder / "models/mlflow.db")
    return project_at(folder, f"sqlite:///{folder}/models/mlflow.db")


@pytest.fixture(params=["SQLite", "server"])
def project(request: pytest.FixtureRequest, folder: Path) -> Project:
    """A project with an SQLite store, and one with a real MLflow server."""
    if request.param == "server":
        return project_at(folder, request.getfixturevalue("server").uri)
    return request.getfixturevalue("local")


# ---- which version is champion


def test_promotion_a_second_champion_and_rollback(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(project.folder, says=WRONG)
    project.promote()
    assert "promote: version 1 is champion: tuned - base on 12 recall questions is 0.142" in capsys.readouterr().out
    assert project.aliases() == {"challenger": "1", "champion": "1"}
    with pytest.raises(BadInput, match="has no previous champion to go back to. Nothing was changed"):
        project.promote(rollback=True)
    write_model(project.folder, "better weights")
    project.promote()
    assert "version 2 is champion, version 1 is previous" in capsys.readouterr().out
    assert project.aliases() == {"challenger": "2", "champion": "2", "previous": "1"}
    (first, second) = project.versions()
    assert first.tags["gate.champion"] == "not measured: there is no champion yet"
    assert second.tags["gate.champion"].startswith("passed: this model - champion on 12 recall questions is 0.")
    project.promote()
    assert "version 2 is champion already" in capsys.readouterr().out
    project.promote(rollback=True)
    assert "version 1 is champion again, version 2 is previous" in capsys.readouterr().out
    assert project.aliases() == {"challenger": "2", "champion": "1", "previous": "2"}
    (first, second) = project.versions()
    assert second.tags["rolled_back"] == first.tags["champion_since"] > second.tags["champion_since"]
    with pytest.raises(
        LimitBroken, match=f"version 2 was rolled back at {re.escape(second.tags['rolled_back'])}. Nothing was changed"
    ):
        project.promote()
    project.promote(rollback=True)
    assert project.aliases() == {"challenger": "2", "champion": "2", "previous": "1"}
    project.promote()
    assert "version 2 is champion already" in capsys.readouterr().out
    assert len(project.versions()) == 2 and project.is_at_rest()


def test_a_model_that_is_worse_than_the_champion_is_refused_though_it_beats_base(local: Project) -> None:
    local.promote()
    write_model(local.folder, "other weights", similarity=0.9)  # the champion's answers are the references: 1.0
    with pytest.raises(LimitBroken, match=r"this model - champion on 12 recall questions is -0\.100 .*Nothing was registered"):
        local.promote()
    assert local.aliases() == {"challenger": "1", "champion": "1"} and len(local.versions()) == 1


def test_a_failed_gate_registers_nothing_unless_a_reason_forces_it(local: Project, capsys: pytest.CaptureFixture[str]) -> None:
    write_board(local.folder, WORSE)
    with pytest.raises(LimitBroken, match="is -0.100 .* not above 0.000. Nothing was registered; --force REASON"):
        local.promote()
    for empty in (" ", "\t\n"):
        with pytest.raises(BadInput, match="--force needs a reason"):
            local.promote(force=empty)
    assert local.client.search_registered_models() == [] and local.client.search_runs(["0"]) == []
    local.promote(force=" the demo is tonight ")
    assert "version 1 is champion, forced (reject): tuned - base" in capsys.readouterr().out
    (version,) = local.versions()
    assert (version.tags["forced"], version.tags["verdict"]) == ("the demo is tonight", "reject")
    assert version.tags["gate.recall"].startswith("failed: tuned - base on 12 recall questions is -0.100")
    with pytest.raises(BadInput, match="no meaning beside --rollback"):
        local.promote(force="x", rollback=True)


def test_a_model_without_evidence_is_challenger_beside_the_champion(local: Project, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(local.folder, says=WRONG)
    local.promote()
    write_model(local.folder, "other weights")
    write_board(local.folder, UNSURE)
    local.promote()
    assert "version 2 is challenger; it is not champion (not enough evidence): tuned - base" in capsys.readouterr().out
    assert local.aliases() == {"challenger": "2", "champion": "1"}
    write_board(local.folder)  # scored again, on more questions: the same version, with the new verdict
    local.promote()
    assert local.aliases() == {"challenger": "2", "champion": "2", "previous": "1"}
    assert [version.tags["verdict"] for version in local.versions()] == ["promote", "promote"]


@pytest.mark.parametrize(("gain", "outcome"), [(WORSE, "reject"), (UNSURE, "not enough evidence")])
def test_a_champion_whose_new_scores_do_not_support_it_stays_and_is_named(local: Project, gain: Interval, outcome: str) -> None:
    local.promote()
    (before,) = local.versions()
    write_board(local.folder, gain)
    with pytest.raises(
        LimitBroken, match=rf"version 1 is champion since .* do not support it \({outcome}\): .* Nothing was changed"
    ):
        local.promote()
    (after,) = local.versions()
    assert after.tags == before.tags and local.aliases() == {"challenger": "1", "champion": "1"}


# ---- the champion answers the same questions


def test_a_champion_without_replies_is_asked_by_its_own_file_as_it_ships(tmp_path: Path, local: Project) -> None:
    old, weights = tmp_path / "old", find_model(BASE)
    old.mkdir()
    (old / "docsmith-q8_0.gguf").symlink_to(weights)
    fields = msgspec.structs.asdict(read_release(local.path("models/gguf"))) | {
        "system_prompt": "Answer in one word.",
        "chat_sha256": chat_sha256(read_gguf(weights).values["tokenizer.chat_template"], "Answer in one word."),
        "context_tokens": 256,
    }
    release = Release(**fields)
    write_release(old, release)
    sums = verify_checksums(old)
    tags = {f"sha256.{name}": digest for name, digest in sums.items()} | {
        "release": msgspec.json.encode(release).decode(), "quant": "q8_0", "gguf_path": str(old),
        "sha256sums": sha256_of_file(old / "SHA256SUMS"),
    }  # fmt: skip

    class Version(NamedTuple):
        tags: dict[str, str]

    asked = {"q": msgspec.structs.replace(QUESTIONS[0], id="q", question="What is the capital of France?")}
    (answer,) = champion_answers(Version(tags), asked, tmp_path / "replies", ASKING)
    assert "Paris" in answer.text and (answer.question_id, answer.system) == ("q", "q8_0")
    (old / "docsmith-q8_0.gguf").unlink()  # asked again, it answers from the store of replies
    assert champion_answers(Version(tags), asked, tmp_path / "replies", ASKING) == [answer]
    with pytest.raises(BadModelFile, match=r"docsmith-q8_0.gguf is missing .*; DVC did not know its files when"):
        champion_answers(Version(tags), asked, tmp_path / "other", ASKING)


def dvc(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *command], check=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"})


def test_files_of_a_version_come_from_where_they_were_then_from_dvcs_cache_then_from_its_remote(local: Project) -> None:
    dvc("init", "--no-scm", "-q")
    dvc("config", "core.site_cache_dir", ".dvc/site")
    dvc("remote", "add", "-q", "-d", "store", str(local.path("remote")))
    local.path("models/gguf/docsmith-q4_k_m.gguf").write_text("not what is served")
    dvc("add", "-q", "models/gguf")
    dvc("push", "-q")
    sums = Path("models/gguf/SHA256SUMS")
    tags = {
        "gguf_path": "models/gguf",
        "gguf_md5": md5_of(Path("models/gguf")),
        "sha256sums": sha256_of_file(sums),
        "quant": "q8_0",
    }
    with release_of(tags) as folder:
        assert folder == Path("models/gguf")
    write_model(local.folder, "other weights")
    for is_cached in (True, False):
        if not is_cached:
            shutil.rmtree(".dvc/cache")
        with release_of(tags) as folder:
            assert (folder / "docsmith-q8_0.gguf").read_bytes() == model_file("weights")
            assert sorted(path.name for path in folder.iterdir()) == ["SHA256SUMS", "docsmith-q8_0.gguf", "release.json"]
        assert not folder.exists()
    weights = next(
        path for path in Path(".dvc/cache").rglob("*") if path.is_file() and path.read_bytes() == model_file("weights")
    )
    weights.chmod(0o644)
    weights.write_text("weightz")
    weights.chmod(0o444)  # DVC trusts what is read-only
    with pytest.raises(BadModelFile, match=r"models/gguf holds other files; .*docsmith-q8_0.gguf is damaged"), release_of(tags):
        pass
    shutil.rmtree(".dvc/cache")
    shutil.rmtree("remote")
    with pytest.raises(BadModelFile, match="DVC has them neither in its cache nor in a remote"), release_of(tags):
        pass


def test_a_champion_whose_files_are_gone_is_compared_by_its_kept_answers(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.promote()
    (version,) = project.versions()
    assert {answer.question_id: answer.text for answer in kept_answers(version.tags)} == RIGHT
    write_model(project.folder, "other weights")
    shutil.rmtree("data/store")
    with pytest.raises(LimitBroken, match="this model - champion on 12 recall questions is -0.100"):
        project.promote()
    assert "its kept answers to 12 of 12 questions stand for it" in capsys.readouterr().out
    project.client.delete_model_version_tag(project.tracking.model_name, "1", "release")  # as of an older Docsmith
    project.client.log_text(version.run_id, '{"columns": [], "data": []}', "answers.json")  # as of another version of its run
    project.promote()
    said = capsys.readouterr().out
    assert "its tags do not say how to ask it" in said and "its kept answers to 0 of 12" in said
    assert "version 2 is challenger; it is not champion (not enough evidence): version 1 is champion and cannot" in said


# ---- what a version says


def test_a_version_has_its_lineage_its_scores_and_every_gate_in_tags(local: Project) -> None:
    gguf_md5, adapter_md5 = write_lock()
    local.promote()
    (version,) = local.versions()
    release = Path("models/gguf/release.json")
    told = {key: value for key, value in version.tags.items() if not key.startswith("gate.")}
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", told.pop("champion_since"))
    assert told.pop("answers") == f"runs:/{version.run_id}/answers.json" and len(told.pop("answers_sha256")) == 64
    assert told.pop("verdict_reason").startswith("tuned - base on 12 recall questions is 0.142 (95 % 0.110 to 0.170), all above")
    assert msgspec.json.decode(told.pop("release"), type=Release) == read_release(Path("models/gguf"))
    assert told == {
        "quant": "q8_0", "base": "pkg:base", "base_sha256": "b1", "adapter_sha256": "a1", "chat_sha256": CHAT_SHA256, "verdict": "promote",
        "gguf_path": "models/gguf", "gguf_md5": gguf_md5, "adapter_path": "models/adapter", "adapter_md5": adapter_md5,
        "train_path": "data/train.jsonl", "train_md5": hashlib.md5(b"").hexdigest(),
        "exam_path": "data/exam.jsonl", "exam_md5": hashlib.md5(Path("data/exam.jsonl").read_bytes()).hexdigest(),
        "sha256sums": sha256_of_file(Path("models/gguf/SHA256SUMS")), "sha256.release.json": sha256_of_file(release),
        "sha256.README.md": sha256_of_file(release.with_name("README.md")),
        "sha256.docsmith-q8_0.gguf": hashlib.sha256(model_file("weights")).hexdigest(),
        "similarity.recall": "base 0.682 [0.650 to 0.700], tuned 0.824 [0.800 to 0.850], q8_0 0.682 [0.650 to 0.700]",
    }  # fmt: skip
    gates = {key.removeprefix("gate."): value.partition(":")[0] for key, value in version.tags.items() if key.startswith("gate.")}
    assert list(sorted(gates)) == [
        "abstention",
        "champion",
        "data",
        "files",
        "general",
        "gguf",
        "leaks",
        "questions",
        "recall",
        "secrets",
    ]
    assert (gates["recall"], gates["gguf"], gates["general"], gates["champion"]) == (
        "passed",
        "passed",
        "not measured",
        "not measured",
    )
    assert version.source.startswith("models:/m-")
    assert "# Card of the lamps" in version.description and "license: x" not in version.description
    assert "| similarity | recall | base 0" in version.description and "those of MLflow" not in version.description
    assert version.description.startswith("promote: tuned - base on 12 recall questions is 0.142")
    assert not list(Path().rglob("mlruns/**/*.gguf")), "model files are registered by reference"


def test_the_run_that_trained_the_model_has_its_answers_as_a_table_once_and_the_questions_as_a_dataset(project: Project) -> None:
    experiment = registry.connect(project.tracking) and project.client.get_experiment_by_name(project.tracking.experiment)
    run_id = project.client.create_run(experiment.experiment_id).info.run_id
    write_metrics(project.folder, train={"mlflow_run_id": run_id})
    for _ in range(2):
        project.promote()
    (version,) = project.versions()
    assert version.run_id == run_id
    run = project.client.get_run(run_id)
    (listed,) = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert listed["type"] == "table"
    table = project.client.load_table(experiment.experiment_id, listed["path"], run_ids=[run_id])
    assert len(table) == 36
    assert table.iloc[:3][["question", "reference", "system", "answer", "similarity"]].values.tolist() == [
        ["Which color has lamp 0?", "Lamp 0 shines in red.", "base", "base", 0.9],
        ["Which color has lamp 0?", "Lamp 0 shines in red.", "tuned", "tuned", 0.9],
        ["Which color has lamp 0?", "Lamp 0 shines in red.", "q8_0", "Lamp 0 shines in red.", 0.9],
    ]
    (linked,) = run.inputs.dataset_inputs
    assert (linked.dataset.name, linked.tags[0].value) == ("exam", "evaluation")


def test_a_version_gets_a_run_of_its_own_where_the_store_does_not_know_the_training(
    local: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    write_metrics(local.folder, train={"mlflow_run_id": "f" * 32})
    for _ in range(2):
        local.promote()
    assert "is not in this MLflow store" in capsys.readouterr().out
    experiment = local.client.get_experiment_by_name(local.tracking.experiment)
    (run,) = local.client.search_runs([experiment.experiment_id])
    (version,) = local.versions()
    assert version.run_id == run.info.run_id and run.info.status == "FINISHED"


# ---- files and scores that do not belong together


def test_a_damaged_model_file_registers_nothing(local: Project) -> None:
    Path("models/gguf/docsmith-q8_0.gguf").write_text("weightz")
    found, listed = (hashlib.sha256(text).hexdigest() for text in (b"weightz", model_file("weights")))
    with pytest.raises(BadModelFile, match=f"docsmith-q8_0.gguf: its SHA-256 is {found}, SHA256SUMS says {listed}"):
        local.promote(force="never mind")
    assert local.client.search_registered_models() == []


@pytest.mark.parametrize("fault", ["swapped file", "another chat", "other questions", "a scoreboard of another run"])
def test_scores_of_other_files_another_chat_or_other_questions_are_refused_even_with_force(local: Project, fault: str) -> None:
    board = Path("reports/metrics/evaluate.json").read_bytes()
    expected = "docsmith-q8_0.gguf has SHA-256 .* the scored one .*Run: dvc repro"
    if fault == "swapped file":  # with a list of checksums that fits it
        write_model(local.folder, "weights of somebody else")
        Path("reports/metrics/evaluate.json").write_bytes(board)
    elif fault == "another chat":
        release = read_release(Path("models/gguf"))
        write_release(Path("models/gguf"), msgspec.structs.replace(release, system_prompt="Be long.", chat_sha256=OTHER_CHAT))
        expected = f"release.json has the chat {OTHER_CHAT[:12]}…, questions were asked in {CHAT_SHA256[:12]}…"
    elif fault == "other questions":
        write_records(local.path("data/exam.jsonl"), QUESTIONS[1:])
        expected = "exam.jsonl has SHA-256 .* the scored questions"
    else:
        write_board(local.folder, models={"base": "b1", "tuned": "m2", "q8_0": "0" * 64})
    with pytest.raises(BadInput, match=expected):
        local.promote(force="never mind")
    assert local.client.search_registered_models() == []


@pytest.mark.parametrize(
    ("sums", "fault"),
    [
        ("", "docsmith-q8_0.gguf is not listed in SHA256SUMS"),
        ("deadbeef  docsmith-q8_0.gguf\n", "is not '<SHA-256>  <file name>'"),
        ("0" * 64 + "  ../secret\n", "is not '<SHA-256>  <file name>'"),
    ],
)
def test_a_list_of_checksums_that_does_not_cover_the_files_is_refused(local: Project, sums: str, fault: str) -> None:
    Path("models/gguf/SHA256SUMS").write_text(sums)
    with pytest.raises(BadModelFile, match=fault):
        local.promote()


def test_a_folder_without_the_file_to_serve_is_refused(local: Project) -> None:
    Path("models/gguf/docsmith-q8_0.gguf").unlink()
    Path("models/gguf/SHA256SUMS").write_text("")
    with pytest.raises(BadModelFile, match="release.json is missing or not in SHA256SUMS"):
        local.promote()


def test_missing_or_empty_scores_register_nothing(local: Project) -> None:
    Path("reports/metrics/evaluate.json").write_text("{}")
    with pytest.raises(BadInput, match="is not a scoreboard"):
        local.promote()
    Path("reports/metrics/evaluate.json").unlink()
    with pytest.raises(BadInput, match="evaluate.json is missing"):
        local.promote()
    assert local.client.search_registered_models() == []


def test_model_files_that_changed_after_they_were_scored_are_refused(local: Project) -> None:
    write_lock(scored="55.dir")
    with pytest.raises(BadInput, match="models/gguf has changed since answer ran"):
        local.promote()


def test_files_that_dvc_did_not_restore_are_refused(local: Project) -> None:
    write_lock()
    write_model(local.folder, "weights of the commit before")
    with pytest.raises(BadModelFile, match=r"models/gguf: its md5 is \w+.dir, dvc.lock says \w+.dir.*Run: dvc pull models/gguf"):
        local.promote()
    assert local.client.search_registered_models() == []


def test_the_hash_of_a_file_or_folder_is_the_one_that_dvc_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("models/b.txt", "models/a/é.txt", "models/a b.txt", "one.txt"):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    dvc("init", "--no-scm", "-q")
    dvc("config", "core.site_cache_dir", ".dvc/site")
    dvc("add", "-q", "models", "one.txt")
    assert f"md5: {md5_of(Path('models'))}\n" in Path("models.dvc").read_text()
    assert f"md5: {md5_of(Path('one.txt'))}\n" in Path("one.txt.dvc").read_text()


def test_a_store_that_refuses_is_named_in_one_line(local: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "carrier-pigeon://roof")
    with pytest.raises(BadInput, match="MLflow at carrier-pigeon://roof: .* Check tracking in params.yaml"):
        local.promote()


# ---- crashes and company

WRITES = (  # to the registry, as SQL and as requests to a server
    r"(INSERT INTO (registered_models|model_versions|logged_models)|(INSERT INTO|UPDATE) registered_model_aliases"
    r"|DELETE FROM registered_models) ",
    rb"(POST|DELETE) /api/2.0/mlflow/(registered-models/(alias|delete)|model-versions/create) ",
)


def killed(project: Project, write: int, rollback: bool) -> None:
    """Runs the command in this process, which kills itself just before its `write`-th write to the registry."""
    import sqlalchemy

    left = [write]

    def count(is_write: object) -> None:
        left[0] -= bool(is_write)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, told: tuple[Any, ...]) -> None:
        if event == "http.client.send" and isinstance(told[1], bytes):
            count(re.match(WRITES[1], told[1]))

    if project.tracking.uri.startswith("sqlite"):
        engine = sqlalchemy.engine.Engine
        sqlalchemy.event.listen(engine, "before_cursor_execute", lambda *told: count(re.match(WRITES[0], told[2])))
    else:
        sys.addaudithook(watch)
    os.chdir(project.folder)
    project.promote(rollback=rollback)


def is_killed(project: Project, write: int, rollback: bool = False) -> bool:
    """Whether the command was killed before its `write`-th write; False where it ended with fewer."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "sqlalchemy", "test_promote"])
    child = context.Process(target=killed, args=(project._replace(client=None), write, rollback))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def under_another_name(project: Project, name: str) -> Project:
    name = f"{project.tracking.model_name}-{name}"
    return project._replace(tracking=Tracking(uri=project.tracking.uri, experiment=name, model_name=name))


def test_a_promotion_that_is_killed_at_any_write_is_mended_by_the_next(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "KILLED_AFTER_S", 0.1)
    write = 1
    while is_killed(own := under_another_name(project, str(write)), write):
        own.promote()
        assert own.aliases() == {"challenger": "1", "champion": "1"}, write
        assert len(own.versions()) == 1 and own.is_at_rest(), write
        assert "champion_since" in own.versions()[0].tags
        experiment = own.client.get_experiment_by_name(own.tracking.experiment).experiment_id
        assert len(own.client.search_logged_models([experiment])) == 1, write
        write += 1
    assert write > 4


def with_two_versions(project: Project) -> Project:
    """Version 2 is champion and version 1 is previous."""
    name = project.tracking.model_name
    project.client.create_registered_model(name)
    for _ in range(2):
        project.client.create_model_version(name, "s3://somewhere/model")
    for alias, version in {"champion": "2", "previous": "1"}.items():
        project.client.set_registered_model_alias(name, alias, version)
    return project


def test_a_rollback_that_is_killed_at_any_write_is_finished_by_the_next_and_not_undone(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "KILLED_AFTER_S", 0.1)
    write = 1
    while is_killed(own := with_two_versions(under_another_name(project, str(write))), write, rollback=True):
        own.promote(rollback=True)
        assert own.aliases() == {"champion": "1", "previous": "2"}, write
        assert own.is_at_rest() and "rolled_back" in own.versions()[1].tags
        write += 1
    assert own.aliases() == {"champion": "1", "previous": "2"}
    assert write > 3


def started(project: Project) -> subprocess.Popen[str]:
    """`python -m stages.promote` in a process of its own."""
    (project.folder / "params.yaml").write_bytes(
        msgspec.yaml.encode(
            {name: msgspec.to_builtins(values) for name, values in {**PARAMS, "tracking": project.tracking}.items()}
        )
    )
    command = [sys.executable, "-m", "stages.promote"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command, cwd=project.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_of_two_promotions_at_once_one_wins_and_the_other_says_so_and_can_be_run_again(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = project.tracking.model_name
    other = project._replace(folder=project.folder / "other")
    write_model(other.folder, "other weights")
    project.client.create_registered_model(f"{name}.lock", tags={"holder": "the test"})  # until both stand before it
    both = [started(project), started(other)]
    for one in both:
        assert one.stdout and one.stderr
        assert "waiting for another promotion (the test)" in (one.stdout.readline() or one.stderr.read())
    project.client.delete_registered_model(f"{name}.lock")
    said = [(*one.communicate(timeout=120), one.returncode) for one in both]
    (won,) = (place for place, (*_, code) in enumerate(said) if code == 0)
    assert "version 1 is champion" in said[won][0]
    assert said[1 - won][2] == 75
    (line,) = [line for line in said[1 - won][1].splitlines() if line.startswith("promote:")]
    assert line == "promote: version 1 became champion while this model was compared. Nothing was registered. Run it again"
    assert project.aliases() == {"challenger": "1", "champion": "1"}
    assert len(project.versions()) == 1 and project.is_at_rest()


def test_a_lock_that_nobody_gives_back_is_taken_and_one_that_changes_hands_is_waited_for(
    local: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = local.client
    monkeypatch.setattr(registry, "KILLED_AFTER_S", 0.4)
    client.create_registered_model("m.lock", tags={"holder": "killed"})
    began = time.monotonic()
    with changing(client, "m"):
        assert time.monotonic() - began > 0.4
    assert client.search_registered_models() == []
    monkeypatch.setattr(registry, "KILLED_AFTER_S", 60)
    monkeypatch.setattr(registry, "WAIT_S", 0.4)
    client.create_registered_model("m.lock", tags={"holder": "slow"})
    with (
        pytest.raises(Busy, match=r"another promotion \(slow\) is changing the registered models; nothing was changed"),
        changing(client, "m"),
    ):
        pass
    assert client.get_registered_model("m.lock").tags == {"holder": "slow"}
