"""The compiled DAGs: their shape, their size and their parameters. Where steps run: test_cluster.py."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.runtime import Runtime
from layerloop.components.storage.runtime import runtime_values
from layerloop.pipelines import job
from layerloop.pipelines.cli import main
from layerloop.pipelines.cluster import Cluster
from layerloop.pipelines.evaluate import evaluate_pipeline
from layerloop.pipelines.inputs import packaged_recipes, runtime_text
from layerloop.pipelines.packages import count_tasks, read_spec, write_pipeline
from layerloop.pipelines.train import EVALUATE, MAX_TASKS, container_tasks, train_pipeline

RECIPE = packaged_recipes()["tiny"]
ROOT = Path(__file__).parents[2]


def compiled(tmp_path: Path, *, iterations: int = 3, workers: int = 2, **options: Any) -> list[Any]:
    """The pipeline spec and the platform spec."""
    pipeline = train_pipeline(iterations=iterations, workers=workers, recipe=RECIPE, **options)
    return list(yaml.safe_load_all(write_pipeline(pipeline, tmp_path / "train.yaml").read_text()))


def executors(documents: list[Any]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Container and Kubernetes settings by executor, such as `exec-update-lora-2`."""
    kubernetes = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    containers = documents[0]["deploymentSpec"]["executors"]
    return {name: (executor["container"], kubernetes[name]) for name, executor in containers.items()}


def verb_of(executor: str) -> str:
    return executor.removeprefix("exec-").rstrip("-0123456789").replace("-", "_")


