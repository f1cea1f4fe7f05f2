"""Charts show what they are given, within their frame."""

from __future__ import annotations

import re

from umbel_simulations.charts import BOTTOM, HEIGHT, TOP, Series, line_chart


def test_a_loss_below_zero_is_drawn_within_the_frame() -> None:
    """A likelihood's logarithm may be: its best round lay above the axes."""
    chart = line_chart([Series("loss", [(1.0, -0.5), (2.0, -3.0)])], x_label="round", y_label="loss")
    heights = [float(y) for y in re.findall(r'cy="([-0-9.]+)"', chart)]
    assert len(heights) == 2
    assert all(TOP <= y <= HEIGHT - BOTTOM for y in heights)
