"""The picture of a pipeline's timeline."""

import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internevo.observe.timeline import COLOURS, draw

GOOD: dict[str, Any] = {
    "schedule": "ZBV", "chunks": 2, "micro_batches": 1, "idle": 0.25, "idle_played": 0.2,
    "ranks": [
        [["F", 0, 0, 0.0, 0.1], ["send", 0, 0, 0.1, 0.101], ["wait", 2, 0, 0.101, 0.2], ["F", 3, 0, 0.2, 0.3],
         ["W", 3, 0, 0.3, 0.4]],
        [["wait", 0, 0, -0.05, 0.11], ["F", 1, 0, 0.11, 0.15], ["F", 2, 0, 0.15, 0.19]],
    ],
}  # fmt: skip


def test_every_pass_and_message_is_drawn_in_the_colour_of_its_kind_and_chunk() -> None:
    svg = draw(GOOD)
    ElementTree.fromstring(svg)
    boxes = re.findall(r'fill="(#\w+)"[^>]*><title>([^<]*)</title>', svg)
    assert len(boxes) == 8
    assert (COLOURS["F"][0], "forward, stage 0, micro-batch 0: 100.00 ms") in boxes
    assert (COLOURS["F"][1], "forward, stage 3, micro-batch 0: 100.00 ms") in boxes
    assert (COLOURS["wait"][0], "wait for a message, stage 0, micro-batch 0: 110.00 ms") in boxes  # from the first pass on
    assert "ranks are idle 25.0% of the time (simulated: 20.0%)" in svg
    assert ">stages 0, 3<" in svg and ">400<" in svg  # the axis ends at 400 ms


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F", "wait", "<b>", ""]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(sorted(GOOD)), inner),
    max_leaves=20,
)


@given(key=st.sampled_from(sorted(GOOD)), value=anything)
def test_a_damaged_timeline_is_refused_or_drawn_as_text(key: str, value: Any) -> None:
    try:
        svg = draw({**GOOD, key: value})
    except ValueError:
        return
    ElementTree.fromstring(svg)


def test_a_timeline_without_passes_is_refused() -> None:
    with pytest.raises(ValueError, match="not the timeline of a pipeline"):
        draw({})
