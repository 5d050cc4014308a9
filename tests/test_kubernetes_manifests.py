"""Everything under manifests/: valid against Kubernetes' schemas, and in step with what the pipelines name."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from layerloop.pipelines.cli import build_parser
from layerloop.pipelines.cluster import Cluster, Images, Resources, Secrets, read_cluster
from layerloop.pipelines.kfp_api import MOUNTED_TOKEN
from layerloop.pipelines.schedules import read_schedules

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "manifests"
KUSTOMIZATIONS = sorted(path.parent.relative_to(MANIFESTS).as_posix() for path in MANIFESTS.rglob("kustomization.yaml"))
CRD_SCHEMAS = yaml.safe_load((ROOT / "tests" / "crd_schemas.yaml").read_text())
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())


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
    for generated in kustomization.get("configMapGenerator", []):
        data = {file: (folder / file).read_text() for file in generated["files"]}
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generated["name"]}, "data": data})
    namespace = kustomization.get("namespace")
    for resource in found if namespace else []:
        resource["metadata"]["namespace"] = namespace
    return found


def validate(path: Path, version: str = "1.31") -> str:
    """Output of kubernetes-validate; fails on an unknown field, a wrong type or a missing one."""
    command = [str(Path(sys.executable).with_name("kubernetes-validate")), "--strict", "-k", version, str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def validate_custom(resource: Any) -> None:
    """Check a custom resource by the schema of its CRD."""
    schema = CRD_SCHEMAS[f"{resource['apiVersion']}/{resource['kind']}"]
    jsonschema.validate(resource.get("spec"), {**schema, "definitions": CRD_SCHEMAS["definitions"]})


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_a_kustomization_renders_to_valid_resources(name: str, tmp_path: Path) -> None:
    resources = rendered(MANIFESTS / name)
    assert resources
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump_all(resources))
    without_schema = set(re.findall(r"Couldn't find schema for kind (\w+)", validate(path)))
    custom = [resource for resource in resources if resource["kind"] in without_schema]
    assert {resource["kind"] for resource in custom} == without_schema
    for resource in custom:
        validate_custom(resource)


@pytest.mark.parametrize("name", ["queues", "judge-to-zero", "profile", "overlays/multi-user"])
def test_a_wrong_field_of_a_custom_resource_would_be_found(name: str) -> None:
    custom = [r for r in rendered(MANIFESTS / name) if f"{r['apiVersion']}/{r['kind']}" in CRD_SCHEMAS]
    assert custom
    for resource in custom:
        with pytest.raises(jsonschema.ValidationError, match="Additional properties are not allowed"):
            validate_custom({**resource, "spec": {**resource["spec"], "misspelt": 1}})


def test_a_wrong_field_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a}\nautomountServiceAcountToken: false\n"
    )
    with pytest.raises(AssertionError, match="automountServiceAcountToken"):
        validate(tmp_path / "x.yaml")


def test_the_page_about_the_judge_says_how_a_sleeping_one_is_called() -> None:
    service, route = documents((MANIFESTS / "judge-to-zero/scale.yaml").read_text())[:2]
    name = service["metadata"]["name"]
    assert route["spec"]["rules"] == [{"hosts": [name]}], "the interceptor knows the judge by this name alone"
    url = f"http://{name}:8080/v1"
    assert url in (MANIFESTS / "judge-to-zero/kustomization.yaml").read_text()
    assert url in (MANIFESTS.parent / "docs/JUDGE.md").read_text()


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
    example = read_cluster(MANIFESTS / "cluster.example.yaml")
    assert example.model_dump() == Cluster(images=example.images).model_dump(), "the values are the defaults"
    text = (MANIFESTS / "cluster.example.yaml").read_text()
    keys = [key for part in (Cluster, Images, Secrets, Resources) for key in part.model_fields]
    assert [key for key in keys if not re.search(rf"\b{key}:", text)] == [], "every key is there, if in a comment"


def pods(resources: list[Any]) -> list[tuple[str, Any]]:
    """Pod templates by the name of what makes them."""
    found = []
    for document in resources:
        spec = document.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template") if isinstance(spec, dict) else None
        if template:
            found.append((f"{document['kind']}/{document['metadata']['name']}", template))
    return found


def pod_specs() -> list[tuple[str, Any]]:
    return [(name, template["spec"]) for name, template in pods(everything())]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_starts_nothing(overlay: str) -> None:
    resources = rendered(MANIFESTS / "overlays" / overlay)
    assert {r["kind"] for r in resources} <= {
        "ConfigMap", "CronJob", "PersistentVolumeClaim", "PodDefault", "Role", "RoleBinding", "ServiceAccount",
    }  # fmt: skip
    jobs = [r for r in resources if r["kind"] == "CronJob"]
    assert {r["metadata"]["name"] for r in jobs} == {"layerloop-weights", "layerloop-schedules"}
    assert all(r["spec"]["suspend"] is True for r in jobs)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_the_pods_of_an_overlay_need_is_in_the_overlay(overlay: str) -> None:
    resources = rendered(MANIFESTS / "overlays" / overlay)
    there = {(r["kind"], r["metadata"]["name"]) for r in resources}
    assert len({r["metadata"]["namespace"] for r in resources}) == 1
    for name, template in pods(resources):
        spec = template["spec"]
        needed = {("ServiceAccount", spec["serviceAccountName"])} if "serviceAccountName" in spec else set()
        for volume in spec.get("volumes", []):
            needed |= {("ConfigMap", volume["configMap"]["name"])} if "configMap" in volume else set()
            claim = volume.get("persistentVolumeClaim")
            needed |= {("PersistentVolumeClaim", claim["claimName"])} if claim else set()
        assert needed and needed <= there, name
        for container in spec["containers"]:
            keys = [
                e["valueFrom"]["secretKeyRef"] for e in container["env"] if "secretKeyRef" in e.get("valueFrom", {})
            ]
            assert all(key["optional"] is True for key in keys)  # secrets are made by hand, and each can be left out


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_schedules_of_an_overlay_are_what_the_command_takes(overlay: str, tmp_path: Path) -> None:
    resources = {(r["kind"], r["metadata"]["name"]): r for r in rendered(MANIFESTS / "overlays" / overlay)}
    file = tmp_path / "schedules.yaml"
    file.write_text(resources["ConfigMap", "layerloop-schedules"]["data"]["schedules.yaml"])
    (nightly,) = read_schedules(file, {})
    assert nightly.pipeline == "layerloop-evaluate"
    assert ("ServiceAccount", nightly.service_account) in resources


def test_jobs_that_talk_to_kfp_know_their_namespace_and_have_a_token_that_is_renewed() -> None:
    found = [(name, t, c) for name, t in pods(everything()) for c in t["spec"]["containers"] if "submit" in c["image"]]
    assert {name for name, _, _ in found} == {"CronJob/layerloop-schedules"}
    for name, template, container in found:
        environment = {variable["name"]: variable for variable in container["env"]}
        where = environment["KFP_NAMESPACE"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert where == "metadata.namespace", name
        assert container["volumeMounts"][-1]["mountPath"] + "/token" == MOUNTED_TOKEN
        (token,) = [v for v in template["spec"]["volumes"] if v["name"] == "token"]
        source = token["projected"]["sources"][0]["serviceAccountToken"]
        assert (source["path"], source["audience"]) == ("token", "pipelines.kubeflow.org")
        assert "--namespace" not in str(container["command"])


def test_the_step_that_ends_a_chain_can_have_a_token_where_it_looks_for_it() -> None:
    (default,) = [r for r in rendered(MANIFESTS / "overlays" / "multi-user") if r["kind"] == "PodDefault"]
    (mount,), (volume,) = default["spec"]["volumeMounts"], default["spec"]["volumes"]
    (source,) = volume["projected"]["sources"]
    assert mount["name"] == volume["name"]
    assert f"{mount['mountPath']}/{source['serviceAccountToken']['path']}" == MOUNTED_TOKEN
    (label,) = default["spec"]["selector"]["matchLabels"]
    assert label in (ROOT / "docs" / "cluster.md").read_text()
    roles = [r for r in rendered(MANIFESTS / "base") if (r["kind"], r["metadata"]["name"]) == ("Role", "layerloop-run")]
    rights = {resource: rule["verbs"] for role in roles for rule in role["rules"] for resource in rule["resources"]}
    assert "disable" in rights["jobs"]
    assert "get" in rights["runs"]


def test_the_account_of_runs_reads_only_the_secret_that_kfps_launcher_needs() -> None:
    resources = rendered(MANIFESTS / "overlays" / "multi-user")
    (role,) = [r for r in resources if (r["kind"], r["metadata"]["name"]) == ("Role", "layerloop-run")]
    names = {resource: rule.get("resourceNames") for rule in role["rules"] for resource in rule["resources"]}
    (launcher,) = [r for r in resources if (r["kind"], r["metadata"]["name"]) == ("ConfigMap", "kfp-launcher")]
    kept = yaml.safe_load(launcher["data"]["providers"])["s3"]["default"]["credentials"]["secretRef"]["secretName"]
    assert names["secrets"] == ["mlpipeline-minio-artifact", kept]
    assert names["configmaps"] == [launcher["metadata"]["name"]]


def test_no_pod_gets_a_sidecar_of_the_mesh() -> None:
    """Jobs would not end with one; and steps, which have none, would be refused by a judge that has one."""
    for name, template in pods(everything()):
        assert template["metadata"]["labels"]["sidecar.istio.io/inject"] == "false", name


@pytest.mark.parametrize("name", ["judge", "judge-to-zero", "judge-qwen3-vl", "reference-judge"])
def test_a_judge_is_reached_from_its_namespace_and_from_labelled_ones(name: str) -> None:
    resources = rendered(MANIFESTS / name)
    (policy,) = [r for r in resources if r["kind"] == "NetworkPolicy"]
    (judge,) = [r for r in resources if r["kind"] == "Deployment"]
    selector = policy["spec"]["podSelector"]["matchLabels"]
    assert selector.items() <= judge["spec"]["template"]["metadata"]["labels"].items()
    allowed = policy["spec"]["ingress"][0]["from"]
    assert {"podSelector": {}} in allowed
    assert {"namespaceSelector": {"matchLabels": {"layerloop-runs": "true"}}} in allowed
    assert not any("namespace" in r["metadata"] for r in resources)  # `kubectl apply -n` says it


def test_a_judge_that_downloads_its_weights_is_not_given_up_before_its_startup_probe() -> None:
    (judge,) = [resource for resource in rendered(MANIFESTS / "judge") if resource["kind"] == "Deployment"]
    probe = judge["spec"]["template"]["spec"]["containers"][0]["startupProbe"]
    assert judge["spec"]["progressDeadlineSeconds"] > probe["periodSeconds"] * probe["failureThreshold"]


def test_pods_run_without_root_and_without_privileges() -> None:
    for name, pod in pod_specs():
        for container in pod["containers"]:
            context = {**pod.get("securityContext", {}), **container.get("securityContext", {})}
            assert context.get("runAsNonRoot") is True, name
            assert context.get("allowPrivilegeEscalation") is False, name
            assert container["resources"]["limits"]["memory"], name


def test_commands_of_the_pods_are_commands_of_the_cli() -> None:
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
