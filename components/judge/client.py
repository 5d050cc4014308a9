"""Async client to any OpenAI-compatible judge: concurrency control, adaptive timeouts, validation, a response cache.

    scores, reply = await judge.ask(request)        or UnusableError with the reason of the mask

Transport failures are retried with jitter, outside their slot. Unusable answers are redrawn with another seed.
Replies are stored by the hash of what was asked as they come, and looked up before anything is sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import random
import re
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from layerloop.components.judge.batch import Batches, Ledger, LedgerMemory
from layerloop.components.judge.endpoint import NO_ROUTE, REFUSALS, Endpoint
from layerloop.components.judge.errors import shown
from layerloop.components.judge.features import EndpointFeatures
from layerloop.components.judge.limiter import AdaptiveTimeout, Breaker, Limiter
from layerloop.components.judge.parsing import expected_scores, parse
from layerloop.components.judge.replies import PAID, Reply, UnusableError, read_body
from layerloop.components.judge.requests import Request, Scores
from layerloop.components.judge.statistics import Statistics
from layerloop.components.judge.transport import BUSY, Connection, ForbiddenError, TransportError
from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.schema.runtime import JudgeRuntime
from layerloop.components.schema.seeds import seed_for

NO_KEY = "none"  # sent where OPENAI_API_KEY is not set: local servers take any
RETRY_TEMPERATURE = 0.4  # at least, when an answer was unusable: at 0 the same one would come again
REFUSED = frozenset({"refused", "http_400", "http_403", "http_422", "http_451"})  # reasons that a judge would not
NEVER = 1e6  # runtime.judge.give_up_seconds from which a judge never counts as gone, and every failure is a mask
FIRST_DELAY, LONGEST_DELAY = 0.25, 20.0  # seconds between attempts, doubling, times a random 0.5..1
ABOUT_CONTENT = re.compile(  # of a refused request, not of a feature: another one may be answered as it is
    r"image|picture|token|context|length|large|model|content|filter|polic|safety|moderat|flagged|prohibit|violat|harm|"
    r"inappropriate|sensitive|\u654f\u611f|\u8fdd\u89c4",  # Chinese: "sensitive", "against the rules"
    re.IGNORECASE,
)


class ReplyStore(Protocol):
    """Storage of replies; the step keeps them in the campaign. `get` and `put` are called from worker threads."""

    def __contains__(self, key: str) -> bool: ...

    def get(self, key: str) -> bytes:
        """A stored reply."""

    def put(self, key: str, data: bytes) -> bytes:
        """Store a reply; returns the one that counts, which may be one that was stored meanwhile."""


class ReplyMemory:
    """A `ReplyStore` that lasts as long as the process."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.kept

    def get(self, key: str) -> bytes:
        return self.kept[key]

    def put(self, key: str, data: bytes) -> bytes:
        return self.kept.setdefault(key, data)


