"""Counters of the judge's client, the source of the step's `judge_*` metrics."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

from layerloop.components.judge.replies import read_usage, read_version


@dataclass
class Statistics:
    """Counters of a `Judge`."""

    sent: int = 0  # HTTP requests, retries included
    answered: int = 0  # usable or not
    cache_hits: int = 0  # replies found in the store
    invalid_retries: int = 0  # asked again because the answer was unusable
    followed_up: int = 0  # grids without an answer, which were asked in another order or in halves
    rate_limited: int = 0  # 429 and 503
    given_up: int = 0  # requests abandoned for being slow
    missing_logprobs: int = 0  # scores taken as sampled, though expected values were asked for
    failures: Counter[str] = field(default_factory=Counter)  # reason -> attempts that failed so
    tokens_in: int = 0  # of all replies, including those that a killed run paid for
    tokens_cached: int = 0
    tokens_out: int = 0
    latencies: list[float] = field(default_factory=list)  # seconds, of answered requests
    versions: Counter[str] = field(default_factory=Counter)  # model and fingerprint that the judge reported

    def count(self, body: bytes) -> None:
        """Add tokens and version of a completion, usable or not."""
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):  # a stored reply that was damaged
            return
        usage = read_usage(value)
        self.tokens_in += usage.input
        self.tokens_cached += usage.cached_input
        self.tokens_out += usage.output
        self.versions[read_version(value)] += 1

    def percentile(self, share: float) -> float:
        """Latency in seconds that this share of answered requests did not exceed; 0 if there are none."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
