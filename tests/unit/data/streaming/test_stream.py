"""Streaming data: each epoch has every document once, and the batches are the same for any ranks, workers and stops."""

import gzip
import itertools
import json
import random
import re
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from internevo.config.data import Data
from internevo.data.batches import BatchSizes, Cursor, StepBatch, TrainBatches
from internevo.data.build import load_stream, train_source, valid_rows
from internevo.data.raw import inputs
from internevo.data.source import Saved
from internevo.data.streaming import blocks
from internevo.data.streaming.exchange import Exchange
from internevo.errors import DataError
from internevo.text.tokenizer import Tokenizer, load_tokenizer, train_bpe
from tests.unit.data.writers import write_binary

VOCAB = 300


class Meeting:
    """What threads that act as ranks share: a barrier, and a table with a value of each."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.table = size, threading.Barrier(size, timeout=60), [None] * size


class Ranks(Exchange):
    """An exchange between threads that act as ranks."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__()
        self.meeting, self.rank, self.size = meeting, rank, meeting.size

    def _gather(self, value: Any) -> list[Any]:
        self.meeting.table[self.rank] = value
        self.meeting.barrier.wait()
        seen = list(self.meeting.table)
        self.meeting.barrier.wait()
        return seen

    def _gather_status(self, status: Any, length: int, timeout: Any = None) -> tuple[list[Any], list[int]]:
        seen = self._gather((status, length))
        return [status for status, _ in seen], [length for _, length in seen]

    def _broadcast(self, rank: int, share: Any, length: int) -> Any:
        return self._gather(share[:length])[rank].copy()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bpe(["the cat sat"] * 3, VOCAB, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 150)
    monkeypatch.setattr(blocks, "MAX_SHARDS", 3)


def corpus_of(draw: random.Random, documents: int) -> list[str]:
    return [f"{n} " + "".join(draw.choices("abc 春🙂\n", k=draw.choice([0, 5, 40, 200]))) for n in range(documents)]


