"""The judge's own probabilities of what it wrote, where the server gives `top_logprobs`.

A VLM that writes 4 was often torn between 3 and 5. The mean of the digits 0..5 under the probabilities of the token
where the score was written carries more than the digit that was sampled, needs no further request, and breaks ties
within a group.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from layerloop.components.judge.replies import Reply

MIN_MASS = 0.5  # probability that valid answers must have together: else this is not the score's token, or a rare one


class TokenProbabilities:
    """A reply's text, and the alternatives of the token at any index of it. The answer begins at `begin`."""

    def __init__(self, reply: Reply, begin: int = 0) -> None:
        self.text, self.begin = reply.text, begin
        self._tokens = reply.tokens if "".join(t["token"] for t in reply.tokens).startswith(reply.text) else ()

    def end_of_only(self, pattern: str) -> int | None:
        """Index behind the one match of a regular expression in the answer; None without one, or with several, of which
        all but one are of something else ("confidence": {...})."""
        ends = [found.end() for found in re.compile(pattern).finditer(self.text, self.begin)]
        return ends[0] if len(ends) == 1 else None

    def end_of_next(self, pattern: str, start: int | None) -> int | None:
        """Index behind the first match at or after `start`; None without one, or where `start` is None."""
        found = None if start is None else re.compile(pattern).search(self.text, start)
        return None if found is None else found.end()

    def mean(self, index: int | None, value_of: Callable[[str], float | None]) -> float | None:
        """Mean of `value_of` over the alternatives of the token at `index` of the text.

        None where there is no such token, `value_of` does not know it, or values it knows have less than MIN_MASS.
        """
        token = None if index is None else self._token_at(index)
        if token is None or value_of(_core(token["token"])) is None:
            return None
        mass, total = 0.0, 0.0
        seen: set[str] = set()
        for option in token.get("top_logprobs") or []:
            word, logprob = option.get("token"), option.get("logprob")
            if not isinstance(word, str) or word in seen or not isinstance(logprob, int | float) or math.isnan(logprob):
                continue
            seen.add(word)
            value = value_of(_core(word))
            if value is not None:
                share = math.exp(min(float(logprob), 0.0))
                mass, total = mass + share, total + share * value
        return total / mass if mass >= MIN_MASS else None

    def _token_at(self, index: int) -> dict[str, Any] | None:
        end = 0
        for token in self._tokens:
            end += len(token["token"])
            if index < end:
                return token
        return None


def _core(token: str) -> str:
    """A token without the space, quote, colon or comma that a tokenizer may have joined to it."""
    return token.strip(" \t\n\"':,}")
