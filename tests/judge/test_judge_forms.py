"""Where an answer lies in what models write: wrapped, relaxed, twice, on another scale, under another candidate."""

from __future__ import annotations

import json
from typing import Any

import pytest

from layerloop.components.judge.methods import pairwise
from layerloop.components.judge.parsing import expected_scores
from layerloop.components.judge.relaxed import read_relaxed
from layerloop.components.judge.replies import UnusableError, read_body
from layerloop.components.judge.requests import Request
from layerloop.components.judge.serving import thought_in

from .test_judge_extraction import reply_of, spelled
from .test_judge_extraction import token as as_token
from .test_judge_hell import GOOD, NAMES, READ, rows
from .test_judge_readings import DRAFT, in_words, reading

FORM = json.dumps({"scores": GOOD})
LOW = dict.fromkeys(NAMES, 1)
THREE = {f"candidate_{n}": dict.fromkeys(NAMES, 5 - n) for n in (1, 2, 3)}
READ_THREE = [pytest.approx(dict.fromkeys(NAMES, value)) for value in (0.8, 0.6, 0.4)]


def pairs(form: str, between: str = ", ") -> str:
    return between.join(form.format(name=name, value=value) for name, value in GOOD.items())


@pytest.mark.parametrize(
    "text",
    [
        f"[{FORM}]",
        json.dumps({"result": {"scores": GOOD}}),
        json.dumps({"name": "phase1", "arguments": {"scores": GOOD}}),
        json.dumps({"function": "phase1", "arguments": FORM}),
        json.dumps({"phase1": {"scores": GOOD}}),
        json.dumps({"answer": GOOD}),
        json.dumps({"scores": json.dumps(GOOD)}),
        json.dumps(FORM),
        json.dumps({"candidate_1": {"scores": GOOD}, "comment": "clean"}),
        json.dumps({"scores": GOOD, "confidence": LOW, "initial_scores": LOW, "max_score": 5}),
        json.dumps({"scores": [{"criterion": name, "score": value} for name, value in GOOD.items()]}),
        json.dumps({"scores": {name.title().replace("_", ""): value for name, value in GOOD.items()}}),
        json.dumps({"scores": {name: {"rating": f"{value}/5", "why": "2 halos"} for name, value in GOOD.items()}}),
        json.dumps({"scores": {name: f"{value} - clean (mostly)" for name, value in GOOD.items()}}),
        json.dumps({"scores": {n: ("zero", "one", "two", "three", "four", "five")[v] for n, v in GOOD.items()}}),
        '{"observations": "one\ntwo", "scores": ' + json.dumps(GOOD) + "}",
        '{"scores": {' + pairs('"{name}": {value}/5') + "}}",
        '{"scores": {' + pairs('"{name}": "0 to 5"') + "}}\n" + FORM,
        json.dumps({"scores": GOOD, "judgement": dict.fromkeys(NAMES, "clean, 3 halos")}),
        f"```json\n{FORM}\n```\n{in_words('4')}\nAlpha cleanliness is 3 because of 2 halos.",
        pairs("{name} (0-5) \u2192 {value}\n", ""),
        '{"scores": {' + pairs('"{name}": {value}, // fine\n', "") + "/* all */ }}",
        "{scores: {" + pairs("{name}: +{value}.") + "}, clean: true}",
        "{'scores': {" + pairs("'{name}': {value}") + "}, 'note': 'it\\'s \"good\"', 'done': true}",
        "{\u201cscores\u201d\uff1a {" + pairs("\u201c{name}\u201d\uff1a {value}", "\uff0c") + "}}",
    ],
)  # fmt: skip
def test_an_answer_that_any_reader_finds_is_read(text: str, one: Request) -> None:
    assert reading(one, text) == [pytest.approx(READ)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps({"scores": LOW, "final_scores": GOOD}), "ambiguous"),
        (json.dumps({"evaluation": {"scores": LOW}, "scores": GOOD}), "ambiguous"),
        (json.dumps([{"scores": LOW}, {"scores": GOOD}]), "ambiguous"),
        (json.dumps({**LOW, "scores": GOOD}), "ambiguous"),
        ("{'scores': {" + pairs("'{name}': {value}") + f", '{NAMES[0]}': 1}}}}", "ambiguous"),
        (json.dumps({"thinking": {"scores": GOOD}}), "no_json"),
        (json.dumps({"draft": GOOD, "reasoning": FORM}), "no_json"),
        (json.dumps({"previous_scores": GOOD}), "no_json"),
        (json.dumps({"perfect": GOOD}), "no_json"),
        (json.dumps({"scores": {n: {"score": v, "revised_score": 1} for n, v in GOOD.items()}}), "not_a_number"),
        ('{"scores": {' + pairs('"{name}": {value} // or 3?\n') + "}}", "no_json"),
        (json.dumps({"scores": {n: f"{v} - 2 halos" for n, v in GOOD.items()}}), "not_a_number"),
        (f"{FORM}\n\nCorrection: alpha cleanliness should be 1 instead of 3.", "ambiguous"),
        (f"```json\n{FORM}\n```\n{in_words('1')}", "ambiguous"),
        # scores of another scale, which are under five by chance
        (json.dumps({"scores": {n: {"score": v, "max_score": 10} for n, v in GOOD.items()}}), "out_of_range"),
        (json.dumps({"scores": {n: {"score": v, "out_of": "10"} for n, v in GOOD.items()}}), "out_of_range"),
        (json.dumps({"scale": "0-10", "scores": GOOD}), "out_of_range"),
        (json.dumps({"scores": {**GOOD, "max": 100}}), "out_of_range"),
        (f"On a scale of 1 to 10: {FORM}", "out_of_range"),
        (f"{FORM}\n(scores are out of 10)", "out_of_range"),
        (in_words("4 (out of 10)"), "out_of_range"),
        (f"Scores (0-10):\n{in_words('4')}", "out_of_range"),
    ],
)
def test_two_readings_a_draft_or_another_scale_are_none(text: str, reason: str, one: Request) -> None:
    assert reading(one, text) == reason


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"observations": "clean", **THREE}),
        json.dumps({"scores": {**THREE, "comment": "the first is best", "best": 1}}),
        json.dumps({"scores": {label: {"scores": row} for label, row in THREE.items()}}),
        json.dumps({"scores": [{label: row} for label, row in reversed(THREE.items())]}),
        json.dumps({"scores": {n: {label: row[n] for label, row in THREE.items()} for n in NAMES}}),
        json.dumps({"scores": {n: [row[n] for row in THREE.values()] for n in NAMES}}),
        json.dumps({"scores": {label.replace("_", " #"): row for label, row in THREE.items()}}),
        json.dumps({"candidates": [{"id": index, **row} for index, row in enumerate(THREE.values(), 1)]}),
        json.dumps([{"scores": THREE}]),
        json.dumps({"scores": [{"scores": {"candidate": n, **THREE[f"candidate_{n}"]}} for n in (3, 1, 2)]}),
        json.dumps({"first_judgements": rows("candidate_1", "candidate_2"), "scores": THREE}),
    ],
)
def test_rows_are_whose_they_say_however_they_are_laid_out(text: str, three: Request) -> None:
    assert reading(three, text) == READ_THREE


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps({"scores": {f"candidate_{n}": {"candidate": 4 - n, **GOOD} for n in (1, 2, 3)}}), "wrong_labels"),
        (json.dumps({"scores": [{"candidate": -n, **GOOD} for n in (1, 2, 3)]}), "wrong_labels"),
        (json.dumps({"scores": {n: [4, 3] for n in NAMES}}), "wrong_count"),
        (json.dumps({"scores": {n: {"candidate_1": 4, "candidate_3": 2} for n in NAMES}}), "wrong_count"),
        (json.dumps({"scores": {n: {"1": 4, "01": 3, "2": 2, "3": 1} for n in NAMES}}), "wrong_labels"),
        (json.dumps({"scores": THREE, "revised_scores": rows("candidate_1")}), "ambiguous"),
    ],
)
def test_rows_that_may_be_anothers_are_nobodys(text: str, reason: str, three: Request) -> None:
    assert reading(three, text) == reason


