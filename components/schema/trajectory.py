"""The records in a rollouts shard: one per group, then one per candidate of that group.

Sample keys and members (WebDataset; no dots in keys):
    i000007-g000003            json = GroupRecord, source.png (RGBA, opaque), condition.safetensors
    i000007-g000003-c05        json = CandidateRecord, trajectory.safetensors, layer0.png .. layer{L-1}.png

`condition.safetensors` holds `condition[h*w, 64]`; `trajectory.safetensors` holds `window[w+1, S, 64]`, the latents
before each step of the SDE window and after its last, and `final[S, 64]`, the latents that were decoded: algorithms of
the forward process learn from them, and where there is a window they only show that the layers are its latents',
decoded. Where recipe.rollout.keep_velocities says so there are also `velocities[w, S, 64]`, the model's in the window's
steps, and `rows[1]`, int32, the rows of the forward passes that gave them. All else is float32, with S = (L+1)*h*w
packed tokens. Layer PNGs are straight RGBA, bottom first (layer0 is the background).
"""

from __future__ import annotations

import itertools
from typing import Literal, Self

from pydantic import Field, model_validator

from layerloop.components.schema.manifest import Sha256
from layerloop.components.schema.record import SCHEMA_VERSION, Record

REMEDY = "delete the iteration's folder, and it is sampled and scored again"  # for damaged rollouts


def group_key(iteration: int, group: int) -> str:
    """Sample key of a group's record in its shard: `i000007-g000003`."""
    return f"i{iteration:06d}-g{group:06d}"


def candidate_key(iteration: int, group: int, candidate: int) -> str:
    """Sample key of a candidate, in rollouts and in scores: `i000007-g000003-c05`."""
    return f"{group_key(iteration, group)}-c{candidate:02d}"


class GroupRecord(Record):
    """One image, one layer count, G candidates, one SDE window."""

    schema_version: Literal[1] = SCHEMA_VERSION
    iteration: int = Field(ge=1)
    group: int = Field(ge=0)
    image_key: str
    layers: int = Field(ge=1, le=20)  # L; the policy generates L+1 frames, frame 0 being the composite
    group_size: int = Field(ge=2)  # G
    height: int = Field(ge=1)  # pixels
    width: int = Field(ge=1)  # pixels
    latent_height: int = Field(ge=1)  # h, packed tokens
    latent_width: int = Field(ge=1)  # w, packed tokens
    sigmas: tuple[float, ...]  # steps+1 values that fall from at most 1 to 0, float32 values written exactly
    window_start: int = Field(ge=0)  # index of the first SDE step
    window_size: int = Field(ge=0)  # 0: no SDE step at all, where final latents are learned from
    dynamics: Literal["flow_sde", "cps", "ode"]
    etas: tuple[float, ...]  # noise level of each window step
    share_prefix: bool
    outside: Literal["heun", "euler"]
    base_fingerprint: Sha256  # of the frozen model
    adapter_sha256: Sha256 | None  # None: the base model, no adapter

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Check that the schedule falls to 0 and that the window fits in it, with a noise level for each step."""
        steps = len(self.sigmas) - 1
        falling = all(a > b for a, b in itertools.pairwise(self.sigmas))
        if steps < 1 or not falling or self.sigmas[0] > 1 or self.sigmas[-1] != 0:
            raise ValueError(
                f"sigmas is {list(self.sigmas)}, not 2 values or more that fall from at most 1 to 0: {REMEDY}"
            )
        end = self.window_start + self.window_size
        if end > (steps - 1 if self.window_size else steps):
            raise ValueError(
                f"window_start is {self.window_start} and window_size {self.window_size}, but sigmas has {steps} steps "
                f"and the last is never stochastic: {REMEDY}"
            )
        if len(self.etas) != self.window_size or any(eta <= 0 for eta in self.etas):
            raise ValueError(
                f"etas is {list(self.etas)}, not one positive value for each of the {self.window_size} steps of the "
                f"window: {REMEDY}"
            )
        if self.window_size and self.dynamics == "ode":
            raise ValueError(
                f"dynamics is 'ode', which is not stochastic, but window_size is {self.window_size}: {REMEDY}"
            )
        return self


class CandidateRecord(Record):
    """One sampled decomposition of a group."""

    schema_version: Literal[1] = SCHEMA_VERSION
    iteration: int = Field(ge=1)
    group: int = Field(ge=0)
    candidate: int = Field(ge=0)
    image_key: str
    seed: int  # of its initial noise


def model_calls(*, steps: int, start: int, window: int, second_order: bool, share_prefix: bool, candidates: int) -> int:
    """Model calls for single samples that sampling `candidates` takes: two for a Heun step, one for any other and for
    the last step; a shared prefix counts once.

    Args:
        steps: sampling steps, of which `window` from `start` on are stochastic.
        second_order: the others are Heun's.
    """
    prefix = start * (1 + second_order)
    suffix = (steps - start - window) * (1 + second_order) - second_order
    return prefix * (1 if share_prefix else candidates) + (window + suffix) * candidates