class Judge:
    """An open judge. Use as `async with Judge(url, recipe) as judge`.

    Args:
        url: Base URL of the API, ending in /v1 as a rule.
        recipe: How to judge.
        runtime: How to call the endpoint; by default JudgeRuntime's defaults.
        replies: Storage of replies; in memory by default.
        api_key: The environment's OPENAI_API_KEY by default.
        seed: Of the campaign; the sampling seed of every request follows from it.
        ledger: Storage of the batches in progress, in batch mode.

    `log` takes a line about each feature that the endpoint refuses, once; set it to see them.
    """

    def __init__(
        self,
        url: str,
        recipe: JudgeRecipe,
        runtime: JudgeRuntime | None = None,
        *,
        replies: ReplyStore | None = None,
        api_key: str | None = None,
        seed: int = 0,
        ledger: Ledger | None = None,
    ) -> None:
        self.url, self._base_url = without_secrets(url), url  # the first is shown
        self.recipe, self.seed = recipe, seed
        self.runtime = runtime = runtime or JudgeRuntime()
        self.replies: ReplyStore = replies if replies is not None else ReplyMemory()
        self.limiter = Limiter(runtime.concurrency)
        self.breaker = Breaker(url, failures=max(8, 2 * runtime.concurrency), seconds=runtime.give_up_seconds)
        self.adaptive_timeout = AdaptiveTimeout(
            runtime.timeout_factor, runtime.timeout_seconds, in_flight=runtime.concurrency
        )
        self.statistics = Statistics()
        self.features = EndpointFeatures(logprobs=recipe.extraction == "expected")
        self.batches: Batches | None = None
        self._ledger: Ledger = ledger if ledger is not None else LedgerMemory()
        self.log: Callable[[str], None] = lambda line: None
        self._key = _key(api_key) or _key(os.environ.get("OPENAI_API_KEY")) or NO_KEY
        self._jitter = random.Random()
        self._asked: set[str] = set()  # keys of the replies that came since this was made

    async def __aenter__(self) -> Self:
        self.connection = Connection(self._base_url, self._key)
        self.endpoint = Endpoint(self.connection, self.recipe.model, self.runtime)
        if self.runtime.batch.enabled:
            self.batches = Batches(self.connection, self.runtime.batch, self._ledger)
            await self.batches.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.batches is not None:
            await self.batches.close()
        await self.connection.close()

    async def check_reachable(self, *, probe: bool = False) -> list[str]:
        """Ids of the models that are served; see `Endpoint.check`."""
        return await self.endpoint.check(probe=probe)

    async def ask(
        self, request: Request, *, sample: int = 0, priority: int = 0, refusals: int = 0
    ) -> tuple[Scores, Reply]:
        """The scores of a request's rows, and the reply they were read from.

        An unusable answer is drawn again, `recipe.redraws` times at most; a refusal `refusals` times. Answers that an
        earlier attempt of the step stored are read first. Those that it stored and could not use are not the end: the
        request is then asked as often as a new one, under keys of its own, so that no reply is paid twice.

        Raises:
            UnusableError: there is no judgement; the caller masks with its reason.
            LayerloopError: the judge is gone, or it refuses the key.
        """
        drawn = refused = 0  # unusable answers and refusals among them, of this attempt of the step or of one before
        redraw = 0
        while True:
            key = self._address(request, sample, redraw)
            earlier = key in self.replies and key not in self._asked
            try:
                if key in self.replies:
                    return await self._recall(request, key)
                return self._read(request, await self._fetch(request, key, sample, redraw, priority))
            except UnusableError as error:
                drawn += 1
                refused += error.reason in REFUSED
                may = error.retry or error.reason in REFUSED  # what else may not was retried, by its transport
                if may and drawn <= self.recipe.redraws and refused <= refusals:
                    self.statistics.invalid_retries += 1
                elif earlier:
                    drawn = refused = 0
                else:
                    raise
                if key in self.replies:  # a request that was refused without a reply is sent again as it is
                    redraw += 1

    async def recall(self, request: Request, *, sample: int = 0) -> Scores | UnusableError | None:
        """The scores that replies of an earlier attempt of the step give, or why none of them does; None without any.
        Nothing is asked."""
        found: UnusableError | None = None
        for redraw in itertools.count():
            key = self._address(request, sample, redraw)
            if key not in self.replies or key in self._asked:
                return found
            try:
                return self._read(request, read_body(await asyncio.to_thread(self.replies.get, key)))[0]
            except UnusableError as error:
                found = error
        return found

    async def _recall(self, request: Request, key: str) -> tuple[Scores, Reply]:
        body = await asyncio.to_thread(self.replies.get, key)
        self.statistics.cache_hits += 1
        self.statistics.count(body)
        return self._read(request, read_body(body))

    def _read(self, request: Request, reply: Reply) -> tuple[Scores, Reply]:
        scores = parse(request, reply)
        if self.recipe.extraction == "expected":
            scores, missing = expected_scores(request, reply, scores)
            self.statistics.missing_logprobs += missing
        return scores, reply

    def _address(self, request: Request, sample: int, redraw: int) -> str:
        recipe = self.recipe
        what = [request.digest, recipe.model, repr(recipe.temperature), recipe.extraction, self.seed, sample, redraw]
        return hashlib.sha256("\n".join(map(str, what)).encode()).hexdigest()

    async def _fetch(self, request: Request, key: str, sample: int, redraw: int, priority: int) -> Reply:
        """One stored reply, over as many attempts as the runtime allows.

        A body that is not a completion (HTML of a proxy, half a body) counts as a failure of transport: nothing was
        paid, so nothing is stored. A completion is stored before it is read for scores. Only a request that fails while
        the judge answers others is masked: as long as nothing is answered it waits.
        """
        attempts, given_up, delay = 0, 0, FIRST_DELAY
        began = before = time.monotonic()  # of the first failure, and of the one before the last
        alone = 0  # failures in a row, after all retries, while the judge answered others
        ticket = self.limiter.ticket()
        while True:
            try:
                if self.batches is not None:
                    features = self.features
                    self.statistics.sent += 1
                    body = await self.batches(key, self._payload(request, features, sample, redraw))
                else:
                    async with self.limiter.slot(priority, ticket):
                        features = self.features  # as other requests left them while this one waited
                        payload = self._payload(request, features, sample, redraw)
                        body = await self._send(payload, (request.kind, request.rows, request.images), given_up)
                        return await self._accept(key, body)  # in its slot: what is paid and not stored yet is little
                return await self._accept(key, body)
            except TransportError as error:
                failure, problem = error, error.problem
            self.statistics.failures[problem.reason] += 1
            if problem.reason == "slow":
                given_up += 1
                continue
            if failure.status in REFUSALS and self._downgrade_request(features, failure):
                continue
            if failure.status in NO_ROUTE and not self.statistics.answered:
                raise self.endpoint.not_served(failure)
            attempts += 1
            now = time.monotonic()
            began, before, since = (now if attempts == 1 else began), now, before
            final = not problem.retry or attempts > self.runtime.retries
            if final and problem.retry and self._waits_out_outages:
                # Twice, because a success just after the first failure may be the last before an outage.
                alive = failure.status not in BUSY and (
                    self.breaker.good_since(since) or await self.endpoint.is_alive()
                )
                alone = alone + 1 if alive else 0
                if not alive and now - max(began, self.breaker.last_good) >= self.runtime.give_up_seconds:
                    raise UnavailableError(
                        f"judge {self.url} answered nothing for {now - began:.0f} s (last: {problem}): see its log; "
                        "what it has answered is stored, so run the step again when it is back"
                    )
                final = alone > 1
            if final:
                problem.retry = False  # without an answer there is nothing to redraw
                raise problem
            await asyncio.sleep(delay * self._jitter.uniform(0.5, 1.0))
            delay = min(2 * delay, LONGEST_DELAY)

    @property
    def _waits_out_outages(self) -> bool:
        return self.batches is None and self.runtime.give_up_seconds < NEVER

    def _payload(self, request: Request, features: EndpointFeatures, sample: int, redraw: int) -> bytes:
        seed = seed_for(request.digest, self.seed, sample, redraw) & 0x7FFFFFFF
        temperature = max(self.recipe.temperature, RETRY_TEMPERATURE) if redraw else self.recipe.temperature
        return features.payload(request, self.recipe, seed=seed, temperature=temperature)

    async def _send(self, payload: bytes, shape: tuple[str, int, int], given_up: int) -> bytes:
        """One HTTP request in its slot, observed by limiter, breaker and adaptive timeout."""
        timeout = self.runtime.timeout_seconds
        allowed = self.adaptive_timeout.seconds(shape, given_up)
        start = time.monotonic()
        self.statistics.sent += 1
        try:
            async with asyncio.timeout(allowed):
                body = await self.connection.post(payload, timeout=timeout)
        except TimeoutError:
            if allowed < timeout:
                self.adaptive_timeout.gave_up(shape, time.monotonic() - start)
                self.statistics.given_up += 1
                raise TransportError(UnusableError("slow", f"over {allowed:.1f} s")) from None
            self.breaker.bad("timeout")
            raise TransportError(UnusableError("timeout", f"over {timeout:g} s")) from None
        except ForbiddenError as error:
            await self.endpoint.is_alive()  # raises it again where the key is refused, whatever is asked
            self.connection.saw_answer()
            problem = UnusableError("http_403", shown(error.text), retry=False)
            raise TransportError(problem, status=403, text=error.text) from None
        except TransportError as error:
            if error.status in BUSY:
                self.statistics.rate_limited += 1
                self.limiter.refused(error.retry_after)
            if error.problem.retry:
                self.breaker.bad(str(error.problem))
            raise
        seconds = time.monotonic() - start
        self.adaptive_timeout.saw(shape, seconds)
        self.statistics.latencies.append(seconds)
        self.limiter.succeeded()
        return body

    async def _accept(self, key: str, body: bytes) -> Reply:
        """Read and store a body that came with status 200.

        Raises:
            TransportError: it is not a completion.
            UnusableError: the judge refused, or the text is empty; that is stored too, for it was paid.
        """
        problem: UnusableError | None = None
        try:
            reply = read_body(body)
        except UnusableError as error:
            if error.reason not in PAID:
                self.breaker.bad(str(error))
                raise self.connection.error_in_body(error, body) from None
            problem = error
        self.breaker.good()
        self.connection.saw_answer()
        self.statistics.answered += 1
        self.statistics.count(body)
        self._asked.add(key)
        if (stored := await asyncio.to_thread(self.replies.put, key, body)) != body:
            return read_body(stored)  # two runs have one campaign: both judge by the same replies
        if problem is not None:
            raise problem
        return reply

    def _downgrade_request(self, used: EndpointFeatures, failure: TransportError) -> bool:
        """Give up the feature that a 4xx names, for all requests; returns whether to send the refused one again."""
        if self.features == used:
            simpler = self.simpler(used, failure)
            if simpler is None:
                return False
            self.features = simpler
        return True  # another request has changed the features meanwhile

    def simpler(self, used: EndpointFeatures, failure: TransportError) -> EndpointFeatures | None:
        """The features to try after a 4xx, said in one line; None where there is nothing to give up.

        A 4xx without any reason is taken for one about some feature, as long as nothing was answered.
        """
        message = failure.text.replace(self.recipe.model, "")
        simpler = used.without(message)
        if simpler is None and not self.connection.answered and not ABOUT_CONTENT.search(message):
            simpler = used.blindly()
        if simpler is not None:
            what, why = ", ".join(simpler.given_up(used)), shown(failure.text) or f"HTTP {failure.status}"
            self.log(f"judge {self.url} refuses {what}: goes on without ({why})")
        return simpler


def _key(text: str | None) -> str:
    """A key without the blanks, newlines and quotation marks around it that files and clipboards add.

    Raises:
        LayerloopError: it has characters that no HTTP header can carry.
    """
    key = (text or "").strip().strip("\ufeff\u200b").strip()
    if len(key) > 1 and key[0] == key[-1] and key[0] in "\"'":  # Docker's --env-file keeps them
        key = key[1:-1].strip()
    if not all("!" <= char <= "~" for char in key):
        raise LayerloopError("OPENAI_API_KEY has a blank or another character inside that no key has: copy it again")
    return key
