"""A night of 3,000 hostile and damaged inputs: every row is accounted for, and nothing is hurt."""

from __future__ import annotations

import collections
import datetime
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_inputs import (
    bombs,
    encode,
    mutant,
    mutant_parquet,
    parquet_bytes,
    strangers,
    with_promise,
)
from PIL import Image

from tests.conftest import write_job

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(600)]
SEED = 20261121
CLEAN, HOSTILE = "2026-11-19", "2026-11-20"
NUM_GOOD, NUM_INPUTS, NUM_FILES = 240, 3_000, 360
"""Good pictures; all inputs, among them so many Parquet files that are hostile themselves."""
ROWS_PER_FILE, ROWS_PER_GROUP, ROWS_OF_A_MUTANT, PROMISED = 700, 50, 8, 10**12
MAX_TREE_BYTES = 3 << 30
MAX_SHARD_S = 30.0
SCHEMA = pa.schema([("picture_id", pa.string()), ("image", pa.binary())])


def originals() -> list[bytes]:
    """Photographs as JPEG, progressive JPEG and PNG, small, so that thousands decode quickly."""
    from flows.demo_data import load_photos

    pictures = [photo.resize((200, 150)) for _, photo in sorted(load_photos().items())]
    jpegs = [encode(picture, quality=88) for picture in pictures]
    progressive = [encode(picture, progressive=True) for picture in pictures[:3]]
    pngs = [encode(picture.resize((80, 60)), "PNG") for picture in pictures[:3]]
    return jpegs + progressive + pngs


def good_pictures(rng: np.random.Generator) -> list[bytes]:
    """No two are equal."""
    from flows.demo_data import load_photos

    photos = [photo.resize((260, 195)) for _, photo in sorted(load_photos().items())]
    made = []
    for number in range(NUM_GOOD):
        left, top = int(rng.integers(60)), int(rng.integers(45))
        picture = photos[number % len(photos)].crop((left, top, left + 200, top + 150))
        made.append(encode(picture, "PNG" if number % 10 == 9 else "JPEG"))
    return made


def table_of(ids: list[str], images: list[bytes | None]) -> pa.Table:
    return pa.table([pa.array(ids), pa.array(images, pa.binary())], schema=SCHEMA)


def write_night(root: Path) -> None:
    """The good pictures as one night, and among the hostile ones as another."""
    rng = np.random.default_rng(SEED)
    good = good_pictures(rng)
    ids = [f"good-{number:04d}" for number in range(NUM_GOOD)]
    for date in (CLEAN, HOSTILE):
        (root / f"dt={date}").mkdir(parents=True)
    (root / f"dt={CLEAN}" / "good.parquet").write_bytes(
        parquet_bytes(table_of(ids, list(good)), ROWS_PER_GROUP)
    )
    real = originals()
    picture = Image.new("RGB", (40, 30), (200, 30, 30))
    hostile = {
        f"bomb-{name}": data for name, data in bombs(real[0], encode(picture, "PNG")).items()
    }
    hostile |= {f"stranger-{name}": data for name, data in strangers(picture).items()}
    for number in range(NUM_INPUTS - NUM_FILES - len(hostile)):
        hostile[f"mutant-{number:05d}"] = mutant(real, rng)
    rows = [*zip(ids, good, strict=True), *hostile.items()]
    rows = [rows[index] for index in rng.permutation(len(rows))]
    folder = root / f"dt={HOSTILE}"
    for first in range(0, len(rows), ROWS_PER_FILE):
        some = rows[first : first + ROWS_PER_FILE]
        table = table_of([row[0] for row in some], [row[1] for row in some])
        (folder / f"rows-{first:05d}.parquet").write_bytes(parquet_bytes(table, ROWS_PER_GROUP))
    for number, data in enumerate(hostile_files(real, rng)):
        (folder / f"z-{number:04d}.parquet").write_bytes(data)


