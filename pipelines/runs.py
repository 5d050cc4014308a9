"""Runs of a KFP API server: started, watched until they end, found, and their failures reported."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from layerloop.pipelines.kfp_api import AwayError, KfpApi, MissingError, experiment, required
from layerloop.pipelines.runnable import Pipeline, typed_parameters

SUCCEEDED, FAILED, REFUSED, UNFINISHED, INTERRUPTED = 0, 1, 2, 3, 130
STATUSES = {"SUCCEEDED": SUCCEEDED, "FAILED": FAILED, "CANCELED": UNFINISHED, "SKIPPED": UNFINISHED}
PATIENCE = 2 * 3600.0  # seconds without an answer after which waiting ends

Poll = Callable[[float], float]
T = TypeVar("T")


class LostError(AwayError):
    """The run may continue, but its state is unknown."""

    status = UNFINISHED


@dataclass(frozen=True)
class Settings:
    """What a run is started with in addition to its pipeline and parameters."""

    experiment: str = "layerloop"
    run_name: str | None = None  # the pipeline's name and the time when None
    service_account: str | None = None  # of the run's pods; KFP's own when None
    pipeline_root: str | None = None  # where KFP keeps the artifacts that pass between steps


@dataclass(frozen=True)
class Waiting:
    """How an end is waited for. The single calls are bounded by the API's own deadline, which `connect` is given."""

    deadline: float = math.inf  # of time.monotonic()
    patience: float = PATIENCE  # seconds without an answer
    poll: Poll = lambda waited: min(30.0, 2.0 + waited / 20)  # seconds until the next look, from the seconds waited


def run_link(api: KfpApi, run_id: str) -> str:
    """Where the UI shows a run."""
    return f"{api.ui}/#/runs/details/{run_id}"


def options_of(api: KfpApi) -> str:
    """The options that name this server and namespace again, for commands that are printed."""
    return f"--host {api.shown}" + (f" --namespace {api.namespace}" if api.namespace else "")


def start_run(api: KfpApi, pipeline: Pipeline, parameters: Mapping[str, Any], settings: Settings) -> str:
    """Start a run and return its id.

    Raises:
        LayerloopError: a wrong parameter, or KFP refuses. LostError: no answer; the run may have been started.
    """
    values = typed_parameters(pipeline, parameters)
    name = settings.run_name or f"{pipeline.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    home = experiment(api, settings.experiment)
    body = {"display_name": name, "experiment_id": home, **request_fields(pipeline, values, settings)}
    try:
        made = api.post("runs", body)
    except AwayError as error:
        raise LostError(f"{error}; run {name} may have been started: look for it before you start another") from None
    run_id = str(required(api, made, "run_id", "a run"))
    print(f"run {run_id} ({name}) of experiment {settings.experiment} started: {run_link(api, run_id)}", flush=True)
    return run_id


