"""Try the rows in quarantine again, and leave alone all that was scored."""

from __future__ import annotations

from dataclasses import asdict

from pipeline.ledger import Ledger
from pipeline.plan import Plan
from pipeline.versions import Published


def requeue(ledger: Ledger, plan: Plan, engine_key: str, replaces: Published | None) -> None:
    """Make shards with rows in quarantine count as not scored.

    Where the date is published, the new version's ledger takes over all other shards: if they are
    of the same input and engine, for scores of two engines never meet in one run.
    """
    if replaces is None:
        ledger.forget_quarantine()
        return
    if (replaces.manifest["input"]["files"], replaces.engine_key) != (
        [asdict(file) for file in plan.files],
        engine_key,
    ):
        return
    planned = {(shard.index, shard.file.path, shard.row_groups) for shard in plan.shards}
    paths = {name: f"{replaces.folder}/{path}" for path, name in replaces.files()}
    for record in replaces.records().values():
        is_same = (record.shard, record.file, record.row_groups) in planned
        if is_same and not record.num_quarantined:
            ledger.adopt(record, {record.part.name: paths[record.part.name]})
