"""Verification of a campaign: every object that a manifest names is read and hashed, and what the manifests say of each
other is compared. Repair removes what no manifest names, and has made again what the next run can make.

Nothing here loads a model: an adapter is followed from base to head by the hashes that the steps wrote down.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field

from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.judging import ScoreRow
from layerloop.components.schema.manifest import HASH_DIGITS, File, Manifest, Shard
from layerloop.components.schema.messages import size_text
from layerloop.components.schema.trajectory import candidate_key
from layerloop.components.storage.campaign import FOLDERS, MANIFEST, RECIPE, Campaign
from layerloop.components.storage.index import INDEX
from layerloop.components.storage.lease import FOLDER as LEASE
from layerloop.components.storage.lease import SCOPES, USUAL, Timing, hold
from layerloop.components.storage.manifests import load, place_files, visible_name
from layerloop.components.storage.removals import RECORD, removed_files
from layerloop.components.storage.replies import read_reply
from layerloop.components.storage.rollouts import read_groups, rollouts_sha256
from layerloop.components.storage.shards import read_shard
from layerloop.components.storage.store import Entry, Store, StoreError, hash_file

README = "README.md"  # of an export (transfer.py)
Log = Callable[[str], None]
THREADS = 8
SAY_SECONDS = 5.0
OF_THE_STORE = (UnavailableError, StoreError)  # what ends a verification: an object that was not read has no fault
_OPEN = re.compile(r"iterations/(\d{6})/(rollouts|scores)/")
_MANIFEST = re.compile(rf"manifest(-[0-9a-f]{{{HASH_DIGITS}}})?\.json|(g\d{{6,}}|w\d+of\d+)(-[0-9a-f]{{16}})?\.json")
# Names that no manifest lists and that are right all the same: the recipe, the lease, records of runs and refusals, the
# judge's replies (they were paid for), and the table of what was left out under the name that people look for;
# retention's record of what it removed; indices, and the page of an export.
_KEPT = re.compile(
    rf"{RECIPE}|({LEASE}|runs|refusals)/.*|(iterations/\d{{6}}/scores|evaluations)/replies/.*|sources/rejects\.parquet"
    rf"|iterations/\d{{6,}}/(rollouts|policy)/{re.escape(RECORD)}"
    rf"|(sources|iterations/\d{{6,}}/(rollouts|scores))/{re.escape(INDEX)}|{re.escape(README)}"
)


_REPLY = re.compile(r"(iterations/\d{6,}/scores|evaluations)/replies/[0-9a-f]{64}\.json")


@dataclass
class Findings:
    """What a verification found."""

    objects: int = 0
    bytes: int = 0
    faults: dict[str, str] = field(default_factory=dict)  # object, or folder -> what is wrong with it
    unread: set[str] = field(default_factory=set)  # manifests among them: what they name is not known
    orphans: dict[str, int] = field(default_factory=dict)  # object that no manifest names -> bytes
    leftovers: list[str] = field(default_factory=list)  # of killed writers, by names for people
    copies: list[str] = field(default_factory=list)  # publications whose visible files are not copies
    manifests: dict[str, Manifest] = field(default_factory=dict)
    removed: dict[str, File] = field(default_factory=dict)  # by retention, as its records say

    def lines(self) -> Iterator[str]:
        """What is wrong, one line each, and a summary."""
        yield from (f"{where}: {what}" for where, what in sorted(self.faults.items()))
        yield from (f"{folder}: files that people load are not those of its manifest" for folder in self.copies)
        size = sum(self.orphans.values())
        if self.orphans:
            what = "--repair leaves them, while a manifest is damaged" if self.unread else "--repair removes them"
            yield f"{len(self.orphans)} objects of {size_text(size)} are named by no manifest ({what})"
        if self.leftovers:
            yield f"{len(self.leftovers)} unfinished writes are left over (--repair removes them)"
        if self.removed:
            gone = sum(file.bytes for file in self.removed.values())
            yield f"{len(self.removed)} objects of past iterations, {size_text(gone)}, were removed by retention"
        verdict = "all is what was committed" if self.sound else f"{len(self.faults) + len(self.copies)} faults"
        yield f"{self.objects} objects of {len(self.manifests)} manifests, {size_text(self.bytes)} read: {verdict}"

    @property
    def sound(self) -> bool:
        """Whether everything that is committed is right; orphans do no harm."""
        return not self.faults and not self.copies


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
    named = _read_manifests(campaign, entries, found)
    _check_removed(campaign, found, named)
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
    _check_iterations(campaign, found)
    _check_copies(store, found)
    visible = _visible(found)
    found.orphans = _unnamed(entries, {*named, *found.removed, *found.manifests, *visible, *found.faults})
    return found


def _check_replies(store: Store, entries: Mapping[str, Entry], found: Findings) -> None:
    """The judge's replies, which carry their own hashes."""

    def fault_of(name: str) -> str:
        try:
            read_reply(store, name)
        except OF_THE_STORE:
            raise
        except LayerloopError as error:
            return _without(store.uri, name, error)
        return ""

    names = [name for name in entries if _REPLY.fullmatch(name)]
    with ThreadPoolExecutor(THREADS) as pool:
        found.faults |= {name: fault for name, fault in zip(names, pool.map(fault_of, names), strict=True) if fault}


