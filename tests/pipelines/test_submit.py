"""Runs and schedules, over HTTP, against a server that speaks the KFP API."""

from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from layerloop.components.schema.errors import LayerloopError
from layerloop.pipelines.packages import write_pipeline
from layerloop.pipelines.submit import LOST_CONTACT, apply_schedule, connect, submit, typed_parameters


@dsl.container_component
def work(text: str, count: int, share: float, flag: bool, table: dict) -> dsl.ContainerSpec:
    return dsl.ContainerSpec(image="any", command=["true"], args=[text, count, share, flag, table])


@dsl.pipeline(name="work")
def pipeline(text: str, count: int = 1, share: float = 0.5, flag: bool = False, table: dict = {}) -> None:  # noqa: B006
    work(text=text, count=count, share=share, flag=flag, table=table)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write_pipeline(pipeline, tmp_path / "pipeline.yaml")


def start(kfp_api: Any, package: Path, **options: Any) -> int:
    return submit(connect(kfp_api.url), package, {"text": "7"}, experiment="layers", poll=lambda _: 0.01, **options)


def test_a_run_is_started_with_typed_parameters_in_its_experiment(kfp_api: Any, package: Path) -> None:
    assert start(kfp_api, package, run_name="mine") == 0
    (run,) = kfp_api.runs.values()
    assert run["display_name"] == "mine"
    assert run["runtime_config"]["parameters"] == {"text": "7"}  # a text stays a text
    assert run["pipeline_spec"]["pipelineInfo"]["name"] == "work"
    assert [e["display_name"] for e in kfp_api.experiments.values()] == ["layers"]


def test_waiting_ends_with_zero_when_the_run_succeeds(kfp_api: Any, package: Path, capsys: Any) -> None:
    assert start(kfp_api, package, wait=True) == 0
    states = [line.split(": ")[1].split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert states == ["pending", "running", "succeeded"]


def test_waiting_ends_with_one_and_the_failed_tasks_when_the_run_fails(
    kfp_api: Any, package: Path, capsys: Any
) -> None:
    kfp_api.states = ["RUNNING", "FAILED"]
    assert start(kfp_api, package, wait=True) == 1
    assert "  score: error: judge does not answer" in capsys.readouterr().out


def test_waiting_ends_with_one_when_the_run_is_cancelled(kfp_api: Any, package: Path) -> None:
    kfp_api.states = ["RUNNING", "CANCELING", "CANCELED"]
    assert start(kfp_api, package, wait=True) == 1


def test_waiting_ends_with_one_after_the_timeout(kfp_api: Any, package: Path, capsys: Any) -> None:
    kfp_api.states = ["RUNNING"]
    assert start(kfp_api, package, wait=True, timeout=0.2) == 1
    assert "is still running after" in capsys.readouterr().out


def test_a_server_that_restarts_is_waited_for(kfp_api: Any, package: Path) -> None:
    kfp_api.failing = [503] * (LOST_CONTACT - 1)
    assert start(kfp_api, package, wait=True) == 0


def test_a_server_that_stays_away_ends_the_wait_in_one_line(kfp_api: Any, package: Path) -> None:
    kfp_api.failing = [503] * 1000
    with pytest.raises(LayerloopError, match=r"run-0 cannot be watched any more.*503: the server is restarting"):
        start(kfp_api, package, wait=True)


def test_the_token_of_the_environment_or_of_the_pod_is_sent(
    kfp_api: Any, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(kfp_api, package)
    assert kfp_api.authorizations == {None}
    (tmp_path / "token").write_text("mounted")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    start(kfp_api, package)
    assert kfp_api.authorizations == {None, "Bearer mounted"}
    monkeypatch.setenv("KFP_TOKEN", "given")
    start(kfp_api, package)
    assert kfp_api.authorizations == {None, "Bearer mounted", "Bearer given"}


def test_nobody_at_the_host_is_one_line() -> None:
    with pytest.raises(LayerloopError, match="KFP at http://127.0.0.1:9 cannot be reached"):
        connect("http://127.0.0.1:9")


def test_a_schedule_is_created_enabled_with_typed_parameters(kfp_api: Any, package: Path) -> None:
    client = connect(kfp_api.url)
    parameters = {"text": "a", "count": "3", "flag": "true"}
    apply_schedule(client, package, parameters, experiment="layers", name="nightly", cron="0 0 2 * * *")
    (schedule,) = kfp_api.schedules.values()
    assert schedule["mode"] == "ENABLE"
    assert schedule["trigger"] == {"cron_schedule": {"cron": "0 0 2 * * *"}}
    assert (schedule["max_concurrency"], schedule["no_catchup"]) in {("1", True), (1, True)}
    assert schedule["runtime_config"]["parameters"] == {"text": "a", "count": 3, "flag": True}


def test_a_schedule_of_the_same_name_is_replaced_and_others_are_left(kfp_api: Any, package: Path) -> None:
    client = connect(kfp_api.url)
    for name, cron in (("nightly", "0 0 2 * * *"), ("other", "0 0 3 * * *"), ("nightly", "0 0 4 * * *")):
        apply_schedule(client, package, {"text": "a"}, experiment="layers", name=name, cron=cron)
    left = {s["display_name"]: s["trigger"]["cron_schedule"]["cron"] for s in kfp_api.schedules.values()}
    assert left == {"nightly": "0 0 4 * * *", "other": "0 0 3 * * *"}


def test_a_refused_schedule_leaves_the_old_one(kfp_api: Any, package: Path) -> None:
    client = connect(kfp_api.url)
    apply_schedule(client, package, {"text": "a"}, experiment="layers", name="nightly", cron="0 0 2 * * *")
    kfp_api.refuse_schedules = True
    with pytest.raises(LayerloopError, match="KFP answers 400: the cron expression is invalid"):
        apply_schedule(client, package, {"text": "a"}, experiment="layers", name="nightly", cron="0 0 99 * * *")
    assert len(kfp_api.schedules) == 1


def test_five_fields_are_no_cron_expression(kfp_api: Any, package: Path) -> None:
    with pytest.raises(LayerloopError, match="six fields, seconds first"):
        apply_schedule(None, package, {"text": "a"}, experiment="layers", name="nightly", cron="0 2 * * *")


def test_text_becomes_what_the_pipeline_declares(package: Path) -> None:
    given = {"text": "1", "count": "2", "share": "3", "flag": "0", "table": '{"a": 1}'}
    assert typed_parameters(package, given) == {"text": "1", "count": 2, "share": 3.0, "flag": False, "table": {"a": 1}}


@pytest.mark.parametrize(
    "given, line",
    [
        ({"text": "a", "cuont": "1"}, "cuont is not a parameter of work: known are count, flag, share, table, text"),
        ({}, "text is missing: work needs"),
        ({"text": "a", "count": "1.5"}, "count is '1.5': work wants number integer"),
        ({"text": "a", "flag": "maybe"}, "flag is 'maybe': work wants boolean"),
        ({"text": "a", "table": "{"}, "table is '{': work wants struct"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_is_sent(package: Path, given: Any, line: str) -> None:
    with pytest.raises(LayerloopError, match=line):
        typed_parameters(package, given)


@pytest.mark.parametrize("text", ["", "a: 1", "- 1", "{", "\x00"])
def test_another_file_is_no_pipeline(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(LayerloopError, match="x.yaml is no compiled pipeline: make one with `layerloop compile`"):
        typed_parameters(tmp_path / "x.yaml", {})
