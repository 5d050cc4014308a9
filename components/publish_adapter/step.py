"""Publish an adapter: the same weights in peft's and in diffusers' layout, each loaded back and compared before it is
committed, with a model card that says what they are, how they came to be and what was measured.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerloop.components.policy.at import LoadedPolicy, policy_at
from layerloop.components.runtime import ranks
from layerloop.components.runtime.contract import StepResult, step_main
from layerloop.components.runtime.distributed import failing_together, process_group, rank, shares_base
from layerloop.components.runtime.progress import log
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import File, Manifest
from layerloop.components.storage.campaign import MANIFEST, Campaign, check_publication_name
from layerloop.components.storage.delivered import delivered_weights
from layerloop.components.storage.manifests import add_file, already_committed, commit, read_file
from layerloop.components.storage.stores import open_store

if TYPE_CHECKING:
    from layerloop.components.policy.adapters import Adapter
    from layerloop.components.publish_adapter.layouts import Proof

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
        publish_as: Folder under `published/`: letters, digits, dot, dash and underscore; by default the recipe's name
            and the iteration, so that every run of a campaign publishes under a name of its own.
        iteration: Which iteration's adapter; by default the last committed one.
        runtime: Where and how fast to run: YAML or JSON text, or the path or URI of a file; empty for LAYERLOOP_RUNTIME
            and the defaults (`layerloop runtime`). It changes no result.

    Returns:
        On rank 0 the publication; on other ranks, of which there are some only where they share the base, nothing.

    Raises:
        LayerloopError: a name that is no folder name, or that holds another adapter already; no adapter to publish; a
            base that the adapter was not trained on; a layout that does not give the campaign's output when it is
            loaded back. Nothing is committed then.
    """
    if publish_as:
        check_publication_name(publish_as)
    place = Campaign.open(campaign, runtime)
    number = place.head() if iteration is None else iteration
    if number < 1:
        raise LayerloopError(f"campaign {place.uri} has no adapter to publish (iteration {number}): train it first")
    name = publish_as or f"{place.recipe.name}-{number:06d}"
    folder = place.published_dir(name)
    if (done := already_committed(place.store, f"{folder}/{MANIFEST}", log=log)) is not None:
        _check_same(place, done, number)
        return _result(place, done)

    with process_group() as device, tempfile.TemporaryDirectory() as temporary:
        with failing_together():
            sharded = shares_base(place.runtime.model)
            here = policy_at(place, number, device=device, sharded=sharded, delivered=True, loaded=loaded)
        made = _make(place, here, Path(temporary))
        if rank() != 0:
            return StepResult()
        log(
            f"{name}: both layouts give the campaign's output, differences {made.proof.peft:g} and "
            f"{made.proof.diffusers:g}"
        )
        return _result(place, _commit(place, name, number, here, made))


@dataclass(frozen=True)
class Made:
    """Both layouts of an adapter, in a local folder, and the proof that they work."""

    adapter: Adapter
    root: Path
    paths: list[Path]  # relative to `root`
    proof: Proof


def _make(place: Campaign, here: LoadedPolicy, root: Path) -> Made:
    """Write both layouts and load them back; the policy is the base alone afterwards."""
    from layerloop.components.policy.lora import adapter_of, remove_adapter
    from layerloop.components.publish_adapter.layouts import prove, write_layouts

    adapter = adapter_of(here.policy.transformer)
    remove_adapter(here.policy.transformer)
    paths = write_layouts(adapter, root, policy=here.policy, base=place.recipe.model.base)
    return Made(adapter, root, paths, prove(adapter, root, policy=here.policy, prompt_embeds=here.prompt))


