"""The deployments on a real Prefect server: run by a real worker, overlapping, killed, late."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DATE, write_job
from tests.flows.smtp_servers import HOST, Mailbox, smtp_server
from tests.ports import free_port
from tests.scenarios.prefect_server import Server, ask

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(700)]
INITDB, POSTGRES, PSQL = (shutil.which(name) for name in ("initdb", "postgres", "psql"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests here: it takes seconds to start. Its worker is started, too."""
    running = Server(
        tmp_path_factory.mktemp("prefect"),
        PREFECT_WORKER_QUERY_SECONDS="1",
        PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS="1",
        PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS="1",
    )
    try:
        made = running.run("prefect", "work-pool", "create", "nightscore", "--type", "process")
        assert made.returncode == 0, made.stderr
        running.start_worker()
        yield running
    finally:
        running.stop()


def deployed(server: Server, job: Path, *more: str) -> dict[str, Any]:
    """What `score deploy --json` prints."""
    ended = server.run("score", "deploy", str(job), "--json", *more)
    assert ended.returncode == 0, ended.stderr
    facts: dict[str, Any] = json.loads(ended.stdout)
    return facts


def read_job(path: Path) -> dict[str, Any]:
    job: dict[str, Any] = json.loads(path.read_text())
    return job


def test_a_deployed_night_is_scored_by_a_worker_and_published_once(
    server: Server, features_job: Path, tmp_path: Path
) -> None:
    figures = tmp_path / "users.prom"
    write_job(features_job, {**read_job(features_job), "metrics": {"textfile": str(figures)}})
    facts = deployed(server, features_job, "--timezone", "Europe/Zurich")
    again = deployed(server, features_job, "--timezone", "Europe/Zurich")
    assert again == facts  # updated, not made twice
    assert facts["next_night"], "the server plans no run of the schedule"

    found = {one["name"]: one for one in server.post("/deployments/filter", {})}
    assert set(found) == {"nightly", "backfill", "alert"}
    nightly = found["nightly"]
    assert nightly["entrypoint"] == "flows.nightly.score"
    assert nightly["parameters"]["job"] == str(features_job)
    (schedule,) = nightly["schedules"]
    assert schedule["schedule"]["cron"] == "30 0 * * *"
    assert schedule["schedule"]["timezone"] == "Europe/Zurich"
    assert set(nightly["parameter_openapi_schema"]["properties"]) >= {"job", "date"}
    assert not found["backfill"]["schedules"]
    names = [automation["name"] for automation in server.post("/automations/filter", {})]
    assert sorted(names) == [
        f"score/nightly: {name}" for name in ("late", "missing", "silent", "skipped")
    ]

    command = ("prefect", "deployment", "run", "score/nightly", "--param", f"date={DATE}")
    first = server.run(*command, "--watch")
    assert first.returncode == 0, first.stdout + (server.home / "worker.log").read_text()[-4000:]

    verified = server.run("score", "verify", str(features_job), "--date", DATE, "--json")
    assert verified.returncode == 0, verified.stderr
    rows = json.loads(verified.stdout)["rows"]
    artifacts = {one["key"]: one for one in server.post("/artifacts/latest/filter", {})}
    assert f"{rows:,}" in artifacts[f"nightscore-users-{DATE}"]["data"]
    assert artifacts[f"nightscore-users-{DATE}-progress"]["data"] == 100

    assert f'nightscore_night_rows{{job_name="users"}} {float(rows)!r}' in figures.read_text()
    seen = server.run("score", "status", str(features_job), "--date", DATE, "--json")
    assert [date["rows"] for date in json.loads(seen.stdout)["published"]] == [rows]

    (run,) = server.runs("nightly")
    assert (run["state_type"], run["name"]) == ("COMPLETED", f"users {DATE}")
    asked = {"task_runs": {"name": {"like_": f"users {DATE}"}}}
    tasks = server.wait_for("its tasks", lambda: server.post("/task_runs/filter", asked))
    assert all("group" in task["name"] and "shard" in task["name"] for task in tasks)


@pytest.fixture
def box() -> Iterator[Mailbox]:
    """Of a mail server that takes everything."""
    with smtp_server() as mailbox:
        yield mailbox


def with_mail(job: Path, box: Mailbox) -> dict[str, Any]:
    mail = {"to": ["me@example.com"], "from": "score@example.com", "host": HOST, "port": box.port}
    return {**read_job(job), "mail": {**mail, "security": "none"}}