def hostile_files(real: list[bytes], rng: np.random.Generator) -> Iterator[bytes]:
    """Parquet files with damaged pages and footers, bombs, and what is no Parquet.

    A footer that tells of other columns is left out: that is no damage but the wrong file, and the
    night says so with exit code 2.
    """
    many = table_of(["x"] * 500, [real[0]] * 500)
    flat = table_of(["x"] * 8, [bytes(40 << 20)] * 8)
    made = [
        with_promise(parquet_bytes(many, 500), 500, PROMISED),
        with_promise(parquet_bytes(many, 500), 500, 501),
        with_promise(parquet_bytes(many, 500), 500, 499),
        parquet_bytes(flat, 8, compression="brotli", use_dictionary=False),
        b"",
        b"PAR1",
        b"a,b\n1,2\n" * 100,
        parquet_bytes(many, 500)[:-4] + b"PARE",
    ]
    yield from made
    other = parquet_bytes(pa.table({"y": [1.5, 2.5] * 40}), 20)
    num_made = len(made)
    while num_made < NUM_FILES:
        images = [real[index] for index in rng.integers(len(real), size=ROWS_OF_A_MUTANT)]
        ids = [f"file-{num_made:04d}-{row}" for row in range(ROWS_OF_A_MUTANT)]
        has_checksums = bool(rng.integers(2))
        whole = parquet_bytes(
            table_of(ids, list(images)), ROWS_OF_A_MUTANT // 2, write_page_checksum=has_checksums
        )
        data = mutant_parquet(whole, other, rng)
        if has_other_columns(data):
            continue
        yield data
        num_made += 1


def has_other_columns(data: bytes) -> bool:
    try:
        return not pq.ParquetFile(pa.BufferReader(data)).schema_arrow.equals(SCHEMA)
    except (pa.ArrowException, OSError, ValueError):
        return False


@pytest.fixture
def job(tmp_path: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(SEED)
    arrays = {
        "w1": rng.standard_normal((16, 3, 5, 5)) * 0.1,
        "b1": rng.standard_normal(16) * 0.1,
        "w2": rng.standard_normal((10, 16)) * 2,
        "b2": rng.standard_normal(10) * 0.1,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c"], name="conv", strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten", axis=1),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], name="fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 64, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "m.onnx")
    write_night(tmp_path / "pictures")
    return write_job(
        tmp_path / "job.yaml",
        {
            "name": "pictures",
            "input": {
                "uri": str(tmp_path / "pictures"),
                "passthrough": ["picture_id"],
                "images": {"column": "image"},
            },
            "model": {
                "source": str(tmp_path / "m.onnx"),
                "size": [64, 64],
                "mean": [127, 127, 127],
                "std": [64, 64, 64],
            },
            "engine": {
                "store": str(tmp_path / "engines"),
                "calibration": {"rows": 32},
                "gate": {"rows": 64, "min_agreement": 0.5, "min_cosine": 0.5},
            },
            "output": {"uri": str(tmp_path / "scores")},
            "limits": {"max_quarantined": 1, "max_group_gib": 0.25, "max_psi": None},
            # Nothing here hangs; a machine with other work may only be slow.
            "lanes": {"shard_rows": 350, "memory_gib": 1.5, "hang_s": 10},
            "cost": {"instance": "c6i.large"},
        },
    )


class PeakMemory(threading.Thread):
    """The most that some processes have had in use together; polled while `is_running`."""

    def __init__(self, command: Any) -> None:
        super().__init__(daemon=True)
        self._command = command
        self.num_bytes = 0

    def run(self) -> None:
        while self._command.is_running():
            self.num_bytes = max(self.num_bytes, sum(map(resident, self._command.members())))
            time.sleep(0.2)


def resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Counted:
    """Rows of a published night, by our own count."""

    scores: dict[str, tuple[int, float]]
    """Picture -> class and probability."""
    quarantined: dict[str, list[dict[str, Any]]]
    """File -> entries."""


def count(folder: Path) -> Counted:
    scores = {}
    for path in folder.glob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            scores[row["picture_id"]] = (row["class_id"], row["probability"])
    quarantined = collections.defaultdict(list)
    for path in sorted(folder.glob("_quarantine/*.parquet")):
        for row in pq.read_table(path).to_pylist():
            quarantined[row["file"]].append(row)
    return Counted(scores, quarantined)


