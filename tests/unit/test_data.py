"""Data: both forms of tokenized files, rows that lose nothing, and an order that knows no rank."""

import json
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from internevo.commands.inspect import inspect
from internevo.data.batches import BatchSizes, Cursor, TrainBatches, parse_skips, valid_batches
from internevo.data.order import Order
from internevo.data.rows import IGNORE, PackedRows, PaddedRows, RandomRows
from internevo.data.source import Shuffled
from internevo.data.tokenized.files import MASKED_ZERO, TokenFile, TokenWriter
from internevo.data.tokenized.index import open_index
from internevo.errors import DataError, UsageError
from internevo.text.tokenizer import load_tokenizer, train_bpe


def write_json(path, documents, dtype=np.int64):
    """InternEvo's own form."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta, offset = [], 0
    with open(path, "wb") as file:
        for ids in documents:
            line = (json.dumps({"tokens": [int(i) for i in ids]}) + "\n").encode()
            file.write(line)
            meta.append((offset, len(ids)))
            offset += len(line)
    with open(f"{path}.meta", "wb") as file:
        np.save(file, np.array(meta, dtype=dtype).reshape(-1, 2))


def write_binary(path, documents, vocab_size):
    writer = TokenWriter(path, vocab_size)
    for ids in documents:
        writer.write(np.array(ids), [len(ids)])
    writer.close()


documents_of = st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=40), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(documents=documents_of, masks=st.booleans(), seed=st.integers(0, 99))
def test_both_forms_read_back_what_was_written(tmp_path_factory, documents, masks, seed):
    folder = tmp_path_factory.mktemp("forms")
    draw = np.random.default_rng(seed)
    stored = [np.array(d) for d in documents]
    if masks:
        stored = [np.where(draw.random(len(d)) < 0.3, np.where(d == 0, MASKED_ZERO, -d), d) for d in stored]
    write_json(folder / "json" / "a.bin", stored, np.int32)
    write_binary(folder / "int32" / "a.bin", stored, 10**6)
    if not masks:
        write_binary(folder / "uint16" / "a.bin", stored, 501)
    for path in folder.glob("*/a.bin"):
        file = TokenFile.open(path)
        assert file.itemsize == {"json": 0, "int32": 4, "uint16": 2}[path.parent.name]
        assert all(np.array_equal(file.read(n), d) for n, d in enumerate(stored))
        assert np.array_equal(file.read(0, 1, 3), stored[0][1:3])


@settings(max_examples=60, deadline=None)
@given(
    documents=documents_of,
    seq_len=st.integers(2, 50),
    minimum=st.integers(0, 9),
    files=st.integers(1, 3),
    form=st.booleans(),
)
def test_packing_keeps_every_token_and_predicts_within_documents_only(
    tmp_path_factory, documents, seq_len, minimum, files, form
):
    folder = tmp_path_factory.mktemp("packing")
    for n in range(files):
        part = documents[n::files]
        write = write_json if form else (lambda path, d: write_binary(path, d, 501))
        write(folder / f"type{n}" / "a.bin", part)
    kept = [d for n in range(files) for d in documents[n::files] if len(d) >= minimum]
    if not kept:
        return
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
        assert set(row.borders) == wanted


def test_masked_tokens_are_context_and_no_target(tmp_path):
    write_binary(tmp_path / "en" / "a.bin", [[5, -7, MASKED_ZERO, 0, 9]], 10**6)
    row = PackedRows(open_index(tmp_path), 8, 100)[0]
    assert row.tokens.tolist() == [5, 7, 0, 0, 9, 0, 0, 0]
    assert row.labels.tolist() == [IGNORE, IGNORE, 0, 9, IGNORE, IGNORE, IGNORE, IGNORE]


def test_padded_rows_hold_one_document_each(tmp_path):
    write_binary(tmp_path / "en" / "a.bin", [[1, 2, 3], list(range(10))], 501)
    rows = PaddedRows(open_index(tmp_path), 4, 501)
    assert [rows[n].tokens.tolist() for n in range(len(rows))] == [
        [1, 2, 3, 0],
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 0, 0],
    ]
    assert rows[1].labels.tolist() == [1, 2, 3, 4] and rows[0].labels.tolist() == [2, 3, IGNORE, IGNORE]


def test_the_index_is_cached_and_follows_changes(tmp_path):
    write_binary(tmp_path / "en" / "a.bin", [[1, 2]], 501)
    assert open_index(tmp_path).fingerprint() == open_index(tmp_path).fingerprint()
    assert len(list((tmp_path / ".internevo").iterdir())) == 1
    write_binary(tmp_path / "cn" / "b.bin", [[1, 2, 3]], 501)
    index = open_index(tmp_path)
    assert index.types == ["cn", "en"] and index.tokens == 5


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 3000), seed=st.integers(0, 10**6))
def test_every_epoch_has_each_row_once(rows, seed):
    order = Order(rows, seed)
    first, second = order(np.arange(rows)), order(np.arange(rows, 2 * rows))
    assert sorted(first) == sorted(second) == list(range(rows))
    if rows > 20:
        assert not np.array_equal(first, second) and not np.array_equal(first, np.arange(rows))
    assert np.array_equal(order(np.array([rows // 2])), first[rows // 2 : rows // 2 + 1])


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 3, 4, 6]), bsz=st.sampled_from([1, 2]), seed=st.integers(0, 99), start=st.integers(0, 9),
    ramp=st.sampled_from([None, "1 1 2"]),
)  # fmt: skip
def test_the_global_batch_is_the_same_for_any_number_of_ranks(ranks, bsz, seed, start, ramp):
    from internevo.config.data import Data

    data = Data(seq_len=8, micro_bsz=bsz, global_batch_size=24, total_steps=12, rampup_batch_size=None, skip_batches="2,5-6")
    rows = RandomRows(8, 50, seed, rows=100)

    def batches(count, rank):
        return TrainBatches(Shuffled(rows, seed), BatchSizes.of(data, count), rank, True, 12, parse_skips(data.skip_batches))

    reference = {b.number: b for b in batches(1, 0).make(Cursor())}
    begin = reference[start].after if start in reference else Cursor()
    parts = [list(batches(ranks, rank).make(begin)) for rank in range(ranks)]
    for together in zip(*parts, strict=True):
        wanted = reference[together[0].number]
        tokens = [row.tolist() for part in together for m in part.micro_batches for row in m.tokens.view(-1, 8)]
        assert sorted(tokens) == sorted(row.tolist() for m in wanted.micro_batches for row in m.tokens.view(-1, 8))
        assert together[0].after == wanted.after
    assert {b.number for b in parts[0]}.isdisjoint({2, 5, 6})


def test_ramp_up_counts_micro_batches():
    sizes = BatchSizes(micro_bsz=2, micro_num=10, ranks=3, start=2, increment=4, every=5)
    assert [sizes.micro_batches(b) for b in (0, 4, 5, 9, 10, 99)] == [2, 2, 6, 6, 10, 10]
    assert sizes.rows(5) == 6 * 2 * 3


def test_validation_gives_each_row_once_whatever_the_ranks():
    rows = RandomRows(8, 50, 1, rows=11)
    for ranks in (1, 2, 4):
        batches = [list(valid_batches(rows, 2, rank, ranks, False, None)) for rank in range(ranks)]
        assert len({len(b) for b in batches}) == 1
        labelled = [
            t.tolist() for part in batches for b in part for t, l in zip(b.tokens, b.labels, strict=True) if (l != -100).any()
        ]
        assert sorted(labelled) == sorted(rows[n].tokens.tolist() for n in range(11))


def test_an_error_in_the_loader_thread_reaches_the_loop(tmp_path):
    write_binary(tmp_path / "en" / "a.bin", [[1, 2, 3, 600]], 10**6)
    rows = PackedRows(open_index(tmp_path), 4, 501)
    batches = TrainBatches(Shuffled(rows, 0), BatchSizes(1, 1, 1), 0, True, 5)
    with pytest.raises(DataError, match=r"a\.bin, document 0.*token id 600 is outside the vocabulary of 501"):
        next(batches.prefetch(Cursor()))


# Bad input -----------------------------------------------------------------------------------------------------------


def test_a_truncated_binary_file_is_named_with_its_place(tmp_path):
    path = tmp_path / "en" / "a.bin"
    write_binary(path, [[1, 2, 3], [4, 5, 6]], 501)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"a\.bin is truncated: it ends at byte 9, and document 1 of 2 \(byte 6, 3 tokens\)"):
        open_index(tmp_path)


def test_a_truncated_json_file_is_named_with_its_place(tmp_path):
    path = tmp_path / "en" / "a.bin"
    write_json(path, [[1, 2, 3], [4, 5, 6]])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"a\.bin, document 1 \(byte 22\) is not a line"):
        open_index(tmp_path)


def test_a_meta_that_does_not_fit_is_named(tmp_path):
    path = tmp_path / "en" / "a.bin"
    write_binary(path, [[1, 2, 3], [4, 5, 6]], 501)
    np.save(open(f"{path}.meta", "wb"), np.array([[0, 3], [6, 2]]))
    with pytest.raises(DataError, match=r"\.meta does not fit: it describes 10 bytes, and the file has 12"):
        open_index(tmp_path)
    write_json(path, [[1, 2, 3], [4, 5, 6]])
    np.save(open(f"{path}.meta", "wb"), np.array([[0, 3], [22, 4]]))
    with pytest.raises(DataError, match=r"has 3 tokens, and its \.meta says 4"):
        open_index(tmp_path)
    (tmp_path / "en" / "a.bin.meta").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="is not a NumPy array"):
        open_index(tmp_path)
    (tmp_path / "en" / "a.bin.meta").unlink()
    with pytest.raises(DataError, match=r"has no a\.bin\.meta beside it"):
        open_index(tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no .bin file"):
        open_index(tmp_path)


def test_int32_offsets_beyond_2_gib_are_repaired(tmp_path):
    from internevo.data.tokenized.files import read_meta

    offsets = np.array([0, 2**31 - 5, 2**31 + 10, 2**32 - 1, 2**32 + 7], dtype=np.int64)
    meta = np.stack([offsets, np.full(5, 3)], axis=1)
    np.save(open(tmp_path / "a.bin.meta", "wb"), meta.astype(np.int32))
    assert read_meta(tmp_path / "a.bin")[:, 0].tolist() == offsets.tolist()


def write_megatron(path, documents, dtype, code):
    """As Megatron-LM's IndexedDatasetBuilder does; a document may have several sequences."""
    lengths = [len(sequence) for document in documents for sequence in document]
    flat = [token for document in documents for sequence in document for token in sequence]
    path.with_suffix(".bin").write_bytes(np.array(flat, dtype).tobytes())
    offsets = np.cumsum([0, *lengths])[:-1] * np.dtype(dtype).itemsize
    borders = np.cumsum([0, *map(len, documents)])
    with open(path.with_suffix(".idx"), "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(borders)))
        for array, kind in ((lengths, "<i4"), (offsets, "<i8"), (borders, "<i8")):
            file.write(np.array(array, kind).tobytes())


@pytest.mark.parametrize(("dtype", "code"), [("<i4", 4), ("<u2", 8)])
@example([[[]], [[0]]])  # offsets alone do not tell the size of an id here
@given(st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=9), min_size=1, max_size=3), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_a_megatron_dataset_has_the_rows_of_the_tokenized_one(tmp_path_factory, dtype, code, documents):
    folder, again = tmp_path_factory.mktemp("megatron"), tmp_path_factory.mktemp("again")
    joined = [[token for sequence in document for token in sequence] for document in documents]
    (folder / "en").mkdir()
    write_megatron(folder / "en" / "part", documents, dtype, code)
    index = open_index(folder)
    assert [index.read(n).tolist() for n in range(len(index))] == [ids for ids in joined if ids]
    prefix = open_index(folder / "en" / "part")  # as Megatron names it
    assert [prefix.read(n).tolist() for n in range(len(prefix))] == [ids for ids in joined if ids]
    if index.tokens:
        writer = TokenWriter(again / "en" / "part.bin")
        writer.write(np.array([t for ids in joined for t in ids]), [len(ids) for ids in joined])
        writer.close()
        ours, theirs = (PackedRows(open_index(root), 8, 65536) for root in (again, folder))
        for row, other in zip((ours[n] for n in range(len(ours))), (theirs[n] for n in range(len(ours))), strict=True):
            assert row.tokens.tolist() == other.tokens.tolist() and row.labels.tolist() == other.labels.tolist()


