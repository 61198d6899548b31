"""Wrong use of the `score` command: one line that says what to do, and the right exit code."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows import cli
from tests.conftest import SCORE

pytestmark = pytest.mark.timeout(300)
DATE = "2026-11-20"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job whose input is good; its model is never reached in these tests."""
    write_input(tmp_path / "in", pa.table({"user_id": [1, 2], "f0": [1.0, 2.0]}))
    (tmp_path / "model.onnx").write_bytes(b"no model")
    path = tmp_path / "job.yaml"
    path.write_text(
        f"""\
name: users
input:
  uri: {tmp_path / "in"}
  passthrough: [user_id]
  features: {{columns: ["f*"]}}
model: {{source: {tmp_path / "model.onnx"}, head: scores}}
engine: {{store: {tmp_path / "engines"}}}
output: {{uri: {tmp_path / "out"}}}
cost: {{instance: c6i.large}}
"""
    )
    return path


def write_input(root: Path, table: pa.Table) -> None:
    folder = root / f"dt={DATE}"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "part-0.parquet")


def check_refused(
    start_score: Callable[..., Any], arguments: tuple[object, ...], code: int, said: str
) -> None:
    """Said once on standard error; the object too, when it is asked for."""
    plain, as_json = start_score(*arguments), start_score(*arguments, "--json")
    ended = plain.end(90)
    assert ended.code == code, ended.err
    assert ended.out == ""
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    ended = as_json.end(90)
    assert ended.code == code
    assert set(ended.json) == {"status", "exit_code", "error"}
    assert (ended.json["status"], ended.json["exit_code"]) == ("failed", code)
    assert said in ended.json["error"]
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["input.passthrough=[userid]"], 2, "no column `userid`; expected it because of"),
        (["input.features={columns: [g*]}"], 2, "no column `g*`"),
        (["output.url=x"], 2, "output.url: unknown key. Did you mean `uri`?"),
        (["output.uri"], 2, "--set output.uri: no `=`; expected dotted.key=value."),
        (["limits.max_quarantined=2"], 2, "limits.max_quarantined: 2;"),
        (["output.uri=/dev/null/x"], 2, "cannot be written (Not a directory)"),
        (["output.uri={job}"], 2, "cannot be written"),
        (["output.uri=ftp://x/y"], 2, "unknown kind of storage"),
        (["input.uri=/nowhere"], 1, f"/nowhere/dt={DATE}: no *.parquet files for {DATE}"),
        (["cost.instance=c9.huge"], 2, "c9.huge"),
        (["model.class_names=/nowhere/names"], 2, "model.class_names: /nowhere/names: No such"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_written(
    start_score: Callable[..., Any],
    job: Path,
    tmp_path: Path,
    overrides: list[str],
    code: int,
    said: str,
) -> None:
    options = [part for text in overrides for part in ("--set", text.replace("{job}", str(job)))]
    check_refused(start_score, ("run", job, "--date", DATE, *options), code, said)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize(
    ("date", "code", "said"),
    [
        ("2026-11-31", 2, "date: '2026-11-31'; expected an ISO date such as 2026-11-20."),
        ("yesterday", 2, "date: 'yesterday'; expected an ISO date such as 2026-11-20."),
        ("2026-11-21", 1, "no *.parquet files for 2026-11-21; expected the rows of that date"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_wrong_date_is_refused(
    start_score: Callable[..., Any],
    job: Path,
    tmp_path: Path,
    command: str,
    date: str,
    code: int,
    said: str,
) -> None:
    check_refused(start_score, (command, job, "--date", date), code, said)
    assert not (tmp_path / "out").exists()


def test_a_missing_job_file_is_said_to_be_missing(
    start_score: Callable[..., Any], tmp_path: Path
) -> None:
    said = "none.yaml: No such file or directory; expected a job file."
    check_refused(start_score, ("run", tmp_path / "none.yaml", "--date", DATE), 2, said)


def test_an_unknown_key_in_the_file_is_named_with_its_line(
    start_score: Callable[..., Any], job: Path
) -> None:
    job.write_text(job.read_text() + "limit: {max_quarantined: 0.1}\n")
    said = "job.yaml, line 10: limit: unknown key. Did you mean `limits`?"
    check_refused(start_score, ("run", job, "--date", DATE), 2, said)


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n" * 50, b"PAR1" + b"\0" * 60 + b"PAR1"])
def test_input_that_is_not_parquet_is_named(
    start_score: Callable[..., Any], job: Path, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "in" / f"dt={DATE}" / "part-0.parquet"
    file.write_bytes(content)  # the only file of the date
    check_refused(start_score, ("run", job, "--date", DATE), 1, f"{file}: ")
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_named(
    start_score: Callable[..., Any], job: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").unlink()
    check_refused(start_score, ("run", job, "--date", DATE), 2, str(tmp_path / "model.onnx"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["verify", "status"])
@pytest.mark.usefixtures("s3_folder")
def test_a_bucket_that_is_not_there_is_told_by_all_commands(
    score: Callable[..., Any], job: Path, command: str
) -> None:
    options = ("--date", DATE, "--set", "output.uri=s3://no-such-bucket/out")
    ended = score(command, job, *options)
    assert (ended.code, ended.out) == (2, "")
    assert "no-such-bucket" in ended.err
    assert "expected access to it. Check the address" in ended.err


@pytest.mark.parametrize("command", ["verify", "report"])
def test_what_is_not_published_cannot_be_looked_at(
    start_score: Callable[..., Any], job: Path, command: str
) -> None:
    check_refused(start_score, (command, job, "--date", DATE), 1, "not published; expected")


def test_a_job_without_runs_has_an_empty_status(score: Callable[..., Any], job: Path) -> None:
    ended = score("status", job, "--json")
    assert ended.code == 0, ended.err
    assert ended.json == {"job": "users", "published": [], "replaced": [], "unfinished": []}


def test_a_missing_option_is_wrong_use(score: Callable[..., Any], job: Path) -> None:
    ended = score("run", job)
    assert ended.code == 2
    assert "--date" in ended.err
    assert "Traceback" not in ended.err


def test_help_names_every_command(score: Callable[..., Any]) -> None:
    ended = score("--help")
    assert ended.code == 0
    for command in ("run", "plan", "verify", "status", "report", "demo", "engine", "doctor"):
        assert command in ended.out


@pytest.mark.scenario
def test_an_object_store_that_is_not_there_is_said_to_be_so(
    start_score: Callable[..., Any], job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    ended = start_score(
        "run", job, "--date", DATE, "--json", "--set", "output.uri=s3://bucket/x"
    ).end(100)
    assert ended.code == 75, os.linesep + ended.err
    assert len(ended.err.splitlines()) == 1, ended.err
    assert "127.0.0.1:9" in json.loads(ended.out)["error"]


def test_a_missing_option_is_one_sentence_and_with_json_an_object(
    score: Callable[..., Any], features_job: Path
) -> None:
    ended = score("run", features_job, "--json")
    assert ended.code == 2
    assert "Missing option '--date'" in ended.json["error"]
    (line,) = ended.err.splitlines()
    assert line.startswith("error: Missing option '--date'")


def test_the_command_tells_its_version(score: Callable[..., Any]) -> None:
    ended = score("--version")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == f"nightscore {importlib.metadata.version('nightscore')}\n"


@pytest.mark.parametrize("arguments", [(), ("engine",)])
def test_without_arguments_there_is_the_help_and_no_error(
    score: Callable[..., Any], arguments: tuple[str, ...]
) -> None:
    ended = score(*arguments)
    assert ended.code == 2
    assert "Usage:" in ended.out + ended.err
    assert "error" not in ended.err


def test_a_command_that_is_stopped_before_it_began_says_so_in_json_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    def leave(code: int) -> None:
        assert code == 75

    monkeypatch.setattr(cli, "run_command", stopped)
    monkeypatch.setattr(cli.start_up, "leave", leave)
    monkeypatch.setattr("sys.argv", ["score", "status", "job.yaml", "--json"])
    cli.main()
    out, err = capsys.readouterr()
    assert json.loads(out) == {"status": "interrupted", "exit_code": 75, "error": cli.CTRL_C}
    assert err == f"interrupted: {cli.CTRL_C}\n"


@pytest.mark.parametrize("arguments", [("status",), ("status", "--json"), ("schema",)])
def test_a_full_disk_behind_standard_output_is_one_sentence(
    arguments: tuple[str, ...], job: Path
) -> None:
    command = [SCORE, *arguments, *([job] if "status" in arguments else [])]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100, check=False
        )
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: standard output: No space left on device;")


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 75), (errno.EIO, 75), (None, 1)])
def test_a_full_disk_is_resumable_wherever_it_is_noticed(number: int | None, code: int) -> None:
    """Such as under the cache of engines."""
    assert cli.exit_code_of(OSError(number, "what the system says")) == code
