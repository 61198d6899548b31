"""What a mail says: all of it in both forms, safe in a header and in a page, small enough."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flows.mailing.history import changes, nights_chart
from flows.mailing.html import render_html
from flows.mailing.letter import Chart, Facts, Letter, Notes
from flows.mailing.message import compose, message_id_of
from flows.mailing.night import Stop, published_letter, stopped_letter, warning_letter
from flows.mailing.text import NAME_COLUMNS, WIDTH, render_plain
from pipeline.config import MailSection
from pipeline.errors import ConfigError, GuardError
from pipeline.history import HistoryRow
from pipeline.report import Price, QuarantineSample, UnreadableFile
from pipeline.run import Night
from tests.flows.mail_cases import DATE, REPORT, mail_job, mail_section, nights

HOSTILE = (
    """'"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\r\nBcc: you@x.com\x1b\ud800"""
)
ALLOWED = {"html", "head", "meta", "title", "style", "body", "table", "tr", "td", "div", "h1", "h2"}
CLIPPED_BYTES = 102_000
"""Gmail shows no more of a mail."""


class Page(HTMLParser):
    """What a client would see: tags, attributes, text; and which tags are still open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def squeezed(text: str) -> str:
    """Without white space: plain text breaks its lines."""
    return re.sub(r"\s+", "", text)


def a_letter() -> Letter:
    return published_letter(REPORT, nights())


def stopped(
    error: BaseException,
    said: str = "It failed.",
    *,
    is_published: bool = False,
    history: Sequence[HistoryRow] = (),
    **how: Any,
) -> Letter:
    night = Night(job=mail_job(Path("nowhere")), date=DATE, **how)
    return stopped_letter(night, Stop(error=error, said=said, is_published=is_published), history)


def said_by(letter: Letter) -> list[str]:
    """Every piece of text of a letter."""
    said = [letter.headline, letter.lead, letter.eyebrow]
    said += [text for tile in letter.tiles for text in (tile.name, tile.value, tile.note)]
    for block in letter.blocks:
        match block:
            case Notes():
                said += block.notes
            case Facts():
                said += [block.lead, *(text for fact in block.facts for text in fact)]
            case Chart():
                said += [block.lead, *block.heads]
                said += [text for bar in block.bars for text in (bar.name, *bar.cells)]
    return said


@pytest.mark.parametrize(
    "fact",
    [
        "39,992 of 40,000 rows scored, 8 quarantined",
        "1,449 while scoring",
        "$0.0104 per 100,000 rows",
        "34% above the median of the last seven nights",
        "examples per second: 1,360, now 937 (-31.1%)",
        "engine: tensorrt fp16 e5a94f3e, now tensorrt int8 b83d7705",
        "price: $0.330 an hour, now $0.352 an hour",
        "building the engine",
        "idle and other",
        "replay",
        "from and to (last attempt)",
        "2026-11-21 02:00:00 to 02:00:42 UTC",
        "42.7 s (all attempts)",
        "phases (last attempt)",
        "1 interruption; 1,024 rows scored twice",
        "No stage was busy nearly all the time; decode most of all: 83.5% of its time.",
        "engine with copies",
        "the gap cost $0.00175 per 100,000 rows",
        "35.3 J per 1,000 rows (GPU alone)",
        "row_group_damaged",
        "part-00003.parquet, row 12,000 to 12,001",
        "f17 is null; expected a number, or `fill_missing`",
        "stability index: scores 0.131 (a minor shift); against 3 nights since 2026-11-17",
        "0.9961 with fp32 on 32 rows of this night",
        "g6.xlarge, spot, $0.3517 an hour (USD) as of 2026-11-01",
        "s3://lake/scores/users/dt=2026-11-20/_report.html",
    ],
)
def test_the_mail_has_what_the_morning_wants_to_know(fact: str) -> None:
    assert squeezed(fact) in squeezed(" ".join(Page(render_html(a_letter())).texts))
    assert squeezed(fact) in squeezed(render_plain(a_letter()))


@pytest.mark.parametrize(
    "letter",
    [
        a_letter(),
        stopped(GuardError("rows", "None."), "None.", history=nights()),
        warning_letter("users", "late", "one\ntwo"),
    ],
    ids=["published", "stopped", "warning"],
)
def test_both_forms_say_everything(letter: Letter) -> None:
    html, text = Page(render_html(letter)), squeezed(render_plain(letter))
    for said in said_by(letter):
        assert not said or said in html.texts
        assert squeezed(said) in text


def test_rows_that_a_requeue_took_over_are_said_to_be_in_no_figure() -> None:
    report = dataclasses.replace(REPORT, rows_taken_over=38_000)
    tonight = dataclasses.replace(nights()[-1], rows_taken_over=38_000)
    said = said_by(published_letter(report, (*nights()[:-1], tonight)))
    shards = "40, 12 of them from an earlier attempt or version"
    assert f"{shards} (38,000 rows of the version before: in no rate or price)" in said
    assert "rows taken over: none, now 38,000; in no rate or price" in said


def test_what_a_client_may_refuse_is_not_needed() -> None:
    page = Page(render_html(a_letter()))
    assert page.open == []
    assert page.tags <= ALLOWED
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "background", "onload", "id"}
    assert "url(" not in render_html(a_letter())


def test_every_colour_is_inline_and_has_another_for_the_night() -> None:
    html = render_html(a_letter())
    used = {name for classes in re.findall(r'class="([^"]+)"', html) for name in classes.split()}
    (night,) = re.findall(r"<style>(.*)</style>", html)
    assert used <= set(re.findall(r"\.([a-z-]+){", night))
    assert len(re.findall(r'class="', html)) == len(
        re.findall(r'class="[^"]+" style="[^"]+"', html)
    )


def hostile_letter() -> Letter:
    engine = dataclasses.replace(REPORT.engine, key=HOSTILE, runtime=HOSTILE, precision=HOSTILE)
    price = Price(instance=HOSTILE, market=HOSTILE, usd_per_hour=1.0, source=HOSTILE, as_of=HOSTILE)
    texts: dict[str, Any] = dict.fromkeys(
        ("run_id", "job", "date", "bottleneck", "device", "output", "manifest"), HOSTILE
    )
    report = dataclasses.replace(
        REPORT,
        **texts,
        engine=engine,
        cost=dataclasses.replace(REPORT.cost, price=price),
        stages={HOSTILE: REPORT.stages["decode"]},
        quarantined_by_reason={HOSTILE: 8},
        quarantine_samples=(
            QuarantineSample(file=HOSTILE, row=1, reason=HOSTILE, message=HOSTILE * 20),
        ),
        unreadable_files=(
            UnreadableFile(path=HOSTILE, num_bytes=1, version=HOSTILE, message=HOSTILE),
        ),
        accepted=(HOSTILE,),
        alerts=(dataclasses.replace(REPORT.alerts[0], text=HOSTILE),),
    )
    row = dataclasses.replace(nights()[-1], run_id=HOSTILE, engine_key=HOSTILE, instance=HOSTILE)
    return published_letter(report, (nights()[-2], row))


@pytest.mark.parametrize(
    "letter",
    [
        hostile_letter(),
        stopped(ConfigError("x"), HOSTILE),
        warning_letter("users", HOSTILE, HOSTILE),
    ],
    ids=["published", "stopped", "warning"],
)
def test_what_comes_from_data_is_text_in_the_page_and_in_the_headers(letter: Letter) -> None:
    page = Page(render_html(letter))
    assert page.tags <= ALLOWED
    assert "onerror" not in {name for name, _ in page.attributes}
    message = sent(letter)
    assert message["Bcc"] is None
    assert "<script>" in message["Subject"] or "<script>" in "".join(page.texts)
    assert set(message.keys()) == set(sent(a_letter()).keys())
    assert "\x1b" not in render_plain(letter)


def sent(letter: Letter, **changes: Any) -> EmailMessage:
    """As a client reads it from the wire."""
    section = MailSection.model_validate(mail_section(**changes))
    data = compose(letter, section, message_id_of(section, "night-1")).as_bytes()
    message = message_from_bytes(data, policy=default)
    assert isinstance(message, EmailMessage)
    assert not message.defects
    return message


def test_the_message_has_both_forms_the_plain_one_first() -> None:
    message = sent(a_letter())
    assert message.get_content_type() == "multipart/alternative"
    kinds = [part.get_content_type() for part in message.iter_parts()]
    assert kinds == ["text/plain", "text/html"]
    forms = [part.get_content().replace("\r\n", "\n") for part in message.iter_parts()]
    assert forms == [render_plain(a_letter()), render_html(a_letter())]
    assert message["Message-ID"] == "<night-1@example.com>"
    assert message["Auto-Submitted"] == "auto-generated"


def test_names_and_subjects_may_be_in_any_script() -> None:
    letter = warning_letter("users", "Nacht \N{LATIN SMALL LETTER U WITH DIAERESIS}ber \u591c", "-")
    sender = "Z\N{LATIN SMALL LETTER U WITH DIAERESIS}rich <score@example.com>"
    message = sent(letter, **{"from": sender})
    assert message["Subject"] == letter.subject
    assert (
        message["From"].addresses[0].display_name == "Z\N{LATIN SMALL LETTER U WITH DIAERESIS}rich"
    )
    assert message["From"].addresses[0].addr_spec == "score@example.com"


def test_lines_on_the_wire_are_not_too_long() -> None:
    section = MailSection.model_validate(mail_section())
    data = compose(a_letter(), section, message_id_of(section, "night-1")).as_bytes()
    _, _, body = data.partition(b"\r\n\r\n")
    assert max(map(len, body.split(b"\r\n"))) <= 78


def test_a_subject_is_one_line_however_long_the_reason() -> None:
    letter = stopped(ConfigError("x"), "word " * 400)
    assert len(letter.subject) <= 120
    assert letter.subject.endswith("...")
    assert b"Subject: [nightscore] users 2026-11-20: FAILED: word " in bytes(sent(letter))


def what_now(letter: Letter) -> dict[str, str]:
    (facts,) = [block for block in letter.blocks if block.title == "What now"]
    assert isinstance(facts, Facts)
    return dict(facts.facts)


def test_a_stopped_night_goes_on_by_the_command_that_was_stopped() -> None:
    forced = what_now(stopped(ConfigError("x"), again="all", accept=frozenset({"drift"})))
    assert forced["go on"] == f"score run JOB --date {DATE} --force --accept drift"
    assert "publish as it is" not in forced
    guarded = what_now(stopped(GuardError("rows", "x"), accept=frozenset({"scores"})))
    assert guarded["go on"] == f"score run JOB --date {DATE} --accept scores"
    assert guarded["publish as it is"] == f"{guarded['go on'].partition(' --accept')[0]}" + (
        " --accept rows --accept scores"
    )


@pytest.mark.parametrize("error", [ConfigError("x"), GuardError("rows", "x")])
def test_a_version_from_before_is_not_forgotten(error: Exception) -> None:
    assert what_now(stopped(error))["outcome"].startswith("Nothing was published.")
    again = what_now(stopped(error, again="all", is_published=True))
    assert again["outcome"].startswith("Nothing new was published.")


def test_a_busy_night_stays_below_what_clients_show() -> None:
    samples = tuple(
        dataclasses.replace(REPORT.quarantine_samples[0], row=row, message="m" * 500)
        for row in range(60)
    )
    files = tuple(
        UnreadableFile(path=f"{'p' * 80}-{i}", num_bytes=1, version="1", message="m" * 500)
        for i in range(60)
    )
    report = dataclasses.replace(REPORT, quarantine_samples=samples, unreadable_files=files)
    assert len(render_html(published_letter(report, nights(20))).encode()) < CLIPPED_BYTES


def test_the_folder_of_samples_is_only_said_where_they_have_several() -> None:
    def said(*files: str) -> str:
        sample = REPORT.quarantine_samples[0]
        samples = tuple(dataclasses.replace(sample, file=file, row=7) for file in files)
        report = dataclasses.replace(REPORT, quarantine_samples=samples)
        return render_plain(published_letter(report, nights()))

    one = said("dt=2026-11-20/part-0.parquet", "dt=2026-11-20/part-1.parquet")
    assert "dt=2026-11-20/part-0" not in one
    assert "part-0.parquet, row 7" in one
    assert "dt=2026-11-20/ch/part-0.parquet, row 7" in said(
        "dt=2026-11-20/ch/part-0.parquet", "dt=2026-11-20/de/part-0.parquet"
    )


def test_the_plain_form_is_narrow() -> None:
    wide = [line for line in render_plain(a_letter()).splitlines() if len(line) > WIDTH]
    assert not any(" " in line[NAME_COLUMNS:] for line in wide)  # an address stays in one piece


def test_the_longest_bar_is_the_fastest_night_and_tonight_stands_out() -> None:
    chart = nights_chart(nights(20), DATE)
    assert chart is not None
    assert len(chart.bars) == 14
    fastest = max(nights(20)[-14:], key=lambda row: row.examples_per_sec)
    (longest, *_) = [bar.name for bar in chart.bars if bar.share == 1]
    assert longest == fastest.date[5:]
    assert [bar.name for bar in chart.bars if bar.is_strong] == [DATE[5:]]


def test_large_numbers_stay_narrow_in_the_chart() -> None:
    row = dataclasses.replace(nights()[-1], rows=123_456_789, quarantined=54_321)
    chart = nights_chart([row], DATE)
    assert chart is not None
    assert chart.bars[0].cells[2:] == ("123M", "54.3k")


def test_a_night_that_is_missing_is_named_unless_the_job_runs_now_and_then() -> None:
    rows = nights()
    daily = nights_chart((*rows[:5], *rows[6:]), DATE)
    weekly = nights_chart(nights(50)[::-7][::-1], DATE)
    assert daily is not None
    assert weekly is not None
    assert daily.lead.endswith(f"Not published: {rows[5].date}.")
    assert "Not published" not in weekly.lead


def test_a_summary_has_a_table_that_is_not_endless() -> None:
    dates = "\n".join(f"2026-{i:04}  published  {'w' * 200}" for i in range(366))
    letter = warning_letter("users", "backfill: 366 published", f"All is done.\n\n{dates}")
    notes, table = letter.blocks
    assert isinstance(notes, Notes)
    assert isinstance(table, Facts)
    assert notes.notes == ("All is done.",)
    assert table.facts[0] == ("2026-0000", f"published  {'w' * 200}")
    assert table.facts[-1] == ("...", "and 266 more")
    assert len(render_html(letter).encode()) < CLIPPED_BYTES


def test_a_first_night_has_nothing_to_be_compared_with() -> None:
    letter = published_letter(REPORT, nights(1))
    assert not any(block.title.startswith("Since") for block in letter.blocks)
    assert "The only night" in [block.title for block in letter.blocks]


def test_without_a_history_the_rest_is_told() -> None:
    titles = [block.title for block in published_letter(REPORT, ()).blocks]
    assert not any("night" in title for title in titles)
    assert {"What it cost", "What was odd", "This run"} <= set(titles)


def test_two_equal_nights_are_told_to_be_equal() -> None:
    row = nights()[-1]
    assert changes(row, row).notes[-1] == "engine, model, device, machine, price: as before"
