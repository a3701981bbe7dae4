import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stages.params import Tracking
from stages.program import BadInput, BadModelFile
from stages.promote import main
from stages.release import Release, write_release
from stages.scoreboard import Interval, Scoreboard, SetScores, SystemScores
from stages.tracking import connect, folder_md5
from stages.verdict import Gates, judge

GATES = Gates(min_recall_gain=0.0, max_gguf_loss=0.03)
TRACKING = Tracking(uri="sqlite:///models/mlflow.db", experiment="docsmith", model_name="docsmith")
GAIN = Interval(0.142, 0.11, 0.17)
LOSS = Interval(-0.011, -0.02, 0.004)


def scoreboard(gain: Interval = GAIN, loss: Interval = LOSS) -> Scoreboard:
    one = SystemScores(n=40, empty=0, similarity=Interval(0.6821, 0.65, 0.7), rouge_l=Interval(0.3, 0.2, 0.4))
    systems = {"base": one, "tuned": msgspec.structs.replace(one, similarity=Interval(0.8241, 0.8, 0.85)), "q8_0": one}
    gains = {"tuned-base": gain, "q8_0-base": gain, "q8_0-tuned": loss}
    return Scoreboard(confidence=0.95, recall=SetScores(sections=12, systems=systems, gains=gains))


def test_a_gain_above_the_gate_and_a_small_loss_promote() -> None:
    verdict = judge(scoreboard(), "q8_0", GATES)
    assert verdict.outcome == "promote"
    assert verdict.reason == (
        "tuned - base on recall is 0.142 (95 % 0.110 to 0.170), all above 0.000, "
        "and q8_0 - tuned is -0.011 (95 % -0.020 to 0.004), not below -0.030"
    )


@pytest.mark.parametrize(
    ("scores", "outcome", "reason"),
    [
        (
            scoreboard(Interval(0.02, -0.0001, 0.05)),
            "not enough evidence",
            "is 0.020 (95 % 0.000 to 0.050), which is not all above 0.000",
        ),
        (scoreboard(Interval(0.02, 0.0, 0.05)), "not enough evidence", "which is not all above 0.000"),
        (
            scoreboard(Interval(-0.1, -0.2, -0.05)),
            "do not promote",
            "is -0.100 (95 % -0.200 to -0.050), which is not above 0.000",
        ),
        (scoreboard(Interval(0.3, None, None)), "not enough evidence", "is 0.300 from one section, which gives no interval"),
        (scoreboard(loss=Interval(-0.05, -0.1, 0.1)), "do not promote", "q8_0 - tuned is -0.050 (95 % -0.100 to 0.100), below"),
    ],
)
def test_scores_that_do_not_support_it_do_not_promote(scores: Scoreboard, outcome: str, reason: str) -> None:
    verdict = judge(scores, "q8_0", GATES)
    assert verdict.outcome == outcome and reason in verdict.reason


def test_each_gate_turned_past_the_numbers_refuses_what_it_let_through() -> None:
    assert judge(scoreboard(), "q8_0", Gates(0.12, 0.03)).outcome == "not enough evidence"
    assert judge(scoreboard(), "q8_0", Gates(0.2, 0.03)).outcome == "do not promote"
    assert judge(scoreboard(), "q8_0", Gates(0.0, 0.01)).outcome == "do not promote"


def test_a_served_file_without_scores_is_an_error() -> None:
    with pytest.raises(BadInput, match="no q4_k_m-tuned on recall, only q8_0-base, q8_0-tuned, tuned-base"):
        judge(scoreboard(), "q4_k_m", GATES)


@pytest.fixture(scope="module")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        connect(TRACKING)
    return folder / "models/mlflow.db"


