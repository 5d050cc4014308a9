"""The model card of a published adapter: its identity, use, training, judge, evaluation, limits and citation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerloop.components.layers.columns import quoted
from layerloop.components.publish_adapter.names import base_title, hub_name, licence_of
from layerloop.components.publish_adapter.usage import (
    LIBRARIES,
    euler_steps,
    layers_to_ask_for,
    programs,
    sampler_rows,
    sampler_verdict,
)
from layerloop.components.reference_judge.identity import NAME as REFERENCE_JUDGE
from layerloop.components.schema.learning import ALGORITHMS, Algorithm
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.messages import counted
from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.final_weights import final_weights

PAPER = "2605.30257"  # Stable-Layers
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
    samplers: Mapping[str, Any] | None = None  # samplers.json, where samplers were compared


def model_card(publication: Publication) -> str:
    """The card as Markdown with YAML front matter, as the Hugging Face hub reads it."""
    sections = (
        _front_matter(publication),
        _introduction(publication),
        _usage(publication),
        _training(publication),
        _judge(publication.scores),
        _evaluation(publication),
        _limitations(publication),
        _citation(publication),
    )
    return "\n\n".join(sections) + "\n"


def _front_matter(p: Publication) -> str:
    import yaml

    matter: dict[str, Any] = {}
    if (base := hub_name(p.recipe.model.base)) is not None:
        matter |= {"base_model": base, "base_model_relation": "adapter"}
    matter |= licence_of(p.recipe.model.base, p.recipe.lora.start_from).fields
    matter |= {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "tags": [
            "lora", "peft", "diffusers", "image-layer-decomposition", "rgba", "reinforcement-learning",
            _algorithm(p.recipe).tag, "layerloop", f"arxiv:{PAPER}",
        ],
    }  # fmt: skip
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---"


def _introduction(p: Publication) -> str:
    weights = "the exponential average of the weights trained in" if p.averaged else "the weights after"
    recipe, iterations = p.recipe, f"{p.iteration} iteration{'s' if p.iteration > 1 else ''}"
    return (
        f"# {p.name}\n\n"
        f"A LoRA for **{base_title(recipe.model.base)}**, which decomposes one image into RGBA layers. It was "
        "fine-tuned by reinforcement learning from a judge's scores of its own decompositions, on unlabelled images, "
        f"after the method of Stable-Layers ([arXiv {PAPER}](https://arxiv.org/abs/{PAPER})), by `layerloop`, an "
        "independent implementation.\n\n"
        f"It holds {weights} {iterations}: rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g}, "
        f"{p.parameters:,} parameters, float32, sha256 `{p.sha256[:16]}…`. "
        f"Licence: {licence_of(recipe.model.base, recipe.lora.start_from).sentence}"
    )


def _usage(p: Publication) -> str:
    recipe = p.recipe
    code = programs(recipe, steps=euler_steps(p.samplers) or recipe.evaluation.steps)
    ours = " and `layerloop`" if recipe.model.shipped else ""
    return (
        "## How to use it\n\n"
        f"All files hold the same weights. Each program below is complete: it needs `{LIBRARIES}`{ours}, reads "
        f"`picture.png` in the folder where it is started and writes {layers_to_ask_for(recipe)} layers. "
        "`adapter` is the folder of this card, or this repository's name on the hub.\n\n"
        f"With diffusers (`pytorch_lora_weights.safetensors`):\n\n```python\n{code['diffusers']}```\n\n"
        f"With peft (`peft/adapter_model.safetensors`):\n\n```python\n{code['peft']}```\n\n"
        f"With layerloop, by the sampler that it was evaluated with, Heun's:\n\n```python\n{code['layerloop']}```\n\n"
        "ComfyUI takes either `pytorch_lora_weights.safetensors` or, at half the size, "
        "`pytorch_lora_weights.bf16.safetensors` (in diffusers `weight_name=`), as a LoRA of the diffusion model at "
        "strength 1. The scale alpha / rank is part of these weights already, for readers that know none; in peft's "
        "layout it is in `adapter_config.json`.\n\n"
        f"{_sampling(p)}\n\n"
        f"{p.verification}"
    )


def _sampling(p: Publication) -> str:
    recipe = p.recipe
    text = (
        f"Use it as it was trained: prompt “{recipe.model.prompt}”, no guidance (`true_cfg_scale=1.0`), longest side "
        f"{recipe.data.resolution} pixels, {_layers(recipe)} layers, an opaque picture. "
    )
    if p.samplers is None:
        return text + (
            f"It is evaluated with Heun's method, {recipe.evaluation.steps} steps. diffusers' pipeline has Euler's "
            "only; with which other sampler the quality holds was not measured."
        )
    text += f"diffusers' pipeline has Euler's method only. {sampler_verdict(p.samplers)}\n\n"
    header, rows = sampler_rows(p.samplers)
    text += _table(header, rows) + "\n\n"
    text += (
        f"{p.samplers['images']} held-out images, from the same noise by every sampler: base → this adapter. ↓ lower "
        "is better; the adapter's value is bold where the 95 % interval of its difference from the base excludes 0. "
        "Safe: no interval says that the adapter is worse than the base by the same sampler, or than itself by Heun's "
        "method with 50 steps. That is not proof of the same quality, and chance alone calls some samplers unsafe."
    )
    if p.samplers.get("adapter_sha256") != final_weights(p.policy).sha256:
        text += " The table is of other weights than these."
    return text


def _training(p: Publication) -> str:
    rollout, update = p.recipe.rollout, p.recipe.update
    algorithm, window = _algorithm(p.recipe), rollout.window
    sampling = {
        "final": f"{rollout.whole}, {rollout.steps} steps",
        "window": f"{rollout.steps} steps, {rollout.noise.dynamics} with eta {rollout.noise.eta:g} in a "
        f"{window.position} window of {window.size} steps from step {window.start}, {rollout.outside} outside it",
    }
    images = counted(rollout.groups, "images")
    rows = {
        "Iterations": f"{p.iteration}, each of {images} with {rollout.group_size} candidates",
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
        rows = [_measure_row(name, document[f"{kind}.{name}"]) for name in _quoted_names(document, kind)]
        if rows:
            header = ("measure", "n", "base", "this adapter", "difference", "95 % interval")
            text += f"On {title}, with the same seeds for both:\n\n{_table(header, rows)}\n\n"
    fewest = f"{document['fewest']} or more" if "fewest" in document else "large enough for one to be trusted"
    text += (
        "A row is the mean over n images; the interval is of the difference. ↓ lower is better, ↑ higher is better; a "
        f"difference is bold where it is clear: its interval excludes 0, n is {fewest}, and its p-value, adjusted for "
        "all measures that are read together, is 5 % at most."
    )
    measured = (document.get("provenance") or {}).get("adapter_sha256")
    if measured is not None and measured != final_weights(p.policy).sha256:
        text += f" These numbers are of other weights (sha256 `{str(measured)[:16]}…`)."
    return text


def _quoted_names(document: Mapping[str, Any], kind: str) -> list[str]:
    """Names after `<kind>.` that are quoted, overall and by each layer count (where there are several) and slot that is
    there, in their order."""

    def order(name: str) -> list[str | int]:
        """Numbers as such: L10 comes after L2."""
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    names = [key.removeprefix(f"{kind}.") for key in document if key.startswith(f"{kind}.")]
    counts = {part for name in names for part in name.split(".")[1:2]}
    return [
        name
        for wanted in quoted("card")
        for name in sorted(names, key=order)
        if name == wanted or (name.startswith(f"{wanted}.") and (len(counts) > 1 or name.count(".") > 1))
    ]


def _measure_row(name: str, comparison: Mapping[str, Any]) -> tuple[str, ...]:
    arrow = {"lower": " ↓", "higher": " ↑"}.get(str(comparison.get("better")), "")
    numbers = [comparison.get(key) for key in ("base", "tuned", "difference", "low", "high")]
    form = f".{comparison['decimals']}f" if "decimals" in comparison else ".4g"
    base, tuned, difference, low, high = ("–" if n is None else _number(float(n), form) for n in numbers)
    if comparison.get("clear"):
        difference = f"**{difference}**"
    title = str(comparison["title"])  # which says the layer count itself since evaluations have a row for each
    title = ", ".join([title, *(part for part in _where(name) if part.replace("layer ", "slot ") not in title)])
    interval = "–" if low == "–" else f"{low} to {high}"
    return f"{title}{arrow}", str(int(comparison["n"])), base, tuned, difference, interval


def _number(value: float, form: str) -> str:
    """A number in this form; what is rounded to zero has no sign."""
    text = f"{value:{form}}"
    return text.removeprefix("-") if float(text) == 0 else text


def _where(name: str) -> Iterator[str]:
    """`slot_l1.L3.slot0` -> "3 layers", "layer 0"."""
    for part in name.split(".")[1:]:
        yield f"{part[1:]} layers" if part.startswith("L") else f"layer {part.removeprefix('slot')}"


def _limitations(p: Publication) -> str:
    points = [
        "The numbers are of one training run: the intervals are over images, not over seeds of training.",
        "Measures of layers stand in for what a person wants to edit; nobody's preference was asked.",
        "It is tuned to its judge: it was not trained for properties that the judge does not see or weigh.",
        f"It was trained at {p.recipe.data.resolution} pixels on the longest side with {_layers(p.recipe)} layers; "
        "outside that it is not tested.",
        "Fewer sampling steps, guidance or another prompt change its behaviour.",
        "Colours under fully transparent pixels are undefined.",
        "It inherits the limits and biases of its base and of the images it was trained on.",
    ]
    if p.recipe.model.shipped:
        points.insert(
            0, "Its base is a toy of a few million parameters for tests and demonstrations, not for real images."
        )
    return "## What this does not show\n\n" + "\n".join(f"- {point}" for point in points)


def _citation(p: Publication) -> str:
    algorithm = _algorithm(p.recipe)
    key = "".join(c for c in p.name.lower() if c.isalnum()) or "adapter"
    return (
        "## How to cite\n\n"
        "Cite the method, the base and the algorithm, and name this adapter by its sha256:\n\n"
        f"- Stable-Layers, [arXiv:{PAPER}](https://arxiv.org/abs/{PAPER}): the method.\n"
        "- Qwen-Image-Layered, [arXiv:2512.15603](https://arxiv.org/abs/2512.15603): the base model.\n"
        f"- {algorithm.title}, [arXiv:{algorithm.arxiv}](https://arxiv.org/abs/{algorithm.arxiv}): the algorithm.\n\n"
        "```bibtex\n"
        f"@misc{{{key},\n"
        f"  title = {{{p.name}: a LoRA for image layer decomposition}},\n"
        f"  note = {{layerloop, iteration {p.iteration}, sha256 {p.sha256}}}\n"
        "}\n```"
    )


def _algorithm(recipe: Recipe) -> Algorithm:
    return ALGORITHMS[recipe.update.algorithm]


def _layers(recipe: Recipe) -> str:
    low, high = recipe.rollout.min_layers, recipe.rollout.max_layers
    return str(low) if low == high else f"{low} to {high}"


def _table(header: Sequence[str], rows: Any) -> str:
    lines = [list(header), ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
