"""Velocities that the sampler kept: taken where the learner would compute the same, and never where not."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from safetensors.torch import load, save

from layerloop.components.storage.shards import Sample
from layerloop.components.update_lora.step import run

from ..campaigns import CampaignBuilder
from .conftest import MakeLab

KEPT = {"keep_velocities": True, "groups": 6}
Change = Callable[[list[Sample]], list[Sample]]


def other_velocities(group: str = "", *, rows: int = 0) -> Change:
    """Change the kept velocities of all groups, or of one, as another kernel may; `rows` more are said to have been in
    their passes."""

    def change(samples: list[Sample]) -> list[Sample]:
        for key, members in samples:
            if "trajectory.safetensors" in members and key.startswith(group):
                tensors = load(members["trajectory.safetensors"])
                tensors["velocities"] *= 1 + 2**-20
                tensors["rows"] += rows
                members["trajectory.safetensors"] = save(tensors)
        return samples

    return change


def learn(lab: CampaignBuilder, capsys: pytest.CaptureFixture[str], change: Change | None, last: int = 1) -> int:
    """Passes of the `last` iteration that kept velocities saved."""
    for iteration in range(1, last + 1):
        lab.rollouts(iteration, change=change)
        lab.scores(iteration)
        capsys.readouterr()
        run(campaign=lab.uri)
    found = re.search(r"anchors: (\d+) of \d+ passes saved", capsys.readouterr().err)
    assert found
    return int(found[1])


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        pytest.param(other_velocities(), 0, id="of-another-kernel"),
        pytest.param(other_velocities("i000001-g000005", rows=1), 3, id="of-passes-of-another-size"),
    ],
)
def test_kept_velocities_save_passes_and_change_no_bit(
    make_lab: MakeLab, capsys: pytest.CaptureFixture[str], change: Change, passes: int
) -> None:
    """Groups 1, 3 and 5 are of the second optimizer step, of one shape: a pass for each of two timesteps."""
    kept, others = (make_lab(name, rollout=KEPT, update={"steps": 2}) for name in ("kept", "others"))
    assert learn(kept, capsys, None) == 5, "the first is computed, to compare"
    assert learn(others, capsys, change) == passes
    assert kept.adapter_weights(1) == others.adapter_weights(1), "what is learned from does not depend on it"


def test_velocities_of_a_policy_that_lags_behind_are_its_own(
    make_lab: MakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    rollout = KEPT | {"groups": 2, "lag": 1}
    kept, others = (
        make_lab(name, rollout=rollout, update={"steps": 1, "learning_rate": 0.01}) for name in ("kept", "others")
    )
    assert learn(kept, capsys, None, last=2) == 2, "of two shapes one pass each is saved"
    assert learn(others, capsys, other_velocities(), last=2) == 0
    assert kept.adapter_weights(2) == others.adapter_weights(2)
