"""Runs over HTTP, against a server that speaks the KFP API: exit statuses, failures, attaching, runs to a target."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.pipelines.cli import main
from layerloop.pipelines.kfp_api import AwayError, RefusedError, connect
from layerloop.pipelines.runnable import read_package
from layerloop.pipelines.runs import LostError, Settings, Waiting, live_runs_of
from layerloop.pipelines.submit import attach, submit, submit_until

CAMPAIGN = "s3://bucket/mine"


def quick(**options: Any) -> Waiting:
    return Waiting(poll=lambda _: 0.01, **options)


def start(kfp_api: Any, package: Path, *, settings: Settings = Settings(experiment="layers"), **options: Any) -> int:  # noqa: B008
    waiting = options.pop("waiting", quick())
    api = connect(kfp_api.url, deadline=waiting.deadline)
    return submit(api, read_package(package), {"text": "7"}, settings, waiting, wait=True, **options)


# ---------------------------------------------------------------------------------------------------------- one run


def test_a_run_is_started_with_typed_parameters_in_its_experiment(kfp_api: Any, package: Path, capsys: Any) -> None:
    pipeline = read_package(package)
    assert submit(connect(kfp_api.url), pipeline, {"text": "7"}, Settings("layers", "mine"), quick()) == 0
    (run,) = kfp_api.runs.values()
    assert run["display_name"] == "mine"
    assert run["runtime_config"] == {"parameters": {"text": "7"}}  # a text stays a text
    assert run["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == "work"
    assert "platforms" in run["pipeline_spec"]["platform_spec"]
    assert "service_account" not in run
    assert [e["display_name"] for e in kfp_api.experiments.values()] == ["layers"]
    assert f"started: {kfp_api.url}/#/runs/details/run-0" in capsys.readouterr().out


def test_the_request_is_the_one_that_kfps_own_client_sends(kfp_api: Any, package: Path) -> None:
    import kfp

    settings = Settings("layers", "mine", service_account="runner", pipeline_root="s3://bucket/kfp")
    submit(connect(kfp_api.url), read_package(package), {"text": "7"}, settings, quick())
    client = kfp.Client(host=kfp_api.url)
    home = client.create_experiment("layers")
    options = {"pipeline_root": "s3://bucket/kfp", "service_account": "runner"}
    client.run_pipeline(home.experiment_id, "mine", str(package), {"text": "7"}, **options)
    ours, theirs = kfp_api.runs.values()
    assert len(kfp_api.experiments) == 1  # it finds ours
    assert {**ours, "run_id": "", "created_at": ""} == {**theirs, "run_id": "", "created_at": ""}


def test_the_defaults_of_the_options_are_read_from_the_environment(
    kfp_api: Any, package: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    kfp_api.multi_user = True
    variables = {
        "KFP_ENDPOINT": kfp_api.url,
        "KFP_NAMESPACE": "team-a",
        "KFP_EXPERIMENT": "mine",
        "KFP_SERVICE_ACCOUNT": "runner",
        "KFP_PIPELINE_ROOT": "s3://bucket/kfp",
        "KF_PIPELINES_UI_ENDPOINT": "https://kubeflow.example.com/_/pipeline/",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["submit", str(package), "-p", "text=a"]) == 0
    (run,) = kfp_api.runs.values()
    assert run["service_account"] == "runner"
    assert run["runtime_config"]["pipeline_root"] == "s3://bucket/kfp"
    assert [(e["display_name"], e["namespace"]) for e in kfp_api.experiments.values()] == [("mine", "team-a")]
    assert "https://kubeflow.example.com/pipeline/#/runs/details/run-0" in capsys.readouterr().out
    assert main(["submit", str(package), "-p", "text=a", "--service-account", "other"]) == 0
    assert kfp_api.runs["run-1"]["service_account"] == "other"


@pytest.mark.parametrize(
    "states, status",
    [
        (["PENDING", "RUNNING", "SUCCEEDED"], 0),
        (["RUNNING", "FAILED"], 1),
        (["RUNNING", "CANCELING", "CANCELED"], 3),
        (["SKIPPED"], 3),
        (["RUNTIME_STATE_UNSPECIFIED", "PAUSED", "RUNNING", "SUCCEEDED"], 0),
    ],
)
def test_the_exit_status_tells_how_the_run_ended(
    kfp_api: Any, package: Path, states: list[str], status: int, capsys: Any
) -> None:
    kfp_api.states = list(states)
    assert start(kfp_api, package) == status
    said = [line.split(": ")[1].split()[0] for line in capsys.readouterr().out.splitlines() if " after " in line]
    assert said == [{"RUNTIME_STATE_UNSPECIFIED": "queued"}.get(state, state.lower()) for state in states]


def test_a_failure_is_named_by_its_task_with_the_end_of_its_log(kfp_api: Any, package: Path, capsys: Any) -> None:
    kfp_api.states = ["RUNNING", "FAILED"]
    kfp_api.logs["x7-score-1"] = "".join(f"line {n}\n" for n in range(100)) + "error: judge does not answer\n"
    assert start(kfp_api, package) == 1
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("  score rollouts: error: judge does not answer")
    assert lines[at + 1] == "    | line 86"
    assert lines[-1] == "    | error: judge does not answer"
    assert not [line for line in lines if "layerloop-train-x7" in line or line.startswith("  executor")]


def test_without_its_log_a_failure_says_where_it_is(kfp_api: Any, package: Path, capsys: Any) -> None:
    kfp_api.states = ["FAILED"]
    assert start(kfp_api, package) == 1
    assert f"its log: {kfp_api.url}/#/runs/details/run-0" in capsys.readouterr().out.splitlines()[-1]


def test_the_timeout_ends_the_wait_and_the_run_goes_on(kfp_api: Any, package: Path, capsys: Any) -> None:
    kfp_api.states = ["RUNNING"]
    began = time.monotonic()
    assert start(kfp_api, package, waiting=quick(deadline=began + 0.3)) == 3
    out = capsys.readouterr().out
    assert "is still running after" in out
    assert "trying on" not in out  # the server was there all the time


def test_the_timeout_bounds_a_server_that_stops_answering(kfp_api: Any, package: Path) -> None:
    def hang(handler: Any) -> bool:
        if handler.command == "GET" and "/runs/" in handler.path:
            time.sleep(3)
        return False

    kfp_api.before = hang
    began = time.monotonic()
    assert start(kfp_api, package, waiting=quick(deadline=began + 0.5)) == 3
    assert time.monotonic() - began < 2.5


def test_the_timeout_bounds_every_call_of_the_command(kfp_api: Any, package: Path, capsys: Any) -> None:
    for part in ("/healthz", "/pipelines", "/experiments", "/runs"):
        kfp_api.before = lambda handler, part=part: part in handler.path and (time.sleep(4) or False)
        began = time.monotonic()
        pipeline = "work" if part == "/pipelines" else str(package)
        arguments = ["submit", pipeline, "--wait", "--timeout", "0.7", "-p", "text=a", "--host", kfp_api.url]
        assert main(arguments) in (2, 3), part
        assert time.monotonic() - began < 3, part


def test_a_run_whose_start_was_not_confirmed_is_not_denied(kfp_api: Any, package: Path) -> None:
    def die(handler: Any) -> bool:
        if handler.command == "POST" and handler.path.endswith("/runs"):
            handler.server.add_run()
            handler.reply(504, {"message": "gateway timeout"})
            return True
        return False

    kfp_api.before = die
    with pytest.raises(LostError, match="run work-.* may have been started: look for it") as caught:
        start(kfp_api, package)
    assert caught.value.status == 3


def test_a_server_that_is_away_is_waited_for_and_both_are_said_once(kfp_api: Any, package: Path, capsys: Any) -> None:
    kfp_api.failing = [503] * 20 + [502] * 20
    assert start(kfp_api, package) == 0
    out = capsys.readouterr().out
    assert out.count("answers 503: the server is restarting; trying on for 7200 s") == 1
    assert out.count("KFP answers again") == 1


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    strftime = staticmethod(time.strftime)


def test_a_server_that_is_away_for_an_hour_is_waited_for_by_default(
    kfp_api: Any, package: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    clock = Clock()
    monkeypatch.setattr("layerloop.pipelines.runs.time", clock)

    def away(handler: Any) -> bool:
        if 10 < clock.now < 3700 and handler.command == "GET":
            handler.reply(503, {"message": "away"})
            return True
        return False

    kfp_api.before, kfp_api.states = away, ["RUNNING"] * 10 + ["SUCCEEDED"]
    assert start(kfp_api, package, waiting=Waiting()) == 0
    assert 3700 < clock.now < 4500
    assert "KFP answers again" in capsys.readouterr().out


def test_a_token_that_is_renewed_while_a_run_is_awaited_is_followed(
    kfp_api: Any, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text("token-0")
    monkeypatch.setenv("KFP_TOKEN_FILE", str(file))
    kfp_api.tokens, kfp_api.states = {"token-0"}, ["PENDING", "RUNNING", "RUNNING", "RUNNING", "SUCCEEDED"]

    def renew(handler: Any) -> bool:
        if "/runs/" in handler.path:
            number = len(kfp_api.seen)
            file.write_text(f"token-{number}")
            kfp_api.tokens = {f"token-{number - 1}", f"token-{number}"}  # the old one is good for a while
        return False

    kfp_api.before = renew
    assert start(kfp_api, package) == 0
    assert len(kfp_api.authorizations) >= 4


def test_a_server_that_stays_away_beyond_the_patience_ends_the_wait(kfp_api: Any, package: Path) -> None:
    kfp_api.failing = [503] * 100_000
    with pytest.raises(LostError, match=r"run-0 cannot be watched any more.*503.*submit --attach run-0") as caught:
        start(kfp_api, package, waiting=quick(patience=0.2))
    assert caught.value.status == 3


@pytest.mark.parametrize("status", [401, 403])
def test_a_session_that_expires_in_the_middle_ends_the_wait_at_once(kfp_api: Any, package: Path, status: int) -> None:
    kfp_api.states = ["RUNNING"]
    kfp_api.failing = [status]
    with pytest.raises(RefusedError, match=rf"refused \({status}\).*submit --attach run-0"):
        start(kfp_api, package)


def test_a_login_page_in_the_middle_ends_the_wait_at_once(kfp_api: Any, package: Path, gate: Any) -> None:
    def expire(handler: Any) -> bool:
        if handler.command == "GET" and "/runs/run-0" in handler.path:
            gate(handler)
            return True
        return False

    kfp_api.before = expire
    with pytest.raises(RefusedError, match="KFP_COOKIE"):
        start(kfp_api, package)


@pytest.mark.parametrize("body", [{}, {"run_id": "another", "state": "SUCCEEDED"}, {"state": "SUCCEEDED"}])
def test_a_body_that_is_not_the_run_is_an_error(kfp_api: Any, package: Path, body: Any) -> None:
    def answer(handler: Any) -> bool:
        if handler.command == "GET" and "/runs/" in handler.path:
            handler.reply(200, body)
            return True
        return False

    kfp_api.before = answer
    with pytest.raises(RefusedError, match="something that is not run run-0"):
        start(kfp_api, package)


def test_the_command_ends_with_two_and_one_line_where_it_is_not_let_in(
    kfp_api: Any, package: Path, gate: Any, capsys: Any
) -> None:
    kfp_api.tokens, kfp_api.gate = {"right"}, gate
    assert main(["submit", str(package), "-p", "text=a", "--host", kfp_api.url]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


# -------------------------------------------------------------------------------------------- interrupted and attached


def test_an_interrupted_wait_says_how_to_attach_and_attaching_ends_with_the_run(
    kfp_api: Any, package: Path, tmp_path: Path
) -> None:
    kfp_api.states, kfp_api.multi_user = ["RUNNING"], True
    command = [sys.executable, "-m", "layerloop.pipelines.cli", "submit", str(package), "-p", "text=a", "--wait"]
    environment = {**os.environ, "KFP_ENDPOINT": kfp_api.url, "KFP_NAMESPACE": "team-a"}
    out = tmp_path / "out"
    with out.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    while "running after" not in out.read_text():
        assert process.poll() is None, out.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # as for a pod that is evicted, or a CI job that is cancelled
    assert process.wait(timeout=60) == 130
    told = re.search("attach to it again:  layerloop (submit --attach run-0 .*)", out.read_text())
    assert told
    assert "run the same command" not in out.read_text()
    kfp_api.states = ["SUCCEEDED"]
    assert main(told[1].split()) == 0  # what it says is what works
    assert len(kfp_api.runs) == 1


def test_a_runs_link_is_as_good_as_its_id(kfp_api: Any, package: Path) -> None:
    assert start(kfp_api, package) == 0
    assert main(["submit", "--attach", f"{kfp_api.url}/#/runs/details/run-0", "--host", kfp_api.url]) == 0


def test_attaching_to_a_run_that_is_not_there_is_one_line(kfp_api: Any, capsys: Any) -> None:
    assert main(["submit", "--attach", "run-9", "--host", kfp_api.url]) == 2
    assert "answers 404: Run run-9 not found" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["submit"], "no pipeline is given"),
        (["submit", "--attach", "run-0", "-p", "a=b"], "--attach waits for a run that was started before"),
        (["submit", "x.yaml", "--timeout", "-1"], "--timeout is -1: give a number above 0"),
        (["submit", "x.yaml", "--until", "0"], "--until is 0: give a number above 0"),
        (["submit", "x.yaml", "-p", "text"], "parameter 'text' has no value"),
        (["submit", "x.yaml", "--until", "3"], "campaign is missing: --until needs"),
    ],
)
def test_options_that_say_nothing_are_refused(arguments: list[str], line: str, capsys: Any) -> None:
    assert main(arguments) == 2
    assert line in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- run after run


class Campaign:
    """A campaign's head, which every run that succeeds moves by `step`."""

    def __init__(self, kfp_api: Any, *, step: int = 2) -> None:
        self.head, self.step = 0, step
        kfp_api.on_end = self.ended

    def ended(self, run: Any) -> None:
        if run["state"] == "SUCCEEDED":
            self.head += self.step

    def read(self, uri: str) -> int:
        assert uri == CAMPAIGN
        return self.head


