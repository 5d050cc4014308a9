"""What a run is made of: packages and registered pipelines, and their parameters."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.pipelines.cli import main
from layerloop.pipelines.kfp_api import connect
from layerloop.pipelines.runnable import find_pipeline, read_package, typed_parameters, upload


def test_text_becomes_what_the_pipeline_declares(package: Path) -> None:
    given = {"text": "1", "count": "2", "share": "3", "flag": "0", "table": '{"a": 1}', "many": "[1]"}
    values = {"text": "1", "count": 2, "share": 3.0, "flag": False, "table": {"a": 1}, "many": [1]}
    assert typed_parameters(read_package(package), given) == values
    assert typed_parameters(read_package(package), values) == values  # those of a schedule file have their types


@pytest.mark.parametrize(
    "given, line",
    [
        ({"text": "a", "cuont": "1"}, "cuont is not a parameter of work: known are "),
        ({}, "text is missing: work needs"),
        ({"text": "a", "count": "1.5"}, "count is '1.5': work wants a whole number"),
        ({"text": "a", "flag": "maybe"}, "flag is 'maybe': work wants true or false"),
        ({"text": "a", "table": "{"}, "table is '{': work wants a mapping as JSON"),
        ({"text": "a", "table": "[1]"}, r"table is '\[1\]': work wants a mapping as JSON"),
        ({"text": "a", "many": "{}"}, "many is '{}': work wants a list as JSON"),
        ({"text": "a", "campaign": "mine"}, "campaign is 'mine', a folder, which the pods of a cluster do not share"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_is_sent(package: Path, given: Any, line: str) -> None:
    with pytest.raises(LayerloopError, match=line):
        typed_parameters(read_package(package), given)


OURS = {"campaign": "s3://b/c", "images": "s3://b/i"}


@pytest.mark.parametrize(
    "given, line",
    [
        ({"overrides": '{"update": {"learning_rat": 1}}'}, "overrides: recipe.update.learning_rat is not a known key"),
        ({"overrides": '{"seed": -1}', "recipe": " tiny "}, "overrides: recipe.seed is -1"),
        ({"runtime": '{"judge": {"concurency": 4}}'}, "runtime.judge.concurency is not a known key: did you mean"),
    ],
)
def test_what_the_first_step_would_refuse_is_refused_before_anything_is_sent(given: Any, line: str) -> None:
    pipeline = read_package(Path(__file__).parents[2] / "pipelines/compiled/train.yaml")
    with pytest.raises(LayerloopError, match=re.escape(line)):
        typed_parameters(pipeline, OURS | given)


@pytest.mark.parametrize(
    "given",
    [
        {"overrides": '{"update": {"learning_rate": 1e-4}}', "runtime": '{"judge": {"concurrency": 64.0}}'},
        {"overrides": '{"anything": 1}', "recipe": "s3://b/mine.yaml"},  # the first step reads it
    ],
)
def test_what_is_right_or_cannot_be_known_here_is_sent_as_it_is(given: dict[str, str]) -> None:
    pipeline = read_package(Path(__file__).parents[2] / "pipelines/compiled/train.yaml")
    sent = typed_parameters(pipeline, OURS | given)
    assert sent["overrides"] == json.loads(given["overrides"])
    assert sent.get("runtime", {}) == json.loads(given.get("runtime", "{}"))


@pytest.mark.parametrize("text", ["", "a: 1", "- 1", "{", "\x00"])
def test_another_file_is_no_pipeline(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(LayerloopError, match="x.yaml is not a compiled pipeline: make one with `layerloop compile`"):
        read_package(tmp_path / "x.yaml")


def test_the_same_content_is_one_version_however_often_it_is_uploaded(
    kfp_api: Any, package: Path, tmp_path: Path, capsys: Any
) -> None:
    api = connect(kfp_api.url)
    first = upload(api, package)
    again = tmp_path / "again.yaml"
    again.write_text("# another comment\n" + package.read_text())
    assert upload(api, again) == first
    assert len(kfp_api.versions) == 1
    assert sum("upload_version" in path for _, path, _, _ in kfp_api.seen) == 1  # the second time nothing is sent
    assert "has this content already" in capsys.readouterr().out
    changed = tmp_path / "changed.yaml"
    changed.write_text(package.read_text().replace("image: any", "image: other"))
    assert upload(api, changed) != first
    assert len(kfp_api.pipelines) == 1
    assert len(kfp_api.versions) == 2


def test_the_command_uploads_and_prints_what_runs_are_told(kfp_api: Any, package: Path, capsys: Any) -> None:
    assert main(["pipeline", "upload", str(package), "--host", kfp_api.url]) == 0
    name = capsys.readouterr().out.splitlines()[-1]
    assert name.startswith("work@work-")
    assert main(["submit", name, "-p", "text=a", "--host", kfp_api.url, "--wait"]) == 0
    run = kfp_api.runs["run-0"]
    assert run["pipeline_version_reference"] == {"pipeline_id": "pipeline-0", "pipeline_version_id": "version-0"}
    assert "pipeline_spec" not in run
    assert main(["submit", "work", "-p", "text=a", "-p", "count=x", "--host", kfp_api.url]) == 2  # checked all the same
    assert "count is 'x': work wants a whole number" in capsys.readouterr().err


def test_a_name_alone_is_the_latest_version_though_it_is_on_another_page(
    kfp_api: Any, package: Path, tmp_path: Path
) -> None:
    api = connect(kfp_api.url)
    for number in range(5):
        changed = tmp_path / f"{number}.yaml"
        changed.write_text(package.read_text().replace("image: any", f"image: any{number}"))
        last = upload(api, changed, name="mine")
        if number == 0:
            first = last
    assert find_pipeline(api, "mine").said == last
    latest = find_pipeline(api, "mine").source["pipeline_version_reference"]
    assert latest["pipeline_version_id"] == "version-4"
    oldest = find_pipeline(api, first).source["pipeline_version_reference"]
    assert oldest["pipeline_version_id"] == "version-0"


@pytest.mark.parametrize(
    "name, line",
    [
        ("other", "other is neither a file nor a pipeline that is registered"),
        ("work@none", "pipeline work has no version none: known are work-"),
        ("missing.yaml", "missing.yaml is not a compiled pipeline"),
    ],
)
def test_what_is_not_there_is_one_line(kfp_api: Any, package: Path, name: str, line: str) -> None:
    api = connect(kfp_api.url)
    upload(api, package)
    with pytest.raises(LayerloopError, match=line):
        find_pipeline(api, name)


def test_a_pipeline_of_kfps_version_1_is_one_line(kfp_api: Any, package: Path) -> None:
    api = connect(kfp_api.url)
    upload(api, package)
    kfp_api.versions["version-0"]["pipeline_spec"] = {"kind": "Workflow", "apiVersion": "argoproj.io/v1alpha1"}
    with pytest.raises(LayerloopError, match=r"work@work-\w+ is not a pipeline of KFP's version 2: name another"):
        find_pipeline(api, "work")


def test_in_multi_user_mode_a_pipeline_is_the_profiles_own_and_shared_ones_are_found(
    kfp_api: Any, package: Path
) -> None:
    shared = upload(connect(kfp_api.url), package, name="shared")
    kfp_api.multi_user = True
    api = connect(kfp_api.url, "team-a")
    upload(api, package, name="own")
    assert [p.get("namespace") for p in kfp_api.pipelines.values()] == [None, "team-a"]
    assert find_pipeline(api, shared).name == "work"
    assert find_pipeline(api, "own").name == "work"


def test_kfps_own_client_runs_what_was_uploaded(kfp_api: Any, package: Path) -> None:
    import kfp

    upload(connect(kfp_api.url), package)
    client = kfp.Client(host=kfp_api.url)
    found = client.get_pipeline_id("work")
    (version,) = client.list_pipeline_versions(found).pipeline_versions
    home = client.create_experiment("layers")
    run = client.run_pipeline(
        home.experiment_id, "a", params={"text": "a"}, pipeline_id=found, version_id=version.pipeline_version_id
    )
    assert kfp_api.runs[run.run_id]["pipeline_version_reference"]["pipeline_version_id"] == "version-0"
    stored = kfp_api.versions["version-0"]["pipeline_spec"]
    assert json.dumps(stored, sort_keys=True) == json.dumps(
        read_package(package).source["pipeline_spec"], sort_keys=True
    )
