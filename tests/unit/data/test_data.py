"""Rows and batches: no token is lost, and the order does not depend on the ranks."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from internevo.config.data import Data
from internevo.data.batches import BatchSizes, Cursor, TrainBatches, parse_skip_batches, valid_batches
from internevo.data.order import Order
from internevo.data.rows import IGNORE, PackedRows, PaddedRows, RandomRows, WholeRows
from internevo.data.source import ShuffledRows
from internevo.data.tokenized.files import MASKED_ZERO
from internevo.data.tokenized.index import open_index
from internevo.errors import DataError
from tests.unit.data.writers import DOCUMENTS, write_binary, write_json


@settings(max_examples=60, deadline=None)
@given(
    documents=DOCUMENTS,
    seq_len=st.integers(2, 50),
    minimum=st.integers(0, 9),
    files=st.integers(1, 3),
    as_json=st.booleans(),
)
def test_packing_keeps_every_token_and_predicts_only_within_documents(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], seq_len: int, minimum: int, files: int, as_json: bool
) -> None:
    folder = tmp_path_factory.mktemp("packing")
    for n in range(files):
        part = documents[n::files]
        write = write_json if as_json else (lambda path, d: write_binary(path, d, 501))
        write(folder / f"type{n}" / "a.bin", part)
    kept = [d for n in range(files) for d in documents[n::files] if len(d) >= minimum]
    assume(kept)
    rows = PackedRows(open_index(folder, minimum), seq_len, 501)
    assert len(rows) == -(-sum(map(len, kept)) // seq_len)
    found = [rows[n] for n in range(len(rows))]
    stream = [t for d in kept for t in d]
    assert np.concatenate([r.tokens for r in found])[: len(stream)].tolist() == stream
    labels = [t for d in kept for t in [*d[1:], IGNORE]]
    labels += [IGNORE] * (len(rows) * seq_len - len(stream))
    assert np.concatenate([r.labels for r in found]).tolist() == labels
    starts = np.cumsum([0, *map(len, kept)])
    for n, row in enumerate(found):
        wanted = {int(s) - n * seq_len for s in starts if n * seq_len < s < (n + 1) * seq_len} | {0}
        assert set(row.document_starts) == wanted


@settings(max_examples=60, deadline=None)
@given(documents=DOCUMENTS, seq_len=st.integers(2, 50))
def test_rows_of_whole_documents_split_only_those_that_fit_in_no_row(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], seq_len: int
) -> None:
    folder = tmp_path_factory.mktemp("whole")
    write_binary(folder / "en" / "a.bin", documents, 501)
    documents = [document for document in documents if document]
    assume(documents)
    rows = WholeRows(open_index(folder), seq_len, 501)
    pieces, filled = [], []
    for number in range(len(rows)):
        row = rows[number]
        ends = [*row.document_starts[1:], seq_len]
        spans = list(zip(row.document_starts, ends, strict=True))
        start, stop = rows._span(number)
        filled.append(stop - start)
        for a, b in spans:
            if a < stop - start:
                pieces.append((row.tokens[a:b].tolist(), row.labels[a:b].tolist()))
    wanted, position = [], 0
    for document in documents:
        for at in range(0, len(document), seq_len):  # a long document begins a row
            part = document[at : at + seq_len]
            wanted.append((part, [*document[at + 1 : at + len(part)], *document[at + len(part) : at + len(part) + 1]]))
        position += len(document)
    assert [tokens for tokens, _ in pieces] == [tokens for tokens, _ in wanted]
    assert [labels[: len(told)] for (_, labels), (_, told) in zip(pieces, wanted, strict=True)] == [t for _, t in wanted]
    assert sum(filled) == position
    lengths = [len(document) for document in documents]
    for size, following in pairwise(filled):  # no row could have taken the next document
        assert size + following > seq_len or max(lengths) > seq_len


def test_masked_tokens_are_context_and_are_not_predicted(tmp_path: Path) -> None:
    write_binary(tmp_path / "en" / "a.bin", [[5, -7, MASKED_ZERO, 0, 9]], 10**6)
    row = PackedRows(open_index(tmp_path), 8, 100)[0]
    assert row.tokens.tolist() == [5, 7, 0, 0, 9, 0, 0, 0]
    assert row.labels.tolist() == [IGNORE, IGNORE, 0, 9, IGNORE, IGNORE, IGNORE, IGNORE]


def test_padded_rows_hold_one_document_each(tmp_path: Path) -> None:
    write_binary(tmp_path / "en" / "a.bin", [[1, 2, 3], list(range(10))], 501)
    rows = PaddedRows(open_index(tmp_path), 4, 501)
    assert [rows[n].tokens.tolist() for n in range(len(rows))] == [
        [1, 2, 3, 0],
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 0, 0],
    ]
    assert rows[1].labels.tolist() == [1, 2, 3, 4] and rows[0].labels.tolist() == [2, 3, IGNORE, IGNORE]


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 3000), seed=st.integers(0, 10**6))
def test_every_epoch_has_each_row_once(rows: int, seed: int) -> None:
    order = Order(rows, seed)
    first, second = order(np.arange(rows)), order(np.arange(rows, 2 * rows))
    assert sorted(first) == sorted(second) == list(range(rows))
    if rows > 20:
        assert not np.array_equal(first, second) and not np.array_equal(first, np.arange(rows))
    assert np.array_equal(order(np.array([rows // 2])), first[rows // 2 : rows // 2 + 1])


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 3, 4, 6]), bsz=st.sampled_from([1, 2]), seed=st.integers(0, 99), start=st.integers(0, 9),
    ramp=st.sampled_from([None, "1 1 2", "1 1 1", "2 1 3"]),
)  # fmt: skip
def test_the_global_batch_is_the_same_for_any_number_of_ranks(
    ranks: int, bsz: int, seed: int, start: int, ramp: str | None
) -> None:
    if ramp is not None:  # in rows, which the ranks can divide
        first, more, every = map(int, ramp.split())
        ramp = f"{first * ranks * bsz} {more * ranks * bsz} {every}"
    data = Data(seq_len=8, micro_bsz=bsz, global_batch_size=24, total_steps=12, rampup_batch_size=ramp, skip_batches="2,5-6")
    rows = RandomRows(8, 50, seed, rows=100)

    def batches(count: int, rank: int) -> TrainBatches:
        return TrainBatches(
            ShuffledRows(rows, seed), BatchSizes.from_config(data, count), rank, True, 12, parse_skip_batches(data.skip_batches)
        )

    reference = {b.number: b for b in batches(1, 0).iterate(Cursor())}
    begin = reference[start].next_cursor if start in reference else Cursor()
    parts = [list(batches(ranks, rank).iterate(begin)) for rank in range(ranks)]
    assert [batch.number for batch in parts[0]] == [number for number in reference if number >= begin.batch] != []
    for together in zip(*parts, strict=True):
        wanted = reference[together[0].number]
        tokens = [row.tolist() for part in together for m in part.micro_batches for row in m.tokens.view(-1, 8)]
        assert sorted(tokens) == sorted(row.tolist() for m in wanted.micro_batches for row in m.tokens.view(-1, 8))
        assert together[0].next_cursor == wanted.next_cursor
    assert {b.number for b in parts[0]}.isdisjoint({2, 5, 6})


def test_ramp_up_increases_the_number_of_micro_batches() -> None:
    sizes = BatchSizes(micro_bsz=2, micro_num=10, data_ranks=3, rampup_start=2, rampup_increment=4, rampup_steps=5)
    assert [sizes.micro_batches(b) for b in (0, 4, 5, 9, 10, 99)] == [2, 2, 6, 6, 10, 10]
    assert sizes.rows(5) == 6 * 2 * 3
    data = Data(seq_len=8, micro_bsz=2, total_steps=100, micro_num=10, rampup_batch_size="2 4 5")
    assert BatchSizes.from_config(data, 3) == sizes, "as in InternEvo, if data.global_batch_size is not set"
    same = data.model_copy(update=sizes.in_rows())
    for ranks in (1, 2, 3, 6):
        assert [BatchSizes.from_config(same, ranks).rows(b) for b in range(20)] == [sizes.rows(b) for b in range(20)]


def test_validation_has_each_row_once_on_any_number_of_ranks() -> None:
    rows = RandomRows(8, 50, 1, rows=11)
    for ranks in (1, 2, 4):
        batches = [list(valid_batches(rows, 2, rank, ranks, False, None)) for rank in range(ranks)]
        assert len({len(b) for b in batches}) == 1
        labelled = [
            t.tolist() for part in batches for b in part for t, l in zip(b.tokens, b.labels, strict=True) if (l != -100).any()
        ]
        assert sorted(labelled) == sorted(rows[n].tokens.tolist() for n in range(11))


def test_an_error_in_the_prefetch_thread_is_raised_in_the_training_loop(tmp_path: Path) -> None:
    write_binary(tmp_path / "en" / "a.bin", [[1, 2, 3, 600]], 10**6)
    rows = PackedRows(open_index(tmp_path), 4, 501)
    batches = TrainBatches(ShuffledRows(rows, 0), BatchSizes(1, 1, 1), 0, True, 5)
    with pytest.raises(DataError, match=r"a\.bin, document 0.*token id 600 is outside the vocabulary of 501"):
        next(batches.prefetch(Cursor()))


def test_the_fingerprint_of_rows_changes_with_their_order() -> None:
    rows = RandomRows(8, 10, seed=1)
    assert len({ShuffledRows(rows, seed).fingerprint() for seed in (1, 1, 2)}) == 2
