"""An HTTP server that answers as the KFP API server (v2beta1, 2.17) does, with what may stand before it.

What it is sent is checked by the models of KFP's own generated client, so that a field or query that KFP does not know
is a 400 here as well.
"""

import email.parser
import email.policy
import json
import os
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kfp_server_api
import pytest
import yaml
from kfp import dsl, kubernetes

from layerloop.pipelines.packages import write_pipeline

FINAL = {"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED"}
LISTED = {"page_token", "page_size", "sort_by", "filter", "namespace", "experiment_id"}
UPLOADED = {"name", "display_name", "description", "pipelineid", "namespace", "tags"}
LOGIN_PAGE = "<html><body>Log in to Your Account</body></html>"


class KfpApi(ThreadingHTTPServer):
    """Everything in memory. A run goes through `states`, one a look."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.experiments: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.schedules: dict[str, dict[str, Any]] = {}
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, str] = {}  # by pod
        self.states = ["PENDING", "RUNNING", "SUCCEEDED"]
        self.on_end: Callable[[dict[str, Any]], None] = lambda run: None
        self.on_start: Callable[[dict[str, Any]], None] = lambda run: None
        self.failing: list[int] = []  # statuses with which the next looks at a run are answered
        self.multi_user = False
        self.refuse_schedules = False
        self.page = 3  # items at most, whatever is asked for
        # Who may come in: None lets everybody, else bearer tokens and cookies; `gate` answers the others.
        self.tokens: set[str] | None = None
        self.cookies: set[str] | None = None
        self.gate: Callable[[_Handler], None] = lambda handler: handler.reply(401, {"message": "Unauthenticated"})
        self.renewed_cookie: str | None = None  # sent with every answer, as oauth2-proxy renews its session
        self.before: Callable[[_Handler], bool] = lambda handler: False  # True: it has answered already
        self.seen: list[tuple[str, str, str | None, str | None]] = []  # method, path, authorization, cookie

    @property
    def url(self) -> str:
        scheme = "https" if hasattr(self.socket, "context") else "http"
        return f"{scheme}://127.0.0.1:{self.server_address[1]}"

    @property
    def authorizations(self) -> set[str | None]:
        return {authorization for _, _, authorization, _ in self.seen}

    def add_run(self, **fields: Any) -> str:
        number = len(self.runs)
        key = f"run-{number}"
        stamp = f"2026-11-28T00:{number // 60:02}:{number % 60:02}Z"
        self.runs[key] = {"run_id": key, "created_at": stamp, "state": "PENDING", **fields}
        return key


class _Handler(BaseHTTPRequestHandler):
    server: KfpApi
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_DELETE = do_GET

    def reply(self, status: int, body: Any, *, kind: str = "application/json", **headers: str) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if self.server.renewed_cookie:
            self.send_header("Set-Cookie", f"{self.server.renewed_cookie}; Path=/; HttpOnly")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(length)
        authorization, cookie = self.headers.get("authorization"), self.headers.get("cookie")
        self.server.seen.append((self.command, self.path, authorization, cookie))
        if self.server.before(self):
            return
        if not self._may_come_in(authorization, cookie):
            return self.server.gate(self)
        address = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        if address.path.startswith("/apis/v1alpha1/runs/"):
            return self._log(address.path.split("/")[6])
        kind, _, name = address.path.removeprefix("/apis/v2beta1/").partition("/")
        name, _, verb = name.partition(":")
        if name.startswith("upload"):
            body: Any = self._file(data)
        else:
            body = json.loads(data) if data and data != b"null" else {}
        handler = getattr(self, f"_{self.command.lower()}_{verb or kind}", None)
        if handler is None:
            return self.reply(404, {"code": 5, "message": "Not Found"})
        self.reply(*handler(name, query, body))

    def _may_come_in(self, authorization: str | None, cookie: str | None) -> bool:
        server = self.server
        if server.tokens is None and server.cookies is None:
            return True
        given = {piece.strip() for piece in (cookie or "").split(";")}
        token = (authorization or "").removeprefix("Bearer ")
        return token in (server.tokens or ()) or bool(given & (server.cookies or set()))

    def _file(self, data: bytes) -> dict[str, Any]:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        message = email.parser.BytesParser(policy=email.policy.default).parsebytes(head + data)
        (part,) = message.iter_parts()
        assert part.get_param("name", header="content-disposition") == "uploadfile"
        documents = [d for d in yaml.safe_load_all(part.get_payload(decode=True)) if d]
        return documents[0] if len(documents) == 1 else {"pipeline_spec": documents[0], "platform_spec": documents[1]}

    # ------------------------------------------------------------------------------------------------------ answers

    def _listed(self, items: Any, key: str, query: dict[str, str]) -> tuple[int, Any]:
        if set(query) - LISTED:
            return 400, {"code": 3, "message": f"unknown query {set(query) - LISTED}"}
        found = list(items)
        for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
            assert predicate["operation"] in ("EQUALS", 1)
            wanted = predicate.get("stringValue") or predicate["string_value"]
            found = [item for item in found if item.get(predicate["key"]) == wanted]
        if query.get("sort_by") == "created_at desc":
            found = sorted(found, key=lambda item: item["created_at"], reverse=True)
        at = int(query.get("page_token") or 0)
        size = min(self.server.page, int(query.get("page_size") or self.server.page))
        answer: dict[str, Any] = {key: found[at : at + size], "total_size": len(found)}
        if at + size < len(found):
            answer["next_page_token"] = str(at + size)
        return 200, answer if answer[key] else {}

    def _checked(self, body: dict[str, Any], model: type) -> str | None:
        unknown = set(body) - set(model.attribute_map.values())  # type: ignore[attr-defined]
        if unknown:
            return f"proto: unknown field {sorted(unknown)}"
        spec = body.get("pipeline_spec")
        if spec is not None and "pipelineInfo" not in (spec.get("pipeline_spec") or spec):
            return "no pipeline spec"
        if "runtime_config" in body:
            return self._checked(body["runtime_config"], kfp_server_api.V2beta1RuntimeConfig)
        return None

    def _get_healthz(self, *_: Any) -> tuple[int, Any]:
        return 200, {"commit_sha": "c0ffee", "tag_name": "2.17.0", "multi_user": self.server.multi_user}

    def _get_experiments(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if name:
            return 200, self.server.experiments[name]
        if bool(query.get("namespace")) != self.server.multi_user:
            return 400, {"code": 3, "message": "Invalid input error: the namespace fits the mode not"}
        here = (e for e in self.server.experiments.values() if e.get("namespace", "") == query.get("namespace", ""))
        return self._listed(here, "experiments", query)

    def _post_experiments(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if wrong := self._checked(body, kfp_server_api.V2beta1Experiment):
            return 400, {"code": 3, "message": wrong}
        if self.server.multi_user and not body.get("namespace"):
            return 400, {"code": 3, "message": "An experiment cannot have an empty namespace in multi-user mode"}
        key = f"experiment-{len(self.server.experiments)}"
        self.server.experiments[key] = {**body, "experiment_id": key, "created_at": "2026-11-28T00:00:00Z"}
        return 200, self.server.experiments[key]

    def _post_runs(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if wrong := self._checked(body, kfp_server_api.V2beta1Run):
            return 400, {"code": 3, "message": wrong}
        run = self.server.runs[self.server.add_run(**body)]
        self.server.on_start(run)
        return 200, run

    def _post_terminate(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        self.server.runs[name.removeprefix("runs/")]["state"] = "CANCELED"
        return 200, {}

    def _get_runs(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if not name:
            home = query.get("experiment_id")
            there = (run for run in self.server.runs.values() if not home or run.get("experiment_id") == home)
            return self._listed(there, "runs", query)
        if self.server.failing:
            return self.server.failing.pop(0), {"code": 14, "message": "the server is restarting"}
        run = self.server.runs.get(name)
        if run is None:
            return 404, {"code": 5, "message": f"Run {name} not found"}
        if run["state"] not in FINAL:
            run["state"] = self.server.states.pop(0) if len(self.server.states) > 1 else self.server.states[0]
            if run["state"] in FINAL:
                self.server.on_end(run)
        if run["state"] == "FAILED":
            run.setdefault("run_details", {"task_details": TASKS})
        return 200, run

    def _log(self, pod: str) -> None:
        if pod in self.server.logs:
            return self.reply(200, self.server.logs[pod], kind="text/plain")
        self.reply(500, {"error_message": f"Failed to read logs from pod {pod}"})

    def _get_recurringruns(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        home = query.get("experiment_id")
        there = (s for s in self.server.schedules.values() if not home or s.get("experiment_id") == home)
        return self._listed(there, "recurringRuns", query)

    def _post_recurringruns(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if wrong := self._checked(body, kfp_server_api.V2beta1RecurringRun):
            return 400, {"code": 3, "message": wrong}
        if self.server.refuse_schedules:
            return 400, {"code": 3, "message": "the cron expression is invalid"}
        key = f"schedule-{len(self.server.schedules)}-{time.monotonic_ns()}"
        mode = body.get("mode") or "DISABLE"
        self.server.schedules[key] = {**body, "mode": mode, "status": f"{mode}D", "recurring_run_id": key}
        return 200, self.server.schedules[key]

    def _post_enable(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        self.server.schedules[name.removeprefix("recurringruns/")]["mode"] = "ENABLE"
        return 200, {}

    def _post_disable(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        self.server.schedules[name.removeprefix("recurringruns/")]["mode"] = "DISABLE"
        return 200, {}

    def _delete_recurringruns(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        del self.server.schedules[name]
        for run in self.server.runs.values():  # the workflow belongs to the schedule, so Kubernetes deletes it too
            if run.get("recurring_run_id") == name and run["state"] not in FINAL:
                run["state"] = "CANCELED"
        return 200, {}

    def _get_pipelines(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        parts = name.split("/")
        if not name:
            space = query.pop("namespace", "")
            there = (p for p in self.server.pipelines.values() if p.get("namespace", "") == space)
            return self._listed(there, "pipelines", query)
        if len(parts) == 1:
            return 200, self.server.pipelines[name]
        there = [v for v in self.server.versions.values() if v["pipeline_id"] == parts[0]]
        if len(parts) == 3:
            found = [v for v in there if v["pipeline_version_id"] == parts[2]]
            return (200, found[0]) if found else (404, {"code": 5, "message": "no such version"})
        return self._listed(
            ({k: w for k, w in v.items() if k != "pipeline_spec"} for v in there), "pipeline_versions", query
        )

    def _post_pipelines(self, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if name.startswith("upload"):
            return self._upload(name, query, body)
        if wrong := self._checked(body, kfp_server_api.V2beta1Pipeline):
            return 400, {"code": 3, "message": wrong}
        key = f"pipeline-{len(self.server.pipelines)}"
        self.server.pipelines[key] = {**body, "pipeline_id": key, "created_at": "2026-11-28T00:00:00Z"}
        return 200, self.server.pipelines[key]

    def _upload(self, what: str, query: dict[str, str], spec: Any) -> tuple[int, Any]:
        if set(query) - UPLOADED:
            return 400, {"error_message": f"unknown query {set(query) - UPLOADED}"}
        if any(v["name"] == query["name"] for v in self.server.versions.values()):
            return 409, {"error_message": "Failed to create a pipeline version"}
        made = None
        if what == "upload":
            _, made = self._post_pipelines("", {}, {"name": query["name"], "display_name": query["name"]})
        number = len(self.server.versions)
        version = {
            "pipeline_id": made["pipeline_id"] if made else query["pipelineid"],
            "pipeline_version_id": f"version-{number}",
            "name": query["name"],
            "display_name": query.get("display_name", query["name"]),
            "created_at": f"2026-11-28T01:00:{number:02}Z",
            "pipeline_spec": spec,
        }
        self.server.versions[version["pipeline_version_id"]] = version
        return 200, made or version


# The tasks of a failed run as KFP lists them: every node of Argo's, all failed from the root to the pod that failed.
TASKS = [
    {"task_id": "t0", "display_name": "layerloop-train-x7", "state": "FAILED", "child_tasks": [{"task_id": "t1"}]},
    {"task_id": "t2", "display_name": "shard dataset", "state": "SUCCEEDED"},
    {
        "task_id": "t1",
        "display_name": "score rollouts",
        "state": "FAILED",
        "child_tasks": [{"task_id": "t3"}],
    },
    {
        "task_id": "t3",
        "display_name": "executor",
        "state": "FAILED",
        "pod_name": "x7-score-1",
        "error": {"code": 1, "message": "error: judge does not\nanswer"},
    },
]


@dsl.container_component
def _work(text: str, count: int, share: float, flag: bool, table: dict, many: list) -> dsl.ContainerSpec:
    return dsl.ContainerSpec(image="any", command=["true"], args=[text, count, share, flag, table, many])


@dsl.pipeline(name="work")
def _pipeline(
    text: str,
    campaign: str = "",
    count: int = 1,
    share: float = 0.5,
    flag: bool = False,
    table: dict = {},  # noqa: B006
    many: list = [],  # noqa: B006
) -> None:
    task = _work(text=text, count=count, share=share, flag=flag, table=table, many=many)
    kubernetes.add_pod_label(task, "app", "work")  # so that the package has a platform spec


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline with a parameter of each type."""
    return write_pipeline(_pipeline, tmp_path_factory.mktemp("package") / "pipeline.yaml")


