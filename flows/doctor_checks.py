"""What `score doctor` tries: each check ends in one line, with the command that mends it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engines.errors import EngineError
from engines.masking import masked
from flows.prefect_server import problem_of
from flows.shipped import shipped_config
from pipeline import delta_columns
from pipeline.alerts import price_age_days
from pipeline.config import AlertsSection, Job, MailSection
from pipeline.cost import find_price, load_prices
from pipeline.errors import PipelineError, one_line
from pipeline.ledger import utc_now
from pipeline.storage import open_storage, probe

GIB = 1 << 30
MIN_FREE_BYTES = GIB
ANSWER_S = 3.0
SERVER_HINT = "prefect server start &  export PREFECT_API_URL=http://127.0.0.1:4200/api"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Something that was tried."""

    name: str
    ok: bool
    found: str
    mend: str = ""
    """A command, or what to do; empty when it is well."""


def machine_checks() -> list[Check]:
    """What any job may need."""
    return [
        _delta_extra(),
        _mail_extra(),
        _tried("Prefect server", _prefect_server, SERVER_HINT),
        _disk("."),
        _tried("prices", _price_list, "install nightscore again"),
    ]


def job_checks(job: Job) -> list[Check]:
    """What this job needs besides; the output is written to and cleaned up."""
    checks = [
        _well("input", job.input.uri, lambda: _list_input(job), "mend input.uri"),
        _well("output", job.output.uri, lambda: _write_output(job), "mend output.uri"),
        _well("model", job.model.source, lambda: _see_model(job), "mend model.source"),
        _price(job),
    ]
    if "://" not in job.output.uri:
        checks.append(_disk(job.output.uri))
    if job.mail is not None:
        checks.append(_mail(job.mail))
    return checks


def _delta_extra() -> Check:
    there = delta_columns.is_installed()
    return Check(
        name="Delta Lake",
        ok=there,
        found="installed" if there else "not installed (only for `output.delta`)",
        mend="" if there else delta_columns.INSTALL_HINT,
    )


def _mail_extra() -> Check:
    from importlib.util import find_spec

    there = find_spec("prefect_email") is not None
    return Check(
        name="Prefect's mail blocks",
        ok=there,
        found="installed" if there else "not installed (only for `mail.prefect_block`)",
        mend="" if there else "pip install 'nightscore[mail]'",
    )


def _prefect_server() -> Check:
    api = os.environ.get("PREFECT_API_URL")
    if not api:
        found = "PREFECT_API_URL is not set (only for `score deploy`)"
        return Check(name="Prefect server", ok=False, found=found, mend=SERVER_HINT)
    problem = problem_of(api)
    if problem is None:
        return Check(name="Prefect server", ok=True, found=masked(f"answers at {api}"))
    found = masked(f"{api}: {problem}")
    return Check(name="Prefect server", ok=False, found=found, mend=SERVER_HINT)


def _disk(folder: str) -> Check:
    return _tried("disk", lambda: _free_space(folder), f"mend the permissions of {folder}")


def _free_space(folder: str) -> Check:
    """Where a folder is, or will be."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    ok = free >= MIN_FREE_BYTES
    return Check(
        name="disk",
        ok=ok,
        found=f"{free / GIB:,.1f} GiB free for {folder}",
        mend="" if ok else "score gc JOB, or a larger disk",
    )


def _price_list() -> Check:
    prices = load_prices(Path(shipped_config("prices.yaml")))
    oldest = min(price.as_of for price in prices.values())
    age_days = price_age_days(oldest, utc_now())
    limit_days = AlertsSection().max_price_age_days  # of a job that does not say otherwise
    ok = limit_days is None or age_days <= limit_days
    return Check(
        name="prices",
        ok=ok,
        found=f"the oldest was read on {oldest}, {age_days:,} days ago",
        mend="" if ok else "look at their source, or set cost.usd_per_hour in the job file",
    )


def _tried(name: str, look: Callable[[], Check], mend: str) -> Check:
    """What a look found; one that fails is a line as well, and the other checks go on."""
    try:
        return look()
    except (PipelineError, EngineError, OSError, ValueError) as error:  # a host's name, say
        return Check(name=name, ok=False, found=masked(one_line(error)), mend=mend)


def _well(name: str, where: str, act: Callable[[], str], mend: str) -> Check:
    """It is well unless the act fails."""
    return _tried(name, lambda: Check(name=name, ok=True, found=f"{where}: {act()}"), mend)


def _list_input(job: Job) -> str:
    from pipeline.look import look_at

    dataset = look_at(open_storage(job.input.uri))
    newest = f", the newest date is {dataset.dates[-1]}" if dataset.dates else ""
    return f"{dataset.num_files:,} Parquet files{newest}"


def _write_output(job: Job) -> str:
    probe(open_storage(job.output.uri), f"{job.name}/_runs")
    return "can be written, and honours create-if-absent"


def _see_model(job: Job) -> str:
    from engines.model import load_torch_model
    from engines.onnx_facts import read_onnx_facts

    source = job.model.source
    if not source.endswith(".onnx"):
        return f"a torch module, {type(load_torch_model(source)).__name__}"
    facts = read_onnx_facts(source)
    return f"takes batch x {' x '.join(str(dim or '?') for dim in facts.row_shape)}"


def _price(job: Job) -> Check:
    def find() -> str:
        if job.cost.usd_per_hour is not None:
            return f"your own price, {job.cost.usd_per_hour:g} USD an hour"
        prices = load_prices(Path(shipped_config("prices.yaml")))
        price = find_price(prices, job.cost.instance, job.cost.market)
        return f"{price.usd_per_hour:g} USD an hour, read on {price.as_of}"

    return _well("price", job.cost.instance, find, "mend cost.instance, or set cost.usd_per_hour")


def _mail(mail: MailSection) -> Check:
    from flows.mailing.server import server_of

    def reach() -> str:
        server = server_of(mail)
        with socket.create_connection((server.host, server.port), timeout=ANSWER_S):
            login = f"login as {server.user}" if server.user else "without a login"
            return f"{server.host}:{server.port} answers; {server.security}, {login}"

    return _well("mail", ", ".join(mail.to), reach, "mend the job's `mail` section")