def go_on(kfp_api: Any, train_package: Path, head: Any, *, until: int = 5, **options: Any) -> int:
    waiting = options.pop("waiting", quick())
    parameters = {"campaign": CAMPAIGN, "images": "s3://bucket/photos"}
    api, pipeline = connect(kfp_api.url, deadline=waiting.deadline), read_package(train_package)
    return submit_until(api, pipeline, parameters, Settings(), waiting, until=until, head=head, **options)


def test_runs_are_started_until_the_target_and_each_knows_it(kfp_api: Any, train_package: Path, capsys: Any) -> None:
    kfp_api.states = ["SUCCEEDED"]
    assert go_on(kfp_api, train_package, Campaign(kfp_api).read) == 0
    assert len(kfp_api.runs) == 3
    given = {"campaign": CAMPAIGN, "images": "s3://bucket/photos", "until": 5}
    assert all(run["runtime_config"]["parameters"] == given for run in kfp_api.runs.values())
    assert "has reached iteration 6, the target is 5: done" in capsys.readouterr().out


def test_a_campaign_that_is_there_starts_nothing(kfp_api: Any, train_package: Path) -> None:
    assert go_on(kfp_api, train_package, lambda uri: 5) == 0
    assert not kfp_api.runs


def ours(**fields: Any) -> dict[str, Any]:
    spec = {"pipelineInfo": {"name": "layerloop-train"}}
    config = {"parameters": {"campaign": CAMPAIGN + "/"}}
    return {"pipeline_spec": spec, "runtime_config": config, "state": "RUNNING", **fields}


