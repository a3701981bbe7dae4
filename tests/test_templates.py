"""templates: valid as files, sound as shell, and all that they name is there; what needs no cluster is run, with real git and DVC."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_project import IDENTITY, succeed

ROOT = Path(__file__).parents[1]
PATH = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
FOLDER = ROOT / "templates"
SKYPILOT = yaml.safe_load((FOLDER / "skypilot.yaml").read_text(encoding="utf-8"))
VOLUME, JOB = yaml.safe_load_all((FOLDER / "kubernetes-job.yaml").read_text(encoding="utf-8"))
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
SHELL = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.iterdir()) if path.suffix != ".yaml"} | {
    "skypilot.yaml: setup": SKYPILOT["setup"],
    "skypilot.yaml: run": SKYPILOT["run"],
    "kubernetes-job.yaml": CONTAINER["args"][0],
}
SBATCH = [name for name in SHELL if name.endswith(".sbatch")]
# long options of `man sbatch` that these templates use or may come to use
SBATCH_OPTIONS = set(
    [
        "account",
        "array",
        "chdir",
        "constraint",
        "cpus-per-gpu",
        "cpus-per-task",
        "error",
        "exclusive",
        "export",
        "gpus",
        "gpus-per-node",
        "gpus-per-task",
        "gres",
        "job-name",
        "licenses",
        "mail-type",
        "mail-user",
        "mem",
        "mem-per-cpu",
        "mem-per-gpu",
        "nodelist",
        "nodes",
        "ntasks",
        "ntasks-per-node",
        "open-mode",
        "output",
        "partition",
        "qos",
        "requeue",
        "reservation",
        "signal",
        "time",
    ]
)
# sky/utils/schemas.py of skypilot-org/skypilot: get_task_schema and _get_single_resources_schema
SKYPILOT_KEYS = {"name": str, "num_nodes": int, "workdir": (str, dict), "resources": dict, "file_mounts": dict, "service": dict}
SKYPILOT_KEYS |= {"envs": dict, "secrets": dict, "setup": str, "run": str}
SKYPILOT_RESOURCES = {"infra": str, "accelerators": str, "cpus": (str, int), "memory": (str, int), "instance_type": str}
SKYPILOT_RESOURCES |= {"use_spot": bool, "disk_size": int, "disk_tier": str, "image_id": str, "autostop": (bool, int, dict)}
SECRETS = {"REPOSITORY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_URI"}


def sbatch_options(name: str) -> dict[str, str]:
    """Option -> value of each #SBATCH line, which Slurm reads up to the first command."""
    lines = SHELL[name].splitlines()
    first = next(place for place, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    found = [re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line) for line in lines[:first] if line.startswith("#SBATCH")]
    assert found and all(found)
    return {one[1]: one[2] or "" for one in found if one}


def settings_in(text: str) -> list[str]:
    """What looks like a setting with a value, as train.r=32."""
    return re.findall(r"\b([a-z]+(?:\.[a-z_]+)+)=", text)


def test_there_is_a_template_for_each_service() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {
        "kubernetes-job.yaml",
        "ray.sbatch",
        "run.sh",
        "skypilot.yaml",
        "slurm.sbatch",
    }
    assert os.access(FOLDER / "run.sh", os.X_OK)


@pytest.mark.parametrize("name", SHELL)
def test_the_shell_of_a_template_is_sound_and_stops_at_the_first_failure(name: str) -> None:
    done = subprocess.run(
        ["shellcheck", "--shell=bash", "-"], input=SHELL[name], capture_output=True, text=True, check=False, env=PATH
    )
    assert done.returncode == 0, done.stdout + done.stderr
    commands = [line for line in SHELL[name].splitlines() if line and not line.startswith("#")]
    assert commands[0] == "set -euo pipefail"


@pytest.mark.parametrize("name", ["slurm.sbatch", "ray.sbatch", "skypilot.yaml: setup", "kubernetes-job.yaml"])
def test_a_template_installs_the_gpu_profile_with_what_a_team_needs(name: str) -> None:
    assert re.search(r"\bmake (-C \S+ )?team PROFILE=gpu\b", SHELL[name])


def test_what_the_templates_call_is_there() -> None:
    shell = "\n".join(SHELL.values())
    targets = re.findall(r"\bmake (?:-C \S+ )?(\w+)", shell)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets and all(f"\n{target}:" in makefile for target in targets)
    scripts = re.findall(r"(?<!sbatch )\b(templates/\S+)", "\n".join(line for line in shell.splitlines() if line[:1] != "#"))
    assert scripts.count("templates/run.sh") == 4 and all((ROOT / script).is_file() for script in scripts)
    commands = re.findall(r"\bdvc ((?:exp )?[a-z]+)((?: --[a-z-]+)*)", SHELL["run.sh"])
    assert {command for command, _ in commands} == {"pull", "exp list", "exp run", "push", "exp push"}
    for command, options in commands:
        told = subprocess.run(["dvc", *command.split(), "--help"], capture_output=True, text=True, check=True, env=PATH).stdout
        assert all(option in told for option in [*options.split(), *(["--set-param"] if command == "exp run" else [])])