def unnamed_objects(campaign: Campaign) -> dict[str, int]:
    """Objects that no manifest names and that are not kept for other reasons, with their bytes. Manifests are read,
    nothing else is.

    Raises:
        LayerloopError: a manifest is damaged, so that what it names is not known.
    """
    entries, found = campaign.store.entries(), Findings()
    named = _read_manifests(campaign, entries, found)
    _refuse_damaged(campaign, found)
    return _unnamed(entries, {*named, *found.manifests, *_visible(found)})


def committed_objects(campaign: Campaign) -> tuple[dict[str, File], set[str]]:
    """What a copy of a campaign has to hold: objects of manifests that are there, by name, and the names of all else
    that stays (manifests, the recipe, replies, records, visible copies of publications), but for the lease and indices.

    Raises:
        LayerloopError: a manifest is damaged.
    """
    entries, found = campaign.store.entries(), Findings()
    named = _read_manifests(campaign, entries, found)
    _check_removed(campaign, found, named)
    _refuse_damaged(campaign, found)
    kept = {name for name in entries if _KEPT.fullmatch(name)}
    passing = {name for name in kept if name.split("/")[0] == LEASE or name.rpartition("/")[2] in (INDEX, README)}
    files = {name: file for name, (_, file) in named.items() if name not in found.removed}
    return files, (kept - passing) | found.manifests.keys() | (_visible(found) & entries.keys())


def _refuse_damaged(campaign: Campaign, found: Findings) -> None:
    if found.faults:
        where, what = min(found.faults.items())
        raise LayerloopError(f"{campaign.uri}/{where}: {what}; see layerloop campaign verify {campaign.uri}")


def _read_manifests(campaign: Campaign, entries: Mapping[str, Entry], found: Findings) -> dict[str, tuple[str, File]]:
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


def _unnamed(entries: Mapping[str, Entry], known: Collection[str]) -> dict[str, int]:
    """Objects in the campaign's own folders that are none of those known; what lies beside these is not ours."""
    own = {name: entry.size for name, entry in entries.items() if name.split("/")[0] in FOLDERS}
    return {name: size for name, size in own.items() if name not in known and not _KEPT.fullmatch(name)}


def _check_removed(campaign: Campaign, found: Findings, named: Mapping[str, tuple[str, File]]) -> None:
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
                found.faults[where] = _without(campaign.uri, where, error)
                continue
            for name, file in removed.items():
                by = named.get(name)
                if by is None or (by[1].bytes, by[1].sha256) != (file.bytes, file.sha256):
                    found.faults[where] = f"says that {name} was removed, which no manifest names so"
                elif iteration > head or folder == campaign.policy_dir(head):
                    found.faults[where] = f"says that {name} was removed, which the next step needs"
                else:
                    found.removed[name] = file


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
            log(
                f"removed {len(found.orphans)} objects that no manifest names, {size_text(sum(found.orphans.values()))}"
            )
        if found.leftovers:
            store.remove_leftovers()
            log(f"removed {len(found.leftovers)} unfinished writes")
        for folder in found.copies:
            manifest = found.manifests[f"{folder}/{MANIFEST}"]
            for file in manifest.files:
                store.delete(visible_name(folder, file))
            place_files(store, manifest, folder)
            log(f"{folder}: copied the committed files to where people load them")
        damaged_replies = {name for name in found.faults if _REPLY.fullmatch(name)}
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


