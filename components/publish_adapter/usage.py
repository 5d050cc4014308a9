"""The card's section on use: complete programs, and what is known about samplers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from layerloop.components.publish_adapter.names import RELEASED, hub_name
from layerloop.components.schema.recipe import TINY, Recipe

# The lines that name this publication; for a repository its name takes their place.
PLACE = 'adapter = "."  # the folder of this card, or its name on the hub'
OUR_PLACE = 'adapter = "."  # the folder of this card, or its name on the hub as hf://owner/name'
LIBRARIES = "pip install torch diffusers transformers peft pillow"

_PROGRAM = """\
import torch
from diffusers import QwenImageLayeredPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered
from PIL import Image, ImageOps
{imports}
{place}
{base}
picture = ImageOps.exif_transpose(Image.open("picture.png")).convert("RGBA")
picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)  # opaque, as in training

# The size of training: {resolution} pixels on the longest side. The pipeline's own rule is an area of 640 x 640.
scale = {resolution} / max(picture.size)
size = tuple(max(1, round(side * scale / {multiple})) * {multiple} for side in picture.size)
pipeline_qwenimage_layered.calculate_dimensions = lambda area, ratio: size

pipeline = QwenImageLayeredPipeline.from_pretrained(base, processor=None, torch_dtype=torch.{dtype})
{load}
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
layers = pipeline(
    image=picture,
    prompt="{prompt}",
    layers={layers},
    num_inference_steps={steps},
    true_cfg_scale=1.0,  # no guidance
    generator=torch.Generator().manual_seed(42),
).images[0]
for index, layer in enumerate(layers):  # RGBA, bottom layer first
    layer.save(f"layer-{{index}}.png")
"""

_OURS = """\
from PIL import Image

from layerloop.components.layers.normalise import normalise
from layerloop.components.policy.adapters import read_adapter
from layerloop.components.policy.inference import Inference, sample_layers
from layerloop.components.policy.lora import put_adapter
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.policy.prompt import embed_prompt
from layerloop.components.schema.recipe import DataRecipe, ModelRecipe
from layerloop.components.storage.folders import local_folder

{our_place}
model = ModelRecipe(base="{base}", dtype="{dtype}", prompt="{prompt}")
policy = LayeredPolicy.load(model, device="{device}")
put_adapter(policy.transformer, read_adapter(local_folder(adapter)))
picture = normalise(Image.open("picture.png"), DataRecipe(resolution={resolution}, multiple={multiple}))
(stack,) = sample_layers(
    policy, picture[None], embed_prompt(model), seeds=[42], layers={layers},
    how=Inference(steps={heun}, sampler="heun"),
)
for index, layer in enumerate(stack):  # RGBA, bottom layer first
    Image.fromarray(layer).save(f"layer-{{index}}.png")
"""


def programs(recipe: Recipe, *, steps: int) -> dict[str, str]:
    """Complete programs by their library, which write the layers of `picture.png` as `layer-0.png`, ...

    Args:
        steps: Of Euler's method, for the libraries that have no other.
    """
    if recipe.model.shipped:
        module, function = ("tiny", "tiny_folder") if recipe.model.base == TINY else ("faulty", "faulty_folder")
        imports = f"\nfrom layerloop.components.policy.{module} import {function}\n"
        base = f"base = {function}()"
    else:
        imports = ""
        base = f'base = "{hub_name(recipe.model.base) or RELEASED}"'
        if hub_name(recipe.model.base) is None:
            base += "  # or the folder of the base that it was trained on, if that differs"
    common = {
        "place": PLACE,
        "our_place": OUR_PLACE,
        "base": base,
        "resolution": recipe.data.resolution,
        "multiple": recipe.data.multiple,
        "dtype": recipe.model.dtype,
        "prompt": json.dumps(recipe.model.prompt, ensure_ascii=False)[1:-1],
        "layers": layers_to_ask_for(recipe),
        "steps": steps,
    }
    diffusers = _PROGRAM.format(**common, imports=imports, load="pipeline.load_lora_weights(adapter)")
    peft = _PROGRAM.format(
        **common,
        imports=f"from peft import PeftModel\n{imports}",
        load='pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, adapter, subfolder="peft")',
    )
    where = recipe.model.base if recipe.model.shipped else hub_name(recipe.model.base) or RELEASED
    ours = _OURS.format(
        **common | {"base": where},
        heun=recipe.evaluation.steps,
        device="cpu" if recipe.model.shipped else "cuda",
    )
    return {"diffusers": diffusers, "peft": peft, "layerloop": ours}


def layers_to_ask_for(recipe: Recipe) -> int:
    """4, the released model's default, where the adapter was trained for it; else the nearest count that it was."""
    return min(max(4, recipe.rollout.min_layers), recipe.rollout.max_layers)


def card_for_hub(card: str, repository: str) -> str:
    """A card whose programs load the adapter from `repository`, `owner/name`, so that they run anywhere."""
    return card.replace(OUR_PLACE, f'adapter = "hf://{repository}"').replace(PLACE, f'adapter = "{repository}"')


# ------------------------------------------------------------------------------------------------------------ samplers


def euler_steps(table: Mapping[str, Any] | None) -> int | None:
    """Fewest steps of Euler's method that are safe without guidance, by `samplers.json`; None where none are."""
    return min((s["steps"] for s in _safe(table) if s["sampler"] == "euler" and s["guidance"] == 1), default=None)


def sampler_verdict(table: Mapping[str, Any]) -> str:
    """Which samplers are safe, in a sentence or two."""
    if table["images"] < table["fewest"]:
        return f"Which sampler is safe cannot be said from {table['images']} images."
    safe = [_sampler(setting) for setting in _safe(table)]
    if not safe:
        return "By the table below **no sampler is safe**."
    text = f"By the table below **these are safe: {', '.join(safe)}**."
    if (steps := euler_steps(table)) is None:
        return text + " The programs above sample by Euler's method, which is not among them: expect worse."
    return text + f" The programs above use Euler's method with {steps} steps, the fewest of it that are."


def sampler_rows(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table with a row a sampler."""
    measures = table["settings"][0]["measures"]
    arrows = {"lower": " ↓", "higher": " ↑"}
    header = ["sampler", "safe", *(f"{m['title']}{arrows.get(m['better'], '')}" for m in measures.values())]
    rows = []
    for setting in table["settings"]:
        cells = []
        for name in measures:
            found = setting["measures"][name]
            tuned = f"{found['tuned']:.4g}"
            cells.append(f"{found['base']:.4g} → {f'**{tuned}**' if found['clear'] else tuned}")
        rows.append([_sampler(setting), {True: "yes", False: "no", None: "?"}[setting["safe"]], *cells])
    return header, rows


def _safe(table: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    return [setting for setting in table["settings"] if setting["safe"]] if table else []


def _sampler(setting: Mapping[str, Any]) -> str:
    guidance = "" if setting["guidance"] == 1 else f", guidance {setting['guidance']:g}"
    return f"{setting['sampler'].capitalize()} {setting['steps']}{guidance}"
