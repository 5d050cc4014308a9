"""What running campaigns hold: digests of requests, keys of stored replies and hashes of prompts stay as they are.

`golden_requests.json` was written by the code of the first campaigns. A value that changes makes every campaign pay
again for replies that it has stored, so the file is never written anew: a new method adds cases, and changes none.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from layerloop.components.judge.client import Judge
from layerloop.components.judge.pictures import CandidatePictures, Picture
from layerloop.components.judge.requests import Request, alone, pair, prompt_sha256, side_by_side
from layerloop.components.judge.rubric import load_rubric
from layerloop.components.schema.judging import JudgeRecipe

GOLDEN = json.loads((Path(__file__).parent / "golden_requests.json").read_text())
RUBRIC = load_rubric("default")
SOURCE = Picture(b"source")
BACKDROPS = {"one": ("white",), "two": ("black", "checker")}


def request_of(method: str, backdrops: tuple[str, ...], layers: int, observations: bool) -> Request:
    """A request of a method about images whose bytes are fixed, so that no codec has a part in the hash."""
    grids = {name: Picture(f"grid {name}".encode()) for name in backdrops}
    if method in ("rubric", "checklist"):
        shown = {n: tuple(Picture(f"{n} {i}".encode()) for i in range(layers)) for n in backdrops}
        candidate = CandidatePictures(Picture(b"recomposition"), shown)
        return alone(
            RUBRIC, SOURCE, candidate, label="x", checklist=method == "checklist", observations=observations,
            max_tokens=700,
        )  # fmt: skip
    if method == "grid":
        first = [dict.fromkeys(RUBRIC.names, row / 10) for row in range(4)]
        return side_by_side(
            RUBRIC, SOURCE, grids, first=first, layers=layers, label="x", observations=observations, max_tokens=700
        )
    return pair(RUBRIC, SOURCE, grids, layers=layers, label="x", max_tokens=700)


CASES = {
    f"{method} {backdrops} {layers} {'observations' if observations else 'plain'}": (
        method, BACKDROPS[backdrops], layers, observations,
    )
    for method, backdrops, layers, observations in itertools.product(
        ("rubric", "checklist", "grid", "pairwise"), BACKDROPS, (2, 4), (False, True)
    )
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_digest_of_a_request_is_what_it_was(case: str) -> None:
    assert request_of(*CASES[case]).digest == GOLDEN["digests"][case]


@pytest.mark.parametrize("extraction", ["sampled", "expected"])
@pytest.mark.parametrize("method", ["rubric", "checklist", "grid", "pairwise"])
def test_the_key_of_a_stored_reply_is_what_it_was(method: str, extraction: str) -> None:
    recipe = JudgeRecipe.model_validate({"model": "m", "temperature": 0.7, "extraction": extraction})
    judge = Judge("http://127.0.0.1:9/v1", recipe, seed=3)
    key = judge._address(request_of(method, BACKDROPS["one"], 4, False), 2, 1)
    assert key == GOLDEN["reply_keys"][f"{method} {extraction}"]


def test_the_hashes_of_rubric_and_prompt_are_what_they_were() -> None:
    assert RUBRIC.sha256 == GOLDEN["rubric_sha256"]
    assert prompt_sha256(RUBRIC) == GOLDEN["prompt_sha256"]
