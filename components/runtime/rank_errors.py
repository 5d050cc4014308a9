"""What a rank was refused, handed to the process that started it: a refusal is said once, not by every rank.

torch's launcher gives each rank the name of a file for the reason of its end, and ends the others when one has ended.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from layerloop.components.schema.errors import LayerloopError, UnavailableError

LAUNCHED = "LAYERLOOP_LAUNCHED"  # the ranks are those of `ranks.launch`, which says what they report
_FILE = "TORCHELASTIC_ERROR_FILE"


def report(error: LayerloopError) -> bool:
    """Leave a refusal to the process that has started this rank by `ranks.launch`; False where none has."""
    path = os.environ.get(_FILE)
    if "RANK" not in os.environ or LAUNCHED not in os.environ or not path:
        return False
    extra = {"timestamp": int(time.time()), "unavailable": isinstance(error, UnavailableError)}
    try:
        Path(path).write_text(json.dumps({"message": {"message": str(error), "extraInfo": extra}}), encoding="utf-8")
    except OSError:
        return False
    return True


def raise_reported(message: object, status: int) -> None:
    """Raise what a rank that ended with `status` has reported; `message` is torch's reading of its file.

    Raises:
        LayerloopError: the rank's own, UnavailableError if it was one.
    """
    if isinstance(message, dict) and "unavailable" in (extra := message.get("extraInfo", {})):
        error = (UnavailableError if extra["unavailable"] else LayerloopError)(message["message"])
        error.status = status
        raise error
