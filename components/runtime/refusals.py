"""A refused task is not retried like a crashed one.

Kubeflow's launcher ends with status 1 whatever the step's own was, so Argo retries a refusal (status 2) like a crash.
The next pod of the task gets the very same executor input, whose output URIs name the run, the task and the driver's
salt; so a refusal is written into the campaign under the hash of that text, and the next pod repeats it at once.

Nothing else is affected. Another run, a resubmission, a clone or a changed parameter has another executor input.
A run that a person retries in the UI begins with the first pod's name again, which Argo derives from the number of the
attempt: that pod forgets the refusal and tries again, since the cause may have been fixed. A refusal is kept for
an hour. A service that did not answer (UnavailableError) is not remembered.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

from layerloop.components.schema.errors import LayerloopError, UnavailableError

POD = "KFP_POD_NAME"  # set by Kubeflow in every step's pod
KEPT_SECONDS = 3600.0  # seconds; retries come within minutes, queueing aside


class Objects(Protocol):
    """The part of a store that is used here."""

    def read(self, name: str) -> bytes: ...
    def write(self, name: str, data: bytes) -> None: ...
    def delete(self, name: str) -> None: ...


class Refusals:
    """Refusals of earlier pods of one task. Outside a pod of Kubeflow nothing is remembered."""

    def __init__(self, store: Callable[[], Objects], executor_input: str, *, step: str) -> None:
        digest = hashlib.sha256(executor_input.encode()).hexdigest()
        self.name = f"refusals/{step}-{digest[:32]}.json"
        self._store, self._pod = store, os.environ.get(POD, "")

    def repeat(self) -> None:
        """Refuse at once if another pod of this task was refused.

        Raises:
            LayerloopError: the line of that refusal, marked as a repetition.
        """
        record = self._read() if self._pod else None
        if record is None:
            return
        age = time.time() - float(record["at"])
        if record["pod"] == self._pod or not 0 <= age <= KEPT_SECONDS:
            self._forget()
            return
        raise SameRefusalError(
            f"{record['error']} (the same refusal as {age:.0f} s ago in pod {record['pod']}, not retried: fix the "
            "cause, then retry the run or start another)"
        )

    def remember(self, error: LayerloopError) -> None:
        """Write a refusal down, if that can be done; never fails."""
        reporting = os.environ.get("RANK", "0") == "0"  # one of the ranks that share a step is enough
        if self._pod and reporting and not isinstance(error, (SameRefusalError, UnavailableError)):
            record = {"pod": self._pod, "at": time.time(), "error": str(error)}
            try:
                self._store().write(self.name, json.dumps(record).encode())
            except Exception:  # the refusal may be about this very store
                return

    def _read(self) -> dict[str, Any] | None:
        try:
            record = json.loads(self._store().read(self.name))
            return {"pod": str(record["pod"]), "at": float(record["at"]), "error": str(record["error"])}
        except Exception:  # missing or unreadable: then the step itself reports what is wrong
            return None

    def _forget(self) -> None:
        try:
            self._store().delete(self.name)
        except Exception:  # it was only a note
            return


class SameRefusalError(LayerloopError):
    """The refusal of an earlier pod, repeated."""
