"""How an endpoint serves the model: whether it thinks before it answers, and whether a shared prefix is computed once.

A campaign's requests about one group share the rubric and the source image. Servers promise to compute such a prefix
once; for models with hybrid attention, Qwen3.5 among them, they may not (docs/JUDGE.md). So it is measured here, on
this endpoint: the same prefix twice, against prefixes that it cannot have seen.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from layerloop.components.judge.canaries import make_canaries
from layerloop.components.judge.features import EndpointFeatures
from layerloop.components.judge.images import candidate_images, encode_image, fitted
from layerloop.components.judge.methods import PHASE1
from layerloop.components.judge.replies import THOUGHTS, is_thought, read_usage
from layerloop.components.judge.requests import Request
from layerloop.components.judge.rubric import Rubric
from layerloop.components.judge.thoughts import thinks
from layerloop.components.judge.transport import BUSY, Connection, TransportError
from layerloop.components.schema.judging import JudgeRecipe

WAITS, LONGEST_WAIT = 3, 20.0  # for a judge that is busy, and seconds of one
ROUNDS = 3  # prefixes that are sent twice
SHORT = 16  # tokens of an answer, so that its time is that of its prefix
FASTER = 0.8  # share of the time of a new prefix, below which a known one counts as cached
LEAST = 0.05  # seconds that this saves at least: less is chance
SOME = 0.1  # share of a request's tokens that are reported as cached, from which they count


async def post(connection: Connection, payload: bytes, *, timeout: float) -> tuple[bytes, float]:
    """A completion's body and the seconds that it took; a judge that is busy is asked again, a few times, as it says.

    Raises:
        TransportError: as `Connection.post`.
    """
    wait = 0
    while True:
        began = time.monotonic()
        try:
            return await connection.post(payload, timeout=timeout), time.monotonic() - began
        except TransportError as error:
            if error.status not in BUSY or wait == WAITS:
                raise
            await asyncio.sleep(min(error.retry_after or 2.0**wait, LONGEST_WAIT))
        wait += 1


@dataclass(frozen=True)
class Prefixes:
    """What requests with a known prefix cost, beside those with a new one; medians."""

    seconds_new: float
    seconds_known: float
    tokens: int  # of a request
    cached: int | None  # of a request with a known prefix, as reported; None where nothing is

    @property
    def effective(self) -> bool:
        """Whether the shared part is computed once, by the endpoint's report, else by the time."""
        if self.cached is not None:
            return self.cached >= SOME * self.tokens
        return self.seconds_known <= min(FASTER * self.seconds_new, self.seconds_new - LEAST)

    def __str__(self) -> str:
        took = f"a known prefix takes {self.seconds_known:.2f} s, a new one {self.seconds_new:.2f} s"
        if self.cached is None:
            return f"{'likely' if self.effective else 'no effect seen'} ({took}; cached tokens are not reported)"
        share = f"{self.cached} of {self.tokens} tokens cached; {took}"
        return f"yes ({share})" if self.effective else f"no effect ({share})"


async def try_prefixes(
    connection: Connection, rubric: Rubric, recipe: JudgeRecipe, features: EndpointFeatures, *, timeout: float
) -> Prefixes | None:
    """Send prefixes that the endpoint cannot know, each of them twice, with another candidate behind it the second
    time, as a campaign does. None where it refuses them."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    tokens: list[int] = []
    cached: list[int | None] = []
    rng = np.random.default_rng()
    for _ in range(ROUNDS):
        noise = rng.integers(0, 256, (recipe.resolution, recipe.resolution, 3), np.uint8)
        for known in (False, True):
            request = _shared(rubric, recipe, noise, design=int(known))
            try:
                body, took = await post(
                    connection, features.payload(request, recipe, seed=1, temperature=0.0), timeout=timeout
                )
            except TransportError:
                return None
            seconds[known].append(took)
            if known:
                count, reported = _cached_tokens(body)
                tokens.append(count)
                cached.append(reported)
    reports = [count for count in cached if count is not None]
    return Prefixes(
        statistics.median(seconds[False]),
        statistics.median(seconds[True]),
        int(statistics.median(tokens)),
        int(statistics.median(reports)) if reports else None,
    )


def _shared(rubric: Rubric, recipe: JudgeRecipe, source: np.ndarray, *, design: int) -> Request:
    """A phase-1 request about one of two candidates, behind the rubric and a source of their own."""
    stack = fitted(make_canaries(design)[0].stack, recipe.resolution)
    images = candidate_images(stack, recipe.backdrops[:1])
    request = PHASE1[recipe.method].request(rubric, encode_image(source), images, recipe, label="prefix")
    return replace(request, max_tokens=SHORT)


def _cached_tokens(body: bytes) -> tuple[int, int | None]:
    """(tokens of the prompt, those of them that were cached, None where that is not reported)."""
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        return 0, None
    usage = read_usage(value)
    details = value["usage"].get("prompt_tokens_details") if usage.input else None
    reported = isinstance(details, dict) and isinstance(details.get("cached_tokens"), int)
    return usage.input, usage.cached_input if reported else None


def thought_in(body: bytes) -> str | None:
    """Where a completion has thought before its answer; None where it has none."""
    try:
        value: Any = json.loads(body)
        message = value["choices"][0]["message"]
        fields = [name for name in THOUGHTS if message.get(name)]
        details = (value.get("usage") or {}).get("completion_tokens_details") or {}
        count = details.get("reasoning_tokens") or 0
        content = message.get("content")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None
    if fields:
        return f"in the field {fields[0]}"
    if isinstance(count, int) and count > 0:
        return f"{count} tokens, hidden"
    if isinstance(content, list) and any(is_thought(part) for part in content):
        return "in a part of the content"
    return "in the text" if isinstance(content, str) and thinks(content) else None


async def try_thinking(
    connection: Connection, request: Request, recipe: JudgeRecipe, features: EndpointFeatures, *, timeout: float
) -> tuple[list[str | None], str]:
    """Of some answers to one request, each with another seed, where they have thought, None where they have not; and
    why the last one that did not come did not."""
    found: list[str | None] = []
    why = ""
    for seed in range(ROUNDS):
        payload = features.payload(request, recipe, seed=seed, temperature=recipe.temperature)
        try:
            found.append(thought_in((await post(connection, payload, timeout=timeout))[0]))
        except TransportError as error:
            why = str(error)
    return found, why
