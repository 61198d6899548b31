"""The benchmark's driver: measuring a process tree, rounds, marks, tables, goals and README."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import compare, contenders, prepare, scaling
from benchmarks.answers import Marker, read_answers
from benchmarks.compare import command_line, parse_options
from benchmarks.contenders import PEERS, PRODUCT, WORKLOADS
from benchmarks.goals import find_goals
from benchmarks.plot import to_svg
from benchmarks.process_tree import CommandError
from benchmarks.record import (
    Comparison,
    MarkerError,
    readme_section,
    replace_section,
    write_record,
)
from benchmarks.rounds import Kind, Measured, Run, from_json, to_json
from benchmarks.summary import failures, summarise, to_markdown
from pipeline.job_file import load_job

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
MIB = 2**20
KINDS = ("full", "startup")
MACHINE = {
    "cpu": "Some CPU",
    "cores": 2,
    "instructions": ["avx2"],
    "os": "Linux",
    "python": "3.11",
    "memory_bytes": 2**34,
    "git_revision": "abc1234",
    "versions": {"numpy": "2.4", "tensorrt": None},
}


def run_of(
    name: str, rate: float, *, kind: Kind = "full", quality: float = 0.75, cpu_s: float = 4.0
) -> Run:
    """A run of 1,000 rows at `rate` rows per second."""
    measured = Measured(
        rows=1_000,
        seconds=1_000 / rate,
        wall_s=1_000 / rate + 0.1,
        cpu_s=cpu_s,
        peak_rss_bytes=512 * MIB,
        other_load_cores=0.0,
        quality=quality if kind == "full" else None,
        marked_against="labels" if kind == "full" else None,
        engine="openvino int8" if name == PRODUCT else None,
        of_limit=0.96 if name == PRODUCT else None,
    )
    return Run(name=name, kind=kind, round=0, at="2026-11-21T10:00:00+0000", measured=measured)


def failed(name: str) -> Run:
    return Run(name=name, kind="full", round=0, at="2026-11-21T10:00:00+0000", error="no | memory")


def comparison(runs: list[Run]) -> Comparison:
    return Comparison(
        workload=WORKLOADS["photos"],
        runs=runs,
        num_rounds=3,
        machine=MACHINE,
        command="make bench",
        notes=["spark was left out: no java"],
    )


def in_a_process(code: str) -> str:
    """What a script prints; a process of its own, since the driver ends all below itself."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- a process tree


TREE = """
import subprocess, sys
burn = "import time\\nwhile time.process_time() < 0.4: pass"
hold = "import time; kept = bytearray(b'x' * (100 << 20)); time.sleep(3)"
daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"],
                          start_new_session=True, stdout=subprocess.DEVNULL)
print("daemon", daemon.pid, flush=True)
below = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
work = [subprocess.Popen([sys.executable, "-c", code]) for code in (burn, below)]
for process in work:
    process.wait()
"""


def test_a_whole_process_tree_is_measured_and_nothing_of_it_is_left() -> None:
    found = json.loads(
        in_a_process(
            "import json, os, sys\n"
            "from benchmarks import process_tree as tree\n"
            "tree.ORPHAN_GRACE_S = 0.2\n"
            "tree.adopt_orphans()\n"
            f"usage = tree.run_measured([sys.executable, '-c', {TREE!r}], timeout_s=30)\n"
            "daemon = int(usage.stdout.split()[1])\n"
            "print(json.dumps({'cpu_s': usage.cpu_s, 'wall_s': usage.wall_s,\n"
            "    'peak': usage.peak_rss_bytes, 'left': os.path.exists(f'/proc/{daemon}')}))\n"
        )
    )
    assert found["cpu_s"] >= 0.4
    assert found["wall_s"] >= 3
    assert found["peak"] >= 100 * MIB
    assert not found["left"]