def write(folder: Path, corpus: list[str], kinds: list[str], draw: random.Random) -> None:
    """The corpus, dealt over files of several kinds and two types."""
    parts = [corpus[n :: len(kinds)] for n in range(len(kinds))]
    for number, (kind, part) in enumerate(zip(kinds, parts, strict=True)):
        path = folder / draw.choice(["en", "cn"]) / f"{number}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
        if kind == "jsonl":
            path.write_bytes(lines)
        elif kind == "jsonl.gz":
            path.write_bytes(gzip.compress(lines, mtime=0))
        elif kind == "parquet":
            parquet.write_table(pyarrow.table({"n": range(len(part)), "text": part}), path, row_group_size=4)
        elif kind == "arrow":
            table = pyarrow.table({"text": pyarrow.array(part, pyarrow.string())})
            with pyarrow.OSFile(str(path), "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as writer:
                writer.write_table(table, max_chunksize=3)


def train(data: Data, ranks: int, cursor: Cursor, batches: int) -> tuple[Any, list[Cursor]]:
    """Returns the rows of each global batch, and the cursors after them. The ranks are threads."""
    meeting = Meeting(ranks)
    made: list[list[StepBatch]] = [[] for _ in range(ranks)]
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            source = train_source(data, VOCAB, partial(Ranks, meeting, rank))
            batches_ = TrainBatches(
                source, BatchSizes.from_config(data, ranks), rank, data.use_packed_dataset, data.total_steps
            )
            steps: Any = batches_.prefetch(cursor)
            made[rank] = list(itertools.islice(steps, batches))
            steps.close()
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    rows = []
    for steps in zip(*made, strict=True):
        assert len({json.dumps(step.next_cursor.position) for step in steps}) == 1
        micro = [m for n in range(len(steps[0].micro_batches)) for m in (step.micro_batches[n] for step in steps)]
        rows.append([
            list(zip(*(getattr(m, k).view(-1, data.seq_len)[n].tolist() for k in ("tokens", "labels", "types")), strict=True))
            for m in micro for n in range(data.micro_bsz)
        ])  # fmt: skip
    return rows, [step.next_cursor for step in made[0]]


def documents(rows: Any, tokenizer: Tokenizer) -> list[str]:
    """Returns the texts of packed rows, without a last one that may not be complete."""
    ids = [token for batch in rows for row in batch for token, _, _ in row]
    eos = tokenizer.eos_id
    ends = [n for n, i in enumerate(ids) if i == eos]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [tokenizer.decode(ids[a:b]) for a, b in zip(starts, ends, strict=True)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6), count=st.integers(1, 60), seq_len=st.sampled_from([8, 32, 100]),
    kinds=st.tuples(st.sampled_from(["jsonl", "jsonl.gz", "parquet", "arrow"]), st.integers(1, 3)).map(lambda k: [k[0]] * k[1]),
    ranks=st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3), stops=st.lists(st.integers(1, 4), max_size=2),
)  # fmt: skip
def test_each_epoch_has_every_document_and_batches_do_not_depend_on_ranks_and_stops(
    tmp_path_factory: pytest.TempPathFactory,
    small: None,
    tokenizer: Path,
    seed: int,
    count: int,
    seq_len: int,
    kinds: list[str],
    ranks: list[int],
    stops: list[int],
) -> None:
    draw = random.Random(seed)
    corpus = corpus_of(draw, count)
    folder = tmp_path_factory.mktemp("stream")
    write(folder, corpus, kinds, draw)
    data = Data(
        type="streaming", train_folder=str(folder), tokenizer_path=str(tokenizer), seq_len=seq_len, micro_bsz=1,
        global_batch_size=24, total_steps=10**6, seed=seed, num_worker=0,
    )  # fmt: skip
    text = load_tokenizer(tokenizer)
    tokens = sum(len(text.encode(t)) + 1 for t in corpus)
    steps = min(tokens * 2 // (24 * seq_len) + 2, 12)
    wanted, _ = train(data, 1, Cursor(), steps)
    found = documents(wanted, text)
    for epoch in range(len(found) // count):
        assert Counter(found[epoch * count : (epoch + 1) * count]) == Counter(corpus)
    assert not Counter(found[len(found) // count * count :]) - Counter(corpus)

    cursor = Cursor()
    rows: list[Any] = []
    for number, size in enumerate(ranks):
        stop = stops[number] if number < len(stops) and number + 1 < len(ranks) else steps - len(rows)
        more, after = train(data, size, cursor, min(stop, steps - len(rows)))
        rows += more
        cursor = json_round(after[-1]) if after else cursor
    assert len(wanted) == steps
    assert rows == wanted


def json_round(cursor: Cursor) -> Cursor:
    return Cursor(cursor.batch, cursor.rows, json.loads(json.dumps(cursor.position)))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_batches_do_not_depend_on_the_worker_processes(
    tmp_path: Path, small: None, tokenizer: Path, workers: int, packed: bool
) -> None:
    draw = random.Random(1)
    write(tmp_path / "data", corpus_of(draw, 70), ["jsonl", "jsonl"], draw)
    data = Data(
        type="streaming", train_folder=str(tmp_path / "data"), tokenizer_path=str(tokenizer), seq_len=16, micro_bsz=2,
        global_batch_size=8, total_steps=1000, num_worker=0, use_packed_dataset=packed,
    )  # fmt: skip
    wanted, after = train(data, 1, Cursor(), 20)
    assert train(data.model_copy(update={"num_worker": workers}), 2, json_round(after[3]), 16)[0] == wanted[4:]


def test_every_seed_and_every_epoch_has_another_order(tmp_path: Path, small: None, tokenizer: Path) -> None:
    draw = random.Random(1)
    corpus = [f"{n} " + "x" * 20 for n in range(40)]
    write(tmp_path / "data", corpus, ["jsonl"], draw)
    data = Data(
        type="streaming", train_folder=str(tmp_path / "data"), tokenizer_path=str(tokenizer), seq_len=32, micro_bsz=1,
        total_steps=1000, num_worker=0,
    )  # fmt: skip
    text = load_tokenizer(tokenizer)
    one, two = (documents(train(data.model_copy(update={"seed": seed}), 1, Cursor(), 90)[0], text) for seed in (1, 2))
    assert one[:40] != two[:40] and one[:40] != one[40:80] and one[:40] != corpus
    assert sorted(one[:40]) == sorted(one[40:80]) == sorted(two[:40]) == sorted(corpus)


def test_a_document_with_a_token_that_the_model_lacks_is_refused_or_left_out(
    tmp_path: Path, small: None, tokenizer: Path
) -> None:
    """A tokenizer may have added tokens that are outside the model's vocabulary; a document may not."""
    corpus = [f"document {n}" for n in range(20)]
    write(tmp_path / "data", [*corpus, "with an <image> in it"], ["jsonl"], random.Random(1))
    home = tmp_path / "tokenizer"
    home.mkdir()
    file = tokenizer if tokenizer.is_file() else tokenizer / "tokenizer.json"
    (home / "tokenizer.json").write_bytes(file.read_bytes())
    size = load_tokenizer(home).vocab_size
    added = {str(size): {"content": "<image>", "special": False}}
    (home / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "added_tokens_decoder": added}))
    data = Data(
        type="streaming", train_folder=str(tmp_path / "train"), tokenizer_path=str(home), seq_len=32, micro_bsz=1,
        global_batch_size=2, total_steps=1000, num_worker=0, valid_every=1, valid_folder=str(tmp_path / "data"),
    )  # fmt: skip
    message = rf"has the token '<image>' \(id {size}\), which is outside the vocabulary of {size}"
    with pytest.raises(DataError, match=message):
        load_stream(valid_rows(data, size), None)
    skipped: list[str] = []
    rows = load_stream(valid_rows(data.model_copy(update={"on_error": "skip"}), size), None, skipped.append)
    assert rows is not None and len(skipped) == 1 and re.search(message, skipped[0])


def test_a_document_that_cannot_be_read_stops_every_rank_or_is_left_out(tmp_path: Path, small: None, tokenizer: Path) -> None:
    draw = random.Random(1)
    corpus = [f"{n} " + "x" * 30 for n in range(60)]
    write(tmp_path / "data", corpus, ["jsonl"], draw)
    path = next((tmp_path / "data").rglob("*.jsonl"))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[7], lines[23], lines[41] = b'{"text": "cut\n', b'{"body": "none"}\n', b'{"text": "\xff"}\n'
    path.write_bytes(b"".join(lines))
    data = Data(
        type="streaming", train_folder=str(tmp_path / "data"), tokenizer_path=str(tokenizer), seq_len=32, micro_bsz=1,
        global_batch_size=6, total_steps=1000, num_worker=0,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"0\.jsonl(, byte \d+| is not UTF-8)"):
        train(data, 3, Cursor(), 20)
    skipping = data.model_copy(update={"on_error": "skip"})
    source = train_source(skipping, VOCAB)
    steps: Any = TrainBatches(source, BatchSizes(1, 6, 1), 0, True, 1000).prefetch(Cursor())
    skipped: list[str] = []
    while len(skipped) < 3:
        skipped += next(steps).skipped
    steps.close()
    assert all("0.jsonl" in message for message in skipped)
    left = documents(train(skipping, 2, Cursor(), 40)[0], load_tokenizer(tokenizer))
    assert sorted(left[:57]) == sorted(text for n, text in enumerate(corpus) if n not in (7, 23, 41))


@pytest.mark.parametrize("kind", ["streaming", "tokenized"])
def test_validation_skips_what_cannot_be_read_if_training_does(tmp_path: Path, tokenizer: Path, kind: Any) -> None:
    write_binary(tmp_path / "tokens" / "en" / "a.bin", [[65] * 4, [VOCAB] * 4, [66] * 4], 10**6)
    (tmp_path / "validation.jsonl").write_text('{"text": "aaa"}\n{"text": "cut\n{"text": "bbb"}\n')
    folder = str(tmp_path if kind == "streaming" else tmp_path / "tokens")
    data = Data(
        type=kind, train_folder=folder, valid_folder=folder, tokenizer_path=str(tokenizer), seq_len=4, micro_bsz=1,
        total_steps=10, num_worker=0, valid_every=1,
    )  # fmt: skip

    def targets(data: Data) -> tuple[list[int], list[str]]:
        said: list[str] = []
        rows = load_stream(valid_rows(data, VOCAB, report=said.append), None, said.append)
        assert rows is not None
        for _ in range(2):  # each evaluation reads all rows
            labels = [int((rows[n].labels >= 0).sum()) for n in range(len(rows))]
        return labels, said

    with pytest.raises(DataError, match=r"validation\.jsonl, byte 16|a\.bin, document 1"):
        targets(data)
    labels, said = targets(data.model_copy(update={"on_error": "skip"}))
    assert labels == ([3, 3] if kind == "streaming" else [3, 0, 3])
    assert len(said) == 1 and ("validation.jsonl, byte 16" in said[0] or "a.bin, document 1" in said[0])


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet", "arrow"])
def test_the_fingerprint_changes_with_order_and_content(tmp_path: Path, tokenizer: Path, suffix: str) -> None:
    found = []
    for number, corpus in enumerate((["aa", "bb"], ["bb", "aa"], ["aa", "cc"], ["aa", "bb"])):
        write(folder := tmp_path / f"{number}", corpus, [suffix], random.Random(1))
        data = Data(
            type="streaming", train_folder=str(folder), tokenizer_path=str(tokenizer), seq_len=4, micro_bsz=1, total_steps=1,
            num_worker=0,
        )  # fmt: skip
        found.append(train_source(data, VOCAB).fingerprint())
    assert len(set(found[:3])) == 3 and found[3] == found[0]


def test_validation_has_each_document_of_its_split_once(tmp_path: Path, small: None, tokenizer: Path) -> None:
    for name, texts in (("train", ["a", "b"]), ("validation", ["cc", "dd", "ee"])):
        parquet.write_table(pyarrow.table({"text": texts}), tmp_path / f"{name}-00000-of-00001.parquet")
    data = Data(
        type="streaming", train_folder=str(tmp_path), valid_folder=str(tmp_path), tokenizer_path=str(tokenizer), seq_len=4,
        micro_bsz=1, total_steps=10, num_worker=0, valid_every=1,
    )  # fmt: skip
    rows = load_stream(valid_rows(data, VOCAB), None)
    assert rows is not None
    text = load_tokenizer(tokenizer)
    tokens = np.concatenate([row.tokens for row in (rows[n] for n in range(len(rows)))])
    assert sorted(text.decode(tokens.tolist()).replace("!", "").split("<|endoftext|>"))[-3:] == ["cc", "dd", "ee"]
    assert Counter(documents(train(data, 1, Cursor(), 6)[0], text)) == Counter({"a": 6, "b": 6})


def test_a_subset_that_is_not_trained_on_is_validation_data(tmp_path: Path, tokenizer: Path) -> None:
    for subset in "ab":
        write(tmp_path / "set" / subset, [subset * 3], ["jsonl"], random.Random(1))  # no path names a split

    def valid(train: str | None, subset: str | None, mixture: bool = True) -> Any:
        folder = str(tmp_path / "set")
        part = {"folder": folder, "kind": "streaming", "subset_name": train}
        trained: dict[str, Any] = {"mixture": [part]} if mixture else {"train_folder": folder}
        return valid_rows(validate_data(tokenizer, valid_folder=folder, subset_name=subset, **trained), VOCAB)

    assert load_stream(valid("a", "b"), None) is not None
    refused: list[tuple[str | None, str | None, bool]] = [
        ("b", "b", True),
        (None, "b", True),
        ("b", None, True),
        (None, "b", False),
        (None, None, False),
    ]
    for arguments in refused:
        with pytest.raises(DataError, match="has no files for the split valid"):
            valid(*arguments)


def validate_data(tokenizer: Path, **values: Any) -> Data:
    fixed = {"type": "streaming", "tokenizer_path": str(tokenizer), "seq_len": 4, "micro_bsz": 1, "total_steps": 10}
    return Data.model_validate({**fixed, "num_worker": 0, "valid_every": 1, **values})


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_data_with_nothing_to_train_on_is_an_error(tmp_path: Path, small: None, tokenizer: Path, kind: str) -> None:
    write(tmp_path / "data", [""] * 40, [kind], random.Random(1))
    data = Data(
        type="streaming", train_folder=str(tmp_path / "data"), tokenizer_path=str(tokenizer), seq_len=4, micro_bsz=1,
        total_steps=10, num_worker=0,
    )  # fmt: skip
    with pytest.raises(DataError, match="contains no document to train on"):
        train(data, 1, Cursor(), 1)
    with pytest.raises(DataError, match="contains no document to train on"):
        train(data.model_copy(update={"min_length": 10**6}), 2, Cursor(), 1)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seq_len=st.sampled_from([4, 40, 700]), kind=st.sampled_from(["jsonl", "jsonl.gz"]), packed=st.booleans())
def test_what_a_stream_keeps_does_not_grow_with_what_it_has_read(
    tmp_path_factory: pytest.TempPathFactory, small: None, tokenizer: Path, seq_len: int, kind: str, packed: bool
) -> None:
    """Of blocks that are over, neither tokens nor positions are kept, however many rows a block has."""
    folder = tmp_path_factory.mktemp("stream")
    write(folder, corpus_of(random.Random(1), 60), [kind] * 2, random.Random(1))
    data = Data(
        type="streaming", train_folder=str(folder), tokenizer_path=str(tokenizer), seq_len=seq_len, micro_bsz=1,
        total_steps=1000, num_worker=0, use_packed_dataset=packed,
    )  # fmt: skip
    stream: Any = train_source(data, VOCAB)
    position, blocks_read = stream.start_position(), set()
    while position[0][0] < 5:
        position = stream.next_rows(position, 1, [0]).position
        blocks_read.add(tuple(position[0][:2]))
        ends = [*(start for start, _ in stream.block_starts[1:]), len(stream.ids)]
        over = [end for (start, _), end in zip(stream.block_starts, ends, strict=True) if end <= max(start, 0)]
        assert len(over) <= 1, "a block of which nothing is in memory, but for the newest one"
    assert len(blocks_read) > 20
    stream.close()


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_rows_are_the_same_again_from_any_position(tmp_path: Path, small: None, tokenizer: Path, kind: str) -> None:
    """Also from one that has the same block and shard as where the stream has come to, in another epoch."""
    write(tmp_path / "data", corpus_of(random.Random(1), 60), [kind] * 3, random.Random(1))
    data = Data(
        type="streaming", train_folder=str(tmp_path / "data"), tokenizer_path=str(tokenizer), seq_len=16, micro_bsz=1,
        total_steps=1000, num_worker=0,
    )  # fmt: skip
    stream, positions, rows = train_source(data, VOCAB), list[Any](), list[Any]()
    position = stream.start_position()
    while position[0][0] < 3:
        positions.append(position)
        found = stream.next_rows(position, 1, [0])
        rows.append(found.rows[0].tokens.tolist())
        position = found.position
    for number in random.Random(2).sample(range(len(rows)), 200):
        assert stream.next_rows(positions[number], 1, [0]).rows[0].tokens.tolist() == rows[number]
    stream.close()


def test_a_stream_whose_documents_are_the_same_continues_inside_its_epoch(tmp_path: Path, small: None, tokenizer: Path) -> None:
    """Whatever else of the data changes: other parts of a mixture, none at all, the length of rows. Nothing comes twice."""
    draw = random.Random(1)
    for name in ("web", "code"):
        write(tmp_path / name, [f"{name} {n} " + "x" * draw.randrange(60) for n in range(50)], ["jsonl"] * 2, draw)

    def source(*names: str, seq_len: int = 16, **more: Any) -> Any:
        folders: dict[str, Any] = {"mixture": [{"folder": str(tmp_path / name), "kind": "streaming"} for name in names]}
        if len(names) == 1:
            folders = {"type": "streaming", "train_folder": str(tmp_path / names[0])}
        return train_source(
            Data.model_validate({
                "tokenizer_path": str(tokenizer), "seq_len": seq_len, "micro_bsz": 1, "total_steps": 100, "num_worker": 0,
                **folders, **more,
            }), VOCAB,
        )  # fmt: skip

    def tokens(source: Any, position: Any, rows: int, name: str = "web") -> tuple[list[int], Any]:
        """The tokens of the stream ``name`` among the next rows, and the position after these."""
        found = source.next_rows(position, rows, range(rows))
        number = source.types.index(name) if name in source.types else None
        chosen = [row for row in found.rows if number is None or row.types[0] == number]
        source.close()
        return [int(token) for row in chosen for token in row.tokens], json.loads(json.dumps(found.position))

    alone = source("web")
    wanted, _ = tokens(alone, alone.start_position(), 120)
    seen, position = tokens(alone, alone.start_position(), 20)
    before = alone
    for names, seq_len in ((("web", "code"), 16), (("web",), 32), (("code", "web"), 32), (("web", "code"), 8)):
        changed = source(*names, seq_len=seq_len)
        assert changed.fingerprint() != before.fingerprint()
        continued = changed.continue_from(Saved(position, before.fingerprint()))
        more, position = tokens(changed, continued.position, 13)
        seen, before = seen + more, changed
        assert "where it was" in continued.how and seen == wanted[: len(seen)], (names, seq_len, continued.how)
    other = source("web", "code", seed=3)
    told = other.continue_from(Saved(position, before.fingerprint()))
    assert told.how == "at the start of the next epoch (web, code)"
    assert tokens(other, told.position, 2)[1]["web"][0][0][0] == position["web"][0][0][0] + 1


def test_a_stream_that_has_ended_goes_on_with_more_epochs(tmp_path: Path, small: None, tokenizer: Path) -> None:
    write(tmp_path / "web", [f"web {n}" for n in range(30)], ["jsonl"] * 2, random.Random(1))
    write(tmp_path / "code", [f"code {n}" for n in range(30)], ["jsonl"] * 2, random.Random(1))

    def source(epochs: int | None) -> Any:
        parts = [
            {"folder": str(tmp_path / name), "kind": "streaming", "epochs": epochs if name == "web" else None}
            for name in ("web", "code")
        ]
        return train_source(
            Data.model_validate({
                "tokenizer_path": str(tokenizer), "seq_len": 16, "micro_bsz": 1, "total_steps": 100, "num_worker": 0,
                "mixture": parts,
            }), VOCAB,
        )  # fmt: skip

    def shares(source: Any, position: Any, rows: int) -> tuple[int, Any]:
        found = source.next_rows(position, rows, range(rows))
        source.close()
        return sum(int(row.types[0]) == 0 for row in found.rows), json.loads(json.dumps(found.position))

    once = source(1)
    first, position = shares(once, once.start_position(), 100)
    assert 0 < first < 50 and shares(once, position, 20)[0] == 0
    second, later = shares(source(2), position, 100)
    assert second == pytest.approx(first, abs=1), "one more epoch"
    assert shares(source(2), later, 20)[0] == 0 and 9 <= shares(source(None), later, 20)[0] <= 11


def test_the_log_has_the_number_of_empty_documents(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks.log, "propagate", True)
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": text}) for text in ("", "one", "", "two", "three")]
    (tmp_path / "data" / "a.jsonl").write_text("\n".join(lines))
    data = Data(
        type="streaming", train_folder=str(tmp_path / "data"), tokenizer_path=str(tokenizer), seq_len=8, micro_bsz=1,
        global_batch_size=1, total_steps=1000, num_worker=0,
    )  # fmt: skip
    with caplog.at_level("INFO", "internevo"):
        train(data, 1, Cursor(), 1)
    assert "left out of block 1, epoch 1: 2 empty documents" in caplog.messages