def test_three_thousand_hostile_inputs_are_all_accounted_for(
    start_score: Callable[..., Any], score: Callable[..., Any], job: Path, tmp_path: Path
) -> None:
    clean = score("run", job, "--date", CLEAN, "--json")
    assert clean.code == 0, clean.err
    assert clean.json["scored"] == NUM_GOOD
    running = start_score("run", job, "--date", HOSTILE, "--json")
    memory = PeakMemory(running)
    memory.start()
    ended = running.end(240)
    assert ended.code == 0, ended.err
    report = ended.json
    memory.join()
    folder = Path(report["output"])
    tell(report, memory, folder)
    verdict = score("verify", job, "--date", HOSTILE, "--json")
    assert verdict.code == 0, verdict.err

    found = count(folder)
    check_every_row(found, tmp_path / "pictures", report, verdict.json)
    check_good_pictures(found, count(Path(clean.json["output"])))
    check_reasons(report)
    assert memory.num_bytes < MAX_TREE_BYTES
    assert longest_wait_s(folder) < MAX_SHARD_S
    assert running.lingering() == []


def tell(report: dict[str, Any], memory: PeakMemory, folder: Path) -> None:
    """For whoever runs it with `-s`."""
    figures = {
        "rows": report["rows"] - PROMISED,
        "scored": report["scored"],
        "reasons": report["quarantined_by_reason"],
        "unreadable_files": len(report["unreadable_files"]),
        "peak_mib": memory.num_bytes >> 20,
        "score_s": round(report["phases"]["score_s"], 1),
        "longest_wait_s": round(longest_wait_s(folder), 1),
        "poison": sorted(path.read_text() for path in folder.parent.glob("_runs/*/poison/*.json")),
    }
    print(json.dumps(figures, indent=1))


def check_every_row(
    found: Counted, source: Path, report: dict[str, Any], verdict: dict[str, Any]
) -> None:
    """Each row of a file with a footer is once in a part or in quarantine; the rest is listed."""
    unreadable = {file["path"] for file in report["unreadable_files"]}
    num_rows = num_quarantined = 0
    paths = sorted((source / f"dt={HOSTILE}").glob("*.parquet"))
    for path in paths:
        name = f"dt={HOSTILE}/{path.name}"
        if name in unreadable:
            assert name not in found.quarantined
            continue
        num_rows += pq.ParquetFile(path).metadata.num_rows
        entries = found.quarantined[name]
        rows = sorted((entry["row"], entry["num_rows"]) for entry in entries)
        assert all(row + size <= after for (row, size), (after, _) in itertools.pairwise(rows))
        num_quarantined += sum(size for _, size in rows)
        if path.name.startswith("rows-"):  # intact: here we know the name of each row
            names = pq.read_table(path, columns=["picture_id"])["picture_id"].to_pylist()
            bad = {row for row, _ in rows}
            for row, name in enumerate(names):
                assert (name in found.scores) == (row not in bad)
    for counts in (report, verdict):
        assert counts["rows"] == num_rows
        assert counts["quarantined"] == num_quarantined
        assert counts["scored"] == num_rows - num_quarantined
    assert len(paths) == NUM_FILES + -(-(NUM_INPUTS - NUM_FILES + NUM_GOOD) // ROWS_PER_FILE)
    assert verdict["unreadable_files"] == len(unreadable) >= NUM_FILES // 5
    assert report["degraded"]
    page = (Path(report["output"]) / "_report.html").read_text()
    assert "row count unknown" in page


def check_good_pictures(found: Counted, clean: Counted) -> None:
    assert len(clean.scores) == NUM_GOOD
    for name, (class_id, probability) in clean.scores.items():
        assert found.scores[name] == (class_id, pytest.approx(probability, abs=1e-6))


def check_reasons(report: dict[str, Any]) -> None:
    """The inputs are as hostile as they should be: each defence has had something to do."""
    reasons = report["quarantined_by_reason"]
    assert reasons["row_group_too_large"] == PROMISED + 8
    for reason in (
        "row_group_unreadable",
        "decode_failed",
        "empty",
        "format_not_accepted",
        "header_unreadable",
        "jpeg_truncated",
        "null",
        "png_chunk_length",
        "too_many_jpeg_scans",
        "too_many_jpeg_segments",
        "too_many_pixels",
        "too_many_png_chunks",
    ):
        assert reasons[reason] >= 1


def longest_wait_s(folder: Path) -> float:
    """Between two commits: one lane takes shard after shard."""
    (ledger,) = folder.parent.glob(f"_runs/{HOSTILE}-*")
    times = sorted(
        datetime.datetime.fromisoformat(json.loads(path.read_text())["committed_at"])
        for path in ledger.glob("commits/*.json")
    )
    return max((after - before).total_seconds() for before, after in itertools.pairwise(times))
