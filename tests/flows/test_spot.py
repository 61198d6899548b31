"""Spot notices, from local servers that answer as the clouds' metadata services do."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flows.spot import Metadata, watch

TOKEN = "t0k3n"
PERIOD_S = 0.02


class Cloud:
    """What a metadata service is asked, and what it answers."""

    def __init__(self) -> None:
        self.kind = "aws"
        self.looks_before_notice = 3
        self.num_looks = 0
        self.is_down = False
        self.delays_s: list[float] = []
        """Of the next answers."""

    def answer(self, request: BaseHTTPRequestHandler) -> tuple[int, str]:
        if self.delays_s:
            time.sleep(self.delays_s.pop(0))
        if self.is_down:
            return 503, "down"
        if self.kind == "aws":
            return self._aws(request)
        if self.kind == "gcp":
            return self._gcp(request)
        return 200, "<html>a router's own page</html>"

    def _aws(self, request: BaseHTTPRequestHandler) -> tuple[int, str]:
        if request.path == "/latest/api/token":
            ttl = int(request.headers["X-aws-ec2-metadata-token-ttl-seconds"])
            return (200, TOKEN) if request.command == "PUT" and ttl > 0 else (405, "")
        if request.headers.get("X-aws-ec2-metadata-token") != TOKEN:
            return 401, ""
        if request.path != "/latest/meta-data/spot/instance-action":
            return 404, ""
        self.num_looks += 1
        if self.num_looks <= self.looks_before_notice:
            return 404, ""
        return 200, json.dumps({"action": "terminate", "time": "2026-11-21T02:00:00Z"})

    def _gcp(self, request: BaseHTTPRequestHandler) -> tuple[int, str]:
        if request.path != "/computeMetadata/v1/instance/preempted":
            return 404, ""
        if request.headers.get("Metadata-Flavor") != "Google":
            return 403, ""
        self.num_looks += 1
        return 200, "TRUE" if self.num_looks > self.looks_before_notice else "FALSE"


@pytest.fixture
def cloud() -> Iterator[tuple[Cloud, str]]:
    ours = Cloud()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, text = ours.answer(self)
            with suppress(ConnectionError):  # who asked did not wait
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

        do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield ours, f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def seen(where: Metadata, stopped: threading.Event | None = None) -> list[str]:
    told: list[str] = []
    watch(where, told.append, stopped or threading.Event(), PERIOD_S)
    return told


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("aws", "spot notice of AWS: terminate at 2026-11-21T02:00:00Z"),
        ("gcp", "spot notice of Google Cloud: preempted"),
    ],
)
def test_a_notice_is_seen_once_it_comes(cloud: tuple[Cloud, str], kind: str, expected: str) -> None:
    ours, address = cloud
    ours.kind = kind
    assert seen(Metadata(aws=f"http://{address}", gcp=f"http://{address}")) == [expected]
    assert ours.num_looks == ours.looks_before_notice + 1


def test_a_first_answer_that_is_late_does_not_switch_the_watch_off(
    cloud: tuple[Cloud, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.spot.TIMEOUT_S", 0.3)
    ours, address = cloud
    ours.delays_s = [1.0, 1.0]
    assert len(seen(Metadata(aws=f"http://{address}", gcp="http://127.0.0.1:9"))) == 1


def test_a_service_that_is_down_for_a_while_is_asked_again(cloud: tuple[Cloud, str]) -> None:
    ours, address = cloud
    told: list[str] = []
    where = Metadata(aws=f"http://{address}", gcp="http://127.0.0.1:9")
    thread = threading.Thread(target=watch, args=(where, told.append, threading.Event(), PERIOD_S))
    ours.looks_before_notice = 10**6
    thread.start()
    while ours.num_looks < 2:
        time.sleep(0.01)
    ours.is_down = True
    time.sleep(5 * PERIOD_S)
    ours.looks_before_notice, ours.is_down = 0, False
    thread.join(10)
    assert len(told) == 1


@pytest.mark.parametrize("kind", ["router", "nobody"])
def test_elsewhere_nobody_is_asked_again(cloud: tuple[Cloud, str], kind: str) -> None:
    ours, address = cloud
    ours.kind = kind
    where = f"http://{address}" if kind == "router" else "http://127.0.0.1:9"
    started = time.monotonic()
    assert seen(Metadata(aws=where, gcp=where)) == []
    assert time.monotonic() - started < 5


def test_the_watch_ends_when_the_night_does(cloud: tuple[Cloud, str]) -> None:
    ours, address = cloud
    ours.looks_before_notice = 10**6
    stopped = threading.Event()
    threading.Timer(0.2, stopped.set).start()
    assert seen(Metadata(aws=f"http://{address}", gcp=""), stopped) == []


def test_the_clouds_own_variables_name_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "GCE_METADATA_HOST"):
        monkeypatch.delenv(name, raising=False)
    assert Metadata.from_environment().aws == "http://169.254.169.254"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://[fd00:ec2::254]/")
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    found = Metadata.from_environment()
    assert (found.aws, found.gcp) == ("http://[fd00:ec2::254]", "http://127.0.0.1:1")


def test_who_switches_the_service_off_is_not_asked(
    cloud: tuple[Cloud, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, address = cloud
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert seen(Metadata(aws=f"http://{address}", gcp="http://127.0.0.1:9")) == []
    assert ours.num_looks == 0


@pytest.mark.parametrize("market", ["spot", "on_demand"])
def test_only_jobs_on_spot_machines_look(
    cloud: tuple[Cloud, str],
    features_job: Path,
    monkeypatch: pytest.MonkeyPatch,
    market: str,
) -> None:
    ours, address = cloud
    ours.looks_before_notice = 0
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{address}")
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    # A process of its own: no test sends signals to the one that runs all others.
    code = (
        "import signal, sys, time\n"
        "from flows.spot import notices\n"
        "from pipeline.job_file import load_job\n"
        "received = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: received.append('SIGTERM'))\n"
        "job = load_job(sys.argv[1], ['cost.market=' + sys.argv[2]])\n"
        "deadline = time.monotonic() + (30 if sys.argv[2] == 'spot' else 1)\n"
        "with notices(job, print):\n"
        "    while not received and time.monotonic() < deadline:\n"
        "        time.sleep(0.01)\n"
        "print(*received)\n"
    )
    command = [sys.executable, "-c", code, str(features_job), market]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    if market == "spot":
        assert said[0].startswith("spot notice of AWS: terminate at")
        assert said[1:] == ["SIGTERM"]
    else:
        assert said == [""]
        assert ours.num_looks == 0


@pytest.mark.scenario
@pytest.mark.timeout(300)
def test_a_night_that_gets_a_notice_ends_in_good_order_and_resumes(
    cloud: tuple[Cloud, str],
    start_score: Callable[..., Any],
    score: Callable[..., Any],
    features_job: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, address = cloud
    ours.looks_before_notice = 0
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{address}")
    command = ("run", str(features_job), "--date", "2026-11-20", "--json")
    command = (*command, "--set", f"output.uri={tmp_path}", "--set", "lanes.shard_rows=100")
    score("engine", "build", str(features_job), "--date", "2026-11-20")
    ended = start_score(*command, "--set", "cost.market=spot").end(60)
    assert ended.code == 75, ended.err
    assert "spot notice of AWS: terminate" in ended.err
    resumed = score(*command)
    assert (resumed.code, resumed.json["status"]) == (0, "published")
