"""infra/: what Kubernetes, Docker and Compose themselves would refuse or should not be given."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.project.infra_files import (
    COMPOSE,
    DOCKERFILES,
    INFRA,
    Pod,
    documents,
    environment,
    images,
    pods,
    ray_groups,
)

KUBERNETES = "1.34"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
"""A tool of our own environment comes before the machine's."""
KUSTOMIZATIONS = sorted(path.parent for path in INFRA.rglob("kustomization.yaml"))
HAS_SECRET = re.compile(r"PASSWORD|SECRET|TOKEN$|ACCESS_KEY")
FROM_OUTSIDE = re.compile(r"\$\{[A-Z_]+:(\?.+|-)\}")
"""How Compose takes a value from its environment: what is needed, or what may be empty."""
RAY_KEYS = {
    "spec": {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions"},
    "group": {"rayStartParams", "template", "groupName", "replicas", "minReplicas", "maxReplicas"},
}
"""Of KubeRay's ray-operator/apis/ray/v1/raycluster_types.go; no package carries its schema."""


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    found = shutil.which(program, path=PATH)
    assert found, f"the `dev` extra brings {program}; install it"
    words = [found, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)


def mebibytes(text: str) -> int:
    return int(text[:-2]) * {"Mi": 1, "Gi": 1024}[text[-2:]]


@pytest.mark.parametrize("path", sorted(INFRA.rglob("*.y*ml")), ids=lambda path: path.name)
def test_every_yaml_file_of_infra_parses(path: Path) -> None:
    assert all(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("path", sorted(INFRA.rglob("*.json")), ids=lambda path: path.name)
def test_every_json_file_of_infra_parses(path: Path) -> None:
    assert json.loads(path.read_text())


@pytest.mark.parametrize(
    "document",
    [each for each in documents() if each["kind"] != "RayCluster"],
    ids=lambda each: f"{each['kind']} {each['metadata']['name']}",
)
def test_kubernetes_knows_every_key_of_a_manifest(document: dict[str, object]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("pod", pods(), ids=lambda pod: pod.name)
def test_kubernetes_knows_every_key_of_a_pod(pod: Pod) -> None:
    """Those of a Ray cluster, which has no schema here, are among them."""
    template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}}
    kubernetes_validate.validate({**template, "template": pod.template}, KUBERNETES, strict=True)


def test_kuberay_knows_every_key_of_the_ray_cluster() -> None:
    (cluster,) = (each for each in documents() if each["kind"] == "RayCluster")
    groups = {"headGroupSpec", "workerGroupSpecs"}
    assert set(cluster["spec"]) - groups <= RAY_KEYS["spec"]
    for group in ray_groups(cluster):
        assert set(group) <= RAY_KEYS["group"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda path: path.name)
def test_kustomize_builds_every_folder_into_our_namespace(folder: Path) -> None:
    built = run("kubectl", "kustomize", folder)
    assert built.returncode == 0, built.stderr
    for document in yaml.safe_load_all(built.stdout):
        if document["kind"] != "Namespace":
            assert document["metadata"]["namespace"] == "nightscore"


def test_compose_knows_every_key_of_its_file() -> None:
    ended = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing_in_a_dockerfile(path: Path) -> None:
    ended = run("hadolint", path)
    assert (ended.returncode, ended.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_no_root_and_hands_signals_on(path: Path) -> None:
    last_stage = path.read_text().rpartition("\nFROM ")[2]
    assert "USER 10001:10001\n" in last_stage
    assert 'ENTRYPOINT ["tini", "--"]\n' in last_stage
    assert re.search(r"^CMD \[", last_stage, re.MULTILINE), "a shell would keep SIGTERM"


@pytest.mark.parametrize("image", sorted(images()))
def test_an_image_is_pinned(image: str) -> None:
    tag = image.rpartition(":")[2]
    ours = image.startswith("nightscore:")  # Compose builds these itself
    assert ours or re.search(r"\d+\.\d+", tag), f"{image}: expected a version"


@pytest.mark.parametrize("pod", pods(), ids=lambda pod: pod.name)
def test_a_pod_is_what_a_restricted_namespace_takes(pod: Pod) -> None:
    who = pod.spec["securityContext"]
    assert who["runAsNonRoot"] is True
    assert who["runAsUser"] > 0
    assert who["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec)
    for container in pod.containers:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("pod", pods(), ids=lambda pod: pod.name)
def test_a_pod_asks_for_what_it_needs_and_can_write_to_tmp(pod: Pod) -> None:
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    for container in pod.containers:
        resources = container["resources"]
        assert resources["requests"]["cpu"]
        assert mebibytes(resources["requests"]["memory"]) <= mebibytes(
            resources["limits"]["memory"]
        )
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert "emptyDir" in volumes[mounts["/tmp"]]


def test_no_secret_is_written_down() -> None:
    secrets = [(name, value) for name, value in environment() if HAS_SECRET.search(name)]
    assert len(secrets) >= 6
    for name, value in secrets:
        is_reference = isinstance(value, dict) and "secretKeyRef" in value
        assert is_reference or FROM_OUTSIDE.fullmatch(str(value)), name
    assert not [each for each in documents() if each["kind"] == "Secret"]
    example = (INFRA / "compose" / "env.example").read_text()
    assert not re.findall(r"^\w+=.+", example, re.MULTILINE)


def test_the_example_of_an_environment_names_what_compose_asks_for() -> None:
    asked = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    example = (INFRA / "compose" / "env.example").read_text()
    assert set(re.findall(r"^(\w+)=", example, re.MULTILINE)) == asked


def test_every_network_policy_is_about_pods_that_exist() -> None:
    labels = {pod.label for pod in pods()} | {"kuberay-operator"}
    text = json.dumps([each for each in documents() if each["kind"] == "NetworkPolicy"])
    selected = set(re.findall(r'"app.kubernetes.io/name": "([\w-]+)"', text))
    for values in re.findall(r'"values": \[([^\]]+)\]', text):
        selected |= set(json.loads(f"[{values}]"))
    assert selected <= labels
    assert labels - selected == set()
