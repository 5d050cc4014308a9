"""What a judge, or a gateway before it, says in the body of an error: the useful text, wherever it lies.

Shapes that are read, alone or inside one another:

    {"error": {"message": ..., "param": ..., "code": ...}}     OpenAI, vLLM, llama.cpp, Azure, LiteLLM, OpenRouter
    [{"error": {"message": ..., "details": [...]}}]            Gemini
    {"error": "text"}                                          LM Studio, Ollama's own API
    {"object": "error", "message": "text" | {"detail": [...]}} SGLang, earlier vLLM, Mistral
    {"detail": [{"loc": ["body", "seed"], "msg": ...}]}        FastAPI: Mistral, gateways
    {"errors": {"seed": ["Unknown field."]}}                   Rails, Django, .NET
    {"Message": ...}, {"fault": {"faultstring": ...}}          AWS, Apigee: keys in any case, that say what they hold
    {"error": {"metadata": {"raw": "{...}"}}}                  OpenRouter: the provider's own body as text
    JSON, or a Python literal of it, inside a text             LiteLLM: "litellm.BadRequestError: ... - {...}"
    HTML                                                       proxies

Sources: docs/JUDGE.md, section Endpoints.
"""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Iterator
from typing import Any

from layerloop.components.schema.messages import printable

LONGEST = 100_000  # characters of a body that are read
SHOWN = 300  # characters that are shown
DEEPEST = 12
_FIRST = ("message", "msg", "error", "errormessage", "errordescription", "detail", "details", "description", "title")
_NAMES = ("param", "field", "code", "type", "status", "reason")  # short words that say what is meant
_ECHOES = (
    "input",
    "content",
    "ctx",
    "url",
    "request",
    "body",
    "documentationurl",
    "help",
    "@type",
    "trace",
    "stack",
    "userid",
)
_SAYS = re.compile(r"message|msg|error|fault|reason|detail|descr|cause|exception|title|text|hint|info")
_MARKUP = re.compile(r"<(script|style|head)\b.*?</\1>|<!--.*?-->|<[^<>]{1,2000}>", re.DOTALL | re.IGNORECASE)
_TITLE = re.compile(r"<title[^<>]*>([^<]*)", re.IGNORECASE)


def read_error(body: Any) -> str:
    """All useful words of an error body (bytes, text or decoded) in one printable line, none twice; empty if
    it has none."""
    if isinstance(body, bytes):
        body = body.decode("utf-8", "replace")
    found: list[str] = []
    try:
        pieces = list(_words(body, 0))
    except RecursionError:
        pieces = [str(body)[:LONGEST]]
    for piece in pieces:
        line = " ".join(piece.split())
        if line and not any(line in earlier for earlier in found):
            found.append(line)
    return printable("; ".join(found)[:LONGEST])[:LONGEST]


def shown(text: str) -> str:
    """The text at a length that fits in a message: its beginning and its end."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 105]} ... {text[-100:]}"


def _words(value: Any, depth: int) -> Iterator[str]:
    if depth > DEEPEST or value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        yield from _of_text(value[:LONGEST], depth)
    elif isinstance(value, int | float):
        yield str(value)
    elif isinstance(value, list):
        for item in value[:50]:
            yield from _words(item, depth + 1)
    elif isinstance(value, dict):
        yield from _of_object(value, depth)


def _of_object(value: dict[Any, Any], depth: int) -> Iterator[str]:
    loc, given = value.get("loc"), {_name(key): item for key, item in value.items()}
    if isinstance(loc, list | tuple) and isinstance(why := given.get("msg") or given.get("type"), str):  # FastAPI
        yield f"{'.'.join(map(str, loc))}: {why}"
        return
    found = [piece for name in _FIRST for piece in _words(given.get(name), depth + 1)]
    yield from found
    for name in _NAMES:
        if isinstance(item := given.get(name), str | int) and not isinstance(item, bool) and item != "":
            yield f"{name} {str(item)[:200]}"
    others = {name: item for name, item in given.items() if name not in (*_FIRST, *_NAMES, *_ECHOES, "loc")}
    for name, item in others.items():
        if isinstance(item, list) and item and all(isinstance(part, str) for part in item):
            item = f"{name}: {', '.join(item)}"  # field and what is wrong with it
        elif not (isinstance(item, dict | list) or name == "raw" or _SAYS.search(name)):
            continue
        pieces = list(_words(item, depth + 1))
        found += pieces
        yield from pieces
    if not found:  # in words of its own
        yield from (f"{name} {item[:200]}" for name, item in others.items() if isinstance(item, str) and item.strip())


def _name(key: Any) -> str:
    """A key as it is compared: in lower case, without what parts words."""
    return re.sub(r"[_\s-]", "", str(key).lower())


def _of_text(text: str, depth: int) -> Iterator[str]:
    """The text, or what the JSON in it says and what is around that; HTML without its markup."""
    start = min((at for at in (text.find("{"), text.find("[")) if at >= 0), default=-1)
    inner, length = _decoded(text[start:]) if start >= 0 else (None, 0)
    if isinstance(inner, dict | list) and inner:
        before, after = text[:start].strip(" -:\n\t\"'b\ufeff"), text[start + length :].strip(" -:.\n\t\"'")
        if before:
            yield before
        yield from _words(inner, depth + 1)
        yield from _words(after, depth + 1)
        return
    if re.search(r"<\s*(?:!doctype|html|head|body|h1|title|p|pre|center)\b", text[:3000], re.IGNORECASE):
        title = _TITLE.search(text)
        plain = html.unescape(_MARKUP.sub(" ", text))
        if title and title[1].strip() and title[1].strip() not in plain:
            yield html.unescape(title[1])
        yield plain
        return
    yield text


def _decoded(text: str) -> tuple[Any, int]:
    """The JSON value, or Python literal, that a text begins with, and its length; None if there is none."""
    try:
        return json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        pass
    end = max(text.rfind("}"), text.rfind("]")) + 1
    if 0 < end <= 20_000:
        try:
            return ast.literal_eval(text[:end]), end
        except (ValueError, SyntaxError, MemoryError, TypeError, RecursionError):
            return None, 0
    return None, 0
