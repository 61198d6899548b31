"""A date of a job that is published, and published again, without engines and processes."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline_cases import DATE, SumRunner, scoring_tools

from pipeline.config import Job
from pipeline.ledger import Ledger
from pipeline.plan import make_plan
from pipeline.publish import draft_of, publish, write_reports
from pipeline.report import RunReport
from pipeline.score_shards import ShardScoring
from pipeline.storage import Storage, open_storage
from pipeline.verify import verify_published
from pipeline.versions import Published, find_published


@dataclasses.dataclass
class Dated:
    """One date of a job, which runs of several names score."""

    job: Job
    output: Storage
    report: RunReport
    date: str = DATE

    def score(self, run_id: str, job: Job | None = None) -> bool:
        """Score and publish as `run_id`, in the place of whatever is published now."""
        replaces = find_published(self.output, self.job.name, self.date)
        return self.publish(run_id, replaces, job)

    def publish(self, run_id: str, replaces: Published | None, job: Job | None = None) -> bool:
        job = job or self.job
        plan = make_plan(job, self.date, open_storage(job.input.uri))
        ledger = Ledger(self.output, job.name, run_id)
        todo = [shard for shard in plan.shards if shard.index not in ledger.records()]
        with ShardScoring(todo, scoring_tools(job, plan, SumRunner(), ledger=ledger)) as scoring:
            list(scoring)
        records = ledger.records()
        num_scored = sum(record.num_scored for record in records.values())
        report = dataclasses.replace(
            self.report,
            run_id=run_id,
            job=job.name,
            date=self.date,
            rows=plan.num_rows,
            scored=num_scored,
            quarantined=plan.num_rows - num_scored,
        )
        done = publish(draft_of(job, plan, ledger, records, report), self.output, replaces)
        if done:
            write_reports(self.output, report)
        return done

    @property
    def now(self) -> Published:
        found = find_published(self.output, self.job.name, self.date)
        assert found is not None
        return found

    def verify(self) -> dict[str, Any]:
        return verify_published(self.output.uri, self.job.name, self.date)

    def files(self) -> dict[str, bytes]:
        """All published files, with their contents."""
        infos = self.output.list_files(self.now.folder)
        return {info.path: self.output.read(info.path) or b"" for info in infos}
