"""A compiled pipeline as a file: written, read, counted, and its parameters checked."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import re
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from kfp import compiler

from layerloop.components.schema.errors import LayerloopError


def write_pipeline(pipeline: Any, path: Path) -> Path:
    """Compile `pipeline` to YAML at `path`; equal pipelines give equal bytes.

    The parameters stand in the order in which they were declared, which KFP sorts, and texts of several lines as such.
    The comment block that KFP puts on top is replaced: it repeats defaults unescaped, so one of several lines would end
    the comment and break the file (kfp 2.17).

    Raises:
        LayerloopError: `path` does not end in .yaml, or cannot be written.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise LayerloopError(f"output is {path}: name a file that ends in .yaml")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(raw))
        documents = [document for document in yaml.safe_load_all(raw.read_text()) if document]
    inputs = documents[0]["root"].get("inputDefinitions", {})
    if found := inputs.get("parameters"):
        declared = [name for name in inspect.signature(pipeline.pipeline_func).parameters if name in found]
        inputs["parameters"] = {name: found[name] for name in declared}
    version = importlib.metadata.version("layerloop")
    text = f"# Compiled by layerloop {version}: upload it to KFP, or run it here with `layerloop run`.\n"
    body = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + body)
    except OSError as error:
        raise LayerloopError(f"{path} cannot be written ({error.strerror}): choose another output") from None
    return path


class _Dumper(yaml.SafeDumper):
    """Texts of several lines in block style, so that a recipe can be read and compared; no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def read_spec(package: Path) -> dict[str, Any]:
    """The pipeline spec in a compiled file.

    Raises:
        LayerloopError: it cannot be read, or is something else.
    """
    try:
        spec = next(yaml.safe_load_all(package.read_text()), None)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        spec = None
    if not is_spec(spec):
        raise LayerloopError(f"{package} is not a compiled pipeline: make one with `layerloop compile`")
    return spec


def is_spec(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a value is a pipeline spec of KFP's version 2; its version 1 kept workflows of Argo."""
    try:
        return isinstance(value["pipelineInfo"]["name"], str) and isinstance(value["root"]["dag"]["tasks"], dict)
    except (TypeError, KeyError):
        return False


def parameters_of(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pipeline's parameters: type, description, default."""
    return dict(spec["root"].get("inputDefinitions", {}).get("parameters", {}))


def check_parameters(spec: dict[str, Any], given: Collection[str]) -> None:
    """Refuse names that the pipeline does not have, and missing ones that it needs.

    Raises:
        LayerloopError: naming the first of them.
    """
    known, name = parameters_of(spec), spec["pipelineInfo"]["name"]
    for key in given:
        if key not in known:
            raise LayerloopError(f"{key} is not a parameter of {name}: known are {', '.join(sorted(known))}")
    for key, parameter in known.items():
        if key not in given and not parameter.get("isOptional"):
            sentence = re.split(r"(?<=\.)\s", parameter.get("description", "a value"))[0].rstrip(".")
            raise LayerloopError(f"{key} is missing: {name} needs {sentence[:1].lower()}{sentence[1:]}")


def count_tasks(spec: dict[str, Any]) -> int:
    """Container tasks that a run of the pipeline spec (the first YAML document) executes, constant loops unrolled."""

    def dag_tasks(dag: dict[str, Any]) -> int:
        total = 0
        for task in dag["tasks"].values():
            component = spec["components"][task["componentRef"]["name"]]
            inner = dag_tasks(component["dag"]) if "dag" in component else 1
            loop = task.get("parameterIterator")
            total += inner * (len(json.loads(loop["items"]["raw"])) if loop else 1)
        return total

    return dag_tasks(spec["root"]["dag"])
