"""Secrets stay where they are, foreign text stays text, and nothing that is read is run."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_project import MODULES, dotted

from pipeline.errors import ConfigError, StorageError
from pipeline.job_file import load_job
from pipeline.storage import open_storage

DATE = "2026-11-20"
CANARY = "canary-4f9d0c/2b7a+e1"
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PREFECT_API_KEY", "SMTP_PASSWORD")
PICKLERS = {"pickle", "marshal", "shelve", "joblib", "cloudpickle", "dill", "_pickle"}
RUNNERS = {"eval", "exec", "os.system", "os.popen", "os.execv", "pty.spawn", "yaml.load"}
HOSTILE = """x"><script>alert(1)</script><a href='javascript:alert(2)'>[bold red]\x1b[2J\x9b31m"""
"""The beginning of a file's name: all of it is allowed there."""


def called(call: ast.Call) -> str:
    """The dotted name of what is called; empty when it has none."""
    names, node = [], call.func
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ""


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def unsafe(tree: ast.AST) -> list[str]:
    """Ways to run what a file or a message says."""
    found = [name for name in imports(tree) if name in PICKLERS]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = called(call)
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in RUNNERS or given.get("shell", "False") != "False":
            found.append(ast.unparse(call))
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(ast.unparse(call))
        if given.get("allow_pickle", "False") != "False":
            found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_no_module_unpickles_evaluates_or_asks_a_shell(path: Path) -> None:
    """Pipes to our own children use multiprocessing, and so pickles of our own making: exempt."""
    assert unsafe(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib.numpy_pickle import load",
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_what_would_be_unsafe_is_found(code: str) -> None:
    assert unsafe(ast.parse(code))


@pytest.mark.parametrize(
    "code", ["model.eval()", "yaml.safe_load(text)", "torch.load(p, weights_only=True)"]
)
def test_what_is_safe_is_left_alone(code: str) -> None:
    assert unsafe(ast.parse(code)) == []


@pytest.fixture
def canary(monkeypatch: pytest.MonkeyPatch) -> str:
    """A secret in the environment that nobody may ever write down."""
    for name in SECRETS:
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    return CANARY


def check_silent(ended: Any, folder: Path) -> None:
    """The secret is neither said nor in any file."""
    assert CANARY not in ended.out
    assert CANARY not in ended.err
    holding = [path for path in folder.rglob("*") if path.is_file() and holds(path, CANARY)]
    assert holding == []


def holds(path: Path, text: str) -> bool:
    return text.encode() in path.read_bytes()


@pytest.mark.timeout(300)
def test_a_night_writes_no_secret_of_its_environment_down(
    score: Callable[..., Any], features_job: Path, tmp_path: Path, canary: str
) -> None:
    ended = score("run", features_job, "--date", DATE, "--json")
    assert ended.code == 0, ended.err
    assert holds(Path(ended.json["manifest"]), "run_id")
    check_silent(ended, tmp_path)
    for command in ("report", "status", "plan"):
        date = () if command == "status" else ("--date", DATE)
        check_silent(score(command, features_job, *date), tmp_path)
    assert canary


@pytest.mark.parametrize(
    "change",
    [
        f"output.uri=s3://someone:{CANARY}@bucket/scores",
        f"input.uri=https://someone:{CANARY}@host/in",
        f"input.uri=https://host/in?X-Amz-Signature={CANARY}",
        f"output.aws_secret_access_key={CANARY}",
        f"password={CANARY}",
        f"model.token={CANARY}",
        f"description=https://someone:{CANARY}@host",
        f"name.password={CANARY}",
        f"password:{CANARY}",
    ],
)
def test_a_job_with_a_secret_is_refused_without_saying_it(features_job: Path, change: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(str(features_job), [change])
    said = repr(caught.value)
    assert not set(CANARY.split("/")) & set(re.split(r"[\s/@:='&]", said)), said
    assert CANARY not in said


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "change",
    [
        f"output.uri=s3://someone:{CANARY}@bucket/scores",
        f"cost.market={CANARY}",  # a value that is shown, because it is wrong
    ],
)
def test_a_wrong_job_does_not_make_the_command_talk(
    score: Callable[..., Any], features_job: Path, tmp_path: Path, canary: str, change: str
) -> None:
    ended = score("run", features_job, "--date", DATE, "--json", "--set", change)
    assert ended.code == 2
    assert "\n" not in ended.json["error"]
    check_silent(ended, tmp_path)
    assert canary


def test_a_secret_in_a_job_file_is_named_by_its_line(features_job: Path) -> None:
    job = json.loads(features_job.read_text())
    job["output"]["uri"] = "s3://AKIA:hunter2@bucket/scores"
    features_job.write_text(json.dumps(job, indent=1))
    line = 1 + next(
        number
        for number, text in enumerate(features_job.read_text().splitlines())
        if "hunter2" in text
    )
    with pytest.raises(ConfigError) as caught:
        load_job(str(features_job))
    assert f"line {line}: output.uri: a secret in the job; expected none." in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_store_that_cannot_be_reached_is_named_without_its_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Errors of botocore quote the endpoint as it is."""
    from botocore.exceptions import EndpointConnectionError

    endpoint = "http://someone:hunter2@127.0.0.1:1"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("NIGHTSCORE_STORE_DEADLINE_S", "0.2")
    storage = open_storage("s3://bucket/scores")

    async def refuse(*_: object, **__: object) -> None:
        raise EndpointConnectionError(endpoint_url=f"{endpoint}/bucket?list-type=2")

    monkeypatch.setattr("s3fs.core.S3FileSystem._call_s3", refuse)
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:1/bucket") as caught:
        storage.list_files("users")
    assert "hunter2" not in repr(caught.value)


class Page(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()
        self.links: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen |= {(tag, ""), *((tag, name) for name, _ in attrs)}
        self.links |= {value or "" for name, value in attrs if name in ("href", "src")}


@pytest.fixture
def hostile_job(features_folder: Path, features_job: Path, tmp_path: Path) -> Path:
    """The features job on files with hostile names, some rows of which are bad."""
    folder = tmp_path / "users" / f"dt={DATE}"
    folder.mkdir(parents=True)
    sources = sorted((features_folder / "users" / f"dt={DATE}").glob("*.parquet"))
    for number, source in enumerate(sources):
        shutil.copy(source, folder / f"{HOSTILE.replace('/', '|')}-{number}.parquet")
    job = json.loads(features_job.read_text())
    job["input"]["uri"] = str(tmp_path / "users")
    job["description"] = HOSTILE
    job["cost"]["usd_per_hour"] = 1.0
    job["cost"]["instance"] = HOSTILE
    path = tmp_path / "hostile.yaml"
    path.write_text(json.dumps(job))
    return path


@pytest.mark.timeout(300)
def test_hostile_names_reach_pages_and_terminals_as_text_only(
    score: Callable[..., Any],
    features_job: Path,
    hostile_job: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    plain = Page(published(score, features_job, tmp_path / "plain"))
    attacked = Page(published(score, hostile_job, tmp_path / "attacked"))
    assert attacked.seen <= plain.seen
    assert not any(link.startswith("javascript") for link in attacked.links)
    shown = score(
        "report", hostile_job, "--date", DATE, "--set", f"output.uri={tmp_path / 'attacked'}"
    )
    assert shown.code == 0, shown.err
    assert "alert(1)" in shown.out
    assert "[bold red]" in shown.out
    check_printable(shown.out)


def published(score: Callable[..., Any], job: Path, output: Path) -> Path:
    ended = score("run", job, "--date", DATE, "--json", "--set", f"output.uri={output}")
    assert ended.code == 0, ended.err
    assert ended.json["quarantined"] == 8
    assert len(ended.json["quarantine_samples"]) > 0
    check_printable(ended.out)
    check_printable(ended.err)
    return Path(ended.json["output"]) / "_report.html"


def check_printable(text: str) -> None:
    """A terminal prints it, and does nothing else."""
    assert all(line.isprintable() for line in text.split("\n"))


@pytest.mark.timeout(300)
def test_an_error_about_a_hostile_name_is_one_harmless_line(
    score: Callable[..., Any], hostile_job: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for path in (tmp_path / "users" / f"dt={DATE}").iterdir():
        path.write_bytes(rng.bytes(1_000))
    ended = score("plan", hostile_job, "--date", DATE)
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert "alert(1)" in line
    assert "[bold red]" in line
    check_printable(line)
    as_json = score("plan", hostile_job, "--date", DATE, "--json")
    check_printable(as_json.out)


@pytest.mark.parametrize("partition", ["../../etc/dt={date}", "/etc/{date}", "dt={date}/.."])
def test_a_partition_leads_nowhere_but_into_the_input(features_job: Path, partition: str) -> None:
    with pytest.raises(ConfigError, match="leaves `uri`; expected a sub-folder"):
        load_job(str(features_job), [f"input.partition={partition}"])


@pytest.mark.timeout(300)
def test_an_altered_record_leads_out_of_no_store(
    score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    """Scored but not published; then somebody points a commit record elsewhere."""
    strict = ("--set", "limits.max_quarantined=0")
    assert score("run", features_job, "--date", DATE, *strict).code == 3
    outside = tmp_path / "outside.parquet"
    pq.write_table(pq.read_table(next(tmp_path.rglob("parts/part-*"))), outside)
    record = sorted(tmp_path.rglob("commits/*.json"))[0]
    content = json.loads(record.read_text())
    del content["check"]
    content["part"]["name"] = "../../../../../outside.parquet"
    content["check"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    record.unlink()
    record.write_text(json.dumps(content))
    ended = score("run", features_job, "--date", DATE, "--json")
    assert ended.code == 1
    assert "leads out of it" in ended.json["error"]
    assert not (tmp_path / "scores" / "users" / f"dt={DATE}").exists()
