"""The published files, and the verification that each layout gives the output of the campaign's adapter.

Each layout is loaded back the way its users load it, peft's by `PeftModel.from_pretrained` and diffusers' by
`QwenImageLayeredPipeline.load_lora_weights`, on the same base in memory, and its velocities are compared with those of
the adapter as the campaign has it. In float32 they must be equal bit for bit. Where the base is bfloat16, peft
multiplies in float32 and diffusers rounds the adapter to bfloat16 on loading, so there the root mean square of the
difference may be a tenth of that of the adapter's own effect, above the resolution of a bfloat16 velocity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerloop.components.policy.adapters import Adapter
from layerloop.components.policy.lora import put_adapter, remove_adapter, write_diffusers, write_peft
from layerloop.components.policy.model import Condition
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.seeds import seed_for

if TYPE_CHECKING:
    from layerloop.components.policy.model import LayeredPolicy

PEFT, DIFFUSERS = "peft", "diffusers"  # folders of a publication
TOLERANCE = 0.1  # of the adapter's effect, for a bfloat16 base
RESOLUTION = 2.0**-8  # of a bfloat16 number
PROBES = ((1, 0.98), (2, 0.7), (3, 0.2))  # (layers, sigma) of the passes that are compared


@dataclass(frozen=True)
class RoundTrip:
    """Root mean squares over all probes: the adapter's effect on the velocity, and the layouts' differences to it."""

    effect: float
    peft: float
    diffusers: float


def write_layouts(adapter: Adapter, folder: Path, *, policy: LayeredPolicy, base: str) -> list[Path]:
    """Write `peft/` and `diffusers/` into `folder`; returns the files, relative to it."""
    write_peft(adapter, folder / PEFT, transformer=policy.transformer, base=base)
    write_diffusers(adapter, folder / DIFFUSERS, transformer=policy.transformer)
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def verify_round_trip(adapter: Adapter, folder: Path, *, policy: LayeredPolicy, prompt_embeds: Tensor) -> RoundTrip:
    """Load both layouts of `folder` back and compare; `policy` is the base, and is the base again afterwards.

    Args:
        prompt_embeds: `prompt_embeds[T, E]`, the campaign's prompt.

    Raises:
        LayerloopError: a layout cannot be loaded, or gives another output.
    """
    base = _velocities(policy, prompt_embeds)
    with _with_campaign_adapter(policy, adapter):
        expected = _velocities(policy, prompt_embeds)
    with _with_peft(policy, folder / PEFT):
        by_peft = _velocities(policy, prompt_embeds)
    with _with_diffusers(policy, folder / DIFFUSERS):
        by_diffusers = _velocities(policy, prompt_embeds)
    round_trip = RoundTrip(*(_rms(other - expected) for other in (base, by_peft, by_diffusers)))
    exact = policy.dtype == torch.float32
    allowed = 0.0 if exact else TOLERANCE * round_trip.effect + RESOLUTION * _rms(expected)
    for layout, difference in ((PEFT, round_trip.peft), (DIFFUSERS, round_trip.diffusers)):
        if not difference <= allowed:
            raise LayerloopError(
                f"the adapter loaded back from {layout} layout changes the velocity by {difference:.3g} (root mean "
                f"square) where at most {allowed:.3g} is allowed: nothing is published; check the versions of peft and "
                "diffusers"
            )
    return round_trip


@torch.no_grad()
def _velocities(policy: LayeredPolicy, prompt_embeds: Tensor) -> Tensor:
    """Velocities of all probes in one vector: random latents and condition from hashed seeds, 2 x 4 tokens each."""
    height, width = 2 * policy.pixel_multiple, 4 * policy.pixel_multiple
    outputs = []
    for layers, sigma in PROBES:
        latents = policy.noise(seed_for("publish", layers), layers, height, width).to(policy.device)
        condition_latents = policy.noise(seed_for("publish", "condition"), 0, height, width).to(policy.device)
        prompt = prompt_embeds[None].to(policy.device, policy.dtype)
        condition = Condition(latents=condition_latents, prompt_embeds=prompt, height=height, width=width)
        outputs.append(policy.velocity(latents, sigma, condition).flatten().cpu())
    return torch.cat(outputs)


@contextmanager
def _with_campaign_adapter(policy: LayeredPolicy, adapter: Adapter) -> Iterator[None]:
    put_adapter(policy.transformer, adapter)
    try:
        yield
    finally:
        remove_adapter(policy.transformer)


@contextmanager
def _with_peft(policy: LayeredPolicy, folder: Path) -> Iterator[None]:
    from peft import PeftModel

    try:  # puts the adapter into the transformer that it is given; the returned model wraps it
        loaded = PeftModel.from_pretrained(policy.transformer, str(folder))
    except Exception as error:  # peft raises many kinds; each means that users could not load it either
        raise LayerloopError(f"peft cannot load the adapter back: {_one_line(error)}: nothing is published") from error
    try:
        yield
    finally:
        loaded.unload()


@contextmanager
def _with_diffusers(policy: LayeredPolicy, folder: Path) -> Iterator[None]:
    from diffusers import QwenImageLayeredPipeline

    pipeline = QwenImageLayeredPipeline(
        scheduler=policy.scheduler, vae=policy.vae, transformer=policy.transformer,
        text_encoder=None, tokenizer=None, processor=None,
    )  # fmt: skip
    try:
        pipeline.load_lora_weights(str(folder))
    except Exception as error:
        raise LayerloopError(
            f"diffusers cannot load the adapter back: {_one_line(error)}: nothing is published"
        ) from error
    try:
        yield
    finally:
        pipeline.unload_lora_weights()


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