def write_model(weights: str = "weights") -> None:
    """Model files, release, metrics and dvc.lock in the current folder."""
    for folder in ("models/gguf", "models/adapter", "reports/metrics"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    Path("models/adapter/adapter_config.json").write_text("{}")
    Path("models/gguf/docsmith-q8_0.gguf").write_text(weights)
    release = Release(
        base="pkg:base",
        base_sha256="b1",
        adapter_sha256="a1",
        chat_sha256="c1",
        system_prompt="Be brief.",
        control_tokens=(),
        quants=("q8_0",),
        serve="q8_0",
        context_tokens=64,
        max_new_tokens=8,
    )
    write_release(Path("models/gguf"), release)
    write_scores(scoreboard())


def write_scores(scores: Scoreboard) -> None:
    Path("reports/metrics/evaluate.json").write_bytes(msgspec.json.encode(scores))


def write_lock(scored: str = "") -> tuple[str, str]:
    """dvc.lock of the current folder; `scored` is the hash that answer saw. Returns the hashes of GGUF and adapter folder."""
    gguf, adapter = (folder_md5(Path(folder)) for folder in ("models/gguf", "models/adapter"))
    Path("dvc.lock").write_text(
        f"""schema: '2.0'
stages:
  train: {{cmd: t, outs: [{{path: models/adapter, hash: md5, md5: {adapter}}}]}}
  export: {{cmd: e, deps: [{{path: models/adapter, md5: {adapter}}}], outs: [{{path: models/gguf, md5: {gguf}}}]}}
  answer: {{cmd: a, deps: [{{path: models/gguf, md5: {scored or gguf}}}, {{path: stages/answer.py, md5: '44'}}]}}
"""
    )
    return gguf, adapter


@pytest.fixture
def client(fresh_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The folder of a finished pipeline, and an MlflowClient on its own store."""
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    write_model()
    shutil.copy(fresh_store, "models/mlflow.db")
    store = f"sqlite:///{tmp_path}/models/mlflow.db"
    return MlflowClient(store, registry_uri=store)


def promote() -> None:
    main(promote=GATES, tracking=TRACKING)


def aliases(client: Any) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model("docsmith").aliases.items()}


def versions(client: Any) -> list[Any]:
    return sorted(client.search_model_versions("name = 'docsmith'"), key=lambda version: int(version.version))


def test_a_supported_model_becomes_challenger_and_champion_with_its_lineage_in_tags(
    client: Any, capsys: pytest.CaptureFixture
) -> None:
    gguf_md5, adapter_md5 = write_lock()
    promote()
    assert capsys.readouterr().out.startswith("promote: version 1 is champion: tuned - base on recall is 0.142")
    assert aliases(client) == {"challenger": "1", "champion": "1"}
    (version,) = versions(client)
    sums = hashlib.sha256(Path("models/gguf/SHA256SUMS").read_bytes()).hexdigest()
    assert version.source.startswith("models:/m-")
    assert {key: value for key, value in version.tags.items() if key != "verdict_reason"} == {
        "quant": "q8_0", "base": "pkg:base", "base_sha256": "b1", "adapter_sha256": "a1", "chat_sha256": "c1",
        "gguf_path": "models/gguf", "gguf_md5": gguf_md5, "adapter_path": "models/adapter", "adapter_md5": adapter_md5,
        "sha256sums": sums, "sha256.docsmith-q8_0.gguf": hashlib.sha256(b"weights").hexdigest(),
        "sha256.release.json": hashlib.sha256(Path("models/gguf/release.json").read_bytes()).hexdigest(), "verdict": "promote",
        "recall_similarity.base": "0.6821", "recall_similarity.tuned": "0.8241", "recall_similarity.q8_0": "0.6821",
    }  # fmt: skip
    assert not list(Path().rglob("mlruns/**/*.gguf")), "model files are registered by reference"


def test_the_same_files_make_no_second_version_and_new_files_do(client: Any, capsys: pytest.CaptureFixture) -> None:
    promote()
    promote()
    assert "version 1 is champion already" in capsys.readouterr().out
    assert len(versions(client)) == 1
    write_model("other weights")
    promote()
    assert "version 2 is champion, version 1 is previous: " in capsys.readouterr().out
    assert aliases(client) == {"challenger": "2", "champion": "2", "previous": "1"}


def test_a_model_without_evidence_is_challenger_beside_the_old_champion(client: Any, capsys: pytest.CaptureFixture) -> None:
    promote()
    write_model("other weights")
    write_scores(scoreboard(Interval(0.02, -0.01, 0.05)))
    promote()
    assert capsys.readouterr().out.splitlines()[-1] == (
        "promote: version 2 is challenger; it is not champion (not enough evidence): tuned - base on recall is 0.020 (95 % -0.010 to 0.050), "
        "which is not all above 0.000"
    )
    assert aliases(client) == {"challenger": "2", "champion": "1"}
    write_scores(scoreboard())  # scored again, on more questions: the same version, with the new verdict
    promote()
    assert aliases(client) == {"challenger": "2", "champion": "2", "previous": "1"}
    assert [version.tags["verdict"] for version in versions(client)] == ["promote", "promote"]


def test_a_champion_whose_new_scores_do_not_support_it_stays_and_is_named(client: Any, capsys: pytest.CaptureFixture) -> None:
    promote()
    write_scores(scoreboard(Interval(-0.1, -0.2, -0.05)))
    promote()
    assert "version 1 is champion since an earlier run, and these scores do not support it" in capsys.readouterr().out
    assert aliases(client) == {"challenger": "1", "champion": "1"}


def test_the_version_is_linked_to_the_run_that_trained_it_where_the_store_knows_it(
    client: Any, capsys: pytest.CaptureFixture
) -> None:
    run_id = client.create_run("0").info.run_id
    Path("reports/metrics/train.json").write_text(json.dumps({"mlflow_run_id": run_id}))
    promote()
    write_model("other weights")
    Path("reports/metrics/train.json").write_text(json.dumps({"mlflow_run_id": "f" * 32}))
    promote()
    assert [version.run_id for version in versions(client)] == [run_id, None]
    assert "is not in this MLflow store" in capsys.readouterr().out


def test_a_damaged_model_file_registers_nothing(client: Any) -> None:
    Path("models/gguf/docsmith-q8_0.gguf").write_text("weightz")
    found, listed = (hashlib.sha256(text).hexdigest() for text in (b"weightz", b"weights"))
    with pytest.raises(BadModelFile, match=f"docsmith-q8_0.gguf: its SHA-256 is {found}, SHA256SUMS says {listed}"):
        promote()
    assert client.search_registered_models() == []


@pytest.mark.parametrize(
    ("sums", "fault"),
    [
        ("", "docsmith-q8_0.gguf is not listed in SHA256SUMS"),
        ("deadbeef  docsmith-q8_0.gguf\n", "is not '<SHA-256>  <file name>'"),
        ("0" * 64 + "  ../secret\n", "is not '<SHA-256>  <file name>'"),
    ],
)
def test_a_list_of_checksums_that_does_not_cover_the_files_is_refused(client: Any, sums: str, fault: str) -> None:
    Path("models/gguf/SHA256SUMS").write_text(sums)
    with pytest.raises(BadModelFile, match=fault):
        promote()


def test_a_folder_without_the_file_to_serve_is_refused(client: Any) -> None:
    Path("models/gguf/docsmith-q8_0.gguf").unlink()
    Path("models/gguf/SHA256SUMS").write_text("")
    with pytest.raises(BadModelFile, match="release.json is missing or not in SHA256SUMS"):
        promote()


def test_missing_or_empty_scores_register_nothing(client: Any) -> None:
    Path("reports/metrics/evaluate.json").write_text("{}")
    with pytest.raises(BadInput, match="is not a scoreboard"):
        promote()
    Path("reports/metrics/evaluate.json").unlink()
    with pytest.raises(BadInput, match="evaluate.json is missing"):
        promote()
    assert client.search_registered_models() == []


def test_model_files_that_changed_after_they_were_scored_are_refused(client: Any) -> None:
    write_lock(scored="55.dir")
    with pytest.raises(BadInput, match="models/gguf has changed since answer ran"):
        promote()


def test_a_store_that_refuses_is_named_in_one_line(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "carrier-pigeon://roof")
    with pytest.raises(BadInput, match="MLflow at carrier-pigeon://roof: .* Check tracking in params.yaml"):
        promote()


def test_model_files_that_dvc_did_not_restore_are_refused(client: Any) -> None:
    write_lock()
    write_model("weights of the commit before")
    with pytest.raises(BadModelFile, match=r"models/gguf: its md5 is \w+.dir, dvc.lock says \w+.dir.*Run: dvc pull models/gguf"):
        promote()
    assert client.search_registered_models() == []


def test_the_hash_of_a_folder_is_the_one_that_dvc_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a/é.txt", "a b.txt"):
        path = Path("models", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    for command in (["init", "--no-scm", "-q"], ["add", "-q", "models"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], check=True)
    assert f"md5: {folder_md5(Path('models'))}\n" in Path("models.dvc").read_text()