def test_a_live_run_of_the_campaign_is_attached_to_whatever_page_it_is_on(
    kfp_api: Any, train_package: Path, capsys: Any
) -> None:
    kfp_api.add_run(**ours())  # started in the UI, with a slash more
    kfp_api.add_run(**ours(runtime_config={"parameters": {"campaign": CAMPAIGN + "2"}}))
    kfp_api.add_run(**ours(pipeline_spec={"pipelineInfo": {"name": "layerloop-evaluate"}}))
    kfp_api.add_run(**ours(state="FAILED"))
    for _ in range(10):
        kfp_api.add_run(state="SUCCEEDED")
    alive = live_runs_of(connect(kfp_api.url), CAMPAIGN, "layerloop-train")
    assert [run["run_id"] for run in alive] == ["run-0"]
    kfp_api.states = ["SUCCEEDED"]
    assert go_on(kfp_api, train_package, Campaign(kfp_api).read, until=2) == 0
    assert len(kfp_api.runs) == 14
    assert kfp_api.runs["run-0"]["state"] == "SUCCEEDED"
    assert "has a live run, waiting for it" in capsys.readouterr().out


def test_a_run_of_a_registered_version_is_known_by_the_versions_pipeline(kfp_api: Any, train_package: Path) -> None:
    reference = {"pipeline_id": "p", "pipeline_version_id": "v"}
    spec = {"pipeline_spec": {"pipelineInfo": {"name": "layerloop-train"}}, "platform_spec": {}}
    kfp_api.versions["v"] = {**reference, "pipeline_spec": spec}
    for identity in ("v", "gone"):
        key = kfp_api.add_run(**ours(pipeline_version_reference={**reference, "pipeline_version_id": identity}))
        del kfp_api.runs[key]["pipeline_spec"]
    found = live_runs_of(connect(kfp_api.url), CAMPAIGN, "layerloop-train")
    assert [run["run_id"] for run in found] == ["run-0", "run-1"]  # of one that is gone it is not known, so it counts
    assert [run["run_id"] for run in live_runs_of(connect(kfp_api.url), CAMPAIGN, "other")] == ["run-1"]