def _load(campaign: Campaign, name: str, found: Findings) -> None:
    try:
        manifest = load(campaign.store, name)
        if manifest is not None:
            campaign.check_origin(name, manifest)
            found.manifests[name] = manifest
    except OF_THE_STORE:
        raise
    except LayerloopError as error:
        found.faults[name] = _without(campaign.uri, name, error)
        found.unread.add(name)


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
        return _without(store.uri, file.name, error)
    if (size, digest) != (file.bytes, file.sha256):
        return f"has {size} bytes of sha256 {digest[:12]}, its manifest says {file.bytes} and {file.sha256[:12]}"
    return ""


# ------------------------------------------------------------------------------------- what manifests say of each other


def _check_iterations(campaign: Campaign, found: Findings) -> None:
    """Groups, scores and adapters of every iteration, from base to head."""
    head = campaign.head()
    before: Manifest | None = None
    for iteration in range(1, head + 2):
        policy = found.manifests.get(f"{campaign.policy_dir(iteration)}/{MANIFEST}")
        scores = found.manifests.get(f"{campaign.scores_dir(iteration)}/{MANIFEST}")
        try:
            groups = campaign.committed_groups(iteration)
        except OF_THE_STORE:
            raise
        except LayerloopError as error:
            found.faults.setdefault(campaign.rollouts_dir(iteration), _without(campaign.uri, "", error))
            groups = {}
        if iteration <= head and policy is None:
            found.faults.setdefault(
                campaign.policy_dir(iteration), f"is not committed, but that of iteration {head} is"
            )
        _check_groups(campaign, iteration, groups, before, found)
        if scores is not None:
            _check_scores(campaign, iteration, scores, groups, found)
        if policy is not None:
            _check_policy(campaign, iteration, policy, before, scores, found)
        before = policy


def _check_groups(
    campaign: Campaign, iteration: int, groups: Mapping[int, Manifest], before: Manifest | None, found: Findings
) -> None:
    where = campaign.rollouts_dir(iteration)
    planned = campaign.recipe.rollout
    for group, manifest in groups.items():
        name = f"{where}/g{group:06d}.json"
        if group not in range(planned.groups):
            found.faults.setdefault(name, f"is of group {group}, the recipe has {planned.groups}")
        if manifest.counts.get("candidates") != planned.group_size:
            said = manifest.counts.get("candidates")
            found.faults.setdefault(name, f"has {said} candidates, the recipe says {planned.group_size}")
        adapter = manifest.metadata.get("adapter_sha256")
        if before is not None and adapter != before.metadata.get("adapter_sha256"):
            wanted = before.metadata.get("adapter_sha256")
            found.faults.setdefault(
                name, f"was sampled with adapter {adapter!s:.12}, that of iteration {iteration - 1} is {wanted!s:.12}"
            )
        _same_base(name, manifest, before, found)


