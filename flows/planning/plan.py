"""Facts for `score plan`, and how they look on a terminal."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from engines.model import fingerprint_model
from flows.devices import lane_devices
from flows.night import price_of
from flows.planning.forecast import forecast_facts, forecast_rows
from pipeline.alerts import stale_price
from pipeline.config import Job
from pipeline.engine import load_class_names, request_for, stored_engine
from pipeline.engine_pin import EnginePin, common_of
from pipeline.ledger import Ledger, utc_now
from pipeline.plan import make_plan, run_id_of
from pipeline.report import Price
from pipeline.report_words import hourly
from pipeline.storage import open_storage
from pipeline.tuning import find_tuning, with_settings
from pipeline.versions import find_published

Facts = dict[str, Any]


def plan_facts(job: Job, date: str, machine_share: float = 1.0) -> Facts:
    """What a run of `date` would do; reads footers, the ledger and the engine store only.

    Args:
        job: The job.
        date: ISO date.
        machine_share: Of this machine that the run would have, and pay.
    """
    price = price_of(job, date, machine_share)
    output = open_storage(job.output.uri)
    plan = make_plan(job, date, open_storage(job.input.uri))
    device = lane_devices(job)[0]
    tuning, asked = find_tuning(job, device.engine_device), job
    job = with_settings(job, tuning.settings) if tuning else job
    request = request_for(job, plan.num_features, device.engine_device)
    fingerprint = fingerprint_model(request.model)
    found = stored_engine(job, request, fingerprint)
    engine = found.engine if found else None
    names = load_class_names(job.model.class_names)
    pin = EnginePin(
        engine=engine.key if engine else "",
        common=common_of(asked, plan.num_features, device, fingerprint),
        has_several=job.lanes.has_several_engines,
    )
    run_id = run_id_of(plan, job, pin.key, names) if pin.key else None
    done = Ledger(output, job.name, run_id).records() if run_id else {}
    sizes = sorted(shard.num_rows for shard in plan.shards)
    is_published = find_published(output, job.name, date) is not None
    rows_done = sum(record.num_rows for record in done.values())
    rows_to_do = None if is_published else plan.num_rows - rows_done
    return {
        "job": job.name,
        "date": date,
        "published": is_published,
        "run_id": run_id,
        "files": len(plan.files),
        "input_bytes": sum(file.num_bytes for file in plan.files),
        "unreadable_files": [asdict(file) for file in plan.unreadable],
        "rows": plan.num_rows,
        "shards": len(plan.shards),
        "rows_to_do": rows_to_do or 0,
        "shards_done": len(done),
        "shards_to_do": 0 if is_published else len(plan.shards) - len(done),
        "smallest_shard_rows": sizes[0],
        "largest_shard_rows": sizes[-1],
        "engine": engine.key if engine else None,
        "engine_rows_per_s": _chosen_rate(engine.manifest) if engine else None,
        "device": device.name,
        "threads": device.num_threads,
        "tuning": asdict(tuning) if tuning else None,
        "tuning_text": str(tuning) if tuning else "not tuned; see `score tune`",
        **forecast_facts(job, date, output, price, rows=rows_to_do, must_build=engine is None),
        **_price_facts(job, price),
    }


def _price_facts(job: Job, price: Price) -> Facts:
    """What an hour costs, and a warning where that was read too long ago; None: it was not."""
    limit = job.alerts.max_price_age_days
    warning = stale_price(price.instance, price.market, price.as_of, utc_now(), limit)
    return {"price": asdict(price), "price_text": hourly(price), "price_warning": warning}


def _chosen_rate(manifest: Any) -> float:
    return float(manifest.chosen[0].rows_per_s)


def render_plan(facts: Facts) -> RenderableType:
    """Two columns: what, and how much."""
    table = Table(show_header=False, box=None)
    table.add_row("run", facts["run_id"] or "its engine is not built yet")
    table.add_row(
        "input", f"{facts['rows']:,} rows, {facts['files']:,} files, {facts['input_bytes']:,} bytes"
    )
    for file in facts["unreadable_files"]:
        table.add_row("unreadable", Text(f"{file['path']}: {file['message']}"))
    sizes = f"{facts['smallest_shard_rows']:,} to {facts['largest_shard_rows']:,} rows each"
    progress = f"{facts['shards_done']:,} done, {facts['shards_to_do']:,} to do"
    table.add_row("shards", f"{facts['shards']:,} ({sizes}), {progress}")
    if facts["engine"]:
        rate = facts["engine_rows_per_s"]
        table.add_row("engine", f"{facts['engine'][:12]}, {rate:,.0f} rows/s alone when built")
    else:
        table.add_row("engine", "must be built first")
    table.add_row("device", f"{facts['device']}, {facts['threads']} threads")
    table.add_row("settings", facts["tuning_text"])
    for what, said in forecast_rows(facts):
        table.add_row(what, said)
    table.add_row("price", Text(facts["price_text"]))
    if facts["price_warning"]:
        table.add_row("", Text(facts["price_warning"], style="yellow"))
    table.add_row("published", "yes: a run would do nothing" if facts["published"] else "no")
    return table
