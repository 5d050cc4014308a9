"""Each shard is fetched by one rank."""

from __future__ import annotations

from layerloop.components.update_lora.trajectories import read_shards, reader_of

from .conftest import MakeLab


def test_a_shard_is_read_once_and_by_nobody_who_does_not_need_to(make_lab: MakeLab) -> None:
    lab = make_lab(rollout={"groups": 4})
    lab.rollouts(1)
    manifests = lab.campaign.rollouts(1)
    wanted = [{0: {0, 1}, 1: {2}, 3: {0}}, {0: {2, 3}, 3: {1}}]
    readers = reader_of(manifests, wanted)
    assert set(readers) == {0, 1, 3}, "nobody learns from group 2"
    read = [set(read_shards(lab.store, manifests, readers, rank)) for rank in range(2)]
    assert read[0] | read[1] == {0, 1, 3} and not read[0] & read[1]
