"""The policy at an iteration of a campaign: the base, that iteration's adapter on it, and the campaign's prompt.

Every step gets its policy here; no other file of `policy/` knows about campaigns. An iteration is always read from the
campaign, even where the base is in memory already: the next step never starts from weights that a step left behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.tensor_files import check_header
from layerloop.components.storage.campaign import BASE_COMMIT, Campaign
from layerloop.components.storage.final_weights import SAMPLING, final_weights
from layerloop.components.storage.folders import local_adapter, local_folder, node_copy
from layerloop.components.storage.manifests import read_file
from layerloop.components.storage.owners import scratch_folder

if TYPE_CHECKING:  # steps import this file before they know whether there is work that needs torch
    import torch

    from layerloop.components.policy.memory import Use
    from layerloop.components.policy.model import LayeredPolicy
    from layerloop.components.schema.recipe import Recipe
    from layerloop.components.schema.runtime import Runtime


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy with its identity in the campaign's records.

    `prompt` is `(T, E)` float32 on the CPU. `adapter_sha256` is of the adapter's weights file, None where the policy is
    the base (iteration 0 without `recipe.lora.start_from`). `base_fingerprint` is `LayeredPolicy.fingerprint`.
    """

    policy: LayeredPolicy
    prompt: torch.Tensor
    adapter_sha256: str | None
    base_fingerprint: str


def policy_at(
    campaign: Campaign,
    iteration: int,
    *,
    device: torch.device | str,
    sharded: bool = False,
    trainable: bool = False,
    delivered: bool = False,
    loaded: LoadedPolicy | None = None,
) -> LoadedPolicy:
    """The policy after `iteration`; 0 is the policy that the campaign starts with.

    Args:
        device: where the modules go.
        sharded: share one copy of the frozen base among the ranks of the process group (FSDP2); every rank has to call
            this, and then the policy, equally often.
        trainable: the adapter requires gradients, and iteration 0 has a new one where the campaign does not start from
            one; a new adapter leaves the base as it is. Otherwise all is frozen.
        delivered: the weights that are evaluated and published (the average, where the recipe keeps one) instead of
            those that sample next.
        loaded: a policy of this campaign that is in memory already, whatever its iteration. Its base is used and its
            adapter replaced, which takes as long as reading an adapter; do not use `loaded` itself afterwards.

    Raises:
        LayerloopError: the sources or the policy are not committed; the base cannot be loaded, or is not the one that
            the adapter was trained on; the adapter's bytes are not those that were committed, or do not fit the base;
            the prompt is of another model's width.
    """
    from layerloop.components.policy.lora import train_adapter

    manifest = campaign.policy(iteration)
    use: Use = "update" if trainable else "evaluation" if delivered else "sampling"
    policy = loaded.policy if loaded else _load_base(campaign, device="cpu" if sharded else device, use=use)
    _check_base(campaign, manifest, policy.fingerprint)
    prompt = _prompt_embedding(campaign, policy)
    sha256: str | None
    if iteration:
        sha256 = _apply_committed_adapter(campaign, manifest, policy, delivered=delivered)
    else:
        sha256 = _apply_initial_adapter(campaign, policy, trainable=trainable)
    train_adapter(policy.transformer, trainable)
    if sharded and not policy.sharded:
        from layerloop.components.policy.sharding import shard_base

        shard_base(policy, device)
    return LoadedPolicy(policy, prompt, sha256, policy.fingerprint)


def _load_base(campaign: Campaign, *, device: torch.device | str, use: Use) -> LayeredPolicy:
    """The recipe's base, of the commit that the first step resolved."""
    from layerloop.components.policy.model import LayeredPolicy

    recipe = campaign.recipe
    if resolved := campaign.sources().metadata.get(BASE_COMMIT):
        model = recipe.model.model_copy(update={"revision": str(resolved)})
        recipe = recipe.model_copy(update={"model": model})
    folder = folder_of_base(recipe, campaign.runtime, device=device, use=use)
    return LayeredPolicy.load(recipe.model, campaign.runtime.model, device=device, folder=folder)


def folder_of_base(recipe: Recipe, runtime: Runtime, *, device: torch.device | str, use: Use, remedy: str = "") -> Path:
    """The folder of a recipe's base, from a copy on the node where there is one.

    Raises:
        LayerloopError: it cannot be had, or `device` is a GPU with less free memory than the use takes; then with the
            `remedy`, by default that of a campaign's steps.
    """
    from layerloop.components.policy.base_files import base_files, base_folder

    model = recipe.model
    folder = local_folder(model.base) if "://" in model.base else base_folder(model)
    _check_gpu(recipe, runtime, folder, device, use, remedy)
    try:
        return node_copy(folder, base_files(folder))
    except LayerloopError as error:
        raise LayerloopError(f"recipe.model.base is {model.base}: {error}") from error.__cause__


