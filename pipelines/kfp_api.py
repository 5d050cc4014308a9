"""KFP's REST API (v2beta1, KFP 2.16 and 2.17): signed in, bounded in time, and never taken in by a login page.

Not `kfp.Client`: its calls have no time limit, a page of HTML with status 200 becomes a run called None, a 403 is
asked five times over 25 seconds, and it writes to the home folder. The requests are the same ones: the tests check them
with the SDK's own models, and try the SDK and its CLI on the same server.

What is read from the environment is in `settings.ENVIRONMENT`.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import requests

from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError
from layerloop.pipelines.settings import setting

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0  # of silence
CALL_SECONDS = 120.0  # of one call in all, however slowly it drips
PAGE = 50  # of a listing: runs carry their pipeline's spec
MOUNTED_TOKEN = "/var/run/secrets/kubeflow/pipelines/token"  # where KFP's documentation mounts it in a pod
IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"

# What the commands read of an answer, by the field's name, wherever it stands; null is as good as absent.
_KINDS: dict[str, type] = {
    **dict.fromkeys(("run_id", "recurring_run_id", "experiment_id", "pipeline_id", "pipeline_version_id"), str),
    **dict.fromkeys(("display_name", "name", "description", "state", "storage_state", "mode", "status"), str),
    **dict.fromkeys(("created_at", "task_id", "pod_name", "next_page_token"), str),
    **dict.fromkeys(("runs", "recurringRuns", "experiments", "pipelines", "pipeline_versions"), list),
    **dict.fromkeys(("task_details", "child_tasks"), list),
    **dict.fromkeys(("run_details", "error", "trigger", "cron_schedule", "periodic_schedule"), dict),
    **dict.fromkeys(("runtime_config", "pipeline_spec", "pipeline_version_reference"), dict),
}
_LISTED = {  # the items of a listing, and what each is known by
    "runs": "run_id", "recurringRuns": "recurring_run_id", "experiments": "experiment_id", "pipelines": "pipeline_id",
    "pipeline_versions": "pipeline_version_id",
}  # fmt: skip
_OPAQUE = ("runtime_config", "pipeline_spec")  # other people's names are in these

T = TypeVar("T")


class RefusedError(LayerloopError):
    """The answer will be the same next time: not signed in, not allowed, not KFP, or a wrong request."""


class MissingError(RefusedError):
    """KFP knows no such thing (404)."""


class TakenError(RefusedError):
    """The name is taken (409)."""


class AwayError(LayerloopError):
    """No answer, or one that a server gives while it restarts: worth another try."""


class KfpApi:
    """One KFP API server. `namespace` is the profile's in multi-user mode and empty in single-user mode.

    Args:
        host: URL, as it is typed into a browser or a pod; https where no scheme is given.
        environment: What signs in; see `settings.ENVIRONMENT`.

    Raises:
        RefusedError: an impossible host, or a file that the environment names is not there.
    """

    def __init__(self, host: str | None = None, *, environment: Mapping[str, str] = os.environ) -> None:
        given = (host or "").strip() or setting("KFP_ENDPOINT", "KF_PIPELINES_ENDPOINT", environment=environment)
        if not given and "KUBERNETES_SERVICE_HOST" in environment:
            given = IN_CLUSTER
        if not given:
            raise RefusedError("no KFP endpoint is given: name it by --host or KFP_ENDPOINT")
        self.url = _api_url(given)
        parts = urlsplit(self.url)
        self.shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        ui = setting("KF_PIPELINES_UI_ENDPOINT", environment=environment)
        self.ui = _api_url(ui) if ui else self.shown
        self.namespace = ""
        self.deadline = math.inf  # of time.monotonic(), beyond which no call waits, whatever the server does
        self._token = setting("KFP_TOKEN", "KFP_EXISTING_TOKEN", environment=environment)
        named = setting("KFP_TOKEN_FILE", "KF_PIPELINES_SA_TOKEN_PATH", environment=environment)
        mounted = MOUNTED_TOKEN if os.path.exists(MOUNTED_TOKEN) else None
        self._token_file = None if self._token else named or mounted
        self._cookies = _cookies(environment.get("KFP_COOKIE", ""))
        self._verify: str | bool = True
        bundle = setting("KFP_CA_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", environment=environment)
        if bundle:
            if not os.path.exists(bundle):
                raise RefusedError(f"the CA bundle {bundle} does not exist: correct KFP_CA_CERT")
            self._verify = bundle
        self._read_token()
        self._session = requests.Session()
        self._session.auth = _leave_headers_alone  # else a .netrc replaces the token

    # ------------------------------------------------------------------------------------------------------- asking

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """The JSON object at `path` below /apis/v2beta1.

        Args:
            path: Such as `runs/ID`.
            query: Parameters; empty ones are left out.

        Raises:
            RefusedError: not signed in (401, 403, a redirection, a page), or a wrong request; MissingError for 404.
            AwayError: no answer in time, or a 5xx or 429.
        """
        return self._ask("GET", path, params={k: v for k, v in query.items() if v})

    def post(self, path: str, body: Any = None) -> dict[str, Any]:
        """What KFP answers to a JSON body; raises as `get` does, and TakenError for 409."""
        return self._ask("POST", path, json=body)

    def upload(self, path: str, file: str, data: bytes, **query: Any) -> dict[str, Any]:
        """Send a file as a form does; raises as `post` does."""
        return self._ask("POST", path, files={"uploadfile": (file, data)}, params={k: v for k, v in query.items() if v})

    def delete(self, path: str) -> None:
        """Remove what is at `path`; raises as `get` does."""
        self._ask("DELETE", path)

    def pages(self, path: str, key: str, **query: Any) -> Iterator[dict[str, Any]]:
        """Every item of a listing, page after page."""
        token, seen = "", set()
        while True:
            answer = self.get(path, page_size=PAGE, page_token=token, **query)
            yield from answer.get(key) or []
            token = answer.get("next_page_token") or ""
            if not token or token in seen:
                return
            seen.add(token)

    def tail_of_log(self, run_id: str, pod: str, *, lines: int = 15) -> list[str]:
        """The last lines that a step's pod printed; none where KFP gives none (the pod is gone, or no right to it)."""
        path = f"{self.url}/apis/v1alpha1/runs/{quote(run_id, safe='')}/nodes/{quote(pod, safe='')}/log"

        def read() -> list[str]:
            kept = b""
            with self._send("GET", path, stream=True) as response:
                if response.status_code != 200 or "text/plain" not in response.headers.get("Content-Type", ""):
                    return []
                for piece in response.iter_content(65536):
                    kept = (kept + piece)[-65536:]
            return [line for line in kept.decode(errors="replace").splitlines() if line.strip()][-lines:]

        try:
            return [self._redacted(line) for line in _bounded(read, 20.0)]
        except (requests.RequestException, AwayError, OSError):
            return []

    # ------------------------------------------------------------------------------------------------------- inside

    def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        address = f"{self.url}/apis/v2beta1/{path}"
        seconds = min(CALL_SECONDS, self.deadline - time.monotonic())
        if seconds <= 0:
            raise AwayError(f"KFP at {self.shown} was not asked: the time is up")
        try:
            response = _bounded(lambda: self._send(method, address, seconds=seconds, **options), seconds)
            if response.status_code == 401 and self._token_file and self._read_token():  # it was renewed meanwhile
                response = _bounded(lambda: self._send(method, address, seconds=seconds, **options), seconds)
        except requests.exceptions.SSLError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise RefusedError(
                    f"the certificate of KFP at {self.shown} is not trusted: name the CA's bundle by KFP_CA_CERT"
                ) from None
            raise self._away(error) from None
        except (requests.Timeout, AwayError):  # whichever clock is first: the library's, or that of the whole call
            raise AwayError(f"KFP at {self.shown} did not answer within {seconds:.0f} s: check --host") from None
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            raise self._away(error) from None
        except (requests.RequestException, ValueError) as error:  # an impossible URL, header or proxy
            raise RefusedError(
                f"KFP at {self.shown} cannot be asked ({type(error).__name__}): check --host, the token and the proxy"
            ) from None
        return self._json(response)

    def _send(self, method: str, address: str, *, seconds: float = CALL_SECONDS, **options: Any) -> requests.Response:
        self._read_token()
        headers = {"Accept": "application/json, text/plain"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        if self._cookies:
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in self._cookies.items())
        self._session.cookies.clear()
        response = self._session.request(
            method,
            address,
            headers=headers,
            timeout=(min(CONNECT_SECONDS, seconds), min(READ_SECONDS, seconds)),
            allow_redirects=False,
            verify=self._verify,
            **options,
        )
        self._cookies.update({c.name: c.value for c in response.cookies if c.value} if self._cookies else {})
        return response

    def _json(self, response: requests.Response) -> dict[str, Any]:
        status, kind = response.status_code, response.headers.get("Content-Type", "").partition(";")[0] or "no type"
        here = f"KFP at {self.shown}"
        if 300 <= status < 400:
            found = re.match(r"\w+://([^/?#\s]+)", response.headers.get("Location", ""))
            there = found[1].rpartition("@")[2] if found else "a login"
            raise RefusedError(f"{here} answers {status}, a redirection to {there}: sign in, {self._how_to_sign_in()}")
        try:
            body, cut = response.json(), False
        except ValueError:
            body, cut = None, True
        reason = self._reason(body) or " ".join((response.reason or "no reason given").split())
        if status in (401, 403):
            raise RefusedError(f"refused ({status}) by {here}: {reason}: {self._how_to_sign_in()}")
        if status == 429 or status >= 500:
            raise AwayError(f"{here} answers {status}: {reason}")
        if status >= 400:
            kinds = {404: MissingError, 409: TakenError}
            raise kinds.get(status, RefusedError)(f"{here} answers {status}: {reason}")
        if cut and "json" in kind:
            raise AwayError(f"{here} answers JSON that is cut short")
        if not isinstance(body, dict):
            raise RefusedError(
                f"{here} answers with {kind}, which is a login page or another server: sign in, "
                f"{self._how_to_sign_in()}, or check --host"
            )
        if odd := _misshapen(body):
            raise RefusedError(f"{here} answers {self._redacted(odd)}, which KFP does not: check --host")
        return body

    def _reason(self, body: Any) -> str:
        """KFP's own words: `message` of its gateway, `error_message` of its upload server."""
        if not isinstance(body, dict):
            return ""
        text = str(body.get("message") or body.get("error_message") or body.get("error") or "")
        return self._redacted(" ".join(text.split()))[:300].rstrip(".: ")

    def _redacted(self, text: str) -> str:
        for secret in (self._token, *self._cookies.values(), urlsplit(self.url).password):
            if secret and len(secret) >= 4:
                text = text.replace(secret, "...")
        return text

    def _away(self, error: Exception) -> AwayError:
        return AwayError(f"KFP at {self.shown} cannot be reached ({type(error).__name__}): check --host")

    def _how_to_sign_in(self) -> str:
        if self._token_file:
            return f"the token in {self._token_file} is not accepted"
        if self._token:
            return "the token in KFP_TOKEN is not accepted here, or has expired"
        if self._cookies:
            return "the session in KFP_COOKIE is not accepted here, or has expired"
        return "set KFP_TOKEN, KFP_TOKEN_FILE or KFP_COOKIE"

    def _read_token(self) -> bool:
        """Take the token from its file, which the kubelet renews; whether it has changed."""
        if not self._token_file:
            return False
        try:
            token = Path(self._token_file).read_text().strip()
        except (OSError, UnicodeDecodeError):
            raise RefusedError(
                f"the token file {self._token_file} cannot be read: correct KFP_TOKEN_FILE, or set KFP_TOKEN"
            ) from None
        changed, self._token = token != self._token, token or None
        return changed


