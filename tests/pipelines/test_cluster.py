"""Where steps run: what a cluster file becomes in the compiled platform spec, and what is refused before."""

import functools
import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import parse_recipe
from layerloop.components.schema.steps import STEPS
from layerloop.pipelines.cluster import Cluster, read_cluster
from layerloop.pipelines.evaluate import evaluate_pipeline
from layerloop.pipelines.evaluation_cost import EvaluationCost, with_evaluation_deadline
from layerloop.pipelines.inputs import packaged_recipes, recipe_text
from layerloop.pipelines.packages import write_pipeline
from layerloop.pipelines.train import train_pipeline

PAPER, TINY = packaged_recipes()["paper"], packaged_recipes()["tiny"]
IMAGES = f"images: {{policy: 'r/policy@sha256:{'0' * 64}', light: 'r/light@sha256:{'1' * 64}'}}\n"
EXAMPLE = Path(__file__).parents[2] / "manifests" / "cluster.example.yaml"


def cluster_of(folder: Path, text: str = "") -> Cluster:
    path = folder / "cluster.yaml"
    path.write_text(IMAGES + text)
    return read_cluster(path)


class Compiled:
    """Container, Kubernetes settings and task of every step of the training pipelines, step by step and resident, with
    one iteration."""

    def __init__(self, folder: Path, text: str = "", recipe: str = TINY) -> None:
        self.containers: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.tasks: dict[str, Any] = {}
        cluster = cluster_of(folder, text)
        for resident in (True, False):
            pipeline = train_pipeline(iterations=1, workers=1, recipe=recipe, cluster=cluster, resident=resident)
            self.spec, platform = yaml.safe_load_all(write_pipeline(pipeline, folder / "train.yaml").read_text())
            settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
            executors = self.spec["deploymentSpec"]["executors"]
            tasks = {n: t for c in self.spec["components"].values() if "dag" in c for n, t in c["dag"]["tasks"].items()}
            tasks |= self.spec["root"]["dag"]["tasks"]
            self.containers |= {self._verb(name): executor["container"] for name, executor in executors.items()}
            self.settings |= {self._verb(name): value for name, value in settings.items()}
            self.tasks |= {self._verb(name): tasks[name.removeprefix("exec-")] for name in executors}
        assert set(self.containers) == set(self.settings) == set(STEPS)

    @staticmethod
    def _verb(executor: str) -> str:
        return executor.removeprefix("exec-").replace("-", "_")

    def gpus(self) -> dict[str, int]:
        asked = {v: c["resources"].get("accelerator", {}).get("resourceCount", "0") for v, c in self.containers.items()}
        return {verb: int(count) for verb, count in asked.items()}

    def resources(self, verb: str) -> tuple[str, str]:
        needs = self.containers[verb]["resources"]
        assert needs["resourceMemoryLimit"] == needs["resourceMemoryRequest"]
        assert "resourceCpuLimit" not in needs
        return needs["resourceCpuRequest"], needs["resourceMemoryRequest"]

    def variables(self, verb: str) -> dict[str, str]:
        return {variable["name"]: variable["value"] for variable in self.containers[verb].get("env", ())}


@functools.cache
def compiled_for(text: str = "", recipe: str = TINY) -> Compiled:
    """The pipelines for a cluster file of this text, compiled once; tests only read them."""
    with tempfile.TemporaryDirectory() as folder:
        return Compiled(Path(folder), text, recipe)


# ------------------------------------------------------------------------------------------------------------- security


def test_every_step_runs_as_no_root() -> None:
    for verb, settings in compiled_for().settings.items():
        assert settings["securityContext"] == {"runAsNonRoot": True, "runAsUser": "65532"}, verb


def test_where_the_namespace_gives_users_none_is_named() -> None:
    for settings in compiled_for("run_as_user: null").settings.values():
        assert settings["securityContext"] == {"runAsNonRoot": True}


def test_a_step_gets_only_the_secrets_that_it_uses() -> None:
    for verb, settings in compiled_for().settings.items():
        found = {s["secretName"]: {k["secretKey"] for k in s["keyToEnv"]} for s in settings["secretAsEnv"]}
        assert all(secret["optional"] for secret in settings["secretAsEnv"])
        store = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
        assert found.pop("layerloop-store") == store
        judge, hub = {"layerloop-judge": {"OPENAI_API_KEY"}}, {"layerloop-hub": {"HF_TOKEN"}}
        asked = dict.fromkeys(("train_stretch", "evaluate_adapter"), judge | hub) | {"score_rollouts": judge}
        assert found == asked.get(verb, hub)