def test_an_overlapping_night_is_cancelled_and_a_killed_one_is_told_by_the_worker(
    server: Server, features_job: Path, box: Mailbox
) -> None:
    job = write_job(features_job, with_mail(features_job, box))
    deployed(server, job, "--prefix", "users-")
    first = server.begin_run("score/users-nightly", date=DATE)
    # It stands still, or it may have ended when the second one begins.
    for process in server.wait_for("a process", lambda: flow_processes(server)):
        os.kill(process, signal.SIGSTOP)
    second = server.begin_run("score/users-nightly", date=DATE)
    server.wait_for("the second", lambda: server.state_of(second) == "CANCELLED")
    assert server.state_of(first) in ("PENDING", "RUNNING")

    for process in flow_processes(server):
        os.kill(process, signal.SIGKILL)
    server.wait_for("the first", lambda: server.state_of(first) == "CRASHED")
    said = f"users {DATE} crashed: Process exited with status code: -9"
    server.wait_for("its hook", lambda: said in (server.home / "worker.log").read_text())

    def alert() -> Any:
        return [run for run in server.runs("users-alert") if run["state_type"] == "COMPLETED"]

    (told,) = server.wait_for("the alarm of the skipped night", alert)
    assert told["name"] == "users: a night was skipped"
    assert "score/backfill" in told["parameters"]["text"]
    server.wait_for("both mails", lambda: len(box.messages) > 1)
    assert sorted(str(message["Subject"]) for message in box.messages) == [
        f"[nightscore] users: {DATE} crashed",
        f"[nightscore] users: a night was skipped: {DATE}",
    ]


def test_a_night_that_cannot_begin_as_it_is_asked_for_is_mailed(
    server: Server, features_job: Path, box: Mailbox
) -> None:
    job = write_job(features_job, with_mail(features_job, box))
    deployed(server, job, "--prefix", "wrong-")
    server.begin_run("score/wrong-nightly", timezone="Mars/X")
    server.wait_for("the mail about a time zone", lambda: box.messages)
    server.begin_run("score/wrong-nightly", date="2026-02-30")
    server.wait_for("the mail about a date", lambda: len(box.messages) > 1)
    write_job(features_job, {**with_mail(features_job, box), "limits": {"min_row": 1}})
    server.begin_run("score/wrong-nightly", date=DATE)
    server.wait_for("the mail about the job file", lambda: len(box.messages) > 2)
    assert box.subjects == [
        "[nightscore] users: Mars/X failed",
        "[nightscore] users: 2026-02-30 failed",
        f"[nightscore] users: {DATE} failed",
    ]
    assert not any("retry" in message.as_string() for message in box.messages)


def test_a_night_that_nobody_begins_is_told_and_so_is_one_that_is_missing(
    server: Server, features_job: Path
) -> None:
    """The alarms of `score deploy`, with ten seconds for all of their times; no worker is there."""
    deployed(server, features_job, "--prefix", "idle-", "--pool", "idle")
    for alarm in ("late", "missing"):
        shorten(server, f"score/idle-nightly: {alarm}")
    server.begin_run("score/idle-nightly", date=DATE)

    def subjects() -> Any:
        told = {run["parameters"]["subject"] for run in server.runs("idle-alert")}
        return told if len(told) > 1 else None

    assert server.wait_for("both alarms", subjects) == {
        "the night has not begun",
        "no night was published for 30 hours",
    }


def test_silent_nights_are_told_by_their_dates_and_one_that_has_ended_is_not(
    server: Server, features_job: Path, box: Mailbox
) -> None:
    """Each has a sign of life and none after it; that of the last one came after its end."""
    made = server.run("python", "-c", BLOCK)
    assert made.returncode == 0, made.stderr
    job = write_job(features_job, with_mail(features_job, box))
    deployed(server, job, "--prefix", "still-", "--notify", "custom-webhook/ops")
    shorten(server, "score/still-nightly: silent")
    nights = [begin_by_hand(server, "score/still-nightly", f"2026-11-0{day}") for day in (1, 2, 3)]
    set_state(server, nights[-1], "COMPLETED")
    server.post("/events", [sign_of_life(night, "still-nightly") for night in nights])

    def alerts() -> Any:
        told = server.runs("still-alert")
        ended = [run for run in told if run["state_type"] == "COMPLETED"]
        return len(ended) == len(nights)

    server.wait_for("the alarms", alerts)
    server.wait_for("both mails", lambda: len(box.messages) > 1)
    assert sorted(str(message["Subject"]) for message in box.messages) == [
        f"[nightscore] users: a night has gone silent: 2026-11-0{day}" for day in (1, 2)
    ]
    assert [server.state_of(night) for night in nights] == ["CRASHED", "CRASHED", "COMPLETED"]
    marked = "score/still-nightly: silent, marked"
    server.wait_for("the blocks", lambda: num_firings(server, marked) == 2)