@pytest.mark.parametrize(
    ("code", "timeout_s", "reason"),
    [
        ("import sys; sys.exit('out of luck')", 30, "exit status 1; stderr ends with: out of luck"),
        ("import time; time.sleep(60)", 1, "no end after 1 s"),
    ],
)
def test_a_command_that_fails_or_hangs_is_an_error(code: str, timeout_s: int, reason: str) -> None:
    said = in_a_process(
        "import sys\n"
        "from benchmarks.process_tree import CommandError, run_measured\n"
        f"try: run_measured([sys.executable, '-c', {code!r}], timeout_s={timeout_s})\n"
        "except CommandError as error: print(error)\n"
    )
    assert said.startswith(reason)


# --- rounds


PEER = """
import json, pathlib, shutil, sys
source, target = map(pathlib.Path, sys.argv[1:])
target.mkdir()
shutil.copy(source.parent / WROTE / "part.parquet", target)
print("a line of a library")
print(json.dumps({"rows": 8, "seconds_total": SECONDS}))
"""
ROUNDS = """
import json, sys
from pathlib import Path
from benchmarks.contenders import Contender
from benchmarks.rounds import Course, run_rounds, to_json
folder = Path(FOLDER)
course = Course(rows=folder / "rows", startup_rows=folder / "few", model=folder, timeout_s=30)
field = [Contender(name=name, command=(sys.executable, "-c", code, "{input}", "{output}"),
                   columns=("id", "top1", "label")) for name, code in CODES.items()]
kept = []
run_rounds(field, course, 1, kept.append, lambda line: None)
for run in kept:
    print(to_json(run))
"""


def test_one_peer_that_fails_leaves_the_others_and_is_a_row_with_its_error(tmp_path: Path) -> None:
    for folder, num_rows in (("rows", 8), ("few", 2)):
        (tmp_path / folder).mkdir()
        ids = [str(row) for row in range(num_rows)]
        table = pa.table({"id": ids, "top1": [3] * num_rows, "label": [3] * num_rows})
        pq.write_table(table, tmp_path / folder / "part.parquet")
    good = PEER.replace("WROTE", "source.name").replace("SECONDS", "0.01")
    codes = {
        "good": good,
        "short": good.replace("source.name", "'few'"),
        "fast": good.replace("0.01", "1e6"),
        "dead": "raise SystemExit('no memory')",
    }
    script = ROUNDS.replace("FOLDER", repr(str(tmp_path))).replace("CODES", repr(codes))
    runs = [from_json(line) for line in in_a_process(script).splitlines()]
    assert {(run.name, run.kind) for run in runs} == {(n, k) for n in codes for k in KINDS}
    assert len(runs) == 2 * len(codes)
    errors = {run.name: run.error for run in runs if run.kind == "full"}
    assert errors["good"] is None
    assert errors["short"] == "2 rows were written; expected 8"
    assert errors["fast"] is not None
    assert errors["fast"].startswith("its clock says 1000000.00 s of")
    table = to_markdown(summarise(runs), "top-1 accuracy").splitlines()
    assert table[2].startswith("| good | 8 | 800 | 1.00 |")
    assert f"| dead (2 of 2 runs failed) |{' - |' * 9}" in table
    (dead,) = (line for line in failures(summarise(runs)) if line.startswith("dead, 2 of 2 runs"))
    assert "exit status 1; stderr ends with: no memory" in dead


def test_a_run_is_kept_as_a_line_and_read_back() -> None:
    for run in (run_of("script/naive", 100), failed("spark/docs")):
        assert from_json(to_json(run)) == run


# --- marks


def test_answers_with_labels_are_marked_against_them() -> None:
    table = pa.table({"id": ["a", "b"], "answer": [1, 2], "label": [1, 3]})
    assert Marker().mark("script", table) == (0.5, "labels")


def test_answers_without_labels_are_marked_against_the_first_that_came() -> None:
    marker = Marker()
    first = pa.table({"id": ["a", "b", "c"], "answer": [1, 2, 5], "label": [-1, -1, -1]})
    others = pa.table({"id": ["c", "a"], "answer": [5, 2], "label": [-1, -1]})
    assert marker.mark("script", first) == (1.0, "script")
    assert marker.mark("daft", others) == (0.5, "script")


