"""Charts show what they are given, within their frame."""

from __future__ import annotations

import re

from umbel_simulations.charts import BOTTOM, HEIGHT, TOP, Series, line_chart


def labels(chart: str, anchor: str) -> list[str]:
    """What stands at the ticks: of x in the middle, of y at their end."""
    return re.findall(rf'class="tick"[^>]*text-anchor="{anchor}">([^<]*)<', chart)


def chart(*lines: Series, **how: tuple[float, float]) -> str:
    return line_chart(lines, x_label="hours", y_label="<loss>", **how)


def test_ticks_are_round_numbers_that_can_be_told_apart() -> None:
    """Also where all that there is happened late: at hour 150 all ticks once said 150."""
    late = chart(Series("a", [(150.2, 0.5)]), y_range=(0.0, 1.0))
    assert labels(late, "middle") == ["149.8", "150", "150.2", "150.4", "150.6"]
    assert labels(late, "end") == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    many = chart(Series("a", [(1.0, 0.0), (999.7, 250_000.0)]))
    assert labels(many, "middle") == ["200", "400", "600", "800"]
    assert labels(many, "end") == ["0", "50000", "100000", "150000", "200000", "250000"]
    assert "<title>a: 999.7, " in many


def test_lines_are_told_apart_where_there_are_several() -> None:
    one = Series("<b>", [(0.0, 1.0)])
    assert "<b>" not in chart(one) and chart(one).count("&lt;b&gt;") == 1, "the dot's title"
    assert chart(one, Series("empty", [])) == chart(one)
    assert "Nothing to draw" in chart(Series("empty", []))
    long = [Series(f"a rather long name {place}", one.points) for place in range(6)]
    assert [re.findall(r'viewBox="0 (\S+) 640 (\S+)"', chart(*long[:count])) for count in (1, 2, 6)] == [
        [("0", "260")], [("-18", "278")], [("-36", "296")],
    ]  # fmt: skip


def test_a_loss_below_zero_is_drawn_within_the_frame() -> None:
    """A likelihood's logarithm may be: its best round lay above the axes."""
    drawn = chart(Series("loss", [(1.0, -0.5), (2.0, -3.0)]))
    heights = [float(y) for y in re.findall(r'cy="([-0-9.]+)"', drawn)]
    assert len(heights) == 2
    assert all(TOP <= y <= HEIGHT - BOTTOM for y in heights)