def test_a_pair_is_read_by_its_labels(one: Request) -> None:
    said = dict(zip(NAMES, ("candidate_1", "Row 2", "tie", 0.0, "2"), strict=True))
    assert list(pairwise.read(one, said)[0].values()) == [1.0, 0.0, 0.5, 0.5, 0.0]
    for odd in (True, 3, "better", "-1", None):
        with pytest.raises(UnusableError, match="not 0, 1 or 2"):
            pairwise.read(one, {**said, NAMES[0]: odd})


@pytest.mark.parametrize("name", ["scale", "range"])
def test_a_criterion_may_have_the_name_of_a_scale(name: str, one: Request) -> None:
    from dataclasses import replace

    assert reading(replace(one, names=(name, "other")), json.dumps({name: 4, "other": 3})) == [
        {name: 0.8, "other": pytest.approx(0.6)}
    ]


@pytest.mark.parametrize(
    "text",
    ["{'a': 1 2}", "{a b: 1}", "{'a': 01}", "{'a': (1, 2)}", "{'a': 4 - 1}", "{'a': 'b", "{a: 1", "[1, ,2]", "{:}"],
)  # fmt: skip
def test_what_has_no_reading_is_not_completed(text: str) -> None:
    assert read_relaxed(text) is None


def test_an_expected_value_is_of_the_answer_and_not_of_what_stands_beside_it(one: Request) -> None:
    """{"scores": {...}, "confidence": {...}}: the digits of the second belong to nothing."""
    sure = spelled(one, {"1": 1.0})
    tail = [as_token(', "confidence": '), *sure.tokens[1:]]
    reply = reply_of([*spelled(one, {"4": 1.0}).tokens[:-1], as_token("}"), *tail])
    sampled = [dict.fromkeys(one.names, 0.8)]
    assert expected_scores(one, reply, sampled) == (sampled, 5)


