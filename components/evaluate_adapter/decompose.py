"""Decompositions of the evaluation's cases, sampled exactly as at inference and kept in shards.

Ranks share the work batch by batch, with the same batches for any number of ranks, so a shard's bytes do not depend on
their number. As many shards are made at a time as there are ranks; a killed attempt loses no more than those.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from layerloop.components.evaluate_adapter.cases import Case, batches
from layerloop.components.layers.stack import Pixels
from layerloop.components.policy.inference import Inference, sample_layers
from layerloop.components.policy.sharding import dummy_forwards
from layerloop.components.runtime.distributed import broadcast_json, failing_together, gather_to_first, rank, world_size
from layerloop.components.runtime.progress import log, progress
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Shard
from layerloop.components.schema.messages import counted
from layerloop.components.storage.images import decode_png, encode_png
from layerloop.components.storage.shards import Sample, existing_shards, read_shard, write_shard

if TYPE_CHECKING:
    import torch

    from layerloop.components.policy.at import LoadedPolicy
    from layerloop.components.policy.model import LayeredPolicy
    from layerloop.components.storage.campaign import Campaign
    from layerloop.components.storage.stores import Store

CASES_PER_SHARD = 32  # per rank: the most that a killed attempt loses, and that is in memory at once
Chunk = Sequence[Case]  # the cases of one shard


@dataclass(frozen=True)
class Sampling:
    """How cases are decomposed; `blank_prompt` `(T, E)` is needed with guidance."""

    how: Inference
    blank_prompt: torch.Tensor | None = None


def case_chunks(cases: Sequence[Case]) -> list[Chunk]:
    """The cases of each shard."""
    return [cases[start : start + CASES_PER_SHARD] for start in range(0, len(cases), CASES_PER_SHARD)]


def decomposed(
    campaign: Campaign, loaded: LoadedPolicy, chunks: Sequence[Chunk], stem: str, *, model: str
) -> list[Shard]:
    """Shards of the cases' decompositions by the policy as it is, sampled as the campaign's evaluations are. As
    `decomposed_shards`."""
    return decomposed_shards(
        campaign.store,
        stem,
        loaded=loaded,
        chunks=chunks,
        sampling=Sampling(Inference(campaign.recipe.evaluation.steps)),
        batch_size=campaign.runtime.evaluation.batch_size,
        model=model,
    )


def base_shards(campaign: Campaign, loaded: LoadedPolicy, chunks: Sequence[Chunk]) -> list[Shard]:
    """Those of the policy without its adapter, which all evaluations of a campaign share."""
    with loaded.policy.without_adapter():
        stem = f"evaluations/base/decompositions-{loaded.base_fingerprint[:12]}"
        return decomposed(campaign, loaded, chunks, stem, model="base")


def decomposed_shards(
    store: Store,
    stem: str,
    *,
    loaded: LoadedPolicy,
    chunks: Sequence[Chunk],
    sampling: Sampling,
    batch_size: int,
    model: str,
) -> list[Shard]:
    """Shards `<stem>-000000-<hash>.tar` ... of the cases' decompositions, one per chunk; an earlier attempt's are kept.

    Every rank calls this and gets all shards; rank 0 writes them.

    Args:
        batch_size: cases in one forward pass.
        model: the weights' name, for the log and for errors.

    Raises:
        LayerloopError: the decoded layers are not finite, or a source is of a size that the model does not take.
    """
    names = [f"{stem}-{index:06d}.tar" for index in range(len(chunks))]
    kept = _existing_shards(store, dict(zip(names, chunks, strict=True)))
    todo = [(name, chunk) for name, chunk in zip(names, chunks, strict=True) if name not in kept]
    made: dict[str, Shard] = {}
    for start in range(0, len(todo), world_size()):
        part = todo[start : start + world_size()]
        work = [batch for _, chunk in part for batch in batches(chunk, batch_size)]
        samples = _sample_batches(loaded, work, sampling, model)
        with failing_together():
            for name, chunk in part if rank() == 0 else ():
                made[name] = write_shard(store, name, ((case.name, samples[case.name]) for case in chunk))
                log(f"{counted(len(chunk), 'decompositions')} with {model} stored")
    shards = _broadcast_shards({**kept, **made})
    return [shards[name] for name in names]


def _existing_shards(store: Store, chunks: Mapping[str, Chunk]) -> dict[str, Shard]:
    """Shards of an earlier attempt by name, as rank 0 finds them: every rank has to do the same work."""
    found: dict[str, Shard] = {}
    with failing_together():
        for name, chunk in chunks.items() if rank() == 0 else ():
            shard = next(existing_shards(store, name, [case.name for case in chunk]), None)
            if shard is not None:
                found[name] = shard
                log(f"{name}: {counted(len(chunk), 'decompositions')}, kept from an earlier attempt")
    return _broadcast_shards(found)


def _broadcast_shards(shards: Mapping[str, Shard]) -> dict[str, Shard]:
    """Rank 0's shards by name, on every rank."""
    received: Any = broadcast_json({name: shard.model_dump(mode="json") for name, shard in shards.items()})
    return {name: Shard.model_validate(shard) for name, shard in received.items()}


