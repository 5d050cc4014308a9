"""The plan in words and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from layerloop.components.policy.size import Tokens
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.messages import counted
from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.runtime import Runtime
from layerloop.pipelines.cluster import Cluster
from layerloop.pipelines.plan import Gpus, Iteration, evaluation_hours, load_seconds, pods, resident, step_by_step
from layerloop.pipelines.plan_judge import Asked, asked
from layerloop.pipelines.plan_work import Assumptions, Work, transformer_size

TARGET = 0.7  # busy share for which the judge's replicas are counted
MOST_REPLICAS = 64

# Public figures of others, to hold the assumptions against.
YARDSTICKS = (
    "vllm-omni's CI, Qwen-Image-Layered, one H100, 640 px, 4 layers: 20 steps with guidance take 14.2 s, 35 steps "
    "23.9 s, so 30 forwards 9.7 s, 0.32 s each; peak 60.5 GB with the text encoder",
    "verl-omni, Qwen-Image, 512 px, LoRA r64: 3.3 GPU-seconds a candidate on 4 H800, with guidance (512 candidates in "
    "420 s)",
)
YARDSTICK_FORWARD = 0.32  # seconds


def gpu_layouts(cluster: Cluster | None, workers: int) -> list[Gpus]:
    """The cluster's, or without one: one GPU, one node of eight, and four nodes of which one updates.

    Raises:
        LayerloopError: no worker, or workers of which no cluster says what they have.
    """
    if workers < 1:
        raise LayerloopError(f"workers is {workers}: choose 1 or more")
    if cluster is None and workers > 1:
        raise LayerloopError(f"workers is {workers}, and no cluster file says which GPUs each has: give --cluster FILE")
    if cluster is None:
        return [Gpus(1, 1, 1, 1, 1), Gpus(1, 8, 8, 8, 8), Gpus(4, 8, 8, 8, 32)]
    steps = ("generate_rollouts", "update_lora", "evaluate_adapter", "train_stretch")
    each, update, evaluate, resident = (max(1, cluster.gpus_of(step)) for step in steps)
    return [Gpus(workers, each, update, evaluate, resident)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that is printed about one recipe."""

    work: Work
    judge: Asked
    layouts: Sequence[Gpus]
    gpus_per_node: int

    @classmethod
    def of(
        cls, recipe: Recipe, runtime: Runtime, assumed: Assumptions, *, cluster: Cluster | None, workers: int
    ) -> Plan:
        """The plan of a recipe on a cluster, or on the usual ones."""
        work = Work(recipe, runtime, assumed)
        return cls(work, asked(work), gpu_layouts(cluster, workers), (cluster or Cluster()).node_gpus)

    def ways(self, gpus: Gpus) -> list[Iteration]:
        """An iteration on these GPUs, step by step and resident."""
        seconds = self.judge.seconds(self.work.assumed)
        return [
            step_by_step(self.work, gpus, seconds),
            resident(self.work, gpus.resident, seconds),
            resident(self.work, gpus.resident, seconds, lag=1),
        ]

    def replicas(self, gpus: Gpus, *, lag: int = 0, wanted: float = TARGET) -> int | None:
        """Fewest replicas of the judge with which a resident iteration keeps the GPUs busy for `wanted` of it."""
        one = self.judge.seconds(self.work.assumed) * self.work.assumed.judge_replicas
        for count in range(1, MOST_REPLICAS + 1):
            if resident(self.work, gpus.resident, one / count, lag=lag).busy >= wanted:
                return count
        return None

    def campaign(self, gpus: Gpus, way: Iteration) -> dict[str, float]:
        """Hours, pods, bytes and cost of all iterations and evaluations."""
        given = self.work.assumed
        hours = given.iterations * way.wall / 3600
        evaluating = (1 + given.evaluations) * evaluation_hours(self.work, gpus.evaluate) if given.evaluations else 0.0
        gpu_hours = hours * way.gpus + evaluating * gpus.evaluate
        stored = given.iterations * self.bytes()["an iteration"] / 1e9
        judged = given.iterations * self.judge.cost(self.work.runtime.judge.price)
        return {
            "days": (hours + evaluating) / 24, "gpu_hours": gpu_hours, "evaluation_hours": evaluating,
            "pods": pods(given, gpus, way=way.way, gpus_per_node=self.gpus_per_node), "stored_gb": stored,
            "gpu_cost": gpu_hours * given.gpu_hour_price, "judge_cost": judged,
            "storage_cost_a_month": stored * given.storage_gb_month_price,
        }  # fmt: skip

    def bytes(self) -> dict[str, float]:
        """Of an iteration, by what they are for."""
        parts = {
            "latents": self.work.latent_bytes(),
            "layers": self.work.layer_bytes(),
            "policy": float(self.work.policy_bytes()),
        }
        return parts | {"an iteration": sum(parts.values())}


