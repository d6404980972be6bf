"""Raw documents: whatever the format, the compression and the cut, the same texts come out; what is broken is named."""

import csv
import gzip
import io
import json
import random

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from internevo.config import load_config
from internevo.data.build import train_source, valid_rows
from internevo.data.encoding import encode
from internevo.data.encoding.formats import fields_of, text_of
from internevo.data.encoding.tokenize import tokenize
from internevo.data.raw import inputs
from internevo.data.raw.documents import documents
from internevo.data.raw.inputs import cut, find_files, is_sequential, make_jobs
from internevo.data.rows import RandomRows
from internevo.data.tokenized.index import open_index
from internevo.errors import DataError
from internevo.text.tokenizer import train_bpe
from internevo.train.check import check
from tests.conftest import write_config, write_dataset

LINES = ("jsonl", "ndjson")
PACK = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": lambda content: zstandard.compress(content[:100]) + zstandard.compress(content[100:]),  # two frames
}


@pytest.fixture
def corpus():
    """Texts with all that could be taken for a border: quotes, commas, tabs, line ends of every kind, several scripts."""
    draw = random.Random(3)
    pieces = ["word ", '"', '""', ",", "\t", "\n", "\r\n", "\r", "春眠不觉晓", "é", "\u2028", "🙂", "{", "\\"]
    return ["".join(draw.choices(pieces, k=draw.randint(1, 60))) for _ in range(150)]


def rows_of(corpus, delimiter):
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([["id", "text"], *enumerate(corpus)])
    return out.getvalue().encode()


