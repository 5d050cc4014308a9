"""What a run or schedule is made of: a compiled package, or a version of a pipeline that is registered with KFP."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import parse_recipe_runtime
from layerloop.components.schema.run_recipe import overridden, packaged_recipes
from layerloop.components.schema.runtime import checked_values
from layerloop.pipelines.kfp_api import KfpApi, TakenError, equals, required
from layerloop.pipelines.packages import check_parameters, is_spec, parameters_of, read_spec


@dataclass(frozen=True)
class Pipeline:
    """A pipeline that can be run: its spec, and how a request names it."""

    name: str
    spec: Mapping[str, Any]
    source: Mapping[str, Any]  # the field of a run or recurring run: pipeline_spec or pipeline_version_reference
    said: str  # for messages

    def declares(self, parameter: str) -> bool:
        return parameter in parameters_of(dict(self.spec))


def find_pipeline(api: KfpApi, text: str) -> Pipeline:
    """The package in a file, or the registered pipeline `NAME`, its latest version, or `NAME@VERSION`.

    Raises:
        LayerloopError: the file is no package; no such pipeline or version.
    """
    if text.endswith((".yaml", ".yml")) or Path(text).is_file():
        return read_package(Path(text))
    name, _, wanted = text.partition("@")
    found = _registered(api, name)
    if found is None:
        raise LayerloopError(
            f"{name} is neither a file nor a pipeline that is registered with KFP at {api.shown}: "
            "give a package (.yaml), or register it by `layerloop pipeline upload`"
        )
    path = f"pipelines/{found}/versions"
    known = []
    for version in api.pages(path, "pipeline_versions", sort_by="created_at desc"):  # the latest first
        known.append(version.get("display_name") or version.get("name"))
        if not wanted or wanted in (version.get("display_name"), version.get("name"), version["pipeline_version_id"]):
            version_found = api.get(f"{path}/{version['pipeline_version_id']}")
            stored = required(api, version_found, "pipeline_spec", "a pipeline version")
            spec = stored.get("pipeline_spec") or stored  # with a platform spec, or alone
            reference = {"pipeline_id": found, "pipeline_version_id": version["pipeline_version_id"]}
            if not is_spec(spec):
                raise LayerloopError(f"{name}@{known[-1]} is not a pipeline of KFP's version 2: name another")
            return Pipeline(
                str(spec["pipelineInfo"]["name"]),
                spec,
                {"pipeline_version_reference": reference},
                f"{name}@{known[-1]}",
            )
    raise LayerloopError(
        f"pipeline {name} has no version {wanted or 'at all'}: "
        f"{'known are ' + ', '.join(map(str, known[:5])) if known else 'upload one by `layerloop pipeline upload`'}"
    )


def read_package(path: Path) -> Pipeline:
    """The pipeline that `layerloop compile` or `kfp dsl compile` wrote to `path`.

    Raises:
        LayerloopError: it is something else.
    """
    spec = read_spec(path)
    documents = [document for document in yaml.load_all(path.read_text(), Loader=_LOADER) if document]
    source = spec if len(documents) == 1 else {"pipeline_spec": spec, "platform_spec": documents[1]}
    return Pipeline(str(spec["pipelineInfo"]["name"]), spec, {"pipeline_spec": source}, str(path))


def upload(api: KfpApi, path: Path, *, name: str | None = None) -> str:
    """Register a package as a version of the pipeline `name`, unless the same content is one already.

    The version is called `<name>-<first 12 hex digits of the content's sha256>`: equal pipelines are one version,
    whatever their file looks like, and the name says nothing that could become untrue.

    Args:
        name: The pipeline's name in the UI; the package's own when None.

    Returns:
        `NAME@VERSION`, as runs and schedules name it.

    Raises:
        LayerloopError: no package, or KFP refuses.
    """
    package = read_package(path)
    name = name or package.name
    version = f"{name}-{digest(package.source)}"
    pipeline = _registered(api, name) or _register(api, name)
    listed = api.pages(f"pipelines/{pipeline}/versions", "pipeline_versions")
    if any(version in (item.get("display_name"), item.get("name")) for item in listed):
        print(f"pipeline {name} has this content already: version {version}", flush=True)
    else:
        try:
            query = {"name": version, "display_name": version, "pipelineid": pipeline}
            required(
                api,
                api.upload("pipelines/upload_version", path.name, path.read_bytes(), **query),
                "pipeline_version_id",
                "a pipeline version",
            )
            print(f"pipeline {name}: version {version} is registered", flush=True)
        except TakenError:  # by another command, a moment ago: the name holds the content's hash
            print(f"pipeline {name} has this content already: version {version}", flush=True)
    print(f"see it:  {api.ui}/#/pipelines/details/{pipeline}", flush=True)
    return f"{name}@{version}"


def digest(value: Any) -> str:
    """12 hex digits that equal content shares."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def typed_parameters(pipeline: Pipeline, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Text made into what the pipeline declares: whole numbers, numbers, truth values, JSON for lists and mappings.

    What is no text (a value of a schedule file) is taken as it is where it has the declared type.

    Raises:
        LayerloopError: a parameter is unknown, missing or of another type, the campaign is a folder of this machine, or
            a key or value of the recipe's overrides or of the runtime is none.
    """
    check_parameters(dict(pipeline.spec), list(parameters))
    known = parameters_of(dict(pipeline.spec))
    values: dict[str, Any] = {}
    for key, given in parameters.items():
        kind = known[key]["parameterType"]
        text = given if isinstance(given, str) else json.dumps(given)
        try:
            values[key] = _READERS[kind](text)
        except (ValueError, KeyError):
            raise LayerloopError(
                f"{key} is {text!r}: {pipeline.name} wants {_WANTED.get(kind, kind.lower())}"
            ) from None
    campaign = values.get("campaign", "")
    if isinstance(campaign, str) and campaign and "://" not in campaign:
        raise LayerloopError(
            f"campaign is {campaign!r}, a folder, which the pods of a cluster do not share: give s3://bucket/prefix"
        )
    if pipeline.name.startswith("layerloop-"):
        checked_values(values.get("runtime") or {}, where="runtime")
        _check_overrides(pipeline.spec, values)
    return values


def _check_overrides(spec: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse here what a run's first step would refuse, where the recipe is a packaged one or the pipeline's own.

    Raises:
        LayerloopError: a key that the recipe has not, or a value that does not fit.
    """
    if not values.get("overrides"):
        return
    given = str(values.get("recipe") or "").strip()
    text = packaged_recipes().get(given)
    try:
        if not given:
            sources = spec["root"]["dag"]["tasks"]["shard-dataset"]["inputs"]["parameters"]
            text = sources["default_recipe"]["runtimeValue"]["constant"]
        recipe = parse_recipe_runtime(text)[0] if text else None
    except (KeyError, TypeError, LayerloopError):  # of another version: its own first step knows
        return
    if recipe is not None:
        overridden(recipe, values["overrides"])