def test_of_two_runs_started_at_the_same_moment_the_later_is_withdrawn(
    kfp_api: Any, train_package: Path, capsys: Any
) -> None:
    def rival(run: Any) -> None:
        kfp_api.on_start = lambda run: None
        kfp_api.add_run(**ours(created_at="2026-11-27T00:00:00Z"))

    campaign = Campaign(kfp_api)
    kfp_api.on_start, kfp_api.states = rival, ["SUCCEEDED"]
    assert go_on(kfp_api, train_package, campaign.read, until=2) == 0
    assert [run["state"] for run in kfp_api.runs.values()] == ["CANCELED", "SUCCEEDED"]
    assert "run run-0 is withdrawn" in capsys.readouterr().out


def test_runs_without_progress_end_it_and_progress_counts_from_zero(
    kfp_api: Any, train_package: Path, capsys: Any
) -> None:
    campaign = Campaign(kfp_api, step=1)
    ends = ["FAILED", "FAILED", "SUCCEEDED", "FAILED", "FAILED", "FAILED"]
    kfp_api.states = list(ends)
    assert go_on(kfp_api, train_package, campaign.read, max_failures=3) == 1
    assert len(kfp_api.runs) == len(ends)
    assert "3 runs in a row without progress, stopped at iteration 1" in capsys.readouterr().out


