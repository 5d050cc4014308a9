"""Features of the API that an endpoint supports: all are asked for, and those that it refuses are given up."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from layerloop.components.judge.requests import Request
from layerloop.components.schema.judging import JudgeRecipe

_ABOUT_FORMAT = re.compile(
    r"response[_ ]?format|json[_ ]?(?:schema|object|mode|output|response|repl)|\bschema\b|guided|grammar|"
    r"structured[_ ]?(?:output|response|generation)|constrained|xgrammar|\bstrict\b"
)
_REFUSED = re.compile(
    r"support|unknown|unrecogni[sz]ed|unexpected|extra|not permitted|not allowed|forbidden|"
    r"cannot find field|deprecated|additional|invalid (?:parameter|argument|field)|not a valid"
)


def _refuses(text: str, name: str) -> bool:
    """Whether a message says that the parameter is not known, and not that its value is too large."""
    found = re.search(rf"(?<![\w]){name}(?!\w)", text)
    return found is not None and _REFUSED.search(text) is not None and "too large" not in text


@dataclass(frozen=True)
class EndpointFeatures:
    """Features that the endpoint supports, disabled on a 400. The words of a request ask for JSON in any case, so no
    feature changes what is asked."""

    response_format: str = "json_schema"  # then json_object, then none
    limit_name: str = "max_tokens"  # or max_completion_tokens, the newer name, or empty: no limit is sent
    seed: bool = True
    temperature: bool = True
    logprobs: bool = False

    def payload(self, request: Request, recipe: JudgeRecipe, *, seed: int, temperature: float) -> bytes:
        """The JSON body of a chat completion request."""
        options: dict[str, Any] = {"model": recipe.model}
        if self.limit_name:
            options[self.limit_name] = request.max_tokens
        if self.temperature:
            options["temperature"] = temperature
        if self.seed:
            options["seed"] = seed
        if self.logprobs:
            options |= {"logprobs": True, "top_logprobs": 20}
        if self.response_format == "json_schema":
            schema = {"name": request.kind, "schema": request.schema, "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self.response_format == "json_object":
            options["response_format"] = {"type": "json_object"}
        return request.payload(options)

    def without(self, message: str) -> EndpointFeatures | None:
        """The features to try after a 4xx with `message`; None if it names none that can be given up."""
        text = message.lower()
        if self.limit_name == "max_tokens" and ("use 'max_completion_tokens'" in text or _refuses(text, "max_tokens")):
            return replace(self, limit_name="max_completion_tokens")
        if self.limit_name == "max_completion_tokens" and _refuses(text, "max_completion_tokens"):
            return replace(self, limit_name="")
        if self.logprobs and "logprobs" in text:
            return replace(self, logprobs=False)
        if self.seed and re.search(r"\bseed\b", text):
            return replace(self, seed=False)
        if self.temperature and "temperature" in text:
            return replace(self, temperature=False)
        return self.plainer() if _ABOUT_FORMAT.search(text) else None

    def blindly(self) -> EndpointFeatures | None:
        """The features to try after a 4xx without a reason, one less each time; None where nothing is left."""
        if (simpler := self.plainer()) is not None:
            return simpler
        if self.seed:
            return replace(self, seed=False)
        if self.temperature:
            return replace(self, temperature=False)
        if self.logprobs:
            return replace(self, logprobs=False)
        return replace(self, limit_name="max_completion_tokens") if self.limit_name == "max_tokens" else None

    def given_up(self, since: EndpointFeatures) -> list[str]:
        """What these lack that `since` had, in words."""
        out = []
        if self.response_format != since.response_format:
            then = {"json_object": "a JSON object", "none": "JSON in words"}[self.response_format]
            out.append(f"response_format {since.response_format} ({then} is asked for)")
        if self.limit_name != since.limit_name:
            out.append(f"{since.limit_name} ({self.limit_name or 'no limit'} is sent)")
        out += [
            name for name in ("seed", "temperature", "logprobs") if getattr(since, name) and not getattr(self, name)
        ]
        return out

    def plainer(self) -> EndpointFeatures | None:
        """These with the next simpler way to ask for JSON; None where only words are left."""
        simpler = {"json_schema": "json_object", "json_object": "none"}.get(self.response_format)
        return None if simpler is None else replace(self, response_format=simpler)
