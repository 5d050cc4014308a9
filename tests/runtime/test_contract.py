from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from layerloop.components.runtime.contract import StepResult, artifact_metadata, local_path, step_main
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.steps import STEPS

calls: list[dict[str, Any]] = []


def run(
    *,
    campaign: str,
    iteration: int | None = None,
    worker: int = 0,
    rate: float = 0.5,
    fast: bool = False,
    judge_url: str = "",
) -> StepResult:
    """Sample a little.

    In some detail, at 100 %.

    Args:
        campaign: root URI: a folder
            or s3://bucket/prefix.
        worker: which of the workers this is.
        judge_url: an OpenAI-compatible URL.

    Returns:
        What was made.
    """
    calls.append({"campaign": campaign, "iteration": iteration, "worker": worker})
    calls[-1] |= {"rate": rate, "fast": fast, "judge_url": judge_url}
    if campaign == "bad":
        raise LayerloopError("campaign is bad: give a good one")
    if campaign == "worse":
        raise OwnStatusError("campaign is worse: see its report")
    if campaign == "broken":
        raise ZeroDivisionError("a defect")
    manifest = Manifest(kind="rollouts", iteration=iteration, counts={"groups": 3, "candidates": 24})
    return StepResult(
        manifests={"rollouts": manifest},
        files={"report": b"<html>"},
        metrics={"reward_mean": 0.25, "groups": 3},
        parameters={"count": 3, "name": "a b", "ok": True},
    )


class OwnStatusError(LayerloopError):
    status: int = 3


@pytest.fixture(autouse=True)
def _forget_calls() -> None:
    calls.clear()


