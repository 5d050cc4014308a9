"""Studies: arms are valid recipes, runs are ordered fairly, intervals are Student's."""

from __future__ import annotations

import importlib
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from layerloop.components.reference_judge.identity import NAME
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import parse_recipe
from layerloop.components.storage.campaign import Campaign
from layerloop.pipelines.research.arms import ARMS, Run, Study, merged, plan
from layerloop.pipelines.research.outcomes import interval
from layerloop.pipelines.research.study import Commands, advance, study_recipe


def study(folder: Path) -> Study:
    return Study(
        folder=folder, recipe=study_recipe(), iterations=2, images=folder / "i",
        designs=folder / "d", judge_urls={},
    )  # fmt: skip


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_valid_recipe_that_changes_what_it_says(arm: str, tmp_path: Path) -> None:
    changed = parse_recipe(study(tmp_path).recipe_of(Run(arm, 2)))
    assert changed.seed == 2
    full = parse_recipe(study(tmp_path).recipe_of(Run("full", 2)))
    assert (changed == full) == (arm == "full")
    assert changed.model.base == ("tiny" if arm == "shipped_base" else "tiny-faulty")


def test_the_arms_that_the_results_need_have_three_seeds() -> None:
    assert all(ARMS[arm].seeds >= 3 for arm in ("full", "phase1_only", "mean_ratio", "nft"))


def test_first_seeds_of_all_arms_come_first() -> None:
    assert plan(["full", "nft", "eta_low"]) == [
        Run("full", 0), Run("nft", 0), Run("eta_low", 0), Run("full", 1), Run("nft", 1), Run("full", 2), Run("nft", 2),
        Run("full", 3), Run("full", 4),
    ]  # fmt: skip


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(LayerloopError, match="arm fulll is not known: choose from full"):
        plan(["fulll"])


def test_changes_are_laid_over_section_by_section() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}, "e": {"f": 4}}) == {
        "a": {"b": 9, "c": 2}, "d": 3, "e": {"f": 4},
    }  # fmt: skip


def test_the_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.303 * 1.0 / math.sqrt(3))
    assert interval([5.0]).half is None


def test_what_a_run_asks_of_its_steps_is_what_their_commands_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of a run, up to the refusal of the campaign that is not there; a wrong option would come first."""
    commands: list[list[str]] = []

    def record(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if command[2].endswith("shard_dataset"):
            Campaign.create_or_open(str(tmp_path / "full-0"), parse_recipe(study_recipe()))
        if command[2].endswith("train_stretch"):
            monkeypatch.setattr(Campaign, "head", lambda campaign: 2)
        return subprocess.CompletedProcess(command, 0, '{"metrics": {"reward_mean": 0.5}}\n')

    monkeypatch.setattr(subprocess, "run", record)
    one = replace(study(tmp_path), judge_urls={NAME: "http://127.0.0.1:9/v1"})
    advance(one, Run("full", 0), Commands(tmp_path / "log", 1), math.inf)
    steps = [command[2].rpartition(".")[2] for command in commands]
    assert steps == ["shard_dataset", "train_stretch", "evaluate_adapter"]
    assert "--samplers" in commands[-1]
    for step, command in zip(steps, commands, strict=True):
        options = ["--campaign", str(tmp_path / "none"), *command[5:]]
        assert command[3] == "--campaign"
        main = importlib.import_module(f"layerloop.components.{step}.step").main
        try:
            status = main(argv=options)
        except SystemExit:  # of the command line itself
            pytest.fail(capsys.readouterr().err)
        assert status and str(tmp_path) in capsys.readouterr().err
