"""What a step gives back, and how a Kubeflow task is given it: artifacts, parameters, and the file that lists them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerloop.components.schema.manifest import Manifest

# Where the Kubeflow launcher mounts remote artifacts (kfp/dsl/types/artifact_types.py).
_MOUNTS = {"s3://": "/s3/", "gs://": "/gcs/", "minio://": "/minio/"}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Outputs of a step by name: what Kubeflow shows. The data itself is in the campaign."""

    manifests: dict[str, Manifest] = field(default_factory=dict)  # artifact: the manifest's JSON and its counts
    files: dict[str, bytes] = field(default_factory=dict)  # artifact: these bytes, an HTML report for instance
    metrics: dict[str, float] = field(default_factory=dict)  # the Metrics artifact named "metrics"
    parameters: dict[str, str | int | float | bool] = field(default_factory=dict)


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


def write_outputs(result: StepResult, outputs: Mapping[str, Any]) -> None:
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
