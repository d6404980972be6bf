"""Reading raw documents: every format, compression and chunk size gives the same texts; errors name the broken file."""

import csv
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from internevo.config.data import MixturePart
from internevo.data.build import train_source, valid_rows
from internevo.data.encoding import encode
from internevo.data.encoding.formats import document_text, format_fields
from internevo.data.encoding.tokenize import tokenize
from internevo.data.raw import inputs
from internevo.data.raw.documents import Document, read_documents
from internevo.data.raw.inputs import find_files, is_sequential, split_file, split_files
from internevo.data.rows import RandomRows
from internevo.data.source import ShuffledRows
from internevo.data.tokenized.files import TokenWriter
from internevo.data.tokenized.index import open_index
from internevo.errors import DataError, UsageError
from internevo.text.tokenizer import train_bpe
from internevo.train.check import check
from internevo.train.config import load_config
from tests.conftest import Run, write_config, write_dataset

LINES = ("jsonl", "ndjson")
COMPRESS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": lambda content: zstandard.compress(content[:100]) + zstandard.compress(content[100:]),  # two frames
}


@pytest.fixture
def corpus() -> list[str]:
    """Texts with everything that a reader could take for the end of a field or row: quotes, commas, tabs, all line breaks."""
    draw = random.Random(3)
    pieces = ["word ", '"', '""', ",", "\t", "\n", "\r\n", "\r", "春眠不觉晓", "é", "\u2028", "🙂", "{", "\\"]
    return ["".join(draw.choices(pieces, k=draw.randint(1, 60))) for _ in range(150)]


def rows_of(corpus: list[str], delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([["id", "text"], *enumerate(corpus)])
    return out.getvalue().encode()


def write(folder: Path, corpus: list[str], suffix: str, compression: str = "") -> Path:
    """Writes one file with all texts, or for txt one file for each text."""
    folder.mkdir(exist_ok=True)
    path = folder / f"corpus.{suffix}{compression}"
    if suffix == "parquet":
        parquet.write_table(pyarrow.table({"id": range(len(corpus)), "text": corpus}), path, row_group_size=40)
        return path
    if suffix == "txt":
        for number, text in enumerate(corpus):
            (folder / f"{number:04d}.txt{compression}").write_bytes(COMPRESS[compression](text.encode()))
        return folder
    content = {
        "json": json.dumps([{"text": text} for text in corpus]).encode(),
        **dict.fromkeys(LINES, "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in corpus).encode()),
        "csv": rows_of(corpus, ","),
        "tsv": rows_of(corpus, "\t"),
    }[suffix]
    path.write_bytes(COMPRESS[compression](content))
    return path


def read(path: Path, key: str | None = None) -> list[str]:
    texts = []
    for chunk in split_files(find_files([path], None, None, ())):
        for found in read_documents(chunk, format_fields("text", key)):
            text = found if isinstance(found, DataError) else document_text(found, key)
            if isinstance(text, DataError):
                raise text
            texts.append(text)
    return texts


@pytest.mark.parametrize("size", [100, 1 << 20])
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", ["txt", "json", *LINES, "csv", "tsv"])
def test_every_format_gives_the_same_texts_for_any_chunk_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: list[str], suffix: str, compression: str, size: int
) -> None:
    monkeypatch.setattr(inputs, "CHUNK_BYTES", size)
    path = write(tmp_path / "in", corpus, suffix, compression)
    assert read(path) == corpus and read(path.parent) == corpus
    chunks = list(split_files(find_files([path], None, None, ())))
    files = [path] if path.is_file() else list(path.iterdir())
    assert sum(chunk.size for chunk in chunks) == sum(file.stat().st_size for file in files)
    assert len(chunks) > 1 or size > 100 or suffix == "json" or compression


CSV_PIECES = ["word", '"', '""', ",", "\t", "\n", "\r\n", "\r", '5" disk', "春", "\x00", "\n\n", "\ufeff", " "]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("workers", [1, 3])
def test_json_lines_named_json_are_those_of_a_jsonl_file(
    tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch, compression: str, workers: int
) -> None:
    """For any chunks and any number of workers, from what comes first in the file to what comes last."""
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 100)
    lines = write(tmp_path / "in", corpus, "jsonl", compression)
    tokenizer = train_bpe(corpus, 300, tmp_path)
    wanted = tokenize(lines, tmp_path / "wanted", tokenizer=tokenizer)
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in corpus).encode()
    for number, (before, after) in enumerate([(b"", b""), (b"\n\n", b"\n \n"), (b"\xef\xbb\xbf", b""), (b"", b"\n[3")]):
        path = tmp_path / f"{number}" / f"c4-train.00000.json{compression}"
        path.parent.mkdir()
        path.write_bytes(COMPRESS[compression](before + content + after))
        assert find_files([path.parent], None, None, ()) == find_files([path], "json", None, ()) == [("jsonl", path)]
        skip: Any = "skip" if after.endswith(b"3") else "stop"
        result = tokenize(path, tmp_path / f"out{number}", tokenizer=tokenizer, workers=workers, on_error=skip)
        assert (result.documents, result.tokens, result.skipped) == (wanted.documents, wanted.tokens, int(skip == "skip"))
        bins = [(tmp_path / name / "en" / "part-00000.bin").read_bytes() for name in ("wanted", f"out{number}")]
        assert bins[0] == bins[1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=6
)