def request_fields(pipeline: Pipeline, values: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The fields that a run and a recurring run share."""
    config: dict[str, Any] = {"parameters": dict(values)}
    if settings.pipeline_root:
        config["pipeline_root"] = settings.pipeline_root
    account = {"service_account": settings.service_account} if settings.service_account else {}
    return {**pipeline.source, "runtime_config": config, **account}


def wait_for(api: KfpApi, run_id: str, waiting: Waiting) -> int:
    """Report a run's state changes until it ends, and return the exit status: 0 only for success.

    Raises:
        RefusedError: not signed in any more, or the run is gone.
        LostError: no answer for longer than the patience.
    """
    began, state = time.monotonic(), None
    contact = Contact(waiting, what=f"run {run_id}")
    while True:
        run = contact.ask(lambda: api.get(f"runs/{quote(run_id, safe='')}"))
        if run is not None and run.get("run_id") != run_id:
            required(api, {}, "run_id", f"run {run_id}")
        waited = time.monotonic() - began
        if run is not None and (run.get("state") or "") != state:
            state = run.get("state") or ""
            print(f"run {run_id}: {_said(state)} after {waited:.0f} s", flush=True)
        if run is not None and state in STATUSES:
            for line in failures(api, run):
                print(line, flush=True)
            return STATUSES[state]
        pause, left = waiting.poll(waited), waiting.deadline - time.monotonic()
        time.sleep(max(0.0, min(pause, left)))
        if left <= pause:
            waited = time.monotonic() - began
            print(f"run {run_id} is still {_said(state)} after {waited:.0f} s: it continues", flush=True)
            return UNFINISHED


class Contact:
    """Questions to a server that may be away for a while. It is said once that it is away, and once that it is back."""

    def __init__(self, waiting: Waiting, *, what: str) -> None:
        self._patience, self._deadline, self._what = waiting.patience, waiting.deadline, what
        self._silent_since: float | None = None

    def ask(self, question: Callable[[], T]) -> T | None:
        """The answer, or None while there is none.

        Raises:
            LostError: there has been none for longer than the patience. RefusedError passes through.
        """
        try:
            answer = question()
        except AwayError as error:
            now = time.monotonic()
            if now >= self._deadline:  # it was we who had no time left
                return None
            if self._silent_since is None:
                self._silent_since = now
                print(f"{self._what}: {error}; trying on for {self._patience:.0f} s", flush=True)
            if now - self._silent_since >= self._patience:
                raise LostError(f"{self._what} cannot be watched any more, it may continue: {error}") from None
            return None
        if self._silent_since is not None:
            print(f"{self._what}: KFP answers again", flush=True)
        self._silent_since = None
        return answer


def live_runs(api: KfpApi, **query: str) -> Iterator[dict[str, Any]]:
    """Runs that have not ended, of the namespace or of what `query` names, newest first, from all pages."""
    where = query or {"namespace": api.namespace}
    listed = api.pages("runs", "runs", sort_by="created_at desc", **where)
    return (run for run in listed if run.get("state") not in STATUSES and run.get("storage_state") != "ARCHIVED")


def live_runs_of(api: KfpApi, campaign: str, pipeline: str) -> list[dict[str, Any]]:
    """Runs of a pipeline for a campaign that have not ended, whoever started them, oldest first.

    Args:
        pipeline: The pipeline's own name, `layerloop-train`: an evaluation of the campaign is another matter.
    """
    names: dict[str, str | None] = {}
    found = []
    for run in live_runs(api):
        given = ((run.get("runtime_config") or {}).get("parameters") or {}).get("campaign")
        same = isinstance(given, str) and given.rstrip("/") == campaign.rstrip("/")
        if same and _pipeline_name(api, run, names) in (pipeline, None):
            found.append(run)
    return sorted(found, key=lambda run: (str(run.get("created_at") or ""), str(run["run_id"])))


def _pipeline_name(api: KfpApi, run: Mapping[str, Any], names: dict[str, str | None]) -> str | None:
    """The name in the spec that a run was made of, asked for where the run only refers to it; None if nobody knows."""
    spec = run.get("pipeline_spec") or {}
    reference = run.get("pipeline_version_reference") or {}
    path = f"pipelines/{reference.get('pipeline_id')}/versions/{reference.get('pipeline_version_id')}"
    if not spec and reference.get("pipeline_version_id") and path not in names:
        try:
            version = api.get(path)
            names[path] = _name_in(version.get("pipeline_spec") or {})
        except MissingError:
            names[path] = None
    return _name_in(spec) if spec else names.get(path)


def _name_in(spec: Mapping[str, Any]) -> str | None:
    name = (spec.get("pipeline_spec") or spec).get("pipelineInfo", {}).get("name")
    return str(name) if name else None


def failures(api: KfpApi, run: Mapping[str, Any]) -> Iterator[str]:
    """For every task that failed by itself: its name, what KFP knows of it, the end of its log where KFP gives it."""
    tasks = (run.get("run_details") or {}).get("task_details") or []
    by_id = {task.get("task_id"): task for task in tasks}
    failed = [task for task in tasks if task.get("state") == "FAILED"]
    parents = {child.get("task_id") or child.get("pod_name"): task for task in failed for child in _children(task)}

    def is_leaf(task: Mapping[str, Any]) -> bool:
        inner = [by_id.get(child.get("task_id")) or _by_pod(tasks, child.get("pod_name")) for child in _children(task)]
        return not any(child is not None and child.get("state") == "FAILED" for child in inner)

    for task in filter(is_leaf, failed):
        message = " ".join(str((task.get("error") or {}).get("message") or "").split())
        parent = parents.get(task.get("task_id")) or parents.get(task.get("pod_name")) or {}
        name = task.get("display_name") or "a task"
        if parent.get("display_name") and name.startswith("executor"):  # Argo's name of every step's inner node
            name = parent["display_name"]
        pods = [task.get("pod_name"), *(child.get("pod_name") for child in _children(task))]
        log = next((lines for pod in pods if pod and (lines := api.tail_of_log(run["run_id"], pod))), [])
        yield f"  {name}: {message or ('the end of its log:' if log else 'failed')}"
        yield from (f"    | {line}" for line in log)
        if not log:
            yield f"    its log: {run_link(api, run['run_id'])} (the task's executor-logs, under Input/Output)"
    message = " ".join(str((run.get("error") or {}).get("message") or "").split())
    if message:
        yield f"  {message}"


def _children(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(task.get("child_tasks") or [])


def _by_pod(tasks: list[dict[str, Any]], pod: str | None) -> dict[str, Any] | None:
    return next((task for task in tasks if pod and task.get("pod_name") == pod), None)


def _said(state: str | None) -> str:
    return (state or "").removeprefix("RUNTIME_STATE_").lower().replace("unspecified", "") or "queued"
