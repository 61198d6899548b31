"""infra/ against the product: what would rot there when something changes here."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from prefect.runner._process_manager import ProcessManager
from prefect.settings.legacy import _get_settings_fields
from prefect.settings.models.root import Settings

from flows.cli import EXIT_INTERRUPTED
from flows.commands.app import app
from flows.mailing.mail import LAST_WORDS_S
from pipeline.cost import find_price, load_prices
from pipeline.errors import ConfigError, GuardError
from pipeline.interruptions import END_NOTE_S
from pipeline.job_file import load_job
from pipeline.lane import JOIN_TIMEOUT_S
from tests.project.infra_files import (
    DOCKERFILES,
    INFRA,
    JOB,
    JOB_TEMPLATE,
    POLICY,
    ROOT,
    command_lines,
    environment,
    images,
    one,
    pods,
    services,
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (INFRA / "README.md").read_text()
FREE_S = 10.0
"""For processes to leave, and for Prefect's server to be told."""
READ_BY_OTHERS = re.compile(
    r"POSTGRES_(USER|DB|PASSWORD)|PGDATA|GF_\w+|RAY_AUTH_(MODE|TOKEN)|AWS_(ACCESS_KEY_ID|"
    r"SECRET_ACCESS_KEY|DEFAULT_REGION|ENDPOINT_URL)|DO_NOT_TRACK|"
    r"PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES"
)
"""PostgreSQL, Grafana, Ray, botocore and Prefect's worker for Kubernetes."""
SCORING = [pod for pod in pods() if "nvidia.com/gpu" in str(pod.template)]


def score_commands() -> list[list[str]]:
    """The words after `score` of all commands in infra/."""
    found = []
    for words in command_lines():
        if words[0] == "score":
            found.append(words[1:])
        elif words[:2] == ["sh", "-c"]:
            found.append(shlex.split(words[2].partition("exec score ")[2]))
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "score" in words:
            found.append(words[words.index("score") + 1 :])
    return found


def seconds(text: str) -> float:
    """Of a duration as Compose writes it, such as 45s or 2m."""
    (number, unit) = re.fullmatch(r"(\d+)([sm])", text).groups()  # type: ignore[union-attr]
    return float(number) * {"s": 1, "m": 60}[unit]


@pytest.mark.parametrize("words", score_commands(), ids=" ".join)
def test_a_command_of_infra_is_one_that_score_has(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    for number, word in enumerate(words):
        if not hasattr(command, "commands"):
            break
        command = command.commands[word]
        arguments = words[number + 1 :]
    options = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in arguments if word.startswith("--")} <= options


def test_both_ways_to_run_nights_and_the_registration_are_among_the_commands() -> None:
    assert {words[0] for words in score_commands()} >= {"run", "deploy"}


def test_every_variable_is_read_by_somebody() -> None:
    of_prefect = set(_get_settings_fields(Settings))
    names = {name for name, _ in environment()}
    for path in DOCKERFILES:
        names |= set(re.findall(r"(PREFECT_\w+)=", path.read_text().partition("\nENV ")[2]))
    names -= {"PREFECT_KUBERNETES"}  # an argument of the build
    packages = (ROOT / "flows", ROOT / "pipeline", ROOT / "engines")
    ours = "".join(path.read_text() for package in packages for path in package.rglob("*.py"))
    rest = {name for name in names - of_prefect if f'"{name}"' not in ours}
    assert [name for name in sorted(rest) if not READ_BY_OTHERS.fullmatch(name)] == []


def test_scoring_pods_have_time_to_end() -> None:
    """The sum that README.md does under "The end of a pod"."""
    grace_s = load_job(str(JOB)).lanes.grace_s
    needed_s = grace_s + JOIN_TIMEOUT_S + END_NOTE_S + LAST_WORDS_S + FREE_S
    assert len(SCORING) == 3
    for pod in SCORING:
        assert pod.spec["terminationGracePeriodSeconds"] >= needed_s
    for name in ("worker", "register"):
        assert seconds(services()[name]["stop_grace_period"]) >= needed_s


def test_prefect_waits_for_lanes_before_it_kills() -> None:
    patience = inspect.signature(ProcessManager.kill).parameters["grace_seconds"].default
    assert load_job(str(JOB)).lanes.grace_s + END_NOTE_S + LAST_WORDS_S < patience


def test_the_jobs_of_kubernetes_take_exit_codes_as_the_command_means_them() -> None:
    spec = one("CronJob", "nightly")["spec"]["jobTemplate"]["spec"]
    rules = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert rules == {
        "FailJob": [ConfigError.exit_code, GuardError.exit_code],
        "Ignore": [EXIT_INTERRUPTED],
    }
    (container,) = spec["template"]["spec"]["containers"]
    assert container["name"] == "score"
    assert "'containerName': 'score'" in str(spec["podFailurePolicy"])


def test_a_replaced_pod_still_scores_the_same_date() -> None:
    """`date -d yesterday` is asked for when a pod starts: that must be the day of the schedule."""
    spec = one("CronJob", "nightly")["spec"]
    job = spec["jobTemplate"]["spec"]
    minute, hour = map(int, spec["schedule"].split()[:2])
    latest_s = spec["startingDeadlineSeconds"] + job["activeDeadlineSeconds"]
    assert (hour * 60 + minute) * 60 + latest_s < 86_400
    assert spec["timeZone"] == "Etc/UTC"
    (container,) = job["template"]["spec"]["containers"]
    assert "date -u -d yesterday" in container["args"][-1]


