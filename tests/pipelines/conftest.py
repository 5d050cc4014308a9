"""An HTTP server that answers as the KFP API server (v2beta1) does, for the client that `layerloop submit` uses."""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class KfpApi(ThreadingHTTPServer):
    """Experiments, runs and recurring runs in memory. A run goes through `states`, one a look."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.experiments: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.schedules: dict[str, dict[str, Any]] = {}
        self.states = ["PENDING", "RUNNING", "SUCCEEDED"]
        self.failing: list[int] = []  # statuses with which the next looks at a run are answered
        self.refuse_schedules = False
        self.authorizations: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: KfpApi

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_DELETE = do_GET

    def _answer(self) -> None:
        self.server.authorizations.add(self.headers.get("authorization"))
        address = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        kind, _, name = address.path.removeprefix("/apis/v2beta1/").partition("/")
        status, answer = getattr(self, f"_{self.command.lower()}_{kind}")(name, query, body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _get_healthz(self, *_: Any) -> tuple[int, Any]:
        return 200, {"multi_user": False}

    def _get_experiments(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        return 200, {"experiments": list(self.server.experiments.values())}

    def _post_experiments(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        key = f"experiment-{len(self.server.experiments)}"
        self.server.experiments[key] = {**body, "experiment_id": key}
        return 200, self.server.experiments[key]

    def _post_runs(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        key = f"run-{len(self.server.runs)}"
        self.server.runs[key] = {**body, "run_id": key, "state": "PENDING"}
        return 200, self.server.runs[key]

    def _get_runs(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if self.server.failing:
            return self.server.failing.pop(0), {"message": "the server is restarting"}
        run = self.server.runs[name]
        run["state"] = self.server.states.pop(0) if len(self.server.states) > 1 else self.server.states[0]
        if run["state"] == "FAILED":
            error = {"code": 1, "message": "error: judge does not answer"}
            run["run_details"] = {"task_details": [{"display_name": "score", "state": "FAILED", "error": error}]}
        return 200, run

    def _get_recurringruns(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        (predicate,) = json.loads(query["filter"])["predicates"]
        wanted = predicate["stringValue"]
        return 200, {"recurringRuns": [s for s in self.server.schedules.values() if s["display_name"] == wanted]}

    def _post_recurringruns(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if self.server.refuse_schedules:
            return 400, {"message": "the cron expression is invalid"}
        key = f"schedule-{len(self.server.schedules)}"
        self.server.schedules[key] = {**body, "recurring_run_id": key}
        return 200, self.server.schedules[key]

    def _delete_recurringruns(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        del self.server.schedules[name]
        return 200, {}


@pytest.fixture
def kfp_api() -> Iterator[KfpApi]:
    server = KfpApi()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