def connect(host: str | None = None, namespace: str | None = None, *, deadline: float = math.inf) -> KfpApi:
    """The API, after one question that shows whether it answers and whether a namespace is needed.

    Args:
        deadline: Of time.monotonic(), for all calls.

    Raises:
        RefusedError: not signed in, not KFP, or no namespace in multi-user mode.
        AwayError: it cannot be reached.
    """
    api = KfpApi(host)
    api.deadline = deadline
    if api.get("healthz").get("multi_user"):
        api.namespace = namespace or setting("KFP_NAMESPACE") or ""
        if not api.namespace:
            raise RefusedError(
                f"KFP at {api.shown} is in multi-user mode and no namespace is given: "
                "name your profile's by --namespace or KFP_NAMESPACE"
            )
    return api


def _misshapen(value: Any) -> str:
    """The first field of an answer that is of another kind than KFP's, as `name: value`; empty where there is none."""
    if isinstance(value, list):
        return next((odd for item in value if (odd := _misshapen(item))), "")
    if not isinstance(value, dict):
        return ""
    for name, item in value.items():
        if item is None or name not in _KINDS:
            continue
        if not isinstance(item, _KINDS[name]):
            return f"{name}: {json.dumps(item)[:60]}"
        for one in item if isinstance(item, list) else ():
            if not isinstance(one, dict) or (name in _LISTED and not one.get(_LISTED[name])):
                return f"{name}: [{json.dumps(one)[:60]}]"
        if name not in _OPAQUE and (odd := _misshapen(item)):
            return odd
    return ""


