"""Where the judge is: one rule for the step that asks it and for the first step of a run, hours before."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError


def judge_address(given: str) -> str:
    """The base URL of the judge: `given`, else the environment's OPENAI_BASE_URL. Nothing is asked.

    Raises:
        LayerloopError: there is none, or it is no URL of HTTP.
    """
    name, url = ("judge_url", given.strip()) if given.strip() else ("OPENAI_BASE_URL", _from_environment())
    if not url:
        raise LayerloopError(
            "judge_url is empty and OPENAI_BASE_URL is not set: give an OpenAI-compatible base URL, such as that of "
            "`layerloop judge serve`"
        )
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or brackets that do not match
        good = False
    if not good or any(letter.isspace() for letter in url):
        raise LayerloopError(f"{name} is {without_secrets(url)!r}: give a base URL such as http://127.0.0.1:8788/v1")
    return url


def _from_environment() -> str:
    return os.environ.get("OPENAI_BASE_URL", "").strip()