def test_a_secret_can_be_left_out() -> None:
    compiled = compiled_for("secrets: {judge: null, store: null, hub: theirs}")
    assert "secretAsEnv" not in compiled.settings["score_rollouts"]
    assert [s["secretName"] for s in compiled.settings["update_lora"]["secretAsEnv"]] == ["theirs"]


# ------------------------------------------------------------------------------------------------------------ resources


def test_sharding_and_scoring_ask_for_little_and_for_no_gpu() -> None:
    compiled = compiled_for()
    without = {"shard_dataset": 0, "score_rollouts": 0}
    assert (
        compiled.gpus()
        == {"generate_rollouts": 1, "update_lora": 1, "train_stretch": 1, "evaluate_adapter": 1, "publish_adapter": 1}
        | without
    )
    assert compiled.resources("shard_dataset") == ("4", "24Gi")
    assert compiled.resources("score_rollouts") == ("2", "8Gi")
    assert compiled.resources("update_lora") == ("8", "96Gi")
    for verb in ("shard_dataset", "score_rollouts"):
        assert not compiled.settings[verb].keys() & {"tolerations", "nodeSelector", "emptyDirMounts", "podMetadata"}


def test_cpu_and_memory_grow_with_the_gpus() -> None:
    compiled = compiled_for("gpus: 8\nupdate_gpus: 4\nevaluate_gpus: 2\npolicy: {cpu: 7500m, memory: 90Gi}")
    counts = {"generate_rollouts": 8, "update_lora": 4, "train_stretch": 8, "evaluate_adapter": 2, "publish_adapter": 1}
    assert {verb: count for verb, count in compiled.gpus().items() if count} == counts
    assert compiled.resources("generate_rollouts") == ("60000m", "720Gi")
    assert compiled.resources("update_lora") == ("30000m", "360Gi")
    assert compiled.resources("publish_adapter") == ("7500m", "90Gi")
    assert compiled.resources("shard_dataset") == ("4", "24Gi")


def test_what_a_verb_says_of_itself_goes_before() -> None:
    text = """
gpus: 8
node_selector: {pool: a100}
labels: {team: vision}
steps:
  generate_rollouts:
    {gpus: 2, cpu: 3, memory: 64Gi, timeout_hours: 1.5, node_selector: {pool: h100}, labels: {team: rl},
     annotations: {cluster-autoscaler.kubernetes.io/safe-to-evict: "false"}}
  score_rollouts:
    tolerations: [{key: cheap, operator: Equal, value: "yes"}]
    node_affinity: [{key: zone, values: [a, b]}, {key: disk, operator: Exists}, {key: spot, values: ["1"], weight: 5}]
    ephemeral_storage: 20Gi
"""
    compiled = compiled_for(text)
    rollouts, scores, update = (compiled.settings[v] for v in ("generate_rollouts", "score_rollouts", "update_lora"))
    assert compiled.gpus()["generate_rollouts"] == 2
    assert compiled.resources("generate_rollouts") == ("3", "64Gi")
    assert compiled.resources("update_lora") == ("64", "768Gi")
    assert rollouts["activeDeadlineSeconds"] == "5400"
    assert rollouts["nodeSelector"] == {"labels": {"pool": "h100"}}
    assert update["nodeSelector"] == {"labels": {"pool": "a100"}}
    queue = {"kueue.x-k8s.io/queue-name": "layerloop"}
    assert rollouts["podMetadata"] == {
        "labels": {**queue, "team": "rl"},
        "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
    }
    assert update["podMetadata"] == {"labels": {**queue, "team": "vision"}}
    assert scores["podMetadata"] == {"labels": {"team": "vision"}}
    assert scores["tolerations"] == [{"key": "cheap", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}]
    assert scores["nodeAffinity"] == [
        {"matchExpressions": [
            {"key": "zone", "operator": "In", "values": ["a", "b"]}, {"key": "disk", "operator": "Exists"},
        ]},
        {"matchExpressions": [{"key": "spot", "operator": "In", "values": ["1"]}], "weight": 5},
    ]  # fmt: skip
    assert scores["emptyDirMounts"] == [{"volumeName": "scratch", "mountPath": "/tmp", "sizeLimit": "20Gi"}]