def test_every_setting_that_a_template_names_is_in_params() -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    found = {name: settings_in(path.read_text(encoding="utf-8")) for name, path in ((p.name, p) for p in FOLDER.iterdir())}
    assert {"train.learning_rate", "train.r", "train.lora_alpha"} <= set(found["slurm.sbatch"])
    for setting in (one for some in found.values() for one in some):
        value: Any = params
        for part in setting.split("."):
            assert part in value, f"{setting} is not in params.yaml"
            value = value[part]


def test_no_template_holds_a_secret_and_each_names_where_the_secrets_come_from() -> None:
    assert set(SKYPILOT["secrets"]) == SECRETS and set(SKYPILOT["secrets"].values()) == {None}
    assert CONTAINER["envFrom"] == [{"secretRef": {"name": "docsmith"}}]
    assert not SECRETS & ({one["name"] for one in CONTAINER["env"]} | set(SKYPILOT["envs"]))
    text = (FOLDER / "kubernetes-job.yaml").read_text(encoding="utf-8")
    assert all(name in text for name in SECRETS)
    for name, shell in SHELL.items():
        assert not re.search(r"(?i)(secret|token|password|key)\w*=['\"]?\w", shell.replace("RAY_AUTH_MODE=token", "")), name


@pytest.mark.parametrize("name", SBATCH)
def test_slurm_knows_every_option_and_is_asked_for_a_gpu_memory_and_time(name: str) -> None:
    options = sbatch_options(name)
    assert set(options) <= SBATCH_OPTIONS
    assert options["gpus-per-node"] == "1" and re.fullmatch(r"\d+G", options["mem"])
    assert re.fullmatch(r"\d+:\d\d:\d\d", options["time"]) and options["output"].startswith("slurm-%")


def test_the_array_has_a_task_for_each_experiment() -> None:
    (experiments,) = re.findall(r"(?s)EXPERIMENTS=\((.*?)\n\)", SHELL["slurm.sbatch"])
    tasks = len(re.findall(r'(?m)^  "', experiments))
    assert tasks > 1 and sbatch_options("slurm.sbatch")["array"] == f"0-{tasks - 1}"


def test_ray_asks_for_a_token_and_gets_only_options_that_every_node_takes() -> None:
    from ray.scripts.symmetric_run import symmetric_run

    shell = SHELL["ray.sbatch"]
    assert "RAY_AUTH_MODE=token" in shell and "umask 077" in shell and "trap 'rm -f \"$RAY_AUTH_TOKEN_PATH\"' EXIT" in shell
    assert '-- templates/run.sh "ray-$SLURM_JOB_ID" executor.engine=ray "executor.workers=$SLURM_JOB_NUM_NODES" "$@"' in shell
    (given,) = re.findall(r"(?s)ray symmetric-run (.*?)\s-- ", shell)
    known = {option for param in symmetric_run.params for option in param.opts}
    assert set(re.findall(r"--[a-z-]+", given)) == {"--address", "--min-nodes"} <= known
    assert sbatch_options("ray.sbatch")["ntasks-per-node"] == "1"


def test_skypilot_reads_every_key() -> None:
    assert {"name", "resources", "setup", "run"} <= set(SKYPILOT) <= set(SKYPILOT_KEYS)
    assert set(SKYPILOT["resources"]) <= set(SKYPILOT_RESOURCES)
    for given, known in ((SKYPILOT, SKYPILOT_KEYS), (SKYPILOT["resources"], SKYPILOT_RESOURCES)):
        assert all(isinstance(value, known[key]) for key, value in given.items())  # type: ignore[arg-type]
    assert re.fullmatch(r"[A-Z0-9]+:\d", SKYPILOT["resources"]["accelerators"])
    assert all(isinstance(value, str) for value in SKYPILOT["envs"].values())


def test_the_job_asks_for_one_gpu_and_tries_again_in_a_new_pod() -> None:
    assert (JOB["apiVersion"], JOB["kind"], POD["restartPolicy"]) == ("batch/v1", "Job", "Never")
    assert 0 < JOB["spec"]["backoffLimit"] <= 6 and JOB["spec"]["activeDeadlineSeconds"] > 0
    asked = CONTAINER["resources"]
    assert asked["limits"]["nvidia.com/gpu"] == "1" and asked["limits"]["memory"] and {"cpu", "memory"} <= set(asked["requests"])
    assert all(isinstance(one["value"], str) for one in CONTAINER["env"])  # Kubernetes takes no numbers here