def dags(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tasks of every DAG by its component: `root`, `comp-remaining-work` ..."""
    inner = {name: component["dag"]["tasks"] for name, component in spec["components"].items() if "dag" in component}
    return {"root": spec["root"]["dag"]["tasks"], **inner}


def order(tasks: dict[str, Any]) -> dict[str, list[str]]:
    return {name: sorted(task.get("dependentTasks", [])) for name, task in tasks.items()}


def condition_of(spec: dict[str, Any], name: str) -> str:
    """The condition under which the DAG component `name` runs."""
    tasks = [task for dag in dags(spec).values() for task in dag.values()]
    (task,) = [task for task in tasks if task["componentRef"]["name"] == name]
    return str(task["triggerPolicy"]["condition"])


def test_a_run_is_shard_then_iterations_in_a_row_then_evaluate_and_publish(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path)
    found = dags(spec)
    assert order(found["root"]) == {"shard-dataset": [], "remaining-work": ["shard-dataset"]}
    assert order(found["comp-remaining-work"]) == {"condition-1": []}
    assert order(found["comp-condition-1"]) == {
        "iteration": [],
        "iteration-2": ["iteration"],
        "iteration-3": ["iteration-2"],
        "condition-2": ["iteration-3"],
    }
    assert order(found["comp-condition-2"]) == {"evaluate-adapter": [], "publish-adapter": ["evaluate-adapter"]}
    shown = [found["comp-condition-1"][name]["taskInfo"]["name"] for name in ("iteration", "iteration-2")]
    assert shown == ["iteration 1 of this run", "iteration 2 of this run"]


def test_a_resident_run_is_shard_then_one_stretch_then_evaluate_and_publish(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path, iterations=100, resident=True)
    found = dags(spec)
    assert order(found["comp-condition-1"]) == {"train-stretch": [], "condition-2": ["train-stretch"]}
    assert order(found["comp-condition-2"]) == {"evaluate-adapter": [], "publish-adapter": ["evaluate-adapter"]}
    assert count_tasks(spec) == container_tasks(100, 2, resident=True) == 4
    stretch = found["comp-condition-1"]["train-stretch"]["inputs"]
    assert stretch["parameters"]["iterations"] == {"runtimeValue": {"constant": 100}}
    assert stretch["artifacts"]["previous"] == {"componentInputArtifact": "pipelinechannel--policy"}
    ends = found["comp-condition-1"]["condition-2"]["inputs"]["artifacts"]
    assert ends["pipelinechannel--train-stretch-policy"]["taskOutputArtifact"]["producerTask"] == "train-stretch"


def test_the_pod_of_a_stretch_has_what_its_three_steps_have(tmp_path: Path) -> None:
    cluster = Cluster(gpus=8)
    (name,) = [name for name in executors(compiled(tmp_path, resident=True, cluster=cluster)) if "stretch" in name]
    container, settings = executors(compiled(tmp_path, resident=True, cluster=cluster))[name]
    assert container["resources"]["accelerator"]["resourceCount"] == "8"
    secrets = {entry["secretName"] for entry in settings["secretAsEnv"]}
    assert secrets == {cluster.secrets.judge, cluster.secrets.store, cluster.secrets.hub}
    assert settings["pvcMount"]
    assert settings["activeDeadlineSeconds"] == str(3 * 12 * 3600), "the table's for each iteration"
    assert settings["podMetadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "layerloop"


def test_nothing_but_the_first_step_runs_where_nothing_is_left_and_the_end_only_where_everything_is(
    tmp_path: Path,
) -> None:
    spec, _ = compiled(tmp_path)
    value = "inputs.parameter_values['pipelinechannel--left']"
    assert condition_of(spec, "comp-condition-1") == f"{value} != 'nothing'"
    assert condition_of(spec, "comp-condition-2") == f"{value} == 'everything'"
    source = spec["root"]["dag"]["tasks"]["remaining-work"]["inputs"]["parameters"]["left"]["taskOutputParameter"]
    assert source == {"outputParameterKey": "left", "producerTask": "shard-dataset"}


def test_no_artifact_leaves_a_condition(tmp_path: Path) -> None:
    """The backend has none to give where the condition does not hold."""
    for evaluate in EVALUATE:
        spec, _ = compiled(tmp_path, evaluate=evaluate)
        conditional = {
            name for name in spec["components"] if name.startswith(("comp-condition", "comp-remaining-work"))
        }
        assert {"comp-condition-1", "comp-remaining-work"} <= conditional
        assert not [name for name in conditional if "outputDefinitions" in spec["components"][name]]


@pytest.mark.parametrize(
    ("evaluate", "tasks"),
    [
        ("every-run", {"iteration": [], "evaluate-adapter": ["iteration"], "publish-adapter": ["evaluate-adapter"]}),
        ("never", {"iteration": [], "publish-adapter": ["iteration"]}),
    ],
)
def test_evaluation_is_optional(tmp_path: Path, evaluate: str, tasks: dict[str, list[str]]) -> None:
    spec, _ = compiled(tmp_path, iterations=1, evaluate=evaluate)
    found = order(dags(spec)["comp-condition-1"])
    assert {name: [need for need in needs if need != "iteration" or name != "publish-adapter" or evaluate == "never"]
            for name, needs in found.items()} == tasks  # fmt: skip
    assert count_tasks(spec) == container_tasks(1, 2, evaluate)
    constants = spec["root"]["dag"]["tasks"]["shard-dataset"]["inputs"]["parameters"]
    assert constants["evaluate"]["runtimeValue"]["constant"] == evaluate
    with pytest.raises(LayerloopError, match="evaluate is 'sometimes': choose one of end, every-run, never"):
        compiled(tmp_path, evaluate="sometimes")


def test_every_step_gets_the_runtime(tmp_path: Path) -> None:
    train, _ = compiled(tmp_path)
    evaluate = next(
        yaml.safe_load_all(write_pipeline(evaluate_pipeline(recipe=RECIPE), tmp_path / "evaluate.yaml").read_text())
    )
    for spec in (train, evaluate):
        assert spec["root"]["inputDefinitions"]["parameters"]["runtime"]["defaultValue"] == {}
        dags = [spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c)]
        tasks = [task for dag in dags for task in dag["tasks"].values()]
        assert len(tasks) >= 2
        for task in tasks:
            given = task["inputs"]["parameters"]
            passed = given.get("runtime") or given["pipelinechannel--runtime"]  # a loop's own name for it
            assert passed["componentInputParameter"].endswith("runtime")


def test_the_runtime_that_is_printed_can_be_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`layerloop runtime > here.yaml` has a null, which no parameter of KFP holds: its default is null anyway."""
    printed = runtime_values(runtime_text())
    assert printed["judge"]["price"] == {"input": 0.0, "cached_input": None, "output": 0.0}
    pipelines = (
        train_pipeline(iterations=1, workers=1, recipe=RECIPE, runtime=printed),
        evaluate_pipeline(recipe=RECIPE, runtime=printed),
    )
    given = [read_spec(write_pipeline(pipeline, tmp_path / "pipeline.yaml")) for pipeline in pipelines]
    defaults = [spec["root"]["inputDefinitions"]["parameters"]["runtime"]["defaultValue"] for spec in given]
    monkeypatch.setattr(job, "run_pipeline", lambda package, arguments, **_: defaults.append(arguments["runtime"]))
    job._run(job.Job(campaign=str(tmp_path / "c"), images="", recipe=RECIPE, runtime=printed), tmp_path)
    assert len(defaults) == 3
    for values in defaults:
        assert values["judge"]["price"] == {"input": 0.0, "output": 0.0}
        assert Runtime.model_validate(values) == Runtime.model_validate(printed)


def test_an_iteration_is_a_loop_over_workers_then_score_then_update(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path, workers=3)
    tasks = spec["components"]["comp-iteration"]["dag"]["tasks"]
    ((name, loop),) = ((name, task) for name, task in tasks.items() if "parameterIterator" in task)
    assert loop["parameterIterator"]["items"]["raw"] == "[0, 1, 2]"
    (rollouts,) = spec["components"][loop["componentRef"]["name"]]["dag"]["tasks"].values()
    assert rollouts["inputs"]["parameters"]["workers"]["runtimeValue"]["constant"] == 3
    listed = tasks["score-rollouts"]["inputs"]["artifacts"]["rollouts"]["taskOutputArtifact"]
    assert listed["producerTask"] == name
    assert tasks["score-rollouts"]["dependentTasks"] == [name]
    assert tasks["update-lora"]["dependentTasks"] == ["score-rollouts"]
    # kfp.local 2.17 finds no artifact inputs of a sub-pipeline without parameters
    assert spec["components"]["comp-iteration"]["inputDefinitions"]["parameters"]


def test_the_policy_travels_from_iteration_to_iteration(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path)
    found = dags(spec)
    inner = found["comp-condition-1"]
    policies = {
        name: inner[name]["inputs"]["artifacts"]["policy"] for name in ("iteration", "iteration-2", "iteration-3")
    }
    assert "componentInputArtifact" in policies["iteration"]
    producers = [policies[name]["taskOutputArtifact"]["producerTask"] for name in ("iteration-2", "iteration-3")]
    assert producers == ["iteration", "iteration-2"]
    ends = inner["condition-2"]["inputs"]["artifacts"]["pipelinechannel--iteration-3-policy"]["taskOutputArtifact"]
    assert ends == {"outputArtifactKey": "policy", "producerTask": "iteration-3"}
    for task in found["comp-condition-2"].values():
        assert task["inputs"]["artifacts"]["policy"] == {
            "componentInputArtifact": "pipelinechannel--iteration-3-policy"
        }


def test_every_step_takes_the_executor_input_and_nothing_else(tmp_path: Path) -> None:
    for name, (container, _) in executors(compiled(tmp_path)).items():
        assert container["command"] == ["python3", "-m", f"layerloop.components.{verb_of(name)}"]
        assert container["args"] == ["--executor-input", "{{$}}"]


def test_caching_is_off_for_every_task(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path)
    dags = [spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c)]
    work = [
        t for dag in dags for t in dag["tasks"].values() if "dag" not in spec["components"][t["componentRef"]["name"]]
    ]
    assert len(work) == 3 + 3 * 3  # a loop's body counts once
    assert not any(task["cachingOptions"].get("enableCache") for task in work)