def write(folder, corpus, suffix, packing=""):
    """One file of the format, or for txt one of each text."""
    folder.mkdir(exist_ok=True)
    path = folder / f"corpus.{suffix}{packing}"
    if suffix == "parquet":
        parquet.write_table(pyarrow.table({"id": range(len(corpus)), "text": corpus}), path, row_group_size=40)
        return path
    if suffix == "txt":
        for number, text in enumerate(corpus):
            (folder / f"{number:04d}.txt{packing}").write_bytes(PACK[packing](text.encode()))
        return folder
    content = {
        "json": json.dumps([{"text": text} for text in corpus]).encode(),
        **dict.fromkeys(LINES, "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in corpus).encode()),
        "csv": rows_of(corpus, ","),
        "tsv": rows_of(corpus, "\t"),
    }[suffix]
    path.write_bytes(PACK[packing](content))
    return path


def read(path, key=None):
    texts = []
    for job in make_jobs(find_files([path], None, None, ())):
        for found in documents(job, fields_of("text", key)):
            text = found if isinstance(found, DataError) else text_of(found, key)
            if isinstance(text, DataError):
                raise text
            texts.append(text)
    return texts


@pytest.mark.parametrize("size", [100, 1 << 20])
@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", ["txt", "json", *LINES, "csv", "tsv"])
def test_every_format_gives_the_same_texts_however_it_is_cut(tmp_path, monkeypatch, corpus, suffix, packing, size):
    monkeypatch.setattr(inputs, "JOB_BYTES", size)
    path = write(tmp_path / "in", corpus, suffix, packing)
    assert read(path) == corpus and read(path.parent) == corpus
    jobs = list(make_jobs(find_files([path], None, None, ())))
    files = [path] if path.is_file() else list(path.iterdir())
    assert sum(job.size for job in jobs) == sum(file.stat().st_size for file in files)
    assert len(jobs) > 1 or size > 100 or suffix == "json" or packing


def test_parquet_gives_its_texts_by_row_groups(tmp_path, corpus):
    path = write(tmp_path, corpus, "parquet")
    jobs = list(make_jobs(find_files([tmp_path], None, None, ())))
    assert len(jobs) == 4 and sum(job.size for job in jobs) == path.stat().st_size
    assert read(path) == corpus


@pytest.mark.parametrize(("suffix", "packing"), [("jsonl", ".zst"), ("csv", ".gz"), ("parquet", "")])
def test_tokens_do_not_depend_on_format_and_workers(tmp_path, monkeypatch, corpus, suffix, packing):
    monkeypatch.setattr(inputs, "JOB_BYTES", 700)
    tokenizer = train_bpe(corpus, 300, tmp_path / "tokenizer")
    for name, source, workers in (
        ("plain", write(tmp_path / "a", corpus, "jsonl"), 1),
        ("other", write(tmp_path / "b", corpus, suffix, packing), 3),
    ):
        seen = []
        result = tokenize(
            [source], tmp_path / name, tokenizer=tokenizer, workers=workers, progress=lambda *p, s=seen: s.append(p)
        )
        assert result.documents == len(corpus)
        assert seen[-1] == (source.stat().st_size,) * 2
    plain, other = (open_index(tmp_path / name) for name in ("plain", "other"))
    assert all(np.array_equal(plain.read(n), other.read(n)) for n in range(len(corpus)))


@pytest.mark.parametrize("suffix", ["jsonl.gz", "csv.zst", "txt.gz", "parquet"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_a_damaged_file_is_named(tmp_path, corpus, suffix, damage):
    kind, _, packing = suffix.partition(".")
    path = write(tmp_path / "in", corpus, kind, "." + packing if packing else "")
    path = sorted(path.iterdir())[0] if path.is_dir() else path
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-12]
    else:
        content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(DataError, match=path.name):
        read(path)


def test_a_row_without_text_is_named(tmp_path):
    bad = tmp_path / "bad.csv"
    bad.write_text("id,text\n1,good\n2\n")
    with pytest.raises(DataError, match=r"bad\.csv, line 2 behind byte 8: 1 fields, and the header names 2"):
        read(bad)
    with pytest.raises(DataError, match=r"no text under 'body' \(it has 'id', 'text'\); give --text-key"):
        read(bad, "body")
    parquet.write_table(pyarrow.table({"text": ["good", None]}), tmp_path / "bad.parquet")
    with pytest.raises(
        DataError, match=r"bad\.parquet, row group 0, row 1 has no text under .* \(it has 'text' \(NoneType\)\)"
    ):
        read(tmp_path / "bad.parquet")


def test_mocked_data_is_random_whatever_the_folders_say(tmp_path):
    config = load_config(write_config(tmp_path, tmp_path / "nothing", data__type="mocked", data__valid_every=2), [])
    check(config, 1)
    assert isinstance(train_source(config.data, 97).rows, RandomRows) and isinstance(valid_rows(config.data, 97), RandomRows)


def test_links_are_followed_and_a_loop_of_them_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "in" / "b.txt").symlink_to(tmp_path / "real" / "a.txt")
    assert read(tmp_path / "in") == ["a", "a"]
    (tmp_path / "real" / "back").symlink_to(tmp_path / "in")
    with pytest.raises(DataError, match=r"in/link/back is a link that leads back to .*/in, which it lies in: remove it"):
        read(tmp_path / "in")
    with pytest.raises(DataError, match="leads back"):
        open_index(tmp_path / "in")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.json", "a.txt", "a.parquet"])
def test_a_file_that_vanishes_is_named(tmp_path, corpus, name):
    kind, _, packing = name[2:].partition(".")
    path = write(tmp_path / "in", corpus[:1], kind, "." + packing if packing else "")
    path = next(path.iterdir()) if path.is_dir() else path
    files = find_files([tmp_path / "in"], None, None, ())
    jobs = [] if is_sequential(*files[0]) else list(make_jobs(files))
    path.unlink()
    found = [found for job in jobs or cut(*files[0]) for found in documents(job, ("text",))]
    assert len(found) == 1 and isinstance(found[0], DataError) and path.name in str(found[0])


def test_tokenized_rows_that_cannot_be_read_stop_the_run_or_are_left_out(tmp_path):
    folder = write_dataset(tmp_path / "data")
    data = load_config(write_config(tmp_path, folder), []).data
    with pytest.raises(DataError, match="outside the vocabulary of 50"):
        (source := train_source(data, 50)).take(source.start(), 40, range(40))
    source = train_source(data.model_copy(update={"on_error": "skip"}), 96)
    taken = source.take(source.start(), len(source.rows), range(len(source.rows)))
    assert 0 < len(taken.bad) < taken.count and all("token id 96 is outside" in message for message in taken.bad)
    assert sum(not (row.labels >= 0).any() for row in taken.rows) == len(taken.bad)


def test_python_files_are_texts_when_the_format_says_so(tmp_path, run):
    (tmp_path / "a.py").write_text("x = 1\n" * 99)
    run(
        "tokenize", tmp_path, "--format", "text", "--pattern", "*.py", "--train-tokenizer", "bpe", "--vocab-size", 270,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert len(open_index(tmp_path / "out")) == 1


def test_an_enormous_document_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "LONGEST", 5000)
    lines = [json.dumps({"text": text}) for text in ("small", "x" * 6000, "small")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tokenizer = train_bpe(["small"], 260, tmp_path)
    with pytest.raises(DataError, match=r"a\.jsonl, byte 18: a document of 6,000 characters is more than"):
        tokenize([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=tokenizer)
    assert tokenize([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=tokenizer, on_error="skip").bad == 1
    assert len(open_index(tmp_path / "out")) == 2