def _check_gpu(
    recipe: Recipe, runtime: Runtime, folder: Path, device: torch.device | str, use: Use, remedy: str
) -> None:
    """Raises LayerloopError where `device` is a GPU with less free memory than the use takes."""
    import torch

    from layerloop.components.policy.base_files import read_json
    from layerloop.components.policy.memory import check_gpu, gpu_bytes
    from layerloop.components.policy.size import TransformerSize

    if torch.device(device).type != "cuda":
        return
    size = TransformerSize.of_config(read_json(folder / "transformer/config.json"))
    free, total = torch.cuda.mem_get_info(device)
    name = f"{device} ({torch.cuda.get_device_name(device)})"
    needed = gpu_bytes(size, recipe, runtime, use)
    check_gpu(needed, use=use, free=free, total=total, name=name, remedy=remedy)


def _check_base(campaign: Campaign, manifest: Manifest, fingerprint: str) -> None:
    """Raises LayerloopError where the adapter was trained on another base than this one."""
    recorded = manifest.metadata.get("base_fingerprint")
    if manifest.iteration and recorded != fingerprint:
        of = str(recorded)[:12] if recorded else "an unknown one"
        raise LayerloopError(
            f"base model {campaign.recipe.model.base} has fingerprint {fingerprint[:12]}, the adapter of iteration "
            f"{manifest.iteration} was trained on {of}: use the model that the campaign began with"
        )


def _prompt_embedding(campaign: Campaign, policy: LayeredPolicy) -> torch.Tensor:
    """The cached embedding of the recipe's prompt, `(T, E)` float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = campaign.sources().file("prompt.safetensors")
    where, data = f"{campaign.uri}/{file.name}", read_file(campaign.store, file)
    check_header(data, where=where)
    try:
        embeds = load(data)["prompt_embeds"]
    except (SafetensorError, KeyError) as error:
        raise LayerloopError(f"{where} holds no prompt_embeds ({error}): restore it") from None
    width = policy.transformer.config.joint_attention_dim
    if embeds.ndim != 2 or embeds.shape[1] != width:
        raise LayerloopError(
            f"{where} is {tuple(embeds.shape)}, the model takes tokens of width {width}: "
            "the campaign's sources were made with another model, begin a new campaign"
        )
    return embeds


def _apply_committed_adapter(campaign: Campaign, manifest: Manifest, policy: LayeredPolicy, *, delivered: bool) -> str:
    """Put a committed adapter on the base. Returns the sha256 of its weights, which the bytes are checked against."""
    from layerloop.components.policy.adapters import PEFT_CONFIG, PEFT_WEIGHTS, read_adapter
    from layerloop.components.policy.lora import replace_adapter

    weights = final_weights(manifest) if delivered else manifest.file(SAMPLING)
    where = f"{campaign.uri}/{weights.name}"
    with scratch_folder() as folder:
        for name, file in ((PEFT_WEIGHTS, weights), (PEFT_CONFIG, manifest.file(PEFT_CONFIG))):
            (folder / name).write_bytes(read_file(campaign.store, file))
        try:
            adapter = read_adapter(folder)
        except LayerloopError as error:  # a temporary path means nothing to the reader
            reason = str(error).replace(f"{folder}/", "")
            raise LayerloopError(f"{where} cannot be used as an adapter ({reason})") from error.__cause__
    replace_adapter(policy.transformer, adapter, where=where)
    return weights.sha256


def _apply_initial_adapter(campaign: Campaign, policy: LayeredPolicy, *, trainable: bool) -> str | None:
    """Put the campaign's initial adapter, if any, on the base. Returns the sha256 of the weights of `start_from`."""
    from layerloop.components.policy.adapters import weights_sha256
    from layerloop.components.policy.lora import new_adapter, remove_adapter, replace_adapter, starting_adapter

    recipe, adapter, sha256, where = campaign.recipe, None, None, "adapter"
    if recipe.lora.start_from is not None:
        folder = local_adapter(recipe.lora.start_from)
        adapter, sha256, where = (
            starting_adapter(policy.transformer, recipe.lora, folder),
            weights_sha256(folder),
            str(folder),
        )
    elif trainable:
        adapter = new_adapter(policy.transformer, recipe.lora, seed=recipe.seed)
    if adapter is None:
        remove_adapter(policy.transformer)
    else:
        replace_adapter(policy.transformer, adapter, where=where)
    return sha256
