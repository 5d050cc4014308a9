"""`layerloop campaign list`, `compare` and `delete`: several campaigns, and the end of one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.messages import counted, size_text
from layerloop.components.schema.recipe import recipe_differences
from layerloop.components.storage.campaign import MANIFEST, RECIPE, Campaign
from layerloop.components.storage.lease import FOLDER as LEASE
from layerloop.components.storage.lease import SCOPES, held_by, holder
from layerloop.components.storage.manifests import read_file
from layerloop.components.storage.stores import LocalStore, open_store
from layerloop.pipelines.show import table_lines

# What a campaign consists of; anything else in its folder is somebody's own.
_OWN = re.compile(
    rf"{RECIPE}|({LEASE}|runs|refusals|sources|iterations|evaluations|published|publications|samples|systems)/.*"
)
BAD_LAYERS = {"designs.bad_layers": "design", "pictures.bad_layers": "picture"}  # of a campaign, the first that it has


def list_text(uri: str) -> str:
    """A row for each campaign directly under a folder or prefix.

    Raises:
        LayerloopError: none is there.
    """
    store, rows = open_store(uri), []
    for name in store.folders():
        if not store.exists(f"{name}/{RECIPE}"):
            continue
        try:
            campaign = Campaign.open(f"{store.uri.rstrip('/')}/{name}")
        except LayerloopError as error:  # the others are to be seen all the same
            rows.append([name, str(error), "", "", "", ""])
            continue
        head, recipe = campaign.head(), campaign.recipe
        found = [f"{bad['base']:.3f} -> {bad['tuned']:.3f} a {what}" for bad, what in bad_layers(campaign)]
        change = found[0] if found else ""
        rows.append([name, recipe.name, recipe.model.base, str(head), change, size_text(campaign.bytes_under())])
    if not rows:
        raise LayerloopError(f"{store.uri} has no campaign directly in it: give the folder that holds campaigns")
    return "\n".join(table_lines(("campaign", "recipe", "base", "iteration", "bad layers", "size"), rows))


def compare_text(one: str, other: str) -> str:
    """What differs between two campaigns: recipes, heads, and the last evaluations, measure by measure.

    Raises:
        LayerloopError: one of them is no campaign.
    """
    campaigns = [Campaign.open(one), Campaign.open(other)]
    lines = [f"{name}  {campaign.uri}" for name, campaign in zip("AB", campaigns, strict=True)]
    changed = recipe_differences(campaigns[1].recipe, campaigns[0].recipe)
    lines += ["", "recipe, A -> B:", *(f"  {line}" for line in changed)] if changed else ["", "recipe: the same"]
    lines += ["", "iteration: A " + ", B ".join(str(campaign.head()) for campaign in campaigns)]
    found = [evaluated(campaign) for campaign in campaigns]
    rows = []
    for measure in sorted(found[0].keys() & found[1].keys()):
        a, b = (document[measure] for document in found)
        if measure.count(".") == 1 and None not in (a["tuned"], b["tuned"]):
            rows.append([measure, a["title"], *(f"{v:.4f}" for v in (a["base"], a["tuned"], b["base"], b["tuned"]))])
    if rows:
        lines += ["", *table_lines(("measure", "", "A base", "A adapter", "B base", "B adapter"), rows)]
        lines += ["", "The same images? `layerloop compare` says case by case what is clear."]
    else:
        lines.append("evaluations: there are not two to compare")
    return "\n".join(lines)


def delete_campaign(uri: str, *, yes: bool, log: Callable[[str], None]) -> None:
    """Delete everything that belongs to a campaign; what is not the campaign's stays.

    Manifests go first and the recipe last: what is half deleted is never read as whole, and the same command goes on.

    Raises:
        LayerloopError: there is no campaign, a run works on it, or `yes` is not given.
    """
    store = open_store(uri)
    if not store.exists(RECIPE):
        raise LayerloopError(f"{store.uri} has no {RECIPE}, so it is no campaign: nothing was deleted")
    for scope in SCOPES:
        held = holder(store, scope)
        if held is not None and held.alive is not None:
            raise LayerloopError(f"{held_by(held, scope, store.uri)}: stop that run first; nothing was deleted")
    sizes = store.sizes()
    own = [name for name in sizes if _OWN.fullmatch(name)]
    what = f"{counted(len(own), 'objects')}, {size_text(sum(sizes[name] for name in own))}"
    if not yes:
        raise LayerloopError(f"campaign {store.uri} would be deleted for good ({what}): say --yes if it is to be")
    store.remove_leftovers()
    for name in sorted(own, key=_order):
        store.delete(name)
    if isinstance(store, LocalStore):
        _remove_empty_folders(store)
    kept = (
        f"; kept {counted(len(sizes) - len(own), 'files')} that are not the campaign's" if len(own) < len(sizes) else ""
    )
    log(f"campaign {store.uri} is deleted: {what}{kept}")


def _order(name: str) -> tuple[int, str]:
    return (2 if name == RECIPE else 0 if name.endswith(f"/{MANIFEST}") else 1), name


def _remove_empty_folders(store: LocalStore) -> None:
    for folder in sorted((path for path in store.root.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()) and _OWN.fullmatch(f"{folder.relative_to(store.root).as_posix()}/"):
            folder.rmdir()
    if not any(store.root.iterdir()):
        store.root.rmdir()


def bad_layers(campaign: Campaign) -> list[tuple[Mapping[str, Any], str]]:
    """The comparisons of bad layers that the last evaluation has, each with what it was measured on: designs first."""
    found = evaluated(campaign)
    measured = [(found[name], what) for name, what in BAD_LAYERS.items() if name in found]
    return [(bad, what) for bad, what in measured if bad["difference"] is not None]


def evaluated(campaign: Campaign) -> Mapping[str, Any]:
    """Comparisons of the last evaluation by measure (`metrics.json`); empty where there is none."""
    name = f"iteration-{campaign.head():06d}"
    names = [name] if name in campaign.evaluations() else [n for n in campaign.evaluations() if n.startswith("iter")]
    manifest = campaign.find(campaign.evaluation_dir(names[-1])) if names else None
    if manifest is None:
        return {}
    document = json.loads(read_file(campaign.store, manifest.file("metrics.json")))
    return {key: value for key, value in document.items() if isinstance(value, dict) and "tuned" in value}
