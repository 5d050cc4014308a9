"""What a publication says of where its base and its first adapter lie: names of the hub, never a path or a bucket."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from layerloop.components.schema.recipe import FAULTY, SHIPPED

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
RELEASED = "Qwen/Qwen-Image-Layered"  # the base whose licence is known here: Apache-2.0, by its card on the hub
_IN_CACHE = re.compile(r"(?:^|/)models--([^/]+?)--([^/]+)(?:/|$)")  # how the hub's own cache names a repository


def hub_name(text: str) -> str | None:
    """`owner/name` of a repository of the hub that `text` names: its name, an `hf://` URI, or a folder of the hub's
    cache; None for any other folder or bucket."""
    if text.startswith("hf://"):
        found = "/".join(text.removeprefix("hf://").split("/")[:2])
        return found if HUB_ID.fullmatch(found) else None
    if cached := _IN_CACHE.search(text):
        return f"{cached[1]}/{cached[2]}"
    return text if HUB_ID.fullmatch(text) and not Path(text).is_dir() else None


def base_title(base: str) -> str:
    """The base in words."""
    if base in SHIPPED:
        faults = ", with faults to unlearn" if base == FAULTY else ""
        return f"layerloop's tiny policy (a toy Qwen-Image-Layered{faults})"
    return hub_name(base) or "a base of Qwen-Image-Layered's kind that is not on the hub"


@dataclass(frozen=True)
class Licence:
    """Fields of the front matter, and what they mean in a sentence."""

    fields: dict[str, str]
    sentence: str


def licence_of(base: str, start: str | None) -> Licence:
    """The licence of an adapter by those of its base and of the adapter that it started from.

    `license` is a value of the hub's list; its `other` comes with `license_name`, and `license_link` where the hub has
    the terms (huggingface.co/docs/hub/repositories-licenses).
    """
    ours = base in SHIPPED or hub_name(base) == RELEASED
    if ours and start is None:
        return Licence({"license": "apache-2.0"}, "Apache-2.0, as its base.")
    if start is not None:
        where = hub_name(start)
        fields = {"license": "other", "license_name": "as-the-adapter-that-it-started-from"}
        named = f"`{where}`" if where else "another adapter, which is not on the hub"
        own = "the base's Apache-2.0" if ours else "that of its base"
        sentence = f"It started from {named}; that licence applies as well as {own}."
    elif where := hub_name(base):
        fields = {"license": "other", "license_name": "as-its-base"}
        sentence = f"That of its base, `{where}`."
    else:
        return Licence({"license": "unknown"}, "That of its base.")
    return Licence(fields | ({"license_link": f"https://huggingface.co/{where}"} if where else {}), sentence)
