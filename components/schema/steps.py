"""The step table: what packaging, the cluster's settings, local runs and the tests know of a step, one row per step.

A new step is its folder, a row here, its place in a DAG of pipelines/, and its name in pyproject.toml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

RUN: Final = "LAYERLOOP_RUN"  # variable with the name of the run that a step's process belongs to


@dataclass(frozen=True, kw_only=True)
class Step:
    """One container of the pipelines, `components/<name>`."""

    name: str
    image: Literal["policy", "light"]  # of images/: with torch, or without
    # GPUs of a pod: as many as the cluster says, with a process on each; one, for a single process; or none.
    gpus: Literal["all", "one", "none"]
    timeout_hours: float  # of one attempt, where the cluster sets no other
    cpu: str = ""  # of a pod, where the image's default does not fit; Kubernetes' quantities
    memory: str = ""
    loads_base: bool  # whether it reads the base model's files: the weights' volume, the hub's token
    asks_judge: bool = False  # whether it gets the judge's key
    iteration_from: str | None = None  # the input artifact whose manifest says the iteration; None: the step finds it
    iteration_offset: int = 0  # what is added to that
    composes: tuple[str, ...] = ()  # steps whose work it does in one place: it stands above them


_ROWS = (
    # The text encoder (8.3 B parameters, 17 GB in bfloat16) runs once in a campaign, on the CPU.
    Step(
        name="shard_dataset", image="policy", gpus="none", timeout_hours=12.0, cpu="4", memory="24Gi", loads_base=True,
    ),
    Step(
        name="generate_rollouts", image="policy", gpus="all", timeout_hours=12.0, loads_base=True,
        iteration_from="policy", iteration_offset=1,
    ),
    Step(
        name="score_rollouts", image="light", gpus="none", timeout_hours=12.0, loads_base=False, asks_judge=True,
        iteration_from="rollouts",
    ),
    Step(
        name="update_lora", image="policy", gpus="all", timeout_hours=12.0, loads_base=True, iteration_from="scores",
    ),
    # The pipelines multiply this deadline by the iterations.
    Step(
        name="train_stretch", image="policy", gpus="all", timeout_hours=12.0, loads_base=True, asks_judge=True,
        iteration_from="previous", iteration_offset=1,
        composes=("generate_rollouts", "score_rollouts", "update_lora"),
    ),
    # The pipelines replace this deadline by one that follows from the recipe's evaluation.
    Step(
        name="evaluate_adapter", image="policy", gpus="all", timeout_hours=24.0, loads_base=True, asks_judge=True,
        iteration_from="policy",
    ),
    Step(
        name="publish_adapter", image="policy", gpus="one", timeout_hours=2.0, loads_base=True,
        iteration_from="policy",
    ),
)  # fmt: skip

STEPS: Final[Mapping[str, Step]] = {step.name: step for step in _ROWS}
