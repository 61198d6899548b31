"""Which engines may score a run, and what its id covers of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from pipeline_cases import a_job, job_data

from engines.devices import Cpu
from pipeline.config import Job
from pipeline.engine_pin import EnginePin, common_of
from pipeline.lane import LaneDevice
from pipeline.tuning import LaneSettings, with_settings

CPU = Cpu(name="new", architecture="x", instructions=("avx512_vnni",), num_threads=8)
OLD = Cpu(name="old", architecture="y", instructions=(), num_threads=2)
ONE = EnginePin(engine="e", common="c", has_several=False)
SEVERAL = dataclasses.replace(ONE, has_several=True)


def common(job: Job, cpu: Cpu = CPU, fingerprint: str = "model") -> str:
    return common_of(job, 8, LaneDevice(name="lane", num_threads=1, cpu=cpu), fingerprint)


def test_a_run_of_one_engine_is_bound_to_it_and_others_to_what_theirs_have_in_common() -> None:
    assert (ONE.key, SEVERAL.key) == ("e", "c")
    assert ONE.allows("e", "another")
    assert not ONE.allows("f", "c")
    assert SEVERAL.allows("f", "c")
    assert SEVERAL.allows("e", "")
    assert not SEVERAL.allows("f", "")


@pytest.mark.parametrize(
    ("sets", "has_several"),
    [
        ({}, False),
        ({"mix_devices": True}, False),
        ({"runner": "ray"}, True),
        ({"runner": "ray", "mix_devices": False}, False),
    ],
)
def test_only_a_cluster_has_several_engines(
    tmp_path: Path, sets: dict[str, Any], has_several: bool
) -> None:
    job = a_job(job_data(tmp_path), lanes=sets)
    assert job.lanes.has_several_engines is has_several


def test_unlike_devices_have_in_common_what_the_job_asks_for(tmp_path: Path) -> None:
    data = job_data(tmp_path)
    job = a_job(data)
    assert common(job) == common(job, OLD)
    others = [
        a_job(data, engine={"gate": {"min_agreement": 0.5}}),
        a_job(data, engine={"calibration": {"rows": 9}}),
        a_job(data, engine={"batch_size": 4}),
        with_settings(job, LaneSettings(batch_size=2)),
    ]
    found = {common(job, fingerprint="other"), *map(common, (job, *others))}
    assert len(found) == 2 + len(others)
