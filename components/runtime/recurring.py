"""End of a chain of runs: a run switches off the recurring run of Kubeflow Pipelines that started it.

Standard library only: steps have no kfp. Nothing depends on it, since a run of a campaign that has reached its target
succeeds at once; so any fault is one line in the log and never a failure.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from layerloop.components.runtime.progress import log

VARIABLE = "LAYERLOOP_KFP_API"  # base URL of the API server; `kfp_api` in cluster.yaml sets it
IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"  # of a stock installation
TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")  # projected, audience pipelines.kubeflow.org
TIMEOUT = 5.0  # seconds for one call
_LIMIT = 4_000_000  # bytes of an answer; a run carries its pipeline


def disable_recurring_run(run_id: str, *, token: Path = TOKEN) -> str:
    """Switch off the recurring run that started the run `run_id`, log what was done or why not, and return that line.

    The server is that of $LAYERLOOP_KFP_API or, in a pod, the stock installation's.
    """
    line = _disable(run_id, token)
    log(line)
    return line


def _disable(run_id: str, token: Path) -> str:
    api = os.environ.get(VARIABLE, "").strip().rstrip("/")
    if not api and "KUBERNETES_SERVICE_HOST" in os.environ:
        api = IN_CLUSTER
    if not api:
        return f"no recurring run is switched off: {VARIABLE} names no API server"
    if not run_id:
        return "no recurring run is switched off: this run has no id"
    try:
        run = _call("GET", f"{api}/apis/v2beta1/runs/{urllib.parse.quote(run_id, safe='')}", token)
        recurring = run.get("recurring_run_id") or run.get("recurringRunId")
        if not recurring:
            return f"run {run_id} was started by hand: there is no recurring run to switch off"
        name = urllib.parse.quote(str(recurring), safe="")
        _call("POST", f"{api}/apis/v2beta1/recurringruns/{name}:disable", token)
    except urllib.error.HTTPError as error:
        why = {401: "it wants a token", 403: "the step's service account may not"}.get(error.code, error.reason)
        return f"the recurring run continues, and its runs end at once: {api} answers {error.code} ({why})"
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        return f"the recurring run continues, and its runs end at once: {api} is not reachable ({_short(reason)})"
    return f"recurring run {recurring} is switched off: enable it in Kubeflow to continue"


def _call(method: str, url: str, token: Path) -> dict[str, Any]:
    """The JSON object that the server answers.

    Raises:
        urllib.error.HTTPError: it refuses.
        OSError: it does not answer.
        ValueError: it answers something else, such as a login page, or the URL is not valid.
    """
    request = urllib.request.Request(url, method=method, data=b"{}" if method == "POST" else None)
    request.add_header("Content-Type", "application/json")
    if token.is_file():
        request.add_header("Authorization", f"Bearer {token.read_text().strip()}")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        value = json.loads(answer.read(_LIMIT) or b"{}")
    if not isinstance(value, dict):
        raise ValueError("the answer is not a JSON object")
    return value


def _short(reason: object) -> str:
    return " ".join(str(reason).split())[:120] or type(reason).__name__