def plan_json(plan: Plan) -> str:
    """The plan as JSON: seconds, 10^12 operations, bytes."""
    work = plan.work
    layouts = [
        {
            **dataclasses.asdict(gpus), "total": gpus.total,
            "ways": [
                {"way": way.way, "gpus": way.gpus, "seconds": dict(way.seconds), "wall_seconds": way.wall,
                 "busy": way.busy, "campaign": plan.campaign(gpus, way)}
                for way in plan.ways(gpus)
            ],
            "replicas_for_70_percent": {f"lag_{lag}": plan.replicas(gpus, lag=lag) for lag in (0, 1)},
        }
        for gpus in plan.layouts
    ]  # fmt: skip
    value: dict[str, Any] = {
        "computed": True, "recipe": work.recipe.name, "transformer": dataclasses.asdict(work.size),
        "parameters": work.size.parameters, "adapter_parameters": work.adapter.parameters,
        "forward_tflop": {str(layers): work.forward(layers) for layers in work.layers},
        "iteration_tflop": work.iteration(), "evaluated_model_tflop": work.evaluated_model(),
        "judge": dataclasses.asdict(plan.judge) | {"seconds": plan.judge.seconds(work.assumed)},
        "bytes": plan.bytes(), "gpu_bytes": work.gpu_bytes(), "layouts": layouts,
        "assumptions": work.assumed.model_dump(),
    }  # fmt: skip
    return json.dumps(_rounded(value), indent=2)


