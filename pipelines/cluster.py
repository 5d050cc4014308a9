"""Where steps run on a cluster, said once for both DAGs: images, GPUs, memory, secrets, queues, retries, timeouts.

Nothing here defines a campaign (that is the recipe) and nothing here changes a result. `kfp.local` ignores all of it.
What Kubernetes would refuse is refused while a file is read, by the types of kubernetes_values.py.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal, Self

from kfp import dsl, kubernetes
from pydantic import Field, model_validator

from layerloop.components.runtime.recurring import VARIABLE as KFP_API
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.record import Record, validate
from layerloop.components.schema.steps import STEPS
from layerloop.components.schema.yaml_text import load_yaml, read_by_hand
from layerloop.pipelines.kubernetes_values import (
    CPU,
    MEMORY,
    Api,
    Cpu,
    Gpu,
    Gpus,
    Hours,
    Label,
    LabelKey,
    Labels,
    Memory,
    Name,
    Queue,
    Root,
    Variable,
    bytes_of,
    times,
)

DIGEST = re.compile(r"^[^\s@]+@sha256:[0-9a-f]{64}$")

# A retried pod may wait for a node or for its queue; Argo counts that in the budget of all attempts.
QUEUEING_HOURS = 24.0
CA_FOLDER = "/etc/layerloop/ca"
CACHE_FOLDER = "/cache"
PAUSE = 30  # seconds before the first retry, doubled for each further one


class Images(Record):
    """What `images/` builds, each as `registry/name@sha256:...`. A tag may change under a running campaign."""

    policy: str = "layerloop-policy"  # CUDA, torch, diffusers
    light: str = "layerloop-light"  # no torch


class Resources(Record):
    """Requests of one kind of pod; memory is also its limit, the CPU has none."""

    cpu: Cpu = "2"
    memory: Memory = "8Gi"


class Secrets(Record):
    """Names of secrets in the run's namespace, each optional there, or null to leave one out.

    Their values never pass through KFP, and a step gets only what it uses.
    """

    judge: Name | None = "layerloop-judge"  # OPENAI_API_KEY: scoring
    store: Name | None = "layerloop-store"  # AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN: every step
    hub: Name | None = "layerloop-hub"  # HF_TOKEN: steps that fetch the base
    pull: Name | None = None  # image pull secret

    def of(self, step: str) -> dict[str, tuple[str, ...]]:
        """Keys by secret, of those that a step uses."""
        wanted = [
            (self.store, ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")),
            (self.judge if STEPS[step].asks_judge else None, ("OPENAI_API_KEY",)),
            (self.hub if STEPS[step].loads_base else None, ("HF_TOKEN",)),
        ]
        return {secret: keys for secret, keys in wanted if secret}


class Toleration(Record):
    """A taint that pods tolerate."""

    key: LabelKey
    operator: Literal["Exists", "Equal"] = "Exists"
    value: Label | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = "NoSchedule"

    @model_validator(mode="after")
    def _value_where_it_is_compared(self) -> Self:
        if self.operator == "Exists" and self.value:
            raise ValueError(f"operator Exists of {self.key} takes no value: leave it out, or choose Equal")
        return self


class Affinity(Record):
    """A wish about the node's labels: all without a weight must hold, those with one are preferred."""

    key: LabelKey
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = "In"
    values: tuple[Label, ...] = ()
    weight: int | None = Field(default=None, ge=1, le=100)

    @model_validator(mode="after")
    def _values_where_they_are_compared(self) -> Self:
        compared = self.operator in ("In", "NotIn", "Gt", "Lt")
        if compared != bool(self.values):
            what = "needs values" if compared else "takes no values"
            raise ValueError(f"operator {self.operator} of {self.key} {what}: change one of the two")
        if self.operator in ("Gt", "Lt") and not (len(self.values) == 1 and re.fullmatch("[0-9]+", self.values[0])):
            raise ValueError(f"operator {self.operator} of {self.key} has {list(self.values)}: give one whole number")
        return self

    def expression(self) -> dict[str, Any]:
        return {"key": self.key, "operator": self.operator} | ({"values": list(self.values)} if self.values else {})


