"""Try the rows in quarantine again, and leave alone all that was scored."""

from __future__ import annotations

import dataclasses

from pipeline.engine_pin import EnginePin
from pipeline.ledger import Ledger
from pipeline.plan import Plan
from pipeline.storage import Storage
from pipeline.versions import Published


def requeue(
    ledger: Ledger, plan: Plan, pin: EnginePin, replaces: Published | None, output: Storage
) -> None:
    """Make shards with rows in quarantine count as not scored.

    Where the date is published, the new version's ledger takes over all other shards: those of the
    same input whose engine may score this run, too. That ledger may have rows in quarantine itself:
    a guard may have stopped the version.
    """
    ledger.forget_quarantine()
    if replaces is None or not _has_same_input(replaces, plan):
        return
    planned = {(shard.index, shard.file.path, shard.row_groups) for shard in plan.shards}
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


def _has_same_input(replaces: Published, plan: Plan) -> bool:
    files = [dataclasses.asdict(file) for file in plan.files]
    return bool(replaces.manifest["input"]["files"] == files)
