"""Bad input, through the command line as a user types it: one clear line, status 2, nothing committed."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from layerloop.pipelines.inputs import packaged_recipes

from ..judge_server import start_in_thread


@pytest.fixture(scope="module")
def judge_url() -> Iterator[str]:
    with start_in_thread() as url:
        yield url


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images that differ."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 96)).save(folder / f"{number}.png")
    return folder


def refused(*arguments: str, campaign: Path) -> str:
    """The one line of a refused command, with nothing left in its campaign but the table of rejects."""
    command = [sys.executable, "-m", "layerloop.pipelines.cli", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2, result.stdout + result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    committed = [path for path in campaign.rglob("*") if path.is_file()] if campaign.exists() else []
    assert {path.name for path in committed} <= {"rejects.parquet"}
    return lines[0]


def run_on(images: Path, judge_url: str, tmp_path: Path, *more: str) -> str:
    campaign = tmp_path / "campaign"
    arguments = ["run", "--images", str(images), "--campaign", str(campaign), "--runs", str(tmp_path / "runs")]
    return refused(*arguments, "--judge-url", judge_url, *more, campaign=campaign)


def test_a_missing_folder(tmp_path: Path, judge_url: str) -> None:
    line = run_on(tmp_path / "nowhere", judge_url, tmp_path)
    assert line.startswith("error: shard dataset: images ")
    assert str(tmp_path / "nowhere") in line


def test_an_empty_folder(tmp_path: Path, judge_url: str) -> None:
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in run_on(tmp_path / "empty", judge_url, tmp_path)


def test_an_image_that_is_text(tmp_path: Path, images: Path, judge_url: str) -> None:
    (images / "4.png").write_text("not an image")
    line = run_on(images, judge_url, tmp_path)
    assert "1 of 5" in line
    assert "max_reject_fraction" in line
    assert (tmp_path / "campaign" / "sources" / "rejects.parquet").exists()


def test_a_recipe_with_a_misspelt_key(tmp_path: Path, images: Path, judge_url: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(packaged_recipes()["tiny"].replace("rollout:", "rolout:"))
    line = run_on(images, judge_url, tmp_path, "--recipe", str(recipe))
    assert line == "error: recipe.rolout is not a known key: did you mean 'rollout'?"


def test_a_window_larger_than_the_steps(tmp_path: Path, images: Path, judge_url: str) -> None:
    line = run_on(images, judge_url, tmp_path, "--set", "rollout.window.size=12")
    assert line == "error: recipe.rollout.window.size is 12 but steps is 8: choose 1..7"


def test_a_group_of_one(tmp_path: Path, images: Path, judge_url: str) -> None:
    line = run_on(images, judge_url, tmp_path, "--set", "rollout.group_size=1")
    assert line.startswith("error: recipe.rollout.group_size is 1: ")


def test_a_recipe_that_is_not_there(tmp_path: Path, images: Path, judge_url: str) -> None:
    line = run_on(images, judge_url, tmp_path, "--recipe", "tiy")
    assert line.startswith("error: recipe tiy cannot be read (No such file or directory): name a YAML file or one of ")


def test_a_rubric_without_the_text_of_the_method_in_use(tmp_path: Path, images: Path, judge_url: str) -> None:
    shipped = (resources.files("layerloop.components.judge") / "rubrics" / "default.yaml").read_text()
    rubric = tmp_path / "mine.yaml"
    rubric.write_text(re.sub(r"\npairwise: \|\n(  .*\n)+", "\n", shipped))
    line = run_on(
        images, judge_url, tmp_path, "--set", f"judge.rubric={rubric}", "--set", "judge.phase2.method=pairwise"
    )
    assert "rubric default has no text pairwise, which recipe.judge.phase2.method pairwise needs" in line


def test_a_judge_that_refuses_connections(tmp_path: Path, images: Path) -> None:
    line = run_on(images, "http://127.0.0.1:9/v1", tmp_path)
    assert line.startswith("error: judge http://127.0.0.1:9/v1 does not answer")


def test_a_judge_that_is_no_url(tmp_path: Path, images: Path) -> None:
    assert "judge URL is 'localhost:8788'" in run_on(images, "localhost:8788", tmp_path)


def test_no_judge_at_all(tmp_path: Path, images: Path) -> None:
    campaign = tmp_path / "campaign"
    line = refused("run", "--images", str(images), "--campaign", str(campaign), campaign=campaign)
    assert line.startswith("error: --judge-url is empty")


def test_a_model_that_the_judge_does_not_serve(tmp_path: Path, images: Path, judge_url: str) -> None:
    line = run_on(images, judge_url, tmp_path, "--set", "judge.model=qwen")
    assert "recipe.judge.model is 'qwen'" in line
    assert "layerloop-reference-judge" in line


def test_more_iterations_than_a_run_on_a_cluster_carries(tmp_path: Path) -> None:
    arguments = ["compile", "-o", str(tmp_path / "train.yaml"), "--iterations", "100"]
    line = refused(*arguments, campaign=tmp_path / "none")
    assert line.endswith("choose at most 9 iterations and chain runs, or --resident")
    assert not (tmp_path / "train.yaml").exists()


def test_a_campaign_that_is_not_there(tmp_path: Path) -> None:
    line = refused("campaign", "show", str(tmp_path / "none"), campaign=tmp_path / "none")
    assert "has no recipe.json" in line
