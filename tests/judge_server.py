"""The reference judge in this process, for tests that put requests to it over HTTP."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from layerloop.components.reference_judge.identity import NAME
from layerloop.components.reference_judge.server import JudgeServer


@contextlib.contextmanager
def start_in_thread(model: str = NAME) -> Iterator[str]:
    """A judge on a free port; yields its base URL."""
    server = JudgeServer("127.0.0.1", 0, model=model)
    thread = threading.Thread(target=server.serve_forever, name="judge", daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
