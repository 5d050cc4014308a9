"""Recurring runs over HTTP: applied, listed, paused, deleted, from a file, and a campaign's chain to its target."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from layerloop.components.schema.errors import LayerloopError
from layerloop.pipelines.cli import main
from layerloop.pipelines.kfp_api import RefusedError, connect
from layerloop.pipelines.runnable import read_package
from layerloop.pipelines.schedules import Schedule, apply_schedule, chain_name, check_cron, read_schedules

CAMPAIGN = "s3://bucket/mine"


def apply(kfp_api: Any, package: Path, **fields: Any) -> str:
    fields = {"name": "nightly", "cron": "0 0 2 * * *", "parameters": {"text": "a"}, **fields}
    schedule = Schedule(pipeline=str(package), **fields)
    return apply_schedule(connect(kfp_api.url), schedule, read_package(package))


def by_name(kfp_api: Any) -> list[tuple[str, str]]:
    return [(s["display_name"], s["mode"]) for s in kfp_api.schedules.values()]


def test_a_schedule_is_created_enabled_with_typed_parameters(kfp_api: Any, package: Path) -> None:
    settings = {"service_account": "runner", "pipeline_root": "s3://bucket/kfp"}
    apply(kfp_api, package, parameters={"text": "a", "count": "3", "flag": True}, **settings)
    (schedule,) = kfp_api.schedules.values()
    assert schedule["mode"] == "ENABLE"
    assert schedule["trigger"] == {"cron_schedule": {"cron": "0 0 2 * * *"}}
    assert (schedule["max_concurrency"], schedule["no_catchup"]) == ("1", True)
    assert schedule["service_account"] == "runner"
    parameters = {"text": "a", "count": 3, "flag": True}
    assert schedule["runtime_config"] == {"parameters": parameters, "pipeline_root": "s3://bucket/kfp"}


def test_the_request_is_the_one_that_kfps_own_client_sends(kfp_api: Any, package: Path) -> None:
    import kfp

    apply(kfp_api, package)
    client = kfp.Client(host=kfp_api.url)
    home = client.create_experiment("layerloop")
    client.create_recurring_run(
        home.experiment_id,
        "nightly",
        cron_expression="0 0 2 * * *",
        max_concurrency=1,
        no_catchup=True,
        params={"text": "a"},
        pipeline_package_path=str(package),
    )
    ours, theirs = kfp_api.schedules.values()
    changed = {"recurring_run_id": "", "description": "", "max_concurrency": "1"}
    assert {**ours, **changed} == {**theirs, **changed}


def test_the_same_settings_change_nothing_and_resume_or_pause(kfp_api: Any, package: Path) -> None:
    assert apply(kfp_api, package).endswith(": created")
    assert apply(kfp_api, package).endswith(": as it was")
    assert apply(kfp_api, package, paused=True).endswith(": paused")
    assert by_name(kfp_api) == [("nightly", "DISABLE")]
    assert apply(kfp_api, package).endswith(": resumed")
    assert by_name(kfp_api) == [("nightly", "ENABLE")]


def test_a_schedule_of_the_same_name_is_replaced_and_others_are_left(kfp_api: Any, package: Path) -> None:
    for name, cron in (("nightly", "0 0 2 * * *"), ("other", "0 0 3 * * *"), ("nightly", "0 0 4 * * *")):
        apply(kfp_api, package, name=name, cron=cron)
    apply(kfp_api, package, experiment="another")
    left = sorted((s["display_name"], s["trigger"]["cron_schedule"]["cron"]) for s in kfp_api.schedules.values())
    assert left == [("nightly", "0 0 2 * * *"), ("nightly", "0 0 4 * * *"), ("other", "0 0 3 * * *")]


def test_replacing_does_not_stop_a_run_that_is_going_on(kfp_api: Any, package: Path) -> None:
    """A run belongs to its recurring run: Kubernetes deletes it with it (owner references)."""
    apply(kfp_api, package)
    (old,) = kfp_api.schedules
    home = next(iter(kfp_api.experiments))
    run = kfp_api.add_run(recurring_run_id=old, experiment_id=home, state="RUNNING")
    assert f"the old one is paused while its run {run} continues" in apply(kfp_api, package, cron="0 0 4 * * *")
    assert kfp_api.runs[run]["state"] == "RUNNING"
    assert sorted(by_name(kfp_api)) == [("nightly", "DISABLE"), ("nightly", "ENABLE")]
    kfp_api.runs[run]["state"] = "SUCCEEDED"
    assert apply(kfp_api, package, cron="0 0 4 * * *").endswith("as it was, the old one is deleted")
    assert by_name(kfp_api) == [("nightly", "ENABLE")]


def test_a_refused_schedule_leaves_the_old_one(kfp_api: Any, package: Path) -> None:
    apply(kfp_api, package)
    kfp_api.refuse_schedules = True
    with pytest.raises(RefusedError, match="answers 400: the cron expression is invalid"):
        apply(kfp_api, package, cron="0 0 4 * * *")
    assert len(kfp_api.schedules) == 1


def test_schedules_are_listed_paused_resumed_and_deleted(kfp_api: Any, package: Path, capsys: Any) -> None:
    host = ["--host", kfp_api.url]
    arguments = ["schedule", "apply", str(package), "-p", "text=a", "--cron", "0 0 2 * * *", *host]
    for name in ("nightly", "a", "b", "c"):  # more than a page
        assert main([*arguments, "--name", name]) == 0
    assert main(["schedule", "pause", "nightly", "c", *host]) == 0
    capsys.readouterr()
    assert main(["schedule", "list", *host]) == 0
    rows = [line.split()[:8] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["name", "when", "state", "id"]
    assert [(row[0], row[7]) for row in rows[1:]] == [("nightly", "paused"), ("a", "on"), ("b", "on"), ("c", "paused")]
    assert main(["schedule", "resume", "c", *host]) == 0
    assert main(["schedule", "delete", "nightly", "a", *host]) == 0
    assert by_name(kfp_api) == [("b", "ENABLE"), ("c", "ENABLE")]
    assert main(["schedule", "delete", "b", "nightly", *host]) == 2
    assert "schedule nightly is not in experiment layerloop: known are b, c" in capsys.readouterr().err
    assert len(kfp_api.schedules) == 2


def test_an_empty_experiment_has_nothing_to_list(kfp_api: Any, capsys: Any) -> None:
    assert main(["schedule", "list", "--host", kfp_api.url]) == 0
    assert capsys.readouterr().out == "experiment layerloop has no schedule\n"
    assert not kfp_api.experiments


# ---------------------------------------------------------------------------------------------------------------- cron


@pytest.mark.parametrize(
    "text",
    ["0 0 2 * * *", "*/10 0,30 8-18/2 1 jan-mar,DEC ?", "0 0 0 31 * 1-5", "0 5/10 * ? * Sun", "59 59 23 29 2 *"],
)
def test_what_kfp_takes_is_a_cron_expression(text: str) -> None:
    assert check_cron(text) == text


@pytest.mark.parametrize(
    "text, line",
    [
        ("0 2 * * *", "write six fields, seconds first"),
        ("61 99 3 * * *", "'61' is no second: 0 to 59"),
        ("0 99 3 * * *", "'99' is no minute: 0 to 59"),
        ("0 0 24 * * *", "'24' is no hour: 0 to 23"),
        ("0 0 2 0 * *", "'0' is no day of the month: 1 to 31"),
        ("0 0 2 * 13 *", "'13' is no month: 1 to 12, or a name"),
        ("0 0 2 * * 7", "'7' is no day of the week: 0 to 6, or a name"),
        ("0 0 2 * * mon-sun", "'mon-sun' is no day of the week"),
        ("0 0 2 * foo *", "'foo' is no month"),
        ("*/0 0 2 * * *", r"'\*/0' is no second"),
        ("0 30-10 2 * * *", "'30-10' is no minute"),
        ("0 0 2,, * * *", "'' is no hour"),
        ("0 0 -1 * * *", "'-1' is no hour"),
        ("0 0 2 30 2 *", "that day never comes in these months"),
        ("0 0 2 31 4,6 ?", "that day never comes in these months"),
    ],
)
def test_what_kfp_would_refuse_or_never_start_is_refused_here(text: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        check_cron(text)


def test_the_command_refuses_a_wrong_cron_in_one_line(kfp_api: Any, package: Path, capsys: Any) -> None:
    arguments = ["schedule", "apply", str(package), "-p", "text=a", "--name", "x", "--host", kfp_api.url]
    assert main([*arguments, "--cron", "61 99 3 * * *"]) == 2
    assert "'61' is no second" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "--cron not given" in capsys.readouterr().err
    assert not kfp_api.seen


# ---------------------------------------------------------------------------------------------------------- from a file


def write(path: Path, *schedules: Any) -> Path:
    path.write_text(yaml.safe_dump({"schedules": list(schedules)}))
    return path


def test_a_file_holds_several_schedules(kfp_api: Any, package: Path, tmp_path: Path, capsys: Any) -> None:
    nightly = {"name": "nightly", "pipeline": str(package), "cron": "0 0 2 * * *", "parameters": {"text": "a"}}
    often = {"name": "often", "pipeline": str(package), "every_minutes": 30, "parameters": {"text": "b", "count": 2}}
    file = write(tmp_path / "schedules.yaml", nightly, {**often, "paused": True, "service_account": "other"})
    command = ["schedule", "apply", "-f", str(file), "--host", kfp_api.url, "--service-account", "runner"]
    assert main(command) == 0
    first, second = kfp_api.schedules.values()
    assert (first["display_name"], first["mode"], first["service_account"]) == ("nightly", "ENABLE", "runner")
    assert (second["display_name"], second["mode"], second["service_account"]) == ("often", "DISABLE", "other")
    assert second["trigger"] == {"periodic_schedule": {"interval_second": "1800"}}
    assert second["runtime_config"]["parameters"] == {"text": "b", "count": 2}
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.count("as it was") == 2


def test_everything_wrong_with_a_file_is_said_a_line_each_and_nothing_is_applied(
    kfp_api: Any, package: Path, tmp_path: Path, capsys: Any
) -> None:
    good = {"name": "a", "pipeline": str(package), "cron": "0 0 2 * * *", "parameters": {"text": "a"}}
    file = write(
        tmp_path / "schedules.yaml",
        good,
        {**good, "cron": "0 0 99 * * *", "nmae": "b"},
        {"name": "c", "pipeline": str(package)},
        "d",
        good,
    )
    assert main(["schedule", "apply", "-f", str(file), "--host", kfp_api.url]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 5
    assert all(line.startswith("error: ") for line in errors)
    for line, start in zip(
        errors,
        (
            "schedules[1].cron: cron is '0 0 99 * * *': '99' is no hour",
            "schedules[1].nmae is not a known key: did you mean 'name'?",
            "schedules[2]: schedule c needs either cron or every_minutes",
            "schedules[3]",
            "schedule a is given twice",
        ),
        strict=True,
    ):
        assert start in line
    assert not kfp_api.seen


def test_wrong_parameters_in_a_file_are_said_for_every_schedule_before_any_is_applied(
    kfp_api: Any, package: Path, tmp_path: Path, capsys: Any
) -> None:
    good = {"name": "a", "pipeline": str(package), "cron": "0 0 2 * * *", "parameters": {"text": "a"}}
    wrong = [{**good, "name": "b", "parameters": {}}, {**good, "name": "c", "pipeline": "nobody"}]
    assert main(["schedule", "apply", "-f", str(write(tmp_path / "s.yaml", good, *wrong)), "--host", kfp_api.url]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in errors] == ["schedule b", "schedule c"]
    assert not kfp_api.schedules


@pytest.mark.parametrize("text", ["", "- a", "schedules: {}", "schedules: []", "a: b", "schedules: [a]\nmore: 1", "{"])
def test_another_file_is_no_schedule_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(LayerloopError, match="s.yaml"):
        read_schedules(tmp_path / "s.yaml", {})


# --------------------------------------------------------------------------------------------------- a campaign's chain


def run_until(kfp_api: Any, train_package: Path, *more: str, until: int = 200) -> int:
    fixed = ["campaign", "run-until", CAMPAIGN, "--until", str(until), "--pipeline", str(train_package)]
    return main([*fixed, "-p", "images=s3://bucket/photos", "--host", kfp_api.url, *more])


def test_a_chain_is_one_recurring_run_that_knows_its_target(kfp_api: Any, train_package: Path, capsys: Any) -> None:
    assert run_until(kfp_api, train_package, "--max-failures", "4", "--service-account", "runner") == 0
    (chain,) = kfp_api.schedules.values()
    assert chain["display_name"] == chain_name(CAMPAIGN)
    assert chain["trigger"] == {"periodic_schedule": {"interval_second": "600"}}
    assert (chain["max_concurrency"], chain["no_catchup"], chain["mode"]) == ("1", True, "ENABLE")
    assert chain["service_account"] == "runner"
    parameters = {"campaign": CAMPAIGN, "images": "s3://bucket/photos", "until": 200, "max_failures": 4}
    assert chain["runtime_config"]["parameters"] == parameters
    out = capsys.readouterr().out
    for verb in ("pause", "resume", "delete"):
        command = next(line for line in out.splitlines() if f"schedule {verb}" in line)
        assert main(command.split("layerloop ", 1)[1].split()) == 0  # what it says is what works
    assert not kfp_api.schedules


def test_the_same_command_again_makes_no_second_chain(kfp_api: Any, train_package: Path, capsys: Any) -> None:
    assert run_until(kfp_api, train_package) == 0
    (first,) = kfp_api.schedules
    assert run_until(kfp_api, train_package) == 0
    assert list(kfp_api.schedules) == [first]
    assert run_until(kfp_api, train_package, until=300) == 0
    (second,) = kfp_api.schedules.values()
    assert second["runtime_config"]["parameters"]["until"] == 300


def test_another_target_waits_for_the_chains_run_unless_it_may_be_stopped(
    kfp_api: Any, train_package: Path, capsys: Any
) -> None:
    assert run_until(kfp_api, train_package) == 0
    (old,) = kfp_api.schedules
    home = next(iter(kfp_api.experiments))
    run = kfp_api.add_run(recurring_run_id=old, experiment_id=home, state="RUNNING")
    assert run_until(kfp_api, train_package) == 0  # nothing is changed, so nothing is in the way
    assert run_until(kfp_api, train_package, until=300) == 2
    assert f"its run {run} is active: wait for its end" in capsys.readouterr().err
    assert list(kfp_api.schedules) == [old]
    assert run_until(kfp_api, train_package, "--replace", until=300) == 0
    assert kfp_api.runs[run]["state"] == "CANCELED"
    (new,) = kfp_api.schedules.values()
    assert (new["mode"], new["runtime_config"]["parameters"]["until"]) == ("ENABLE", 300)


def test_the_chains_name_is_the_campaigns() -> None:
    assert chain_name(CAMPAIGN) == chain_name(CAMPAIGN + "/")
    assert chain_name(CAMPAIGN).startswith("until-mine-")
    assert chain_name("s3://other/mine") != chain_name(CAMPAIGN)
    assert len(chain_name("s3://b/" + "A b" * 60)) < 50


@pytest.mark.parametrize(
    "more, line",
    [
        (["--until", "0"], "--until is 0"),
        (["--every", "0"], "--every is 0"),
        (["-p", "imgaes=x"], "imgaes is not a parameter of layerloop-train"),
    ],
)
def test_a_chain_that_cannot_run_is_refused(
    kfp_api: Any, train_package: Path, more: list[str], line: str, capsys: Any
) -> None:
    assert run_until(kfp_api, train_package, *more) == 2
    assert line in capsys.readouterr().err
    assert not kfp_api.schedules


def test_a_package_without_a_target_makes_no_chain_that_never_ends(kfp_api: Any, package: Path, capsys: Any) -> None:
    command = ["campaign", "run-until", CAMPAIGN, "--until", "9", "--pipeline", str(package), "--host", kfp_api.url]
    assert main([*command, "-p", "text=a"]) == 2
    assert "has no parameters until and max_failures" in capsys.readouterr().err
