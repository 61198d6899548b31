"""Try the rows in quarantine again, and leave alone all that was scored."""

from __future__ import annotations

import dataclasses

from pipeline.config import Job
from pipeline.engine_pin import EnginePin
from pipeline.ledger import Ledger
from pipeline.live import find_runs
from pipeline.plan import Plan, input_files
from pipeline.storage import Storage, open_storage
from pipeline.versions import Published


def has_nothing_to_try(job: Job, published: Published, output: Storage) -> bool:
    """Whether a published date has nothing in quarantine, and its input is what was scored.

    A run that was to be the next version may have rows in quarantine, too: a guard stopped it.

    Args:
        job: The job.
        published: The current version of the date.
        output: Of the job.
    """
    manifest = published.manifest
    if manifest["quarantined"] or manifest["input"]["unreadable"]:
        return False
    found = input_files(job, published.date, open_storage(job.input.uri))
    now = {(file.path, file.num_bytes, file.version) for file in found}
    scored = {
        (file["path"], file["num_bytes"], file["version"]) for file in manifest["input"]["files"]
    }
    runs = find_runs(output, job, published.date)
    return now == scored and all(run.version <= published.version for run in runs)


def requeue(
    ledger: Ledger, plan: Plan, pin: EnginePin, replaces: Published | None, output: Storage
) -> None:
    """Make shards with rows in quarantine count as not scored.

    Where the date is published, the new version's ledger takes over all other shards: those of
    unchanged files whose engine may score this run, too. That ledger may have rows in quarantine
    itself: a guard may have stopped the version.

    A shard keeps its index, which names its part. Where a file has more or fewer shards than it
    had, or is new or gone, those of the files behind it have others, and are scored again.
    """
    ledger.forget_quarantine()
    if replaces is None:
        return
    unchanged = _unchanged_files(replaces, plan)
    planned = {
        (shard.index, shard.file.path, shard.row_groups)
        for shard in plan.shards
        if shard.file.path in unchanged
    }
    paths = {name: f"{replaces.folder}/{path}" for path, name in replaces.files()}
    # The ledger knows more than the manifest: how the scores of each shard are distributed.
    records = Ledger(output, replaces.job, replaces.run_id).records() or replaces.records()
    for record in records.values():
        engine = record.engine or replaces.engine_key
        is_same = (record.shard, record.file, record.row_groups) in planned
        is_allowed = pin.allows(engine, replaces.engine_common)
        if is_same and is_allowed and not record.num_quarantined:
            taken = dataclasses.replace(record, engine=engine)
            ledger.adopt(taken, {record.part.name: paths[record.part.name]})


def _unchanged_files(replaces: Published, plan: Plan) -> set[str]:
    """Paths of the files whose rows would be read and copied now as they were then.

    One file may change that for all: the first one gives features their order, and copied columns
    have a type that holds the values of all files.
    """
    scored = replaces.manifest["input"]
    before = {file["path"]: file for file in scored["files"]}
    now = {file.path: dataclasses.asdict(file) for file in plan.files}
    if "columns_sha256" in scored:
        is_alike = scored["columns_sha256"] == plan.columns_sha256
    else:  # of an earlier version of this program
        is_alike = before == now
    return {path for path, file in now.items() if is_alike and before.get(path) == file}
