"""Mixtures: shares are exact, every source keeps its own order, and a run can resume at any position."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internevo.config.data import Data
from internevo.data.build import train_source
from internevo.data.mixture import Mixture, Part
from internevo.data.rows import RandomRows, Row
from internevo.data.source import ShuffledRows
from internevo.errors import DataError
from tests.conftest import write_dataset


class Numbered(RandomRows):
    """Rows whose first token is the number of the row."""

    def __getitem__(self, number: int) -> Row:
        row = super().__getitem__(number)
        row.tokens[0] = number
        return row


def mixture(weights: list[float], sizes: list[int], epochs: list[float | None]) -> Mixture:
    parts = [
        Part(f"part{n}", ShuffledRows(Numbered(4, 50, n, rows=size), n, epochs=end), weight)
        for n, (weight, size, end) in enumerate(zip(weights, sizes, epochs, strict=True))
    ]
    return Mixture(parts)


def read(source: Mixture, position: Any, counts: list[int]) -> tuple[list[tuple[int, int]], Any]:
    """Reads batches of ``counts`` rows. Returns (part, row number) of each row, and the position after them."""
    seen = []
    for count in counts:
        found = source.next_rows(position, count, range(count))
        seen += [(int(row.types[0]), int(row.tokens[0])) for row in found.rows]
        position = json.loads(json.dumps(found.position))
    return seen, position


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 5), min_size=1, max_size=4), counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    cut=st.integers(1, 40), data=st.data(),
)  # fmt: skip
def test_shares_are_exact_for_any_sizes_of_batches(
    weights: list[float], counts: list[int], cut: int, data: st.DataObject
) -> None:
    sizes = [data.draw(st.integers(1, 30)) for _ in weights]
    source = mixture(weights, sizes, [None] * len(weights))
    seen, after = read(source, source.start_position(), counts)
    total = sum(counts)
    shares = Counter(part for part, _ in seen)
    for part, weight in enumerate(weights):
        assert abs(shares[part] - total * weight / sum(weights)) <= len(weights)
    pieces = [min(cut, total - n) for n in range(0, total, cut)]
    assert read(source, source.start_position(), pieces) == (seen, after)
    for part, size in enumerate(sizes):  # each part has its own epochs
        rows = [row for row_part, row in seen if row_part == part]
        for start in range(0, len(rows) - size + 1, size):
            assert sorted(rows[start : start + size]) == list(range(size))


def test_only_the_needed_rows_are_returned() -> None:
    source = mixture([1, 2, 0.3], [5, 7, 3], [2, None, 1])
    whole = source.next_rows(source.start_position(), 60, range(60))
    some = source.next_rows(source.start_position(), 60, [3, 59, 17])
    assert [row.tokens.tolist() for row in some.rows] == [whole.rows[n].tokens.tolist() for n in (3, 59, 17)]
    assert some.position == whole.position


def test_the_other_parts_take_the_share_of_a_part_that_has_ended() -> None:
    source = mixture([1, 1, 2], [4, 100, 3], [1.5, None, 1])
    seen, position = read(source, source.start_position(), [5, 1, 30, 4])
    shares = Counter(part for part, _ in seen)
    assert shares == {0: 6, 1: 31, 2: 3} and position["part0"][1] is None is position["part2"][1]
    limited = mixture([1, 1], [4, 4], [1, 1])
    with pytest.raises(DataError, match="every source of data.mixture has ended"):
        read(limited, limited.start_position(), [5, 5])


def test_a_part_that_is_added_later_gets_its_share_from_then_on() -> None:
    old = mixture([1, 1], [50, 50], [None, None])
    _, position = read(old, old.start_position(), [40])
    position.pop("part1")
    new = mixture([1, 1], [50, 50], [None, None])
    seen, _ = read(new, new.position_after_change(position), [20])
    assert 9 <= sum(part for part, _ in seen) <= 11


def test_the_config_gives_the_parts_their_names(tmp_path: Path) -> None:
    write_dataset(tmp_path / "books")
    parts = [
        {"folder": str(tmp_path / "books"), "weight": 3}, {"folder": str(tmp_path / "books" / "en"), "name": "more"},
        {"kind": "mocked"},
    ]  # fmt: skip
    data = Data.model_validate({"seq_len": 16, "micro_bsz": 1, "total_steps": 4, "mixture": parts})
    source = train_source(data, 97)
    assert source.types == ["books", "more", "mocked"]
    rows = source.next_rows(source.start_position(), 50, range(50)).rows
    assert Counter(int(row.types[0]) for row in rows) == {0: 30, 1: 10, 2: 10}
    assert not np.array_equal(rows[0].tokens, rows[1].tokens)
    with pytest.raises(ValueError, match="two parts have the same name"):
        Data.model_validate(
            {"seq_len": 16, "micro_bsz": 1, "total_steps": 4, "mixture": [{"kind": "mocked"}, {"kind": "mocked"}]}
        )