def _sample_batches(
    loaded: LoadedPolicy, work: Sequence[Sequence[Case]], sampling: Sampling, model: str
) -> dict[str, dict[str, bytes]]:
    """The members of every case's sample by case name, on rank 0. Each rank samples and encodes its share of the
    batches."""
    shares = balance([cost(batch) for batch in work], world_size())
    mine = [work[index] for index in shares[rank()]]
    # Ranks that share a sharded base wait for each other in its layers, and a fault of one has to end them all.
    sharded = loaded.policy.sharded
    missing_calls = max(map(len, shares)) - len(mine) if sharded else 0
    with nullcontext() if sharded else failing_together():
        sampled: Iterator[tuple[Case, Pixels]] = (
            pair
            for batch in mine
            for pair in decompose(loaded.policy, batch, loaded.prompt, sampling=sampling, model=model)
        )
        if rank() == 0:
            share = f", first of {world_size()} shares" if world_size() > 1 else ""
            what = f"decomposing with {model}{share}"
            sampled = progress(sampled, what=what, unit="images", total=sum(map(len, mine)))
        samples = dict(_encoded_sample(case, stack) for case, stack in sampled)
        dummy_forwards(loaded.policy, loaded.prompt, missing_calls * sampling.how.calls)
    return {name: members for part in gather_to_first(samples) for name, members in part.items()}


def cost(batch: Sequence[Case]) -> float:
    """Relative cost of a batch in tokens: pixels times frames (layers, composite and condition)."""
    layers, height, width = batch[0].geometry
    return float(len(batch) * (layers + 2) * height * width)


def balance(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Longest-processing-time-first: each item to the least loaded rank. Returns the items of each rank, in order."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for item in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        least = min(range(ranks), key=lambda index: (load[index], index))
        shares[least].append(item)
        load[least] += costs[item]
    return [sorted(share) for share in shares]


def decompose(
    policy: LayeredPolicy, batch: Sequence[Case], prompt_embeds: torch.Tensor, *, sampling: Sampling, model: str
) -> Iterator[tuple[Case, Pixels]]:
    """Each case of a batch of one geometry with its layers `(L, H, W, 4)` uint8, of an opaque condition. `model`
    names the weights in errors.

    Raises:
        LayerloopError: the decoded layers are not finite.
    """
    stacks = sample_layers(
        policy,
        np.stack([case.source for case in batch]),
        prompt_embeds,
        seeds=[case.seed for case in batch],
        layers=batch[0].layers,
        how=sampling.how,
        blank_prompt=sampling.blank_prompt,
    )
    for case, stack in zip(batch, stacks, strict=True):
        if stack is None:
            raise LayerloopError(
                f"{model} decodes image {case.key} into NaN: its weights have diverged, "
                "evaluate an earlier iteration or lower recipe.update.learning_rate"
            )
        yield case, stack


def read_decompositions(store: Store, shard: Shard, *, only: Set[str] | None = None) -> dict[str, Pixels]:
    """Layers `(L, H, W, 4)` by case name, of the cases in `only` where it is given."""
    found = {}
    for name, members in read_shard(store, shard, required=("json", "layer0.png")):
        if only is not None and name not in only:
            continue
        layers = json.loads(members["json"])["layers"]
        found[name] = np.stack([decode_png(members[f"layer{index}.png"]) for index in range(layers)])
    return found


def _encoded_sample(case: Case, stack: Pixels) -> Sample:
    record = {"image_key": case.key, "kind": case.kind, "layers": case.layers, "seed": case.seed}
    members = {f"layer{index}.png": encode_png(layer) for index, layer in enumerate(stack)}
    return case.name, {"json": json.dumps(record, sort_keys=True).encode(), **members}