class StepPods(Record):
    """What the pods of one step need, where it differs. cpu and memory are of the pod, not of each GPU."""

    cpu: Cpu | None = None
    memory: Memory | None = None
    gpus: Gpus | None = None
    ephemeral_storage: Memory | None = None  # size limit of /tmp, an emptyDir; KFP cannot request it
    timeout_hours: Hours | None = None
    node_selector: Labels | None = None  # these three replace the cluster's
    tolerations: tuple[Toleration, ...] | None = None
    node_affinity: tuple[Affinity, ...] | None = None
    labels: Labels = {}  # these are added to the cluster's
    annotations: dict[LabelKey, str] = {}


# Variables of a step that are not for `service_urls`, and what they come from.
_OWNERS = {
    "AWS_ACCESS_KEY_ID": "the secret of cluster.secrets.store",
    "AWS_SECRET_ACCESS_KEY": "the secret of cluster.secrets.store",
    "AWS_SESSION_TOKEN": "the secret of cluster.secrets.store",
    "OPENAI_API_KEY": "the secret of cluster.secrets.judge", "HF_TOKEN": "the secret of cluster.secrets.hub",
    "HF_HOME": "cluster.weights_claim", "LAYERLOOP_CACHE": "cluster.cache_claim",
    "TORCHINDUCTOR_CACHE_DIR": "cluster.cache_claim", KFP_API: "cluster.kfp_api",
    "HOME": "the image", "PATH": "the image",
}  # fmt: skip


