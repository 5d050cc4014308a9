"""Base and adapter over the samplers that people use: with which of them the adapter keeps what was measured.

The released model's authors call anything but Heun's method with 50 steps garbled, and no program that its users have
offers that. Every setting decomposes the same images from the same noise, so all differences are paired.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layerloop.components.evaluate_adapter.assess import Row
from layerloop.components.evaluate_adapter.cases import Case, Cases
from layerloop.components.evaluate_adapter.measuring import Measuring
from layerloop.components.evaluate_adapter.statistics import FEWEST, Comparison, compare
from layerloop.components.layers.columns import better_of, quoted, title_of
from layerloop.components.runtime.distributed import failing_together, rank
from layerloop.components.runtime.progress import log
from layerloop.components.schema.inference import COMPARED, COMPARED_CASES, REFERENCE, Inference
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.seeds import seed_for
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.folders import local_folder
from layerloop.components.storage.manifests import add_file, read_file

if TYPE_CHECKING:
    import torch

    from layerloop.components.policy.at import LoadedPolicy
    from layerloop.components.schema.manifest import Shard

TABLE = "samplers.json"
MODELS = ("base", "adapter")

Shards = Mapping[tuple[Inference, str], "list[Shard]"]  # by setting and model


def samplers_dir(campaign: Campaign, iteration: int) -> str:
    """Folder of an iteration's comparison."""
    return campaign.evaluation_dir(f"samplers-{iteration:06d}")


def chosen_cases(cases: Cases) -> tuple[Case, ...]:
    """At most `COMPARED_CASES` of each kind, evenly over the layer counts, in the order of `cases`."""
    names = set()
    for kind, most in COMPARED_CASES.items():
        by_count: dict[int, list[Case]] = {}
        for case in cases.of(kind):
            by_count.setdefault(case.layers, []).append(case)
        ranked = sorted(
            ((index, count, case.name) for count, some in by_count.items() for index, case in enumerate(some))
        )
        names |= {name for _, _, name in ranked[:most]}
    return tuple(case for case in cases.cases if case.name in names)


def sample_settings(
    campaign: Campaign, iteration: int, cases: Sequence[Case], loaded: LoadedPolicy
) -> dict[tuple[Inference, str], list[Shard]]:
    """Decompositions of both models by every setting; on all ranks. What an earlier attempt made is kept."""
    from layerloop.components.evaluate_adapter.decompose import Sampling, decomposed_shards

    blank = _blank_prompt(campaign, iteration, loaded)
    found: dict[tuple[Inference, str], list[Shard]] = {}
    for setting in COMPARED:
        sample = functools.partial(
            decomposed_shards,
            campaign.store,
            loaded=loaded,
            chunks=[cases],
            sampling=Sampling(setting, blank),
            batch_size=campaign.runtime.evaluation.batch_size,
        )
        with loaded.policy.without_adapter():
            stem = f"evaluations/base/{setting.name}-{loaded.base_fingerprint[:12]}"
            found[setting, "base"] = sample(stem, model=f"base, {setting.name}")
        stem = f"{samplers_dir(campaign, iteration)}/{setting.name}-{str(loaded.adapter_sha256)[:12]}"
        found[setting, "adapter"] = sample(stem, model=f"adapter, {setting.name}")
    return found


def _blank_prompt(campaign: Campaign, iteration: int, loaded: LoadedPolicy) -> torch.Tensor:
    """`(T, E)` of the prompt " ", against which guidance is; the text encoder is loaded on rank 0, once."""
    from safetensors.torch import load, save

    from layerloop.components.policy.prompt import embed_prompt

    name = f"{samplers_dir(campaign, iteration)}/blank-prompt-{loaded.base_fingerprint[:12]}.safetensors"
    with failing_together():
        if rank() == 0 and not campaign.store.exists(name):
            model = campaign.recipe.model.model_copy(update={"prompt": " "})
            log(f"embedding the blank prompt with {model.base}, for guidance")
            folder = local_folder(model.base) if "://" in model.base else None
            campaign.store.write(name, save({"prompt_embeds": embed_prompt(model, folder=folder)}))
    return load(campaign.store.read(name))["prompt_embeds"]


