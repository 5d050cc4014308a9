"""Bad input, through the command line as a user types it: one clear line, status 2, nothing committed."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from warm_python import warm

from layerloop.pipelines import cli
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


@dataclass(frozen=True)
class Refused:
    """A command that is refused, and its one line; nothing is left in its campaign but the table of rejects.

    It runs in this process, which has the libraries already, or in one of its own, as a user's does.
    """

    folder: Path
    judge_url: str
    capsys: pytest.CaptureFixture[str]

    @property
    def campaign(self) -> Path:
        return self.folder / "campaign"

    def __call__(self, *arguments: str, own_process: bool = False) -> str:
        if own_process:
            command = [sys.executable, "-m", "layerloop.pipelines.cli", *arguments]
            result = subprocess.run(command, capture_output=True, text=True, timeout=300)
            status, errors = result.returncode, result.stderr
        else:
            status, errors = cli.main(arguments), self.capsys.readouterr().err
        assert status == 2, errors
        (line,) = errors.splitlines()
        assert line.startswith("error: ")
        committed = [path for path in self.campaign.rglob("*") if path.is_file()] if self.campaign.exists() else []
        assert {path.name for path in committed} <= {"rejects.parquet"}
        return line

    def run(self, images: Path, *more: str, judge_url: str | None = None, own_process: bool = False) -> str:
        url = self.judge_url if judge_url is None else judge_url
        arguments = ["--images", str(images), "--campaign", str(self.campaign), "--runs", str(self.folder / "runs")]
        return self("run", *arguments, "--judge-url", url, *more, own_process=own_process)


@pytest.fixture
def refused(
    tmp_path: Path, judge_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Refused]:
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield Refused(tmp_path, judge_url, capsys)
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_a_missing_folder(refused: Refused, tmp_path: Path) -> None:
    line = refused.run(tmp_path / "nowhere", own_process=True)
    assert line.startswith("error: shard dataset: images ")
    assert str(tmp_path / "nowhere") in line


def test_an_empty_folder(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused.run(tmp_path / "empty")


def test_an_image_that_is_text(refused: Refused, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", warm())  # of the step, which has checked the base by then
    (images / "4.png").write_text("not an image")
    line = refused.run(images)
    assert "1 of 5" in line
    assert "max_reject_fraction" in line
    assert (tmp_path / "campaign" / "sources" / "rejects.parquet").exists()


def test_a_recipe_with_a_misspelt_key(refused: Refused, tmp_path: Path, images: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(packaged_recipes()["tiny"].replace("rollout:", "rolout:"))
    line = refused.run(images, "--recipe", str(recipe))
    assert line == "error: recipe.rolout is not a known key: did you mean 'rollout'?"


def test_a_window_larger_than_the_steps(refused: Refused, images: Path) -> None:
    line = refused.run(images, "--set", "rollout.window.size=12")
    assert line == "error: recipe.rollout.window.size is 12 but steps is 8: choose 1..7"


def test_a_group_of_one(refused: Refused, images: Path) -> None:
    line = refused.run(images, "--set", "rollout.group_size=1")
    assert line.startswith("error: recipe.rollout.group_size is 1: ")


def test_a_recipe_that_is_not_there(refused: Refused, images: Path) -> None:
    line = refused.run(images, "--recipe", "tiy")
    assert line.startswith("error: recipe tiy cannot be read (No such file or directory): name a YAML file or one of ")


def test_a_rubric_without_the_text_of_the_method_in_use(refused: Refused, tmp_path: Path, images: Path) -> None:
    shipped = (resources.files("layerloop.components.judge") / "rubrics" / "default.yaml").read_text()
    rubric = tmp_path / "mine.yaml"
    rubric.write_text(re.sub(r"\npairwise: \|\n(  .*\n)+", "\n", shipped))
    line = refused.run(images, "--set", f"judge.rubric={rubric}", "--set", "judge.phase2.method=pairwise")
    assert "rubric default has no text pairwise, which recipe.judge.phase2.method pairwise needs" in line


def test_a_judge_that_refuses_connections(refused: Refused, images: Path) -> None:
    line = refused.run(images, judge_url="http://127.0.0.1:9/v1")
    assert line.startswith("error: judge http://127.0.0.1:9/v1 does not answer")


def test_a_judge_that_is_no_url(refused: Refused, images: Path) -> None:
    assert "judge URL is 'localhost:8788'" in refused.run(images, judge_url="localhost:8788")


def test_no_judge_at_all(refused: Refused, images: Path) -> None:
    line = refused("run", "--images", str(images), "--campaign", str(refused.campaign))
    assert line.startswith("error: --judge-url is empty")


def test_a_model_that_the_judge_does_not_serve(refused: Refused, images: Path) -> None:
    line = refused.run(images, "--set", "judge.model=qwen")
    assert "recipe.judge.model is 'qwen'" in line
    assert "layerloop-reference-judge" in line


def test_more_iterations_than_a_run_on_a_cluster_carries(refused: Refused, tmp_path: Path) -> None:
    arguments = ["compile", "-o", str(tmp_path / "train.yaml"), "--iterations", "100"]
    line = refused(*arguments)
    assert line.endswith("choose at most 9 iterations and chain runs, or --resident")
    assert not (tmp_path / "train.yaml").exists()


def test_a_campaign_that_is_not_there(refused: Refused) -> None:
    line = refused("campaign", "show", str(refused.campaign))
    assert "has no recipe.json" in line
