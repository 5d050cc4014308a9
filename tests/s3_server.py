"""moto's S3 server, one write at a time: `python tests/s3_server.py PORT`.

moto alone looks whether an object exists and then puts it, so two conditional writes at once may both succeed. On S3
exactly one does, and that is what the tests of concurrent commits stand on.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app, run_simple

_writing = threading.Lock()
_moto = DomainDispatcherApplication(create_backend_app)


def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
        return _moto(environ, start_response)
    with _writing:
        return _moto(environ, start_response)


if __name__ == "__main__":
    run_simple("127.0.0.1", int(sys.argv[1]), application, threaded=True)