def _rounded(value: Any) -> Any:
    """Floats with six digits, at any depth."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# ---- text, at most 100 columns


def plan_text(plan: Plan) -> str:
    """The plan for a terminal."""
    lines = [*_work_lines(plan), ""]
    for gpus in plan.layouts:
        lines += [*_layout_lines(plan, gpus), ""]
    return "\n".join([*lines, *_assumption_lines(plan), "", *_yardstick_lines(plan)])


def _work_lines(plan: Plan) -> list[str]:
    work, judge = plan.work, plan.judge
    recipe, rollout = work.recipe, work.recipe.rollout
    parts, whole, memory = work.iteration(), sum(work.iteration().values()), work.gpu_bytes()
    stored = plan.bytes()
    height, width = work.sides()
    forwards = ", ".join(f"{layers}: {work.forward(layers):.3g}" for layers in work.layers)
    dtype = f"{recipe.model.dtype}{' in float8' if recipe.model.fp8_base else ''}"
    base = work.size.base_bytes(dtype=recipe.model.dtype, float8=recipe.model.fp8_base)
    small = work.size.parameters < 1e8
    parameters = f"{work.size.parameters / 1e6:.3g} M" if small else f"{work.size.parameters / 1e9:.4g} B"
    hours = evaluation_hours(work, 1)
    return [
        f"recipe {recipe.name}: COMPUTED, not measured"
        + ("; a toy: minutes on two CPU cores, and it leaves a GPU idle" if recipe.model.shipped else ""),
        f"  base        {parameters} parameters ({transformer_size(recipe.model)[1]}), "
        f"{dtype}, {_size(base)}; adapter {work.adapter.parameters / 1e6:.4g} M",
        f"  a forward   TFLOP at {width} x {height} pixels by layers: {forwards}",
        f"  iteration   {rollout.groups} groups x {rollout.group_size} candidates, {work.calls:g} forwards each, "
        f"{work.candidates * work.points} points",
        f"              {_operations(whole)}: sampling {_operations(parts['sampling'])}, anchors "
        f"{_operations(parts['anchors'])}, update {_operations(parts['update'])}",
        f"  evaluation  {_operations(work.evaluated_model())} a model: "
        + (f"{hours:.2g} h on one GPU" if hours >= 0.01 else "seconds on one GPU"),
        f"  judge       {judge.requests:.0f} requests, {judge.input_tokens / 1e6:.2f} M tokens in, "
        f"{judge.output_tokens / 1e3:.0f} k out: {judge.seconds(work.assumed):.0f} s on "
        f"{work.assumed.judge_replicas} replica{'s' if work.assumed.judge_replicas > 1 else ''}",
        f"  storage     {_size(stored['an iteration'])} an iteration: latents {_size(stored['latents'])}, layers "
        f"{_size(stored['layers'])}, policy {_size(stored['policy'])}",
        f"  GPU memory  {_size(memory['sampling'])} to sample, {_size(memory['update'])} to learn "
        f"({work.layers[-1]} layers)",
    ]


def _layout_lines(plan: Plan, gpus: Gpus) -> list[str]:
    what = f"{gpus.total} GPU{'s' if gpus.total > 1 else ''}"
    if gpus.workers > 1 or gpus.update != gpus.each:
        what += f" ({gpus.workers} x {gpus.each} for rollouts, {gpus.update} for the update)"
    lines = [
        f"{what:46}{'s an':>9}{'GPUs':>7}{'campaign':>11}{'GPU':>9}",
        f"{'  seconds of an iteration':46}{'iteration':>9}{'busy':>7}{'days':>11}{'hours':>9}{'pods':>7}",
    ]
    for way in plan.ways(gpus):
        total = plan.campaign(gpus, way)
        name = way.way if way.gpus == gpus.total else f"{way.way}, on its pod's {counted(way.gpus, 'GPUs')}"
        lines.append(
            f"  {name:44}{way.wall:>9.0f}{way.busy:>7.0%}{total['days']:>11.1f}{total['gpu_hours']:>9.0f}"
            f"{total['pods']:>7.0f}"
        )
        lines.append("    " + ", ".join(f"{name} {value:.0f}" for name, value in way.seconds.items() if value >= 0.5))
        if cost := total["gpu_cost"] + total["judge_cost"]:
            lines.append(
                f"    cost {cost:,.0f}: GPUs {total['gpu_cost']:,.0f}, judge {total['judge_cost']:,.0f}; and "
                f"{total['storage_cost_a_month']:,.0f} a month for {_size(1e9 * total['stored_gb'])}"
            )
    if plan.ways(gpus)[1].busy < TARGET:
        ways = [(plan.replicas(gpus, lag=lag), lag) for lag in (0, 1)]
        found = [f"{count} replicas of the judge with lag {lag}" for count, lag in ways if count]
        lines.append(f"  resident reaches {TARGET:.0%} with {' or '.join(found) or 'no number of judge replicas'}")
    if gpus.resident > plan.gpus_per_node:
        lines.append("  resident over several nodes is torchrun around train_stretch: the pipeline's pod is on one")
    return lines


def _assumption_lines(plan: Plan) -> list[str]:
    given = plan.work.assumed
    lines = ["assumed (--set plan.KEY=VALUE sets one):"]
    values = {n: str(v).lower() if isinstance(v, bool) else f"{v:g}" for n, v in given.model_dump().items()}
    cells = [f"{name} {value}" for name, value in values.items()]
    for left, right in zip(cells[::2], [*cells[1::2], ""], strict=False):
        lines.append(f"  {left:46}{right}".rstrip())
    lines.append(
        f"  {given.iterations} iterations, {1 + given.evaluations if given.evaluations else 0} models evaluated; "
        f"loading is {load_seconds(plan.work):.0f} s"
    )
    return lines


def _yardstick_lines(plan: Plan) -> list[str]:
    work = plan.work
    lines = ["public figures of others:"]
    for text in YARDSTICKS:
        lines += [f"  {line}" for line in _wrapped(text, 94)]
    tokens = work.size.forward(Tokens(4, 40, 40, work.assumed.prompt_tokens)) / 1e12
    per = sum(work.iteration().values()) / work.candidates / work.assumed.tflops
    lines.append(
        f"  here {tokens / work.assumed.tflops:.2f} s for such a forward ({YARDSTICK_FORWARD} s would be "
        f"{tokens / YARDSTICK_FORWARD:.0f} TFLOP/s); {per:.1f} GPU-seconds a candidate in all"
    )
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, subsequent_indent="  ")


def _operations(tera: float) -> str:
    return f"{tera / 1000:.4g} PFLOP" if tera >= 1000 else f"{tera:.3g} TFLOP"


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
