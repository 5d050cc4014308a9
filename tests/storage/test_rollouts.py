"""The rollouts of an iteration: what is written is read again, by group, whoever wrote it; what is damaged is named."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.trajectory import CandidateRecord
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.groups import Group, SampledGroup, samples_of
from layerloop.components.storage.images import encode_png
from layerloop.components.storage.rollouts import (
    commit_group,
    committed_groups,
    read_groups,
    resume_group,
    sampled_groups,
    write_group,
)
from layerloop.components.storage.shards import Sample, write_shard
from layerloop.components.storage.stores import Store, open_store

from ..campaigns import CampaignBuilder, drawn_group, lay_out_by_worker, plain_name

FOLDER = "iterations/000001/rollouts"
REMEDY = "delete the iteration's folder, and it is sampled and scored again"
SEEDS = {"base_fingerprint": "0" * 64, "adapter_sha256": None}


@pytest.fixture
def store(store_uri: str) -> Store:
    return open_store(store_uri)


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    """Six groups of two candidates, all of them sampled."""
    recipe = Recipe.model_validate({"name": "test", "rollout": {"groups": 6, "group_size": 2}})
    builder = CampaignBuilder(Campaign.create_or_open(str(tmp_path / "campaign"), recipe))
    builder.put([drawn_group(group) for group in range(6)])
    return builder.campaign


def written(store: Store, *groups: SampledGroup) -> dict[int, Manifest]:
    return {group.record.group: write_group(store, FOLDER, group, model_calls=7) for group in groups}


# ---- the shard


def test_what_was_sampled_is_what_is_read(store: Store) -> None:
    sampled = [drawn_group(0), drawn_group(3)]
    manifests = written(store, *sampled)
    for wanted, found in zip(sampled, read_groups(store, manifests, layers=True, latents=True), strict=True):
        assert found.record == wanted.record
        assert np.array_equal(found.image(), wanted.image) and np.array_equal(found.condition(64), wanted.condition)
        for c, candidate in enumerate(found.candidates):
            number, image = wanted.record.group, wanted.record.image_key
            own = CandidateRecord(iteration=1, group=number, candidate=c, image_key=image, seed=c)
            assert candidate.record == own
            assert np.array_equal(candidate.stack(), wanted.stacks[c])
            assert np.array_equal(candidate.window(64), wanted.window[c])
            assert np.array_equal(candidate.final(64), wanted.final[c])


def test_a_shard_is_the_groups_sample_and_then_each_candidates(store: Store) -> None:
    """The format that campaigns have, member by member; schema/trajectory.py describes it."""
    group = drawn_group(1)
    (manifest,) = written(store, group).values()
    shard = manifest.shards[0]
    assert shard.name == f"{FOLDER}/g000001-{shard.sha256[:16]}.tar" and shard.samples == 3
    with tarfile.open(fileobj=io.BytesIO(store.read(manifest.shards[0].name))) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    layers = ["layer0.png", "layer1.png"]
    suffixes = {"i000001-g000001": ["condition.safetensors", "json", "source.png"]} | {
        f"i000001-g000001-c0{c}": ["json", *layers, "trajectory.safetensors"] for c in range(2)
    }
    assert list(members) == [f"{key}.{suffix}" for key, own in suffixes.items() for suffix in own]
    assert members["i000001-g000001.json"] == group.record.to_json()
    assert members["i000001-g000001.source.png"] == encode_png(group.image)
    assert members["i000001-g000001.condition.safetensors"] == save({"condition": group.condition})
    assert members["i000001-g000001-c01.layer1.png"] == encode_png(group.stacks[1, 1])
    assert members["i000001-g000001-c01.trajectory.safetensors"] == save(
        {"final": group.final[1], "window": group.window[1]}
    )


def test_latents_are_the_bytes_that_torch_writes(store: Store) -> None:
    """The sampler's tensors used to be written by safetensors' torch half."""
    from safetensors.torch import save as torch_save
    from torch import from_numpy

    group = drawn_group(0)
    members = dict(samples_of(group))["i000001-g000000-c01"]
    tensors = {"final": from_numpy(group.final[1]), "window": from_numpy(group.window[1])}
    assert members["trajectory.safetensors"] == torch_save(tensors)


def test_without_a_window_only_final_latents_are_kept() -> None:
    group = drawn_group(0)
    record = group.record.model_copy(update={"window_size": 0, "etas": (), "dynamics": "ode"})
    samples = dict(samples_of(dataclasses.replace(group, record=record)))
    assert load(samples["i000001-g000000-c00"]["trajectory.safetensors"]).keys() == {"final"}


def test_a_reader_gets_what_it_asks_for_and_no_more(store: Store) -> None:
    manifests = written(store, drawn_group(1))
    (judged,) = read_groups(store, manifests, layers=True)
    assert judged.members.keys() == {"json", "source.png"}
    assert judged.candidates[0].members.keys() == {"json", "layer0.png", "layer1.png"}
    (learnt,) = read_groups(store, manifests, latents=True)
    assert learnt.members.keys() == {"json", "condition.safetensors"}
    assert learnt.candidates[1].members.keys() == {"json", "trajectory.safetensors"}


def test_shards_of_groups_that_are_not_wanted_are_not_fetched(store: Store) -> None:
    manifests = written(store, *(drawn_group(group) for group in range(3)))
    store.delete(manifests[1].shards[0].name)
    assert [group.record.group for group in read_groups(store, manifests, {2, 0}, layers=True)] == [0, 2]
    with pytest.raises(LayerloopError, match=r"g000001-\w+\.tar does not exist"):
        list(read_groups(store, manifests, layers=True))


def test_neither_writing_nor_reading_needs_torch(tmp_path: Path) -> None:
    written(open_store(tmp_path), drawn_group(0))
    code = (
        "import sys; from layerloop.components.storage.stores import open_store\n"
        "from layerloop.components.storage.rollouts import committed_groups, read_groups\n"
        f"store = open_store({str(tmp_path)!r}); manifests = committed_groups(store, {FOLDER!r}, 1)\n"
        "(group,) = read_groups(store, manifests, layers=True, latents=True)\n"
        "print(group.candidates[1].stack().shape, group.candidates[1].window(64).shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "(1, 32, 32, 4) (2, 8, 64) False"


# ---- committing


def test_a_groups_names_and_bytes_do_not_depend_on_the_order_or_the_company(tmp_path: Path) -> None:
    one, other = open_store(tmp_path / "one"), open_store(tmp_path / "other")
    written(one, *(drawn_group(group) for group in range(4)))
    for group in (2, 0, 3, 1):
        written(other, drawn_group(group))
    plain = sorted(plain_name(name) for name in one.list())
    assert plain == [f"{FOLDER}/g{g:06d}.{end}" for g in range(4) for end in ("json", "tar")]
    assert {name: one.read(name) for name in one.list()} == {name: other.read(name) for name in other.list()}


def test_a_groups_manifest_says_what_it_was_sampled_with(store: Store) -> None:
    (manifest,) = written(store, drawn_group(1)).values()
    assert manifest == committed_groups(store, FOLDER, 1)[1]
    assert (manifest.kind, manifest.iteration) == ("rollouts", 1)
    assert manifest.counts == {"groups": 1, "candidates": 2, "layers": 4, "model_calls": 7}
    assert manifest.metadata == SEEDS | {"groups": [1], "sigmas": {"32x32": [1.0, 0.5, 0.0]}}


def test_a_group_without_its_manifest_is_not_there(store: Store) -> None:
    written(store, drawn_group(0), drawn_group(1))
    store.delete(f"{FOLDER}/g000001.json")
    assert sampled_groups(store, FOLDER, 1) == [0] == list(committed_groups(store, FOLDER, 1))


def test_groups_are_counted_without_their_manifests_being_read(store: Store) -> None:
    written(store, drawn_group(0), drawn_group(12))
    store.write(f"{FOLDER}/g000012.json", b"damaged")
    assert sampled_groups(store, FOLDER, 1) == [0, 12]
    with pytest.raises(LayerloopError, match=r"g000012\.json is not JSON"):
        committed_groups(store, FOLDER, 1)


def test_a_shard_that_an_attempt_left_without_a_manifest_is_taken_over(store: Store) -> None:
    group = drawn_group(1)
    manifest = written(store, group)[1]
    store.delete(f"{FOLDER}/g000001.json")
    found = resume_group(store, FOLDER, 1, 1, group_size=2, **SEEDS)  # type: ignore[arg-type]
    assert found == (manifest.shards[0], group.record)
    assert commit_group(store, FOLDER, *reversed(found), model_calls=7) == manifest  # type: ignore[misc]


@pytest.mark.parametrize(
    "change",
    [{"group_size": 3}, {"base_fingerprint": "1" * 64}, {"adapter_sha256": "2" * 64}, {"group": 2}],
    ids=lambda change: next(iter(change)),
)
def test_a_shard_of_other_candidates_or_another_policy_is_not_taken_over(store: Store, change: dict[str, Any]) -> None:
    written(store, drawn_group(1))
    wanted = {"group": 1, "group_size": 2} | SEEDS | change
    assert resume_group(store, FOLDER, 1, **wanted) is None


def test_half_a_shard_is_not_taken_over(store: Store) -> None:
    shard = written(store, drawn_group(1))[1].shards[0]
    store.write(shard.name, store.read(shard.name)[:5000])
    assert resume_group(store, FOLDER, 1, 1, group_size=2, **SEEDS) is None  # type: ignore[arg-type]


def test_of_several_writers_at_once_all_hold_the_same_manifest(store: Store) -> None:
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = list(pool.map(lambda _: write_group(store, FOLDER, drawn_group(0), model_calls=7), range(16)))
    assert len({manifest.to_json() for manifest in found}) == 1
    assert sorted(plain_name(name) for name in store.list()) == [f"{FOLDER}/g000000.json", f"{FOLDER}/g000000.tar"]
    (group,) = read_groups(store, committed_groups(store, FOLDER, 1), latents=True)
    assert np.array_equal(group.candidates[0].window(64), drawn_group(0).window[0])


def test_a_late_writer_leaves_a_committed_group_as_it_is(store: Store) -> None:
    first = written(store, drawn_group(0))[0]
    before = {name: store.read(name) for name in store.list()}
    assert write_group(store, FOLDER, drawn_group(0, seed=1), model_calls=7) == first
    assert {name: store.read(name) for name in store.list()} == before


def test_a_writer_that_lost_the_race_with_other_bytes_takes_the_winners_over(store: Store) -> None:
    """On another kind of processor the same group has other bytes: both are there, the first manifest counts."""
    other = drawn_group(0, seed=1)
    shard = write_shard(store, f"{FOLDER}/g000000.tar", samples_of(other))
    winner = written(store, drawn_group(0))[0]
    assert commit_group(store, FOLDER, other.record, shard, model_calls=7) == winner != shard
    (read,) = read_groups(store, committed_groups(store, FOLDER, 1), latents=True)
    assert np.array_equal(read.candidates[0].window(64), drawn_group(0).window[0])


@pytest.mark.parametrize(("field", "value"), [("base_fingerprint", "1" * 64), ("adapter_sha256", "2" * 64)])
def test_a_writer_that_lost_the_race_to_another_policy_says_so(store: Store, field: str, value: str) -> None:
    written(store, drawn_group(0))
    other = drawn_group(0).record.model_copy(update={field: value})
    shard = write_shard(store, f"{FOLDER}/g000000.tar", samples_of(drawn_group(0, seed=1)))
    with pytest.raises(
        LayerloopError, match=rf"g000000\.json was committed by another attempt with {field} .*{value[:12]}"
    ):
        commit_group(store, FOLDER, other, shard, model_calls=7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "scores"}, "is of scores 1, groups [0], with 1 shards"),
        ({"iteration": 2}, "is of rollouts 2, groups [0], with 1 shards"),
        ({"metadata": {"groups": [1]}}, "is of rollouts 1, groups [1], with 1 shards"),
        ({"shards": ()}, "is of rollouts 1, groups [0], with 0 shards"),
    ],
    ids=["kind", "iteration", "group", "shards"],
)
def test_a_manifest_that_is_not_the_groups_own_is_refused(store: Store, change: dict[str, Any], message: str) -> None:
    manifest = written(store, drawn_group(0))[0]
    store.write(f"{FOLDER}/g000000.json", manifest.model_copy(update=change).to_json())
    with pytest.raises(LayerloopError) as caught:
        committed_groups(store, FOLDER, 1)
    assert message in str(caught.value) and str(caught.value).endswith("delete it to have the group sampled again")


# ---- campaigns of earlier versions: a manifest per worker


def candidates(campaign: Campaign) -> dict[int, list[bytes]]:
    """Every candidate's final latents, by group."""
    groups = read_groups(campaign.store, campaign.rollouts(1), latents=True)
    return {group.record.group: [c.final(64).tobytes() for c in group.candidates] for group in groups}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_campaign_with_a_manifest_per_worker_is_read(campaign: Campaign, workers: int) -> None:
    before = candidates(campaign)
    lay_out_by_worker(campaign, 1, workers=workers)
    assert f"{FOLDER}/w00of{workers:02d}-000000.tar" in campaign.store.list(FOLDER)
    assert candidates(campaign) == before and campaign.sampled_groups(1) == list(range(6))
    manifest = campaign.rollouts(1)[5]
    assert manifest.counts == {"groups": 1, "candidates": 2} and manifest.metadata["groups"] == [5]