@settings(max_examples=200, deadline=None)
@given(JSON, st.sampled_from([None, 1]), st.sampled_from(["", "\n", " \n\n"]), st.sampled_from(["", "\n", "\n \n"]))
def test_a_file_that_is_json_as_a_whole_is_never_read_as_lines(
    tmp_path_factory: pytest.TempPathFactory, value: Any, indent: int | None, before: str, after: str
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(before + json.dumps(value, indent=indent) + after)
    assert find_files([path], None, None, ()) == [("json", path)]


@pytest.mark.parametrize("content", ['{"text": "a"\n{"text": "b"}\n', '{"text": "a"} {"text": "b"}', "[" * 10**5 + "\n3"])
def test_the_error_of_a_json_file_says_what_it_must_have(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    found = [e for chunk in split_files(find_files([path], None, None, ())) for e in read_documents(chunk, None)]
    assert len(found) == 1 and isinstance(found[0], DataError)
    assert f"{path} is " in str(found[0]) and "It must be one object or one list; if each line is an object" in str(found[0])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(CSV_PIECES), max_size=60), st.sampled_from(["csv", "tsv"]), st.sampled_from(sorted(COMPRESS)))
def test_csv_rows_are_those_of_csv_reader(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], suffix: str, compression: str
) -> None:
    """Also with quotes inside of fields, quotes that are never closed, empty lines, and a byte order mark."""
    delimiter = "\t" if suffix == "tsv" else ","
    content = f'"text"{delimiter}id\n' + "".join(pieces)
    path = tmp_path_factory.mktemp("csv") / f"a.{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](("\ufeff" + content).encode()))
    rows = list(csv.reader(io.StringIO(content, newline=""), delimiter=delimiter))
    for size in (1, 20, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inputs, "CHUNK_BYTES", size)
            chunks = list(split_files([("csv", path)]))
        assert not chunks or sum(chunk.size for chunk in chunks) == path.stat().st_size
        found = [found for chunk in chunks for found in read_documents(chunk, ("text",))]
        assert [list(d.value.values()) for d in found if isinstance(d, Document)] == [row for row in rows[1:] if len(row) == 2]
        assert sum(isinstance(d, DataError) for d in found) == sum(len(row) not in (0, 2) for row in rows[1:])


def test_parquet_is_split_by_row_groups(tmp_path: Path, corpus: list[str]) -> None:
    path = write(tmp_path, corpus, "parquet")
    chunks = list(split_files(find_files([tmp_path], None, None, ())))
    assert len(chunks) == 4 and sum(chunk.size for chunk in chunks) == path.stat().st_size
    assert read(path) == corpus


@pytest.mark.parametrize(("suffix", "compression"), [("jsonl", ".zst"), ("csv", ".gz"), ("parquet", "")])
def test_tokens_do_not_depend_on_format_or_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: list[str], suffix: str, compression: str
) -> None:
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 700)
    tokenizer = train_bpe(corpus, 300, tmp_path / "tokenizer")
    for name, source, workers in (
        ("plain", write(tmp_path / "a", corpus, "jsonl"), 1),
        ("other", write(tmp_path / "b", corpus, suffix, compression), 3),
    ):
        seen: list[Any] = []
        result = tokenize(
            [source], tmp_path / name, tokenizer=tokenizer, workers=workers, progress=lambda *p, s=seen: s.append(p)
        )
        assert result.documents == len(corpus)
        assert seen[-1] == (source.stat().st_size,) * 2
    plain, other = (open_index(tmp_path / name) for name in ("plain", "other"))
    assert all(np.array_equal(plain.read(n), other.read(n)) for n in range(len(corpus)))


@pytest.mark.parametrize("suffix", ["jsonl.gz", "csv.zst", "txt.gz", "parquet"])
@pytest.mark.parametrize("damage", ["truncated", "noise"])
def test_the_error_names_a_damaged_file(tmp_path: Path, corpus: list[str], suffix: str, damage: str) -> None:
    kind, _, compression = suffix.partition(".")
    path = write(tmp_path / "in", corpus, kind, "." + compression if compression else "")
    path = sorted(path.iterdir())[0] if path.is_dir() else path
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[:-12]
    else:
        content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(DataError, match=path.name):
        read(path)