BLOCK = """
from prefect.blocks.notifications import CustomWebhookNotificationBlock
CustomWebhookNotificationBlock(name="ops", url="http://127.0.0.1:1/").save("ops")
"""
"""Nobody listens there: that the server wants to send it is enough."""


def begin_by_hand(server: Server, deployment: str, date: str) -> str:
    """A run that the server takes for a running one, without a process."""
    night = server.begin_run(deployment, at="2099-01-01T00:00:00Z", date=date)
    set_state(server, night, "RUNNING")
    return night


def set_state(server: Server, run: str, state: str) -> None:
    server.post(f"/flow_runs/{run}/set_state", {"state": {"type": state}, "force": True})


def sign_of_life(run: str, tag: str) -> dict[str, Any]:
    """The event, as the process of a run sends it."""
    return {
        "id": str(uuid.uuid4()),
        "occurred": datetime.datetime.now(datetime.UTC).isoformat(),
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
        "related": [{"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"}],
    }


def num_firings(server: Server, automation: str) -> int:
    """How often it has gone off."""
    wanted = {"filter": {"event": {"name": ["prefect.automation.triggered"]}}}
    found = server.post("/events/filter", wanted)["events"]
    names = [event["resource"]["prefect.resource.name"] for event in found]
    return names.count(automation)


def shorten(server: Server, name: str) -> None:
    """Give an automation ten seconds, the least that the server takes."""
    (found,) = [one for one in server.post("/automations/filter", {}) if one["name"] == name]
    found["trigger"]["within"] = 10
    body = {key: found[key] for key in ("name", "description", "trigger", "actions")}
    ask(f"{server.url}/automations/{found['id']}", body, method="PUT")


def flow_processes(server: Server) -> list[int]:
    """Processes of flow runs that the worker has started."""
    worker = server.processes[-1].pid
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                command = (folder / "cmdline").read_text()
            except OSError:
                continue
            if int(fields[1]) == worker and "prefect.engine" in command and fields[0] != "Z":
                found.append(int(folder.name))
    return found


@pytest.fixture
def postgres() -> Iterator[str]:
    """A PostgreSQL server of the test's own; its address, without a scheme."""
    if not (INITDB and POSTGRES and PSQL):
        pytest.skip("PostgreSQL is not installed")
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    user = "nobody" if os.geteuid() == 0 else None  # it refuses to run as root
    if user:
        shutil.chown(folder, user)
    data = str(folder / "data")
    subprocess.run(
        [INITDB, "-D", data, "-U", "prefect", "-A", "trust", "--no-sync"],
        user=user,
        cwd=folder,
        check=True,
        capture_output=True,
    )
    port = free_port()
    quick = ("-c", "fsync=off", "-c", f"unix_socket_directories={folder}")
    running = subprocess.Popen(
        [POSTGRES, "-D", data, "-h", "127.0.0.1", "-p", str(port), *quick],
        user=user,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"prefect@127.0.0.1:{port}/postgres"
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(20)
        shutil.rmtree(folder)


def test_one_setting_puts_the_server_on_postgresql(
    postgres: str, tmp_path: Path, features_job: Path
) -> None:
    where = f"postgresql+asyncpg://{postgres}"
    server = Server(tmp_path, PREFECT_SERVER_DATABASE_CONNECTION_URL=where)
    try:
        deployed(server, features_job)
    finally:
        server.stop()
    assert PSQL
    query = "select string_agg(name, ' ' order by name) from deployment"
    found = subprocess.run(
        [PSQL, f"postgresql://{postgres}", "-Atc", query],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["alert", "backfill", "nightly"]
    assert not list(tmp_path.rglob("*.db"))
