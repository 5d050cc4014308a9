"""The runtime: where and how fast a campaign is run. Unlike the recipe it is free: each run, and each step, may have
another one, and the campaign's results stay the same.

Each value that touches arithmetic says what "the same" means: equal bits, or equal up to the order of a sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import Field

from layerloop.components.schema.record import Record, validate


class ModelRuntime(Record):
    """Settings for holding and calling the base."""

    # Of diffusers. Exact backends differ by rounding; `sage*` quantise queries and keys, which changes samples by more.
    # Use one for the rollouts and the update of an iteration, or the first ratios are 1 only up to that difference.
    attention: str = "native"
    compile: bool = False  # torch.compile of the repeated blocks; rounding
    gradient_checkpointing: bool = True  # less memory, a third more time; same bits
    fsdp: bool = False  # shard the frozen base over the ranks of a torchrun; order of sums


class RolloutRuntime(Record):
    """Settings for sampling an iteration."""

    batch_size: int = Field(default=1, ge=1)  # candidates in one forward pass; same bits in float32 on a CPU


class UpdateRuntime(Record):
    """Settings for the update of an iteration."""

    # Points in one forward pass; a point is one candidate at one timestep. A step's gradient is one sum over all its
    # points, whatever the microbatches, so this changes the order of that sum, as the number of ranks does.
    microbatch: int = Field(default=1, ge=1)


class EvaluationRuntime(Record):
    """Settings for an evaluation."""

    batch_size: int = Field(default=1, ge=1)  # cases in one forward pass; rounding


class BatchRuntime(Record):
    """Batch API mode: a file of requests is uploaded, polled for and collected. Slower; cheaper where discounted."""

    enabled: bool = False  # use the endpoint's batch API
    poll_seconds: float = Field(default=30.0, gt=0)  # between two looks at a batch
    max_hours: float = Field(default=24.0, gt=0)  # a batch that takes longer fails the step, which can be resumed
    linger_seconds: float = Field(default=5.0, gt=0)  # a batch is sent when no request has joined it for so long
    max_requests: int = Field(default=20_000, ge=1, le=50_000)  # in one file (OpenAI: 50,000)
    max_megabytes: int = Field(default=180, ge=1, le=200)  # of one file (OpenAI: 200 MB)


class PriceRuntime(Record):
    """Prices of a judge per million tokens, in any currency. Zero: no cost is reported."""

    input: float = Field(default=0.0, ge=0)  # of tokens that the judge reads
    cached_input: float | None = Field(default=None, ge=0)  # None: as `input`
    output: float = Field(default=0.0, ge=0)  # of tokens that the judge writes


class JudgeRuntime(Record):
    """Settings for calling the judge's endpoint. They enter neither requests nor the addresses of stored replies."""

    concurrency: int = Field(default=32, ge=1)  # most requests in flight; fewer when the judge asks for it
    timeout_seconds: float = Field(default=120.0, gt=0)  # of one request
    timeout_factor: float = Field(default=1.5, ge=0)  # give up after so many times what 9 of 10 requests take; 0: never
    retries: int = Field(default=4, ge=0)  # of a request that got no answer; an unusable answer is recipe.judge.redraws
    start_seconds: float = Field(default=0.0, ge=0)  # wait this long for a judge that is being started
    # Without any answer, until the step fails, to be run again; until then it waits. 1e6: never, failures are masks.
    give_up_seconds: float = Field(default=60.0, ge=0)
    price: PriceRuntime = PriceRuntime()
    batch: BatchRuntime = BatchRuntime()


class Runtime(Record):
    """Where and how fast a campaign runs. All values are optional and fit the 20 B base at 640 pixels and one GPU."""

    model: ModelRuntime = ModelRuntime()
    rollout: RolloutRuntime = RolloutRuntime()
    update: UpdateRuntime = UpdateRuntime()
    evaluation: EvaluationRuntime = EvaluationRuntime()
    judge: JudgeRuntime = JudgeRuntime()


# Defaults with recipe.model.base "tiny": a model that is small enough for large batches on a CPU.
TINY: Final[Mapping[str, Any]] = {
    "model": {"gradient_checkpointing": False},
    "rollout": {"batch_size": 12},
    "update": {"microbatch": 48},
    "evaluation": {"batch_size": 8},
    "judge": {"concurrency": 8},
}
RENAMED: Final = {("judge", "impatience"): "timeout_factor"}  # keys of earlier recipes
REMOVED: Final = frozenset({("evaluation", "bootstrap")})  # keys of earlier recipes that mean nothing any more


def runtime_key(section: str, key: str) -> str | None:
    """Name of a recipe's former key `section.key` in the runtime; None of what the recipe keeps."""
    field = Runtime.model_fields.get(section)
    record: Any = field.annotation if field else None
    name = RENAMED.get((section, key), key)
    return name if record and name in record.model_fields else None


def split_runtime(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(recipe, runtime) of a recipe's decoded text, as recipes were when they held both.

    `judge.retries` was one number for two things; its second meaning stays in the recipe as `judge.redraws`.
    """
    recipe, runtime = dict(values), {}
    for section in Runtime.model_fields:
        if not isinstance(given := values.get(section), Mapping):
            continue
        both = {key: value for key, value in given.items() if (section, key) not in REMOVED}
        kept = {key: value for key, value in both.items() if runtime_key(section, key) is None}
        moved = {runtime_key(section, key): value for key, value in both.items() if key not in kept}
        if section == "judge" and "retries" in moved:
            kept.setdefault("redraws", moved["retries"])
        if moved:
            runtime[section] = moved
        recipe[section] = kept
        if given and not kept:
            del recipe[section]
    return recipe, runtime


def checked_values(values: Any, *, where: str) -> dict[str, Any]:
    """Values of a part of the runtime, each in its own type (64.0 becomes 64), nothing added.

    Raises:
        LayerloopError: an unknown key or an impossible value, in one line that begins with `where`.
    """
    return validate(Runtime, values, where=where).model_dump(mode="json", exclude_unset=True)


def merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`low` with the values of `high` laid over it, section by section."""
    result = dict(low)
    for key, value in high.items():
        inner = result.get(key)
        result[key] = (
            merged(inner if isinstance(inner, Mapping) else {}, value) if isinstance(value, Mapping) else value
        )
    return result


def without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not null, which a parameter of KFP cannot hold; what is left out has its default, so null."""
    return {
        key: without_nulls(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """`{"judge.concurrency": 8, ...}` of nested mappings."""
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}.{key}" if path else key).items()}
    return {path: value}
