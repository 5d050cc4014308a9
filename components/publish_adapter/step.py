"""Publish an adapter: the same weights in peft's and in diffusers' layout, each loaded back and compared before it is
committed, with a model card that says what they are, how they came to be and what was measured.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from layerloop.components.runtime.contract import StepResult, step_main
from layerloop.components.runtime.distributed import device
from layerloop.components.runtime.progress import log
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import File, Manifest
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.delivered import delivered_weights
from layerloop.components.storage.folders import local_folder
from layerloop.components.storage.manifests import add_file, commit, read_file, verify
from layerloop.components.storage.stores import open_store

if TYPE_CHECKING:
    import torch

    from layerloop.components.policy.adapters import Adapter
    from layerloop.components.publish_adapter.layouts import Proof

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
CARD = "README.md"


def run(*, campaign: str, publish_as: str = "", iteration: int | None = None) -> StepResult:
    """Publish one iteration's adapter under a name, as `published/<name>/`.

    Args:
        campaign: Root URI of the campaign.
        publish_as: Folder under `published/`: letters, digits, dot, dash and underscore; by default the recipe's name
            and the iteration, so that every run of a campaign publishes under a name of its own.
        iteration: Which iteration's adapter; by default the last committed one.

    Raises:
        LayerloopError: a name that is no folder name, or that holds another adapter already; no adapter to publish; a
            layout that does not give the campaign's output when it is loaded back. Nothing is committed then.
    """
    if publish_as and not NAME.fullmatch(publish_as):
        raise LayerloopError(
            f"publish_as is {publish_as!r}: give 1 to 96 letters, digits, dots, dashes or underscores, not beginning "
            "with a sign"
        )
    place = Campaign.open(campaign)
    number = place.head() if iteration is None else iteration
    if number < 1:
        raise LayerloopError(f"campaign {place.uri} has no adapter to publish (iteration {number}): train it first")
    name = publish_as or f"{place.recipe.name}-{number:06d}"
    policy_manifest = place.policy(number)
    source = delivered_weights(policy_manifest)
    folder = place.published_dir(name)
    if (done := place.find(folder)) is not None:
        return _already(place, done, name, number, source.sha256)

    from layerloop.components.policy.model import LayeredPolicy
    from layerloop.components.publish_adapter.layouts import prove, write_layouts

    recipe = place.recipe
    local = local_folder(recipe.model.base) if "://" in recipe.model.base else None
    policy = LayeredPolicy.load(recipe.model, device=device(), folder=local)
    if policy.fingerprint != policy_manifest.metadata.get("base_fingerprint"):
        raise LayerloopError(
            f"base model {recipe.model.base} has fingerprint {policy.fingerprint[:12]}, the adapter was trained on "
            f"{str(policy_manifest.metadata.get('base_fingerprint'))[:12]}: use the model that the campaign began with"
        )
    adapter = campaign_adapter(place, policy_manifest)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        paths = write_layouts(adapter, root, policy=policy, base=recipe.model.base)
        proof = prove(adapter, root, policy=policy, prompt_embeds=_prompt_embeds(place))
        log(f"{name}: both layouts give the campaign's output, differences {proof.peft:g} and {proof.diffusers:g}")
        card = _card(place, name, policy_manifest, adapter, proof, root)
        files = tuple(add_file(place.store, f"{folder}/{path.as_posix()}", root / path) for path in paths)
    files += (add_file(place.store, f"{folder}/{CARD}", card),)
    manifest = Manifest(
        kind="published",
        iteration=number,
        files=files,
        counts={"adapter_parameters": adapter.parameters, "bytes": sum(file.bytes for file in files)},
        metadata={
            "name": name,
            "source_sha256": source.sha256,
            "averaged": _averaged(source),
            "base": recipe.model.base,
            "base_fingerprint": policy.fingerprint,
            "adapter_effect": proof.effect,
            "difference_peft": proof.peft,
            "difference_diffusers": proof.diffusers,
        },
    )
    return _result(place, commit(place.store, f"{folder}/{MANIFEST}", manifest))


def campaign_adapter(place: Campaign, policy: Manifest) -> Adapter:
    """The adapter of a policy as users should have it: averaged, where the recipe keeps an average."""
    from layerloop.components.policy.adapters import read_adapter

    with tempfile.TemporaryDirectory() as folder:
        for name, stored in (
            ("adapter_model.safetensors", delivered_weights(policy)),
            ("adapter_config.json", policy.file("adapter_config.json")),
        ):
            (Path(folder) / name).write_bytes(read_file(place.store, stored))
        return read_adapter(folder)


def _averaged(weights: File) -> bool:
    return not weights.name.endswith("/adapter_model.safetensors")


def _already(place: Campaign, done: Manifest, name: str, iteration: int, sha256: str) -> StepResult:
    """The publication of that name, if it is of these very weights."""
    if (done.iteration, done.metadata.get("source_sha256")) != (iteration, sha256):
        raise LayerloopError(
            f"{place.uri}/{place.published_dir(name)} already holds the adapter of iteration {done.iteration}, not of "
            f"{iteration}: choose another publish_as"
        )
    verify(place.store, done)
    log(f"iteration {iteration} of {place.uri} is already published as {name}")
    return _result(place, done)


def _prompt_embeds(place: Campaign) -> torch.Tensor:
    """The cached embedding of the recipe's prompt, `prompt_embeds[T, E]`."""
    from safetensors.torch import load

    return load(read_file(place.store, place.sources().file("prompt.safetensors")))["prompt_embeds"]


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


main = functools.partial(step_main, run, iteration_from="policy", iteration_offset=0, store=open_store)

if __name__ == "__main__":
    raise SystemExit(main())