def _check_scores(
    campaign: Campaign, iteration: int, scores: Manifest, groups: Mapping[int, Manifest], found: Findings
) -> None:
    """Compare the rows with the rollouts: the same candidates, each once, of the same image and layer count."""
    name = f"{campaign.scores_dir(iteration)}/{MANIFEST}"
    made_of = scores.metadata.get("rollouts_sha256")
    if made_of is not None and made_of != rollouts_sha256(groups):
        found.faults.setdefault(name, f"is of rollouts {made_of!s:.12}, those there are {rollouts_sha256(groups):.12}")
    if any(shard.name in found.faults for shard in scores.shards):
        return
    gone = {*found.faults, *found.removed}
    try:
        rows = {
            key: ScoreRow.from_json(members["json"], where=f"{shard.name}:{key}")
            for shard in scores.shards
            for key, members in read_shard(campaign.store, shard, required=("json",))
        }
        sound = {group: m for group, m in groups.items() if m.shards[0].name not in gone}
        sampled = {
            candidate_key(iteration, group.record.group, candidate.record.candidate): group.record
            for group in read_groups(campaign.store, sound)
            for candidate in group.candidates
        }
    except OF_THE_STORE:
        raise
    except LayerloopError as error:
        found.faults.setdefault(name, _without(campaign.uri, "", error))
        return
    faults = []
    for key, row in rows.items():
        record = sampled.get(key)
        if candidate_key(row.iteration, row.group, row.candidate) != key:
            faults.append(f"the row of {key} is of {candidate_key(row.iteration, row.group, row.candidate)}")
        elif record is None and len(sound) == len(groups):
            faults.append(f"scores {key}, which was not sampled")
        elif record is not None and (row.image_key, row.layers) != (record.image_key, record.layers):
            faults.append(f"{key} is of image {row.image_key} with {row.layers} layers, its rollout is not")
        elif row.reward is not None and not 0 <= row.reward <= 1:
            faults.append(f"{key} has reward {row.reward:g}, outside of 0..1")
    faults += [f"{key} was sampled and has no score" for key in sampled if key not in rows]
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        found.faults.setdefault(name, faults[0] + more)


def _check_policy(
    campaign: Campaign,
    iteration: int,
    policy: Manifest,
    before: Manifest | None,
    scores: Manifest | None,
    found: Findings,
) -> None:
    name = f"{campaign.policy_dir(iteration)}/{MANIFEST}"
    said = policy.metadata.get("adapter_sha256")
    try:
        held = policy.file("adapter_model.safetensors").sha256
    except KeyError:
        found.faults.setdefault(name, "names no adapter_model.safetensors")
        return
    if said != held:
        found.faults.setdefault(name, f"says adapter {said!s:.12} and names one of {held:.12}")
    if before is not None and "previous_adapter_sha256" in policy.metadata:
        begun, ended = policy.metadata["previous_adapter_sha256"], before.metadata.get("adapter_sha256")
        if begun != ended:
            found.faults.setdefault(
                name, f"continues adapter {begun!s:.12}, that of iteration {iteration - 1} is {ended!s:.12}"
            )
    learnt_from = policy.metadata.get("scores_sha256")
    if scores is not None and learnt_from not in (None, [shard.sha256 for shard in scores.shards]):
        found.faults.setdefault(name, "was learnt from other scores than those that are there")
    _same_base(name, policy, before, found)


def _same_base(name: str, manifest: Manifest, before: Manifest | None, found: Findings) -> None:
    ours, theirs = (m.metadata.get("base_fingerprint") if m else None for m in (manifest, before))
    if ours and theirs and ours != theirs:
        found.faults.setdefault(name, f"is of base {ours!s:.12}, the iteration before of {theirs!s:.12}")


def _copies(found: Findings) -> Iterator[tuple[str, dict[str, File]]]:
    """Folders of publications, with what lies there for people to load, by name."""
    for where, manifest in found.manifests.items():
        folder, _, base = where.rpartition("/")
        if manifest.kind == "published" and base == MANIFEST:
            named = {visible_name(folder, file): file for file in manifest.files}
            yield folder, {name: file for name, file in named.items() if name != file.name}


def _visible(found: Findings) -> set[str]:
    return {name for _, copies in _copies(found) for name in copies}


def _check_copies(store: Store, found: Findings) -> None:
    """Folders of publications whose visible files are not what they copy go to `found.copies`."""
    for folder, copies in _copies(found):
        if any(
            _fault_of(store, File(name=name, bytes=file.bytes, sha256=file.sha256)) for name, file in copies.items()
        ):
            found.copies.append(folder)


def _without(uri: str, name: str, error: LayerloopError) -> str:
    """An error's words without the URI and name that its line begins with anyway."""
    return str(error).replace(f"{uri}/", "").removeprefix(name).lstrip(": ")
