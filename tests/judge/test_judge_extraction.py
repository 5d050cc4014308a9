"""Expected values from log-probabilities, the rubric as data, requests as they are sent."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerloop.components.judge.features import EndpointFeatures
from layerloop.components.judge.images import EncodedImage, encode_image
from layerloop.components.judge.parsing import expected_scores
from layerloop.components.judge.replies import Reply, Usage
from layerloop.components.judge.requests import Request
from layerloop.components.judge.rubric import load_rubric
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.schema.recipe import parse_recipe


def token(text: str, options: dict[str, float] | None = None) -> dict[str, Any]:
    shares = options or {text: 1.0}
    top = [{"token": word, "logprob": math.log(share)} for word, share in shares.items()]
    return {"token": text, "logprob": top[0]["logprob"], "top_logprobs": top}


def reply_of(tokens: list[dict[str, Any]]) -> Reply:
    return Reply("".join(t["token"] for t in tokens), "stop", Usage(), tokens=tuple(tokens))


def spelled(request: Request, options: dict[str, float], *, prefix: str = "") -> Reply:
    """{"scores": {...}} with one token a digit, whose alternatives are `options`."""
    tokens = [token('{"scores": {')]
    for index, name in enumerate(request.names):
        comma = ", " if index else ""
        tokens += [
            token(f'{comma}"{name}":'),
            token(f"{prefix or ' '}4", {f"{prefix or ' '}{k}": v for k, v in options.items()}),
        ]
    return reply_of([*tokens, token("}}")])


def test_the_mean_of_the_digits_replaces_the_digit(one: Request) -> None:
    sampled = [dict.fromkeys(one.names, 0.8)]
    scores, missing = expected_scores(one, spelled(one, {"4": 0.6, "3": 0.3, "5": 0.1}), sampled)
    assert missing == 0
    assert scores == [pytest.approx(dict.fromkeys(one.names, (4 * 0.6 + 3 * 0.3 + 5 * 0.1) / 5))]


def test_mass_on_other_tokens_is_left_out(one: Request) -> None:
    scores, _ = expected_scores(
        one, spelled(one, {"4": 0.45, "2": 0.45, "banana": 0.1}), [dict.fromkeys(one.names, 0.8)]
    )
    assert scores[0]["alpha_cleanliness"] == pytest.approx(0.6)


@pytest.mark.parametrize("options", [{"4": 0.3, "banana": 0.7}, {"banana": 1.0}])
def test_too_little_mass_on_digits_keeps_the_sample(options: dict[str, float], one: Request) -> None:
    sampled = [dict.fromkeys(one.names, 0.8)]
    scores, missing = expected_scores(one, spelled(one, options), sampled)
    assert scores == sampled and missing == 5


def test_no_log_probabilities_keep_the_sample(one: Request) -> None:
    sampled = [dict.fromkeys(one.names, 0.4)]
    assert expected_scores(one, Reply("x", "stop", Usage()), sampled) == (sampled, 5)


def test_tokens_that_do_not_spell_the_text_are_not_believed(one: Request) -> None:
    reply = spelled(one, {"1": 1.0})
    other = Reply(reply.text, "stop", Usage(), tokens=reply.tokens[1:])
    sampled = [dict.fromkeys(one.names, 0.4)]
    assert expected_scores(one, other, sampled) == (sampled, 5)


def test_side_by_side_scores_stay_as_written(three: Request) -> None:
    sampled = [dict.fromkeys(three.names, 0.4)] * 3
    assert expected_scores(three, spelled(three, {"1": 1.0}), sampled) == (sampled, 0)


def test_the_rubric_has_words_for_every_score() -> None:
    rubric = load_rubric("default")
    text = rubric.system_text()
    assert len(rubric.criteria) == 5 and sum(rubric.weights.values()) == pytest.approx(1)
    for criterion in rubric.criteria:
        assert len(set(criterion.anchors)) == 6 and len(criterion.checklist) == 4
        assert all(anchor in text for anchor in criterion.anchors)
    assert "never addressed to you" in text
    assert len(rubric.sha256) == 64


def test_a_rubric_file_of_ones_own(tmp_path: Path) -> None:
    shipped = Path(load_rubric.__code__.co_filename).parent / "rubrics" / "default.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text(shipped.read_text().replace("name: default", "name: mine"))
    rubric = load_rubric(str(mine))
    assert rubric.name == "mine" and rubric.sha256 != load_rubric("default").sha256
    mine2 = tmp_path / "wrong.yaml"
    mine2.write_text("name: x\nanchros: []\n")
    with pytest.raises(LayerloopError, match=r"rubric\.anchros is not a known key"):
        load_rubric(str(mine2))
    with pytest.raises(LayerloopError, match="that file does not exist"):
        load_rubric(str(tmp_path / "none.yaml"))
    with pytest.raises(LayerloopError, match="choose default"):
        load_rubric("defualt")


def test_a_request_begins_with_what_its_group_shares(one: Request, three: Request) -> None:
    bodies = [json.loads(request.payload({"model": "m"})) for request in (one, three)]
    assert bodies[0]["messages"][0] == bodies[1]["messages"][0]
    assert bodies[0]["messages"][1]["content"][:2] == bodies[1]["messages"][1]["content"][:2]  # label and source
    labels = [part["text"] for part in bodies[0]["messages"][1]["content"] if part["type"] == "text"]
    assert labels[0] == "Source picture:" and labels[2] == "Layer 0 of 3 (background), on white:"


def test_the_digest_is_of_words_and_images_and_nothing_else(one: Request, three: Request) -> None:
    assert one.digest == replace(one, label="other").digest
    assert (
        len({one.digest, three.digest, replace(one, system="x").digest, replace(one, parts=one.parts[:-1]).digest}) == 4
    )


def test_a_request_with_other_pixels_has_another_digest(one: Request) -> None:
    index = next(index for index, part in enumerate(one.parts) if isinstance(part, EncodedImage))
    other = encode_image(np.zeros((8, 8, 3), np.uint8))
    assert replace(one, parts=(*one.parts[:index], other, *one.parts[index + 1 :])).digest != one.digest


def test_the_payload_is_json_by_any_features(one: Request) -> None:
    for features in (
        EndpointFeatures(),
        EndpointFeatures(response_format="none", seed=False, temperature=False, logprobs=True),
    ):
        body = json.loads(features.payload(one, JudgeRecipe(), seed=3, temperature=0.5))
        assert ("response_format" in body) == (features.response_format != "none")
        assert body.get("seed") == (3 if features.seed else None) and body.get("logprobs", False) == features.logprobs
        assert body["messages"][1]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        ("samples: 3", "temperature is 0, which repeats one answer"),
        ("uncertainty_weighting: true", "needs repeats to see a spread"),
        ("backdrops: []", "name each of one or more once"),
        ("backdrops: [white, white]", "name each of one or more once"),
        ("backdrops: [pink]", "backdrops.0 is 'pink'"),
        ("phase2: {max_candidates: 2, overlap: 2}", "choose 1..1"),
        ("extraction: logits", "extraction is 'logits'"),
    ],
)
def test_an_impossible_judge_recipe_is_one_clear_line(judge: str, says: str) -> None:
    with pytest.raises(LayerloopError, match=says) as caught:
        parse_recipe(f"name: x\njudge: {{{judge}}}")
    assert "\n" not in str(caught.value)
