"""Replies as models write them: numbers in words, lists with labels of their own, forms that a limit cut off."""

from __future__ import annotations

import json
from typing import Any

import pytest

from layerloop.components.judge.errors import read_error
from layerloop.components.judge.parsing import parse
from layerloop.components.judge.replies import Reply, UnusableError, Usage, read_body
from layerloop.components.judge.requests import Request

from .test_judge_hell import GOOD, NAMES, READ

DRAFT = json.dumps({"scores": dict.fromkeys(NAMES, 1)})


def reading(request: Request, text: str, finish: str = "stop") -> list[dict[str, float]] | str:
    """The scores of a reply, or the reason of its mask."""
    try:
        return parse(request, Reply(text, finish, Usage()))
    except UnusableError as error:
        return error.reason


def in_words(first: str) -> str:
    values = [first, *(str(value) for value in list(GOOD.values())[1:])]
    return "\n".join(f"{name.replace('_', ' ').title()}: {value}" for name, value in zip(NAMES, values, strict=True))


@pytest.mark.parametrize(
    "first",
    ["{}", "{}/5", "{} of 5", "{} out of 5 points", "**{}** - clean", "{} (2 halos)", "{}. 2 halos", "`{}`; fine",
     "{} stars", "{}, fine"],
)  # fmt: skip
def test_a_score_in_words_is_read(first: str, one: Request) -> None:
    text = in_words(first.format(GOOD[NAMES[0]]))
    assert reading(one, text) == [pytest.approx(READ)]


@pytest.mark.parametrize(
    "first",
    ["3-4", "3 - 4", "3\u20134", "3 to 4", "3 or 4", "3,5", "3, 4", "3+", "3%", "3 -> 2", "3 halos, score 2",
     "**2** layers have halos", "1 layer is blank: 2", "5 minus 1", "3 but should be 2", "5 | 3"],
)  # fmt: skip
def test_a_number_in_words_that_may_not_be_the_score_is_none(first: str, one: Request) -> None:
    assert reading(one, in_words(first)) == "no_json"
    assert reading(one, f"{in_words('4')}\nIn short, {NAMES[0]} is {first}") == "no_json"


@pytest.mark.parametrize(
    "before",
    ["Thinking Process:\n", "<pondering>", "**Thinking**", "\uff1cthink\uff1e", "{{think}} ", "Hm. ```json\n"],
)
def test_a_form_amid_words_that_are_cut_off_may_be_a_draft(before: str, one: Request) -> None:
    fence = "\n```" if "```" in before else ""
    text = f"{before}maybe {DRAFT}" if not fence else f"{before}{DRAFT}"
    assert reading(one, f"{text}{fence} but wait, the second", "length") == "truncated"
    assert reading(one, f"{text}{fence} but wait, the second") == [
        dict.fromkeys(NAMES, 0.2)
    ]  # ended, and its only form


def test_a_reply_that_begins_with_its_form_may_be_cut_off_after_it(one: Request) -> None:
    form = json.dumps({"scores": GOOD})
    for text in (f"{form}\n\nThe first criterion", f"```json\n{form}\n```\nBecause", f"Here it is: {form}"):
        assert reading(one, text, "length") == [pytest.approx(READ)]
    assert reading(one, in_words("4"), "length") == "truncated", "the last number may lack its decimals"


@pytest.mark.parametrize(
    "label",
    [
        lambda n: {"candidate_id": n}, lambda n: {"Candidate": f"candidate {n}"}, lambda n: {"name": f"Candidate {n}"},
        lambda n: {"index": n}, lambda n: {"number": str(n)}, lambda n: {"decomposition": n},
        lambda n: {"row number": n},
        lambda n: {"candidate": n, "id": 70 + n, "rank": 4 - n},
    ],
)  # fmt: skip
def test_entries_of_a_list_are_whose_they_say(label: Any, three: Request) -> None:
    entries = [{**label(n), **dict.fromkeys(NAMES, n)} for n in (3, 1, 2)]
    read = reading(three, json.dumps({"scores": entries}))
    assert isinstance(read, list)
    assert [row[NAMES[0]] for row in read] == pytest.approx([0.2, 0.4, 0.6])


@pytest.mark.parametrize(
    "labels",
    [
        [{"rank": 3}, {"rank": 1}, {"rank": 2}],
        [{"picture": "3"}, {"picture": "2"}, {"picture": "1"}],
        [{"position": 2}, {"position": 1}, {"position": 0}],
        [{"candidate": 1}, {}, {"candidate": 3}],
        [{"candidate": 1, "row": 2}, {"candidate": 2, "row": 2}, {"candidate": 3, "row": 3}],
        [{"index": 0}, {"index": 1}, {"index": 2}],
        [{"name": "left"}, {"name": "middle"}, {"name": "right"}],
    ],
)
def test_entries_that_do_not_say_whose_they_are_are_nobodys(labels: list[dict[str, Any]], three: Request) -> None:
    entries = [{**label, **dict.fromkeys(NAMES, 3)} for label in labels]
    assert reading(three, json.dumps({"scores": entries})) == "wrong_labels"


def test_a_list_with_other_fields_is_in_order(three: Request) -> None:
    entries = [
        {**dict.fromkeys(NAMES, n), "total": 5 * n, "why": f"candidate {n}?", "rank": m}
        for m, n in ((1, 4), (2, 2), (3, 1))
    ]
    read = reading(three, json.dumps({"scores": entries}))
    assert isinstance(read, list)
    assert [row[NAMES[0]] for row in read] == pytest.approx([0.8, 0.4, 0.2])


def test_what_a_judge_says_is_printable_wherever_it_is_kept(one: Request) -> None:
    with pytest.raises(UnusableError) as caught:
        parse(one, read_body(b'{"choices":[{"message":{"content":"no \\ud83d \\u001b[31m \\u202ered"}}]}'))
    assert caught.value.detail == r"no \ud83d \x1b[31m \u202ered"
    assert str(caught.value).encode() == rb"no_json: no \ud83d \x1b[31m \u202ered"
    assert read_error(b'{"error": "half \\ud83d an \\u0000 emoji"}') == r"half \ud83d an \x00 emoji"
