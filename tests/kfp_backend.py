"""A compiled pipeline run as the backend of Kubeflow Pipelines 2.16 and 2.17 does, every step a process of its own.

For tests, where no cluster is at hand; written from what the backend's Go sources do with a container component:

- the API server takes no parameter that the pipeline lacks (v2_template.go), the driver none of another type
  (resolve.go);
- the driver resolves inputs, adds the output artifact `executor-logs` (driver.go), and hands numbers of loops on as
  protobuf does, as floats; `{{$.pipeline_job_uuid}}` is resolved where it is a constant's only text;
- the launcher fills defaults in, holds the log file open, runs the command with `{{$}}` filled in, and reads the output
  file strictly; metadata goes through a store that knows no integers but what it was given, and no booleans;
- Argo starts a failed pod again up to the task's limit, with the same executor input and another name.

Artifacts lie in a folder, since /minio can only be made by root; the mounts are tested in test_contract.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KINDS: dict[str, type | tuple[type, ...]] = {
    "STRING": str, "NUMBER_INTEGER": (int, float), "NUMBER_DOUBLE": (int, float), "BOOLEAN": bool, "STRUCT": dict,
    "LIST": list,
}  # fmt: skip
RUN_ID = "{{$.pipeline_job_uuid}}"
_COMPARISON = re.compile(r"inputs\.parameter_values\['([^']+)'\] (==|!=) '([^']*)'")


class TaskFailed(Exception):
    """A pod ended with another status than 0, as often as the task may be tried."""


@dataclass
class Pod:
    """One attempt of a container task."""

    task: str
    name: str
    status: int
    output: str  # what it printed
    inputs: dict[str, Any]  # parameters


@dataclass
class Execution:
    """What the metadata store keeps of a task that has ended: its outputs, or None of a skipped one."""

    outputs: dict[str, Any] | None


@dataclass
class Backend:
    """Runs one pipeline once."""

    package: Path
    folder: Path  # pipeline root and logs
    environment: dict[str, str] = field(default_factory=dict)  # of every pod, on top of this process's
    pods_have_names: bool = True  # KFP_POD_NAME, by which a step knows that it is in a cluster
    python: str = sys.executable  # what the pods run in; `warm()` has loaded the libraries
    run_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    pods: list[Pod] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spec, self.platform = yaml.safe_load_all(self.package.read_text())

    def run(self, **parameters: Any) -> None:
        """To the end.

        Raises:
            TaskFailed: a task failed; what needed it was not begun.
            ValueError: parameters that the API server refuses.
        """
        known = self.spec["root"]["inputDefinitions"]["parameters"]
        if unknown := set(parameters) - set(known):
            raise ValueError(f"parameter(s) provided are not required by pipeline: {unknown}")
        if missing := {k for k, p in known.items() if not p.get("isOptional")} - set(parameters):
            raise ValueError(f"required parameters are missing: {missing}")
        self._dag(self.spec["root"], self._checked(known, parameters), {})

    def steps(self) -> list[str]:
        """Tasks of the pods, in order; one that was tried again stands there again."""
        return [pod.task for pod in self.pods]

    # ------------------------------------------------------------------------------------------------------- the driver

    def _checked(self, known: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        for name, value in values.items():
            kind = known[name]["parameterType"]
            if (isinstance(value, bool) and kind != "BOOLEAN") or not isinstance(value, KINDS[kind]):
                raise ValueError(f"input parameter {name} type mismatch: expect {kind}, got {value!r}")
        return {**{k: p["defaultValue"] for k, p in known.items() if "defaultValue" in p}, **values}

    def _dag(self, component: dict[str, Any], values: dict[str, Any], artifacts: dict[str, Any]) -> dict[str, Any]:
        waiting = dict(component["dag"]["tasks"])
        ended: dict[str, Execution] = {}
        while waiting:
            name = next(n for n, t in waiting.items() if not set(t.get("dependentTasks", ())) & set(waiting))
            task = waiting.pop(name)
            needed = [ended[other] for other in task.get("dependentTasks", ())]
            if any(execution.outputs is None for execution in needed):
                self._skip(name)
                ended[name] = Execution(None)
                continue
            given, linked = self._inputs(task, values, artifacts, ended)
            if not self._holds(task.get("triggerPolicy", {}).get("condition", ""), given):
                self._skip(name)
                ended[name] = Execution(None)
                continue
            ended[name] = Execution(self._iterate(name, task, given, linked))
        declared = component["dag"].get("outputs", {})
        made: dict[str, Any] = {}
        for key, output in declared.get("artifacts", {}).items():
            made[key] = [a for s in output["artifactSelectors"] for a in self._output(ended, s, "outputArtifactKey")]
        return made

    def _output(self, ended: dict[str, Execution], selector: dict[str, str], key: str) -> Any:
        outputs = ended[selector.get("producerSubtask") or selector["producerTask"]].outputs
        assert outputs is not None, f"an artifact leaves a task that was skipped: {selector}"
        return outputs[selector[key]]

    def _inputs(
        self, task: dict[str, Any], values: dict[str, Any], artifacts: dict[str, Any], ended: dict[str, Execution]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        given: dict[str, Any] = {}
        for key, source in task.get("inputs", {}).get("parameters", {}).items():
            match source:
                case {"runtimeValue": {"constant": constant}}:
                    given[key] = self.run_id if constant == RUN_ID else constant
                case {"componentInputParameter": name}:
                    given[key] = values[name]
                case {"taskOutputParameter": selector}:
                    given[key] = self._output(ended, selector, "outputParameterKey")
                case _:
                    raise ValueError(f"input {key} comes from {source}, which none of our pipelines uses")
        linked = {
            key: artifacts[source["componentInputArtifact"]]
            if "componentInputArtifact" in source
            else self._output(ended, source["taskOutputArtifact"], "outputArtifactKey")
            for key, source in task.get("inputs", {}).get("artifacts", {}).items()
        }
        return given, linked

    def _holds(self, condition: str, given: dict[str, Any]) -> bool:
        if not condition:
            return True
        compared = _COMPARISON.fullmatch(condition)
        assert compared, f"a condition that this backend does not know: {condition}"
        return (given[compared[1]] == compared[3]) is (compared[2] == "==")

    def _skip(self, name: str) -> None:
        self.skipped.append(name)

    def _iterate(self, name: str, task: dict[str, Any], given: dict[str, Any], linked: dict[str, Any]) -> Any:
        if "parameterIterator" not in task:
            return self._component(name, task, given, linked)
        loop = task["parameterIterator"]
        items = [float(item) for item in json.loads(loop["items"]["raw"])]
        rounds = [self._component(name, task, {**given, loop["itemInput"]: item}, linked) for item in items]
        return {key: [artifact for one in rounds for artifact in one[key]] for key in rounds[0]}  # Collected

    def _component(self, name: str, task: dict[str, Any], given: dict[str, Any], linked: dict[str, Any]) -> Any:
        component = self.spec["components"][task["componentRef"]["name"]]
        known = component.get("inputDefinitions", {}).get("parameters", {})
        for key, declared in component.get("inputDefinitions", {}).get("artifacts", {}).items():
            assert key in linked or declared.get("isOptional"), f"{name} lacks the artifact {key}"
        values = self._checked(known, given)
        if "dag" in component:
            return self._dag(component, values, linked)
        return self._container(name, task, component, values, linked)

    # ----------------------------------------------------------------------------------------------------- the launcher

    def _container(
        self, name: str, task: dict[str, Any], component: dict[str, Any], values: dict[str, Any], linked: dict[str, Any]
    ) -> dict[str, Any]:
        here = self.folder / self.run_id / name / uuid.uuid4().hex
        here.mkdir(parents=True)
        declared = component.get("outputDefinitions", {})
        types = {key: d["artifactType"] for key, d in declared.get("artifacts", {}).items()}
        asked = {**types, "executor-logs": {"schemaTitle": "system.Artifact", "schemaVersion": "0.0.1"}}
        executor_input = {
            "inputs": {
                "parameterValues": values,
                **({"artifacts": {key: {"artifacts": listed} for key, listed in linked.items()}} if linked else {}),
            },
            "outputs": {
                "artifacts": {
                    key: {"artifacts": [{"name": key, "type": kind, "uri": str(here / key), "metadata": {}}]}
                    for key, kind in asked.items()
                },
                "parameters": {key: {"outputFile": str(here / f"{key}.txt")} for key in declared.get("parameters", {})},
                "outputFile": str(here / "output_metadata.json"),
            },
        }
        tries = 1 + task.get("retryPolicy", {}).get("maxRetryCount", 0)
        for attempt in range(tries):
            pod = self._pod(name, component, executor_input, attempt, here)
            if pod.status == 0:
                return self._read(here, declared, executor_input)
        raise TaskFailed(f"{name}: {pod.output.strip().splitlines()[-1]}")

    def _pod(
        self, name: str, component: dict[str, Any], executor_input: dict[str, Any], attempt: int, here: Path
    ) -> Pod:
        container = self.spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        text = json.dumps(executor_input)
        assert len(text) < 128 * 1024, "an argument is longer than Linux takes"
        command = [part.replace("{{$}}", text) for part in (*container["command"], *container["args"])]
        assert command[0] == "python3"
        pod_name = f"{here.name}-{name}-{attempt}"
        own = {variable["name"]: variable["value"] for variable in container.get("env", ())}
        names = {"KFP_POD_NAME": pod_name} if self.pods_have_names else {}
        with open(here / "executor-logs", "w+") as log:  # open as long as the step runs, and the launcher's
            environment = {"OMP_NUM_THREADS": "1", **os.environ, **own, **names, **self.environment}
            status, output = self._process(command[1:], environment, here / "output")
            log.write(output)
            log.flush()
            assert (here / "executor-logs").read_text() == output, f"{name} wrote into the launcher's log"
            assert os.fstat(log.fileno()).st_ino == (here / "executor-logs").stat().st_ino, f"{name} replaced the log"
        self.pods.append(Pod(name, pod_name, status, output, executor_input["inputs"]["parameterValues"]))
        return self.pods[-1]

    def _process(self, command: list[str], environment: dict[str, str], output: Path) -> tuple[int, str]:
        """Exit status of a pod's command, and what it printed."""
        output.unlink(missing_ok=True)
        with output.open("w") as file:
            done = subprocess.run(
                [self.python, *command], env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        return done.returncode, output.read_text()

    def _read(self, here: Path, declared: dict[str, Any], executor_input: dict[str, Any]) -> dict[str, Any]:
        told = json.loads((here / "output_metadata.json").read_text())
        assert set(told) <= {"parameterValues", "artifacts"}, f"protojson refuses {set(told)}"
        assert set(told["artifacts"]) == set(declared.get("artifacts", {})), "not exactly the declared outputs"
        made: dict[str, Any] = {}
        for key in declared.get("parameters", {}):
            made[key] = told["parameterValues"][key]
            assert (here / f"{key}.txt").read_text() == made[key]
        for key, listed in told["artifacts"].items():
            (artifact,) = listed["artifacts"]
            assert set(artifact) <= {"name", "uri", "type", "metadata"}, f"protojson refuses {set(artifact)}"
            assert (here / key).is_file(), f"{key} has no file to upload"
            made[key] = [{**artifact, "metadata": {k: self._stored(k, v) for k, v in artifact["metadata"].items()}}]
        return made

    def _stored(self, key: str, value: Any) -> Any:
        assert isinstance(value, (int, float, str, dict, list)) and not isinstance(value, bool), f"{key} is {value!r}"
        return float(value) if isinstance(value, int) else value