def test_groups_of_workers_that_finished_and_groups_of_their_own_make_up_an_iteration(campaign: Campaign) -> None:
    before = candidates(campaign)
    lay_out_by_worker(campaign, 1, workers=3, complete=[1])
    assert campaign.sampled_groups(1) == [1, 4]
    with pytest.raises(LayerloopError, match="lacks groups 0, 2-3, 5 of 6"):
        campaign.rollouts(1)
    CampaignBuilder(campaign).put([drawn_group(group) for group in (0, 2, 3, 5)])
    assert candidates(campaign) == before


def test_layouts_of_several_numbers_of_workers_are_read_also_where_they_overlap(campaign: Campaign) -> None:
    """Groups 0 2 4 of two workers, 1 4 and 2 5 of three, 3 of six: earlier versions refused this."""
    before = candidates(campaign)
    for workers, complete in ((2, [0]), (3, [1, 2]), (6, [3])):
        lay_out_by_worker(campaign, 1, workers=workers, complete=complete, keep=True)
    CampaignBuilder(campaign).forget(1)
    assert {name[-8:-5] for name in campaign.store.list(FOLDER) if name.endswith(".json")} == {"f02", "f03", "f06"}
    assert candidates(campaign) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {}}, "has no metadata.groups"),
        ({"metadata": {"groups": [0, 2]}}, "has 3 shards for 2 groups"),
        ({"kind": "policy"}, "is of policy 1, not of rollouts 1"),
        ({"iteration": 7}, "is of rollouts 7, not of rollouts 1"),
    ],
    ids=["none", "fewer", "kind", "iteration"],
)
def test_a_workers_manifest_that_is_damaged_is_refused(
    campaign: Campaign, change: dict[str, Any], message: str
) -> None:
    lay_out_by_worker(campaign, 1, workers=2)
    name = f"{FOLDER}/w00of02.json"
    manifest = Manifest.from_json(campaign.store.read(name), where=name).model_copy(update=change)
    campaign.store.write(name, manifest.to_json())
    with pytest.raises(LayerloopError) as caught:
        campaign.rollouts(1)
    assert str(caught.value).endswith(f"/{name} {message}: delete it to have its groups sampled again")


