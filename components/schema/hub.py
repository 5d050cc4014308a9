"""What the library of the Hugging Face hub raises, as one line that is worth another attempt where the hub is busy or
away: eight ranks of eight pods that look a revision up at once meet its limit of requests."""

from __future__ import annotations

from layerloop.components.schema.errors import LayerloopError, UnavailableError

_PASSING = frozenset({408, 425, 429})  # statuses that may not last, besides all 5xx


def hub_error(error: Exception, line: str) -> LayerloopError:
    """`line` for an error of `huggingface_hub`, which has a dozen kinds: an UnavailableError where the hub did not
    answer, or answered that it is busy or ill."""
    return (UnavailableError if _may_pass(error) else LayerloopError)(line)


def _may_pass(error: BaseException | None) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    while error is not None:  # that of a cache says what it was that the hub answered by its cause
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status in _PASSING or status >= 500
        if isinstance(error, OfflineModeIsEnabled):
            return False
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if not kinds.isdisjoint(("TransportError", "ConnectionError", "TimeoutError")):  # of httpx, whichever it uses
            return True
        error = error.__cause__
    return False
