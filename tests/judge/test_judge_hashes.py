"""What running campaigns hold: digests of requests, keys of stored replies and hashes of prompts stay as they are.

`golden_requests.json` was written by the code of the first campaigns. A value that changes makes every campaign pay
again for replies that it has stored, so the file is never rewritten: a new method adds cases, and changes none.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from layerloop.components.judge.client import Judge
from layerloop.components.judge.images import CandidateImages, EncodedImage
from layerloop.components.judge.methods import PHASE1, PHASE2, prompt_hash
from layerloop.components.judge.requests import Request, prompt_sha256
from layerloop.components.judge.rubric import load_rubric
from layerloop.components.schema.judging import JudgeRecipe

GOLDEN = json.loads((Path(__file__).parent / "golden_requests.json").read_text())
RUBRIC = load_rubric("default")
SOURCE = EncodedImage(b"source")
BACKDROPS = {"one": ("white",), "two": ("black", "checker")}


def request_of(method: str, backdrops: tuple[str, ...], layers: int, observations: bool) -> Request:
    """A request of a method about images whose bytes are fixed, so that no codec has a part in the hash."""
    recipe = JudgeRecipe(observations=observations, max_tokens=700)
    if method in PHASE1:
        shown = {n: tuple(EncodedImage(f"{n} {i}".encode()) for i in range(layers)) for n in backdrops}
        candidate = CandidateImages(EncodedImage(b"recomposition"), shown)
        return PHASE1[method].request(RUBRIC, SOURCE, candidate, recipe, label="x")
    grids = {name: EncodedImage(f"grid {name}".encode()) for name in backdrops}
    phase1 = [dict.fromkeys(RUBRIC.names, row / 10) for row in range(4 if method == "grid" else 2)]
    return PHASE2[method].request(RUBRIC, SOURCE, grids, recipe, phase1=phase1, layers=layers, label="x")


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


@pytest.mark.parametrize("phase1", PHASE1)
@pytest.mark.parametrize("phase2", PHASE2)
def test_the_hash_of_a_prompt_covers_the_words_that_the_methods_in_use_add(phase1: str, phase2: str) -> None:
    recipe = JudgeRecipe.model_validate({"method": phase1, "phase2": {"method": phase2}})
    own = [*PHASE1[phase1].WORDING, *PHASE2[phase2].WORDING]
    assert (prompt_hash(RUBRIC, recipe) == GOLDEN["prompt_sha256"]) == (own == [])


@pytest.mark.parametrize(("phase1", "phase2"), [("rubric", "grid"), ("checklist", "pairwise")])
def test_a_word_that_a_method_adds_is_another_prompt(monkeypatch: pytest.MonkeyPatch, phase1: str, phase2: str) -> None:
    recipe = JudgeRecipe.model_validate({"method": phase1, "phase2": {"method": phase2}})
    hashes = {prompt_hash(RUBRIC, recipe)}
    for method in (PHASE1[phase1], PHASE2[phase2]):
        monkeypatch.setattr(method, "WORDING", (*method.WORDING, "Look closely."))
        hashes.add(prompt_hash(RUBRIC, recipe))
    assert len(hashes) == 3
