"""Tunings: kept create-only on any storage, read with suspicion, and never stronger than a job."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pipeline_cases import (
    SumRunner,
    a_job,
    a_plan,
    images_data,
    job_data,
    scoring_tools,
    users,
    write_input,
)

from engines.build import request_key
from engines.devices import Gpu, this_cpu
from pipeline.block_size import BLOCK_ROWS
from pipeline.config import Job
from pipeline.engine import request_for
from pipeline.lane_child import make_decoder
from pipeline.plan import run_id_of
from pipeline.score_shards import ShardScoring
from pipeline.storage import open_storage
from pipeline.tuning import (
    LaneSettings,
    Tuning,
    find_tuning,
    forget_tuning,
    is_free,
    settings_of,
    tuned,
    tuning_key,
    with_settings,
    write_tuning,
)
from tests.pipeline.tuning_cases import a_tuning

CPU = this_cpu(2)
ALL = LaneSettings(
    batch_size=4,
    decode_threads=1,
    engine_threads=3,
    block_rows=16,
    queue_depth=8,
    hardware_decoder_load=0.9,
)
PATHS = {
    "batch_size": "engine.batch_size",
    "decode_threads": "lanes.decode_threads",
    "engine_threads": "lanes.engine_threads",
    "block_rows": "lanes.block_rows",
    "queue_depth": "lanes.queue_depth",
    "hardware_decoder_load": "lanes.gpu_decode.hardware_decoder_load",
}


@pytest.fixture(params=["local", "object"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "object":
        return str(request.getfixturevalue("s3_folder"))
    return str(tmp_path / "engines")


@pytest.fixture
def job(tmp_path: Path, store_uri: str) -> Job:
    return a_job(job_data(tmp_path), engine={"store": store_uri})


@pytest.fixture
def local_job(tmp_path: Path) -> Job:
    return a_job(job_data(tmp_path), engine={"store": str(tmp_path / "engines")})


def tuning_of(job: Job, **changes: Any) -> Tuning:
    found = a_tuning(
        key=tuning_key(job, CPU),
        job=job.name,
        device=CPU.name,
        settings=ALL,
        rows_per_s_tuned=1_053.0,
    )
    return dataclasses.replace(found, **changes)


def value_at(job: Job, dotted: str) -> Any:
    found: Any = job
    for name in dotted.split("."):
        found = getattr(found, name)
    return found


def explicit(data: dict[str, Any], dotted: str, value: object) -> Job:
    *parents, last = dotted.split(".")
    section = data
    for name in parents:
        section = section.setdefault(name, {})
    section[last] = value
    return Job.model_validate(data)


def test_a_tuning_is_found_again_and_the_newest_counts(job: Job) -> None:
    assert find_tuning(job, CPU) is None
    first = tuning_of(job)
    path = write_tuning(job, first)
    assert path == f"tunings/{first.key}/0001.json"
    assert find_tuning(job, CPU) == first
    second = tuning_of(job, settings=LaneSettings(queue_depth=1), confirmed=False)
    assert write_tuning(job, second).endswith("/0002.json")
    assert find_tuning(job, CPU) == second
    assert forget_tuning(job, CPU) == 2
    assert find_tuning(job, CPU) is None


def test_the_tenth_thousandth_tuning_counts_as_well(local_job: Job) -> None:
    tuning = tuning_of(local_job)
    store = open_storage(local_job.engine.store)
    for number in (9_999, 10_000):
        old = json.dumps(dataclasses.asdict(tuning)).encode()
        assert store.create(f"tunings/{tuning.key}/{number}.json", old)
    newest = tuning_of(local_job, host="newest")
    assert write_tuning(local_job, newest).endswith("/10001.json")
    assert find_tuning(local_job, CPU) == newest


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda data: {key: value for key, value in data.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (without("settings"), "settings: Field required"),
        (lambda data: {**data, "key": "other"}, "for another job or device"),
        (lambda data: {**data, "settings": {"block_rows": 0}}, "greater than or equal to 1"),
        (lambda data: {**data, "settings": {"hardware_decoder_load": 7}}, "less than or equal"),
        (lambda data: {**data, "rows_per_s_default": 0}, "greater than 0"),
        (lambda _: [], "an object"),
    ],
)
def test_a_damaged_or_foreign_tuning_is_left_out_with_a_warning(
    damage: Callable[[Any], Any], why: str, local_job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    good = tuning_of(local_job)
    write_tuning(local_job, good)
    store = open_storage(local_job.engine.store)
    bad = json.dumps(damage(dataclasses.asdict(good))).encode()
    assert store.create(f"tunings/{good.key}/0002.json", bad)
    with caplog.at_level(logging.WARNING):
        assert find_tuning(local_job, CPU) == good
    (message,) = caplog.messages
    assert "0002.json" in message
    assert why in message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"null"])
def test_a_file_that_is_no_json_is_left_out_too(
    content: bytes, local_job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    store, key = open_storage(local_job.engine.store), tuning_key(local_job, CPU)
    assert store.create(f"tunings/{key}/0001.json", content)
    assert store.create(f"tunings/{key}/notes.txt", b"of a person")
    assert find_tuning(local_job, CPU) is None
    assert len(caplog.messages) == 1
    assert tuned(local_job, CPU) == local_job


def test_a_tuning_is_for_one_job_and_one_kind_of_device(tmp_path: Path) -> None:
    data = images_data(tmp_path)
    gpu = Gpu(
        uuid="GPU-1",
        name="H200",
        compute_capability=(9, 0),
        num_sms=132,
        memory_bytes=1 << 37,
        mig_profile=None,
        driver="580.95.05",
        cuda=(13, 0),
        architecture="Linux-x86_64",
        num_threads=16,
    )
    job = a_job(data)
    keys = [
        tuning_key(job, CPU),
        tuning_key(job, this_cpu(3)),
        tuning_key(job, gpu),
        tuning_key(job, dataclasses.replace(gpu, num_threads=8)),
        tuning_key(job, dataclasses.replace(gpu, num_sms=16)),
        tuning_key(a_job({**data, "name": "others"}), CPU),
        tuning_key(a_job(data, model={"source": "other.onnx"}), CPU),
        tuning_key(a_job(data, input={"images": {"column": "image", "crop": 0.5}}), CPU),
    ]
    assert len(set(keys)) == len(keys)
    twin = dataclasses.replace(gpu, uuid="GPU-2")
    assert tuning_key(job, twin) == tuning_key(job, gpu)
    moved = a_job(data, input={"uri": "elsewhere"}, lanes={"queue_depth": 3})
    assert tuning_key(moved, CPU) == tuning_key(job, CPU)


def test_a_tuning_fills_in_what_the_job_leaves_open(local_job: Job) -> None:
    write_tuning(local_job, tuning_of(local_job))
    job = tuned(local_job, CPU)
    assert {name: value_at(job, path) for name, path in PATHS.items()} == ALL.given()
    assert settings_of(job) == ALL
    assert settings_of(local_job) == LaneSettings()
    assert tuned(job, CPU) == job, "settings that were filled in are as good as the file's"
    assert tuned(local_job, this_cpu(1)) == local_job


@pytest.mark.parametrize("name", PATHS)
def test_what_the_job_file_says_wins(name: str, tmp_path: Path) -> None:
    value = 0.5 if name == "hardware_decoder_load" else 7
    job = explicit(images_data(tmp_path), PATHS[name], value)
    found = with_settings(job, ALL)
    assert not is_free(job, name)
    expected = {**ALL.given(), name: value}
    assert {each: value_at(found, path) for each, path in PATHS.items()} == expected


def test_the_number_of_threads_in_the_job_file_wins_over_both_kinds(tmp_path: Path) -> None:
    job = with_settings(explicit(images_data(tmp_path), "lanes.threads", 2), ALL)
    assert (job.lanes.decode_threads, job.lanes.engine_threads) == (None, None)
    assert job.lanes.queue_depth == 8


def test_a_default_that_the_job_file_repeats_is_a_decision(tmp_path: Path) -> None:
    job = explicit(images_data(tmp_path), "lanes.gpu_decode.hardware_decoder_load", 0.65)
    assert with_settings(job, ALL).lanes.gpu_decode.hardware_decoder_load == 0.65


@pytest.mark.parametrize("name", PATHS)
def test_of_all_settings_only_the_batch_size_changes_what_is_computed(
    name: str, tmp_path: Path
) -> None:
    write_input(tmp_path / "in", users(30))
    job = a_job(job_data(tmp_path))
    found = with_settings(job, LaneSettings(**{name: getattr(ALL, name)}))
    assert found != job
    plans = [a_plan(each) for each in (job, found)]
    keys = [request_key(request_for(each, 2, CPU), "model") for each in (job, found)]
    assert (keys[0] == keys[1]) == (name != "batch_size")
    ids = [run_id_of(plan, each, "e", ()) for plan, each in zip(plans, (job, found), strict=True)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("depth", [1, 7])
def test_parts_do_not_depend_on_block_size_and_queue_depth(depth: int, tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(50))
    job = with_settings(a_job(job_data(tmp_path)), LaneSettings(block_rows=7))
    plan = a_plan(job)
    decoder = make_decoder(job, plan.feature_columns, plan.num_features, 1)
    assert decoder.block_rows == 7
    tools = scoring_tools(job, plan, SumRunner(), decoder=decoder, queue_depth=depth)
    with ShardScoring(plan.shards, tools) as scoring:
        records = list(scoring)
    folder = Path(job.output.uri, tools.ledger.folder, "parts")
    scores = [pq.read_table(folder / record.part.name)["score"].to_pylist() for record in records]
    assert [score for part in scores for score in part] == [3.0 * row for row in range(50)]


def test_the_decoder_of_a_lane_takes_threads_and_block_from_the_job(tmp_path: Path) -> None:
    by_dali = a_job(images_data(tmp_path), lanes={"cpu_decoder": "dali"})
    default = make_decoder(by_dali, (), 0, 2)
    job = with_settings(by_dali, LaneSettings(block_rows=16, decode_threads=1))
    decoder = make_decoder(job, (), 0, 2)
    assert (default.block_rows, default._num_threads) == (64, 2)  # type: ignore[attr-defined]
    assert (decoder.block_rows, decoder._num_threads) == (16, 1)  # type: ignore[attr-defined]


def test_blocks_of_features_hold_whole_batches_unless_the_job_says_otherwise(
    tmp_path: Path,
) -> None:
    job, default = a_job(job_data(tmp_path)), BLOCK_ROWS["features"]
    assert make_decoder(job, ("f0",), 1, 1).block_rows == default
    assert make_decoder(job, ("f0",), 1, 1, batch_size=default - 1).block_rows == (
        2 * (default - 1)
    )
    job = with_settings(job, LaneSettings(block_rows=7))
    assert make_decoder(job, ("f0",), 1, 1, batch_size=4).block_rows == 7


def test_a_tuning_reads_like_a_sentence(local_job: Job) -> None:
    tuning = tuning_of(local_job, settings=LaneSettings(block_rows=1_024, queue_depth=4))
    assert str(tuning) == "block_rows 1,024, queue_depth 4 (+5.3% end to end on 2026-11-20)"
    none = tuning_of(local_job, settings=LaneSettings())
    assert str(none) == "the defaults, than which 2026-11-20 found nothing faster"
