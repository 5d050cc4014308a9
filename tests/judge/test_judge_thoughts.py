"""Thought and answer: a draft inside a thought, in whatever clothes, is never taken for the judgement."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from layerloop.components.judge.client import Judge
from layerloop.components.judge.parsing import expected_scores
from layerloop.components.judge.replies import Reply, UnusableError, Usage, looks_like_refusal
from layerloop.components.judge.requests import Request
from layerloop.components.judge.thoughts import answer_of
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.schema.runtime import JudgeRuntime

from .test_judge_extraction import spelled
from .test_judge_hell import GOOD, NAMES, READ, says

DRAFT = json.dumps({"scores": dict.fromkeys(NAMES, 1)})
FINAL = json.dumps({"scores": GOOD})
FENCED = f"```json\n{DRAFT}\n```"
WORDS = "\n".join(f"- **{name.replace('_', ' ').title()}**: {value}/5" for name, value in GOOD.items())

# name -> (the text, its finish reason, the reason of the mask or None where FINAL must be read)
TEXTS: dict[str, tuple[str, str, str | None]] = {
    # a thought in each of its clothes, with a draft
    **{
        f"{name} ({kind})": (f"{open_}I would say {draft}, hm.{close}\n{FINAL}", "stop", None)
        for kind, draft in (("plain", DRAFT), ("fenced", FENCED))
        for name, open_, close in (
            ("think", "<think>", "</think>"),
            ("thinking", "<thinking>", "</thinking>"),
            ("upper case", "<THINK>", "</THINK>"),
            ("thought", "<thought>", "</thought>"),
            ("reasoning", "<reasoning>", "</reasoning>"),
            ("with an attribute", '<think effort="high">', "</think>"),
            ("Magistral", "[THINK]", "[/THINK]"),
            ("Kimi", "◁think▷", "◁/think▷"),
            ("Seed", "<seed:think>", "</seed:think>"),
            ("Cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
            ("OpenThinker", "<|begin_of_thought|>", "<|end_of_thought|>"),
            ("Gemma", "<|channel>thought\n", "<channel|>"),
            ("MedGemma", "<unused94>thought\n", "<unused95>"),
            ("Apertus", "<|inner_prefix|>", "<|inner_suffix|>"),
            ("Open WebUI", '<details type="reasoning" done="true">\n<summary>Thought</summary>', "</details>"),
            ("a fence", "```thinking\n", "\n```"),
            ("Doubao", "<think_never_used_51bce0c785>", "</think_never_used_51bce0c785>"),
            ("a longer name", "<inner-thought_process>", "</inner-thought_process>"),
            ("escaped", "&lt;think&gt;", "&lt;/think&gt;"),
            ("mixed", "<think>", "</thinking>"),
            ("nested", "<think><think>", "</think>"),
            ("with an inner pair", "<think>a <reasoning>b</reasoning> ", "</think>"),
            ("without opening", "", "</think>"),
            ("without opening, twice", f"{DRAFT}</think>", "</think>"),
            ("harmony", "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
            ("harmony, no message marks", "<|channel|>analysis ", "<|channel|>final "),
            (
                "harmony, constrained",
                "<|channel|>analysis<|message|>",
                "<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>",
            ),
            (
                "harmony, commentary",
                "<|channel|>commentary<|message|>",
                "<|end|><|start|>assistant<|channel|>final<|message|>",
            ),
            ("harmony without its tokens", "analysisWe see it. ", "assistantfinal"),
        )
    },
    "an answer, then a thought": (f"{FINAL}<think>or {DRAFT}?</think>", "stop", None),
    "a draft, a thought, and a close too many": (f"{DRAFT}<think>a</think>b</think>{FINAL}", "stop", None),
    "an empty thought": (f"<think></think>\n\n{FINAL}", "stop", None),
    "a tag that is closed in itself": (f"<think/>{FINAL}", "stop", None),
    "harmony with the end token": (f"<|channel|>final<|message|>{FINAL}<|return|>", "stop", None),
    "tags in what is seen": (
        json.dumps({"observations": f"it says </think>{DRAFT}<think>", "scores": GOOD}),
        "stop",
        None,
    ),
    # a thought that is not closed
    "cut in a thought": (f"<think>{DRAFT} but", "length", "truncated"),
    "cut in a fenced draft": (f"<think>```json\n{DRAFT}\n```", "length", "truncated"),
    "cut in [THINK]": (f"[THINK]{DRAFT}", "length", "truncated"),
    "cut in harmony": (f"<|channel|>analysis<|message|>{DRAFT}", "length", "truncated"),
    "cut in harmony without its tokens": (f"analysisLet me see {DRAFT}", "length", "truncated"),
    "cut in a second thought": (f"<think>a</think>hm <think>{DRAFT}", "length", "truncated"),
    "never closed": (f"<think>{DRAFT}", "stop", "no_json"),
    **{
        f"a thought and no answer ({name})": (f"{open_}{DRAFT}{close}Fine.", "stop", "no_json")
        for name, open_, close in (
            ("MedGemma", "<unused94>thought\n", "<unused95>"),
            ("Apertus", "<|inner_prefix|>", "<|inner_suffix|>"),
            ("Open WebUI", '<details type="reasoning">', "</details>"),
            ("a fence", "```thinking\n", "\n```\n"),
            ("a longer name", "<thought_process>", "</thought_process>"),
        )
    },
    "cut in a fence of thought": (f"```thinking\n{DRAFT}\nbut", "stop", "no_json"),
    "a fence of thought without an end after the answer": (f"{FINAL}\n```thinking\n{DRAFT}\nbut", "stop", "no_json"),
    "details of something else": (f"<details><summary>Scores</summary>{FINAL}</details>", "stop", None),
    "a thought and nothing": (f"<think>{DRAFT}</think>", "stop", "no_json"),
    "only a close": (f"{DRAFT}</think>", "stop", "no_json"),
    # several forms
    "fenced and another plain": (f"```json\n{DRAFT}\n```\nIn short: {FINAL}", "stop", "ambiguous"),
    "plain and another fenced": (f"{FINAL}\n```json\n{DRAFT}\n```", "stop", "ambiguous"),
    "two fences that differ": (f"{FENCED}\n```json\n{FINAL}\n```", "stop", "ambiguous"),
    "fenced and the same plain": (f"```json\n{FINAL}\n```\nThat is {FINAL}", "stop", None),
    "tildes and another plain": (f"~~~json\n{DRAFT}\n~~~\n{FINAL}", "stop", "ambiguous"),
    "two final channels": (f"<|channel|>final {DRAFT}<|end|><|channel|>final {FINAL}", "stop", "ambiguous"),
    "a second fence that is cut": (f"{FENCED}\n```json\n{FINAL[:60]}", "length", "truncated"),
    "a second form that is cut": (f'{DRAFT} No: {{"scores": {{"{NAMES[0]}": 4', "length", "truncated"),
    # words
    "no fault found": (f"I can't find any fault in this one.\n\n{WORDS}", "stop", None),
    "no fault found, JSON": (f"I can't find any fault in this one. {FINAL}", "stop", None),
    "sorry, and JSON": (f"I'm sorry, I cannot see layer 2 well. {FINAL}", "stop", None),
    "words that lack one": ("\n".join(WORDS.splitlines()[:-1]), "stop", "no_json"),
    "words with two numbers": (f"{WORDS}\nAlpha cleanliness: 1", "stop", "no_json"),
    "words out of range": (WORDS.replace("5/5", "7"), "stop", "out_of_range"),
    "words in a thought": (f"<think>{WORDS}</think>Fine.", "stop", "no_json"),
}  # fmt: skip


async def asked(url: str, request: Request, **recipe: Any) -> list[dict[str, float]]:
    runtime = JudgeRuntime(retries=0, timeout_seconds=20, give_up_seconds=1e6)
    async with Judge(url, JudgeRecipe(model="scripted", redraws=0, **recipe), runtime) as judge:
        return (await judge.ask(request))[0]


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_thought_and_what_is_answer(name: str, scripted: Any, one: Request) -> None:
    text, finish, reason = TEXTS[name]
    scripted.answer = says(text, finish)
    if reason is None:
        assert asyncio.run(asked(scripted.url, one)) == [pytest.approx(READ)]
    else:
        with pytest.raises(UnusableError) as caught:
            asyncio.run(asked(scripted.url, one))
        assert caught.value.reason == reason


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(("finish", "reason"), [("stop", "empty"), ("length", "truncated")])
@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_form_in_the_thought_of_the_message_is_not_read_and_the_mask_says_where_it_lay(
    field: str, finish: str, reason: str, content: str | None, scripted: Any, one: Request
) -> None:
    scripted.answer = says(content, finish, **{field: FINAL})
    with pytest.raises(UnusableError) as caught:
        asyncio.run(asked(scripted.url, one))
    assert caught.value.reason == reason
    assert f"the text is in {field}" in caught.value.detail and "switch thinking off" in caught.value.detail


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": [{"type": "text", "text": DRAFT}]},
        {"type": "reasoning", "text": DRAFT},
        {"type": "thinking", "text": DRAFT},
    ],
)
def test_parts_that_are_thought_are_left_out(part: dict[str, Any], scripted: Any, one: Request) -> None:
    scripted.answer = says([part, {"type": "text", "text": FINAL}])
    assert asyncio.run(asked(scripted.url, one)) == [pytest.approx(READ)]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I can't find any fault in this one.", False),
        ("I cannot fault the background.", False),
        ("I can't assist with that.", True),
        ("I'm sorry, I won't rate this picture.", True),
        ("I am unable to evaluate images of people.", True),
        ("I must decline to score this.", True),
        ("This is against our policies.", True),
    ],
)
def test_what_declines_the_task_and_what_praises(text: str, refused: bool) -> None:
    assert looks_like_refusal(text) == refused


def test_probabilities_of_a_draft_after_the_answer_are_not_used(one: Request) -> None:
    answer, draft = spelled(one, {"4": 1.0}), spelled(one, {"1": 1.0})
    tail = [{"token": "<think>"}, *draft.tokens, {"token": "</think>"}]
    reply = Reply(answer.text + "".join(t["token"] for t in tail), "stop", Usage(), tokens=(*answer.tokens, *tail))
    sampled = [dict.fromkeys(one.names, 0.8)]
    assert expected_scores(one, reply, sampled) == (sampled, 5)
    thought_first = Reply(
        "".join(t["token"] for t in tail) + answer.text, "stop", Usage(), tokens=(*tail, *answer.tokens)
    )
    scores, missing = expected_scores(one, thought_first, [dict.fromkeys(one.names, 0.2)])
    assert missing == 0 and scores == [pytest.approx(dict.fromkeys(one.names, 0.8))]


@pytest.mark.parametrize(
    "text", ["<think>" * 14_000, "<" * 99_000, "[ " * 49_000, "```" + " " * 99_000, "<think " * 14_000, "&lt;" * 24_000]
)
def test_texts_made_to_be_slow_are_split_at_once(text: str) -> None:
    import time

    start = time.monotonic()
    answer_of(text)
    assert time.monotonic() - start < 2
