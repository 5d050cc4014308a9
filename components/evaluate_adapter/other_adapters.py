"""Adapters from elsewhere on a campaign's cases: sampled on the campaign's base as its own adapters are, measured the
same way. What is sampled stays in the campaign, so a comparison that is made again samples nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from layerloop.components.evaluate_adapter.assess import Row
from layerloop.components.evaluate_adapter.cases import Cases
from layerloop.components.evaluate_adapter.measuring import Measuring
from layerloop.components.evaluate_adapter.systems import BASE
from layerloop.components.runtime.distributed import process_group
from layerloop.components.runtime.progress import log
from layerloop.components.schema.manifest import Manifest
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.folders import hub_uri, local_adapter
from layerloop.components.storage.lease import EVALUATION, hold
from layerloop.components.storage.stores import open_store

_WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # of peft and of diffusers


def is_adapter(uri: str) -> bool:
    """Whether it is a folder, a file or a URI with an adapter's weights, or an id of the hub."""
    if hub_uri(uri) is not None or uri.endswith(".safetensors"):
        return True
    if "://" in uri:
        return any(name.endswith(_WEIGHTS) and name.count("/") <= 1 for name in open_store(uri).list())
    return any(next(Path(uri).glob(f"{inner}{name}"), None) for inner in ("", "*/") for name in _WEIGHTS)


def sample_adapters(campaign: Campaign, cases: Cases, adapters: Mapping[str, str]) -> dict[str, list[Row]]:
    """The rows of every adapter by its name, and those of the base by `BASE`.

    Args:
        adapters: by name, where each is (`is_adapter`).

    Raises:
        LayerloopError: one cannot be read, is not for the campaign's base, or decodes into NaN.
    """
    from layerloop.components.evaluate_adapter.decompose import base_shards, case_chunks, decomposed
    from layerloop.components.policy.adapters import read_adapter, weights_sha256
    from layerloop.components.policy.at import policy_at
    from layerloop.components.policy.lora import replace_adapter, train_adapter

    folders = {name: _folder(uri) for name, uri in adapters.items()}
    read = {name: read_adapter(folder) for name, folder in folders.items()}  # refused before the base is loaded
    chunks = case_chunks(cases.cases)
    with process_group() as device, hold(campaign.store, EVALUATION, log=log):
        loaded = policy_at(campaign, 0, device=device, delivered=True)
        shards = {BASE: base_shards(campaign, loaded, chunks)}
        for name, adapter in read.items():
            replace_adapter(loaded.policy.transformer, adapter, where=adapters[name])
            train_adapter(loaded.policy.transformer, False)
            sha256 = weights_sha256(folders[name])
            folder = campaign.evaluation_dir(f"adapter-{sha256[:12]}-{loaded.base_fingerprint[:12]}")
            shards[name] = decomposed(campaign, loaded, chunks, f"{folder}/decompositions", model=name)
            if campaign.find(folder) is None:  # else `campaign verify --repair` would remove them
                manifest = Manifest(
                    kind="evaluation",
                    shards=(*shards[BASE], *shards[name]),
                    counts={"images": len(cases.cases)},
                    metadata={"base_fingerprint": loaded.base_fingerprint, "adapter_sha256": sha256},
                )
                campaign.commit(folder, manifest)
    with Measuring(campaign.recipe.evaluation.max_edits, cases=len(cases.cases)) as measuring:
        return {name: measuring.shards(campaign.store, chunks, some, model=name) for name, some in shards.items()}


def _folder(uri: str) -> Path:
    hub = hub_uri(uri)
    return local_adapter(hub or uri) if hub is not None or "://" in uri else Path(uri)