def test_the_run_form_reads_like_the_job(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path)
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert [(name, value["parameterType"], value.get("defaultValue")) for name, value in parameters.items()] == [
        ("campaign", "STRING", None),
        ("images", "STRING", None),
        ("designs", "STRING", ""),
        ("benchmark", "STRING", ""),
        ("judge_url", "STRING", ""),
        ("recipe", "STRING", ""),
        ("overrides", "STRUCT", {}),
        ("publish_as", "STRING", ""),
        ("until", "NUMBER_INTEGER", 0),
        ("max_failures", "NUMBER_INTEGER", 0),
        ("runtime", "STRUCT", {}),
    ]
    assert all(parameter["description"] for parameter in parameters.values())
    assert {name for name, value in parameters.items() if not value.get("isOptional")} == {"campaign", "images"}


def test_the_compiled_in_recipe_is_a_constant_of_the_first_step_and_no_field_of_the_form(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path)
    given = spec["root"]["dag"]["tasks"]["shard-dataset"]["inputs"]["parameters"]
    assert given["default_recipe"]["runtimeValue"]["constant"] == RECIPE
    assert given["recipe"] == {"componentInputParameter": "recipe"}
    assert given["run_id"]["runtimeValue"]["constant"] == "{{$.pipeline_job_uuid}}"
    assert re.search(r"^ +base: tiny$", (tmp_path / "train.yaml").read_text(), re.MULTILINE)  # for people to compare


@pytest.mark.parametrize("iterations, workers", [(1, 1), (3, 2), (4, 7)])
def test_the_count_of_tasks_is_what_the_compiled_file_holds(tmp_path: Path, iterations: int, workers: int) -> None:
    spec, _ = compiled(tmp_path, iterations=iterations, workers=workers)
    assert count_tasks(spec) == container_tasks(iterations, workers) <= MAX_TASKS