def test_the_error_names_a_row_without_text(tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("id,text\n1,good\n2\n")
    with pytest.raises(DataError, match=r"bad\.csv, line 2 after byte 8: the row has 1 field, but the header has 2"):
        read(bad)
    with pytest.raises(DataError, match=r"no text under 'body' \(it has 'id', 'text'\); give the field's name with --text-key"):
        read(bad, "body")
    parquet.write_table(pyarrow.table({"text": ["good", None]}), tmp_path / "bad.parquet")
    with pytest.raises(
        DataError, match=r"bad\.parquet, row group 0, row 1 has no text under .* \(it has 'text' \(NoneType\)\)"
    ):
        read(tmp_path / "bad.parquet")


def test_mocked_data_is_random_and_ignores_the_folders(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, tmp_path / "nothing", data__type="mocked", data__valid_every=2), [])
    check(config, 1)
    source = train_source(config.data, 97)
    assert isinstance(source, ShuffledRows)
    assert isinstance(source.rows, RandomRows)
    assert isinstance(valid_rows(config.data, 97), RandomRows)


@pytest.mark.parametrize("counts", [[], [3, 5]], ids=["no document", "only short documents"])
@pytest.mark.parametrize("packed", [True, False])
def test_data_without_a_document_is_an_error_that_names_the_folder(tmp_path: Path, counts: list[int], packed: bool) -> None:
    writer = TokenWriter(tmp_path / "data" / "en" / "part.bin")
    writer.write(np.ones(sum(counts), np.int64), np.array(counts, np.int64))
    writer.close()
    more: dict[str, Any] = {
        "data__valid_folder": str(tmp_path / "data"),
        "data__valid_every": 2,
        "data__use_packed_dataset": packed,
    }
    data = load_config(write_config(tmp_path, tmp_path / "data", **more, data__min_length=9), []).data
    with pytest.raises(DataError, match="data contains no document.*with fewer than data.min_length = 9 tokens"):
        train_source(data, 97)
    part = MixturePart(folder=str(tmp_path / "data"))
    with pytest.raises(DataError, match="data contains no document"):
        train_source(data.model_copy(update={"mixture": [part]}), 97)
    if not counts:
        with pytest.raises(DataError, match="data contains no document"):
            valid_rows(data, 97)


def test_links_are_followed_and_the_error_names_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "in" / "b.txt").symlink_to(tmp_path / "real" / "a.txt")
    assert read(tmp_path / "in") == ["a", "a"]
    (tmp_path / "real" / "back").symlink_to(tmp_path / "in")
    with pytest.raises(DataError, match=r"in/link/back is a link to .*/in, which contains the link: remove the link"):
        read(tmp_path / "in")
    with pytest.raises(DataError, match="which contains the link"):
        open_index(tmp_path / "in")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.json", "a.txt", "a.parquet"])
def test_the_error_names_a_file_that_was_removed(tmp_path: Path, corpus: list[str], name: str) -> None:
    kind, _, compression = name[2:].partition(".")
    path = write(tmp_path / "in", corpus[:1], kind, "." + compression if compression else "")
    path = next(path.iterdir()) if path.is_dir() else path
    files = find_files([tmp_path / "in"], None, None, ())
    chunks = [] if is_sequential(*files[0]) else list(split_files(files))
    path.unlink()
    found = [found for chunk in chunks or split_file(*files[0]) for found in read_documents(chunk, ("text",))]
    assert len(found) == 1 and isinstance(found[0], DataError) and path.name in str(found[0])


