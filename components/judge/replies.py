"""The HTTP body of a reply, validated: proxies send HTML, half bodies, and errors with status 200."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from layerloop.components.judge.errors import read_error, shown
from layerloop.components.schema.messages import printable

MAX_BODY = 8 << 20  # bytes; a judgement with logprobs is under a megabyte
PAID = frozenset({"refused", "empty", "truncated"})  # what `read_body` raises about a completion, which was paid

_DO = (
    r"(?:assist|help|comply|evaluate|judge|score|rate|grade|assess|process|provide|give|do|fulfil|fulfill|complete|"
    r"continue|answer|respond|engage|analy[sz]e|describe|discuss|identify|review|see|view|offer|participate|make|support|"
    r"perform|look|work|comment|say|share|generate|produce|return)"
)
_REFUSAL = re.compile(  # declines the task; "I can't find any fault" does not
    r"\b(?:i['\u2019]?m|i am|we['\u2019]re|we are) (?:very |so )?(?:sorry|unable|not able)\b"
    rf"|\bi (?:can['\u2019]?t|cannot|can not|won['\u2019]?t|will not|am not able to) (?:\w+ly )?{_DO}\b"
    r"|\bi (?:must|have to)? ?(?:decline|refuse) to\b|\bi must decline\b"
    rf"|\b(?:unable|not able) to {_DO}\b"
    r"|\bagainst (?:my|our|the) (?:guidelines|policy|policies)\b",
    re.IGNORECASE,
)
_STREAMED = re.compile(rb"\s*(?:data|event|id|retry|):")  # server-sent events
_IS_THOUGHT = re.compile(r"think|thought|reason|analysis|summary", re.IGNORECASE)  # types of a message's parts
THOUGHTS = (  # fields of a message
    "reasoning_content", "reasoning", "thinking", "reasoning_details", "reasoning_text", "thinking_blocks", "thoughts",
)  # fmt: skip
_CALLS = ("tool_calls", "function_call")  # fields of a message that may hold the answer's JSON, where tools were given
# Reasons for which a completion ended, besides "length": of Mistral, Gemini, Anthropic, Zhipu, and of none.
_CUT = frozenset({"model_length", "max_tokens", "max_output_tokens", "token_limit", "model_context_window_exceeded"})
_STOPPED = re.compile(r"filter|safety|sensitive|refus|prohibit|recitation|block|spii|moderat|guardrail", re.IGNORECASE)
_BROKEN = re.compile(r"error|abort|cancel|insufficient|time_?out|interrupt|unavailable", re.IGNORECASE)
SWITCH = (
    "switch thinking off at the server (vLLM: --default-chat-template-kwargs '{\"enable_thinking\":false}', llama.cpp: "
    "--reasoning-budget 0, Ollama: a model without thinking), or raise recipe.judge.max_tokens"
)


class UnusableError(Exception):
    """A reply without a judgement. `reason` is a short fixed word for masks and metrics; `detail` is human-readable."""

    def __init__(self, reason: str, detail: str = "", *, retry: bool = True) -> None:
        detail = printable(detail)  # a judge may write half an emoji, or what a terminal obeys
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.retry = retry  # whether the same may be sent again after a failure of transport


@dataclass(frozen=True)
class Usage:
    """Tokens that the endpoint says it used."""

    input: int = 0
    cached_input: int = 0
    output: int = 0


@dataclass(frozen=True)
class Reply:
    """A chat completion: the text of its first choice, why it ended, tokens."""

    text: str
    finish_reason: str
    usage: Usage
    tokens: tuple[dict[str, Any], ...] = ()  # `logprobs.content`, if it was given

    @property
    def cut(self) -> bool:
        """Whether the reply ended at the limit of its tokens."""
        return self.finish_reason == "length"


def read_body(body: bytes) -> Reply:
    """A chat completion from a response body.

    Raises:
        UnusableError: body_too_large, body_not_utf8, body_not_json, empty_body, error_body, no_choices, empty,
            truncated (a thought took all tokens) or refused.
    """
    if len(body) > MAX_BODY:
        raise UnusableError("body_too_large", f"over {MAX_BODY >> 20} MB")
    if not body.strip():
        raise UnusableError("empty_body")
    try:
        value: Any = json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UnusableError("body_not_utf8", repr(body[:40])) from None
    except (ValueError, RecursionError):
        if _STREAMED.match(body):
            raise UnusableError("body_not_json", "it streams, which was not asked for: switch that off") from None
        raise UnusableError("body_not_json", repr(body[:60])) from None
    if isinstance(value, list) and value and isinstance(value[0], dict) and value[0].get("error"):
        value = value[0]  # Gemini's way to say an error
    if not isinstance(value, dict):
        raise UnusableError("body_not_json", f"a JSON {type(value).__name__}")
    if value.get("error"):
        raise UnusableError("error_body", shown(read_error(value["error"])))
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UnusableError("no_choices", shown(read_error(value)) or f"keys {sorted(map(str, value))[:8]}")
    choice = choices[0]
    message = choice.get("message")
    finish = str(choice.get("finish_reason") or "").removeprefix("FinishReason.")
    if choice.get("error"):  # of OpenRouter, where a provider failed on the way
        raise UnusableError("error_body", shown(read_error(choice["error"])))
    if _BROKEN.search(finish):
        raise UnusableError("error_body", f"finish_reason {finish[:80]}")
    if not isinstance(message, dict):
        raise UnusableError("no_choices", "a choice without a message")
    if refusal := message.get("refusal") or _refusal_of(message.get("content")):
        raise UnusableError("refused", str(refusal)[:200])
    if _STOPPED.search(finish):
        raise UnusableError("refused", f"finish_reason {finish[:80]}")
    finish = "length" if finish.lower() in _CUT else finish
    text = _text_of(message.get("content"))
    if not text.strip():
        raise _nothing_in(message, finish)
    return Reply(
        text=text,
        finish_reason=finish,
        usage=read_usage(value),
        tokens=_tokens(choice.get("logprobs")),
    )


def _nothing_in(message: dict[str, Any], finish: str) -> UnusableError:
    """Why a message without content has no answer, and where its text lies."""
    where = next((name for name in THOUGHTS if message.get(name)), None)
    parts = message.get("content")
    if where is None and isinstance(parts, list) and any(is_thought(part) for part in parts):
        where = "parts of content that are marked so"
    if where is not None:
        what = f"content is empty, the text is in {where}, which is thought and not read: {SWITCH}"
        return UnusableError("truncated" if finish == "length" else "empty", what)
    if (call := next((name for name in _CALLS if message.get(name)), None)) is not None:
        return UnusableError(
            "empty", f"content is empty, it answers by {call}, which were not offered: switch off tools"
        )
    return UnusableError("empty", f"no text, finish_reason {finish[:80] or 'missing'}")


def read_usage(value: Any) -> Usage:
    """Token counts of a decoded body; zeros where the endpoint reports none."""
    usage = value.get("usage") if isinstance(value, dict) else None
    if not isinstance(usage, dict):
        return Usage()
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    return Usage(_count(usage.get("prompt_tokens")), _count(cached), _count(usage.get("completion_tokens")))


def read_version(value: Any) -> str:
    """Model and system fingerprint that a decoded body reports."""
    if not isinstance(value, dict):
        return ""
    return f"{_word(value.get('model'))} {_word(value.get('system_fingerprint'))}".strip()


def looks_like_refusal(text: str) -> bool:
    """Whether words without any JSON decline the task."""
    return "{" not in text and _REFUSAL.search(text[:600]) is not None


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _word(value: Any) -> str:
    return printable(value[:120]) if isinstance(value, str) else ""


def is_thought(part: Any) -> bool:
    """Whether a part of a message's content is marked as thought, by its type or a flag (`"thought": true`)."""
    if not isinstance(part, dict):
        return False
    return _IS_THOUGHT.search(str(part.get("type"))) is not None or any(
        item and _IS_THOUGHT.search(str(key)) for key, item in part.items()
    )


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, dict):  # a part, or the answer's JSON as it is
        return _text_of([content]) if "text" in content else json.dumps(content)
    if isinstance(content, list):  # some servers answer in parts
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        parts = [part for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
        return "".join(part["text"] for part in parts if not is_thought(part))
    return ""


def _refusal_of(content: Any) -> Any:
    """The words of a part of a message's content that declines."""
    parts = content if isinstance(content, list) else []
    return next((part["refusal"] for part in parts if isinstance(part, dict) and part.get("refusal")), None)


def _tokens(logprobs: Any) -> tuple[dict[str, Any], ...]:
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not all(
        isinstance(t, dict) and isinstance(t.get("token"), str) for t in content
    ):
        return ()
    return tuple({**token, "top_logprobs": _options(token.get("top_logprobs"))} for token in content)


def _options(given: Any) -> list[dict[str, Any]]:
    """The alternatives of a token that can be read."""
    return [option for option in given if isinstance(option, dict)] if isinstance(given, list) else []
