"""Where steps run on a cluster, said once for both DAGs: images, GPUs, memory, secrets, queues, retries, timeouts.

Nothing here defines a campaign (that is the recipe) and nothing here changes a result. `kfp.local` ignores all of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kfp import dsl, kubernetes
from pydantic import Field

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.record import Record, validate

DIGEST = re.compile(r"^[^\s@]+@sha256:[0-9a-f]{64}$")
PARALLEL_VERBS = ("generate_rollouts", "update_lora")
GPU_VERBS = (*PARALLEL_VERBS, "evaluate_adapter", "publish_adapter")


class Images(Record):
    """What `images/` builds, each as `registry/name@sha256:...`. A tag may change under a running campaign."""

    policy: str = "layerloop-policy"  # CUDA, torch, diffusers
    light: str = "layerloop-light"  # no torch


class Resources(Record):
    """Requests of one kind of pod; memory is also its limit, the CPU has none."""

    cpu: str = "2"
    memory: str = "8Gi"


class Secrets(Record):
    """Names of secrets in the run's namespace, each optional there. Their values never pass through KFP."""

    judge: str = "layerloop-judge"  # OPENAI_API_KEY
    store: str = "layerloop-store"  # AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or a service account
    hub: str = "layerloop-hub"  # HF_TOKEN
    pull: str | None = None  # image pull secret


class Toleration(Record):
    """A taint that GPU pods tolerate."""

    key: str
    operator: str = "Exists"
    value: str | None = None
    effect: str | None = "NoSchedule"


class Cluster(Record):
    """The place. The defaults fit manifests/base; `layerloop compile --cluster FILE` reads other values from YAML."""

    images: Images = Images()
    light: Resources = Resources()
    policy: Resources = Resources(cpu="8", memory="96Gi")
    gpu_resource: str = "nvidia.com/gpu"
    gpus: int = Field(default=1, ge=0)  # of each pod of generate_rollouts and update_lora: one process each; 0: on CPUs
    update_gpus: int | None = Field(default=None, ge=1)  # of update_lora, where it differs
    shared_memory: str = "16Gi"  # /dev/shm of GPU pods, out of their memory; the container default is 64 MiB
    tolerations: tuple[Toleration, ...] = (Toleration(key="nvidia.com/gpu"),)
    node_selector: dict[str, str] = {}
    queue: str | None = "layerloop"  # Kueue LocalQueue of GPU pods; None where Kueue is not installed
    secrets: Secrets = Secrets()
    service_urls: dict[str, str] = {}  # variables that are no secret: AWS_ENDPOINT_URL_S3, AWS_REGION, OPENAI_BASE_URL
    weights_claim: str | None = "layerloop-weights"  # PVC with the base model's files, mounted read-write at /weights
    retries: int = Field(default=3, ge=0)  # steps are idempotent, so a retry continues
    timeout_hours: dict[str, float] = {
        "shard_dataset": 12,
        "generate_rollouts": 12,
        "score_rollouts": 12,
        "update_lora": 12,
        "evaluate_adapter": 24,
        "publish_adapter": 2,
    }

    def place(self, verb: str, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """Give a task of `verb` its image, resources, secrets, queue, retry and timeout, and return it.

        KFP's caching is off: a step that is done finds its manifest and returns, whatever run it belongs to, while a
        cached task would skip a campaign that was removed or moved on.
        """
        task.set_caching_options(enable_caching=False)
        task.set_display_name(verb.replace("_", " "))
        self._image(task)
        self._environment(task)
        needs = self.policy if task.container_spec.image == self.images.policy else self.light
        task.set_cpu_request(needs.cpu).set_memory_request(needs.memory).set_memory_limit(needs.memory)
        if verb in GPU_VERBS and self.gpus:
            self._gpu(task, self._gpus(verb))
        if self.retries:
            task.set_retry(self.retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
        kubernetes.set_timeout(task, int(self.timeout_hours[verb] * 3600))
        return task

    def _image(self, task: dsl.PipelineTask) -> None:
        """Replace the name in component.py, which says which of the two images the step needs, by this place's."""
        name = task.container_spec.image.removeprefix("layerloop-")
        task.set_container_image(getattr(self.images, name))
        if self.secrets.pull:
            kubernetes.set_image_pull_secrets(task, [self.secrets.pull])

    def _environment(self, task: dsl.PipelineTask) -> None:
        for name, value in sorted(self.service_urls.items()):
            task.set_env_variable(name, value)
        for secret, keys in (
            (self.secrets.store, ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")),
            (self.secrets.judge, ("OPENAI_API_KEY",)),
            (self.secrets.hub, ("HF_TOKEN",)),
        ):
            kubernetes.use_secret_as_env(task, secret, {key: key for key in keys}, optional=True)
        if self.weights_claim and task.container_spec.image == self.images.policy:
            kubernetes.mount_pvc(task, pvc_name=self.weights_claim, mount_path="/weights")
            task.set_env_variable("HF_HOME", "/weights/huggingface")

    def _gpus(self, verb: str) -> int:
        """Evaluation and publishing are single processes, which one GPU serves."""
        if verb == "update_lora" and self.update_gpus:
            return self.update_gpus
        return self.gpus if verb in PARALLEL_VERBS else 1

    def _gpu(self, task: dsl.PipelineTask, gpus: int) -> None:
        task.set_accelerator_type(self.gpu_resource).set_accelerator_limit(gpus)
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=self.shared_memory)
        for taint in self.tolerations:
            kubernetes.add_toleration(task, taint.key, taint.operator, taint.value, taint.effect)
        for key, value in sorted(self.node_selector.items()):
            kubernetes.add_node_selector(task, key, value)
        if self.queue:
            kubernetes.add_pod_label(task, "kueue.x-k8s.io/queue-name", self.queue)


def read_cluster(path: str | Path) -> Cluster:
    """The place described by a YAML file.

    Raises:
        LayerloopError: no such file, not YAML, an unknown key, an impossible value, or an image that is not pinned.
    """
    import yaml

    try:
        value: Any = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise LayerloopError(f"cluster file {path} cannot be read ({error.strerror}): name a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LayerloopError(f"cluster file {path} is not YAML: {' '.join(str(error).split())}") from None
    cluster = validate(Cluster, value or {}, where="cluster")
    for name, image in cluster.images.model_dump().items():
        if not DIGEST.match(image):
            raise LayerloopError(
                f"cluster.images.{name} is {image!r}, which may change under a running campaign: "
                "name it by digest, registry/name@sha256:<64 hex digits>"
            )
    unknown = set(cluster.timeout_hours) ^ set(Cluster().timeout_hours)
    if unknown:
        raise LayerloopError(
            f"cluster.timeout_hours differs from the verbs by {', '.join(sorted(unknown))}: name all six verbs"
        )
    return cluster