# ---- the message around the text


def message(content: Any, finish: str = "stop", **more: Any) -> bytes:
    choice = {"finish_reason": finish, "message": {"content": content, **more}}
    return json.dumps({"choices": [choice]}).encode()


@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        ("model_length", "truncated"), ("MAX_TOKENS", "truncated"), ("FinishReason.MAX_TOKENS", "truncated"),
        ("sensitive", "refused"), ("SAFETY", "refused"), ("content_filter: RECITATION", "refused"),
        ("refusal", "refused"), ("PROHIBITED_CONTENT", "refused"),
        ("insufficient_system_resource", "error_body"), ("network_error", "error_body"), ("abort", "error_body"),
        ("STOP", None), ("end_turn", None), ("eos_token", None),
    ],
)  # fmt: skip
def test_a_completion_that_did_not_end_by_itself_is_no_judgement(finish: str, reason: str | None, one: Request) -> None:
    try:
        reply = read_body(message(f"Perhaps {DRAFT}, but the second", finish))
        found = reading(one, reply.text, reply.finish_reason)
    except UnusableError as error:
        found = error.reason
    assert found == (reason or [dict.fromkeys(NAMES, 0.2)])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (message([{"text": DRAFT, "thought": True}]), "empty: content is empty, the text is in parts of content that"),
        (message([{"type": "summary_text", "text": DRAFT}], "length"), "truncated: content is empty, the text is in"),
        (message("", thinking_blocks=[{"thinking": DRAFT}]), "empty: content is empty, the text is in thinking_blocks"),
        (message(None, reasoning_text=DRAFT), "empty: content is empty, the text is in reasoning_text"),
        (message(None, tool_calls=[{"function": {"arguments": DRAFT}}]), "empty: content is empty, it answers by"),
        (message([{"type": "refusal", "refusal": "I can't."}]), "refused: I can't."),
    ],
)  # fmt: skip
def test_a_message_without_an_answer_says_where_its_text_lies(body: bytes, said: str) -> None:
    with pytest.raises(UnusableError) as caught:
        read_body(body)
    assert str(caught.value).startswith(said)


def test_an_answer_that_is_decoded_already_is_read(one: Request) -> None:
    for content in ({"scores": GOOD}, {"type": "text", "text": FORM}, [{"thought": False, "text": FORM}]):
        assert reading(one, read_body(message(content)).text) == [pytest.approx(READ)]


@pytest.mark.parametrize(
    ("content", "more", "where"),
    [
        ("<think>\n\n</think>\n\n{}", {}, None),  # Qwen3 with its thinking switched off
        ("<think>\nHm.\n</think>\n\n{}", {}, "in the text"),
        ([{"type": "thinking", "thinking": []}, {"type": "text", "text": "{}"}], {}, "in a part of the content"),
        ([{"type": "text", "text": "{}"}], {}, None),
        ("{}", {"reasoning_details": [{"text": "Hm."}]}, "in the field reasoning_details"),
    ],
)
def test_thinking_that_is_off_is_said_to_be_off(content: Any, more: dict[str, Any], where: str | None) -> None:
    assert thought_in(message(content, **more)) == where