def test_the_pod_has_no_rights_and_nothing_of_its_node() -> None:
    assert POD["securityContext"]["runAsNonRoot"] and POD["securityContext"]["runAsUser"] > 0
    assert POD["automountServiceAccountToken"] is False and not {"hostNetwork", "hostPID", "hostIPC"} & set(POD)
    own = CONTAINER["securityContext"]
    assert own["allowPrivilegeEscalation"] is False and own["capabilities"] == {"drop": ["ALL"]} and own["readOnlyRootFilesystem"]
    assert "privileged" not in own
    volumes = {one["name"]: set(one) - {"name"} for one in POD["volumes"]}
    assert volumes == {"work": {"persistentVolumeClaim"}, "tmp": {"emptyDir"}, "shm": {"emptyDir"}}
    assert {one["name"] for one in CONTAINER["volumeMounts"]} == set(volumes)
    (work,) = [one for one in POD["volumes"] if one["name"] == "work"]
    assert work["persistentVolumeClaim"]["claimName"] == VOLUME["metadata"]["name"] == JOB["metadata"]["name"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of a project with one stage, whose `make team` notes that it ran; git remote and DVC remote are folders beside it."""
    folder = tmp_path_factory.mktemp("team")
    project, remote = folder / "project", folder / "remote.git"
    shutil.copytree(FOLDER, project / "templates")
    (project / "Makefile").write_text("team:\n\t@echo team $(PROFILE) >> ../made\n", encoding="utf-8")
    (project / "params.yaml").write_text("train: {learning_rate: 0.1, r: 8, lora_alpha: 8}\n", encoding="utf-8")
    stage = "train:\n    cmd: cp params.yaml adapter.yaml\n    params: [train]\n    outs: [adapter.yaml]\n"
    (project / "dvc.yaml").write_text(f"stages:\n  {stage}", encoding="utf-8")
    succeed(folder, "git", "init", "--quiet", "--bare", "--initial-branch", "main", str(remote))
    succeed(project, "git", "init", "--quiet", "--initial-branch", "main")
    succeed(project, "dvc", "init", "--quiet")
    succeed(project, "dvc", "config", "core.analytics", "false")
    succeed(project, "dvc", "remote", "add", "--quiet", "--default", "store", str(folder / "store"))
    succeed(project, "git", "add", "--all")
    succeed(project, "git", "commit", "--quiet", "--message", "A project")
    succeed(project, "git", "remote", "add", "origin", str(remote))
    succeed(project, "git", "push", "--quiet", "--set-upstream", "origin", "main")
    return project


def trained(project: Path, experiment: str) -> dict[str, float]:
    """The settings that `experiment`, fetched from both remotes into a fresh clone, was trained with."""
    clone = project.with_name(f"clone-of-{experiment}")
    succeed(project.parent, "git", "clone", "--quiet", str(project.with_name("remote.git")), str(clone))
    succeed(clone, "dvc", "exp", "pull", "origin", experiment)
    succeed(clone, "dvc", "exp", "apply", experiment)
    found: dict[str, float] = yaml.safe_load((clone / "adapter.yaml").read_text(encoding="utf-8"))["train"]
    return found


def test_a_task_of_the_slurm_array_leaves_its_experiment_in_the_remotes_and_one_that_is_queued_again_only_pushes(
    project: Path,
) -> None:
    script = (project / "templates/slurm.sbatch").read_text(encoding="utf-8")
    slurm = {"SLURM_SUBMIT_DIR": str(project), "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    first, again = (succeed(project, "bash", "-c", script, **slurm) for _ in range(2))
    assert first.count("Running stage 'train'") == 1 and "Running stage" not in again
    assert trained(project, "slurm-7-2") == {"learning_rate": 0.0002, "r": 32, "lora_alpha": 32}
    assert project.with_name("made").read_text(encoding="utf-8").splitlines() == ["team gpu"] * 2
    assert succeed(project, "git", "status", "--short") == ""  # the clone that was submitted stays as it was


def test_the_job_runs_its_settings_in_a_clone_of_its_own(project: Path) -> None:
    work = project.with_name("work")
    work.mkdir()
    given = {"REPOSITORY": str(project.with_name("remote.git")), "REVISION": "main", "NAME": "kubernetes-1", "HOME": str(work)}
    succeed(work, *CONTAINER["command"], SHELL["kubernetes-job.yaml"], SETTINGS="train.r=64 train.lora_alpha=16", **given)
    assert trained(project, "kubernetes-1") == {"learning_rate": 0.1, "r": 64, "lora_alpha": 16}


def test_skypilot_sets_up_and_runs_what_the_job_does() -> None:
    both = SHELL["skypilot.yaml: setup"] + SHELL["skypilot.yaml: run"].removeprefix("set -euo pipefail\ncd project\n")
    assert both == SHELL["kubernetes-job.yaml"]
    given = {one["name"]: one["value"] for one in CONTAINER["env"]}
    assert given | {"NAME": "skypilot-1"} == SKYPILOT["envs"] | {"HOME": "/work", "USER": "docsmith"}


def test_a_failed_stage_fails_the_run_and_pushes_no_experiment(project: Path) -> None:
    environment = PATH | IDENTITY | {"CI": "true"}
    done = subprocess.run(
        ["templates/run.sh", "broken", "train.nothing.there=1"], cwd=project, env=environment, capture_output=True, check=False
    )
    assert done.returncode != 0
    assert "broken" not in succeed(project, "dvc", "exp", "list", "--name-only", "origin")
