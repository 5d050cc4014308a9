"""Verification of a campaign: every object that a manifest names (inventory.py) is read and hashed, and what the
manifests say of each other (consistency.py) is compared. Repair removes what no manifest names, and has made again what
the next run can make.

Nothing here loads a model: an adapter is followed from base to head by the hashes that the steps wrote down.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import File, Shard
from layerloop.components.schema.messages import counted, size_text
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.consistency import check_iterations
from layerloop.components.storage.findings import OF_THE_STORE, Findings, without_address
from layerloop.components.storage.inventory import (
    REPLY,
    check_removed,
    read_manifests,
    unnamed,
    visible_copies,
    visible_names,
)
from layerloop.components.storage.lease import SCOPES, USUAL, Timing, hold
from layerloop.components.storage.manifests import place_files, visible_name
from layerloop.components.storage.replies import read_reply
from layerloop.components.storage.shards import read_shard
from layerloop.components.storage.store import Entry, Store, hash_file

Log = Callable[[str], None]
THREADS = 8
SAY_SECONDS = 5.0
_OPEN = re.compile(r"iterations/(\d{6})/(rollouts|scores)/")


def verify_campaign(campaign: Campaign, *, log: Log) -> Findings:
    """Read and compare everything that is committed, several objects at once. Nothing is changed.

    Args:
        log: is told every few seconds how far it is.

    Raises:
        LayerloopError: the store does not answer, or refuses: then nothing is known.
    """
    store = campaign.store
    entries = store.entries()
    found = Findings(leftovers=store.leftovers())
    named = read_manifests(campaign, entries, found)
    check_removed(campaign, found, named)
    named = {name: of for name, of in named.items() if name not in found.removed}
    said = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        reads = {pool.submit(_fault_of, store, file): file for _, file in named.values()}
        for done in as_completed(reads):
            file = reads[done]
            found.objects += 1
            found.bytes += file.bytes
            if fault := done.result():
                found.faults.setdefault(file.name, fault)
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                log(f"verified {found.objects} of {len(named)} objects, {size_text(found.bytes)}")
    _check_replies(store, entries, found)
    check_iterations(campaign, found)
    _check_copies(store, found)
    visible = visible_names(found)
    found.orphans = unnamed(entries, {*named, *found.removed, *found.manifests, *visible, *found.faults})
    return found


def _check_replies(store: Store, entries: Mapping[str, Entry], found: Findings) -> None:
    """The judge's replies, which carry their own hashes."""

    def fault_of(name: str) -> str:
        try:
            read_reply(store, name)
        except OF_THE_STORE:
            raise
        except LayerloopError as error:
            return without_address(store.uri, name, error)
        return ""

    names = [name for name in entries if REPLY.fullmatch(name)]
    with ThreadPoolExecutor(THREADS) as pool:
        found.faults |= {name: fault for name, fault in zip(names, pool.map(fault_of, names), strict=True) if fault}


def repair_campaign(campaign: Campaign, *, log: Log, timing: Timing = USUAL) -> None:
    """Remove what no manifest names, copy publications' visible files again, and have made again what the next run can
    make: rollouts and scores of the iteration in progress, evaluations. What cannot be made again stays.

    Where a manifest is damaged, nothing counts as what no manifest names.

    Raises:
        LayerloopError: a run holds the campaign, or the store fails; what was found by then is left.
    """
    store = campaign.store
    with ExitStack() as held:
        for scope in SCOPES:
            held.enter_context(hold(store, scope, log=log, timing=timing))
        found = verify_campaign(campaign, log=log)  # nobody writes from here on
        if found.orphans and not found.unread:
            for name in found.orphans:
                store.delete(name)
            size = size_text(sum(found.orphans.values()))
            log(f"removed {counted(len(found.orphans), 'objects')} that no manifest names, {size}")
        if found.leftovers:
            store.remove_leftovers()
            log(f"removed {counted(len(found.leftovers), 'unfinished writes')}")
        for folder in found.copies:
            manifest = found.manifests[f"{folder}/{MANIFEST}"]
            for file in manifest.files:
                store.delete(visible_name(folder, file))
            place_files(store, manifest, folder)
            log(f"{folder}: copied the committed files to where people load them")
        damaged_replies = {name for name in found.faults if REPLY.fullmatch(name)}
        for name in sorted(_repeatable(campaign, found) | damaged_replies):
            store.delete(name)
            log(f"{name}: removed, the next run makes it again")


def _repeatable(campaign: Campaign, found: Findings) -> set[str]:
    """Manifests with a fault whose output the next run makes again as it was meant to be."""
    following = campaign.head() + 1
    names = {
        where
        for where in found.unread
        if where.startswith("evaluations/") or ((match := _OPEN.match(where)) and int(match[1]) == following)
    }
    for where, manifest in found.manifests.items():
        match = _OPEN.match(where)
        in_progress = match is not None and int(match[1]) == following
        broken = where in found.faults or any(f.name in found.faults for f in (*manifest.shards, *manifest.files))
        if broken and (in_progress or manifest.kind == "evaluation"):
            names.add(where)
    return names


def _fault_of(store: Store, file: File) -> str:
    """What is wrong with one object; empty if nothing is."""
    try:
        if isinstance(file, Shard):
            for _ in read_shard(store, file, wanted=lambda suffix: False):
                pass
            return ""
        with store.open(file.name) as opened:
            digest, size = hash_file(opened)
    except OF_THE_STORE:
        raise
    except LayerloopError as error:
        return without_address(store.uri, file.name, error)
    if (size, digest) != (file.bytes, file.sha256):
        return f"has {size} bytes of sha256 {digest[:12]}, its manifest says {file.bytes} and {file.sha256[:12]}"
    return ""


def _check_copies(store: Store, found: Findings) -> None:
    """Folders of publications whose visible files are not what they copy go to `found.copies`."""
    for folder, copies in visible_copies(found):
        if any(
            _fault_of(store, File(name=name, bytes=file.bytes, sha256=file.sha256)) for name, file in copies.items()
        ):
            found.copies.append(folder)
