"""What the manifests of a campaign say of each other, from base to head."""

from __future__ import annotations

from collections.abc import Mapping

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import ScoreRow
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.trajectory import candidate_key
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.findings import OF_THE_STORE, Findings, without_address
from layerloop.components.storage.rollouts import read_groups, rollouts_sha256
from layerloop.components.storage.shards import read_shard


def check_iterations(campaign: Campaign, found: Findings) -> None:
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
            found.faults.setdefault(campaign.rollouts_dir(iteration), without_address(campaign.uri, "", error))
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
        found.faults.setdefault(name, without_address(campaign.uri, "", error))
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
