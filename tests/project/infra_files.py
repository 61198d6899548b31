"""What lies in infra/: its documents, the pods in them, and who says what to whom."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
COMPOSE = INFRA / "compose.yaml"
MANIFESTS = sorted((INFRA / "kubernetes").rglob("*.yaml"))
DOCKERFILES = sorted((INFRA / "docker").glob("Dockerfile.*"))
JOB_TEMPLATE = INFRA / "kubernetes" / "prefect" / "base-job-template.json"
JOB = INFRA / "kubernetes" / "base" / "jobs" / "nightly.yaml"
POLICY = INFRA / "aws" / "bucket-policy.json"
NOT_KUBERNETES = ("kustomization.yaml", JOB.name)
PREFECT_ONLY = ("parallelism", "completions")
"""Keys that Prefect's worker wants in a pod, where Kubernetes knows none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pod:
    """A pod that some document makes."""

    name: str
    template: dict[str, Any]

    @property
    def spec(self) -> dict[str, Any]:
        return dict(self.template["spec"])

    @property
    def label(self) -> str:
        return str(self.template["metadata"]["labels"]["app.kubernetes.io/name"])

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


@functools.cache
def documents() -> tuple[dict[str, Any], ...]:
    """All documents that a cluster is given, and the Job that Prefect makes of its template."""
    found = [
        document
        for path in MANIFESTS
        if path.name not in NOT_KUBERNETES
        for document in yaml.safe_load_all(path.read_text())
    ]
    return (*found, job_of_prefect())


def job_of_prefect() -> dict[str, Any]:
    """What Prefect's worker makes of the template for a run of a deployment by `score deploy`."""
    template = json.loads(JOB_TEMPLATE.read_text())
    variables = template["variables"]["properties"]
    values = {name: variable.get("default") for name, variable in variables.items()}
    values |= {"name": "night", "command": ["prefect", "flow-run", "execute"], "env": []}

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(each) for key, each in value.items()}
        if isinstance(value, list):
            return [fill(each) for each in value]
        if not isinstance(value, str):
            return value
        if whole := re.fullmatch(r"{{ (\w+) }}", value):
            return values[whole[1]]
        return re.sub(r"{{ (\w+) }}", lambda found: str(values[found[1]]), value)

    job: dict[str, Any] = fill(template["job_configuration"]["job_manifest"])
    job["metadata"]["name"] = "night"
    pod = job["spec"]["template"]["spec"]
    for key in PREFECT_ONLY:
        del pod[key]
    return job


def ray_groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups of nodes of a Ray cluster, its head first."""
    spec = cluster["spec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pods() -> list[Pod]:
    """All pods of all documents."""
    found = []
    for document in documents():
        name = f"{document['kind']} {document['metadata']['name']}"
        match document["kind"]:
            case "Deployment" | "StatefulSet" | "Job":
                found.append(Pod(name=name, template=document["spec"]["template"]))
            case "CronJob":
                job = document["spec"]["jobTemplate"]
                found.append(Pod(name=name, template=job["spec"]["template"]))
            case "RayCluster":
                for group in ray_groups(document):
                    title = f"{name} {group.get('groupName', 'head')}"
                    found.append(Pod(name=title, template=group["template"]))
    return found


def one(kind: str, name: str) -> dict[str, Any]:
    """The document of that kind and name."""
    (found,) = (
        each for each in documents() if (each["kind"], each["metadata"]["name"]) == (kind, name)
    )
    return found


def services() -> dict[str, dict[str, Any]]:
    """Those of the Compose file."""
    compose: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return dict(compose["services"])


def environment() -> Iterator[tuple[str, Any]]:
    """Names and values of all variables that pods and services are given."""
    for pod in pods():
        for container in pod.containers:
            for variable in container.get("env", ()):
                yield variable["name"], variable.get("value", variable.get("valueFrom"))
    for service in services().values():
        yield from service.get("environment", {}).items()


def images() -> set[str]:
    """All images that pods, services and Dockerfiles start from."""
    found = {container["image"] for pod in pods() for container in pod.containers}
    found |= {service["image"] for service in services().values()}
    for path in DOCKERFILES:
        found |= set(re.findall(r"^FROM (\S+)", path.read_text(), re.MULTILINE))
    return found


def command_lines() -> list[list[str]]:
    """The words of every command that a container is started with."""
    found = [
        [str(word) for word in container.get("args", ())]
        for pod in pods()
        for container in pod.containers
    ]
    found += [[str(word) for word in each.get("command", ())] for each in services().values()]
    return [words for words in found if words]
