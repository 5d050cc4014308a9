"""The records in a rollouts shard: one per group, then one per candidate of that group.

Sample keys and members (WebDataset; no dots in keys):
    i000007-g000003            json = GroupRecord, source.png (RGBA, opaque), condition.safetensors
    i000007-g000003-c05        json = CandidateRecord, trajectory.safetensors, layer0.png .. layer{L-1}.png

`condition.safetensors` holds `condition[h*w, 64]`; `trajectory.safetensors` holds `window[w+1, S, 64]`, the latents
before each step of the SDE window and after its last, and `final[S, 64]`, the latents that were decoded; all float32,
with S = (L+1)*h*w packed tokens. Layer PNGs are straight RGBA, bottom first (layer0 is the background).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from layerloop.components.schema.manifest import Sha256
from layerloop.components.schema.record import SCHEMA_VERSION, Record


def group_key(iteration: int, group: int) -> str:
    return f"i{iteration:06d}-g{group:06d}"


def candidate_key(iteration: int, group: int, candidate: int) -> str:
    return f"{group_key(iteration, group)}-c{candidate:02d}"


class GroupRecord(Record):
    """One image, one layer count, G candidates, one SDE window."""

    schema_version: Literal[1] = SCHEMA_VERSION
    iteration: int = Field(ge=1)
    group: int = Field(ge=0)
    image_key: str
    layers: int = Field(ge=1, le=20)  # L; the policy generates L+1 frames, frame 0 being the composite
    group_size: int = Field(ge=2)  # G
    height: int  # pixels
    width: int  # pixels
    latent_height: int  # h, packed tokens
    latent_width: int  # w, packed tokens
    sigmas: tuple[float, ...]  # steps+1 values from 1 to 0, float32 values written exactly
    window_start: int = Field(ge=0)  # index of the first SDE step
    window_size: int = Field(ge=0)  # 0: no SDE step at all (NFT)
    dynamics: Literal["flow_sde", "cps", "ode"]
    etas: tuple[float, ...]  # noise level of each window step
    share_prefix: bool
    outside: Literal["heun", "euler"]
    base_fingerprint: Sha256  # of the frozen model
    adapter_sha256: Sha256 | None  # None: the base model, no adapter


class CandidateRecord(Record):
    """One sampled decomposition of a group."""

    schema_version: Literal[1] = SCHEMA_VERSION
    iteration: int = Field(ge=1)
    group: int = Field(ge=0)
    candidate: int = Field(ge=0)
    image_key: str
    seed: int  # of its initial noise
