"""A sample of what `make faults` runs in full: attempts that are cut off and run again, on a folder and on S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from warm_python import warm

from .places import Place
from .points import Point, strike
from .proxy import bad_network
from .scenario import Scenario, scenario
from .trouble import full_disk

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    with scenario(tmp_path_factory.mktemp("faults"), without=("evaluate",), python=warm()) as one:
        yield one


@pytest.mark.parametrize(
    ("stage", "match"),
    [
        ("shard", "link sources/manifest.json"),
        ("rollouts2", "link iterations/000002/rollouts/g000001.json"),  # its shard is an orphan then, and spoiled
        ("scores2", "replace iterations/000002/scores/000000-"),  # all replies are paid for and stored
        ("publish", "replace publications/"),
    ],
)
def test_killed_at_a_change_of_its_folder_it_goes_on(made: Scenario, tmp_path: Path, stage: str, match: str) -> None:
    outcome = strike(made, Point(stage, "folder", match=match), Place("folder", str(tmp_path)), spoil=True)
    assert outcome.reached and not outcome.problems, outcome


def test_killed_before_the_answer_of_s3_it_goes_on(made: Scenario, s3_bucket: str) -> None:
    point = Point("update2", "s3", match="PUT iterations/000002/policy/manifest.json", action="kill sent")
    outcome = strike(made, point, Place("s3", s3_bucket), spoil=False)
    assert outcome.reached and not outcome.problems, outcome


def test_a_full_disk_is_one_line_and_harms_nothing(made: Scenario, tmp_path: Path) -> None:
    outcome = full_disk(made, Place("folder", str(tmp_path)), "rollouts2", at=17)
    assert outcome.reached and not outcome.problems, outcome


def test_a_schedule_of_faults_is_the_same_for_the_same_seed() -> None:
    from types import SimpleNamespace
    from typing import Any

    def drawn(seed: int) -> list[str]:
        with bad_network("http://127.0.0.1:9", "reset", "slow", share=0.3, seed=seed) as (_, server):
            asked: list[Any] = [SimpleNamespace(command="GET", path=f"/b/{n % 20}") for n in range(200)]
            return [server.next_kind(request) for request in asked]

    assert drawn(1) == drawn(1) != drawn(2)
    assert 30 < sum(map(bool, drawn(1))) < 90 and set(drawn(1)) == {"", "reset", "slow"}