def test_gpu_pods_get_shared_memory_tolerations_and_the_queue() -> None:
    compiled = compiled_for()
    for verb in (name for name, step in STEPS.items() if step.gpus != "none"):
        settings = compiled.settings[verb]
        (shm,) = settings["emptyDirMounts"]
        assert (shm["mountPath"], shm["medium"], shm["sizeLimit"]) == ("/dev/shm", "Memory", "16Gi")
        assert [taint["key"] for taint in settings["tolerations"]] == ["nvidia.com/gpu"]
        assert settings["podMetadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "layerloop"}


def test_on_cpus_nothing_asks_for_a_gpu() -> None:
    compiled = compiled_for("gpus: 0")
    assert set(compiled.gpus().values()) == {0}
    assert compiled.resources("update_lora") == ("8", "96Gi")
    assert not any("emptyDirMounts" in settings for settings in compiled.settings.values())


def test_without_a_volume_of_weights_the_models_go_where_the_user_may_write() -> None:
    with_volume, without = compiled_for(), compiled_for("weights_claim: null")
    assert with_volume.variables("update_lora")["HF_HOME"] == "/weights/huggingface"
    assert with_volume.settings["update_lora"]["pvcMount"][0]["constant"] == "layerloop-weights"
    assert without.variables("update_lora")["HF_HOME"] == "/tmp/huggingface"
    assert not any("pvcMount" in settings for settings in without.settings.values())
    assert "HF_HOME" not in with_volume.variables("score_rollouts")


def test_the_base_and_compiled_kernels_are_kept_on_the_nodes_disk() -> None:
    plain, cached = compiled_for(), compiled_for("cache_claim: node-disk")
    bare = compiled_for("weights_claim: null")
    for step in ("generate_rollouts", "update_lora", "evaluate_adapter"):
        variables = cached.variables(step)
        assert (variables["LAYERLOOP_CACHE"], variables["TORCHINDUCTOR_CACHE_DIR"]) == ("/cache", "/cache/inductor")
        mounts = {mount["constant"]: mount["mountPath"] for mount in cached.settings[step]["pvcMount"]}
        assert mounts == {"layerloop-weights": "/weights", "node-disk": "/cache"}
        assert "LAYERLOOP_CACHE" not in plain.variables(step)
        assert plain.variables(step)["TORCHINDUCTOR_CACHE_DIR"] == "/weights/inductor"
        assert "TORCHINDUCTOR_CACHE_DIR" not in bare.variables(step)
    for step in ("shard_dataset", "score_rollouts"):  # without a GPU: on whatever node
        assert "LAYERLOOP_CACHE" not in cached.variables(step)
        assert not {"node-disk"} & {mount["constant"] for mount in cached.settings[step].get("pvcMount", [])}


def test_service_urls_go_to_every_step_and_kfps_own_to_the_first() -> None:
    text = "service_urls: {AWS_REGION: eu-1}\nkfp_api: https://kfp.example.com\npipeline_root: s3://bucket/kfp"
    compiled = compiled_for(text)
    for verb in STEPS:
        variables = compiled.variables(verb)
        assert variables["AWS_REGION"] == "eu-1"
        assert variables.get("LAYERLOOP_KFP_API") == ("https://kfp.example.com" if verb == "shard_dataset" else None)
    assert compiled.spec["defaultPipelineRoot"] == "s3://bucket/kfp"


def test_certificates_of_the_cluster_are_trusted_by_every_client() -> None:
    compiled = compiled_for("ca_bundle: company-ca")
    for verb in STEPS:
        (mount,) = compiled.settings[verb]["configMapAsVolume"]
        assert (mount["configMapName"], mount["mountPath"]) == ("company-ca", "/etc/layerloop/ca")
        variables = compiled.variables(verb)
        for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
            assert variables[name] == "/etc/layerloop/ca/ca.crt"


def test_images_are_by_verb() -> None:
    compiled = compiled_for()
    light = {verb for verb, container in compiled.containers.items() if container["image"].startswith("r/light@")}
    assert light == {"score_rollouts"}


# -------------------------------------------------------------------------------------------------------------- retries


@pytest.mark.parametrize(
    "text",
    [
        "",
        "retries: 1",
        "retries: 8\ntimeout_hours: {update_lora: 200}",
        "timeout_hours: {shard_dataset: 0.1, update_lora: 8760}",
        "steps: {score_rollouts: {timeout_hours: 100}}",
        "retries: 2\ntimeout_hours: {evaluate_adapter: 1000}",
    ],
)
@pytest.mark.parametrize("recipe", [TINY, PAPER], ids=["tiny", "paper"])
def test_the_budget_of_all_attempts_holds_every_attempt(text: str, recipe: str) -> None:
    """Argo's backoff.maxDuration counts from the first attempt's start, so it holds all of them, pauses included."""
    compiled = compiled_for(text, recipe)
    for verb in STEPS:
        retry = compiled.tasks[verb]["retryPolicy"]
        retries, timeout = retry["maxRetryCount"], int(compiled.settings[verb]["activeDeadlineSeconds"])
        pauses = sum(int(retry["backoffDuration"].rstrip("s")) * retry["backoffFactor"] ** n for n in range(retries))
        assert timeout >= 60
        budget = int(retry["backoffMaxDuration"].rstrip("s"))
        assert budget >= (retries + 1) * timeout + pauses, verb


def test_without_retries_nothing_is_said_of_them() -> None:
    assert not any("retryPolicy" in task for task in compiled_for("retries: 0").tasks.values())


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_the_cost_of_an_evaluation_is_forwards_times_designs() -> None:
    cost = EvaluationCost.of(parse_recipe(PAPER), Cluster())
    # Heun: 50 steps are 99 forwards; 480 designs and 64 images; base and adapter.
    assert (cost.designs, cost.images, cost.forwards) == (480, 64, 544 * 99 * 2)
    assert cost.hours == pytest.approx(544 * 99 * 2 * 0.32 / 3600)
    assert str(cost).startswith("480 designs + 64 images are 107712 forwards of base and adapter, about 9.6 h on 1 GPU")


def test_a_comparison_of_samplers_is_counted() -> None:
    cost = EvaluationCost.of(parse_recipe(PAPER), Cluster(), samplers=True)
    # 258 forwards by Euler's and Heun's methods, three times as many with guidance beside; 24 designs and 8 images
    assert cost.forwards == 544 * 99 * 2 + 32 * 3 * 258 * 2
    assert "samplers compared, are 157248 forwards" in str(cost)
    few = parse_recipe(recipe_text("paper", ["evaluation.designs=10", "evaluation.pictures=2"]))
    assert EvaluationCost.of(few, Cluster(), samplers=True).forwards == 12 * 99 * 2 + 12 * 3 * 258 * 2
    assert with_evaluation_deadline(Cluster(), PAPER, samplers=True).hours("evaluate_adapter") == 30
    set_by_hand = Cluster(timeout_hours={"evaluate_adapter": 10})
    assert with_evaluation_deadline(set_by_hand, PAPER, samplers=True) == set_by_hand


def test_more_gpus_and_fewer_pixels_make_it_cheaper() -> None:
    full = EvaluationCost.of(parse_recipe(PAPER), Cluster())
    assert EvaluationCost.of(parse_recipe(PAPER), Cluster(evaluate_gpus=8)).hours == pytest.approx(full.hours / 8)
    half = parse_recipe(recipe_text("paper", ["data.resolution=320"]))
    assert EvaluationCost.of(half, Cluster()).hours == pytest.approx(full.hours / 4)
    assert EvaluationCost.of(half, Cluster(gpus=0)).gpus == 1


@pytest.mark.parametrize("name", packaged_recipes())
@pytest.mark.parametrize("gpus", [1, 8])
def test_the_deadline_fits_by_construction(tmp_path: Path, name: str, gpus: int) -> None:
    recipe = packaged_recipes()[name]
    cluster = cluster_of(tmp_path, f"evaluate_gpus: {gpus}")
    hours = EvaluationCost.of(parse_recipe(recipe), cluster).hours
    for pipeline in (
        train_pipeline(iterations=1, workers=1, recipe=recipe, cluster=cluster),
        evaluate_pipeline(recipe=recipe, cluster=cluster),
    ):
        _, platform = yaml.safe_load_all(write_pipeline(pipeline, tmp_path / "p.yaml").read_text())
        settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-evaluate-adapter"]
        assert int(settings["activeDeadlineSeconds"]) >= 2 * hours * 3600 + 2 * 3600


def test_a_deadline_of_the_file_stays_and_one_that_is_too_short_is_refused(tmp_path: Path) -> None:
    long = cluster_of(tmp_path, "timeout_hours: {evaluate_adapter: 10}")
    assert with_evaluation_deadline(long, PAPER).hours("evaluate_adapter") == 10
    for text in ("timeout_hours: {evaluate_adapter: 4}", "steps: {evaluate_adapter: {timeout_hours: 4}}"):
        cluster = cluster_of(tmp_path, text)
        with pytest.raises(LayerloopError) as caught:
            train_pipeline(iterations=1, workers=1, recipe=PAPER, cluster=cluster)
        line = str(caught.value)
        assert line.startswith("evaluation does not fit its deadline: 480 designs + 64 images are 107712 forwards")
        assert "is 4: give it 22, more evaluate_gpus, or fewer recipe.evaluation.designs" in line
        train_pipeline(iterations=1, workers=1, recipe=PAPER, cluster=cluster, evaluate="never")


# ------------------------------------------------------------------------------------------------------------- the file


def test_the_example_holds_the_defaults() -> None:
    example = read_cluster(EXAMPLE)
    assert example.model_copy(update={"images": Cluster().images}) == Cluster()
    offered = {line.lstrip("# ").partition(":")[0] for line in EXAMPLE.read_text().splitlines()}
    assert set(Cluster.model_fields) <= offered


def test_what_the_example_offers_in_comments_is_taken(tmp_path: Path) -> None:
    lines = EXAMPLE.read_text().splitlines()
    start = lines.index("# steps:")
    block = [line.removeprefix("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines[start:])]
    cluster = cluster_of(tmp_path, "\n".join(block))
    assert set(cluster.steps) == {"shard_dataset", "generate_rollouts"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("shared_memory: 16 gigs", "cluster.shared_memory: '16 gigs' is not a Kubernetes quantity: write a whole"),
        ("policy: {memory: 96 GB}", "cluster.policy.memory: '96 GB' is not a Kubernetes quantity"),
        ("policy: {memory: 96}", "cluster.policy.memory: '96' is 96 bytes: write 96Gi"),
        ("policy: {memory: 1.5Gi}", "cluster.policy.memory: '1.5Gi' is not a Kubernetes quantity"),
        ("light: {memory: 8Gb}", "cluster.light.memory: '8Gb' is not a Kubernetes quantity"),
        ("light: {memory: -8Gi}", "cluster.light.memory: '-8Gi' is not a Kubernetes quantity"),
        ("light: {memory: true}", "cluster.light.memory is True: "),
        ("light: {cpu: two}", "cluster.light.cpu: 'two' is not a number of CPUs: write 8, 0.5 or 500m"),
        ("light: {cpu: 0}", "cluster.light.cpu: '0' is not a number of CPUs"),
        ("steps: {update_lora: {ephemeral_storage: big}}", "cluster.steps.update_lora.ephemeral_storage: 'big' is no"),
        ("timeout_hours: {update_lora: -1}", "cluster.timeout_hours.update_lora is -1: "),
        ("timeout_hours: {update_lora: .inf}", "cluster.timeout_hours.update_lora is inf: "),
        ("timeout_hours: {update_lora: .nan}", "cluster.timeout_hours.update_lora is nan: "),
        ("timeout_hours: {update_lora: 1e12}", "cluster.timeout_hours.update_lora is "),
        ("timeout_hours: {update_lora: 0.001}", "cluster.timeout_hours.update_lora is 0.001: "),
        ("timeout_hours: {update: 1}", "cluster.timeout_hours.update is not a step: choose of shard_dataset, "),
        ("steps: {updatelora: {gpus: 1}}", "cluster.steps.updatelora is not a step: choose of "),
        ("steps: {update_lora: {gpu: 1}}", "cluster.steps.update_lora.gpu is not a known key"),
        ("secrets: {judge: ''}", "cluster.secrets.judge: '' is not a Kubernetes name: use a-z, 0-9 and -, or null"),
        ("weights_claim: ''", "cluster.weights_claim: '' is not a Kubernetes name"),
        ("queue: My Queue", "cluster.queue: 'My Queue' is not a Kubernetes name"),
        ("labels: {team: not ok}", "cluster.labels.team: 'not ok' is not a label value"),
        ("labels: {team: true}", "cluster.labels.team is True: "),
        ("service_urls: {A-B: x}", "'A-B' is not a variable name"),
        ("tolerations: [{key: a, effect: Never}]", "cluster.tolerations.0.effect is 'Never': "),
        ("node_affinity: [{key: zone}]", "operator In of zone needs values: change one of the two"),
        ("node_affinity: [{key: z, operator: Exists, values: [a]}]", "operator Exists of z takes no values"),
        ("run_as_user: 0", "cluster.run_as_user is 0: "),
        ("pipeline_root: /tmp/x", "cluster.pipeline_root: '/tmp/x' is not a bucket: write s3://bucket/prefix"),
        ("kfp_api: ml-pipeline", "cluster.kfp_api: 'ml-pipeline' is not a URL: write http://host:8888"),
        ("gpus: -1", "cluster.gpus is -1: "),
        ("gpu: 1", "cluster.gpu is not a known key: did you mean 'gpus'"),
        ("gpus: 16", "cluster.gpus is 16 but a node has 8 (cluster.node_gpus): choose at most 8; rollouts "),
        ("update_gpus: 16", "cluster.update_gpus is 16 but a node has 8 (cluster.node_gpus): choose at most 8; an up"),
        ("steps: {publish_adapter: {gpus: 9}}", "cluster.steps.publish_adapter.gpus is 9 but a node has 8"),
        ("node_gpus: 4\nevaluate_gpus: 8", "cluster.evaluate_gpus is 8 but a node has 4"),
        ("shared_memory: 96Gi", "cluster.shared_memory is 96Gi but generate_rollouts has 96Gi of memory"),
        ("retries: -1", "cluster.retries is -1: "),
        ("retries: 9", "cluster.retries is 9: "),
        ("forward_seconds: 0", "cluster.forward_seconds is 0: "),
        ("steps: {update_lora: {cpus: 4}}", "cluster.steps.update_lora.cpus is not a known key: did you mean 'cpu'"),
        ("steps: [a]", "cluster.steps is ['a']: give a mapping, keys with values"),
        ("tolerations: {key: a}", "cluster.tolerations is {'key': 'a'}: give a list"),
        ("light: {cpu: '\u0663'}", "cluster.light.cpu: '\u0663' is not a number of CPUs"),
        ("light: {cpu: 0.0001}", "cluster.light.cpu: '0.0001' is not a number of CPUs"),
        ("light: {cpu: 1.5m}", "cluster.light.cpu: '1.5m' is not a number of CPUs"),
        ("tolerations: [{key: a b}]", "cluster.tolerations.0.key: 'a b' is not a label key"),
        ("tolerations: [{key: a, value: b}]", "operator Exists of a takes no value: leave it out, or choose Equal"),
        ("node_affinity: [{key: a, operator: Gt, values: [x]}]", "operator Gt of a has ['x']: give one whole number"),
        ("node_affinity: [{key: a, operator: Lt, values: ['1', '2']}]", "operator Lt of a has ['1', '2']: give one"),
        ("queue: a..b", "cluster.queue: 'a..b' is not a Kubernetes name"),
        (f"queue: {'a' * 64}", "is longer than a label's value: 63 characters at most"),
        ("gpu_resource: gpu", "cluster.gpu_resource: 'gpu' is not an extended resource: write it as nvidia.com/gpu"),
        ("gpu_resource: nvidia gpu", "cluster.gpu_resource: 'nvidia gpu' is not an extended resource"),
        ("service_urls: {AWS_SECRET_ACCESS_KEY: x}", "AWS_SECRET_ACCESS_KEY is set by the secret of cluster.secr"),
        (
            "service_urls: {LAYERLOOP_CACHE: /x}",
            "cluster.service_urls.LAYERLOOP_CACHE is set by cluster.cache_claim: leave it out",
        ),
        ("service_urls: {HF_HOME: /x}", "cluster.service_urls.HF_HOME is set by cluster.weights_claim: leave it out"),
        ("service_urls: {KFP_POD_NAME: x}", "cluster.service_urls.KFP_POD_NAME is set by Kubeflow: leave it out"),
        ("gpus: 1\ngpus: 2", "has the key gpus twice (line 3): keep one of them"),
    ],
)  # fmt: skip
def test_a_value_that_a_cluster_would_choke_on_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(LayerloopError) as caught:
        cluster_of(tmp_path, text)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("images: {policy: r/p:latest, light: r/l:1}", "cluster.images.policy is 'r/p:latest'"),
        ("", "cluster.images.policy is 'layerloop-policy'"),
        ("a: [", "is not YAML"),
        ("- 1", "is not a mapping: start from manifests/cluster.example.yaml"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(LayerloopError, match=line.replace("[", r"\[")) as caught:
        read_cluster(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LayerloopError, match="cannot be read"):
        read_cluster(tmp_path / "none.yaml")
