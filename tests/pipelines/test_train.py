"""The compiled DAGs: their shape, their size, and where their steps are placed."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerloop.components.schema.errors import LayerloopError
from layerloop.pipelines.cluster import GPU_VERBS, Cluster, Images, Resources, Toleration, read_cluster
from layerloop.pipelines.evaluate import evaluate_pipeline
from layerloop.pipelines.inputs import packaged_recipes
from layerloop.pipelines.packages import count_tasks, write_pipeline
from layerloop.pipelines.train import MAX_TASKS, container_tasks, train_pipeline

RECIPE = packaged_recipes()["tiny"]
DIGEST = f"@sha256:{'0' * 64}"
IMAGES = Images(policy=f"registry/policy{DIGEST}", light=f"registry/light{DIGEST}")


def compiled(tmp_path: Path, *, iterations: int = 3, workers: int = 2, cluster: Cluster | None = None) -> list[Any]:
    """The pipeline spec and the platform spec."""
    pipeline = train_pipeline(iterations=iterations, workers=workers, recipe=RECIPE, cluster=cluster)
    return list(yaml.safe_load_all(write_pipeline(pipeline, tmp_path / "train.yaml").read_text()))


def executors(documents: list[Any]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Container and Kubernetes settings by executor, such as `exec-update-lora-2`."""
    kubernetes = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    containers = documents[0]["deploymentSpec"]["executors"]
    return {name: (executor["container"], kubernetes[name]) for name, executor in containers.items()}


def verb_of(executor: str) -> str:
    return executor.removeprefix("exec-").rstrip("-0123456789").replace("-", "_")


def test_a_run_is_shard_then_iterations_in_a_row_then_evaluate_and_publish(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path)
    tasks = spec["root"]["dag"]["tasks"]
    assert {name: sorted(task.get("dependentTasks", [])) for name, task in tasks.items()} == {
        "shard-dataset": [],
        "iteration": ["shard-dataset"],
        "iteration-2": ["iteration", "shard-dataset"],
        "iteration-3": ["iteration-2", "shard-dataset"],
        "evaluate-adapter": ["iteration-3", "shard-dataset"],
        "publish-adapter": ["evaluate-adapter", "iteration-3"],
    }
    shown = [tasks[name]["taskInfo"]["name"] for name in ("iteration", "iteration-2", "iteration-3")]
    assert shown == ["iteration 1", "iteration 2", "iteration 3"]


def test_an_iteration_is_a_loop_over_workers_then_score_then_update(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path, workers=3)
    tasks = spec["components"]["comp-iteration"]["dag"]["tasks"]
    (loop,) = (task for task in tasks.values() if "parameterIterator" in task)
    assert loop["parameterIterator"]["items"]["raw"] == "[0, 1, 2]"
    (rollouts,) = spec["components"][loop["componentRef"]["name"]]["dag"]["tasks"].values()
    assert rollouts["inputs"]["parameters"]["workers"]["runtimeValue"]["constant"] == 3
    listed = tasks["score-rollouts"]["inputs"]["artifacts"]["rollouts"]["taskOutputArtifact"]
    assert listed["producerTask"] == loop["taskInfo"]["name"] or listed["producerTask"].startswith("for-loop")
    assert "for-loop" in " ".join(tasks["score-rollouts"]["dependentTasks"])
    assert tasks["update-lora"]["dependentTasks"] == ["score-rollouts"]
    # kfp.local 2.17 finds no artifact inputs of a sub-pipeline without parameters
    assert spec["components"]["comp-iteration"]["inputDefinitions"]["parameters"]


def test_the_policy_travels_from_iteration_to_iteration(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path)
    tasks = spec["root"]["dag"]["tasks"]
    producers = [
        tasks[name]["inputs"]["artifacts"]["policy"]["taskOutputArtifact"]["producerTask"]
        for name in ("iteration", "iteration-2", "iteration-3", "evaluate-adapter", "publish-adapter")
    ]
    assert producers == ["shard-dataset", "iteration", "iteration-2", "iteration-3", "iteration-3"]


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


def test_the_recipe_of_several_lines_survives_as_the_default(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path)
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert parameters["recipe"]["defaultValue"] == RECIPE
    assert {name for name, value in parameters.items() if not value.get("isOptional")} == {"campaign", "images"}
    assert all(parameter["description"] for parameter in parameters.values())


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
        train_pipeline(iterations=iterations, workers=workers, recipe=RECIPE)