def test_the_weighted_score_moves_when_scores_and_users_are_paired_wrongly() -> None:
    right = pa.table({"id": [1, 2], "answer": [0.2, 0.8]})
    wrong = pa.table({"id": [1, 2], "answer": [0.8, 0.2]})
    assert Marker().mark("spark", right)[0] == pytest.approx(0.6)
    assert Marker().mark("spark", wrong)[0] == pytest.approx(0.4)


def test_an_output_is_read_whole_and_without_quarantine(tmp_path: Path) -> None:
    for path, ids in (("a/0.parquet", ["x"]), ("1.parquet", ["y"]), ("_quarantine/2.parquet", [])):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": pa.array(ids, pa.string()), "top1": [7] * len(ids)}),
                       tmp_path / path)  # fmt: skip
    table = read_answers(tmp_path, ("id", "top1"))
    assert sorted(table["id"].to_pylist()) == ["x", "y"]
    assert table["answer"].to_pylist() == [7, 7]


def test_a_row_that_was_written_twice_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["x", "x"], "top1": [1, 1]}), tmp_path / "0.parquet")
    with pytest.raises(CommandError, match="2 rows with 1 ids"):
        read_answers(tmp_path, ("id", "top1"))


def test_no_output_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no Parquet file"):
        read_answers(tmp_path, ("id", "top1"))


# --- the table


def test_the_table_has_medians_spread_and_the_share_of_the_fastest_peer() -> None:
    runs = [run_of(PRODUCT, rate, cpu_s=rate / 250) for rate in (900, 1_000, 1_400)]
    runs += [run_of("script/tuned", rate) for rate in (100, 300, 200)]
    runs += [run_of("expert_script/procs", 500), run_of(PRODUCT, 250, kind="startup")]
    first, second, third = to_markdown(summarise(runs), "top-1 accuracy").splitlines()[2:]
    assert first == (
        "| **nightscore** | 1,000 | 1,000 (900 to 1,400) | 2.00 | 4 (3.6 to 5.6) | 512 | 4.00 "
        "| 1.10 | 0.75 | 0.00 |"
    )
    assert second.startswith("| expert_script/procs | 1,000 | 500 | 1.00 |")
    assert third.startswith("| script/tuned | 1,000 | 200 (100 to 300) | 0.40 |")


def test_a_contender_that_failed_once_keeps_its_medians_and_the_record_says_why(
    tmp_path: Path,
) -> None:
    runs = [run_of("daft/docs", 100), failed("daft/docs")]
    line = to_markdown(summarise(runs), "accuracy").splitlines()[2]
    assert line.startswith("| daft/docs (1 of 2 runs failed) | 1,000 | 100 |")
    record = write_record(comparison(runs), tmp_path).read_text()
    assert "\n- daft/docs, 1 of 2 runs failed: full: no | memory\n" in record


def test_the_plot_has_a_bar_for_each_that_ended_well() -> None:
    runs = [run_of(PRODUCT, 1_000), run_of("a<b", 500), failed("spark/docs")]
    plot = to_svg(summarise(runs), "photos", "here", "medians")
    assert plot.count("<rect") == 3  # the ground, and two bars
    assert "a&lt;b" in plot
    assert "spark" not in plot


# --- goals


def verdicts(workload: str, runs: list[Run]) -> dict[str, str]:
    return {goal.what: goal.verdict for goal in find_goals(workload, summarise(runs))}


def field(workload: str, rate: float) -> list[Run]:
    """Every peer of a workload at the same speed."""
    peers, _ = contenders.choose_peers(workload, [])
    return [
        run_of(peer.name if variant == peer.name else f"{peer.name}/{variant}", rate)
        for peer in peers
        for variant in peer.variants
    ]


