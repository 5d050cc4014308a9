"""docs/cluster.md: every command in it is one that works, and the script in it is run as it stands."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerloop.pipelines.cli import build_parser
from layerloop.pipelines.inputs import recipe_text
from layerloop.pipelines.packages import parameters_of, read_spec, write_pipeline
from layerloop.pipelines.schedules import read_schedules
from layerloop.pipelines.settings import ENVIRONMENT
from layerloop.pipelines.train import train_pipeline

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "cluster.md").read_text()
FENCED = re.findall(r"^```\w+\n(.*?)^```", DOCUMENT, flags=re.M | re.S)
OURS = {"submit", "schedule", "pipeline", "campaign"}


def lines(text: str) -> Iterator[str]:
    """Indented command lines, continued ones joined, without the comment at their end."""
    joined = re.sub(r"\\\n\s+", "", text)
    for line in joined.splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            yield re.sub(r"\s+#.*", "", line).strip()


COMMANDS = sorted({line for line in lines(DOCUMENT) if line.startswith("layerloop ") and line.split()[1] in OURS})


def fenced(start: str) -> str:
    """The one fenced block that has a line which begins so."""
    (block,) = [block for block in FENCED if f"\n{start}" in f"\n{block}"]
    return str(block)


def parse(command: str) -> Any:
    return build_parser().parse_args(shlex.split(command)[1:])  # SystemExit where it is none


def test_every_field_of_the_form_is_explained() -> None:
    section = DOCUMENT.partition("\n## Run from the Kubeflow UI\n")[2].partition("\n## ")[0]
    rows = {match[1] for match in re.finditer(r"^\| `(\w+)` \|", section, flags=re.M)}
    assert rows == set(parameters_of(read_spec(ROOT / "pipelines/compiled/train.yaml")))
    sentence = section.partition("The evaluation pipeline has the fields")[2]
    evaluation = parameters_of(read_spec(ROOT / "pipelines/compiled/evaluate.yaml"))
    assert [name for name in evaluation if f"`{name}`" not in sentence] == []


def test_every_kind_of_command_is_shown() -> None:
    shown = {" ".join(command.split()[1:3]) for command in COMMANDS}
    assert {f"schedule {verb}" for verb in ("apply", "list", "pause", "resume", "delete")} <= shown
    assert {
        "pipeline upload",
        "campaign run-until",
        "campaign show",
        "submit layerloop-train",
        "submit --attach",
    } <= shown


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_document_is_a_command(command: str) -> None:
    parse(command)


def test_a_training_run_of_the_document_is_given_all_that_it_needs(tmp_path: Path) -> None:
    """Every run is checked for missing parameters, and one without a judge fails at its first scoring."""
    pipeline = train_pipeline(iterations=1, workers=1, recipe=recipe_text("tiny", []))
    spec = read_spec(write_pipeline(pipeline, tmp_path / "train.yaml"))
    needed = {name for name, parameter in parameters_of(spec).items() if not parameter.get("isOptional")}
    assert needed == {"campaign", "images"}
    workflow = yaml.safe_load(fenced("jobs:"))["jobs"]["train"]["steps"][-1]["run"]
    trained = [c for c in COMMANDS if ("layerloop-train" in c and "submit" in c) or "run-until" in c]
    assert len(trained) == 4
    for command in (*trained, workflow):
        given = {pair.partition("=")[0] for pair in parse(command).parameter}
        given |= {"campaign"} if "run-until" in command else set()
        assert given >= needed | {"judge_url"}, command


def test_what_kubectl_is_told_to_apply_is_there() -> None:
    told = re.findall(r"kubectl apply [^\n]*?-k (manifests/[\w/-]+)", DOCUMENT)
    assert {"manifests/profile", "manifests/queues", "manifests/judge", "manifests/reference-judge"} <= set(told)
    for folder in told:
        assert (ROOT / folder / "kustomization.yaml").exists(), folder
    made = re.findall(r"--from=cronjob/([\w-]+)", DOCUMENT)
    names = {d["metadata"]["name"] for f in ("weights", "schedules") for d in base(f) if d["kind"] == "CronJob"}
    assert set(made) == names
    accounts = {d["metadata"]["name"] for d in base("rbac") if d["kind"] == "ServiceAccount"}
    assert accounts == {"layerloop-submit", "layerloop-run"}
    assert set(re.findall(r"--service-account (\S+)", "\n".join(COMMANDS))) <= accounts


def base(name: str) -> list[Any]:
    return [d for d in yaml.safe_load_all((ROOT / "manifests" / "base" / f"{name}.yaml").read_text()) if d]


def test_the_document_the_help_and_the_code_name_the_same_variables() -> None:
    said = set(re.findall(r"\b(?:KFP?|KF_PIPELINES|REQUESTS|SSL)_[A-Z_]+\b", ENVIRONMENT))
    section = DOCUMENT.partition("## Sign in")[2].partition("\n## ")[0]
    table = set(re.findall(r"\b(?:KFP?|KF_PIPELINES|REQUESTS|SSL)_[A-Z_]+\b", section))
    code = "".join((ROOT / "pipelines" / f).read_text() for f in ("kfp_api.py", "cli_cluster.py"))
    read = set(re.findall(r'"((?:KFP?|KF_PIPELINES|REQUESTS|SSL)_[A-Z_]+)"', code))
    assert said == table == read
    readme = (ROOT / "README.md").read_text()
    assert all(name in readme for name in said if name.startswith("KFP_") and name != "KFP_EXISTING_TOKEN")
    for command in ("submit", "schedule apply", "schedule list", "pipeline upload", "campaign run-until"):
        help_ = subprocess.run(
            [sys.executable, "-m", "layerloop.pipelines.cli", *command.split(), "--help"],
            capture_output=True, text=True,
        ).stdout  # fmt: skip
        assert ENVIRONMENT.strip() in help_, command


def test_the_schedule_file_of_the_document_is_one(tmp_path: Path) -> None:
    (tmp_path / "schedules.yaml").write_text(fenced("schedules:"))
    (nightly,) = read_schedules(tmp_path / "schedules.yaml", {})
    assert (nightly.name, nightly.service_account) == ("nightly", "layerloop-run")


def test_the_workflow_of_the_document_runs_commands_that_are_commands() -> None:
    text = fenced("jobs:")
    workflow = yaml.safe_load(text)
    (job,) = workflow["jobs"].values()
    assert set(job["env"]) <= set(re.findall(r"KFP_[A-Z_]+", ENVIRONMENT))
    commands = [step["run"] for step in job["steps"] if step.get("run", "").startswith("layerloop ")]
    assert [command.split()[1] for command in commands] == ["compile", "pipeline", "submit"]
    submit = parse(commands[-1])
    assert submit.wait
    assert submit.timeout < 60 * job["timeout-minutes"]  # so that the job's own status is told
    parse(commands[1])


# ---------------------------------------------------------------------------------------- the script, with the real kfp


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "kfp-run.sh"
    path.write_text(fenced("#!/bin/sh"))
    return path


def run_script(script: Path, kfp_api: Any, package: Path, *parameters: str, **more: str) -> Any:
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(script.parent),
        "KFP_ENDPOINT": kfp_api.url,
        "POLL_SECONDS": "0",
        **more,
    }
    command = ["sh", str(script), str(package), *parameters]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)


@pytest.mark.parametrize("end, status", [("SUCCEEDED", 0), ("FAILED", 1), ("CANCELED", 3)])
def test_the_script_ends_as_the_run_ended(script: Path, kfp_api: Any, package: Path, end: str, status: int) -> None:
    kfp_api.states = [end]
    result = run_script(script, kfp_api, package, 'text="7"', "count=3")
    assert result.returncode == status, result.stdout + result.stderr
    assert f"Run details: {kfp_api.url}/#/runs/details/run-0" in result.stdout
    assert kfp_api.runs["run-0"]["runtime_config"]["parameters"] == {"text": "7", "count": 3}
    assert [e["display_name"] for e in kfp_api.experiments.values()] == ["layerloop"]


def test_the_script_takes_a_login_page_for_no_run(script: Path, kfp_api: Any, package: Path) -> None:
    page = "<html>Log in</html>"
    kfp_api.before = lambda handler: handler.reply(200, page, kind="text/html") or True
    result = run_script(script, kfp_api, package, "text=a", KFP_NAMESPACE="team-a")
    assert result.returncode == 2, result.stdout + result.stderr
    assert not kfp_api.runs


def test_the_script_gives_up_in_time_and_says_that_the_run_goes_on(script: Path, kfp_api: Any, package: Path) -> None:
    kfp_api.states = ["RUNNING"]
    result = run_script(script, kfp_api, package, "text=a", LIMIT_SECONDS="1")
    assert result.returncode == 3
    assert "run run-0 continues" in result.stderr


def test_the_shell_takes_the_script_as_it_is(script: Path) -> None:
    assert subprocess.run(["sh", "-n", str(script)]).returncode == 0