class Cluster(Record):
    """Where steps run. The defaults fit manifests/base; `layerloop compile --cluster FILE` reads other values."""

    images: Images = Images()
    light: Resources = Resources()
    policy: Resources = Resources(cpu="8", memory="96Gi")  # for each GPU of a pod
    gpu_resource: Gpu = "nvidia.com/gpu"
    node_gpus: int = Field(default=8, ge=1)  # GPUs of one node, which a pod cannot exceed
    gpus: Gpus = 1  # of each pod of rollouts, updates and evaluation: one process each; 0: on CPUs
    update_gpus: Gpus | None = None  # of update_lora, where it differs
    evaluate_gpus: Gpus | None = None  # of evaluate_adapter, where it differs
    shared_memory: Memory = "16Gi"  # /dev/shm of GPU pods, out of their memory; the container default is 64 MiB
    steps: dict[str, StepPods] = {}  # what single steps need
    tolerations: tuple[Toleration, ...] = (Toleration(key="nvidia.com/gpu"),)  # of GPU pods, as the next three
    node_selector: Labels = {}
    node_affinity: tuple[Affinity, ...] = ()
    queue: Queue | None = "layerloop"  # Kueue LocalQueue of GPU pods; None where Kueue is not installed
    labels: Labels = {}  # of every pod
    annotations: dict[LabelKey, str] = {}
    run_as_user: int | None = Field(default=65532, ge=1, le=2**31 - 1)  # None: the namespace's range says (OpenShift)
    secrets: Secrets = Secrets()
    service_urls: dict[Variable, str] = {}  # variables that are no secret: AWS_ENDPOINT_URL_S3, OPENAI_BASE_URL
    ca_bundle: Name | None = None  # ConfigMap whose key ca.crt holds every certificate that steps are to trust
    kfp_api: Api | None = None  # None: the stock one, inside a cluster
    pipeline_root: Root | None = None  # None: the installation's
    weights_claim: Name | None = "layerloop-weights"  # PVC with the base model's files, mounted read-write at /weights
    cache_claim: Name | None = (
        None  # PVC on a disk of the node, at /cache: steps copy the base there, once for the node
    )
    retries: int = Field(default=3, ge=0, le=8)  # steps are idempotent, so a retry continues
    timeout_hours: dict[str, Hours] = {}  # by step, where it differs from the step table
    forward_seconds: float = Field(default=0.32, gt=0)  # one forward at 640 pixels (public figure: H100), for estimates

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for variable in self.service_urls:
            if owner := _OWNERS.get(variable) or ("Kubeflow" if variable.startswith("KFP_") else None):
                raise ValueError(f"cluster.service_urls.{variable} is set by {owner}: leave it out")
        for field in ("steps", "timeout_hours"):
            for step in getattr(self, field):
                if step not in STEPS:
                    raise ValueError(f"cluster.{field}.{step} is not a step: choose of {', '.join(STEPS)}")
        for step in STEPS:
            if self.gpus_of(step) > self.node_gpus:
                raise ValueError(self._too_many_gpus(step))
            needs = self.needs(step)
            if self.gpus_of(step) and bytes_of(self.shared_memory) >= bytes_of(needs.memory):
                raise ValueError(
                    f"cluster.shared_memory is {self.shared_memory} but {step} has {needs.memory} of memory, out of "
                    "which it is taken: choose less"
                )
        return self

    def _too_many_gpus(self, step: str) -> str:
        short = {"update_lora": "update_gpus", "evaluate_adapter": "evaluate_gpus"}.get(step, "gpus")
        own = self.steps[step].gpus if step in self.steps else None
        name = f"steps.{step}.gpus" if own is not None else short if getattr(self, short) is not None else "gpus"
        several = {
            "generate_rollouts": "rollouts spread over nodes by more workers (layerloop compile --workers)",
            "update_lora": "an update over several nodes is a TrainJob, which no pod of this pipeline is",
        }.get(step, "one pod is on one node")
        return (
            f"cluster.{name} is {self.gpus_of(step)} but a node has {self.node_gpus} (cluster.node_gpus): choose at "
            f"most {self.node_gpus}; {several}"
        )

    def gpus_of(self, step: str) -> int:
        """GPUs of a pod of `step`. Publishing is a single process, which one GPU serves."""
        own = self._own(step).gpus
        if own is not None:
            return own
        if step == "update_lora" and self.update_gpus is not None:
            return self.update_gpus
        if step == "evaluate_adapter" and self.evaluate_gpus is not None:
            return self.evaluate_gpus
        return {"all": self.gpus, "one": min(1, self.gpus), "none": 0}[STEPS[step].gpus]

    def needs(self, step: str) -> Resources:
        """CPU and memory of a step's pod: its own, else its image's for each of its GPUs."""
        own, row, factor = self._own(step), STEPS[step], max(1, self.gpus_of(step))
        kind = self.light if row.image == "light" else self.policy
        return Resources(
            cpu=own.cpu or row.cpu or times(kind.cpu, factor, CPU),
            memory=own.memory or row.memory or times(kind.memory, factor, MEMORY),
        )

    def hours(self, step: str) -> float:
        """Deadline of one attempt of a pod of `step`."""
        return self.own_hours(step) or STEPS[step].timeout_hours

    def own_hours(self, step: str) -> float | None:
        """The deadline that the file sets for `step`, if it does."""
        return self._own(step).timeout_hours or self.timeout_hours.get(step)

    def _own(self, step: str) -> StepPods:
        return self.steps.get(step, StepPods())

    def apply(self, step: str, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """Give a task of `step` its image, resources, secrets, queue, retry and timeout, and return it.

        KFP's caching is off: a step that is done finds its manifest and returns, whatever run it belongs to, while a
        cached task would skip a campaign that was removed or moved on.
        """
        task.set_caching_options(enable_caching=False)
        task.set_display_name(step.replace("_", " "))
        self._image(step, task)
        self._environment(step, task)
        needs = self.needs(step)
        task.set_cpu_request(needs.cpu).set_memory_request(needs.memory).set_memory_limit(needs.memory)
        self._nodes(step, task)
        self._metadata(step, task)
        if scratch := self._own(step).ephemeral_storage:
            kubernetes.empty_dir_mount(task, "scratch", "/tmp", size_limit=scratch)
        # Pod Security `restricted` wants it said; the rest (no capabilities, seccomp) KFP sets itself.
        kubernetes.set_security_context(task, run_as_user=self.run_as_user, run_as_non_root=True)
        seconds = math.ceil(self.hours(step) * 3600)
        if self.retries:
            # Argo counts this from the first attempt's start, so it is the budget of all attempts and not a pause.
            budget = (self.retries + 1) * (seconds + math.ceil(QUEUEING_HOURS * 3600))
            task.set_retry(
                self.retries, backoff_duration=f"{PAUSE}s", backoff_factor=2.0, backoff_max_duration=f"{budget}s"
            )
        kubernetes.set_timeout(task, seconds)
        return task

    def _image(self, step: str, task: dsl.PipelineTask) -> None:
        """Replace the image's name in component.py by this cluster's."""
        task.set_container_image(getattr(self.images, STEPS[step].image))
        if self.secrets.pull:
            kubernetes.set_image_pull_secrets(task, [self.secrets.pull])

    def _environment(self, step: str, task: dsl.PipelineTask) -> None:
        for name, value in sorted(self.service_urls.items()):
            task.set_env_variable(name, value)
        if self.ca_bundle:
            kubernetes.use_config_map_as_volume(task, self.ca_bundle, mount_path=CA_FOLDER)
            for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
                task.set_env_variable(name, f"{CA_FOLDER}/ca.crt")
        if self.kfp_api and step == "shard_dataset":
            task.set_env_variable(KFP_API, self.kfp_api)
        for secret, keys in self.secrets.of(step).items():
            kubernetes.use_secret_as_env(task, secret, {key: key for key in keys}, optional=True)
        if STEPS[step].loads_base and self.weights_claim:
            kubernetes.mount_pvc(task, pvc_name=self.weights_claim, mount_path="/weights")
        if STEPS[step].loads_base:  # without a volume, /tmp is where the image's user may write
            task.set_env_variable("HF_HOME", "/weights/huggingface" if self.weights_claim else "/tmp/huggingface")
            self._cache(step, task)

    def _cache(self, step: str, task: dsl.PipelineTask) -> None:
        """The volume of the node's disk; compiled kernels are kept there, or where the weights are."""
        gpus = self.gpus_of(step)
        if self.cache_claim and gpus:
            kubernetes.mount_pvc(task, pvc_name=self.cache_claim, mount_path=CACHE_FOLDER)
            task.set_env_variable("LAYERLOOP_CACHE", CACHE_FOLDER)
        kept = CACHE_FOLDER if self.cache_claim else "/weights" if self.weights_claim else None
        if kept and gpus:
            task.set_env_variable("TORCHINDUCTOR_CACHE_DIR", f"{kept}/inductor")

    def _nodes(self, step: str, task: dsl.PipelineTask) -> None:
        gpus, own = self.gpus_of(step), self._own(step)
        if gpus:
            task.set_accelerator_type(self.gpu_resource).set_accelerator_limit(gpus)
            kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=self.shared_memory)
        tolerations = own.tolerations if own.tolerations is not None else self.tolerations if gpus else ()
        for taint in tolerations:
            kubernetes.add_toleration(task, taint.key, taint.operator, taint.value, taint.effect)
        selector = own.node_selector if own.node_selector is not None else self.node_selector if gpus else {}
        for key, value in sorted(selector.items()):
            kubernetes.add_node_selector(task, key, value)
        wishes = own.node_affinity if own.node_affinity is not None else self.node_affinity if gpus else ()
        if required := [wish.expression() for wish in wishes if wish.weight is None]:  # one term: all of them hold
            kubernetes.add_node_affinity(task, match_expressions=required)
        for wish in wishes:
            if wish.weight is not None:
                kubernetes.add_node_affinity(task, match_expressions=[wish.expression()], weight=wish.weight)

    def _metadata(self, step: str, task: dsl.PipelineTask) -> None:
        queue = {"kueue.x-k8s.io/queue-name": self.queue} if self.queue and self.gpus_of(step) else {}
        for key, value in sorted((queue | self.labels | self._own(step).labels).items()):
            kubernetes.add_pod_label(task, key, value)
        for key, value in sorted((self.annotations | self._own(step).annotations).items()):
            kubernetes.add_pod_annotation(task, key, value)


def read_cluster(path: str | Path) -> Cluster:
    """The cluster described by a YAML file.

    Raises:
        LayerloopError: no such file, not YAML, an unknown key, an impossible value, or an image that is not pinned.
    """
    try:
        value: Any = load_yaml(read_by_hand(path), where=f"cluster file {path}")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise LayerloopError(f"cluster file {path} cannot be read ({reason}): name a YAML file") from None
    if not isinstance(value or {}, dict):
        raise LayerloopError(f"cluster file {path} is not a mapping: start from manifests/cluster.example.yaml")
    cluster = validate(Cluster, value or {}, where="cluster")
    for name, image in cluster.images.model_dump().items():
        if not DIGEST.match(image):
            raise LayerloopError(
                f"cluster.images.{name} is {image!r}, which may change under a running campaign: "
                "name it by digest, registry/name@sha256:<64 hex digits>"
            )
    return cluster
