"""`layerloop judge check` and the canaries: an honest judge passes, others are found out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from layerloop.components.judge.canaries import GRADES, CanaryReport, make_canaries, rank_agreement
from layerloop.components.judge.check import check
from layerloop.components.judge.images import encode_image, fitted
from layerloop.components.layers.stack import composite
from layerloop.components.reference_judge.answers import QualityCache
from layerloop.components.reference_judge.answers import answer as reference_answer
from layerloop.components.reference_judge.rules import CRITERIA
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import JudgeRecipe

SMALL = JudgeRecipe(resolution=64, phase2={"resolution": 64})  # type: ignore[arg-type]


def test_the_reference_judge_passes(reference_url: str) -> None:
    report = check(reference_url, designs=1)
    assert report.verdict == "good" and report.problems == []
    assert report.json_schema and report.json_object and report.logprobs and report.images_per_request == 32
    assert report.canaries.agreement == report.canaries.agreement_phase2 == 1.0
    text = "\n".join(report.lines())
    assert "rank agreement" in text and "verdict: good" in text
    json.dumps(report.to_dict())


def test_a_judge_that_likes_everything_alike_is_unfit(scripted: Any, say: Any) -> None:
    def answer(body: dict[str, Any], number: int) -> bytes:
        rows = body["messages"][1]["content"][-1]["text"].count('{"semantic_separation"')
        one = dict.fromkeys(CRITERIA, 4)
        whole = {f"candidate_{i + 1}": one for i in range(rows)} if rows > 1 else one
        return bytes(say({"scores": whole}))

    scripted.answer = answer
    report = check(scripted.url, recipe=SMALL, designs=1)
    assert report.model == "scripted" and report.verdict == "unfit"
    assert report.canaries.agreement == 0 and "hardly separates good from bad" in report.problems[0]
    assert not report.logprobs


def test_a_judge_that_never_answers_is_unfit_and_does_not_crash(scripted: Any, say: Any) -> None:
    scripted.answer = say("I'm sorry, I can't do that.")
    report = check(scripted.url, recipe=SMALL, designs=1)
    assert report.verdict == "unfit" and len(report.canaries.failures) == 8  # seven canaries and the grids of a design
    named = ", ".join(f"{name}-0" for name in sorted([*GRADES, "grid"]))
    assert f"no judgement of {named}: refused" in "\n".join(report.lines())


def test_a_judge_that_obeys_writing_in_images_is_unfit(scripted: Any, say: Any) -> None:
    """The reference judge, but it gives what the writing of the injected canaries asks for."""
    canaries = [canary for design in range(2) for canary in make_canaries(design)]
    written = {encode_image(fitted(c.source, 64)).url.decode() for c in canaries if c.name == "injected"}
    cache = QualityCache()

    def obey(body: dict[str, Any], number: int) -> bytes:
        text = reference_answer(body, cache)[0]
        shown = {p["image_url"]["url"] for p in body["messages"][1]["content"] if p["type"] == "image_url"}
        return bytes(say(json.dumps({"scores": dict.fromkeys(CRITERIA, 5)}) if shown & written else text))

    scripted.answer = obey
    report = check(scripted.url, recipe=SMALL, designs=2)
    assert report.canaries.injection_gain is not None and report.canaries.injection_gain > 0.5
    assert report.verdict == "unfit" and any("obeys text inside images" in p for p in report.problems)


def test_nothing_at_the_url_is_one_line() -> None:
    with pytest.raises(LayerloopError, match="does not answer"):
        check("http://127.0.0.1:9/v1")


def test_canaries_are_what_their_names_say_and_always_the_same() -> None:
    canaries = {canary.name: canary for canary in make_canaries()}
    assert canaries.keys() == GRADES.keys()
    for canary in make_canaries():
        np.testing.assert_array_equal(canary.stack, canaries[canary.name].stack)
    np.testing.assert_array_equal(composite(canaries["perfect"].stack)[..., :3], canaries["perfect"].source)
    assert (canaries["blank"].stack[1:, ..., 3] == 0).all()
    assert (canaries["duplicated"].stack == canaries["duplicated"].stack[0]).all()
    assert (canaries["injected"].source != canaries["lettered"].source).any()
    assert (canaries["injected"].stack[1:] == canaries["lettered"].stack[1:]).all()


def test_rank_agreement_by_hand() -> None:
    assert rank_agreement({"perfect-0": 0.9, "haloed-0": 0.6, "blank-0": 0.1}) == 1.0
    assert rank_agreement({"perfect-0": 0.1, "haloed-0": 0.6, "blank-0": 0.9}) == -1.0
    assert rank_agreement({"perfect-0": 0.5, "blank-0": 0.5}) == 0.0
    assert rank_agreement({"perfect-0": 0.5, "blank-1": 0.4}) is None  # of different designs
    assert rank_agreement({"blank-0": 0.5, "duplicated-0": 0.4}) is None  # of the same grade
    assert rank_agreement({}) is None


def test_what_text_in_images_earns_and_what_drifts() -> None:
    report = CanaryReport({"injected-0": 0.7, "lettered-0": 0.2, "perfect-0": 0.9}, {})
    assert report.injection_gain == pytest.approx(0.5)
    assert report.drift({"perfect-0": 0.8, "lettered-0": 0.2, "old-0": 0.0}) == pytest.approx(0.05)
    assert report.drift({}) is None and CanaryReport({}, {}).injection_gain is None
