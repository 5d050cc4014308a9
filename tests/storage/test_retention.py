"""Retention removes what a campaign no longer needs, at whatever instant it is killed, and nobody misses it."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from layerloop.components.generate_rollouts.step import run as generate_rollouts
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import File
from layerloop.components.schema.recipe import RetentionRecipe
from layerloop.components.score_rollouts.step import run as score_rollouts
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.lease import EVALUATION, Timing, hold
from layerloop.components.storage.manifests import read_file, verify
from layerloop.components.storage.removals import record_removal
from layerloop.components.storage.retention import apply_retention, collect_garbage, garbage
from layerloop.components.storage.rollouts import manifest_name, read_groups
from layerloop.components.storage.verification import repair_campaign, verify_campaign
from layerloop.pipelines.cli import main

from ..campaigns import CampaignBuilder, drawn_group
from .test_verification import RECIPE, adapters


def quiet(line: str) -> None:
    pass


def fill(uri: str, iterations: int = 5, **retention: int) -> CampaignBuilder:
    """So many finished iterations, with a reply each, and one more that is sampled."""
    lab = CampaignBuilder.begin(uri, {**RECIPE, "retention": retention})
    sha256: str | None = None
    for iteration in range(1, iterations + 2):
        lab.put([drawn_group(group, iteration=iteration, adapter_sha256=sha256) for group in range(2)])
        lab.store.write(f"{lab.campaign.scores_dir(iteration)}/replies/{'a' * 64}.json", b"paid for")
        if iteration <= iterations:
            lab.scores(iteration, images=[f"{group:016x}" for group in range(2)], layers=[1, 2])
            sha256 = adapters(lab, iteration, sha256)
    return lab


def kept(campaign: Campaign) -> dict[str, list[int]]:
    """Iterations whose shards, adapters and replies are there."""
    found: dict[str, list[int]] = {"rollouts": [], "policy": [], "replies": []}
    for iteration in campaign.iterations():
        names = campaign.store.list(f"iterations/{iteration:06d}/")
        for what, ending in (("rollouts", ".tar"), ("policy", ".safetensors"), ("replies", ".json")):
            if any(f"/{what}/" in name and name.endswith(ending) for name in names):
                found[what].append(iteration)
    return found


def test_without_retention_everything_stays(tmp_path: Path) -> None:
    campaign = fill(str(tmp_path / "c")).campaign
    before = campaign.store.sizes()
    apply_retention(campaign, log=quiet)
    assert campaign.store.sizes() == before and garbage(campaign, campaign.recipe.retention) == []


def test_the_last_iterations_and_every_mth_policy_stay(store_uri: str) -> None:
    campaign = fill(store_uri, 5, trajectories=2, policies=2, replies=1).campaign
    said: list[str] = []
    apply_retention(campaign, log=said.append)
    assert kept(campaign) == {"rollouts": [4, 5, 6], "policy": [2, 4, 5], "replies": [5, 6]}
    assert len(said) == 1 and said[0].startswith("retention: removed 14 objects of past iterations")
    found = verify_campaign(campaign, log=quiet)
    assert (found.faults, found.orphans) == ({}, {}) and len(found.removed) == 10
    assert any("10 objects of past iterations" in line for line in found.lines())
    assert [campaign.scores(iteration).iteration for iteration in range(1, 6)] == [1, 2, 3, 4, 5]
    apply_retention(campaign, log=said.append)  # nothing is left to do
    assert len(said) == 1


def test_what_was_evaluated_or_published_keeps_its_policy(tmp_path: Path) -> None:
    from layerloop.components.schema.manifest import Manifest

    lab = fill(str(tmp_path / "c"), 5, policies=100)
    lab.store.write("evaluations/iteration-000002/0123456789abcdef/metrics.json", b"{}")  # begun
    lab.campaign.commit("published/best", Manifest(kind="published", iteration=1))
    apply_retention(lab.campaign, log=quiet)
    assert kept(lab.campaign)["policy"] == [1, 2, 4, 5]


def test_while_another_run_evaluates_no_policy_goes(tmp_path: Path) -> None:
    campaign = fill(str(tmp_path / "c"), 5, trajectories=1, policies=100).campaign
    with hold(campaign.store, EVALUATION, log=quiet, run="another"):
        apply_retention(campaign, log=quiet)
    assert kept(campaign)["policy"] == [1, 2, 3, 4, 5] and kept(campaign)["rollouts"] == [5, 6]
    apply_retention(campaign, log=quiet)
    assert kept(campaign)["policy"] == [4, 5]


def test_an_iteration_without_a_policy_keeps_all(tmp_path: Path) -> None:
    lab = fill(str(tmp_path / "c"), 5, trajectories=1, policies=100, replies=1)
    lab.store.delete(f"{lab.campaign.policy_dir(2)}/{MANIFEST}")  # a hole
    apply_retention(lab.campaign, log=quiet)
    assert kept(lab.campaign) == {"rollouts": [2, 5, 6], "policy": [2, 4, 5], "replies": [2, 5, 6]}


KILLED = """
import os, signal, sys
from layerloop.components.storage import local, retention, s3
from layerloop.components.storage.campaign import Campaign

