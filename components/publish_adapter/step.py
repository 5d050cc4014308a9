"""The step `publish_adapter`: the same weights in peft's and in diffusers' layout, each loaded back and proven equal to
the campaign's before it is committed, with a model card on their identity, training and evaluation.

    README.md                                the card
    pytorch_lora_weights.safetensors         diffusers' layout, float32: `pipeline.load_lora_weights(folder)`, ComfyUI
    pytorch_lora_weights.bf16.safetensors    the same in bfloat16
    peft/                                    peft's layout: `PeftModel.from_pretrained(transformer, folder + "/peft")`

What the manifest names lies in `publications/<name>/<hash>/` of the campaign; these are copies of that.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerloop.components.policy.at import LoadedPolicy, policy_at
from layerloop.components.runtime import ranks
from layerloop.components.runtime.contract import StepResult, step_main
from layerloop.components.runtime.distributed import failing_together, log_first, process_group, rank, shares_base
from layerloop.components.runtime.progress import log
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import File, Manifest
from layerloop.components.schema.steps import STEPS
from layerloop.components.storage.campaign import Campaign, check_publication_name
from layerloop.components.storage.final_weights import AVERAGE, final_weights
from layerloop.components.storage.lease import PUBLICATION, hold
from layerloop.components.storage.manifests import add_folder, place_files, read_file
from layerloop.components.storage.owners import scratch_folder
from layerloop.components.storage.stores import open_store

if TYPE_CHECKING:
    from layerloop.components.policy.adapters import Adapter
    from layerloop.components.publish_adapter.layouts import RoundTrip

CARD = "README.md"


def run(
    loaded: LoadedPolicy | None = None,
    *,
    campaign: str,
    publish_as: str = "",
    iteration: int | None = None,
    runtime: str = "",
) -> StepResult:
    """Publish one iteration's adapter under a name, as `published/<name>/`.

    Args:
        loaded: A policy of this campaign that is in memory already, of whatever iteration: its base is used.
        campaign: Root URI of the campaign.
        publish_as: Folder under `published/`: letters, digits, dot, dash and underscore; by default the campaign's
            folder and the iteration, so that every run of a campaign publishes under a name of its own.
        iteration: The iteration whose adapter to publish; by default the last committed one.
        runtime: Where and how fast to run: YAML or JSON text, or the path or URI of a file; empty for LAYERLOOP_RUNTIME
            and the defaults (`layerloop runtime`). It changes no result.

    Returns:
        On rank 0 the publication; on other ranks, which exist only where they share the base, nothing.

    Raises:
        LayerloopError: a name that is not a folder name, or that holds another adapter already; no adapter to publish;
            a base that the adapter was not trained on; a file that is not the campaign's adapter when its library
            loads it back. Nothing is committed then.
    """
    if publish_as:
        check_publication_name(publish_as)
    opened = Campaign.open(campaign, runtime)
    current = opened.head() if iteration is None else iteration
    if current < 1:
        raise LayerloopError(f"campaign {opened.uri} has no adapter to publish (iteration {current}): train it first")
    name = publish_as or opened.publication_name(current)
    folder = opened.published_dir(name)
    done = opened.already_committed(folder, log=log_first)
    with hold(opened.store, PUBLICATION, log=log):
        if done is None:
            done = opened.already_committed(folder, log=log_first)  # by the run that held it until now
        if done is not None:
            _check_same(opened, done, current)
        elif (done := _publish(opened, name, current, loaded)) is None:
            return StepResult()
        if rank() == 0:
            place_files(opened.store, done, folder)
    return _result(opened, done)


def _publish(opened: Campaign, name: str, current: int, loaded: LoadedPolicy | None) -> Manifest | None:
    """Publish an iteration under a name; None on other ranks than the first. Raises as `run`."""
    with process_group() as device, scratch_folder() as temporary:
        with failing_together():
            sharded = shares_base(opened.runtime.model)
            loaded = policy_at(opened, current, device=device, sharded=sharded, delivered=True, loaded=loaded)
        layouts = _write_and_verify(opened, loaded, temporary)
        if rank() != 0:
            return None
        round_trip = layouts.round_trip
        log(
            f"{name}: loaded back by peft and by diffusers, every layer, scale and weight is the campaign's; "
            f"velocities differ by {round_trip.peft:.2g} and {round_trip.diffusers:.2g}, where rounding alone makes "
            f"{round_trip.noise:.2g} and the adapter {round_trip.effect:.2g}"
        )
        return _commit(opened, name, current, loaded, layouts)


@dataclass(frozen=True)
class VerifiedLayouts:
    """Both layouts of an adapter, in a local folder, and the result of loading them back."""

    adapter: Adapter
    root: Path
    paths: list[Path]  # relative to `root`
    round_trip: RoundTrip


def _write_and_verify(campaign: Campaign, loaded: LoadedPolicy, root: Path) -> VerifiedLayouts:
    """Write both layouts and load them back; the policy is the base alone afterwards."""
    from layerloop.components.policy.lora import adapter_of, remove_adapter
    from layerloop.components.publish_adapter.layouts import publish_files, verify_round_trip
    from layerloop.components.publish_adapter.names import hub_name

    adapter = adapter_of(loaded.policy.transformer)
    remove_adapter(loaded.policy.transformer)
    paths = publish_files(adapter, root, policy=loaded.policy, base=hub_name(campaign.recipe.model.base))
    return VerifiedLayouts(
        adapter, root, paths, verify_round_trip(adapter, root, policy=loaded.policy, prompt_embeds=loaded.prompt)
    )


def _commit(campaign: Campaign, name: str, iteration: int, loaded: LoadedPolicy, layouts: VerifiedLayouts) -> Manifest:
    """Write the layouts and the card, then the manifest that makes them count."""
    folder, policy = campaign.published_dir(name), campaign.policy(iteration)
    card = _card(campaign, name, policy, layouts.adapter, layouts.round_trip, layouts.root)
    content = {path.as_posix(): layouts.root / path for path in layouts.paths}
    files = add_folder(campaign.store, campaign.publication_dir(name), {**content, CARD: card})
    manifest = Manifest(
        kind="published",
        iteration=iteration,
        files=files,
        counts={"adapter_parameters": layouts.adapter.parameters, "bytes": sum(file.bytes for file in files)},
        metadata={
            "name": name,
            "source_sha256": loaded.adapter_sha256,
            "averaged": _averaged(final_weights(policy)),
            "base": campaign.recipe.model.base,
            "base_fingerprint": loaded.base_fingerprint,
            "adapter_effect": layouts.round_trip.effect,
            "difference_peft": layouts.round_trip.peft,
            "difference_diffusers": layouts.round_trip.diffusers,
            "difference_bfloat16": layouts.round_trip.bfloat16,
            "rounding_noise": layouts.round_trip.noise,
        },
    )
    return campaign.commit(folder, manifest)


def _averaged(weights: File) -> bool:
    return weights.base_name == AVERAGE


def _check_same(campaign: Campaign, done: Manifest, iteration: int) -> None:
    """Raises LayerloopError where the publication does not hold the weights of this iteration."""
    source = final_weights(campaign.policy(iteration))
    if (done.iteration, done.metadata.get("source_sha256")) != (iteration, source.sha256):
        raise LayerloopError(
            f"{campaign.uri}/{campaign.published_dir(str(done.metadata.get('name')))} already holds the adapter of "
            f"iteration {done.iteration}, not of {iteration}: choose another publish_as"
        )


def _card(
    campaign: Campaign, name: str, policy: Manifest, adapter: Adapter, round_trip: RoundTrip, root: Path
) -> bytes:
    from layerloop.components.policy.adapters import weights_sha256
    from layerloop.components.publish_adapter.card import Publication, model_card

    iteration = policy.iteration or 0
    evaluation = campaign.find(campaign.evaluation_dir(f"iteration-{iteration:06d}"))
    samplers = campaign.find(campaign.evaluation_dir(f"samplers-{iteration:06d}"))
    scores = [campaign.find(campaign.scores_dir(earlier)) for earlier in range(1, iteration + 1)]
    publication = Publication(
        name=name,
        recipe=campaign.recipe,
        iteration=iteration,
        policy=policy,
        first=campaign.policy(1),
        averaged=_averaged(final_weights(policy)),
        parameters=adapter.parameters,
        sha256=weights_sha256(root / "peft"),
        scores=[manifest for manifest in scores if manifest is not None],
        evaluation=json.loads(read_file(campaign.store, evaluation.file("metrics.json"))) if evaluation else None,
        samplers=json.loads(read_file(campaign.store, samplers.file("samplers.json"))) if samplers else None,
        verification=_verification(round_trip, campaign.recipe.model.dtype),
    )
    return model_card(publication).encode()


def _verification(found: RoundTrip, dtype: str) -> str:
    return (
        "Before it was published each file was loaded back by its library: every adapted layer, scale and weight is "
        "the training run's, exactly (in the bfloat16 file: exactly its rounding). "
        f"Velocities in {dtype} differ from the training run's by "
        f"{found.peft:.2g} (peft), {found.diffusers:.2g} (diffusers) and {found.bfloat16:.2g} (the bfloat16 file); two "
        f"equal forms of the training run's own arithmetic differ by {found.noise:.2g}, and the adapter changes them "
        f"by {found.effect:.2g} (root mean squares)."
    )


def _result(campaign: Campaign, manifest: Manifest) -> StepResult:
    numbers = {**manifest.counts, **manifest.metadata}
    return StepResult(
        manifests={"adapter": manifest},
        files={"card": read_file(campaign.store, manifest.file(CARD))},
        metrics={k: float(v) for k, v in numbers.items() if isinstance(v, int | float)},
        parameters={"published": f"{campaign.uri}/{campaign.published_dir(str(manifest.metadata['name']))}"},
    )


def _launch_if_shared(module: str, argv: Sequence[str], arguments: Mapping[str, Any]) -> int | None:
    """Several processes only where they share a base that one GPU cannot hold: there is no other work to share."""
    sharded = Campaign.open(arguments["campaign"], arguments.get("runtime") or "").runtime.model.fsdp
    return ranks.launch_per_gpu(module, argv, arguments) if sharded else None


main = functools.partial(step_main, run, step=STEPS["publish_adapter"], launch=_launch_if_shared, store=open_store)

if __name__ == "__main__":
    raise SystemExit(main())
