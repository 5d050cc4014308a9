"""What a campaign consists of: the objects that its manifests name, and those that are right without."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import HASH_DIGITS, File
from layerloop.components.storage.campaign import FOLDERS, MANIFEST, RECIPE, Campaign
from layerloop.components.storage.findings import OF_THE_STORE, Findings, without_address
from layerloop.components.storage.index import INDEX
from layerloop.components.storage.lease import FOLDER as LEASE
from layerloop.components.storage.manifests import load, visible_name
from layerloop.components.storage.removals import RECORD, removed_files
from layerloop.components.storage.store import Entry

README = "README.md"  # of an export (transfer.py)
_MANIFEST = re.compile(rf"manifest(-[0-9a-f]{{{HASH_DIGITS}}})?\.json|(g\d{{6,}}|w\d+of\d+)(-[0-9a-f]{{16}})?\.json")
# Names that no manifest lists and that are right all the same: the recipe, the lease, records of runs and refusals, the
# judge's replies (they were paid for), and the table of what was left out under the name that people look for;
# retention's record of what it removed; indices, and the page of an export.
_KEPT = re.compile(
    rf"{RECIPE}|({LEASE}|runs|refusals)/.*|(iterations/\d{{6}}/scores|evaluations)/replies/.*|sources/rejects\.parquet"
    rf"|iterations/\d{{6,}}/(rollouts|policy)/{re.escape(RECORD)}"
    rf"|(sources|iterations/\d{{6,}}/(rollouts|scores))/{re.escape(INDEX)}|{re.escape(README)}"
)

REPLY = re.compile(r"(iterations/\d{6,}/scores|evaluations)/replies/[0-9a-f]{64}\.json")


def unnamed_objects(campaign: Campaign) -> dict[str, int]:
    """Objects that no manifest names and that are not kept for other reasons, with their bytes. Manifests are read,
    nothing else is.

    Raises:
        LayerloopError: a manifest is damaged, so that what it names is not known.
    """
    entries, found = campaign.store.entries(), Findings()
    named = read_manifests(campaign, entries, found)
    _refuse_damaged(campaign, found)
    return unnamed(entries, {*named, *found.manifests, *visible_names(found)})


def committed_objects(campaign: Campaign) -> tuple[dict[str, File], set[str]]:
    """What a copy of a campaign has to hold: objects of manifests that are there, by name, and the names of all else
    that stays (manifests, the recipe, replies, records, visible copies of publications), but for the lease and indices.

    Raises:
        LayerloopError: a manifest is damaged.
    """
    entries, found = campaign.store.entries(), Findings()
    named = read_manifests(campaign, entries, found)
    check_removed(campaign, found, named)
    _refuse_damaged(campaign, found)
    kept = {name for name in entries if _KEPT.fullmatch(name)}
    passing = {name for name in kept if name.split("/")[0] == LEASE or name.rpartition("/")[2] in (INDEX, README)}
    files = {name: file for name, (_, file) in named.items() if name not in found.removed}
    return files, (kept - passing) | found.manifests.keys() | (visible_names(found) & entries.keys())


def _refuse_damaged(campaign: Campaign, found: Findings) -> None:
    if found.faults:
        where, what = min(found.faults.items())
        raise LayerloopError(f"{campaign.uri}/{where}: {what}; see layerloop campaign verify {campaign.uri}")


def read_manifests(campaign: Campaign, entries: Mapping[str, Entry], found: Findings) -> dict[str, tuple[str, File]]:
    """What all manifests name: the manifest's name and its entry, by object. Manifests and faults go to `found`."""
    for name in entries:
        if _MANIFEST.fullmatch(name.rpartition("/")[2]) and not _KEPT.fullmatch(name):
            _load(campaign, name, found)
    named: dict[str, tuple[str, File]] = {}
    for where, manifest in found.manifests.items():
        for file in (*manifest.shards, *manifest.files):
            known = named.setdefault(file.name, (where, file))[1]
            if (known.bytes, known.sha256) != (file.bytes, file.sha256):
                found.faults[file.name] = f"{where} and {named[file.name][0]} say different hashes of it"
    return named


def unnamed(entries: Mapping[str, Entry], known: Collection[str]) -> dict[str, int]:
    """Objects in the campaign's own folders that are none of those known; what lies beside these is not ours."""
    own = {name: entry.size for name, entry in entries.items() if name.split("/")[0] in FOLDERS}
    return {name: size for name, size in own.items() if name not in known and not _KEPT.fullmatch(name)}


def check_removed(campaign: Campaign, found: Findings, named: Mapping[str, tuple[str, File]]) -> None:
    """What retention removed, by its records, which go with the manifests. An iteration that has not ended and the
    head's policy are never removed."""
    head = campaign.head()
    for iteration in campaign.iterations():
        for folder in (campaign.rollouts_dir(iteration), campaign.policy_dir(iteration)):
            where = f"{folder}/{RECORD}"
            try:
                removed = removed_files(campaign.store, folder)
            except OF_THE_STORE:
                raise
            except LayerloopError as error:
                found.faults[where] = without_address(campaign.uri, where, error)
                continue
            for name, file in removed.items():
                by = named.get(name)
                if by is None or (by[1].bytes, by[1].sha256) != (file.bytes, file.sha256):
                    found.faults[where] = f"says that {name} was removed, which no manifest names so"
                elif iteration > head or folder == campaign.policy_dir(head):
                    found.faults[where] = f"says that {name} was removed, which the next step needs"
                else:
                    found.removed[name] = file


def _load(campaign: Campaign, name: str, found: Findings) -> None:
    try:
        manifest = load(campaign.store, name)
        if manifest is not None:
            campaign.check_origin(name, manifest)
            found.manifests[name] = manifest
    except OF_THE_STORE:
        raise
    except LayerloopError as error:
        found.faults[name] = without_address(campaign.uri, name, error)
        found.unread.add(name)


def visible_copies(found: Findings) -> Iterator[tuple[str, dict[str, File]]]:
    """Folders of publications, with what lies there for people to load, by name."""
    for where, manifest in found.manifests.items():
        folder, _, base = where.rpartition("/")
        if manifest.kind == "published" and base == MANIFEST:
            named = {visible_name(folder, file): file for file in manifest.files}
            yield folder, {name: file for name, file in named.items() if name != file.name}


def visible_names(found: Findings) -> set[str]:
    """Names of all such copies."""
    return {name for _, copies in visible_copies(found) for name in copies}
