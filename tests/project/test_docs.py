"""The pages in docs/ name what there is: links, commands, keys, exit codes, guards, alarms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml

from flows.alarms import alarms
from flows.commands.app import app
from flows.config_reference import sections
from pipeline.config import AlertsSection
from pipeline.errors import GUARDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
RUNBOOK = (DOCS / "runbook.md").read_text()
FIRST_JOB = (DOCS / "first-job.md").read_text()
WITH_README = [*PAGES, ROOT / "README.md"]
KEYS = {f"{s.path}.{key.name}".removeprefix(".") for s in sections() for key in s.keys}
MAX_COLUMNS = 100


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles}


def code_blocks(text: str, kind: str = "") -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def rows_of(text: str, heading: str) -> set[str]:
    """First cells, in backticks, of the table below a heading."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


@pytest.mark.parametrize("page", WITH_README, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        found = (page.parent / path) if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_fits_the_screen(page: Path) -> None:
    lines = [line for line in page.read_text().splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []


def commands_in(text: str) -> Iterator[list[str]]:
    """Of each `score ...` in code its words, comments left out."""
    for code in [*code_blocks(text), *re.findall(r"`([^`\n]+)`", text)]:
        for line in code.splitlines():
            words = line.partition(" #")[0].split()
            if words[:1] == ["score"] and len(words) > 1:
                yield words[1:]


@pytest.mark.parametrize("page", WITH_README, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    root = typer.main.get_command(app)
    for words in commands_in(page.read_text()):
        command = root
        while hasattr(command, "commands"):
            assert words[0] in command.commands, f"score {words}"
            command, words = command.commands[words[0]], words[1:]
        known = {option for param in command.params for option in param.opts}
        for word in words:
            if word.startswith("--"):
                assert word in known, f"{command.name} {word}"


@pytest.mark.parametrize("page", WITH_README, ids=lambda page: page.name)
def test_keys_of_the_job_exist(page: Path) -> None:
    tops = {key.partition(".")[0] for key in KEYS}
    for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:: [^`]*)?`", page.read_text()):
        if name.partition(".")[0] in tops:
            assert name in KEYS, name


def test_the_runbook_has_every_exit_code() -> None:
    from flows import cli

    assert cli.__doc__ is not None
    codes = re.findall(r"[:;]\s+(\d+)\s", cli.__doc__)
    assert {"1", "2", "3", "75"} <= {*codes}
    for code in ("0", *codes):
        assert re.search(rf"^\| {code} \|", RUNBOOK, re.MULTILINE), code


def test_the_runbook_has_every_guard() -> None:
    assert set(GUARDS) <= rows_of(RUNBOOK, "Guards")


def test_the_runbook_has_every_alert() -> None:
    source = (ROOT / "pipeline" / "alerts.py").read_text()
    names = set(re.findall(r'Alert\(\s*name="(\w+)"', source))
    assert len(names) == len(AlertsSection.model_fields), "each limit has its alert"
    assert rows_of(RUNBOOK, "Alerts") == names


def test_the_runbook_has_every_reason_for_quarantine() -> None:
    said = rows_of(RUNBOOK, "Rows in quarantine")
    sources = [*ROOT.glob("pipeline/screen*.py"), *ROOT.glob("pipeline/decode*.py")]
    code = "\n".join(path.read_text() for path in [*sources, ROOT / "pipeline" / "row_groups.py"])
    patterns = (
        r'Refusal\("(\w+)"',
        r'refuse\(\w+, "\w+", "(\w+)"',
        r'reason="(\w+)"',
        r'"(feature_\w+)"',
        r'"(row_group_\w+)"',
    )
    found = {name for pattern in patterns for name in re.findall(pattern, code)}
    assert {"empty", "decode_failed", "feature_missing", "row_group_unreadable"} <= found
    assert found - said == set()


def test_the_runbook_has_every_alarm() -> None:
    kinds = {alarm["name"].rpartition(": ")[2] for alarm in alarms("nightly", 86_400.0)}
    assert rows_of(RUNBOOK, "Alarms of the Prefect server") == kinds


def test_the_runbook_has_every_alert_of_prometheus() -> None:
    (group,) = yaml.safe_load((ROOT / "infra/prometheus/nightscore.yaml").read_text())["groups"]
    assert rows_of(RUNBOOK, "Alerts of Prometheus") == {rule["alert"] for rule in group["rules"]}


def test_a_first_job_takes_ten_commands_or_fewer() -> None:
    section = FIRST_JOB.split("\n## Ten commands\n")[1].split("\n## ")[0]
    whole_lines = "".join(code_blocks(section)).replace("\\\n", "")
    commands = whole_lines.splitlines()
    assert len(commands) == 10


def test_what_to_add_next_is_a_job(tmp_path: Path) -> None:
    from pipeline.job_file import load_job

    (added,) = code_blocks(FIRST_JOB, "yaml")
    job = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text()) | yaml.safe_load(added)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    loaded = load_job(str(tmp_path / "job.yaml"))
    assert loaded.output.delta is True
    assert loaded.mail is not None