def test_tokenized_rows_that_cannot_be_read_are_an_error_or_are_left_out(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data")
    data = load_config(write_config(tmp_path, folder), []).data
    with pytest.raises(DataError, match="outside the vocabulary of 50"):
        (source := train_source(data, 50)).next_rows(source.start_position(), 40, range(40))
    source = train_source(data.model_copy(update={"on_error": "skip"}), 96)
    assert isinstance(source, ShuffledRows)
    found = source.next_rows(source.start_position(), len(source.rows), range(len(source.rows)))
    assert 0 < len(found.skipped) < found.count
    assert all("token id 96 is outside" in message for message in found.skipped)
    assert sum(not (row.labels >= 0).any() for row in found.rows) == len(found.skipped)
    other = train_source(data.model_copy(update={"on_error": "skip"}), 96, reports=False)  # a rank with the same rows
    assert other.next_rows(0, found.count, range(found.count)).skipped == []


def test_files_of_any_suffix_are_read_as_text_if_asked_for(tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.py").write_text("x = 1\n" * 99)
    run(
        "tokenize", tmp_path, "--format", "text", "--pattern", "*.py", "--train-tokenizer", "bpe", "--vocab-size", 270,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert len(open_index(tmp_path / "out")) == 1


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_a_file_of_documents_is_not_read_as_one_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match=f"{name} is a .* file, and --format text would read all of it as one text"):
        find_files([tmp_path / name], "text", None, ())
    with pytest.raises(UsageError, match=r"there are no input files of the format text \(\.txt\)"):
        find_files([tmp_path], "text", None, ())


def test_the_error_names_a_document_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MAX_CHARACTERS", 5000)
    lines = [json.dumps({"text": text}) for text in ("small", "x" * 6000, "small")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tokenizer = train_bpe(["small"], 260, tmp_path)
    with pytest.raises(DataError, match=r"a\.jsonl, byte 18 has 6,000 characters; documents may have up to 5,000"):
        tokenize([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=tokenizer)
    assert tokenize([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=tokenizer, on_error="skip").skipped == 1
    assert len(open_index(tmp_path / "out")) == 2


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl", "csv", "tsv"])
@pytest.mark.parametrize("compression", COMPRESS)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, corpus: list[str], suffix: str, compression: str) -> None:
    path = write(tmp_path / "in", corpus[:5], suffix)
    for file in [path] if path.is_file() else list(path.iterdir()):
        content = file.read_bytes()
        file.unlink()
        Path(f"{file}{compression}").write_bytes(COMPRESS[compression](b"\xef\xbb\xbf" + content))
    assert read(tmp_path / "in", None if suffix == "txt" else "text") == corpus[:5]


def test_files_with_byte_order_marks_may_be_concatenated_and_lines_may_be_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n\xef\xbb\xbf{"text": "b"}\n\xef\xbb\xbf\n  \n')
    assert read(tmp_path / "a.jsonl") == ["a", "b"]
    (tmp_path / "b.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(DataError, match=r"b\.txt is not UTF-8 at byte 0 \(0xff\): it is UTF-16, convert it"):
        read(tmp_path / "b.txt")


NO_TEXT = {
    r'{"text": "x \ud83d y"}': r"the text has \\ud83d, which is only half of a character",
    r'{"text": "x \uDE00\uD83D y"}': "is only half of a character",
    '{"text": ' + "[" * 200_000 + "]" * 200_000 + "}": "is JSON that is nested too deep",
    "[" * 900 + "]" * 900: "nested too deep|has no text",
    '{"text": ' + "9" * 5000 + "}": "is not JSON|has no text",
    '"\\ud800"': "is only half of a character",
    "\x00\x00": "is not JSON",
    '{"text": 3}': "has no text",
    "null": "has no text",
}


@pytest.mark.parametrize("line", NO_TEXT, ids=range(len(NO_TEXT)))
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("train", [False, True])
def test_json_that_is_no_text_has_a_place_and_can_be_skipped(tmp_path: Path, line: str, suffix: str, train: bool) -> None:
    good = r'{"text": "good \ud83d\ude00", "id": "\ud83d"}'
    path = tmp_path / f"a.{suffix}"
    path.write_text(f"[{good}, {line}]" if suffix == "json" else f"{good}\n{line}\n")
    trained = train_bpe(["good"], 270, tmp_path / "tokenizer")
    tokenizer: dict[str, Any] = dict(train_vocab_size=270) if train else dict(tokenizer=trained)
    with pytest.raises(DataError, match=NO_TEXT[line]) as caught:
        tokenize([path], tmp_path / "out", **tokenizer)
    assert str(path) in str(caught.value)
    (tmp_path / "b.txt").write_text("more")
    result = tokenize([path, tmp_path / "b.txt"], tmp_path / "out", **tokenizer, workers=1, on_error="skip")
    assert result.skipped == 1 and result.documents in (1, 2)


@pytest.mark.parametrize("format", ["alpaca", "chat"])
def test_half_a_character_is_found_in_every_format(tmp_path: Path, format: Any) -> None:
    documents = {
        "alpaca": r'{"instruction": "a", "output": "b \ud83d"}',
        "chat": r'{"messages": [{"role": "user", "content": "a \ud83d"}, {"role": "assistant", "content": "b"}]}',
    }
    (tmp_path / "a.jsonl").write_text(documents[format])
    tokenizer = train_bpe(["good"], 270, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(DataError, match=r"a\.jsonl, byte 0: the text has \\ud83d"):
        tokenize([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=tokenizer, format=format)


@pytest.mark.parametrize("workers", [1, 2])
def test_empty_documents_are_counted(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 64)
    tokenizer, texts = train_bpe(["some text"], 260, tmp_path / "tokenizer"), ["", "a", "", "b" * 50, "c" * 50, ""]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = tokenize(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=tokenizer, workers=workers)
    assert (result.documents, result.empty, result.skipped) == (3, 3, 0)
