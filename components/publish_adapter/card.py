"""The model card of a published adapter: its identity, loading, training, judge and evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerloop.components.layers.columns import quoted
from layerloop.components.reference_judge.identity import NAME as REFERENCE_JUDGE
from layerloop.components.schema.learning import ALGORITHMS, Algorithm
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.final_weights import final_weights

PAPER = "2605.30257"  # Stable-Layers
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
KINDS = {"designs": "held-out designs with known layers", "pictures": "held-out images without known layers"}


@dataclass(frozen=True)
class Publication:
    """Contents of a card."""

    name: str
    recipe: Recipe
    iteration: int
    policy: Manifest  # of that iteration
    first: Manifest  # of iteration 1
    averaged: bool  # the weights are the exponential average
    parameters: int
    sha256: str  # of peft/adapter_model.safetensors
    scores: Sequence[Manifest]  # of the iterations trained on
    evaluation: Mapping[str, Any] | None  # metrics.json
    verification: str  # result of loading both layouts back, a sentence


def model_card(publication: Publication) -> str:
    """The card as Markdown with YAML front matter, as the Hugging Face hub reads it."""
    sections = (
        _front_matter(publication),
        _introduction(publication),
        _loading(publication),
        _training(publication),
        _judge(publication.scores),
        _evaluation(publication),
        _limitations(publication),
        _references(publication),
    )
    return "\n\n".join(sections) + "\n"


def _front_matter(p: Publication) -> str:
    import yaml

    base = p.recipe.model.base
    matter: dict[str, Any] = {}
    if HUB_ID.fullmatch(base) and not Path(base).is_dir():
        matter |= {"base_model": base, "base_model_relation": "adapter"}
    started = p.recipe.lora.start_from
    matter |= {
        "library_name": "diffusers",
        # The base's licence; an adapter that this one started from may have another.
        "license": "apache-2.0" if started is None else "other",
        "pipeline_tag": "image-to-image",
        "tags": [
            "lora", "peft", "diffusers", "image-layer-decomposition", "rgba", "reinforcement-learning",
            _algorithm(p.recipe).tag, "layerloop", f"arxiv:{PAPER}",
        ],
    }  # fmt: skip
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---"


def _introduction(p: Publication) -> str:
    weights = "the exponential average of the weights trained in" if p.averaged else "the weights after"
    licence = (
        "Apache-2.0, as its base."
        if p.recipe.lora.start_from is None
        else f"It started from `{p.recipe.lora.start_from}`; that licence applies as well as the base's Apache-2.0."
    )
    return (
        f"# {p.name}\n\n"
        f"A LoRA for **{_base_name(p.recipe)}**, which decomposes one image into RGBA layers. It was fine-tuned by "
        "reinforcement learning from a judge's scores of its own decompositions, on unlabelled images, after the "
        f"method of Stable-Layers ([arXiv {PAPER}](https://arxiv.org/abs/{PAPER})), by `layerloop`, an independent "
        "implementation.\n\n"
        f"It holds {weights} {p.iteration} iterations: rank {p.recipe.lora.rank}, alpha {p.recipe.lora.alpha:g}, "
        f"{p.parameters:,} parameters, float32, sha256 `{p.sha256[:16]}…`. {licence}"
    )


def _loading(p: Publication) -> str:
    base = p.recipe.model.base
    if base == "tiny":
        load = "from layerloop.components.policy.tiny import load_tiny_pipeline\n\npipeline = load_tiny_pipeline()"
    else:
        load = (
            "import torch\nfrom diffusers import QwenImageLayeredPipeline\n\n"
            "# processor=None: its captioner is not needed, since the prompt is always the same\n"
            f'pipeline = QwenImageLayeredPipeline.from_pretrained("{base}", processor=None, '
            f"torch_dtype=torch.{p.recipe.model.dtype})"
        )
    return (
        "## How to load it\n\n"
        "All files hold the same weights; take the one your program reads. `folder` is this repository's name on the "
        "hub, or the folder of these files.\n\n"
        f"```python\n{load}\n```\n\n"
        "With diffusers (`pytorch_lora_weights.safetensors`):\n\n"
        "```python\npipeline.load_lora_weights(folder)\n```\n\n"
        "or with peft (`peft/adapter_model.safetensors`):\n\n"
        "```python\nfrom peft import PeftModel\n\n"
        'pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, folder, subfolder="peft")\n```\n\n'
        "ComfyUI takes either `pytorch_lora_weights.safetensors` or, at half the size, "
        "`pytorch_lora_weights.bf16.safetensors` (in diffusers `weight_name=`). The scale alpha / rank is part of "
        "these weights already, for readers that know none; in peft's layout it is in `adapter_config.json`.\n\n"
        f"Use it as it was trained: prompt “{p.recipe.model.prompt}”, no guidance (`true_cfg_scale=1.0`), longest side "
        f"{p.recipe.data.resolution} pixels, {_layers(p.recipe)} layers. It was evaluated with Heun's method, "
        f"{p.recipe.evaluation.steps} steps; the pipeline's own sampler is Euler's, which needs more steps for the "
        "same quality.\n\n"
        f"{p.verification}"
    )


def _training(p: Publication) -> str:
    rollout, update = p.recipe.rollout, p.recipe.update
    algorithm, window = _algorithm(p.recipe), rollout.window
    sampling = {
        "final": f"heun, {rollout.steps} steps",
        "window": f"{rollout.steps} steps, {rollout.noise.dynamics} with eta {rollout.noise.eta:g} in a "
        f"{window.position} window of {window.size} steps from step {window.start}, {rollout.outside} outside it",
    }
    rows = {
        "Iterations": f"{p.iteration}, each of {rollout.groups} images with {rollout.group_size} candidates",
        "Algorithm": f"{algorithm.title}, {algorithm.settings(update)}",
        "Sampling": sampling[algorithm.samples_from],
        "Optimizer": f"AdamW, learning rate {update.learning_rate:g}, {update.steps} steps per iteration",
        "Adapter": f"rank {p.recipe.lora.rank}, alpha {p.recipe.lora.alpha:g}, on {', '.join(p.recipe.lora.targets)}",
        "Mean reward": f"{_reward(p.first)} in iteration 1, {_reward(p.policy)} in the last",
        "Seed": str(p.recipe.seed),
    }
    return "## Training\n\n" + _table(("", ""), rows.items())


def _reward(manifest: Manifest) -> str:
    value = manifest.metadata.get("reward_mean")
    return f"{value:.4f}" if isinstance(value, int | float) else "unknown"


def _judge(scores: Sequence[Manifest]) -> str:
    """Section on the judge that gave the rewards, explicit where it was rules and not a model."""
    judges = list(dict.fromkeys(str(m.metadata.get("judge", "unknown")) for m in scores))
    rubrics = list(
        dict.fromkeys(f"`{m.metadata.get('rubric')}` {m.metadata.get('rubric_version', '')}".strip() for m in scores)
    )
    text = "## The judge\n\n"
    if not judges:
        return text + "The campaign keeps no scores, so this card cannot say who judged."
    text += (
        f"Rewards were given by {' and '.join(f'`{judge}`' for judge in judges)} with the rubric {', '.join(rubrics)}."
    )
    if REFERENCE_JUDGE in judges:
        text += (
            f"\n\n> **`{REFERENCE_JUDGE}` is not a vision-language model.** It is a set of rules over pixels that "
            "stands in for one so that the complete pipeline runs on one machine. A higher reward means that these "
            "rules were pleased, not that a person or a vision-language model would be."
        )
    return text


def _evaluation(p: Publication) -> str:
    text = "## Evaluation\n\n"
    if p.evaluation is None:
        return text + "This adapter was not evaluated before it was published."
    document = p.evaluation
    for kind, title in KINDS.items():
        rows = _quoted_names(document, kind)
        if rows:
            samples = max(int(document[f"{kind}.{name}"]["n"]) for name in rows)
            text += f"On {title} ({samples} compared, same seeds for both):\n\n"
            header = ("measure", "base", "this adapter", "difference [95 % interval]")
            text += _table(header, (_measure_row(document[f"{kind}.{name}"]) for name in rows)) + "\n\n"
    text += "↓ lower is better, ↑ higher is better; bold where the interval excludes 0."
    measured = (document.get("provenance") or {}).get("adapter_sha256")
    if measured is not None and measured != final_weights(p.policy).sha256:
        text += f" These numbers are of other weights (sha256 `{str(measured)[:16]}…`)."
    return text


def _quoted_names(document: Mapping[str, Any], kind: str) -> list[str]:
    """Names after `<kind>.` that are quoted, overall and by each layer count that is there."""
    names = [key.removeprefix(f"{kind}.") for key in document if key.startswith(f"{kind}.")]
    return [
        name for wanted in quoted("card") for name in sorted(names) if name == wanted or name.startswith(f"{wanted}.")
    ]


def _measure_row(comparison: Mapping[str, Any]) -> tuple[str, ...]:
    arrow = {"lower": " ↓", "higher": " ↑"}.get(str(comparison.get("better")), "")
    numbers = [comparison.get(name) for name in ("base", "tuned", "difference", "low", "high")]
    base, tuned, difference, low, high = ("–" if n is None else f"{float(n):.4g}" for n in numbers)
    change = f"{difference} [{low}, {high}]"
    return f"{comparison['title']}{arrow}", base, tuned, f"**{change}**" if comparison.get("clear") else change


def _limitations(p: Publication) -> str:
    points = [
        "It is tuned to its judge: it was not trained for properties that the judge does not see or weigh.",
        f"It was trained at {p.recipe.data.resolution} pixels on the longest side with {_layers(p.recipe)} layers; "
        "outside that it is not tested.",
        "Fewer sampling steps, guidance or another prompt change its behaviour.",
        "Colours under fully transparent pixels are undefined.",
        "It inherits the limits and biases of its base and of the images it was trained on.",
    ]
    if p.recipe.model.base == "tiny":
        points.insert(
            0, "Its base is a toy of a few million parameters for tests and demonstrations, not for real images."
        )
    return "## Limitations\n\n" + "\n".join(f"- {point}" for point in points)


def _references(p: Publication) -> str:
    algorithm = _algorithm(p.recipe)
    return (
        "## References\n\n"
        f"- Stable-Layers, [arXiv:{PAPER}](https://arxiv.org/abs/{PAPER}): the method.\n"
        "- Qwen-Image-Layered, [arXiv:2512.15603](https://arxiv.org/abs/2512.15603): the base model.\n"
        f"- {algorithm.title}, [arXiv:{algorithm.arxiv}](https://arxiv.org/abs/{algorithm.arxiv}): the algorithm."
    )


def _algorithm(recipe: Recipe) -> Algorithm:
    return ALGORITHMS[recipe.update.algorithm]


def _layers(recipe: Recipe) -> str:
    low, high = recipe.rollout.min_layers, recipe.rollout.max_layers
    return str(low) if low == high else f"{low} to {high}"


def _base_name(recipe: Recipe) -> str:
    return "layerloop's tiny policy (a toy Qwen-Image-Layered)" if recipe.model.base == "tiny" else recipe.model.base


def _table(header: Sequence[str], rows: Any) -> str:
    lines = [list(header), ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