# ---- damage: one text for it, whoever reads


def spoilt(store: Store, change: Callable[[list[Sample]], list[Sample]]) -> dict[int, Manifest]:
    """Group 1, changed before it was committed."""
    group = drawn_group(1)
    shard = write_shard(store, f"{FOLDER}/g000001.tar", change(list(samples_of(group))))
    return {1: commit_group(store, FOLDER, group.record, shard, model_calls=7)}


def record(index: int, **fields: object) -> Callable[[list[Sample]], list[Sample]]:
    """Change the record of one sample."""

    def change(samples: list[Sample]) -> list[Sample]:
        members = samples[index][1]
        members["json"] = json.dumps(json.loads(members["json"]) | fields).encode()
        return samples

    return change


def member(index: int, suffix: str, data: bytes | None) -> Callable[[list[Sample]], list[Sample]]:
    """Replace or drop one member of one sample."""

    def change(samples: list[Sample]) -> list[Sample]:
        if data is None:
            del samples[index][1][suffix]
        else:
            samples[index][1][suffix] = data
        return samples

    return change


@pytest.mark.parametrize("asked", [{"layers": True}, {"latents": True}], ids=["layers", "latents"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (record(0, iteration=4), "g000001.tar:i000001-g000001 is of iteration 4, not 1: "),
        (record(2, iteration=4), "g000001.tar:i000001-g000001-c01 is of iteration 4, not 1: "),
        (record(0, group=2), "g000001.tar:i000001-g000001 holds the record of i000001-g000002: "),
        (record(1, candidate=1), "i000001-g000001-c00 holds the record of i000001-g000001-c01: "),
        (record(1, group=5), "i000001-g000001-c00 holds the record of i000001-g000005-c00: "),
        (lambda samples: samples[:2], "g000001.tar has 1 candidates, its group's record says 2: "),
        (lambda samples: samples[::2], "i000001-g000001-c01 is where i000001-g000001-c00 should be: "),
        (lambda samples: [samples[0], *samples[:0:-1]], "-g000001-c01 is where i000001-g000001-c00 should be: "),
        (lambda samples: list(samples_of(drawn_group(2))), "i000001-g000002 is where i000001-g000001 should be: "),
        (
            lambda samples: [*samples, *samples_of(drawn_group(2))],
            "i000001-g000002 is where i000001-g000001-c02 should be: ",
        ),
        (lambda samples: samples[1:], "i000001-g000001-c00 is where i000001-g000001 should be: "),
        (lambda samples: [], "g000001.tar is empty: "),
        (record(0, schema_version=2), "i000001-g000001.json has schema_version 2, this version of layerloop reads 1"),
    ],
    ids=[
        "iteration", "candidates-iteration", "group", "candidate", "stranger", "last", "first", "order", "other", "two",
        "headless", "empty", "schema",
    ],
)  # fmt: skip
def test_a_shard_that_does_not_hold_its_group_is_refused(
    tmp_path: Path, change: Callable[[list[Sample]], list[Sample]], message: str, asked: dict[str, bool]
) -> None:
    store = open_store(tmp_path)
    with pytest.raises(LayerloopError) as caught:
        list(read_groups(store, spoilt(store, change), **asked))
    assert message in plain_name(str(caught.value)) and "\n" not in str(caught.value)
    if message.endswith(": "):
        assert str(caught.value).endswith(REMEDY)