def test_a_run_that_succeeds_and_moves_nothing_is_no_progress(kfp_api: Any, train_package: Path) -> None:
    kfp_api.states = ["SUCCEEDED"]
    assert go_on(kfp_api, train_package, lambda uri: 0, max_failures=2) == 1
    assert len(kfp_api.runs) == 2


def test_a_run_that_a_person_cancels_is_not_started_again(kfp_api: Any, train_package: Path) -> None:
    kfp_api.states = ["CANCELED"]
    assert go_on(kfp_api, train_package, Campaign(kfp_api).read) == 3
    assert len(kfp_api.runs) == 1


def test_a_server_that_goes_away_between_runs_starts_no_second_run(kfp_api: Any, train_package: Path) -> None:
    """It dies while the first run is being started, which was started nevertheless, and stays away for a while."""
    down = [False]

    def flaky(handler: Any) -> bool:
        if handler.command == "POST" and handler.path.endswith("/runs") and not kfp_api.runs:
            kfp_api.add_run(**ours())
            down[0] = True
        if down[0]:
            down.append(True)
            down[0] = len(down) < 25
            handler.reply(503, "<html>no healthy upstream</html>", kind="text/html")
            return True
        return False

    campaign = Campaign(kfp_api, step=5)
    kfp_api.before, kfp_api.states = flaky, ["SUCCEEDED"]
    assert go_on(kfp_api, train_package, campaign.read) == 0
    assert len(kfp_api.runs) == 1
    assert len(down) == 25


def test_the_time_is_up_between_runs_too(kfp_api: Any, train_package: Path) -> None:
    kfp_api.before = lambda handler: "/runs" in handler.path and (handler.reply(503, {"message": "away"}) or True)
    waiting = quick(deadline=time.monotonic() + 0.4)
    assert go_on(kfp_api, train_package, lambda uri: 0, waiting=waiting) == 3


