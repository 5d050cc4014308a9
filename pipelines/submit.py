"""Runs and schedules on a cluster, with exit statuses that tell the truth.

`kfp run create --wait` ends with 0 for a failed run and never returns for a cancelled one, and `kfp recurring-run
create` sends every parameter as text and leaves the schedule disabled (kfp 2.17); so both are done here, through the
SDK's client.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from layerloop.components.schema.errors import LayerloopError
from layerloop.pipelines.packages import check_parameters, parameters_of, read_spec

FINAL = {"SUCCEEDED": 0, "SKIPPED": 0, "FAILED": 1, "CANCELED": 1}  # states of a run, and our exit status
LOST_CONTACT = 20  # polls in a row without an answer, after which waiting ends


def connect(host: str | None) -> Any:
    """A client of the KFP API server: with KFP_TOKEN if that is set, else in a pod with the token that is mounted.

    Raises:
        LayerloopError: it cannot be reached, or refuses.
    """
    import kfp
    from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH
    from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

    with _said_in_one_line(f"KFP at {host or 'its configured host'}"), _silent():
        # Given a host, the client looks for no credentials of its own, not even in a pod.
        token = os.environ.get("KFP_TOKEN")
        mounted = os.environ.get(KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH)
        credentials = ServiceAccountTokenVolumeCredentials() if not token and os.path.exists(mounted) else None
        return kfp.Client(host=host, existing_token=token, credentials=credentials)


def submit(
    client: Any,
    package: Path,
    parameters: dict[str, str],
    *,
    experiment: str,
    run_name: str | None = None,
    wait: bool = False,
    timeout: float | None = None,
    poll: Callable[[float], float] = lambda waited: min(30.0, 2.0 + waited / 20),
    namespace: str | None = None,
) -> int:
    """Start a run of a compiled pipeline; with `wait`, report its state changes until it ends.

    Args:
        client: What `connect` returned.
        package: A file that `layerloop compile` wrote.
        parameters: The pipeline's parameters as text; numbers are made of them where the pipeline wants numbers.
        experiment: Name of the experiment, created where there is none.
        run_name: Name shown by KFP; the pipeline's name and the time when None.
        wait: Whether to wait for the end.
        timeout: Seconds to wait at most; the run itself goes on.
        poll: Seconds until the next look, from the seconds waited.
        namespace: Profile namespace in multi-user mode.

    Returns:
        Exit status: 0 when it succeeded (or was started, without `wait`), 1 when it failed, was cancelled or timed out.

    Raises:
        LayerloopError: a wrong package or parameter, or the API server refuses or cannot be reached.
    """
    values = typed_parameters(package, parameters)
    name = run_name or f"{read_spec(package)['pipelineInfo']['name']}-{time.strftime('%Y%m%d-%H%M%S')}"
    with _said_in_one_line("KFP"), _silent():
        home = client.create_experiment(experiment, namespace=namespace)
        run = client.run_pipeline(home.experiment_id, name, pipeline_package_path=str(package), params=values)
    print(f"run {run.run_id} ({name}) of experiment {experiment} started", flush=True)
    return _wait(client, run.run_id, timeout, poll) if wait else 0


def _wait(client: Any, run_id: str, timeout: float | None, poll: Callable[[float], float]) -> int:
    began, state, silent = time.monotonic(), "", 0
    while True:
        try:
            with _said_in_one_line(f"run {run_id}"):
                run = client.get_run(run_id)
            silent = 0
        except LayerloopError as error:  # an API server restarts within the hours that a run takes
            silent += 1
            if silent >= LOST_CONTACT:
                raise LayerloopError(f"run {run_id} cannot be watched any more, it may go on: {error}") from None
            run = None
        waited = time.monotonic() - began
        if run is not None and run.state != state:
            state = run.state or ""
            print(f"run {run_id}: {state.lower() or 'queued'} after {waited:.0f} s", flush=True)
        if state in FINAL:
            for line in _failures(run):
                print(line, flush=True)
            return FINAL[state]
        if timeout is not None and waited >= timeout:
            print(f"run {run_id} is still {state.lower() or 'queued'} after {waited:.0f} s: it goes on", flush=True)
            return 1
        time.sleep(poll(waited) if timeout is None else min(poll(waited), max(0.0, timeout - waited)))


def _failures(run: Any) -> Iterator[str]:
    """A line for every task that failed, with what KFP knows of it."""
    details = getattr(run, "run_details", None)
    for task in (getattr(details, "task_details", None) or []) if details else []:
        if task.state == "FAILED":
            message = " ".join(str(getattr(task.error, "message", "") or "see its log").split())
            yield f"  {task.display_name}: {message}"
    if getattr(run, "error", None) and run.error.message:
        yield f"  {' '.join(run.error.message.split())}"


def apply_schedule(
    client: Any,
    package: Path,
    parameters: dict[str, str],
    *,
    experiment: str,
    name: str,
    cron: str,
    namespace: str | None = None,
) -> None:
    """Create the recurring run `name`, enabled, one at a time, without catching up; one that is there is replaced.

    Raises:
        LayerloopError: the cron expression has not six fields, a wrong package or parameter, or the API server refuses.
    """
    if len(cron.split()) != 6:
        raise LayerloopError(f"cron is {cron!r}: write six fields, seconds first, such as '0 0 2 * * *'")
    values = typed_parameters(package, parameters)
    wanted = {"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]}
    with _said_in_one_line("KFP"), _silent():
        home = client.create_experiment(experiment, namespace=namespace)
        listed = client.list_recurring_runs(
            experiment_id=home.experiment_id, page_size=100, filter=json.dumps(wanted)
        ).recurring_runs
        made = client.create_recurring_run(
            home.experiment_id,
            name,
            cron_expression=cron,
            max_concurrency=1,
            no_catchup=True,
            params=values,
            pipeline_package_path=str(package),
            enabled=True,
        )
        replaced = [old for old in listed or [] if old.display_name == name]
        for old in replaced:  # after the new one is there: a refused schedule leaves the old one as it was
            client.delete_recurring_run(old.recurring_run_id)
    print(f"schedule {name} ({cron}) is {made.recurring_run_id}, enabled; replaced {len(replaced)}", flush=True)


def typed_parameters(package: Path, parameters: dict[str, str]) -> dict[str, Any]:
    """Text made into what the pipeline declares: whole numbers, numbers, truth values, JSON for lists and mappings.

    Raises:
        LayerloopError: the package is not a pipeline, a parameter is unknown, missing or of another type.
    """
    spec = read_spec(package)
    check_parameters(spec, parameters)
    known, name = parameters_of(spec), spec["pipelineInfo"]["name"]
    values: dict[str, Any] = {}
    for key, text in parameters.items():
        kind = known[key]["parameterType"]
        try:
            values[key] = _READERS[kind](text)
        except ValueError:
            raise LayerloopError(f"{key} is {text!r}: {name} wants {kind.lower().replace('_', ' ')}") from None
    return values


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else bool(int(text))


_READERS: dict[str, Callable[[str], Any]] = {
    "STRING": str,
    "NUMBER_INTEGER": int,
    "NUMBER_DOUBLE": float,
    "BOOLEAN": _truth,
    "LIST": json.loads,
    "STRUCT": json.loads,
}


@contextlib.contextmanager
def _said_in_one_line(what: str) -> Iterator[None]:
    """Turn what the client raises into one line."""
    import kfp_server_api
    import urllib3

    try:
        yield
    except kfp_server_api.ApiException as error:
        try:
            reason = json.loads(error.body).get("message") or error.reason
        except (ValueError, TypeError, AttributeError):
            reason = error.reason
        raise LayerloopError(f"{what} answers {error.status}: {' '.join(str(reason).split())[:300]}") from None
    except (urllib3.exceptions.HTTPError, TimeoutError) as error:
        raise LayerloopError(f"{what} cannot be reached ({type(error).__name__}): check --host") from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the client's own lines on standard output and its warnings about configuration."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