left = int(sys.argv[2])
def killing(method):
    def wrapped(self, name, *rest):
        global left
        if name.startswith("iterations/"):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return method(self, name, *rest)
    return wrapped
for store in (local.LocalStore, s3.S3Store):
    store.delete, store.write = killing(store.delete), killing(store.write)
retention.apply_retention(Campaign.open(sys.argv[1]), log=print)
"""


@pytest.mark.parametrize(
    ("store_uri", "changes"), [("folder", 0), ("folder", 2), ("folder", 7), ("s3", 2)], indirect=["store_uri"]
)
def test_after_a_kill_at_any_change_nothing_is_missing_and_the_next_update_completes_it(
    store_uri: str, changes: int
) -> None:
    lab = fill(store_uri, 4, trajectories=1, policies=100)
    done = subprocess.run([sys.executable, "-c", KILLED, lab.uri, str(changes)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = verify_campaign(lab.campaign, log=quiet)
    assert (found.faults, found.orphans) == ({}, {})
    apply_retention(lab.campaign, log=quiet)
    assert kept(lab.campaign)["rollouts"] == [4, 5] and kept(lab.campaign)["policy"] == [3, 4]
    assert verify_campaign(lab.campaign, log=quiet).sound


def test_a_removed_iteration_is_still_committed_and_says_what_became_of_it(tmp_path: Path) -> None:
    campaign = fill(str(tmp_path / "c"), 4, trajectories=1, policies=100).campaign
    apply_retention(campaign, log=quiet)
    groups = campaign.rollouts(1)
    for manifest in (*groups.values(), campaign.policy(1)):
        verify(campaign.store, manifest)
    assert campaign.already_committed(campaign.policy_dir(1), log=quiet) == campaign.policy(1)
    with pytest.raises(LayerloopError, match="was removed by the campaign's retention"):
        list(read_groups(campaign.store, groups))
    with pytest.raises(LayerloopError, match="was removed by the campaign's retention"):
        read_file(campaign.store, campaign.policy(1).files[0])
    with pytest.raises(LayerloopError, match="iteration 1 of .* has its policy, so it is not sampled or scored again"):
        campaign.check_unfinished(1)
    campaign.check_unfinished(5)


def test_an_iteration_that_has_its_policy_is_neither_sampled_nor_scored_again(tmp_path: Path) -> None:
    """Not even what is missing of it: the policy was learnt from what was there."""
    lab = fill(str(tmp_path / "c"), 2)
    lab.sources(train=[np.full((64, 64, 3), value, np.uint8) for value in (0, 255)])
    campaign = lab.campaign
    for name in (manifest_name(campaign.rollouts_dir(1), 0), f"{campaign.scores_dir(1)}/{MANIFEST}"):
        campaign.store.delete(name)
    before = [name for name in campaign.store.list() if not name.startswith("lease/")]
    for step in (generate_rollouts, functools.partial(score_rollouts, judge_url="http://127.0.0.1:9/v1")):
        with pytest.raises(LayerloopError, match="iteration 1 of .* has its policy, so it is not sampled or scored"):
            step(campaign=campaign.uri, iteration=1)
    assert [name for name in campaign.store.list() if not name.startswith("lease/")] == before


def test_what_no_record_names_is_missing(tmp_path: Path) -> None:
    campaign = fill(str(tmp_path / "c"), 4, trajectories=1).campaign
    apply_retention(campaign, log=quiet)
    gone = campaign.rollouts(4)[0]
    campaign.store.delete(gone.shards[0].name)
    with pytest.raises(LayerloopError, match="is missing but a rollouts manifest names it"):
        verify(campaign.store, gone)
    assert list(verify_campaign(campaign, log=quiet).faults) == [gone.shards[0].name]


@pytest.mark.parametrize(
    ("folder", "fault"),
    [
        ("iterations/000005/rollouts", "which the next step needs"),
        ("iterations/000004/policy", "which the next step needs"),
        ("iterations/000002/rollouts", "which no manifest names so"),
    ],
)
def test_a_record_of_what_may_not_go_is_a_fault(tmp_path: Path, folder: str, fault: str) -> None:
    campaign = fill(str(tmp_path / "c"), 4).campaign
    manifest = campaign.policy(4) if folder.endswith("policy") else campaign.rollouts(int(folder[11:17]))[0]
    file = (*manifest.shards, *manifest.files)[0]
    sha256 = "0" * 64 if "000002" in folder else file.sha256
    record_removal(campaign.store, folder, [File(name=file.name, bytes=file.bytes, sha256=sha256)])
    found = verify_campaign(campaign, log=quiet)
    assert list(found.faults) == [f"{folder}/removed.json"] and fault in next(iter(found.faults.values()))


def test_a_store_that_refuses_does_not_stop_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = fill(str(tmp_path / "c"), 3, trajectories=1).campaign

    def refuse(name: str) -> None:
        raise LayerloopError(f"{name} cannot be deleted (Access Denied): allow it")

    monkeypatch.setattr(campaign.store, "delete", refuse)
    said: list[str] = []
    apply_retention(campaign, log=said.append)
    assert len(said) == 1 and "Access Denied" in said[0] and "layerloop campaign gc" in said[0]
    monkeypatch.undo()
    apply_retention(campaign, log=quiet)
    assert kept(campaign)["rollouts"] == [3, 4]


def test_gc_is_a_dry_run_until_it_is_told_to_delete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = fill(str(tmp_path / "c"), 4)
    before = lab.store.sizes()
    assert main(["campaign", "gc", lab.uri, "--trajectories", "1", "--policies", "2"]) == 0
    assert lab.store.sizes() == before
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("iterations/000001/policy: 2 objects") and said[-1].startswith("8 objects")
    assert said[-1].endswith("nothing was removed, --delete does")
    assert main(["campaign", "gc", lab.uri, "--trajectories", "1", "--policies", "2", "--delete"]) == 0
    assert kept(lab.campaign) == {"rollouts": [4, 5], "policy": [2, 3, 4], "replies": [1, 2, 3, 4, 5]}
    assert capsys.readouterr().out.splitlines()[-1].startswith("removed 8 objects")
    assert main(["campaign", "verify", lab.uri]) == 0
    assert main(["campaign", "gc", lab.uri, "--trajectories", "0"]) == 2
    assert "trajectories" in capsys.readouterr().err


def test_gc_removes_what_no_manifest_names_where_work_has_ended(tmp_path: Path) -> None:
    lab = fill(str(tmp_path / "c"), 2)
    loser = f"{lab.campaign.rollouts_dir(1)}/g000000-{'0' * 16}.tar"  # of an attempt that was slower
    begun = f"{lab.campaign.rollouts_dir(3)}/g000001-{'0' * 16}.tar"  # may be taken up
    for name in (loser, begun, "evaluations/iteration-000002/0123456789abcdef/a.png"):
        lab.store.write(name, b"x")
    before = lab.store.list()
    removed = collect_garbage(lab.campaign, RetentionRecipe(), log=quiet)
    assert [list(one.objects) for one in removed] == [[loser]]
    left = [name for name in lab.store.list() if not name.startswith("lease/")]
    assert left == [name for name in before if name != loser]


def test_gc_removes_nothing_beside_a_damaged_manifest(tmp_path: Path) -> None:
    lab = fill(str(tmp_path / "c"), 2)
    lab.store.write(f"{lab.campaign.rollouts_dir(1)}/g000000-{'0' * 16}.tar", b"x")
    lab.store.write(f"{lab.campaign.rollouts_dir(1)}/g000001.json", b"{")
    before = lab.store.sizes()
    with pytest.raises(LayerloopError, match=r"g000001\.json: is not JSON.*layerloop campaign verify"):
        garbage(lab.campaign, RetentionRecipe())
    assert lab.store.sizes() == before


def test_gc_waits_for_a_run_that_writes(tmp_path: Path) -> None:
    lab = fill(str(tmp_path / "c"), 3)
    hasty = Timing(poll=0.01, patience=0.05)
    with (
        hold(lab.store, log=quiet, run="another"),
        pytest.raises(LayerloopError, match="is held by run another"),
    ):
        collect_garbage(lab.campaign, RetentionRecipe(trajectories=1), log=quiet, timing=hasty)
    assert kept(lab.campaign)["rollouts"] == [1, 2, 3, 4]


def test_repair_leaves_the_record_and_finds_nothing_to_mend(tmp_path: Path) -> None:
    campaign = fill(str(tmp_path / "c"), 4, trajectories=1).campaign
    apply_retention(campaign, log=quiet)
    before = campaign.store.sizes("iterations/")
    repair_campaign(campaign, log=quiet)
    assert campaign.store.sizes("iterations/") == before