def test_goals_are_reached_or_not_by_the_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    ours = [run_of(PRODUCT, 230, cpu_s=3.9), run_of(PRODUCT, 250, kind="startup")]
    said = verdicts("photos", [*ours, *field("photos", 100)])
    assert said.pop("times as fast as torch eager") == "NOT reached"
    assert set(said.values()) == {"reached"}
    assert len(said) == 8
    said = verdicts("features", [run_of(PRODUCT, 270), *field("features", 100)])
    assert said == {
        "times as fast as the best by hand": "reached",
        "times as fast as Daft": "reached",
        "times as fast as Ray Data": "NOT reached",
        "times as fast as Spark": "NOT reached",
        "of what its stages allow on these cores, start-up aside": "reached",
        "peak memory of the process tree, GiB": "reached",
    }


def test_the_accuracy_may_lose_half_a_point_and_no_more() -> None:
    what = "accuracy lost against the best peer on all rows"
    peer = run_of("script/tuned", 100, quality=0.725)
    assert verdicts("photos", [run_of(PRODUCT, 1, quality=0.72), peer])[what] == "reached"
    assert verdicts("photos", [run_of(PRODUCT, 1, quality=0.719), peer])[what] == "NOT reached"


def test_a_goal_with_a_peer_that_did_not_run_is_not_measured() -> None:
    said = verdicts("photos", [run_of(PRODUCT, 1_000), run_of("daft/docs", 1)])
    assert said["times as fast as the best of what their documentations show"] == "not measured"


# --- the record and README.md


def test_the_record_says_what_where_and_how(tmp_path: Path) -> None:
    runs = [run_of(PRODUCT, 1_000), run_of("script/tuned", 200)]
    record = write_record(comparison(runs), tmp_path)
    text = record.read_text()
    assert record.name == "2026-11-21-peers-photos-2-cores-avx2.md"
    assert record.with_suffix(".svg").exists()
    assert f"]({record.stem}.svg)" in text
    for said in (
        "Some CPU, 2 cores",
        "`make bench`",
        "abc1234",
        "no java",
        "engine: openvino int8",
    ):
        assert said in text


def test_without_labels_the_table_says_whose_answers_are_agreed_with(tmp_path: Path) -> None:
    runs = [
        from_json(to_json(run_of("daft/docs", 9)).replace('"labels"', '"script/naive"')),
        failed("spark/docs"),
    ]
    assert "| same top-1 as script/naive |" in write_record(comparison(runs), tmp_path).read_text()


def test_only_what_is_between_the_markers_of_readme_is_replaced() -> None:
    text = "a\n<!-- peers:photos -->\nold\n<!-- /peers:photos -->\nb\n<!-- peers:features -->\n"
    section = readme_section(comparison([run_of(PRODUCT, 1_000)]), "benchmarks/x.md")
    replaced = replace_section(text, "photos", section)
    assert replaced == text.replace("old", section)
    assert replace_section(replaced, "photos", section) == replaced
    assert "| **nightscore** | 1,000 |" in replaced
    assert "[record](benchmarks/x.md)" in replaced


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        "<!-- peers:photos --> no end",
        "<!-- /peers:photos --> wrong order <!-- peers:photos -->",
        "<!-- peers:photos --><!-- /peers:photos -->" * 2,
    ],
)
def test_a_readme_without_one_pair_of_markers_is_left_alone(text: str) -> None:
    with pytest.raises(MarkerError, match="expected one of each"):
        replace_section(text, "photos", "table")


# --- who runs, and on what


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_job_of_a_workload_loads_and_has_the_columns_that_are_marked(workload: str) -> None:
    job = load_job(str(BENCHMARKS / "jobs" / f"{workload}.yaml"))
    ours = WORKLOADS[workload].product_columns
    assert {*ours} - {"class_id", "score"} == {*job.input.passthrough}
    assert job.model.source.endswith(f"/{WORKLOADS[workload].product_model}")


@pytest.mark.parametrize("peer", [*PEERS["photos"], *PEERS["features"]], ids=lambda p: p.name)
def test_every_peer_is_in_the_repository(peer: contenders.Peer) -> None:
    script = (BENCHMARKS / "peers" / peer.script).read_text()
    assert all(f'"{variant}"' in script or f"def {variant}(" in script for variant in peer.variants)
    assert f"{peer.environment})" in (BENCHMARKS / "peers" / "setup.sh").read_text()