def test_a_store_that_cannot_be_read_from_here_is_said_with_the_other_way(kfp_api: Any, train_package: Path) -> None:
    def unreadable(uri: str) -> int:
        raise LayerloopError("s3://bucket/mine: no credentials")

    with pytest.raises(LayerloopError, match="no credentials; .*`layerloop campaign run-until` does not"):
        go_on(kfp_api, train_package, unreadable)
    assert not kfp_api.runs


def test_a_store_that_fails_later_is_asked_again(kfp_api: Any, train_package: Path) -> None:
    campaign, calls = Campaign(kfp_api, step=5), []

    def flaky(uri: str) -> int:
        calls.append(uri)
        if len(calls) in (2, 3):
            raise LayerloopError("s3://bucket/mine: 503 slow down")
        return campaign.head

    kfp_api.states = ["SUCCEEDED"]
    assert go_on(kfp_api, train_package, flaky) == 0
    assert len(kfp_api.runs) == 1


def test_the_command_reads_the_head_from_the_campaigns_store(
    kfp_api: Any, train_package: Path, tmp_path: Path, capsys: Any
) -> None:
    from layerloop.components.schema.recipe import parse_recipe
    from layerloop.components.storage.campaign import Campaign as Stored
    from layerloop.pipelines.inputs import recipe_text

    uri = f"file://{tmp_path}/campaign"
    arguments = ["submit", str(train_package), "--host", kfp_api.url, "--until", "1", "-p", f"campaign={uri}"]

    def commit(run: Any) -> None:
        stored = Stored.create_or_open(uri, parse_recipe(recipe_text("tiny", [])))
        stored.store.create("iterations/000001/policy/manifest.json", b"{}")

    kfp_api.states, kfp_api.on_end = ["SUCCEEDED"], commit
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert len(kfp_api.runs) == 1


def test_an_interrupt_says_that_the_same_command_attaches(kfp_api: Any, train_package: Path, capsys: Any) -> None:
    def interrupt(_: float) -> float:
        raise KeyboardInterrupt

    kfp_api.states = ["RUNNING"]
    status = go_on(kfp_api, train_package, lambda uri: 0, waiting=Waiting(poll=interrupt))
    assert status == 130
    out = capsys.readouterr().out
    assert "interrupted: run run-0 continues: " in out
    assert "the same command attaches to the campaign's run again" in out


def test_no_answer_at_all_to_an_attached_wait_is_an_away_error(kfp_api: Any) -> None:
    api = connect(kfp_api.url)
    kfp_api.failing = [503] * 1000
    with pytest.raises(AwayError):
        attach(api, "run-0", quick(patience=0.05))


def test_a_campaign_in_a_folder_is_refused_before_a_cluster_sees_it(
    kfp_api: Any, train_package: Path, capsys: Any
) -> None:
    assert main(["submit", str(train_package), "--host", kfp_api.url, "-p", "campaign=campaigns/mine"]) == 2
    assert "campaign is 'campaigns/mine', a folder, which the pods of a cluster do not share" in capsys.readouterr().err
    assert not kfp_api.runs


def test_structured_parameters_travel_as_what_they_are(kfp_api: Any, package: Path) -> None:
    overrides = json.dumps({"update": {"learning_rate": 1e-4}})
    parameters = {"text": "a", "table": overrides, "many": "[1, 2]", "count": "3", "flag": "true", "share": "1"}
    submit(connect(kfp_api.url), read_package(package), parameters, Settings(), quick())
    assert kfp_api.runs["run-0"]["runtime_config"]["parameters"] == {
        "text": "a",
        "table": {"update": {"learning_rate": 1e-4}},
        "many": [1, 2],
        "count": 3,
        "flag": True,
        "share": 1.0,
    }


def test_an_image_without_the_extra_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "kfp.py").write_text("raise ModuleNotFoundError(\"No module named 'kfp'\", name='kfp')\n")
    command = [sys.executable, "-m", "layerloop.pipelines.cli", "submit", "x.yaml", "--host", "http://127.0.0.1:9"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == (
        "error: layerloop submit needs kfp, which is not here: pip install 'layerloop[pipelines]'\n"
    )