def test_a_damaged_megatron_index_is_named(tmp_path):
    write_megatron(tmp_path / "part", [[[1, 2]], [[3]]], "<i4", 4)
    content = (tmp_path / "part.idx").read_bytes()
    for broken, message in (
        (content[:-1], r"part\.idx is truncated: 2 sequences and 3 borders take 82 bytes, it has 81"),
        (b"x" + content[1:], r"part\.idx is not the index of a Megatron dataset"),
        (content[:17] + b"\x07" + content[18:], "ids of type 7"),
        (content[:-8] + b"\x09" + content[-7:], "borders of its documents"),
    ):
        (tmp_path / "part.idx").write_bytes(broken)
        with pytest.raises(DataError, match=message):
            TokenFile.open(tmp_path / "part.bin")
    (tmp_path / "part.idx").write_bytes(content)
    (tmp_path / "part.bin").write_bytes(b"\x00" * 8)
    with pytest.raises(DataError, match=r"part\.bin is truncated"):
        TokenFile.open(tmp_path / "part.bin")


def test_inspect_says_what_a_dataset_holds_and_names_all_that_is_broken(tmp_path):
    texts = ["def f(x):", "return x", "x = 1\n" * 9]
    tokenizer = load_tokenizer(train_bpe(texts, 280, tmp_path))
    documents = [tokenizer.encode(text) for text in texts]
    documents[1] = [MASKED_ZERO, *(-n for n in documents[1][:2]), *documents[1][2:]]
    for name in ("code", "more"):
        write_binary(tmp_path / "train" / name / "part.bin", documents, None)
    lines = list(inspect(tmp_path / "train", decode=3))
    total = sum(map(len, documents))
    assert f": 6 documents, {2 * total:,} tokens in 2 files" in lines[0]
    assert lines[1] == f"type code: 3 documents, {total} tokens"
    largest = max(abs(n) for ids in documents for n in ids if n != MASKED_ZERO)
    assert any(f"the largest id is {largest} (" in line for line in lines)
    assert any(f"{tokenizer.vocab_size} entries" in line and "every id is inside" in line for line in lines)
    counted = [int(line.split()[1]) for line in lines if "█" in line]
    assert sum(counted) == 6
    start = tokenizer.decode([0, *(-n for n in documents[1][1:3])])
    assert lines[-6::2] == [
        f"--- {tmp_path / 'train' / 'code' / 'part.bin'}, document {n}: {len(ids)} tokens"
        + (", 3 of them masked" if n == 1 else "")
        for n, ids in enumerate(documents)
    ]
    assert lines[-5::2] == [texts[0], f"⟦{start}⟧{tokenizer.decode(documents[1][3:])}", texts[2]]

    small = train_bpe(["a"], 257, tmp_path / "small")
    with pytest.raises(DataError, match=rf"has token id {largest}, outside the vocabulary of 257"):
        list(inspect(tmp_path / "train", small))
    for name in ("code", "more"):
        path = tmp_path / "train" / name / "part.bin"
        path.write_bytes(path.read_bytes()[:-4])
    seen = []
    with pytest.raises(DataError, match="2 of 2 files below"):
        seen.extend(inspect(tmp_path / "train"))
    write_binary(tmp_path / "a" / "b" / "part.bin", [[1]], None)
    with pytest.raises(UsageError, match="--decode needs a tokenizer"):
        list(inspect(tmp_path / "a" / "b", decode=1))
