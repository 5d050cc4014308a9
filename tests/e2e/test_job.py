"""The job: `layerloop demo` runs the compiled pipeline, iterations resident; run again it continues its campaign."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from layerloop.components.storage.campaign import Campaign
from layerloop.pipelines.packages import count_tasks

# The tiny recipe, smaller still: what is tested is that everything fits together, not that it learns.
SMALL = {
    "rollout.groups": 3,
    "rollout.group_size": 4,
    "rollout.steps": 4,
    "rollout.window.size": 2,
    "rollout.max_layers": 3,
    "evaluation.steps": 3,
    "evaluation.layers": "[2, 3]",
    "evaluation.designs": 4,
    "evaluation.pictures": 2,
}


def layerloop(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "layerloop.pipelines.cli", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900)


@dataclass
class Demo:
    folder: Path
    output: str  # what it printed

    @property
    def campaign(self) -> Campaign:
        return Campaign.open(str(self.folder / "campaign"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo run once, for one iteration."""
    folder = tmp_path_factory.mktemp("demo")
    return Demo(folder, run_demo(folder))


def run_demo(folder: Path) -> str:
    sets = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    # One worker: each of two would import torch for itself, in two steps. What ranks do, their own tests say.
    result = layerloop("demo", "--folder", str(folder), "--iterations", "1", "--workers", "1", *sets)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


pytestmark = pytest.mark.timeout(1800)


def paths_named_in(output: str) -> dict[str, Path]:
    return {kind: Path(path) for kind, path in re.findall(r"^(report|adapter) +(/\S+)$", output, re.MULTILINE)}


def test_it_ends_by_naming_a_report_and_an_adapter_that_are_there(demo: Demo) -> None:
    named = paths_named_in(demo.output)
    assert named["report"].read_text().lstrip().lower().startswith("<!doctype html>")
    with safe_open(named["adapter"] / "peft" / "adapter_model.safetensors", "np") as weights:
        assert any("lora_A" in key for key in weights.keys())  # noqa: SIM118
    assert (named["adapter"] / "pytorch_lora_weights.safetensors").exists()
    assert (named["adapter"] / "README.md").exists()


def test_it_says_that_the_judge_is_rules(demo: Demo) -> None:
    assert "layerloop-reference-judge: rules over pixels" in demo.output
    assert "layerloop-reference-judge" in paths_named_in(demo.output)["report"].read_text()


def test_it_ran_what_was_compiled(demo: Demo) -> None:
    headers = [line for line in demo.output.splitlines() if line.startswith("[")]
    (package, *_) = sorted((demo.folder / "runs").glob("*/pipeline.yaml"))
    spec = next(yaml.safe_load_all(package.read_text()))
    assert len(headers) == count_tasks(spec) == 4
    assert {header.split("] ")[1] for header in headers} == {
        "shard dataset",
        "iteration 1: train",
        "iteration 1: evaluate adapter",
        "iteration 1: publish adapter",
    }


def test_an_iteration_is_committed_with_all_its_groups(demo: Demo) -> None:
    assert len(demo.campaign.rollouts(1)) == 3
    assert demo.campaign.scores(1).counts["candidates"] == 12
    assert "iteration-000001" in demo.campaign.evaluations()
    assert len(demo.campaign.published()) == 1


def test_pictures_are_photographs_and_designs_and_the_held_out_designs_have_their_layers(demo: Demo) -> None:
    counts = demo.campaign.sources().counts
    assert counts["train"] + counts["holdout"] + counts["duplicates"] == 103
    assert counts["designs"] == 48
    assert counts["rejects"] == 0


def test_nothing_of_the_run_is_world_knowledge(demo: Demo) -> None:
    """The artifacts that pass between steps are small manifests; the shards are in the campaign."""
    artifacts = [path for path in (demo.folder / "runs").glob("*/artifacts/**/*") if path.is_file()]
    manifests = [path for path in artifacts if path.name in ("sources", "rollouts", "scores", "policy", "adapter")]
    assert len(manifests) == 4
    assert all(path.stat().st_size < 64_000 for path in manifests)


def test_the_campaign_can_be_shown_as_a_table(demo: Demo) -> None:
    result = layerloop("campaign", "show", str(demo.folder / "campaign"))
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if "done" in line]
    assert [row[0] for row in rows] == ["1"]
    assert "head       iteration 1" in result.stdout
    rewards = [float(row[4]) for row in rows]
    assert all(0 <= reward <= 1 for reward in rewards)


def test_another_recipe_is_refused_with_the_field_that_differs_and_nothing_changes(demo: Demo) -> None:
    before = snapshot(demo.folder / "campaign")
    result = layerloop("demo", "--folder", str(demo.folder), "--iterations", "1")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: shard dataset: campaign ")
    assert "rollout.groups: 3 -> 6" in line
    assert snapshot(demo.folder / "campaign") == before


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_fresh_starts_anew_and_keeps_the_pictures(demo: Demo, tmp_path: Path) -> None:
    """Checked on a folder that only looks like a demo, and up to the first refusal."""
    folder = tmp_path / "demo"
    (folder / "campaign").mkdir(parents=True)
    (folder / "campaign" / "recipe.json").write_text("{}")
    (folder / "campaign" / "left").write_text("x")
    (folder / "images").symlink_to(demo.folder / "images")
    (folder / "designs.parquet").symlink_to(demo.folder / "designs.parquet")
    result = layerloop("demo", "--fresh", "--folder", str(folder), "--judge-url", "http://127.0.0.1:9/v1")
    assert result.returncode == 2
    assert "does not answer" in result.stderr
    assert not (folder / "campaign").exists()
    assert (folder / "images").exists()


def test_fresh_removes_nothing_that_is_no_campaign(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    result = layerloop("demo", "--fresh", "--folder", str(tmp_path), "--campaign", str(tmp_path / "thesis"))
    assert result.returncode == 2
    assert "is no campaign" in result.stderr
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_metrics_are_in_the_output_files_that_kubeflow_reads(demo: Demo) -> None:
    outputs = list((demo.folder / "runs").glob("*/artifacts/**/executor_output.json"))
    assert len(outputs) == 4
    for path in outputs:
        told: Any = json.loads(path.read_text())
        metrics = told["artifacts"]["metrics"]["artifacts"][0]["metadata"]
        assert metrics, path
        assert all(isinstance(value, int | float) for value in metrics.values())


@pytest.mark.slow
def test_run_again_it_continues_from_the_head(demo: Demo) -> None:
    """The last test of this file: the others count one run."""
    output = run_demo(demo.folder)
    assert "iteration 2: train" in output
    assert "made 7 photographs" in demo.output
    assert "made 7 photographs" not in output
    campaign = demo.campaign
    assert campaign.head() == 2
    adapters = [campaign.policy(k).metadata["adapter_sha256"] for k in (1, 2)]
    assert adapters[0] != adapters[1]
    assert set(campaign.evaluations()) >= {"iteration-000001", "iteration-000002"}
    assert len(campaign.published()) == 2
    assert paths_named_in(output)["report"] != paths_named_in(demo.output)["report"]
