"""Congestion control by itself, on an event loop without any network."""

from __future__ import annotations

import asyncio

import pytest

from layerloop.components.judge.limiter import PROBE, AdaptiveTimeout, Breaker, Limiter
from layerloop.components.judge.transport import read_retry_after
from layerloop.components.schema.errors import LayerloopError


def test_slots_are_given_by_priority_then_in_order() -> None:
    async def main() -> list[str]:
        limiter, done = Limiter(1), []

        async def work(name: str, priority: int) -> None:
            async with limiter.slot(priority):
                done.append(name)
                await asyncio.sleep(0)

        await asyncio.gather(*(work(n, p) for n, p in [("a", 1), ("b", 1), ("c", 0), ("d", 1), ("e", 0)]))
        return done

    assert asyncio.run(main()) == ["a", "c", "e", "b", "d"]


def test_what_is_sent_again_goes_before_what_was_never_sent() -> None:
    async def main() -> list[str]:
        limiter, done = Limiter(1), []

        async def work(name: str, attempts: int) -> None:
            ticket = limiter.ticket()
            for _ in range(attempts):
                async with limiter.slot(0, ticket):
                    await asyncio.sleep(0)
            done.append(name)

        await asyncio.gather(work("fails once", 2), *(work(name, 1) for name in "abcdef"))
        return done

    assert asyncio.run(main()).index("fails once") <= 2


def test_a_cancelled_waiter_leaves_no_slot_taken() -> None:
    async def main() -> int:
        limiter = Limiter(1)
        async with limiter.slot():
            waiting = asyncio.create_task(limiter.slot().__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        async with asyncio.timeout(1), limiter.slot():
            return limiter.active

    assert asyncio.run(main()) == 1


def test_the_limit_comes_back_fast_after_an_outage() -> None:
    async def main() -> tuple[int, int]:
        limiter = Limiter(64)
        for _ in range(300):
            limiter.active = max(1, limiter.limit)
            limiter.refused(None)
        low = limiter.limit
        for _ in range(80):
            limiter.succeeded()
        return low, limiter.limit

    low, high = asyncio.run(main())
    assert low == 1 and high >= 20


def test_one_refusal_lowers_the_limit_by_one() -> None:
    async def main() -> int:
        limiter = Limiter(16)
        limiter.active = 16
        limiter.refused(None)
        return limiter.limit

    assert asyncio.run(main()) == 15


def test_the_limit_grows_beyond_what_was_once_too_much_only_after_many_rounds_of_successes() -> None:
    async def main() -> list[int]:
        limiter = Limiter(16)
        limiter.active = 16
        limiter.refused(None)
        assert (limiter.limit, limiter.good) == (15, 15)
        limits = []
        for _ in range(PROBE * 15):
            limits.append(limiter.limit)
            limiter.succeeded()
        return [*limits, limiter.limit]

    *before, after = asyncio.run(main())
    assert set(before) == {15} and after == 16


def test_the_adaptive_timeout_needs_evidence_and_has_a_budget() -> None:
    timeout = AdaptiveTimeout(2.0, 100.0)
    assert timeout.seconds("phase1") == 100.0
    for _ in range(20):
        timeout.seconds("phase1")
        timeout.saw("phase1", 1.0)
    assert timeout.seconds("phase1") == pytest.approx(2.0)
    assert timeout.seconds("phase2") == 100.0  # nothing is known of grids yet
    for _ in range(3):
        timeout.gave_up("phase1", 2.0)
    assert timeout.seconds("phase1") == 100.0  # a tenth of what was sent


def test_the_adaptive_timeout_is_not_set_by_the_first_round() -> None:
    """With 48 in flight at a judge of 32 slots, the first 32 answers take one round and the next ones two."""
    timeout = AdaptiveTimeout(1.5, 100.0, in_flight=48)
    for _ in range(32):
        timeout.saw("phase1", 1.0)
    assert timeout.seconds("phase1") == 100.0
    for seconds in (2.0, 1.0) * 33:
        timeout.saw("phase1", seconds)
    assert timeout.seconds("phase1") == pytest.approx(3.0)  # not 1.5, which would give up sound requests


def test_the_breaker_needs_failures_in_a_row_and_silence() -> None:
    async def main() -> None:
        breaker = Breaker("here", failures=3, seconds=0.0)
        for _ in range(5):
            breaker.bad("timeout")
            breaker.bad("timeout")
            breaker.good()
        patient = Breaker("here", failures=3, seconds=1e9)
        for _ in range(100):
            patient.bad("timeout")
        breaker.bad("timeout")
        breaker.bad("timeout")
        with pytest.raises(LayerloopError, match="3 requests in a row"):
            breaker.bad("timeout")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "99999"}, 120.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, None),
    ],
)
def test_retry_after_is_read_with_care(headers: dict[str, str], seconds: float | None) -> None:
    assert read_retry_after(headers) == seconds
