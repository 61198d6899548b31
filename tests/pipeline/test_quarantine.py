"""Examples of quarantined rows for the report."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pipeline_cases import SumRunner, a_job, a_plan, job_data, scoring_tools, users, write_input

from pipeline.ledger import CommitRecord, Ledger
from pipeline.quarantine import read_samples
from pipeline.score_shards import ShardScoring
from pipeline.storage import Storage, open_storage

Night = tuple[Ledger, dict[int, CommitRecord], Storage]


@pytest.fixture
def night(tmp_path: Path) -> Night:
    """Two shards, one bad row in each."""
    table = users(40).to_pydict()
    table["f0"] = [None if row in (3, 33) else 1.0 for row in range(40)]
    write_input(tmp_path / "in", pa.table(table))
    job = a_job(job_data(tmp_path))
    plan = a_plan(job)
    tools = scoring_tools(job, plan, SumRunner())
    with ShardScoring(plan.shards, tools) as scoring:
        records = {record.shard: record for record in scoring}
    return tools.ledger, records, open_storage(job.output.uri)


def test_bad_rows_come_as_examples(night: Night) -> None:
    samples = read_samples(*night)
    assert [(sample.row, sample.reason) for sample in samples] == [
        (3, "feature_missing"),
        (33, "feature_missing"),
    ]


def test_a_damaged_quarantine_part_gives_no_examples_and_stops_no_report(
    night: Night, caplog: pytest.LogCaptureFixture
) -> None:
    ledger, records, output = night
    assert records[0].quarantine is not None
    path = ledger.part_path(records[0].quarantine)
    whole = output.read(path)
    assert whole is not None
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        (Path(output.uri) / path).write_bytes(damaged)
        rows = [sample.row for sample in read_samples(ledger, records, output)]
        assert rows in ([33], [3, 33])  # a flip in what nobody reads changes nothing
    assert f"{path}: " in caplog.text
    (Path(output.uri) / path).write_bytes(b"")
    assert [sample.row for sample in read_samples(ledger, records, output)] == [33]
