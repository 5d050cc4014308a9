"""The executor input of a Kubeflow task: the JSON that the launcher (and kfp.local) makes of its inputs and outputs."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from layerloop.components.runtime.arguments import cast, kind_of, parameters_of
from layerloop.components.runtime.outputs import StepResult, local_path
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Kind, Manifest
from layerloop.components.schema.record import validate
from layerloop.components.schema.steps import Step

UNTIL = "until"  # the task parameter that names the run's target


def parse_executor_input(text: str) -> dict[str, Any]:
    """The executor input as an object.

    Raises:
        LayerloopError: it is none.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise LayerloopError(f"--executor-input is not JSON ({error}): pass the placeholder {{{{$}}}}") from None
    if not isinstance(value, dict) or not isinstance(value.get("outputs", {}), dict):
        raise LayerloopError("--executor-input is not an executor input: pass the placeholder {{$}}")
    return value


_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def run_of(task: Mapping[str, Any]) -> str:
    """The id of the Kubeflow run of a task: its artifacts' URIs end in run/task/salt/name, run and salt being UUIDs."""
    for listed in ((task.get("outputs") or {}).get("artifacts") or {}).values():
        for artifact in listed.get("artifacts") or ():
            found = [part for part in str(artifact.get("uri", "")).split("/") if _UUID.fullmatch(part)]
            if found:
                return found[-2] if len(found) > 1 else found[0]
    return ""


def task_arguments(run: Callable[..., StepResult], task: Mapping[str, Any], step: Step | None) -> dict[str, Any]:
    """Keyword arguments of `run` for a Kubeflow task."""
    inputs = task.get("inputs") or {}
    known = {p.name: p for p in parameters_of(run)}
    arguments: dict[str, Any] = {}
    for name, value in (inputs.get("parameterValues") or {}).items():
        if name == UNTIL and name not in known:
            continue
        if name not in known:
            raise LayerloopError(
                f"input parameter {name} is not one of {', '.join(known)}: the image is of another version"
            )
        emptied = isinstance(value, str) and not value.strip() and known[name].default is not inspect.Parameter.empty
        if value is not None and not emptied:  # a field of the run form that was emptied means the default
            arguments[name] = cast(name, value, kind_of(run, name))
    if step and step.iteration_from and "iteration" in known and "iteration" not in arguments:
        artifacts = (inputs.get("artifacts") or {}).get(step.iteration_from, {}).get("artifacts") or []
        arguments["iteration"] = _iteration_of(step.iteration_from, artifacts) + step.iteration_offset
    return arguments


def until_of(task: Mapping[str, Any]) -> int:
    """The run's target, the task's parameter `until`; 0 for none."""
    value = ((task.get("inputs") or {}).get("parameterValues") or {}).get(UNTIL)
    return 0 if value in (None, "") else int(cast(UNTIL, value, int))


def passed_through(output: str, what: Kind | str, iteration: int, task: Mapping[str, Any]) -> StepResult:
    """Result of a step that had nothing to do: an unchanged input artifact, or an empty manifest."""
    listed = ((task.get("inputs") or {}).get("artifacts") or {}).get(what, {}).get("artifacts") or []
    if listed:
        path = local_path(str(listed[0].get("uri", "")))
        return StepResult(manifests={output: Manifest.from_json(path.read_bytes(), where=str(path))})
    return StepResult(manifests={output: validate(Manifest, {"kind": what, "iteration": iteration}, where=output)})


def _iteration_of(name: str, artifacts: Sequence[Mapping[str, Any]]) -> int:
    """The one iteration all artifacts of an input belong to, from their metadata or, failing that, their manifest."""
    found = set()
    for artifact in artifacts:
        value = (artifact.get("metadata") or {}).get("iteration")
        if value is None:
            path = local_path(str(artifact.get("uri", "")))
            if path.is_file():
                value = Manifest.from_json(path.read_bytes(), where=str(path)).iteration
        if value is None:
            raise LayerloopError(
                f"input artifact {name} ({artifact.get('uri')}) has no iteration: give a step's manifest"
            )
        found.add(int(cast(f"{name}.iteration", value, int)))
    if len(found) != 1:
        state = f"of iterations {', '.join(map(str, sorted(found)))}" if found else "not there"
        raise LayerloopError(f"input artifact {name} is {state}: give artifacts of one iteration")
    return found.pop()
