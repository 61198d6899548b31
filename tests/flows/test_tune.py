"""`score tune`: what the search accepts, when it stops, and that the next run uses its result."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from engines.devices import Gpu, this_cpu
from engines.errors import BuildError
from engines.manifest import StoredEngine
from flows.devices import num_cores
from flows.measuring.tune import axes_of, render_tuning, tune_facts
from flows.measuring.tune_search import DEFAULTS, MIN_GAIN, NUM_TURNS, Axis, Search, judge
from flows.measuring.tune_trials import rate_of
from pipeline.config import Job
from pipeline.job_file import load_job
from pipeline.lane import LaneDevice
from pipeline.ledger import CommitRecord, PartFile
from pipeline.tuning import LaneSettings, find_tuning, tuning_key, write_tuning
from tests.conftest import DATE, Ended, Running
from tests.engines.small_stores import a_manifest
from tests.pipeline.tuning_cases import a_tuning

pytestmark = pytest.mark.timeout(300)
TRIAL_S = 3.0
AXES = (
    Axis(setting="engine_threads", values=(1, 2, 3), default=2),
    Axis(setting="block_rows", values=(16, 32, 64, 128, 256), default=64),
    Axis(setting="queue_depth", values=(1, 2, 4, 8), default=2),
    Axis(setting="batch_size", values=(4, 8, 16), default=8),
)


class FakeMachine:
    """Scores at a known rate; every trial takes time, and noise falls on it.

    Args:
        speed: Setting -> value -> factor of the default's rate.
        noise: Standard deviation of a trial's rate.
        seed: Of the noise.
        drift: Each trial runs so much slower than the one before: throttling.
    """

    def __init__(
        self,
        speed: dict[str, dict[int, float]] | None = None,
        noise: float = 0.0,
        seed: int = 0,
        drift: float = 0.0,
    ) -> None:
        self.now = 0.0
        self.measured: list[LaneSettings] = []
        self.build_s = 0.0
        self._speed = speed or {}
        self._noise = noise
        self._random = Random(seed)
        self._drift = drift

    def measure(self, settings: LaneSettings) -> float:
        self.now += TRIAL_S
        if settings.batch_size is not None and settings not in self.measured:
            self.now += self.build_s
        self.measured.append(settings)
        rate = 1000.0 * (1 - self._drift) ** len(self.measured)
        for name, value in settings.given().items():
            rate *= self._speed.get(name, {}).get(value, 1.0)
        return rate * max(0.1, self._random.gauss(1, self._noise))

    def setup_s(self, settings: LaneSettings) -> float:
        return self.build_s if settings.batch_size is not None else 0.0

    def search(self, budget_s: float = 10_000.0) -> Search:
        return Search(self, AXES, budget_s, lambda _: None, lambda: self.now)


HILL = {
    "engine_threads": {1: 0.7, 3: 0.9},
    "block_rows": {32: 1.15, 16: 1.3, 128: 0.9},
    "queue_depth": {4: 1.1, 8: 1.25, 1: 0.8},
}
TOP = LaneSettings(block_rows=16, queue_depth=8)


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("drift", [0.0, 0.002])
def test_the_search_climbs_to_the_best_settings_and_confirms_them(
    noise: float, drift: float
) -> None:
    machine = FakeMachine(HILL, noise, drift=drift)
    search = machine.search()
    search.run()
    assert search.best == TOP
    assert search.confirmed
    default, tuned = search.rates
    assert tuned / default == pytest.approx(1.3 * 1.25, rel=0.05)


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.2])
def test_noise_alone_is_as_good_as_never_accepted(noise: float) -> None:
    found = []
    for seed in range(200):
        search = FakeMachine(noise=noise, seed=seed).search()
        search.run()
        found.append(search.best != DEFAULTS)
    assert sum(found) <= 4


def test_a_machine_that_slows_down_makes_nothing_look_faster_or_slower() -> None:
    search = FakeMachine(drift=0.01).search()
    search.run()
    assert search.best == DEFAULTS


def test_settings_that_do_not_work_are_refused_and_said() -> None:
    class Fragile(FakeMachine):
        def measure(self, settings: LaneSettings) -> float:
            if settings.batch_size is not None:
                raise BuildError("the model is bound to batches of 8.")
            return super().measure(settings)

    machine = Fragile(HILL)
    search = machine.search()
    search.run()
    assert search.best == TOP
    failed = {c.verdict for c in search.comparisons if c.candidate.batch_size}
    assert failed == {"failed: the model is bound to batches of 8."}


def test_defaults_that_do_not_work_end_the_search() -> None:
    class Broken(FakeMachine):
        def measure(self, settings: LaneSettings) -> float:
            raise BuildError(f"{settings}: no memory.")

    with pytest.raises(BuildError):
        Broken().search().run()


@pytest.mark.parametrize("budget_s", [10.0, 100.0, 200.0, 250.0])
def test_the_budget_is_kept_but_for_the_first_two_trials(budget_s: float) -> None:
    machine = FakeMachine(HILL, noise=0.02)
    search = machine.search(budget_s)
    search.run()
    assert machine.now <= max(budget_s, 2 * TRIAL_S) + TRIAL_S
    assert search.is_out_of_time
    assert search.has_judged == (budget_s > 10)
    assert search.confirmed == (search.best != DEFAULTS)


def test_an_engine_is_not_built_when_the_budget_does_not_hold_it() -> None:
    machine = FakeMachine(noise=0.02)
    machine.build_s = 500.0
    search = machine.search(400.0)
    search.run()
    assert not any(settings.batch_size for settings in machine.measured)
    assert "not tried: its engine takes about 500 s" in {c.verdict for c in search.comparisons}


def test_what_an_earlier_tuning_found_is_tried_first() -> None:
    machine = FakeMachine(HILL)
    search = machine.search()
    search.run([TOP])
    assert search.comparisons[0].candidate == TOP
    assert search.best == TOP


def test_what_is_accepted_must_be_confirmed_by_other_trials() -> None:
    class Deceiving(FakeMachine):
        """Fast only until it has been accepted."""

        def measure(self, settings: LaneSettings) -> float:
            rate = super().measure(settings)
            return rate * 1.5 if len(self.measured) <= 2 + 2 * NUM_TURNS else 1000.0

    machine = Deceiving({"engine_threads": {3: 1.5}})
    search = machine.search()
    search.run()
    assert search.comparisons[0].verdict == "accepted"
    assert search.comparisons[-1].verdict == "not confirmed"
    assert search.best == DEFAULTS
    assert search.rates[0] == search.rates[1]


def test_after_an_interruption_the_best_so_far_is_at_hand_with_its_gain() -> None:
    class Interrupting(FakeMachine):
        def measure(self, settings: LaneSettings) -> float:
            if settings.queue_depth == 8:
                raise KeyboardInterrupt
            return super().measure(settings)

    search = Interrupting(HILL).search()
    with pytest.raises(KeyboardInterrupt):
        search.run()
    assert search.best == dataclasses.replace(TOP, queue_depth=4)
    assert not search.confirmed
    default, tuned = search.rates
    assert tuned / default == pytest.approx(1.3 * 1.1)


@pytest.mark.parametrize(
    ("turns", "verdict"),
    [
        ([(110.0, 100.0)] * NUM_TURNS, "accepted"),
        ([(110.0, 100.0)] * (NUM_TURNS - 1), "no time left"),
        ([(110.0, 100.0), (100.0, 100.0)], "lost a turn"),
        ([(100 * (1 + MIN_GAIN / 2), 100.0)] * NUM_TURNS, "within the noise"),
        ([(r * 1.1, r) for r in (80.0, 90.0, 100.0, 110.0, 120.0)], "within the noise"),
        ([(r * 1.3, r) for r in (80.0, 90.0, 100.0, 110.0, 120.0)], "accepted"),
    ],
)
def test_a_candidate_must_win_every_turn_by_more_than_the_noise(
    turns: list[tuple[float, float]], verdict: str
) -> None:
    assert judge(turns) == verdict


def record(second: float, num_rows: int) -> CommitRecord:
    file = PartFile(name="p", num_bytes=1, sha256="", num_rows=num_rows)
    return CommitRecord(
        shard=0,
        file="f",
        row_groups=(0,),
        first_row=0,
        num_rows=num_rows,
        num_scored=num_rows,
        num_quarantined=0,
        reasons={},
        part=file,
        quarantine=None,
        owner="tune",
        committed_at=f"2026-11-20T00:00:{second:09.6f}+00:00",
    )


def test_the_rate_counts_neither_the_filling_nor_the_draining_of_the_stages() -> None:
    records = [record(5, 100), record(6, 50), record(7, 250), record(7.5, 1_000)]
    assert rate_of(records) == pytest.approx(150.0)


GPU = Gpu(
    uuid="GPU-1",
    name="H200",
    compute_capability=(9, 0),
    num_sms=132,
    memory_bytes=1 << 37,
    mig_profile=None,
    driver="580.95.05",
    cuda=(13, 0),
    architecture="Linux-x86_64",
    num_threads=4,
)


def axes_for(job: Job, gpu: Gpu | None = None) -> dict[str, Axis]:
    device = LaneDevice(name="lane", num_threads=4, gpu=gpu)
    manifest = a_manifest("k", device=device.engine_device)
    return {axis.setting: axis for axis in axes_of(job, device, manifest)}


def test_what_is_searched_fits_the_job(features_job: Path, pictures_job: Path) -> None:
    features, pictures = load_job(str(features_job)), load_job(str(pictures_job))
    by_dali = load_job(str(pictures_job), ["lanes.cpu_decoder=dali"])
    common = ["engine_threads", "block_rows", "queue_depth", "batch_size"]
    assert list(axes_for(features)) == common
    assert list(axes_for(pictures)) == common  # each thread decodes and infers
    assert list(axes_for(by_dali)) == ["engine_threads", "decode_threads", *common[1:]]
    assert axes_for(by_dali)["decode_threads"].values == (1, 2, 4, 6)
    for axis in [*axes_for(pictures).values(), *axes_for(by_dali).values()]:
        assert axis.default in axis.values
        assert list(axis.values) == sorted(axis.values)


def test_what_the_job_file_says_is_not_searched(pictures_job: Path) -> None:
    explicit = ["lanes.threads=2", "engine.batch_size=16", "lanes.queue_depth=3"]
    assert list(axes_for(load_job(str(pictures_job), explicit))) == ["block_rows"]


def test_decoding_on_a_gpu_has_its_own_settings(pictures_job: Path) -> None:
    found = axes_for(load_job(str(pictures_job)), GPU)
    assert found["hardware_decoder_load"].default == 0.65
    assert {"block_rows", "engine_threads"}.isdisjoint(found)
    on_cpu = axes_for(load_job(str(pictures_job), ["lanes.gpu_decode.enabled=false"]), GPU)
    assert "hardware_decoder_load" not in on_cpu
    assert "block_rows" in on_cpu


def scores_in(output: Path) -> dict[int, float]:
    tables = [pq.read_table(path) for path in output.glob(f"users/dt={DATE}/*.parquet")]
    table = pa.concat_tables(tables)
    return dict(zip(table["user_id"].to_pylist(), table["score"].to_pylist(), strict=True))


def tunings(job: Path) -> list[Path]:
    return sorted(Path(load_job(str(job)).engine.store).glob("tunings/*/*.json"))


@pytest.fixture
def own_store(features_job: Path, tmp_path: Path) -> Path:
    """The features job with a store that no other test tunes."""
    data = json.loads(features_job.read_text())
    data["engine"]["store"] = str(tmp_path / "engines")
    features_job.write_text(json.dumps(data))
    return features_job


def test_a_tuned_job_says_so_and_publishes_the_same_scores(
    score: Callable[..., Ended], own_store: Path, tmp_path: Path
) -> None:
    job = ("run", own_store, "--date", DATE, "--json", "--set")
    before = score(*job, f"output.uri={tmp_path / 'before'}")
    assert before.code == 0, before.err
    assert "tuned" not in before.err

    ended = score("tune", own_store, "--date", DATE, "--budget-s", "8", "--json")
    assert ended.code == 0, ended.err
    facts = ended.json
    assert facts["rows_per_s_default"] > 0
    assert facts["num_rows"] > 0
    assert facts["took_s"] < 8 + 10
    # On a busy machine the budget may not hold a comparison; then it says so and keeps nothing.
    assert [str(path) for path in tunings(own_store)] == [facts["file"]] * bool(facts["file"])
    assert (
        f"the defaults: {facts['rows_per_s_default']:,.0f} rows/s" in ended.err
        or (facts["confirmed"])
    )
    assert not list(tmp_path.glob("scores/*")), "a search writes nothing to the job's output"

    # Whatever this machine liked best: settings that all differ from the defaults.
    loaded, device = load_job(str(own_store)), this_cpu(num_cores())
    settings = LaneSettings(engine_threads=1, block_rows=500, queue_depth=5)
    write_tuning(loaded, a_tuning(key=tuning_key(loaded, device), settings=settings))

    after = score(*job, f"output.uri={tmp_path / 'after'}")
    assert after.code == 0, after.err
    assert "tuned: engine_threads 1, block_rows 500, queue_depth 5 (+25.0% end" in after.err
    assert after.json["run_id"] == before.json["run_id"], "none of these changes what is computed"
    assert after.json["engine"]["key"] == before.json["engine"]["key"]
    assert after.json["settings"] == settings.given()
    assert before.json["settings"] == {}
    assert scores_in(tmp_path / "after") == scores_in(tmp_path / "before")

    plan = score("plan", own_store, "--date", DATE, "--json").json
    assert plan["tuning"]["settings"]["block_rows"] == 500
    assert plan["run_id"] == before.json["run_id"]

    assert score("tune", own_store, "--date", DATE, "--forget", "--json").json["removed"] >= 1
    assert tunings(own_store) == []


def test_a_tuned_batch_size_takes_an_engine_of_its_own_everywhere(
    score: Callable[..., Ended], own_store: Path
) -> None:
    loaded, device = load_job(str(own_store)), this_cpu(num_cores())
    key = tuning_key(loaded, device)
    write_tuning(loaded, a_tuning(key=key, settings=LaneSettings(batch_size=512)))
    built = score("engine", "build", own_store, "--date", DATE, "--json")
    assert built.code == 0, built.err
    assert built.json["batch_size"] == 512
    plan = score("plan", own_store, "--date", DATE, "--json").json
    assert plan["engine"] == built.json["key"]
    ran = score("run", own_store, "--date", DATE, "--json").json
    assert (ran["run_id"], ran["engine"]["built"]) == (plan["run_id"], False)
    explicit = ("--set", "engine.batch_size=1024")
    assert score("plan", own_store, "--date", DATE, "--json", *explicit).json["engine"] is None


class FakeTrials(FakeMachine):
    """Stands in for real lanes; a queue depth of 8 is never measured: somebody presses Ctrl-C."""

    num_rows = 512

    def __init__(self, *_: object) -> None:
        super().__init__(HILL)

    def __enter__(self) -> FakeTrials:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def engine(self, _: LaneSettings) -> StoredEngine:
        return StoredEngine(folder="", manifest=a_manifest("k", device=this_cpu(num_cores())))

    def measure(self, settings: LaneSettings) -> float:
        if settings.queue_depth == 8:
            raise KeyboardInterrupt
        return super().measure(settings)


def test_an_interruption_keeps_what_was_accepted(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.measuring.tune.LaneTrials", FakeTrials)
    job = load_job(str(own_store))
    with pytest.raises(KeyboardInterrupt):
        tune_facts(job, DATE, 3_600.0, lambda _: None)
    found = find_tuning(job, this_cpu(num_cores()))
    assert found is not None
    assert found.settings.queue_depth == 4
    assert not found.confirmed


def test_an_interrupted_search_ends_its_lanes_and_leaves_nothing(
    start_score: Callable[..., Running], own_store: Path
) -> None:
    running = start_score("tune", own_store, "--date", DATE, "--budget-s", "300")
    deadline = time.monotonic() + 60
    while len(running.members()) < 2:
        assert running.is_running()
        assert time.monotonic() < deadline, "no lane in time"
        time.sleep(0.05)
    running.signal(signal.SIGINT)
    ended = running.end(30)
    assert ended.code == 75, ended.err
    assert "accepted" in ended.err
    assert running.lingering() == []


def text_of(settings: LaneSettings, **changes: Any) -> str:
    tuning = a_tuning(settings=settings)
    more = {"gain": tuning.gain, "is_out_of_time": False, "file": "e/tunings/k/0001.json"}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_tuning({**dataclasses.asdict(tuning), **more, **changes}))
    return " ".join(console.export_text().split())


def test_the_table_says_what_was_found_and_what_it_brings() -> None:
    text = text_of(LaneSettings(queue_depth=4, hardware_decoder_load=0.8))
    for part in (
        "faster settings, used from now on",
        "queue_depth 4",
        "hardware_decoder_load 0.8",
        "defaults 1,000 rows/s",
        "tuned 1,250 rows/s, +25.0%",
        "42 trials of 512 rows in 281 s file e/tunings/k/0001.json",
    ):
        assert part in text
    assert "nothing is faster than the defaults" in text_of(DEFAULTS)
    assert "281 s, not all settings" in text_of(DEFAULTS, is_out_of_time=True)
    assert "nothing could be compared" in text_of(DEFAULTS, file=None)
