"""What of a reply is thought and what is answer. A draft inside a thought is never taken for the judgement.

The grammar, in EBNF; `text` is anything, and letters of tags may be of either case:

    reply    = json | channels | marked
    json     = one JSON object and nothing else, fenced or not: its strings may say anything, tags too
    channels = { text, "<|channel|>", name, [ text, "<|message|>" ], body }      (harmony, of gpt-oss)
    marked   = [ thought, close ], { text, open, thought, close }, text, [ open, thought ]
    open     = "<name>" | "[NAME]" | "◁name▷" | "<|name|>" | "<|begin_of_name|>" | "<|start_name|>" | "<|channel>name"
             | "<unused94>" | "<|inner_prefix|>" | "<details type='reasoning'>" | a fence of the language name
    close    = "</name>" | "[/NAME]" | "◁/name▷" | "<|/name|>" | "<|end_of_name|>" | "<|end_name|>" | "<channel|>"
             | "<unused95>" | "<|inner_suffix|>" | "</details>" | the fence's end
    name     = think, thinking, thought, thoughts, reasoning, reflection, scratchpad, analysis, ..., or one of these
               behind a prefix ("seed:think", "inner_thoughts") or before a suffix ("thought_process")

- The answer is every `text` outside of thoughts. All forms in it, fenced and plain, are compared by `parsing.py`.
- A close without an open makes a thought of everything before it, so only what follows the last of them counts: chat
  templates put the open into the prompt.
- Any close ends a thought, whatever opened it, and an open inside a thought opens nothing: models mix them.
- A thought that is not closed reaches to the end, and then there is no answer at all.
- Of channels, `final` is answer and every other one is thought; without `final` the thought is not closed. Servers that
  drop special tokens leave "analysis...assistantfinal...", which is read alike.

Sources: DeepSeek-R1, Qwen3 (think), Magistral ([THINK]), Kimi-VL (◁think▷), Seed-OSS (seed:think), Cohere Command A
(<|START_THINKING|>), OpenThinker (<|begin_of_thought|>), Gemma 4 (<|channel>thought), MedGemma (<unused94>), Apertus
(<|inner_prefix|>), Open WebUI (details), and OpenAI's harmony format.
"""

from __future__ import annotations

import json
import re

_NAME = (
    r"(?:[a-z]+[:_-])?(?:(?:ant)?think|(?:ant)?thinking|thought|thoughts|reason|reasoning|reflection|reflections|"
    r"rationale|scratchpad|analysis|monologue|deliberation|chain[_-]of[_-]thoughts?|cot)(?:[:_-][a-z0-9]+){0,4}"
)
_TAG = re.compile(
    rf"""
      (?:<|&lt;)\s*(?P<slash>/?)\s*{_NAME}(?:\s[^<>]*?)?(?P<empty>/?)\s*(?:>|&gt;)
    | [\[【]\s*(?P<slash2>/?)\s*{_NAME}\s*[\]】]
    | ◁\s*(?P<slash3>/?)\s*{_NAME}\s*▷
    | <\|\s*(?P<slash4>(?:begin|start|end)(?:_of)?_|/?){_NAME}\s*\|>
    | (?P<gemma><\|channel>\s*[a-z]+|<channel\|>)
    | (?P<open><unused94>|<\|inner_prefix\|>)
    | (?P<close><unused95>|<\|inner_suffix\|>)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_BLOCK = re.compile(  # a thought whose end is one of other things too
    rf"""<details\s[^<>]*?\btype\s*=\s*["']?reasoning\b[^<>]*>.*?(?P<end></details\s*>|\Z)
    | ^[ ]*(?P<fence>```|~~~)[ ]*{_NAME}[ ]*$.*?(?P<fence_end>^[ ]*(?P=fence)|\Z)""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_CHANNEL = re.compile(
    r"<\|channel\|>\s*(?P<name>[a-z]+)(?:[^<{\[]*(?:<\|constrain\|>[^<{\[]*)?<\|message\|>)?", re.IGNORECASE
)
_END_OF_MESSAGE = re.compile(r"<\|(?:end|return|call|start)\|>")
_BARE_HARMONY = re.compile(r"\s*(?:assistant\s*)?analysis(?=[^\s:.,;!?)\]}\"'*-])")  # "analysisWe see ..."
_BARE_FINAL = "assistantfinal"
_FENCE = re.compile(r"```[A-Za-z]*")


def answer_of(text: str) -> str | None:
    """The part of a reply that is answer, pieces joined by newlines; None where a thought is not closed."""
    if _is_json(text):
        return text
    if "<|channel|>" in text.lower():
        return _final_channels(text)
    if _BARE_HARMONY.match(text):
        _, found, rest = text.rpartition(_BARE_FINAL)
        return rest if found else None
    return _outside_of_tags(text)


def thinks(text: str) -> bool:
    """Whether a reply holds a thought of any words; tags around nothing are none."""
    answer = answer_of(text)
    return answer is None or _words(answer) not in (_words(text), _words(_TAG.sub("", text)))


def _words(text: str) -> str:
    return "".join(text.split())


def _is_json(text: str) -> bool:
    """Whether the text is one JSON object, or list, and nothing else."""
    inner = text.strip()
    if (fence := _FENCE.match(inner)) and inner.endswith("```"):
        inner = inner[fence.end() : -3]
    try:
        return isinstance(json.loads(inner), dict | list)
    except (ValueError, RecursionError):
        return False


def _final_channels(text: str) -> str | None:
    channels = list(_CHANNEL.finditer(text))
    ends = [channel.start() for channel in channels[1:]] + [len(text)]
    finals = []
    for channel, end in zip(channels, ends, strict=False):
        if channel["name"].lower() == "final":
            body = text[channel.end() : end]
            finals.append(_END_OF_MESSAGE.split(body, maxsplit=1)[0])
    return _outside_of_tags("\n".join(finals)) if finals else None


def _outside_of_tags(text: str) -> str | None:
    if any(not (block["end"] or block["fence_end"]) for block in _BLOCK.finditer(text)):
        return None
    text = _BLOCK.sub("\n", text)
    pieces: list[str] = []
    at, inside = 0, False
    for tag in _TAG.finditer(text):
        if tag["empty"]:  # "<think/>": no thought
            continue
        if not _closes(tag):
            if not inside:
                pieces.append(text[at : tag.start()])
            inside = True
        else:
            if not inside:
                pieces = []
            inside, at = False, tag.end()
    return None if inside else "\n".join([*pieces, text[at:]])


def _closes(tag: re.Match[str]) -> bool:
    if tag["open"] or tag["close"]:
        return tag["close"] is not None
    if tag["gemma"]:
        return tag["gemma"].lower() == "<channel|>"
    mark = next((tag[name] for name in ("slash", "slash2", "slash3", "slash4") if tag[name]), "")
    return mark == "/" or mark.lower().startswith("end")