def equals(key: str, value: str) -> str:
    """The `filter` of a listing for items whose `key` is `value`."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "stringValue": value}]})


def find_experiment(api: KfpApi, name: str) -> str | None:
    """Id of the experiment `name`, or None."""
    listed = api.pages(
        "experiments",
        "experiments",
        namespace=api.namespace,
        filter=equals("display_name", name),
    )
    return next((str(item["experiment_id"]) for item in listed if item.get("display_name") == name), None)


def experiment(api: KfpApi, name: str) -> str:
    """Id of the experiment `name`, which is made where there is none.

    Raises:
        RefusedError: it may not be made, or the answer is none.
    """
    found = find_experiment(api, name)
    if found:
        return found
    body = {"display_name": name} | ({"namespace": api.namespace} if api.namespace else {})
    try:
        made = api.post("experiments", body)
    except TakenError:  # by another command, a moment ago
        made = {"experiment_id": find_experiment(api, name)}
    return str(required(api, made, "experiment_id", "an experiment"))


def required(api: KfpApi, answer: dict[str, Any], key: str, what: str) -> Any:
    """`answer[key]`, or the error that the answer is not `what`."""
    if not answer.get(key):
        raise RefusedError(f"KFP at {api.shown} answers something that is not {what}: check --host")
    return answer[key]


def _api_url(text: str) -> str:
    """The base of the API, from what people copy out of the address bar."""
    try:
        parts = urlsplit(text if re.match(r"^[A-Za-z][A-Za-z0-9+.-]*://", text) else f"https://{text}")
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, or a port that is no number
        good = False
    if not good:
        raise RefusedError(f"host is {without_secrets(text)!r}: write it as https://kubeflow.example.com/pipeline")
    path = parts.path.rstrip("/")
    path = path.removesuffix("/apis/v2beta1").replace("/_/pipeline", "/pipeline")  # the dashboard's frame
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _cookies(text: str) -> dict[str, str]:
    pairs = (piece.strip().partition("=") for piece in text.removeprefix("Cookie:").split(";"))
    return {name: value for name, mark, value in pairs if name and mark}


def _leave_headers_alone(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _bounded(call: Callable[[], T], seconds: float) -> T:
    """`call()`, or AwayError after `seconds`: no server, resolver or proxy holds us longer, whatever it sends."""
    results: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put((call(), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = results.get(timeout=seconds)
    except queue.Empty:
        raise AwayError(f"no answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
