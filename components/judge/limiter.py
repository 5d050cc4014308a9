"""Congestion control for a judge: limit of requests in flight, circuit breaker, adaptive timeout.

All of it runs on one event loop, so there are no locks. Times are the loop's monotonic seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Hashable

from layerloop.components.schema.errors import UnavailableError

LATENCIES = 200  # of a shape of request that are remembered
PROBE = 20  # rounds of successes at a limit that was once too much, before one more is tried


class Limiter:
    """A limit on requests in flight: additive increase, additive decrease.

    Every 429 or 503 lowers it to one below what was in flight. It grows by one per success up to `good`, the highest
    limit that the judge was last seen to accept, and from there by one after PROBE rounds of successes. While most
    answers are 429 or 503 the judge is down, not full, and `good` stays as it was.

    Waiters are served by priority (lower first), then by ticket; a request that is sent again keeps the ticket of its
    first attempt, so that failures do not pile up for the end. `limit` starts at `maximum`.
    """

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.limit = self.lowest = self.good = maximum
        self.active = 0
        self._health = 1.0  # share of successes among recent answers
        self._successes = 0
        self._held_until = 0.0
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    def ticket(self) -> int:
        """The next position in the order of waiters."""
        return next(self._order)

    @contextlib.asynccontextmanager
    async def slot(self, priority: int = 0, ticket: int | None = None) -> AsyncIterator[None]:
        """Wait for a slot and hold it. No two waiters may have one ticket at a time."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, self.ticket() if ticket is None else ticket, waiter))
        self._admit()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():  # let in, and cancelled before it could run
                self.active -= 1
            waiter.cancel()
            self._admit()
            raise
        try:
            yield
        finally:
            self.active -= 1
            self._admit()

    def refused(self, retry_after: float | None) -> None:
        """The judge answered 429 or 503 to a request that still holds its slot; wait `retry_after` seconds."""
        if retry_after is not None:
            self._held_until = max(self._held_until, asyncio.get_running_loop().time() + retry_after)
        taken = max(1, min(self.limit, self.active) - 1)
        if self._health > 0.5:
            self.good = min(self.good, taken)
        self._health *= 1 - self._share()
        self._successes = 0
        self.limit = taken
        self.lowest = min(self.lowest, self.limit)

    def succeeded(self) -> None:
        """A request was answered."""
        self._health += (1 - self._health) * self._share()
        if self.limit >= self.maximum:
            return
        self._successes += 1
        if self.limit < self.good or self._successes >= PROBE * self.limit:
            self._successes = 0
            self.limit += 1
            self.good = max(self.good, self.limit)
            self._admit()

    def _share(self) -> float:
        return 1 / max(8, self.limit)

    def _admit(self) -> None:
        loop = asyncio.get_running_loop()
        wait = self._held_until - loop.time()
        if wait > 0:
            if self._timer is None:
                self._timer = loop.call_later(wait, self._resume)
            return
        while self._waiting and self.active < self.limit:
            _, _, waiter = heapq.heappop(self._waiting)
            if not waiter.done():
                self.active += 1
                waiter.set_result(None)

    def _resume(self) -> None:
        self._timer = None
        self._admit()


class Breaker:
    """Opens when the judge is gone: `failures` in a row and no success for `seconds`. It fails the step at once: all
    replies are stored, and a retry of the step resumes from them."""

    def __init__(self, where: str, *, failures: int, seconds: float) -> None:
        self.where, self.failures, self.seconds = where, failures, seconds
        self._row = 0
        self._last_good: float | None = None
        self.last_good = float("-inf")  # monotonic seconds of the last success

    def good_since(self, moment: float) -> bool:
        """Whether any request succeeded after `moment`, in monotonic seconds."""
        return self.last_good > moment

    def good(self) -> None:
        """Record a success, which resets the count of failures."""
        self._row = 0
        self._last_good = asyncio.get_running_loop().time()
        self.last_good = time.monotonic()

    def bad(self, reason: str) -> None:
        """Count a failure of the judge or of the way to it (not an unusable answer).

        Raises:
            UnavailableError: that was one too many.
        """
        now = asyncio.get_running_loop().time()
        if self._last_good is None:
            self._last_good = now
        self._row += 1
        silent = now - self._last_good
        if self._row >= self.failures and silent >= self.seconds:
            raise UnavailableError(
                f"judge {self.where} failed {self._row} requests in a row, none succeeded for {silent:.0f} s "
                f"(last: {reason}): see its log; what it has answered is stored, so run the step again when it is back"
            )


class AdaptiveTimeout:
    """Timeout of a request: `factor` times the 90th percentile of the latencies of its shape.

    At most a tenth of the requests may time out by it, so that a judge that became slower for all requests is not asked
    everything twice. It needs more latencies than two rounds of what may be in flight, because the first answers are
    those of requests that did not queue at the judge; until then, and beyond a tenth, it is `timeout`.
    """

    SHARE = 0.1
    ENOUGH = 20  # latencies seen, at least, before their distribution means something

    def __init__(self, factor: float, timeout: float, *, in_flight: int = 1) -> None:
        self.factor, self.timeout = factor, timeout
        self.enough = max(self.ENOUGH, 2 * in_flight + 1)
        self.window = max(LATENCIES, 2 * in_flight)
        self._seen: dict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=self.window))
        self._usual: dict[Hashable, float] = {}
        self._counts: Counter[Hashable] = Counter()
        self.sent = 0
        self.given_up = 0

    def seconds(self, shape: Hashable, given_up: int = 0) -> float:
        """Timeout in seconds of a request sent now; doubled for each time that it was given up before."""
        self.sent += 1
        usual = self._usual.get(shape)
        if not self.factor or usual is None or self.given_up >= self.SHARE * self.sent:
            return self.timeout
        return min(self.timeout, max(self.factor * usual * 2**given_up, 0.05))

    def saw(self, shape: Hashable, seconds: float) -> None:
        """Record the latency of an answer."""
        seen = self._seen[shape]
        seen.append(seconds)
        self._counts[shape] += 1
        count = self._counts[shape]
        if count >= self.enough and (count < self.window or count % 8 == 0):
            self._usual[shape] = sorted(seen)[int(0.9 * len(seen))]

    def gave_up(self, shape: Hashable, seconds: float) -> None:
        """Record a request that was given up; it would have taken longer still, so its time counts as a latency."""
        self.given_up += 1
        self.saw(shape, seconds)
