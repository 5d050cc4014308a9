"""Each shard is fetched by one rank, which sends to the others what they learn from."""

from __future__ import annotations

import pytest
import torch

from layerloop.components.update_lora.trajectories import Expected, Trajectories, read_shards, reader_of
from layerloop.components.update_lora.trajectories import _trajectories_of as trajectories_of

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


@pytest.mark.parametrize("kept", [False, True])
def test_what_is_sent_to_another_rank_is_what_it_would_have_read(make_lab: MakeLab, kept: bool) -> None:
    lab = make_lab(rollout={"groups": 1, "keep_velocities": kept})
    lab.rollouts(1)
    group = read_shards(lab.store, lab.campaign.rollouts(1), {0: 0}, 0)[0]
    expected = Expected(
        1, group.record.base_fingerprint, None, "grpo", group.record.window_size,
        velocities=kept, token_pixels=16, channels=64,
    )  # fmt: skip
    read = trajectories_of(group, {1, 3}, expected)
    received = Trajectories.of(read.arrays(), [1, 3])
    assert received.record == read.record and received.trajectories.keys() == read.trajectories.keys() == {1, 3}
    for candidate, one in read.trajectories.items():
        other = received.trajectories[candidate]
        assert (other.seed, other.rows) == (one.seed, one.rows) and torch.equal(other.latents, one.latents)
        assert (one.velocities is not None) == (other.velocities is not None) == kept == bool(one.rows)
        if one.velocities is not None and other.velocities is not None:
            assert torch.equal(other.velocities, one.velocities)