@pytest.mark.parametrize(
    "iterations, workers, line",
    [
        (10, 2, "iterations is 10 with 2 workers, which makes 43 container tasks .* choose at most 9 iterations"),
        (1, 40, "choose at most 35 workers"),
        (0, 2, "^iterations is 0: choose 1 or more$"),
        (3, 0, "^workers is 0: choose 1 or more$"),
    ],
)
def test_more_than_a_workflow_object_carries_is_refused(iterations: int, workers: int, line: str) -> None:
    with pytest.raises(LayerloopError, match=line):
        train_pipeline(iterations=iterations, workers=workers, recipe=RECIPE, cluster=Cluster())


def test_a_run_on_this_machine_is_of_any_length(tmp_path: Path) -> None:
    spec = read_spec(write_pipeline(train_pipeline(iterations=20, workers=2, recipe=RECIPE), tmp_path / "train.yaml"))
    assert count_tasks(spec) == container_tasks(20, 2) > MAX_TASKS


def test_compiling_twice_in_processes_with_other_hash_seeds_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.yaml"
        command = [sys.executable, "-m", "layerloop.pipelines.cli", "compile", "-o", str(path), "--recipe", "tiny"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


FORM_OF_EVALUATE = ["campaign", "iteration", "baseline", "samplers", "judge_url", "runtime"]


def test_the_evaluation_pipeline_finds_the_head_and_evaluates_it(tmp_path: Path) -> None:
    path = write_pipeline(evaluate_pipeline(recipe=RECIPE), tmp_path / "evaluate.yaml")
    spec = next(yaml.safe_load_all(path.read_text()))
    assert count_tasks(spec) == 2
    assert list(spec["root"]["inputDefinitions"]["parameters"]) == FORM_OF_EVALUATE
    assert condition_of(spec, "comp-condition-1") == "inputs.parameter_values['pipelinechannel--left'] != 'nothing'"
    source = spec["root"]["dag"]["tasks"]["evaluation"]["inputs"]["artifacts"]["policy"]["taskOutputArtifact"]
    assert source == {"outputArtifactKey": "policy", "producerTask": "shard-dataset"}
    given = spec["root"]["dag"]["tasks"]["shard-dataset"]["inputs"]["parameters"]
    assert given["evaluate"]["runtimeValue"]["constant"] == "only"
    inner = spec["components"]["comp-condition-1"]["dag"]["tasks"]["evaluate-adapter"]["inputs"]["parameters"]
    for name in ("samplers", "judge_url", "baseline"):
        assert inner[name] == {"componentInputParameter": f"pipelinechannel--{name}"}


@pytest.mark.parametrize(
    ("name", "options"),
    [("train", []), ("train-resident", ["--resident"]), ("evaluate", ["--pipeline", "evaluate"])],
)
def test_the_committed_packages_are_what_the_code_compiles(name: str, options: list[str], tmp_path: Path) -> None:
    """`make compile` writes them. The line of kfp's own version may differ."""
    path = tmp_path / "now.yaml"
    assert main(["compile", "-o", str(path), "--cluster", str(ROOT / "manifests/cluster.example.yaml"), *options]) == 0
    committed = (ROOT / "pipelines" / "compiled" / f"{name}.yaml").read_text()
    assert _without_versions(path.read_text()) == _without_versions(committed), "run `make compile`"


def _without_versions(text: str) -> str:
    return re.sub(r"^sdkVersion: .*$", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_the_guides_way_to_name_your_images_in_a_committed_package_leaves_none_of_the_examples(
    name: str, tmp_path: Path
) -> None:
    guide = (ROOT / "docs" / "cluster.md").read_text()
    (command,) = re.findall(r"^ +sed -e .*?(?= pipelines/compiled/train.yaml > train.yaml$)", guide, re.M | re.S)
    images = {"POLICY_IMAGE": f"mine/policy@sha256:{'a' * 64}", "LIGHT_IMAGE": f"mine/light@sha256:{'b' * 64}"}
    package = ROOT / "pipelines" / "compiled" / f"{name}.yaml"
    # By a shell, as its reader runs it: the line is the guide's own, with the shell's quotes and variables.
    done = subprocess.run(
        f"{command} {package}", shell=True, env={**os.environ, **images}, capture_output=True, text=True, check=True
    )
    (tmp_path / "named.yaml").write_text(done.stdout)
    used = {e["container"]["image"] for e in read_spec(tmp_path / "named.yaml")["deploymentSpec"]["executors"].values()}
    assert used == (set(images.values()) if name == "train" else {images["POLICY_IMAGE"]})


def test_an_upload_of_the_committed_packages_is_well_within_the_limits() -> None:
    for name in ("train", "train-resident", "evaluate"):
        assert (ROOT / "pipelines" / "compiled" / f"{name}.yaml").stat().st_size < 300_000