def _registered(api: KfpApi, name: str) -> str | None:
    """Id of the pipeline `name`: the namespace's own before one that all share."""
    for namespace in dict.fromkeys((api.namespace, "")):
        listed = api.pages("pipelines", "pipelines", namespace=namespace, filter=equals("display_name", name))
        for item in listed:
            if name in (item.get("display_name"), item.get("name")):
                return str(item["pipeline_id"])
    return None


def _register(api: KfpApi, name: str) -> str:
    body = {"name": name, "display_name": name} | ({"namespace": api.namespace} if api.namespace else {})
    try:
        return str(required(api, api.post("pipelines", body), "pipeline_id", "a pipeline"))
    except TakenError:
        found = _registered(api, name)
        if found is None:
            raise
        return found


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else bool(int(text))


def _json_of(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = json.loads(text)
        if not isinstance(value, kind):
            raise ValueError
        return value

    return read


_READERS: dict[str, Callable[[str], Any]] = {
    "STRING": str,
    "NUMBER_INTEGER": int,
    "NUMBER_DOUBLE": float,
    "BOOLEAN": _truth,
    "LIST": _json_of(list),
    "STRUCT": _json_of(dict),
}
_WANTED = {
    "NUMBER_INTEGER": "a whole number",
    "NUMBER_DOUBLE": "a number",
    "BOOLEAN": "true or false",
    "LIST": "a list as JSON",
    "STRUCT": "a mapping as JSON",
}
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
