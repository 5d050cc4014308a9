"""One contract for a step as a command and as a Kubeflow task: flags in, or the executor input; manifests out.

A `container_component` passes `--executor-input {{$}}`, the JSON that the Kubeflow launcher (and kfp.local) makes of a
task's inputs and outputs. Parameters become the keyword arguments of `run`; of input artifacts only the iteration
number is read, for they are small manifests that carry lineage while the data is in the campaign. The step's outputs
are written where the executor input says, and listed in its `outputs.outputFile`. Standard library and pydantic only.

The driver asks for more than component.py declares (`executor-logs`, whose file the launcher holds open): an output
that the step did not make is left alone. A refusal is remembered for the pod that Kubeflow starts next (refusals.py).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import json
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from layerloop.components.runtime.environment import usable_environment
from layerloop.components.runtime.parser import OneLineParser
from layerloop.components.runtime.progress import log
from layerloop.components.runtime.rank_errors import report
from layerloop.components.runtime.refusals import Objects, Refusals
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Kind, Manifest
from layerloop.components.schema.record import validate
from layerloop.components.schema.steps import RUN, Step

_IMPORTED = time.monotonic()

# Where the Kubeflow launcher mounts remote artifacts (kfp/dsl/types/artifact_types.py).
_MOUNTS = {"s3://": "/s3/", "gs://": "/gcs/", "minio://": "/minio/"}

UNTIL = "until"  # the task parameter that names the run's target


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Outputs of a step by name: what Kubeflow shows. The data itself is in the campaign."""

    manifests: dict[str, Manifest] = field(default_factory=dict)  # artifact: the manifest's JSON and its counts
    files: dict[str, bytes] = field(default_factory=dict)  # artifact: these bytes, an HTML report for instance
    metrics: dict[str, float] = field(default_factory=dict)  # the Metrics artifact named "metrics"
    parameters: dict[str, str | int | float | bool] = field(default_factory=dict)


def step_main(
    run: Callable[..., StepResult],
    *,
    step: Step | None = None,
    beyond: tuple[str, Kind | str] | None = None,
    store: Callable[[str], Objects] | None = None,
    launch: Callable[[str, Sequence[str], Mapping[str, Any]], int | None] | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Run a step from its command line or from `--executor-input`.

    Args:
        run: the step; its keyword-only arguments (str, int, float, bool, dict, or one of these | None) become flags,
            whose help is taken from the `Args:` section of its docstring. A dict is given as JSON. A positional one is
            for callers in Python.
        step: its row of the step table, which says from which input artifact's `iteration` metadata a Kubeflow task's
            argument `iteration` follows; None where it does not.
        beyond: of a step that is skipped for an iteration past the run's target (the task's parameter `until`): its
            output artifact, and its content then: an empty manifest of a kind, or the input artifact of that name.
        store: opens the campaign's store, where the refusals of a task are remembered; None remembers none.
        launch: of a step that shares its work among ranks: runs a module with a command line in several processes and
            returns its exit status, or None where one process will do (ranks.py). It is given the arguments of `run`
            as well, for a step whose number of processes depends on them.
        argv: arguments, by default the process's own.

    Returns:
        The exit status: 0, or the error's (2, if it is not one of its own) after a one-line `error: ...` on standard
        error. Defects keep their traceback.
    """
    name = _step_name(run)
    parser = _parser(run, name)
    arguments = vars(parser.parse_args(argv))
    given = arguments.pop("executor_input")
    refusals: Refusals | None = None
    try:
        task: dict[str, Any] = {}
        if given is not None:
            task = _parse_executor_input(given)
            if run_name := _run_of(task):
                os.environ.setdefault(RUN, run_name)
            until = _until(task) if beyond else 0
            arguments = _task_arguments(run, task, step)
            if beyond and 0 < until < int(arguments.get("iteration") or 0):
                log(f"iteration {arguments['iteration']} is past the run's target {until}: nothing to do")
                _write_outputs(_passed_through(*beyond, arguments["iteration"], task), task.get("outputs", {}))
                return 0
            if store is not None and arguments.get("campaign"):
                refusals = Refusals(functools.partial(store, str(arguments["campaign"])), given, step=name)
                refusals.repeat()
        else:
            texts = [name for name in arguments if _kind(run, name) is dict]
            arguments |= {name: _mapping(_flag(name), arguments[name]) for name in texts}
        missing = [_flag(p.name) for p in _parameters(run) if p.name not in arguments and p.default is p.empty]
        if missing:
            parser.error(f"these are required: {', '.join(missing)}")
        if launch is not None:
            status = launch(f"layerloop.components.{name}", sys.argv[1:] if argv is None else argv, arguments)
            if status is not None:
                return status
        reports = os.environ.get("RANK", "0") == "0"  # under torchrun every rank gets here
        if reports:
            log(f"started {name} {_seconds_since_process_start():.3f} s after process start")
        with usable_environment():
            result = run(**arguments)
        if reports:
            if given is None:
                print(json.dumps({"metrics": result.metrics, "parameters": result.parameters}), flush=True)
            else:
                _write_outputs(result, task.get("outputs", {}))
    except LayerloopError as error:
        if report(error):
            return error.status
        print(f"error: {error}", file=sys.stderr, flush=True)
        if refusals is not None:
            refusals.remember(error)
        return error.status
    return 0


def end_process(status: int) -> NoReturn:
    """End the process with `status` at once: what a step made is committed, and its threads have been joined.

    The interpreter's own end would run the destructors of torch, pyarrow and CUDA in an order that nobody chose. With
    both torch and pyarrow loaded it aborts now and then ("terminate called without an active exception", status 134),
    and a step that has done its work counts as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


