"""Charts as SVG: series, ticks, colours and names."""

import xml.etree.ElementTree as ET

import pytest

from next_core.drawing import Axis, Line, Lines, Maps, Panel, Scale
from next_core.drawing.elements import label, short


def test_lines_of_one_name_share_a_series_and_its_values_are_in_the_element() -> None:
    line = Line("a <b>", [0, 10], [0.25, None], [0.2, None], [0.3, None])
    chart = Lines("two", [Panel([line]), Panel([line, Line("c", [5], [1.0])])], Axis("step", 0))
    root = ET.fromstring(chart.svg(label="what <it> shows"))
    groups = [element for element in root.iter() if element.get("data-points")]
    assert [group.get("class") for group in groups] == ["s0", "s0", "s1"]
    assert '"0.25 (0.2 to 0.3)"' in str(groups[0].get("data-points"))
    assert groups[0].get("data-name") == "a <b>"
    assert root.get("aria-label") == "what <it> shows"


@pytest.mark.parametrize(
    ("axis", "values", "ticks"),
    [
        (Axis(low=0, high=1), [0.3], [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (Axis(log=True), [1e-5, 0.1], [1e-5, 1e-4, 1e-3, 1e-2, 0.1]),
        (Axis(), [5.0, 25.0], [5.0, 10.0, 15.0, 20.0, 25.0]),
    ],
)
def test_ticks_are_round_numbers_within_the_axis(axis: Axis, values: list[float], ticks: list[float]) -> None:
    assert Scale.of(axis, values, 0, 100).ticks(5) == pytest.approx(ticks)


def test_every_cell_of_a_map_is_readable_on_its_colour() -> None:
    cells = {(layer, "q_proj"): layer / 10 - 1 for layer in range(21)}
    root = ET.fromstring(Maps("map", {"values": cells}).svg(900, "values"))
    for group in [g for g in root.iter() if g.tag.endswith("}g")]:
        _, box, number = group
        light, dark = sorted((luminance(box.get("fill")), luminance(number.get("fill"))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def luminance(colour: str | None) -> float:
    """As WCAG 2 defines it."""
    digits = str(colour).removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(
    ("name", "shown"), [("a\x00\x1b b\n", "a b"), ("\n", "(no name)"), ("x" * 100, "x" * 27 + "…")]
)
def test_names_are_made_fit_for_a_chart(name: str, shown: str) -> None:
    assert label(name) == shown


def test_numbers_have_three_digits_and_no_exponent_below_a_million() -> None:
    assert [short(value) for value in (999.4, 999.7, -1234.5)] == ["999", "1,000", "−1,234"]
