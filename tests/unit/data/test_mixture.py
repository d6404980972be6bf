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
from internevo.data.source import Saved, ShuffledRows
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
    _, position = read(limited, limited.start_position(), [5, 3])
    with pytest.raises(DataError, match="every source of data.mixture has ended: increase their epochs"):
        read(limited, position, [1])
    more, _ = read(mixture([1, 1], [4, 4], [1, 2]), position, [4])
    assert [part for part, _ in more] == [1] * 4


@settings(max_examples=60, deadline=None)
@given(data=st.data(), older=st.booleans(), first=st.integers(0, 150))
def test_after_any_change_each_part_has_its_share_and_continues_where_it_was(
    data: st.DataObject, older: bool, first: int
) -> None:
    """Parts come and go, and are renamed; weights change; parts that had ended are given more epochs. None waits for its turn
    or makes up for what it has missed, and none repeats or leaves out a row."""
    sizes = st.integers(1, 30)
    weights = st.sampled_from([0.001, 0.1, 0.5, 1.0, 3.0, 50.0])
    before = [
        data.draw(st.tuples(st.just(f"part{n}"), st.just(n), sizes, weights, st.sampled_from([None, 0.5, 1.0, 2.0])))
        for n in range(data.draw(st.integers(1, 4)))
    ]
    known = [
        (data.draw(st.sampled_from([name, name + "b"])), seed, size, data.draw(weights), None)
        for name, seed, size, *_ in before
    ]
    new = [(f"new{n}", 10 + n, data.draw(sizes), data.draw(weights), None) for n in range(2)]
    after = data.draw(st.lists(st.sampled_from([*known, *new]), min_size=1, unique=True))

    def make(parts: list[Any]) -> Mixture:
        return Mixture([
            Part(name, ShuffledRows(Numbered(4, 50, seed, rows=size), seed, epochs=epochs), weight)
            for name, seed, size, weight, epochs in parts
        ])  # fmt: skip

    old, source = make(before), make(after)
    seen: dict[int, list[int]] = {seed: [] for _, seed, *_ in before}
    position = old.start_position()
    for _ in range(first):
        try:
            rows, position = read(old, position, [1])
        except DataError:
            break  # all parts have ended
        seen[before[rows[0][0]][1]].append(rows[0][1])
    if older and all(name in dict(entry[:2] for entry in before) for name, *_ in after):  # by their names alone
        position = {name: entry[:2] for name, entry in position.items()}
    if source.fingerprint() != old.fingerprint():
        position = source.continue_from(Saved(position, old.fingerprint())).position
    rows, _ = read(source, position, data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    shares, total = Counter(part for part, _ in rows), sum(weight for *_, weight, _ in after)
    for number, (_, seed, size, weight, _) in enumerate(after):
        assert abs(shares[number] - len(rows) * weight / total) <= len(after)
        had = seen.get(seed, [])
        order = ShuffledRows(Numbered(4, 50, seed, rows=size), seed)
        wanted = order.next_rows(len(had), shares[number], range(shares[number])).rows
        assert [row for part, row in rows if part == number] == [int(row.tokens[0]) for row in wanted]


def test_a_source_alone_continues_where_it_was_as_a_part_and_a_part_alone() -> None:
    part = mixture([1], [50], [None]).parts[0]
    alone = part.source.next_rows(0, 20, range(20)).position
    both = mixture([1, 3], [50, 20], [None, None])
    continued = both.continue_from(Saved(alone, part.source.fingerprint()))
    assert continued.how == "where it was (part0), at the beginning of what is new (part1)"
    seen, position = read(both, continued.position, [12])
    order = part.source.next_rows(20, 3, range(3)).rows
    assert [row for number, row in seen if number == 0] == [int(row.tokens[0]) for row in order]
    back = part.source.continue_from(Saved(position, both.fingerprint()))
    assert (back.position, back.how) == (23, "where it was")
    others = Mixture([Part("part0", ShuffledRows(Numbered(4, 50, 9), 9), 1)])
    told = others.continue_from(Saved(position, both.fingerprint()))
    assert told.how == "after 23 rows (part0); no longer used: part1"


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