def test_pods_with_and_without_prefect_are_alike() -> None:
    cron, prefect = (dict(pod.spec) for pod in SCORING if pod.label == "score")
    (first,), (second,) = cron.pop("containers"), prefect.pop("containers")
    assert prefect.pop("enableServiceLinks") is False
    assert cron == prefect
    for key in ("image", "resources", "envFrom", "securityContext", "volumeMounts"):
        assert first[key] == second[key]


def test_the_template_of_prefect_uses_what_it_declares_and_nothing_else() -> None:
    template = json.loads(JOB_TEMPLATE.read_text())
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])
    manifest = template["job_configuration"]["job_manifest"]["spec"]
    (container,) = manifest["template"]["spec"]["containers"]
    assert container["name"] == "prefect-job", "its worker takes no other"
    assert manifest["backoffLimit"] == 0, "its worker puts a drained run back for another pod"
    assert "working_dir" in used, "what `score deploy` sets"


def test_scoring_pods_have_no_quota_of_processor_time() -> None:
    """Lanes count the cores that they see; a quota would stall as many threads."""
    for pod in SCORING:
        for container in pod.containers:
            assert "cpu" not in container["resources"]["limits"]


def test_our_images_are_of_this_version_and_have_a_dockerfile() -> None:
    ours = [image for image in images() if "/nightscore:" in image]
    assert len(ours) == 3
    for image in ours:
        version, _, kind = image.rpartition(":")[2].partition("-")
        assert version == PROJECT["version"]
        assert (INFRA / "docker" / f"Dockerfile.{kind}").exists()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_installs_what_the_project_pins(path: Path) -> None:
    text = path.read_text()
    assert all("-c constraints.txt" in line for line in re.findall(r"pip install.*", text))
    for extras in re.findall(r"ARG EXTRAS=(\S+)", text):
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    for version in re.findall(r"ARG TENSORRT=(\S+)", text):
        (wanted,) = (
            Requirement(each)
            for each in PROJECT["optional-dependencies"]["gpu"]
            if each.startswith("tensorrt")
        )
        assert version in wanted.specifier


def test_the_cluster_runs_the_pinned_ray() -> None:
    cluster = next(yaml.safe_load_all((INFRA / "kubernetes/ray/cluster.yaml").read_text()))
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={cluster['spec']['rayVersion']}" in pinned


def test_the_job_of_the_manifests_loads_and_has_a_price() -> None:
    job = load_job(str(JOB))
    price = find_price(load_prices(ROOT / "configs" / "prices.yaml"), job.cost.instance, "spot")
    assert price.usd_per_hour > 0
    policy = POLICY.read_text()
    for uri in (job.input.uri, job.output.uri, job.engine.store):
        assert f'"arn:aws:s3:::{uri.removeprefix("s3://")}/*"' in policy


def test_ports_agree_in_kubernetes() -> None:
    open_ports: dict[str, set[int]] = {}
    for pod in pods():
        for container in pod.containers:
            ports = {port["containerPort"] for port in container.get("ports", ())}
            open_ports.setdefault(pod.label, set()).update(ports)
    for name in ("postgres", "prefect-server"):
        service, policy = one("Service", name)["spec"], one("NetworkPolicy", name)["spec"]
        assert service["selector"] == policy["podSelector"]["matchLabels"]
        wanted = {port["port"] for port in service["ports"]}
        assert wanted == open_ports[name]
        assert wanted == {port["port"] for port in policy["ingress"][0]["ports"]}
    addresses = {str(value) for name, value in environment() if name == "PREFECT_API_URL"}
    assert {re.findall(r":(\d+)/api", address)[0] for address in addresses} == {"4200"}


def test_ports_agree_in_compose() -> None:
    every = services()
    assert "-s3.port=8333" in every["seaweedfs"]["command"]
    assert every["worker"]["environment"]["AWS_ENDPOINT_URL"] == "http://seaweedfs:8333"
    for name, port in (("seaweedfs", 8333), ("prefect-server", 4200)):
        assert every[name]["ports"] == [f"127.0.0.1:{port}:{port}"]
        assert f"127.0.0.1:{port}/" in str(every[name]["healthcheck"]["test"])


def test_what_is_mounted_from_infra_exists() -> None:
    for service in services().values():
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            if source.startswith("./compose"):
                assert (INFRA / source).exists(), source


def test_prometheus_reads_the_folder_that_runs_write_to() -> None:
    every = services()
    folder = "/metrics"
    assert every["node-exporter"]["command"] == [f"--collector.textfile.directory={folder}"]
    assert f"metrics:{folder}" in every["worker"]["volumes"]
    scraped: Any = yaml.safe_load((INFRA / "compose" / "prometheus.yml").read_text())
    ((target,),) = (each["targets"] for each in scraped["scrape_configs"][0]["static_configs"])
    assert target == "node-exporter:9100"