def executor_input(folder: Path, parameters: dict[str, Any], artifacts: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the Kubeflow launcher and kfp.local put in place of `{{$}}`."""

    def output(name: str, schema: str) -> dict[str, Any]:
        artifact = {"name": name, "type": {"schemaTitle": schema}, "uri": str(folder / "out" / name), "metadata": {}}
        return {"artifacts": [artifact]}

    return {
        "inputs": {"parameterValues": parameters, "artifacts": artifacts or {}},
        "outputs": {
            "artifacts": {
                "rollouts": output("rollouts", "system.Dataset"),
                "report": output("report", "system.HTML"),
                "metrics": output("metrics", "system.Metrics"),
            },
            "parameters": {name: {"outputFile": str(folder / "params" / name)} for name in ("count", "name", "ok")},
            "outputFile": str(folder / "deep" / "executor_output.json"),
        },
    }


def policy(*iterations: Any, uri: str = "/nowhere/policy") -> dict[str, Any]:
    return {"policy": {"artifacts": [{"name": "policy", "uri": uri, "metadata": {"iteration": k}} for k in iterations]}}


def start(task: dict[str, Any]) -> int:
    return step_main(run, step=STEPS["generate_rollouts"], argv=["--executor-input", json.dumps(task)])


def test_flags_become_arguments_of_their_type() -> None:
    flags = [
        "--campaign",
        "/c",
        "--iteration",
        "4",
        "--worker",
        "2",
        "--rate",
        "1e-3",
        "--fast",
        "--judge-url",
        "http://j",
    ]
    assert step_main(run, argv=flags) == 0
    assert calls == [
        {"campaign": "/c", "iteration": 4, "worker": 2, "rate": 1e-3, "fast": True, "judge_url": "http://j"}
    ]


def test_flags_left_out_keep_their_defaults_and_the_result_is_json_on_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert step_main(run, argv=["--campaign", "/c"]) == 0
    assert calls == [{"campaign": "/c", "iteration": None, "worker": 0, "rate": 0.5, "fast": False, "judge_url": ""}]
    assert json.loads(capsys.readouterr().out) == {
        "metrics": {"reward_mean": 0.25, "groups": 3},
        "parameters": {"count": 3, "name": "a b", "ok": True},
    }


def test_help_tells_what_the_docstring_says(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        step_main(run, argv=["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Sample a little. In some detail, at 100 %." in text
    assert "--campaign TEXT root URI: a folder or s3://bucket/prefix. (required)" in text
    assert "--worker N which of the workers this is. (default: 0)" in text
    assert "--judge-url TEXT an OpenAI-compatible URL." in text
    assert "--fast, --no-fast" in text
    assert "Returns" not in text
    assert "executor" not in text


@pytest.mark.parametrize("flags", [[], ["--campaign", "c", "--worker", "two"], ["--campaign", "c", "--wroker", "2"]])
def test_wrong_flags_exit_with_status_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        step_main(run, argv=flags)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: python -m ")
    assert ("did you mean --worker?" in line) == ("--wroker" in flags)
    assert calls == []


def test_a_task_writes_its_artifacts_parameters_and_metadata(tmp_path: Path) -> None:
    task = executor_input(tmp_path, {"campaign": "/c", "worker": 1.0}, policy(6.0))
    assert start(task) == 0
    assert calls[0]["iteration"] == 7
    assert calls[0]["worker"] == 1 and type(calls[0]["worker"]) is int
    output = json.loads((tmp_path / "deep" / "executor_output.json").read_text())
    assert output["parameterValues"] == {"count": 3, "name": "a b", "ok": True}
    assert {name: entry["artifacts"][0]["metadata"] for name, entry in output["artifacts"].items()} == {
        "rollouts": {
            "kind": "rollouts", "iteration": 7, "groups": 3, "candidates": 24, "display_name": "rollouts 7",
        },
        "report": {},
        "metrics": {"reward_mean": 0.25, "groups": 3},
    }  # fmt: skip
    rollouts = output["artifacts"]["rollouts"]["artifacts"][0]
    assert (rollouts["uri"], rollouts["type"]) == (str(tmp_path / "out/rollouts"), {"schemaTitle": "system.Dataset"})
    manifest = Manifest.from_json((tmp_path / "out/rollouts").read_bytes(), where="rollouts")
    assert manifest == Manifest(kind="rollouts", iteration=7, counts={"groups": 3, "candidates": 24})
    assert (tmp_path / "out/report").read_bytes() == b"<html>"
    assert {p.name: p.read_text() for p in (tmp_path / "params").iterdir()} == {
        "count": "3",
        "name": "a b",
        "ok": "true",
    }


RUN_ID, SALT = "0a1b2c3d-0000-4000-8000-00000000000a", "0a1b2c3d-0000-4000-8000-00000000000b"


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        (f"minio://mlpipeline/v2/artifacts/layerloop-train/{RUN_ID}/generate-rollouts/{SALT}/rollouts", RUN_ID),
        (f"s3://{SALT}/root/layerloop-train/{RUN_ID}/score-rollouts/{SALT}/scores", RUN_ID),
        (f"s3://root/layerloop-train/{RUN_ID}/score-rollouts/scores", RUN_ID),
        ("/home/me/runs/artifacts/train/task/rollouts", ""),
    ],
)
def test_the_pods_of_a_run_know_that_they_belong_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, name: str
) -> None:
    """By the URIs of their artifacts, which every attempt at a task has in common."""
    monkeypatch.setenv("LAYERLOOP_RUN", "")  # so that it is removed afterwards
    monkeypatch.delenv("LAYERLOOP_RUN")
    monkeypatch.setattr("layerloop.components.runtime.contract.local_path", lambda _: tmp_path / "out")
    task = {"inputs": {"parameterValues": {"campaign": "c"}}}
    task |= {"outputs": {"artifacts": {"rollouts": {"artifacts": [{"name": "rollouts", "uri": uri}]}}}}
    assert step_main(run, argv=["--executor-input", json.dumps(task)]) == 0
    assert os.environ.get("LAYERLOOP_RUN", "") == name


def test_kfp_itself_reads_what_is_written(tmp_path: Path) -> None:
    from kfp.local.executor_output_utils import load_executor_output

    assert start(executor_input(tmp_path, {"campaign": "/c"}, policy(6))) == 0
    message = load_executor_output(str(tmp_path / "deep" / "executor_output.json"))
    assert message.artifacts["rollouts"].artifacts[0].metadata["iteration"] == 7
    assert message.artifacts["rollouts"].artifacts[0].type.schema_title == "system.Dataset"
    assert dict(message.artifacts["metrics"].artifacts[0].metadata) == {"reward_mean": 0.25, "groups": 3}
    assert {name: value.WhichOneof("kind") for name, value in message.parameter_values.items()} == {
        "count": "number_value", "name": "string_value", "ok": "bool_value",
    }  # fmt: skip


def test_only_outputs_that_the_task_has_are_written(tmp_path: Path) -> None:
    task = executor_input(tmp_path, {"campaign": "/c", "iteration": 1})
    task["outputs"] = {"outputFile": str(tmp_path / "o.json")}
    assert start(task) == 0
    assert json.loads((tmp_path / "o.json").read_text()) == {"parameterValues": {}, "artifacts": {}}
    assert [path.name for path in tmp_path.iterdir()] == ["o.json"]


# What the driver of KFP 2.17.0 hands to a step whose component declares `rollouts` and `metrics`, with
# PUBLISH_LOGS=true as stock installations set it (driver.go, provisionOutputs): one artifact more than was declared.
OF_THE_DRIVER = """
{"inputs": {"parameterValues": {"campaign": "/c", "worker": 1, "judge_url": ""}, "artifacts": {"policy": {"artifacts": [
   {"name": "artifacts/7", "type": {"schemaTitle": "system.Model", "schemaVersion": "0.0.1"}, "uri": "URI/policy",
    "metadata": {"display_name": "policy 3", "iteration": 3, "kind": "policy"}}]}}},
 "outputs": {"artifacts": {
   "executor-logs": {"artifacts": [{"name": "executor-logs", "uri": "URI/executor-logs", "metadata": {},
      "type": {"schemaTitle": "system.Artifact", "schemaVersion": "0.0.1"}}]},
   "metrics": {"artifacts": [{"name": "metrics", "uri": "URI/metrics", "metadata": {},
      "type": {"schemaTitle": "system.Metrics", "schemaVersion": "0.0.1"}}]},
   "rollouts": {"artifacts": [{"name": "rollouts", "uri": "URI/rollouts", "metadata": {},
      "type": {"schemaTitle": "system.Dataset", "schemaVersion": "0.0.1"}}]}},
  "outputFile": "URI/output_metadata.json"}}
"""


def test_the_drivers_own_output_is_left_alone_while_the_launcher_holds_it_open(tmp_path: Path) -> None:
    task = json.loads(OF_THE_DRIVER.replace("URI", str(tmp_path)))
    log_file = tmp_path / "executor-logs"
    with log_file.open("w") as held:
        held.write("what the step printed\n")
        held.flush()
        before = log_file.stat()
        assert start(task) == 0
        after = log_file.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        held.write("more\n")
    assert log_file.read_text() == "what the step printed\nmore\n"
    output = json.loads((tmp_path / "output_metadata.json").read_text())
    assert output["artifacts"].keys() == {"metrics", "rollouts"}
    assert output["artifacts"]["rollouts"]["artifacts"][0]["metadata"]["iteration"] == 4


def test_a_parameter_the_step_does_not_make_is_a_defect(tmp_path: Path) -> None:
    task = executor_input(tmp_path, {"campaign": "/c", "iteration": 1})
    task["outputs"]["parameters"]["speed"] = task["outputs"]["parameters"]["count"]
    with pytest.raises(KeyError, match="parameter speed, which the step did not make"):
        start(task)


def past_the_target(folder: Path, until: Any, iteration: int = 6) -> tuple[int, dict[str, Any]]:
    task = executor_input(folder, {"campaign": "/c", "until": until}, policy(iteration))
    beyond = ("rollouts", "rollouts")
    task["outputs"]["parameters"] = {}
    arguments = ["--executor-input", json.dumps(task)]
    status = step_main(run, step=STEPS["generate_rollouts"], beyond=beyond, argv=arguments)
    return status, json.loads((folder / "deep" / "executor_output.json").read_text())


@pytest.mark.parametrize("until", [6, 6.0, "6", 2])
def test_an_iteration_past_the_target_is_not_done_and_hands_on_an_empty_output(tmp_path: Path, until: Any) -> None:
    status, output = past_the_target(tmp_path, until)
    assert (status, calls) == (0, [])
    assert output["artifacts"]["rollouts"]["artifacts"][0]["metadata"]["iteration"] == 7
    manifest = Manifest.from_json((tmp_path / "out/rollouts").read_bytes(), where="rollouts")
    assert manifest == Manifest(kind="rollouts", iteration=7)


@pytest.mark.parametrize("until", [7, 8.0, 0, "", None])
def test_an_iteration_up_to_the_target_is_done(tmp_path: Path, until: Any) -> None:
    assert past_the_target(tmp_path, until)[0] == 0
    assert [call["iteration"] for call in calls] == [7]


def test_an_update_past_the_target_hands_its_policy_on(tmp_path: Path) -> None:
    before = Manifest(kind="policy", iteration=6, counts={"groups": 3})
    (tmp_path / "previous").write_bytes(before.to_json())
    given = {"scores": policy(7)["policy"], "previous": policy(6, uri=str(tmp_path / "previous"))["policy"]}
    task = executor_input(tmp_path, {"campaign": "/c", "until": 6}, given)
    task["outputs"]["artifacts"]["policy"] = task["outputs"]["artifacts"].pop("rollouts")
    task["outputs"]["parameters"] = {}
    arguments = ["--executor-input", json.dumps(task)]
    assert step_main(run, step=STEPS["update_lora"], beyond=("policy", "previous"), argv=arguments) == 0
    assert calls == []
    output = json.loads((tmp_path / "deep" / "executor_output.json").read_text())
    (artifact,) = output["artifacts"]["policy"]["artifacts"]
    assert artifact["metadata"]["iteration"] == 6
    assert Manifest.from_json(Path(artifact["uri"]).read_bytes(), where="policy") == before


def test_a_metric_that_is_not_a_number_is_a_defect(tmp_path: Path) -> None:
    def diverging(*, campaign: str) -> StepResult:
        return StepResult(metrics={"loss": float("nan")})

    task = executor_input(tmp_path, {"campaign": "/c"})
    task["outputs"]["artifacts"] = {"metrics": task["outputs"]["artifacts"]["metrics"]}
    task["outputs"]["parameters"] = {}
    with pytest.raises(ValueError, match="not JSON compliant"):
        step_main(diverging, argv=["--executor-input", json.dumps(task)])
    assert not (tmp_path / "deep").exists()


def test_an_error_with_a_status_of_its_own_ends_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert step_main(run, argv=["--campaign", "worse", "--iteration", "1"]) == 3
    assert capsys.readouterr().err.endswith("error: campaign is worse: see its report\n")


def test_bad_input_is_one_line_and_status_2_with_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(executor_input(tmp_path, {"campaign": "bad", "iteration": 1})) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: campaign is bad: give a good one"
    assert list(tmp_path.iterdir()) == []


def test_a_defect_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        start(executor_input(tmp_path, {"campaign": "broken", "iteration": 1}))


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("iteration", 3.0, 3),
        ("iteration", "3", 3),  # schedules send every parameter as text
        ("iteration", 9007199254740993, 9007199254740993),
        ("rate", 1, 1.0),
        ("rate", " 0.25 ", 0.25),
        ("fast", "true", True),
        ("fast", "False", False),
        ("fast", 1.0, True),
        ("fast", True, True),
        ("judge_url", 7, "7"),  # `kfp run create judge_url=7` sends a number
        ("judge_url", 7.0, "7"),
        ("judge_url", " x ", "x"),  # blanks of a form
        ("judge_url", "x\n", "x"),
        ("rate", "", 0.5),  # a field of the form that was emptied
        ("iteration", " 3 ", 3),
        ("judge_url", True, "true"),
    ],
)
def test_parameters_arrive_in_their_declared_type(tmp_path: Path, name: str, given: Any, expected: Any) -> None:
    assert start(executor_input(tmp_path, {"campaign": "/c", "iteration": 1, name: given})) == 0
    assert calls[0][name] == expected
    assert type(calls[0][name]) is type(expected)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("iteration", 3.5, "input parameter iteration is 3.5: give an integer"),
        ("iteration", "three", "input parameter iteration is 'three': give an integer"),
        ("iteration", True, "input parameter iteration is True: give an integer"),
        ("iteration", [3], "input parameter iteration is [3]: give an integer"),
        ("iteration", "inf", "input parameter iteration is 'inf': give an integer"),
        ("fast", "maybe", "input parameter fast is 'maybe': give true or false"),
        ("speed", 1, "input parameter speed is not one of campaign, iteration, worker, rate, fast, judge_url: "),
    ],
)
def test_parameters_that_do_not_fit_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, given: Any, message: str
) -> None:
    assert start(executor_input(tmp_path, {"campaign": "/c", "iteration": 1, name: given})) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert calls == []


def test_none_means_the_default(tmp_path: Path) -> None:
    assert start(executor_input(tmp_path, {"campaign": "/c", "iteration": None, "worker": None}, policy(0))) == 0
    assert (calls[0]["iteration"], calls[0]["worker"]) == (1, 0)


def test_an_iteration_parameter_goes_before_the_artifact(tmp_path: Path) -> None:
    assert start(executor_input(tmp_path, {"campaign": "/c", "iteration": 9}, policy(2))) == 0
    assert calls[0]["iteration"] == 9


def test_a_list_of_artifacts_of_one_iteration_gives_that_iteration(tmp_path: Path) -> None:
    assert start(executor_input(tmp_path, {"campaign": "/c"}, policy(4, "4", 4.0))) == 0
    assert calls[0]["iteration"] == 5


@pytest.mark.parametrize(
    ("artifacts", "message"),
    [
        (policy(4, 5), "input artifact policy is of iterations 4, 5: give artifacts of one iteration"),
        ({}, "input artifact policy is not there: give artifacts of one iteration"),
        (policy(None), "input artifact policy (/nowhere/policy) has no iteration: give a step's manifest"),
        (policy("x"), "input parameter policy.iteration is 'x': give an integer"),
    ],
)
def test_an_iteration_that_cannot_be_told_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], artifacts: dict[str, Any], message: str
) -> None:
    assert start(executor_input(tmp_path, {"campaign": "/c"}, artifacts)) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_without_metadata_the_iteration_is_read_from_the_manifest_itself(tmp_path: Path) -> None:
    (tmp_path / "policy").write_bytes(Manifest(kind="policy", iteration=11).to_json())
    assert start(executor_input(tmp_path, {"campaign": "/c"}, policy(None, uri=str(tmp_path / "policy")))) == 0
    assert calls[0]["iteration"] == 12


@pytest.mark.parametrize("text", ["{{$}}", "[]", '"x"', ""])
def test_an_executor_input_that_is_none_is_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert step_main(run, argv=["--executor-input", text]) == 2
    assert capsys.readouterr().err.startswith("error: --executor-input is not ")


def test_uris_are_read_where_the_launcher_mounts_them() -> None:
    from kfp import dsl

    for uri in ("s3://bucket/a/b", "gs://bucket/a/b", "minio://bucket/a/b", "/plain/path"):
        assert str(local_path(uri)) == dsl.Artifact(uri=uri).path


def test_sources_have_no_iteration_in_their_metadata() -> None:
    assert artifact_metadata(Manifest(kind="sources", counts={"train": 5})) == {
        "kind": "sources",
        "train": 5,
        "display_name": "sources",
    }


def test_only_the_first_rank_of_a_torchrun_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert start(executor_input(tmp_path, {"campaign": "/c", "iteration": 1})) == 0
    assert len(calls) == 1
    assert list(tmp_path.iterdir()) == []


STEP = """
from layerloop.components.runtime.contract import StepResult, step_main

def run(*, campaign: str) -> StepResult:
    return StepResult()

if __name__ == "__main__":
    raise SystemExit(step_main(run))
"""


def test_the_start_is_told_in_seconds_after_the_process_began(tmp_path: Path) -> None:
    (tmp_path / "make_coffee").mkdir()
    (tmp_path / "make_coffee" / "step.py").write_text(STEP)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "make_coffee" / "step.py"), "--campaign", "c"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = done.stderr.splitlines()[0].split()
    assert words[:2] == ["started", "make_coffee"]
    assert words[3:] == ["s", "after", "process", "start"]
    assert 0 < float(words[2]) < 30


merged: list[Any] = []


def merge(*, overrides: Mapping[str, Any] | None = None) -> StepResult:
    merged.append(overrides)
    return StepResult()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"update": {"steps": 1.0}}, {"update": {"steps": 1.0}}),
        ('{"update": {"steps": 1}}', {"update": {"steps": 1}}),  # a schedule, or `kfp run create`
        (" {}\n", {}),
        ({}, {}),
        ("", None),  # the form's field, emptied
        (None, None),
    ],
)
def test_a_mapping_arrives_as_one_or_as_text(tmp_path: Path, given: Any, expected: Any) -> None:
    merged.clear()
    task = {"inputs": {"parameterValues": {"overrides": given}}}
    assert step_main(merge, argv=["--executor-input", json.dumps(task)]) == 0
    assert merged == [expected]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("update.steps=1", "input parameter overrides is not JSON"),
        ("[1]", "input parameter overrides is [1]: give a JSON object"),
        (3, "input parameter overrides is 3: give a JSON object"),
    ],
)
def test_what_is_no_mapping_is_one_line(given: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    merged.clear()
    task = {"inputs": {"parameterValues": {"overrides": given}}}
    assert step_main(merge, argv=["--executor-input", json.dumps(task)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert merged == []


def test_a_mapping_is_json_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    merged.clear()
    assert step_main(merge, argv=["--overrides", '{"seed": 3}']) == 0
    assert merged == [{"seed": 3}]
    assert step_main(merge, argv=["--overrides", "seed=3"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --overrides is not JSON")


def test_an_argument_of_another_type_is_a_defect_of_the_step() -> None:
    def listy(*, campaign: list[str]) -> StepResult:
        return StepResult()

    with pytest.raises(TypeError, match="use str, int, float, bool or dict"):
        step_main(listy, argv=[])


ABORTING = """
import ctypes
import runpy
import sys

libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)  # as the destructor of a library's thread does
runpy.run_module(f"layerloop.components.{sys.argv.pop(1)}", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("step", STEPS)
def test_a_library_that_aborts_while_the_process_ends_does_not_change_the_status_of_a_step(step: str) -> None:
    command = [sys.executable, "-c", ABORTING, step, "--executor-input", "[]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("error: --executor-input is not an executor input: pass the placeholder {{$}}\n")