def used(group: Group) -> None:
    group.image()
    group.condition(64)
    for candidate in group.candidates:
        candidate.stack(), candidate.window(64), candidate.final(64)


NOISE = np.ones((3, 12, 64), np.float32)
TALL = encode_png(np.zeros((48, 32, 4), np.uint8))
OPAQUE = encode_png(np.zeros((32, 32, 3), np.uint8))
TOO_TALL = "image is 48 x 32, its group's record says 32 x 32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (member(0, "source.png", None), f"i000001-g000001 lacks source.png: {REMEDY}"),
        (member(0, "condition.safetensors", None), f"i000001-g000001 lacks condition.safetensors: {REMEDY}"),
        (member(2, "layer1.png", None), f"i000001-g000001-c01 lacks layer1.png: {REMEDY}"),
        (member(2, "trajectory.safetensors", None), f"c01 lacks trajectory.safetensors: {REMEDY}"),
        (member(0, "source.png", TALL), f"-g000001.source.png: {TOO_TALL}: {REMEDY}"),
        (member(2, "layer1.png", TALL), f"-c01.layer1.png: {TOO_TALL}: {REMEDY}"),
        (member(2, "layer1.png", OPAQUE), f"layer1.png is 32 x 32 x 3, its group's record says 32 x 32 x 4: {REMEDY}"),
        (member(1, "layer0.png", b"pixels"), "c00.layer0.png: image starts with b'pixels', not a known format"),
        (member(1, "trajectory.safetensors", b"latents"), "c00.trajectory.safetensors is not safetensors ("),
        (
            member(1, "trajectory.safetensors", save({"final": NOISE[0]})),
            f"c00.trajectory.safetensors has no tensor 'window': {REMEDY}",
        ),
        (
            member(1, "trajectory.safetensors", save({"final": NOISE[0], "window": NOISE})),
            f"window is 3 x 12 x 64, its record and the model's channels say 2 x 12 x 64: {REMEDY}",
        ),
        (
            member(1, "trajectory.safetensors", save({"final": NOISE[0, :, :32], "window": NOISE[:2]})),
            f"final is 12 x 32, its record and the model's channels say 12 x 64: {REMEDY}",
        ),
        (
            member(1, "trajectory.safetensors", save({"final": NOISE[0], "window": NOISE[:2].astype(np.float64)})),
            f"window is F64, latents are stored in F32: {REMEDY}",
        ),
        (
            member(0, "condition.safetensors", save({"condition": np.full((4, 64), np.inf, np.float32)})),
            "g000001.condition.safetensors condition has NaN or infinite latents: the policy that sampled it has",
        ),
    ],
    ids=[
        "no-source", "no-condition", "no-layer", "no-latents", "source", "layer", "opaque", "pixels", "bytes",
        "no-window", "steps", "channels", "dtype", "infinite",
    ],
)  # fmt: skip
def test_what_is_damaged_in_a_group_is_named_with_the_remedy(
    tmp_path: Path, change: Callable[[list[Sample]], list[Sample]], message: str
) -> None:
    store = open_store(tmp_path)
    with pytest.raises(LayerloopError) as caught:
        for group in read_groups(store, spoilt(store, change), layers=True, latents=True):
            used(group)
    assert message in str(caught.value) and "\n" not in str(caught.value)