# --------------------------------------------------------------------------------------------------------- command line


def _parser(run: Callable[..., StepResult], name: str) -> argparse.ArgumentParser:
    document = inspect.getdoc(run) or ""
    helps = _argument_helps(document)
    parser = OneLineParser(
        prog=f"python -m layerloop.components.{name}",
        description=re.split(r"\n\s*\n\s*(?:Args|Returns|Raises):", document)[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--executor-input", default=None, help=argparse.SUPPRESS)
    for parameter in _parameters(run):
        kind = _kind(run, parameter.name)
        text = helps.get(parameter.name, "").replace("%", "%%")
        if parameter.default is parameter.empty:
            text = f"{text} (required)"
        elif parameter.default not in (None, "", {}):
            text = f"{text} (default: {parameter.default})"
        if kind is bool:
            parser.add_argument(
                _flag(parameter.name), dest=parameter.name, action=argparse.BooleanOptionalAction, help=text
            )
        else:
            metavar = {str: "TEXT", int: "N", float: "X", dict: "JSON"}[kind]
            reader = str if kind is dict else kind
            parser.add_argument(_flag(parameter.name), dest=parameter.name, type=reader, metavar=metavar, help=text)
    return parser


def _parameters(run: Callable[..., StepResult]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(run).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _kind(run: Callable[..., StepResult], name: str) -> type:
    """The plain type of an argument, None aside."""
    hint = typing.get_type_hints(run)[name]
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [typing.get_origin(option) or option for option in options if option is not type(None)]
    if len(kinds) != 1 or kinds[0] not in (str, int, float, bool, dict, Mapping):
        raise TypeError(
            f"argument {name} of {run.__module__}.run is {hint}: use str, int, float, bool or dict, or one | None"
        )
    return dict if kinds[0] is Mapping else kinds[0]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _argument_helps(document: str) -> dict[str, str]:
    """Help per argument from a docstring's `Args:` section (names indented once, their continuation lines deeper)."""
    match = re.search(r"^Args:\n(.*?)(?:\n\S|\Z)", document, re.MULTILINE | re.DOTALL)
    helps: dict[str, str] = {}
    name = ""
    for line in match[1].splitlines() if match else ():
        entry = re.match(r"^ {4}(\w+):\s*(.*)$", line)
        if entry:
            name = entry[1]
            helps[name] = entry[2].strip()
        elif name and line.strip():
            helps[name] += f" {line.strip()}"
    return helps


def _step_name(run: Callable[..., StepResult]) -> str:
    """`score_rollouts` for a `run` of layerloop.components.score_rollouts.step, also when that is run as `__main__`."""
    module = run.__module__
    if module == "__main__":
        spec = run.__globals__.get("__spec__")
        module = spec.name if spec else Path(run.__globals__.get("__file__", "step")).parent.name
    return module.removesuffix(".step").removesuffix(".__main__").rpartition(".")[2]


# ------------------------------------------------------------------------------------------------------- executor input


def _parse_executor_input(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise LayerloopError(f"--executor-input is not JSON ({error}): pass the placeholder {{{{$}}}}") from None
    if not isinstance(value, dict) or not isinstance(value.get("outputs", {}), dict):
        raise LayerloopError("--executor-input is not an executor input: pass the placeholder {{$}}")
    return value


_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _run_of(task: Mapping[str, Any]) -> str:
    """The id of the Kubeflow run of a task: its artifacts' URIs end in run/task/salt/name, run and salt being UUIDs."""
    for listed in ((task.get("outputs") or {}).get("artifacts") or {}).values():
        for artifact in listed.get("artifacts") or ():
            found = [part for part in str(artifact.get("uri", "")).split("/") if _UUID.fullmatch(part)]
            if found:
                return found[-2] if len(found) > 1 else found[0]
    return ""


def _task_arguments(run: Callable[..., StepResult], task: Mapping[str, Any], step: Step | None) -> dict[str, Any]:
    """Keyword arguments of `run` for a Kubeflow task."""
    inputs = task.get("inputs") or {}
    known = {p.name: p for p in _parameters(run)}
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
            arguments[name] = _cast(name, value, _kind(run, name))
    if step and step.iteration_from and "iteration" in known and "iteration" not in arguments:
        artifacts = (inputs.get("artifacts") or {}).get(step.iteration_from, {}).get("artifacts") or []
        arguments["iteration"] = _iteration_of(step.iteration_from, artifacts) + step.iteration_offset
    return arguments


def _until(task: Mapping[str, Any]) -> int:
    """The run's target, the task's parameter `until`; 0 for none."""
    value = ((task.get("inputs") or {}).get("parameterValues") or {}).get(UNTIL)
    return 0 if value in (None, "") else int(_cast(UNTIL, value, int))


def _passed_through(output: str, what: Kind | str, iteration: int, task: Mapping[str, Any]) -> StepResult:
    """Result of a step that had nothing to do: an unchanged input artifact, or an empty manifest."""
    listed = ((task.get("inputs") or {}).get("artifacts") or {}).get(what, {}).get("artifacts") or []
    if listed:
        path = local_path(str(listed[0].get("uri", "")))
        return StepResult(manifests={output: Manifest.from_json(path.read_bytes(), where=str(path))})
    return StepResult(manifests={output: validate(Manifest, {"kind": what, "iteration": iteration}, where=output)})


def _mapping(name: str, value: str) -> dict[str, Any]:
    """A mapping given as JSON text.

    Raises:
        LayerloopError: `value` is not a JSON object.
    """
    try:
        read = json.loads(value)
    except ValueError as error:
        raise LayerloopError(f'{name} is not JSON ({error}): write it as {{"update": {{"steps": 1}}}}') from None
    if not isinstance(read, dict):
        raise LayerloopError(f'{name} is {value}: give a JSON object such as {{"update": {{"steps": 1}}}}')
    return read


def _cast(name: str, value: Any, kind: type) -> Any:
    """A parameter in its declared type. Numbers may arrive as floats (protobuf) or, from a schedule, as text; text that
    looks like a number may arrive as one. Blanks around a value come from a form or a shell, and are removed."""
    text = value.strip() if isinstance(value, str) else value
    if kind is dict:
        if isinstance(value, dict):
            return value
        return _mapping(f"input parameter {name}", text if isinstance(text, str) else json.dumps(text))
    if kind is str:
        if isinstance(text, str):
            return text
        return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)
    if kind is bool:
        named = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}.get(str(text).lower())
        if named is not None:
            return named
    elif not isinstance(text, bool):
        try:
            number = float(text)
            if kind is float:
                return number
            if number.is_integer():
                return int(text) if isinstance(text, (str, int)) and str(text).lstrip("+-").isdigit() else int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise LayerloopError(f"input parameter {name} is {value!r}: give {_ARTICLE[kind]}")


_ARTICLE = {int: "an integer", float: "a number", bool: "true or false"}


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
        found.add(int(_cast(f"{name}.iteration", value, int)))
    if len(found) != 1:
        state = f"of iterations {', '.join(map(str, sorted(found)))}" if found else "not there"
        raise LayerloopError(f"input artifact {name} is {state}: give artifacts of one iteration")
    return found.pop()


# -------------------------------------------------------------------------------------------------------------- outputs


def local_path(uri: str) -> Path:
    """Path at which the launcher mounts an artifact; a plain path stays."""
    for scheme, mount in _MOUNTS.items():
        if uri.startswith(scheme):
            return Path(mount + uri.removeprefix(scheme))
    return Path(uri)


def artifact_metadata(manifest: Manifest) -> dict[str, Any]:
    """Metadata of a manifest that the Kubeflow UI shows, and from which the next task reads its iteration."""
    metadata: dict[str, Any] = {**manifest.counts, "kind": manifest.kind, "display_name": manifest.kind}
    if manifest.iteration is not None:
        metadata |= {"iteration": manifest.iteration, "display_name": f"{manifest.kind} {manifest.iteration}"}
    return metadata


def _write_outputs(result: StepResult, outputs: Mapping[str, Any]) -> None:
    """Write the outputs that the task asks for, and the output file that lists them."""
    written: dict[str, Any] = {}
    for name, listed in (outputs.get("artifacts") or {}).items():
        artifact = listed["artifacts"][0]
        made = _output(result, name)
        if made is None:  # the driver's own: the launcher has the file open
            continue
        data, metadata = made
        _write(local_path(artifact["uri"]), data)
        written[name] = {
            "artifacts": [
                {
                    "name": artifact.get("name", name),
                    "uri": artifact["uri"],
                    "type": artifact.get("type", {}),
                    "metadata": {**(artifact.get("metadata") or {}), **metadata},
                }
            ]
        }
    values = {}
    for name, output in (outputs.get("parameters") or {}).items():
        if name not in result.parameters:
            raise KeyError(f"the task asks for parameter {name}, which the step did not make")
        values[name] = result.parameters[name]
        text = values[name] if isinstance(values[name], str) else json.dumps(values[name])
        _write(Path(output["outputFile"]), str(text).encode())
    if outputs.get("outputFile"):
        _write(
            Path(outputs["outputFile"]),
            json.dumps({"parameterValues": values, "artifacts": written}, allow_nan=False).encode(),
        )


def _output(result: StepResult, name: str) -> tuple[bytes, dict[str, Any]] | None:
    """Content and metadata of an output artifact; None for one that is not the step's."""
    if name in result.manifests:
        return result.manifests[name].to_json(), artifact_metadata(result.manifests[name])
    if name in result.files:
        return result.files[name], {}
    if name == "metrics":
        return (json.dumps(result.metrics, indent=2, sort_keys=True) + "\n").encode(), dict(result.metrics)
    return None


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)  # kfp.local does not make them for container components
    path.write_bytes(data)


def _seconds_since_process_start() -> float:
    """Age of this process, from Linux's /proc; elsewhere, since this module was imported."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22, starttime
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _IMPORTED
