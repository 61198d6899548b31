"""Charts are well-formed SVG: lengths are the numbers, and a label says what they are."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from pipeline.charts import HEIGHT, WIDTH, Column, column_chart, histogram_chart

HOSTILE = """'"><script>alert(1)</script>&"""


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def columns(*values: float) -> list[Column]:
    return [Column(name=f"11-{i:02}", title=f"night {i}", value=v) for i, v in enumerate(values)]


def chart(*values: float, usual: float = 0.0) -> ElementTree.Element:
    return parsed(
        column_chart(columns(*values), label="rates", number=lambda v: f"{v:g}", usual=usual)
    )


def heights(svg: ElementTree.Element) -> list[float]:
    return [float(rect.attrib["height"]) for rect in svg.iter("rect")]


def test_columns_are_as_high_as_their_values() -> None:
    full, half, quarter = heights(chart(8.0, 4.0, 2.0))
    assert (half, quarter) == (pytest.approx(full / 2), pytest.approx(full / 4))


def test_the_last_column_stands_out_and_has_its_number() -> None:
    svg = chart(8.0, 4.0)
    assert [rect.attrib["class"] for rect in svg.iter("rect")] == ["column", "column now"]
    assert [text.text for text in svg.iter("text")] == ["11-00", "4", "11-01"]


def test_a_small_value_is_seen() -> None:
    assert min(heights(chart(1e9, 1.0))) >= 1


def test_the_usual_value_is_a_line_at_its_height() -> None:
    svg = chart(8.0, 4.0, usual=4.0)
    (line,) = (each for each in svg.iter("line") if each.attrib["class"] == "usual")
    last = list(svg.iter("rect"))[-1]
    assert float(line.attrib["y1"]) == pytest.approx(float(last.attrib["y"]), abs=0.01)


def test_few_nights_stand_at_the_right_as_narrow_as_many() -> None:
    (one,), seven = chart(1.0).iter("rect"), list(chart(*[1.0] * 7).iter("rect"))
    assert float(one.attrib["x"]) > WIDTH * 0.8
    assert one.attrib["x"] == seven[-1].attrib["x"]
    assert one.attrib["width"] == seven[-1].attrib["width"]


@pytest.mark.parametrize("values", [(0.0,), (0.0, 0.0), (1e-12, 1e-13), (5.0,) * 14, (1e12, 3.0)])
def test_everything_stays_in_the_picture(values: tuple[float, ...]) -> None:
    svg = chart(*values, usual=0.0)
    assert svg.attrib["viewBox"] == f"0 0 {WIDTH:g} {HEIGHT:g}"
    for rect in svg.iter("rect"):
        x, y, width, height = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
        assert x >= 0 <= y
        assert x + width <= WIDTH
        assert y + height <= HEIGHT


def test_a_chart_is_one_image_with_a_name() -> None:
    svg = chart(1.0, 2.0)
    assert (svg.tag, svg.attrib["role"], svg.attrib["aria-label"]) == ("svg", "img", "rates")
    assert [title.text for title in svg.iter("title")] == ["night 0", "night 1"]


def test_foreign_texts_stay_text() -> None:
    hostile = [Column(name=HOSTILE, title=HOSTILE, value=1.0)] * 2
    svg = parsed(column_chart(hostile, label=HOSTILE, number=lambda _: HOSTILE, usual=1.0))
    assert svg.attrib["aria-label"] == HOSTILE
    assert {element.tag for element in svg.iter()} <= {"svg", "line", "rect", "text", "title"}


def test_a_histogram_draws_this_night_and_outlines_the_others() -> None:
    svg = parsed(histogram_chart((0.0, 0.6, 0.4), (0.3, 0.3, 0.4), label="scores", ends=("0", "1")))
    first, second = heights(svg)
    assert second == pytest.approx(first * 2 / 3, abs=0.01)
    (path,) = svg.iter("path")
    assert path.attrib["d"].count("H") == 3
    assert [text.text for text in svg.iter("text")] == ["0", "1"]
    alone = parsed(histogram_chart((0.0, 1.0), (), label="scores", ends=("0", "1")))
    assert not list(alone.iter("path"))
