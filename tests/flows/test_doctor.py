"""The doctor tries what is needed, and names the command that mends what is missing."""

from __future__ import annotations

import base64
import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows import doctor_checks
from flows.doctor import doctor_facts, render_doctor
from flows.doctor_checks import Check, job_checks, machine_checks
from pipeline import delta_columns
from pipeline.job_file import load_job

MAIL = "mail={{to: [me@example.com], from: it@example.com, host: {}}}"
LOGIN = f"Basic {base64.b64encode(b'me:secretpw').decode()}"


def named(checks: list[Check], name: str) -> Check:
    """The last one of a name: a job's own disk comes after the machine's."""
    return [check for check in checks if check.name == name][-1]


@pytest.fixture
def prefect_server() -> Iterator[str]:
    """Something that answers as a Prefect server does to who asks for its health."""

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            may = self.headers.get("Authorization") in (None, LOGIN)
            self.send_response(200 if may and self.path == "/api/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silence."""

    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()
        thread.join()


def test_a_prefect_server_that_answers_is_well(
    prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    assert named(machine_checks(), "Prefect server").ok


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:9/api", "nonsense"])
def test_a_prefect_server_that_does_not_answer_has_a_command_that_starts_it(
    url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    if url:
        monkeypatch.setenv("PREFECT_API_URL", url)
    check = named(machine_checks(), "Prefect server")
    assert not check.ok
    assert check.mend.startswith("prefect server start")


@pytest.mark.parametrize("answers", [True, False])
def test_a_login_in_the_servers_address_logs_in_and_is_not_shown(
    answers: bool, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = prefect_server if answers else "http://127.0.0.1:9/api"
    for name in ("PREFECT_API_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, address.replace("://", "://me:secretpw@"))
    facts = doctor_facts()
    assert "secretpw" not in json.dumps(facts)
    assert facts["prefect_api_url"] == address.replace("://", "://***@")
    (check,) = (each for each in facts["checks"] if each["name"] == "Prefect server")
    assert check["ok"] is answers


def test_a_missing_extra_has_a_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_columns, "is_installed", lambda: False)
    assert named(machine_checks(), "Delta Lake").mend == "pip install 'nightscore[delta]'"


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(machine_checks(), "disk").ok
    monkeypatch.setattr(doctor_checks, "MIN_FREE_BYTES", 1 << 60)
    assert "score gc" in named(machine_checks(), "disk").mend


def test_prices_are_old_when_a_night_would_alert_about_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor_checks, "price_age_days", lambda *_: 180)
    assert named(machine_checks(), "prices").ok
    monkeypatch.setattr(doctor_checks, "price_age_days", lambda *_: 181)
    assert "cost.usd_per_hour" in named(machine_checks(), "prices").mend


def test_a_job_that_can_run_is_well(features_job: Path) -> None:
    checks = job_checks(load_job(str(features_job)))
    assert [check.name for check in checks] == ["input", "output", "model", "price", "disk"]
    assert [check for check in checks if not check.ok] == []
    assert "the newest date is 2026-11-20" in named(checks, "input").found
    assert named(checks, "model").found.endswith("takes batch x 32")


def test_what_a_job_lacks_is_said_all_at_once(features_job: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong = {
        "input.uri": tmp_path / "nothing",
        "output.uri": tmp_path / "file/scores",
        "model.source": tmp_path / "none.onnx",
        "cost.instance": "c6i.lage",
    }
    job = load_job(str(features_job), [f"{key}={value}" for key, value in wrong.items()])
    found = {check.name: check for check in job_checks(job)}
    assert all(not found[name].ok for name in ("input", "output", "model", "price"))
    assert "Did you mean c6i.large" in found["price"].found
    assert all(found[name].mend for name in ("input", "output", "model", "price"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("disk", f"output.uri=/tmp/{'y' * 300}"), ("mail", MAIL.format("smtp..example.com"))],
)
def test_a_look_that_fails_in_its_own_way_is_one_line_of_all(
    name: str, value: str, features_job: Path
) -> None:
    checks = job_checks(load_job(str(features_job), [value]))
    assert not named(checks, name).ok
    assert named(checks, name).mend
    assert named(checks, "price").ok


@pytest.mark.parametrize("answers", [True, False])
def test_the_mail_server_is_tried(answers: bool, features_job: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:
            server.listen()
        port = server.getsockname()[1]
        mail = f"mail={{to: [me@example.com], from: it@example.com, host: 127.0.0.1, port: {port}}}"
        check = named(job_checks(load_job(str(features_job), [mail])), "mail")
    assert check.ok == answers, check.found
    assert bool(check.mend) != answers


def test_half_a_login_is_said(features_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSCORE_SMTP_USER", "me")
    monkeypatch.delenv("NIGHTSCORE_SMTP_PASSWORD", raising=False)
    check = named(job_checks(load_job(str(features_job), [MAIL.format("127.0.0.1")])), "mail")
    assert "NIGHTSCORE_SMTP_PASSWORD" in check.found


def test_everything_is_printed_on_a_narrow_terminal(
    features_job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = doctor_facts(load_job(str(features_job)))
    Console(width=80, color_system=None).print(render_doctor(facts))
    text = capsys.readouterr().out
    assert "honours" in text
    assert "score doctor JOB" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_command_takes_a_job(score: Callable[..., Any], features_job: Path) -> None:
    ended = score("doctor", features_job, "--json")
    assert ended.code == 0, ended.err
    assert {"input", "output", "Prefect server"} <= {each["name"] for each in ended.json["checks"]}
