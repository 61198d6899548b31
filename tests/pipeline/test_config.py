"""Job files: what is accepted, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.gate import MIN_ROWS
from pipeline.errors import ConfigError
from pipeline.job_file import load_job, parse_date
from tests.pipeline.config_cases import GOOD, complaint, load


def test_a_short_file_gets_the_defaults(tmp_path: Path) -> None:
    job = load(tmp_path, GOOD)
    assert job.input.partition == "dt={date}"
    assert job.shard_rows == 1_048_576
    assert job.limits.max_quarantined == 0.01
    assert job.engine.batch_size is None


def test_shards_of_images_are_smaller(tmp_path: Path) -> None:
    text = GOOD.replace('features:\n    columns: ["f*"]', "images: {column: image}")
    assert load(tmp_path, text).shard_rows == 1_024
    assert load(tmp_path, text, "lanes.shard_rows=7").shard_rows == 7


@pytest.mark.parametrize("section", ["calibration", "gate"])
def test_a_job_may_not_ask_for_fewer_rows_than_int8_is_judged_by(
    tmp_path: Path, section: str
) -> None:
    asked = f"engine.{section}.rows="
    assert load(tmp_path, GOOD, f"{asked}{MIN_ROWS}")
    assert "rows" in complaint(tmp_path, GOOD, f"{asked}{MIN_ROWS - 1}")


def test_a_batch_of_more_rows_than_can_be_meant_is_refused(tmp_path: Path) -> None:
    asked = "engine.batch_size="
    assert load(tmp_path, GOOD, f"{asked}1_048_576").engine.batch_size == 1 << 20
    said = complaint(tmp_path, GOOD, f"{asked}1_000_000_000")
    assert said.endswith(f"batch_size: 1000000000; expected a number of at most {1 << 20:,}.")


def test_a_batch_of_images_is_smaller(tmp_path: Path) -> None:
    text = GOOD.replace('features:\n    columns: ["f*"]', "images: {column: image}")
    assert load(tmp_path, text, "engine.batch_size=16_384").engine.batch_size == 16_384
    said = complaint(tmp_path, text, "engine.batch_size=16_385")
    assert said.endswith("engine.batch_size: 16,385 images; expected at most 16,384.")


def test_an_unknown_key_is_named_with_its_line_and_the_likely_one(tmp_path: Path) -> None:
    text = GOOD + "limits:\n  max_quarantine: 0.1\n"
    assert complaint(tmp_path, text) == (
        "job.yaml, line 15: limits.max_quarantine: unknown key. Did you mean `max_quarantined`?"
    )


def test_an_unknown_key_like_no_other_comes_with_all_known_ones(tmp_path: Path) -> None:
    said = complaint(tmp_path, GOOD + "zzz: 1\n")
    assert said.startswith("job.yaml, line 14: zzz: unknown key. Known keys: name, description")


def test_an_unknown_key_in_an_optional_section_is_explained_too(tmp_path: Path) -> None:
    said = complaint(tmp_path, GOOD.replace('columns: ["f*"]', 'columns: ["f*"]\n    fill: 0'))
    assert said.startswith(
        "job.yaml, line 7: input.features.fill: unknown key. Known keys: columns"
    )


def test_a_missing_key_is_named_with_the_line_of_its_section(tmp_path: Path) -> None:
    said = complaint(tmp_path, GOOD.replace("  uri: out\n", "  compression: zstd\n"))
    assert said == "job.yaml, line 10: output.uri: missing; expected a value."


def test_several_problems_are_counted(tmp_path: Path) -> None:
    said = complaint(tmp_path, GOOD.replace("  uri: out\n", "  compression: gzip\n"))
    assert said.endswith("(1 more problems.)")


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("name: users", "name: Users!", "line 1: name"),
        ("name: users", "name: [users]", "line 1: name"),
        ("uri: in", "uri: 3", "line 3: input.uri"),
        ("[user_id]", "user_id", "line 4: input.passthrough"),
        ("[user_id]", "[]", "line 4: input.passthrough"),
        ('["f*"]', "[]", "line 6: input.features.columns"),
        ("head: scores", "head: logits", "line 9: model.head"),
        ("  uri: out", "  uri: out\n  compression: gzip", "line 12: output.compression"),
        (
            "instance: c6i.large",
            "instance: c6i.large\n  usd_per_hour: -1",
            "line 14: cost.usd_per_h",
        ),
        ("source: model.onnx", "source: model.onnx\n  top_k: 0", "line 9: model.top_k"),
        ("source: model.onnx", "source: model.onnx\n  size: [224]", "line 9: model.size"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(
    tmp_path: Path, old: str, new: str, where: str
) -> None:
    assert complaint(tmp_path, GOOD.replace(old, new, 1)).startswith(f"job.yaml, {where}")


def test_a_share_above_one_is_refused(tmp_path: Path) -> None:
    said = complaint(tmp_path, GOOD, "limits.max_quarantined=1.5")
    assert "limits.max_quarantined: 1.5; expected a number of at most 1." in said


@pytest.mark.parametrize("number", [".inf", ".nan"])
@pytest.mark.parametrize(
    "key",
    [
        "cost.usd_per_hour",
        "input.features.fill_missing",
        "lanes.hang_s",
        "lanes.memory_gib",
        "engine.gate.max_divergence",
        "limits.max_psi",
    ],
)
def test_numbers_are_finite(tmp_path: Path, key: str, number: str) -> None:
    assert f"{key}: {number[1:]}; expected a finite" in complaint(tmp_path, GOOD, f"{key}={number}")


def test_a_mean_is_finite(tmp_path: Path) -> None:
    assert "model.mean.1: inf" in complaint(tmp_path, GOOD, "model.mean=[1, .inf, 1]")


def test_both_kinds_of_input_or_none_are_refused(tmp_path: Path) -> None:
    both = complaint(tmp_path, GOOD, "input.images={column: image}")
    assert "expected exactly one of `images` and `features`" in both
    none = complaint(tmp_path, GOOD, "input.features=null")
    assert "expected exactly one of `images` and `features`" in none


def test_a_partition_without_a_date_is_refused(tmp_path: Path) -> None:
    said = complaint(tmp_path, GOOD, "input.partition=today")
    assert "partition: 'today' has no {date}; expected `dt={date}`" in said
    assert load(tmp_path, GOOD, "input.partition=null").input.partition is None


@pytest.mark.parametrize(
    ("read", "partition", "written"),
    [
        ("in", "null", "in/scores"),
        ("in", "null", "in"),
        ("in/", "null", "./in/../in/"),
        ("file:///data/in", "null", "/data/in/scores"),
        ("/", "null", "/scores"),
        ("s3://lake/in", "null", "s3://lake/in/scores"),
        ("s3://lake", "null", "s3://lake/scores/"),
        ("in", "users/dt={date}", "in"),
        ("in", "dt={date}", "in/dt={date}"),
    ],
)
def test_what_is_written_is_not_read_the_next_night(
    tmp_path: Path, read: str, partition: str, written: str
) -> None:
    said = complaint(
        tmp_path,
        GOOD,
        *(f"input.uri={read}", f"input.partition={partition}", f"output.uri={written}"),
    )
    assert "output.uri: below what `input` reads" in said


def test_copies_for_delta_are_not_read_either(tmp_path: Path) -> None:
    said = complaint(tmp_path, GOOD, "input.partition=null", "output.delta=in/table")
    assert "output.delta: below what `input` reads" in said


@pytest.mark.parametrize(
    ("read", "partition", "written"),
    [
        ("in", "dt={date}", "in"),
        ("in", "dt={date}", "in/scores"),
        ("in", "null", "in-scores"),
        ("in", "null", "in/_scores"),
        ("in/rows", "null", "in"),
        ("s3://lake/in", "null", "s3://lake/in2"),
        ("s3://lake/in", "null", "in"),
        ("in", "null", "s3://lake/in"),
    ],
)
def test_an_output_that_is_not_read_may_be_beside_or_below(
    tmp_path: Path, read: str, partition: str, written: str
) -> None:
    load(
        tmp_path,
        GOOD,
        *(f"input.uri={read}", f"input.partition={partition}", f"output.uri={written}"),
    )


def test_a_passthrough_column_cannot_have_the_name_of_an_output(tmp_path: Path) -> None:
    said = complaint(tmp_path, GOOD, "input.passthrough=[user_id, score]")
    assert "`score`" in said
    assert load(tmp_path, GOOD, "input.passthrough=[user_id, class_id]")
    said = complaint(tmp_path, GOOD, "input.passthrough=[class_id]", "model.head=classes")
    assert "`class_id`" in said


def test_a_passthrough_column_cannot_be_there_twice(tmp_path: Path) -> None:
    assert "twice" in complaint(tmp_path, GOOD, "input.passthrough=[user_id, user_id]")


def test_overrides_replace_and_add(tmp_path: Path) -> None:
    job = load(tmp_path, GOOD, "output.uri=/elsewhere", "lanes.threads=3", "model.mean=[1, 2, 3]")
    assert job.output.uri == "/elsewhere"
    assert job.lanes.threads == 3
    assert job.model.mean == (1.0, 2.0, 3.0)


def test_the_last_override_of_a_key_counts(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD, "lanes.threads=3", "lanes.threads=4").lanes.threads == 4


def test_an_override_may_contain_an_equals_sign(tmp_path: Path) -> None:
    job = load(tmp_path, GOOD, "input.partition=day={date}")
    assert job.input.partition == "day={date}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("output.uri", "no `=`; expected dotted.key=value"),
        ("=x", "no `=`; expected dotted.key=value"),
        ("name.first=x", "`name` is a value; expected a section"),
        ("output.uri=[", "the value is not YAML"),
        ("output.url=x", "output.url: unknown key. Did you mean `uri`?"),
    ],
)
def test_a_wrong_override_is_explained(tmp_path: Path, override: str, said: str) -> None:
    assert said in complaint(tmp_path, GOOD, override)


def test_a_section_left_empty_in_the_file_can_be_overridden(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD + "lanes:\n", "lanes.threads=2").lanes.threads == 2


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file or directory; expected a job file\. See"):
        load_job(str(tmp_path / "none.yaml"))


def test_a_folder_is_no_job_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory; expected a job file"):
        load_job(str(tmp_path))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "expected a mapping such as `name: ...`" in complaint(tmp_path, text)


def test_broken_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    said = complaint(tmp_path, "name: users\ninput: {uri: in\nmodel:\n")
    assert said.startswith("job.yaml, line 3: ")
    assert said.endswith("expected YAML.")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nlimits: {min_rows: 5}\nlimits:\n  max_usd: 1\n", "line 3: limits"),
        ("input:\n  uri: a\n  uri: b\n", "line 3: uri"),
        ("input:\n- [{a: 1, a: 2}]\n", "line 2: a"),
        ('{"name": "a", name: b}', "line 1: name"),
    ],
)
def test_a_key_that_is_there_twice_is_refused_with_its_line(
    text: str, said: str, tmp_path: Path
) -> None:
    assert complaint(tmp_path, text).startswith(f"job.yaml, {said}: a second time")


def test_a_section_that_is_used_twice_by_its_name_or_is_within_itself_has_no_key_twice(
    tmp_path: Path,
) -> None:
    shared = "unknown: &a {b: 1, c: *a}\nother: {<<: *a, b: 2}\n"
    assert "unknown key" in complaint(tmp_path, GOOD + shared)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_job(str(tmp_path / "job.yaml"))


def test_control_characters_are_no_yaml(tmp_path: Path) -> None:
    assert "expected YAML" in complaint(tmp_path, "name: a\x00b\n")


def test_a_job_cannot_be_changed(tmp_path: Path) -> None:
    job = load(tmp_path, GOOD)
    with pytest.raises(ValueError, match="frozen"):
        job.name = "other"  # type: ignore[misc]


def test_dates_are_iso() -> None:
    assert parse_date("2026-11-20") == "2026-11-20"
    for text in ("2026-02-30", "yesterday", "", "20.11.2026", "2026-11-20T00:00"):
        with pytest.raises(ConfigError, match="expected an ISO date such as 2026-11-20"):
            parse_date(text)


@pytest.mark.parametrize("key", ["input.uri", "output.uri", "output.delta", "engine.store"])
@pytest.mark.parametrize("path", ["night//out", "/night/out", "night/./out", "night/in/../out"])
def test_an_address_of_a_bucket_has_names_only(tmp_path: Path, key: str, path: str) -> None:
    said = complaint(tmp_path, GOOD, f"{key}=s3://{path}")
    expected = "; expected `s3://bucket/prefix` with names only: no `//`, `.` or `..`."
    assert f"{key}: 's3://{path}'{expected}" in said


@pytest.mark.parametrize("address", ["s3://night/a..b/.c/", "./out", "../out//x", "file:///a/./b"])
def test_other_addresses_are_fine(tmp_path: Path, address: str) -> None:
    assert load(tmp_path, GOOD, f"output.uri={address}").output.uri == address


@pytest.mark.parametrize("partition", ["a//dt={date}", "./dt={date}"])
def test_so_has_what_a_partition_makes_of_it(tmp_path: Path, partition: str) -> None:
    overrides = (f"input.partition={partition}", "input.uri=s3://night/in")
    assert "expected names only, no `//` or `.`" in complaint(tmp_path, GOOD, *overrides)
    assert load(tmp_path, GOOD, overrides[0]).input.partition == partition


@pytest.mark.parametrize("source", ["s3://night/model.onnx", "https://example.com/model.pt"])
def test_a_model_is_a_file_on_this_machine(tmp_path: Path, source: str) -> None:
    said = complaint(tmp_path, GOOD, f"model.source={source}")
    assert f"model.source: '{source}'; expected a file on this machine, or `module:" in said