def test_some_peers_or_some_variants_can_be_chosen() -> None:
    chosen, _ = contenders.choose_peers("photos", ["script", "daft/fast"])
    assert [(p.name, p.variants) for p in chosen] == [
        ("script", ("naive", "tuned")),
        ("daft", ("fast",)),
    ]


def test_spark_is_left_out_with_a_reason_where_there_is_no_java(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)
    chosen, (reason,) = contenders.choose_peers("features", [])
    assert "spark" not in [peer.name for peer in chosen]
    assert reason.startswith("spark was left out: there is no `java`")


def test_the_command_in_a_record_can_be_typed_and_names_no_folder(tmp_path: Path) -> None:
    words = ["--workloads", "photos", "--peers", "script", "daft/fast", "--rounds", "1"]
    options = parse_options([*words, "--photos", "/some/where", "--work", str(tmp_path)])
    expected = "make bench ROUNDS=1 WORKLOADS=photos PEERS='script daft/fast'"
    assert command_line(options) == expected
    assert command_line(parse_options(["--work", str(tmp_path)])) == "make bench"


def test_photographs_without_labels_are_refused_and_the_demos_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(prepare.PrepareError, match=r"no labels\.csv"):
        prepare.find_photos(tmp_path, tmp_path)
    monkeypatch.setattr(prepare, "SHARED_PHOTOS", tmp_path / "absent")
    folder = prepare.find_photos(None, tmp_path)
    lines = (folder / "labels.csv").read_text().splitlines()
    assert lines[0] == "path,class_index"
    assert len(lines) > 5
    assert all((folder / line.split(",")[0]).exists() for line in lines[1:])


# --- scaling


def test_copies_of_the_pictures_are_links(tmp_path: Path) -> None:
    rows = tmp_path / "photos"
    rows.mkdir()
    pq.write_table(pa.table({"id": [1, 2, 3]}), rows / "part-0.parquet")
    folder = scaling.link_copies(rows)
    assert scaling.link_copies(rows) == folder  # made already
    assert scaling.count_rows(folder) == 30
    assert {path.stat().st_ino for path in folder.iterdir()} == {
        (rows / "part-0.parquet").stat().st_ino
    }


@pytest.mark.parametrize(("peak_mib", "verdict"), [(540, "reached"), (560, "NOT reached")])
def test_memory_that_grows_by_more_than_a_tenth_is_said_to(peak_mib: int, verdict: str) -> None:
    sizes = {10: 500, 100: peak_mib}
    found = {
        scaling.Point(part="memory", workload="photos", rows=Path(str(rows)), threads=2): [
            scaling.Found(num_rows=rows, seconds=2, cpu_s=1, peak_rss_bytes=mib * MIB)
        ]
        for rows, mib in sizes.items()
    }
    text = scaling.to_markdown(found, "here", "abc", 1)
    assert "| memory | photos | 100 | 1 x 2 | 50 | 2.00 | 10 |" in text
    assert text.endswith(f": {verdict}.\n")


@pytest.mark.parametrize(
    ("words", "is_written"),
    [
        ([], True),
        (["--peers", "script"], False),
        (["--peers", "script", "--publish"], True),
        (["--rows", "200", "--publish"], False),
        (["--rounds", "1"], False),
    ],
)
def test_a_smoke_test_or_some_peers_leave_readme_as_it_is(
    words: list[str], is_written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- peers:photos -->\n<!-- /peers:photos -->\n")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "HERE", tmp_path / "benchmarks")
    options = parse_options([*words, "--work", str(tmp_path / "work")])
    compare.publish(comparison([run_of(PRODUCT, 1_000)]), options)
    assert ("| **nightscore** |" in readme.read_text()) == is_written
    folder = tmp_path / ("benchmarks" if is_written else "work")
    assert (folder / "2026-11-21-peers-photos-2-cores-avx2.md").exists()
