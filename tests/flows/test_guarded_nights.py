"""Whole nights that a guard stops: what it says, `--accept`, and the same command after."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engines.build import ResolvedEngine
from engines.keys import digest
from engines.manifest import REFERENCE
from engines.model import fingerprint_model
from flows import night as night_module
from flows.devices import lane_devices
from flows.night import run_night
from flows.progress import LineProgress
from pipeline.config import Job
from pipeline.engine import build_engine, open_store, request_for
from pipeline.errors import GuardError
from pipeline.guards import NightWatch
from pipeline.job_file import load_job
from pipeline.plan import make_plan
from pipeline.report import RunReport
from pipeline.report_text import render_markdown
from pipeline.run import Night
from pipeline.storage import open_storage
from pipeline.verify import verify_published
from tests.conftest import DATE, write_job

pytestmark = pytest.mark.timeout(300)
NUM_USERS, NUM_FEATURES, GROUP_ROWS = 4_000, 32, 100
DATES = ("2026-11-17", "2026-11-18", "2026-11-19", DATE)


def write_users(folder: Path, date: str, *, scale: float = 1.0, bad: range = range(0)) -> None:
    """Users of one date, in row groups of a hundred."""
    rng = np.random.default_rng(int(date.replace("-", "")))
    features = rng.standard_normal((NUM_USERS, NUM_FEATURES), dtype=np.float32) * scale
    features[bad] = np.nan
    columns = {f"f{i:02d}": features[:, i] for i in range(NUM_FEATURES)}
    path = folder / f"dt={date}" / "users.parquet"
    path.parent.mkdir(parents=True)
    table = pa.table({"user_id": np.arange(NUM_USERS), **columns})
    pq.write_table(table, path, row_group_size=GROUP_ROWS)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the users of a night, and a store with the model's engine."""
    from engines.demo_models import write_ranking_onnx

    root = tmp_path_factory.mktemp("guarded")
    write_ranking_onnx(root / "ranking.onnx")
    write_users(root / "users", DATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engines.gate.RACE_S", 0.005)  # which candidate wins is no matter here
        built(load_job(str(job_file(root, root))))
    return root


def job_file(demo: Path, root: Path) -> Path:
    """The job on the input of `root`, or of the demo."""
    users = root / "users"
    return write_job(
        root / "job.yaml",
        {
            "name": "users",
            "input": {
                "uri": str(users if users.exists() else demo / "users"),
                "passthrough": ["user_id"],
                "features": {"columns": ["f*"]},
            },
            "model": {"source": str(demo / "ranking.onnx"), "head": "scores"},
            "engine": {
                "store": str(demo / "engines"),
                "calibration": {"rows": 64},
                "gate": {"rows": 128, "min_agreement": 0.9},
            },
            "output": {"uri": str(root / "scores")},
            "lanes": {"shard_rows": 500, "device": "cpu"},
            "cost": {"instance": "c6i.large"},
        },
    )


def built(job: Job) -> ResolvedEngine:
    plan = make_plan(job, DATE, open_storage(job.input.uri))
    request = request_for(job, plan.num_features, lane_devices(job)[0].engine_device)
    fingerprint = fingerprint_model(request.model)
    return build_engine(job, plan, request, fingerprint, False, say=lambda _: None)


@pytest.fixture
def night(demo: Path, tmp_path: Path) -> Callable[..., RunReport]:
    """Runs the job for a date in this process."""

    def run(*sets: str, date: str = DATE, accept: tuple[str, ...] = ()) -> RunReport:
        job = load_job(str(job_file(demo, tmp_path)), sets)
        night = Night(job=job, date=date, accept=frozenset(accept))
        return run_night(night, LineProgress(lambda _: None))

    return run


def stopped(night: Callable[..., RunReport], guard: str, *sets: str, **options: Any) -> str:
    with pytest.raises(GuardError) as error:
        night(*sets, **options)
    assert (error.value.guard, error.value.exit_code) == (guard, 3)
    return str(error.value)


def commits(root: Path) -> int:
    return len(list(root.glob("scores/users/_runs/*/commits/*.json")))


def is_published(root: Path, date: str = DATE) -> bool:
    return (root / "scores" / "users" / f"dt={date}").exists()


def test_too_many_bad_rows_stop_the_night_early_and_it_goes_on_when_they_are_accepted(
    night: Callable[..., RunReport], tmp_path: Path
) -> None:
    write_users(tmp_path / "users", DATE, bad=range(200))
    small = ("lanes.shard_rows=100", "lanes.grace_s=20")
    said = stopped(night, "quarantine", *small)
    assert "rows (" in said
    assert "feature_missing" in said
    assert "expected at most 40 (limits.max_quarantined 1.00%" in said
    committed = commits(tmp_path)
    assert 1 <= committed < 40, "it did not wait for the end of the night"
    assert not is_published(tmp_path)

    stopped(night, "quarantine", *small)
    assert commits(tmp_path) == committed, "nothing is scored before the guard has looked"

    report = night(*small, accept=("quarantine",))
    assert (report.status, report.quarantined) == ("published", 200)
    assert committed <= report.shards_reused < report.shards == 40
    (accepted,) = report.accepted
    assert accepted.startswith("quarantine: 200 of 4,000 rows (5.00%) are in quarantine")
    assert "quarantine: 200 of 4,000 rows" in render_markdown(report)
    assert verify_published(str(tmp_path / "scores"), "users", DATE)["quarantined"] == 200


def test_a_probation_lets_a_small_date_pass(
    night: Callable[..., RunReport], tmp_path: Path
) -> None:
    write_users(tmp_path / "users", DATE, bad=range(200))
    stopped(night, "quarantine", "limits.probation_rows=199")
    report = night("limits.probation_rows=200")
    assert (report.quarantined, report.accepted) == (200, ())


def test_a_shard_in_work_is_committed_when_a_guard_stops_the_night(
    night: Callable[..., RunReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lanes drain: nothing that is in work is lost, and nothing else is begun."""
    seen: list[int] = []
    count = NightWatch.committed

    def stop_at_once(watch: NightWatch, record: Any) -> None:
        seen.append(record.shard)
        count(watch, record)
        raise GuardError("quarantine", "stopped by the test")

    monkeypatch.setattr(NightWatch, "committed", stop_at_once)
    stopped(night, "quarantine", "lanes.shard_rows=100")
    monkeypatch.undo()
    committed = commits(tmp_path)
    assert len(seen) <= committed < 40
    assert night("lanes.shard_rows=100").shards_reused == committed


def test_money_that_is_spent_stops_the_night_and_a_higher_limit_goes_on(
    night: Callable[..., RunReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dollars = itertools.count()

    def watch(run: Any, price: Any) -> NightWatch:
        """Each look at the money costs a dollar."""
        assert price.usd_per_hour == 3600
        rows = run.plan.num_rows
        return NightWatch(run.guards, run.job, rows, run.done.values(), lambda: next(dollars))

    costly = ("cost.usd_per_hour=3600", "lanes.shard_rows=100")
    monkeypatch.setattr(night_module, "watch_over", watch)
    said = stopped(night, "budget", *costly, "limits.max_usd=12")
    assert "$13.00 are spent" in said
    assert "run the same command with a higher limit" in said
    committed = commits(tmp_path)
    assert 0 < committed < 40
    monkeypatch.undo()
    report = night(*costly, "limits.max_usd=500")
    assert report.shards_reused == committed
    assert (report.accepted, report.attempts) == ((), 2)


def test_money_counts_from_the_start_of_the_command_and_over_all_attempts(
    night: Callable[..., RunReport], tmp_path: Path
) -> None:
    dear = "cost.usd_per_hour=36000000"  # ten thousand dollars a second
    assert "4,000 rows left" in stopped(night, "budget", dear, "limits.max_usd=100")
    assert commits(tmp_path) == 0
    report = night(dear, "limits.max_usd=100", accept=("budget",))
    assert report.accepted[0].startswith("budget: $")
    assert report.status == "published"
    free = night("cost.usd_per_hour=0", "limits.max_usd=0.000001", f"output.uri={tmp_path / 'x'}")
    assert free.accepted == ()


def test_too_few_rows_are_scored_when_they_are_accepted(night: Callable[..., RunReport]) -> None:
    assert "4,000 rows for 2026-11-20; expected at least 4,001" in stopped(
        night, "rows", "limits.min_rows=4001"
    )
    report = night("limits.min_rows=4001", accept=("rows",))
    assert report.accepted[0].startswith("rows: ")


@pytest.fixture
def drifted(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A store in which the job's engine is one of other weights: whole, checked, and wrong."""
    import torch

    from engines.export import export_torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net = torch.nn.Sequential(
            torch.nn.Linear(NUM_FEATURES, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)
        )
    other = tmp_path / "other.onnx"
    other.write_bytes(export_torch(net, (NUM_FEATURES,)).SerializeToString())
    shutil.copytree(demo / "engines", tmp_path / "engines")
    store = f"engine.store={tmp_path / 'engines'}"
    path = str(job_file(demo, tmp_path))
    monkeypatch.setattr("engines.gate.RACE_S", 0.005)
    right = built(load_job(path, [store])).engine
    wrong = built(
        load_job(path, [f"model.source={other}", f"engine.store={tmp_path / 'others'}"])
    ).engine
    manifest = dataclasses.replace(
        wrong.manifest,
        key=digest("drifted"),
        request_key=right.manifest.request_key,
        model_fingerprint=right.manifest.model_fingerprint,
        reference_batch=right.manifest.reference_batch,
    )
    open_store(load_job(path, [store])).publish(
        manifest,
        wrong.artifact.read_bytes(),
        {REFERENCE: right.attachment(REFERENCE).read_bytes()},
    )
    return (store,)


def test_an_engine_that_answers_otherwise_than_fp32_publishes_nothing(
    night: Callable[..., RunReport], drifted: tuple[str, ...], tmp_path: Path
) -> None:
    said = stopped(night, "drift", *drifted)
    assert "on 32 rows of this night its share of variance is 0" in said
    assert "; expected at least 0.9 (engine.gate.min_agreement)" in said
    assert "`score engine build --force`" in said
    assert not is_published(tmp_path)
    assert commits(tmp_path) == 8
    assert night(*drifted, "limits.drift_rows=0", f"output.uri={tmp_path / 'x'}").drift is None
    report = night(*drifted, accept=("drift",))
    assert report.shards_reused == report.shards == 8
    assert report.drift is not None
    assert report.drift.rows == 32
    assert report.drift.agreement == pytest.approx(0, abs=0.5)  # of 32 rows, by chance
    assert report.accepted[0].startswith("drift: engine ")


def test_an_engine_as_it_was_built_agrees_with_fp32(night: Callable[..., RunReport]) -> None:
    drift = night().drift
    assert drift is not None
    assert drift.rows == 32
    assert drift.agreement is not None
    assert 0.9 <= drift.agreement <= 1
    assert drift.note == ""


def test_an_engine_that_was_just_built_is_not_judged_again(
    night: Callable[..., RunReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.gate.RACE_S", 0.005)
    drift = night(f"engine.store={tmp_path / 'new'}").drift
    assert drift is not None
    assert (drift.rows, drift.agreement) == (0, None)
    assert "built in this run" in drift.note


def test_scores_that_move_away_from_the_last_nights_publish_nothing(
    night: Callable[..., RunReport], tmp_path: Path
) -> None:
    """Drift of the engine is switched off: it is no matter here, and stays with its own tests."""
    first, second, third, fourth = DATES
    for date, scale in ((first, 1.0), (second, 1.0), (third, 3.0), (fourth, 3.0)):
        write_users(tmp_path / "users", date, scale=scale)
    off = "limits.drift_rows=0"
    reports = [night(off, date=date) for date in (first, second)]
    assert reports[0].distribution is not None
    assert reports[0].distribution.nights == ()
    assert "no earlier night of this model" in render_markdown(reports[0])
    compared = reports[1].distribution
    assert compared is not None
    assert compared.nights == (first,)
    assert compared.psi["scores"] < compared.chance["scores"]

    said = stopped(night, "scores", off, date=third)
    assert f"against the last 2 nights ({first} to {second})" in said
    assert not is_published(tmp_path, third)
    assert night(off, "limits.max_psi=null", f"output.uri={tmp_path / 'x'}", date=third).scored
    accepted = night(off, date=third, accept=("scores",))
    assert accepted.shards_reused == accepted.shards
    assert accepted.accepted[0].startswith("scores: scores: a population stability index of ")
    # What was accepted is what is usual from now on.
    after = night(off, date=fourth).distribution
    assert after is not None
    assert after.nights == (third,)


def test_the_command_names_the_guard_and_takes_its_name(
    score: Callable[..., Any], demo: Path, tmp_path: Path
) -> None:
    command = ("run", job_file(demo, tmp_path), "--date", DATE, "--json")
    few = ("--set", "limits.min_rows=5000")
    ended = score(*command, *few)
    assert ended.code == 3, ended.err
    assert set(ended.json) == {"status", "exit_code", "guard", "error"}
    assert (ended.json["guard"], ended.json["exit_code"]) == ("rows", 3)
    assert f"with `score run JOB --date {DATE} --accept rows`." in ended.json["error"]
    wrong = score(*command, *few, "--accept", "row")
    assert wrong.code == 2
    assert wrong.json["error"].startswith("--accept row: no such guard; expected one of rows, ")
    ended = score(*command, *few, "--accept", "rows", "--accept", "drift")
    assert ended.code == 0, ended.err
    assert len(ended.json["accepted"]) == 1
    assert ended.json["drift"]["rows"] == 32


def test_pictures_are_decoded_again_and_agree_with_fp32_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight of them are damaged; the others are found behind them in the parts."""
    from flows.demo_data import write_pictures
    from tests.engines.small_models import write_image_model

    monkeypatch.setattr("engines.gate.RACE_S", 0.005)
    for date in DATES[-2:]:
        write_pictures(tmp_path / "users", date, num_rows=256, num_files=1, rows_per_group=16)
    path = job_file(tmp_path, tmp_path)
    pictures = [
        "input.features=null",
        "input.images={column: image}",
        "input.passthrough=[picture_id]",
        f"model={{source: {write_image_model(tmp_path / 'net.onnx')}, size: [12, 12]}}",
        "engine.gate={rows: 64, min_agreement: 0.9, min_cosine: 0.9, max_divergence: 1}",
        "lanes.shard_rows=64",
        "limits={max_quarantined: 0.05, drift_rows: 96}",
    ]
    job = load_job(str(path), pictures)
    nights = [Night(job=job, date=date) for date in DATES[-2:]]
    first, second = (run_night(night, LineProgress(lambda _: None)) for night in nights)
    assert first.drift is not None
    assert first.drift.rows == 0, "its engine was built for it"
    assert second.quarantined == 8
    drift, scores = second.drift, second.distribution
    assert drift is not None
    assert 88 <= drift.rows <= 96
    assert drift.agreement is not None
    assert drift.agreement > 0.9
    assert drift.mean_abs_diff is not None
    assert drift.mean_abs_diff < 0.05
    assert scores is not None
    assert scores.nights == (DATES[-2],)
    assert set(scores.psi) == {"probability", "classes"}
