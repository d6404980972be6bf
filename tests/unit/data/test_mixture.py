"""Mixtures: shares are exact, every source keeps its own order, and any place is enough to go on."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internevo.config.data import Data
from internevo.data.build import train_source
from internevo.data.mixture import Mixture, Part
from internevo.data.rows import RandomRows
from internevo.data.source import Shuffled
from internevo.errors import DataError
from tests.conftest import write_dataset


class Numbered(RandomRows):
    """Rows that say their number."""

    def __getitem__(self, number):
        row = super().__getitem__(number)
        row.tokens[0] = number
        return row


def mixture(weights, sizes, epochs):
    parts = [
        Part(f"part{n}", Shuffled(Numbered(4, 50, n, rows=size), n, epochs=end), weight)
        for n, (weight, size, end) in enumerate(zip(weights, sizes, epochs, strict=True))
    ]
    return Mixture(parts)


def taken(source, place, counts):
    """(source, row) of each row, taken in batches; and the place behind."""
    seen = []
    for count in counts:
        got = source.take(place, count, range(count))
        seen += [(int(row.types[0]), int(row.tokens[0])) for row in got.rows]
        place = json.loads(json.dumps(got.place))
    return seen, place


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 5), min_size=1, max_size=4), counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    cut=st.integers(1, 40), data=st.data(),
)  # fmt: skip
def test_shares_are_exact_and_batches_do_not_matter(weights, counts, cut, data):
    sizes = [data.draw(st.integers(1, 30)) for _ in weights]
    source = mixture(weights, sizes, [None] * len(weights))
    seen, behind = taken(source, source.start(), counts)
    total = sum(counts)
    shares = Counter(part for part, _ in seen)
    for part, weight in enumerate(weights):
        assert abs(shares[part] - total * weight / sum(weights)) <= len(weights)
    pieces = [min(cut, total - n) for n in range(0, total, cut)]
    assert taken(source, source.start(), pieces) == (seen, behind)
    for part, size in enumerate(sizes):  # in epochs of its own
        rows = [row for of, row in seen if of == part]
        for start in range(0, len(rows) - size + 1, size):
            assert sorted(rows[start : start + size]) == list(range(size))


def test_only_the_rows_that_are_asked_for_are_made_and_they_are_the_right_ones():
    source = mixture([1, 2, 0.3], [5, 7, 3], [2, None, 1])
    whole = source.take(source.start(), 60, range(60))
    some = source.take(source.start(), 60, [3, 59, 17])
    assert [row.tokens.tolist() for row in some.rows] == [whole.rows[n].tokens.tolist() for n in (3, 59, 17)]
    assert some.place == whole.place


def test_a_source_that_has_ended_leaves_its_share_to_the_others():
    source = mixture([1, 1, 2], [4, 100, 3], [1.5, None, 1])
    seen, place = taken(source, source.start(), [5, 1, 30, 4])
    shares = Counter(part for part, _ in seen)
    assert shares == {0: 6, 1: 31, 2: 3} and place["part0"][1] is None is place["part2"][1]
    limited = mixture([1, 1], [4, 4], [1, 1])
    with pytest.raises(DataError, match="every source of data.mixture has ended"):
        taken(limited, limited.start(), [5, 5])


def test_parts_that_come_later_begin_level_with_the_others():
    old = mixture([1, 1], [50, 50], [None, None])
    _, place = taken(old, old.start(), [40])
    place.pop("part1")
    new = mixture([1, 1], [50, 50], [None, None])
    seen, _ = taken(new, new.after_change(place), [20])
    assert 9 <= sum(part for part, _ in seen) <= 11


def test_a_config_names_the_parts(tmp_path):
    write_dataset(tmp_path / "books")
    data = Data(
        seq_len=16, micro_bsz=1, total_steps=4,
        mixture=[
            {"folder": str(tmp_path / "books"), "weight": 3}, {"folder": str(tmp_path / "books" / "en"), "name": "more"},
            {"kind": "mocked"},
        ],
    )  # fmt: skip
    source = train_source(data, 97)
    assert source.types == ["books", "more", "mocked"]
    rows = source.take(source.start(), 50, range(50)).rows
    assert Counter(int(row.types[0]) for row in rows) == {0: 30, 1: 10, 2: 10}
    assert not np.array_equal(rows[0].tokens, rows[1].tokens)
    with pytest.raises(ValueError, match="two parts have the same name"):
        Data(seq_len=16, micro_bsz=1, total_steps=4, mixture=[{"kind": "mocked"}, {"kind": "mocked"}])