@dsl.container_component
def _train(campaign: str, until: int, max_failures: int) -> dsl.ContainerSpec:
    return dsl.ContainerSpec(image="any", command=["true"], args=[campaign, until, max_failures])


@dsl.pipeline(name="layerloop-train")
def _train_pipeline(campaign: str, images: str = "", until: int = 0, max_failures: int = 0) -> None:
    _train(campaign=campaign, until=until, max_failures=max_failures)


@pytest.fixture(scope="session")
def train_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with the name and the parameters of the train pipeline by which a chain ends."""
    return write_pipeline(_train_pipeline, tmp_path_factory.mktemp("train") / "train.yaml")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What signs in to a real cluster from this shell stays out of the tests."""
    for name in list(os.environ):
        if name.startswith(("KFP_", "KF_PIPELINES_")) or name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
            monkeypatch.delenv(name)


@pytest.fixture
def kfp_api() -> Iterator[KfpApi]:
    yield from serving(KfpApi())


def serving(server: KfpApi) -> Iterator[KfpApi]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def dex(handler: _Handler) -> None:
    """What Dex behind oidc-authservice or oauth2-proxy does with a stranger: a redirection to its login."""
    handler.reply(
        302, "", kind="text/html", Location="https://dex.example.com/dex/auth?client_id=kubeflow&state=secret"
    )


def login_page(handler: _Handler) -> None:
    """The same where the redirections were followed, or an ingress serves the page itself: 200 and HTML."""
    handler.reply(200, LOGIN_PAGE, kind="text/html; charset=utf-8")


def forbidden(handler: _Handler) -> None:
    """What oauth2-proxy's ext_authz and Istio answer to an API client: 403."""
    handler.reply(403, "RBAC: access denied", kind="text/plain")


@pytest.fixture(params=[dex, login_page, forbidden], ids=lambda gate: gate.__name__)
def gate(request: pytest.FixtureRequest) -> Callable[[_Handler], None]:
    return request.param