def _commit(place: Campaign, name: str, iteration: int, here: LoadedPolicy, made: Made) -> Manifest:
    """Write the layouts and the card, then the manifest that makes them count."""
    folder, policy = place.published_dir(name), place.policy(iteration)
    card = _card(place, name, policy, made.adapter, made.proof, made.root)
    files = tuple(add_file(place.store, f"{folder}/{path.as_posix()}", made.root / path) for path in made.paths)
    files += (add_file(place.store, f"{folder}/{CARD}", card),)
    manifest = Manifest(
        kind="published",
        iteration=iteration,
        files=files,
        counts={"adapter_parameters": made.adapter.parameters, "bytes": sum(file.bytes for file in files)},
        metadata={
            "name": name,
            "source_sha256": here.adapter_sha256,
            "averaged": _averaged(delivered_weights(policy)),
            "base": place.recipe.model.base,
            "base_fingerprint": here.base_fingerprint,
            "adapter_effect": made.proof.effect,
            "difference_peft": made.proof.peft,
            "difference_diffusers": made.proof.diffusers,
        },
    )
    return commit(place.store, f"{folder}/{MANIFEST}", manifest)


def _averaged(weights: File) -> bool:
    return not weights.name.endswith("/adapter_model.safetensors")


def _check_same(place: Campaign, done: Manifest, iteration: int) -> None:
    """Raises LayerloopError where the publication is not of the very weights of this iteration."""
    source = delivered_weights(place.policy(iteration))
    if (done.iteration, done.metadata.get("source_sha256")) != (iteration, source.sha256):
        raise LayerloopError(
            f"{place.uri}/{place.published_dir(str(done.metadata.get('name')))} already holds the adapter of iteration "
            f"{done.iteration}, not of {iteration}: choose another publish_as"
        )


def _card(place: Campaign, name: str, policy: Manifest, adapter: Adapter, proof: Proof, root: Path) -> bytes:
    from layerloop.components.policy.adapters import weights_sha256
    from layerloop.components.publish_adapter.card import Publication, model_card

    number = policy.iteration or 0
    evaluation = place.find(place.evaluation_dir(f"iteration-{number:06d}"))
    scores = [place.find(place.scores_dir(k)) for k in range(1, number + 1)]
    if proof.peft == proof.diffusers == 0:
        shown = "bit for bit"
    else:
        shown = (
            f"to {max(proof.peft, proof.diffusers):.2g} of a velocity that the adapter changes by {proof.effect:.2g} "
            f"(root mean squares, in {place.recipe.model.dtype})"
        )
    publication = Publication(
        name=name,
        recipe=place.recipe,
        iteration=number,
        policy=policy,
        first=place.policy(1),
        averaged=_averaged(delivered_weights(policy)),
        parameters=adapter.parameters,
        sha256=weights_sha256(root / "peft"),
        scores=[manifest for manifest in scores if manifest is not None],
        evaluation=json.loads(read_file(place.store, evaluation.file("metrics.json"))) if evaluation else None,
        proof=f"Before it was published each layout was loaded back and gave the training run's own output, {shown}.",
    )
    return model_card(publication).encode()


def _result(place: Campaign, manifest: Manifest) -> StepResult:
    numbers = {**manifest.counts, **manifest.metadata}
    return StepResult(
        manifests={"adapter": manifest},
        files={"card": read_file(place.store, manifest.file(CARD))},
        metrics={k: float(v) for k, v in numbers.items() if isinstance(v, int | float)},
        parameters={"published": f"{place.uri}/{place.published_dir(str(manifest.metadata['name']))}"},
    )


def _spread(module: str, argv: Sequence[str], arguments: Mapping[str, Any]) -> int | None:
    """Several processes only where they share a base that one GPU does not hold: there is nothing else to share out."""
    sharded = Campaign.open(arguments["campaign"], arguments.get("runtime") or "").runtime.model.fsdp
    return ranks.spread(module, argv, arguments) if sharded else None


main = functools.partial(step_main, run, iteration_from="policy", iteration_offset=0, spread=_spread, store=open_store)

if __name__ == "__main__":
    raise SystemExit(main())