def commit_samplers(
    campaign: Campaign, iteration: int, cases: Sequence[Case], shards: Shards, loaded: LoadedPolicy
) -> Manifest:
    """Measure what was sampled and commit the table; on rank 0."""
    with Measuring(0, cases=len(cases) * len(shards)) as measuring:
        rows = {
            (how, model): measuring.shards(campaign.store, [cases], some, model=f"{model}, {how.name}")
            for (how, model), some in shards.items()
        }
    document = sampler_table(rows, seed=campaign.recipe.seed)
    document |= {"adapter_sha256": loaded.adapter_sha256, "iteration": iteration}
    folder = samplers_dir(campaign, iteration)
    data = (json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    manifest = Manifest(
        kind="evaluation",
        iteration=iteration,
        shards=tuple(shard for some in shards.values() for shard in some),
        files=(add_file(campaign.store, f"{folder}/{TABLE}", data),),
        counts={"images": len(cases), "settings": len(COMPARED)},
        metadata={"base_fingerprint": loaded.base_fingerprint, "adapter_sha256": loaded.adapter_sha256},
    )
    return campaign.commit(folder, manifest)


def read_table(campaign: Campaign, iteration: int) -> dict[str, Any] | None:
    """The committed table of an iteration, or None."""
    manifest = campaign.find(samplers_dir(campaign, iteration))
    if manifest is None:
        return None
    document: dict[str, Any] = json.loads(read_file(campaign.store, manifest.file(TABLE)))
    return document


def sampler_table(rows: Mapping[tuple[Inference, str], Sequence[Row]], *, seed: int) -> dict[str, Any]:
    """`{"settings": [...], "reference": ..., "images", "fewest"}` of the rows of the same cases by setting and model.

    A setting has `measures`, base and adapter by it, and `kept`, the adapter by `REFERENCE` (as `base`) and by it. It
    is `safe` where no interval of either says worse; null with fewer than `FEWEST` images.
    """

    def comparisons(first: Sequence[Row], second: Sequence[Row], *what: object) -> dict[str, Comparison]:
        found = {}
        for column in quoted("nightly"):
            comparison = compare(
                [row.get(column) for row in first],
                [row.get(column) for row in second],
                seed=seed_for(seed, "sign flips", "samplers", column, *map(str, what)),
            )
            if comparison.n:
                found[column] = comparison
        return found

    settings = []
    for setting in COMPARED:
        adapter = rows[setting, "adapter"]
        measures = comparisons(rows[setting, "base"], adapter, setting.name, "base")
        kept = comparisons(rows[REFERENCE, "adapter"], adapter, setting.name, "kept")
        worse = [name for table in (measures, kept) for name, c in table.items() if _is_worse(name, c)]
        settings.append(
            {
                "sampler": setting.sampler,
                "steps": setting.steps,
                "guidance": setting.guidance,
                "measures": {name: _cell(name, c) for name, c in measures.items()},
                "kept": {name: _cell(name, c) for name, c in kept.items()},
                "safe": None if len(adapter) < FEWEST else not worse,
            }
        )
    return {
        "settings": settings,
        "reference": {"sampler": REFERENCE.sampler, "steps": REFERENCE.steps, "guidance": REFERENCE.guidance},
        "images": len(rows[REFERENCE, "adapter"]),
        "fewest": FEWEST,
    }


def _cell(column: str, comparison: Comparison) -> dict[str, Any]:
    return {
        **comparison.as_json(), "title": title_of(column), "better": better_of(column), "clear": comparison.clear,
    }  # fmt: skip


def _is_worse(column: str, c: Comparison) -> bool:
    if not c.clear or c.difference is None:
        return False
    return c.difference > 0 if better_of(column) == "lower" else c.difference < 0
