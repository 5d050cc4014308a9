"""Features of the API that an endpoint supports: all are asked for, and those that it refuses are given up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from layerloop.components.judge.requests import Request
from layerloop.components.schema.judging import JudgeRecipe


@dataclass(frozen=True)
class EndpointFeatures:
    """Features that the endpoint supports, disabled on a 400. The words of a request ask for JSON in any case, so no
    feature changes what is asked."""

    response_format: str = "json_schema"  # then json_object, then none
    limit_name: str = "max_tokens"  # or max_completion_tokens, the newer name
    seed: bool = True
    temperature: bool = True
    logprobs: bool = False

    def payload(self, request: Request, recipe: JudgeRecipe, *, seed: int, temperature: float) -> bytes:
        """The JSON body of a chat completion request."""
        options: dict[str, Any] = {"model": recipe.model, self.limit_name: request.max_tokens}
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
        """The features to try after a 400 with `message`; None if it names none that can be given up."""
        text = message.lower()
        if self.limit_name == "max_tokens" and "max_completion_tokens" in text:
            return replace(self, limit_name="max_completion_tokens")
        if self.logprobs and "logprobs" in text:
            return replace(self, logprobs=False)
        if self.seed and "seed" in text:
            return replace(self, seed=False)
        if self.temperature and "temperature" in text:
            return replace(self, temperature=False)
        if any(
            word in text for word in ("response_format", "json_schema", "json schema", "schema", "guided", "grammar")
        ):
            return self.plainer()
        return None

    def plainer(self) -> EndpointFeatures | None:
        """These with the next simpler way to ask for JSON; None where only words are left."""
        simpler = {"json_schema": "json_object", "json_object": "none"}.get(self.response_format)
        return None if simpler is None else replace(self, response_format=simpler)
