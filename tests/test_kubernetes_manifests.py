"""Everything under manifests/: valid against Kubernetes' schemas, and in step with what the pipelines name."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerloop.pipelines.cli import build_parser
from layerloop.pipelines.cluster import Cluster, read_cluster

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "manifests"
KUSTOMIZATIONS = sorted(path.parent.relative_to(MANIFESTS).as_posix() for path in MANIFESTS.rglob("kustomization.yaml"))
OTHER_KINDS = {
    "ClusterQueue",
    "LocalQueue",
    "Profile",
    "ResourceFlavor",
    "InterceptorRoute",
    "ScaledObject",
}  # of Kueue and Kubeflow: no schema at hand


def documents(text: str) -> list[Any]:
    return [document for document in yaml.safe_load_all(text) if document]


def rendered(folder: Path) -> list[Any]:
    """What `kubectl apply -k` would send; without kubectl, the resources that kustomization.yaml names, followed."""
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize", "--load-restrictor=LoadRestrictionsNone", str(folder)]
        return documents(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found: list[Any] = []
    for resource in kustomization.get("resources", []):
        path = folder / resource
        found += rendered(path) if path.is_dir() else documents(path.read_text())
    return found


def validate(path: Path, version: str = "1.31") -> str:
    """Output of kubernetes-validate; fails on an unknown field, a wrong type or a missing one."""
    command = [str(Path(sys.executable).with_name("kubernetes-validate")), "--strict", "-k", version, str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_a_kustomization_renders_to_valid_resources(name: str, tmp_path: Path) -> None:
    resources = rendered(MANIFESTS / name)
    assert resources
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump_all(resources))
    without_schema = set(re.findall(r"Couldn't find schema for kind (\w+)", validate(path)))
    assert without_schema <= OTHER_KINDS


def test_a_wrong_field_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a}\nautomountServiceAcountToken: false\n"
    )
    with pytest.raises(AssertionError, match="automountServiceAcountToken"):
        validate(tmp_path / "x.yaml")


def everything() -> list[Any]:
    folders = [MANIFESTS / name for name in KUSTOMIZATIONS]
    return [document for folder in folders for document in rendered(folder)]


def test_the_defaults_of_the_cluster_file_are_the_names_of_the_resources() -> None:
    cluster, named = Cluster(), {(d["kind"], d["metadata"]["name"]) for d in everything()}
    assert ("LocalQueue", cluster.queue) in named
    assert ("PersistentVolumeClaim", cluster.weights_claim) in named
    secrets = {d["metadata"]["name"]: d for d in documents((MANIFESTS / "secrets.example.yaml").read_text())}
    assert secrets.keys() == {cluster.secrets.store, cluster.secrets.judge, cluster.secrets.hub}


def test_no_secret_has_a_value_and_none_is_applied() -> None:
    for secret in documents((MANIFESTS / "secrets.example.yaml").read_text()):
        assert set(secret["stringData"].values()) == {""}
    validate(MANIFESTS / "secrets.example.yaml")
    assert not [d for d in everything() if d["kind"] == "Secret"]


def test_the_example_of_a_cluster_file_is_one() -> None:
    assert read_cluster(MANIFESTS / "cluster.example.yaml").gpus == 1


def pod_specs() -> list[tuple[str, Any]]:
    found = []
    for document in everything():
        spec = document.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template") if isinstance(spec, dict) else None
        if template:
            found.append((f"{document['kind']}/{document['metadata']['name']}", template["spec"]))
    return found


def test_pods_run_without_root_and_without_privileges() -> None:
    for name, pod in pod_specs():
        for container in pod["containers"]:
            context = {**pod.get("securityContext", {}), **container.get("securityContext", {})}
            assert context.get("runAsNonRoot") is True, name
            assert context.get("allowPrivilegeEscalation") is False, name
            assert container["resources"]["limits"]["memory"], name


def test_commands_of_the_schedules_are_commands_of_the_cli(tmp_path: Path) -> None:
    commands = [
        c["command"] for _, pod in pod_specs() for c in pod["containers"] if c.get("command", [""])[0] == "layerloop"
    ]
    assert len(commands) >= 2
    for command in commands:
        build_parser().parse_args(command[1:])  # SystemExit where an option is unknown


def test_overlays_name_images_by_digest() -> None:
    for folder in sorted((MANIFESTS / "overlays").iterdir()):
        for image in yaml.safe_load((folder / "kustomization.yaml").read_text())["images"]:
            assert re.fullmatch(r"sha256:[0-9a-f]{64}", image["digest"])


@pytest.mark.parametrize("file", sorted((ROOT / "images").glob("Containerfile.*")), ids=lambda path: path.name)
def test_an_image_runs_as_nobody_with_a_writable_home_from_pinned_versions(file: Path) -> None:
    text = file.read_text()
    assert "USER 65532:65532" in text
    assert "HOME=/tmp" in text
    installs = [line for line in text.splitlines() if "pip install" in line and "setuptools" not in line]
    assert installs
    assert all("--constraint /tmp/constraints.txt" in line for line in installs)
    assert "kfp" not in text.replace("Kubeflow", "")
