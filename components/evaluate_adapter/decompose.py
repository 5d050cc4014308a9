"""Decompositions of the evaluation's cases, sampled exactly as at inference and kept in shards."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from layerloop.components.evaluate_adapter.cases import Case, batches
from layerloop.components.layers.stack import Pixels
from layerloop.components.policy.sampling import Plan, deterministic
from layerloop.components.runtime.progress import progress
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.images import decode_png, encode_png
from layerloop.components.storage.shards import Sample, existing_shard, read_shard, write_shard

if TYPE_CHECKING:
    from layerloop.components.policy.model import LayeredPolicy
    from layerloop.components.schema.manifest import Shard
    from layerloop.components.storage.stores import Store


@torch.no_grad()
def decompose(
    policy: LayeredPolicy,
    cases: Sequence[Case],
    prompt_embeds: torch.Tensor,
    *,
    steps: int,
    batch_size: int,
    model: str,
) -> Iterator[tuple[Case, Pixels]]:
    """Each case with its layers `(L, H, W, 4)` uint8: `steps` Heun steps, no guidance, opaque condition.

    These are the released model's inference settings; with others its authors call the results garbled. `model` names
    the weights in errors.

    Raises:
        LayerloopError: the decoded layers are not finite.
    """
    for batch in batches(cases, batch_size):
        layers, height, width = batch[0].geometry
        condition = policy.encode(np.stack([case.source for case in batch]), prompt_embeds)
        noise = torch.cat([policy.noise(case.seed, layers, height, width) for case in batch]).to(policy.device)
        plan = Plan(sigmas=policy.sigmas(steps, height, width), outside="heun")
        velocity = functools.partial(policy.velocity, condition=condition)
        final = deterministic(noise, velocity, plan, range(plan.steps))
        pixels = policy.decode(final, height, width)
        for case, latents, decoded in zip(batch, final, pixels, strict=True):
            if not (torch.isfinite(latents).all() and torch.isfinite(decoded).all()):
                raise LayerloopError(
                    f"{model} decodes image {case.key} into NaN: its weights have diverged, "
                    "evaluate an earlier iteration or lower recipe.update.learning_rate"
                )
            yield case, (decoded * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def evaluations_per_sample(steps: int) -> int:
    """Calls of the model for one decomposition: two a Heun step, one for the last."""
    return 2 * steps - 1


def decomposed_shard(
    store: Store,
    name: str,
    policy: LayeredPolicy,
    cases: Sequence[Case],
    prompt_embeds: torch.Tensor,
    *,
    steps: int,
    batch_size: int,
    model: str,
) -> tuple[Shard, bool]:
    """The shard of these cases' decompositions, and whether it had to be sampled: an earlier attempt's is kept."""
    kept = existing_shard(store, name, [case.name for case in cases])
    if kept is not None:
        return kept, False
    found: Iterable[tuple[Case, Pixels]] = decompose(
        policy, cases, prompt_embeds, steps=steps, batch_size=batch_size, model=model
    )
    found = progress(found, what=f"decomposing by {model}", unit="pictures", total=len(cases))
    return write_shard(store, name, (_sample(case, stack) for case, stack in found)), True


def read_decompositions(store: Store, shard: Shard) -> dict[str, Pixels]:
    """Layers `(L, H, W, 4)` by case name."""
    found = {}
    for name, members in read_shard(store, shard, required=("json", "layer0.png")):
        layers = json.loads(members["json"])["layers"]
        found[name] = np.stack([decode_png(members[f"layer{index}.png"]) for index in range(layers)])
    return found


def _sample(case: Case, stack: Pixels) -> Sample:
    record = {"image_key": case.key, "kind": case.kind, "layers": case.layers, "seed": case.seed}
    members = {f"layer{index}.png": encode_png(layer) for index, layer in enumerate(stack)}
    return case.name, {"json": json.dumps(record, sort_keys=True).encode(), **members}