def test_compiling_twice_in_processes_with_other_hash_seeds_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.yaml"
        command = [sys.executable, "-m", "layerloop.pipelines.cli", "compile", "-o", str(path), "--recipe", "tiny"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_gpu_steps_get_gpus_shared_memory_tolerations_and_the_queue_and_light_steps_do_not(tmp_path: Path) -> None:
    spot = Toleration(key="spot", value="yes", operator="Equal")
    cluster = Cluster(images=IMAGES, gpus=2, update_gpus=8, tolerations=(spot,))
    for name, (container, kubernetes) in executors(compiled(tmp_path, cluster=cluster)).items():
        gpu = verb_of(name) in GPU_VERBS
        count = {"generate_rollouts": "2", "update_lora": "8"}.get(verb_of(name), "1" if gpu else None)
        assert container["resources"].get("accelerator", {}).get("resourceCount") == count, name
        assert ("emptyDirMounts" in kubernetes) is gpu, name
        assert ("podMetadata" in kubernetes) is gpu, name
        if gpu:
            assert kubernetes["emptyDirMounts"][0]["mountPath"] == "/dev/shm"
            assert kubernetes["tolerations"][0]["key"] == "spot"
            assert kubernetes["podMetadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "layerloop"}


def test_only_scoring_runs_in_the_light_image(tmp_path: Path) -> None:
    placed = executors(compiled(tmp_path, cluster=Cluster(images=IMAGES)))
    light = {verb_of(name) for name, (container, _) in placed.items() if container["image"] == IMAGES.light}
    assert light == {"score_rollouts"}
    assert {container["image"] for container, _ in placed.values()} == {IMAGES.light, IMAGES.policy}


def test_memory_is_limited_and_every_step_has_a_deadline_and_retries(tmp_path: Path) -> None:
    cluster = Cluster(images=IMAGES, light=Resources(cpu="1", memory="4Gi"), retries=5)
    documents = compiled(tmp_path, cluster=cluster)
    for name, (container, kubernetes) in executors(documents).items():
        resources = container["resources"]
        assert resources["resourceMemoryLimit"] == resources["resourceMemoryRequest"], name
        assert "resourceCpuLimit" not in resources
        assert int(kubernetes["activeDeadlineSeconds"]) >= 3600
    assert documents[0]["root"]["dag"]["tasks"]["shard-dataset"]["retryPolicy"]["maxRetryCount"] == 5


def test_secrets_come_from_the_namespace_and_only_their_names_are_in_the_file(tmp_path: Path) -> None:
    for _, kubernetes in executors(compiled(tmp_path)).values():
        secrets = {secret["secretName"]: secret for secret in kubernetes["secretAsEnv"]}
        assert secrets.keys() == {"layerloop-judge", "layerloop-store", "layerloop-hub"}
        assert all(secret["optional"] for secret in secrets.values())


def test_the_evaluation_pipeline_finds_the_head_and_evaluates_it(tmp_path: Path) -> None:
    path = write_pipeline(evaluate_pipeline(recipe=RECIPE), tmp_path / "evaluate.yaml")
    spec = next(yaml.safe_load_all(path.read_text()))
    assert count_tasks(spec) == 2
    source = spec["root"]["dag"]["tasks"]["evaluate-adapter"]["inputs"]["artifacts"]["policy"]["taskOutputArtifact"]
    assert source == {"outputArtifactKey": "policy", "producerTask": "shard-dataset"}


def test_a_cluster_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(f"images: {{policy: 'r/p{DIGEST}', light: 'r/l{DIGEST}'}}\ngpus: 4\nqueue: null\n")
    cluster = read_cluster(path)
    assert (cluster.gpus, cluster.queue, cluster.images.policy) == (4, None, f"r/p{DIGEST}")


@pytest.mark.parametrize(
    "text, line",
    [
        ("images: {policy: r/p:latest, light: r/l:1}", "^cluster.images.policy is 'r/p:latest'.* name it by digest"),
        ("", "^cluster.images.policy is 'layerloop-policy'"),
        ("gpu: 1", "^cluster.gpu is not a known key: did you mean 'gpus'"),
        ("gpus: -1", "^cluster.gpus is -1"),
        ("a: [", "is not YAML"),
        (f"images: {{policy: 'r/p{DIGEST}', light: 'r/l{DIGEST}'}}\ntimeout_hours: {{update_lora: 1}}", "name all six"),
    ],
)
def test_a_wrong_cluster_file_is_refused_in_one_line(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(LayerloopError, match=line) as caught:
        read_cluster(path)
    assert "\n" not in str(caught.value)


def test_a_missing_cluster_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayerloopError, match="cannot be read"):
        read_cluster(tmp_path / "none.yaml")
