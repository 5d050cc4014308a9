"""A sample of what `make faults` runs in full: attempts that are cut off and run again, on a folder and on S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .places import Place
from .points import Point, changes, strike
from .scenario import Scenario, scenario

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    with scenario(tmp_path_factory.mktemp("faults")) as one:
        yield one


@pytest.mark.parametrize("stage", ["shard", "rollouts2", "scores2", "update2", "evaluate", "publish"])
def test_killed_at_a_change_it_goes_on(made: Scenario, tmp_path: Path, stage: str) -> None:
    place = Place("folder", str(tmp_path))
    labels = changes(made, made.stage(stage), place)
    at = len(labels) // 2
    outcome = strike(made, Point(stage, "folder", at), place, spoil=True)
    assert outcome.reached and not outcome.problems, (labels[at], outcome)
