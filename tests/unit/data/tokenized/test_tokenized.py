"""Tokenized files in every format: what is read is what was written, and errors say where a file is damaged."""

import pwd
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from internevo.data.raw import files
from internevo.data.raw.files import sample_content
from internevo.data.rows import PackedRows
from internevo.data.tokenized.files import MASKED_ZERO, TokenFile, TokenWriter, read_meta
from internevo.data.tokenized.index import open_index
from internevo.errors import DataError
from tests.unit.data.writers import DOCUMENTS, write_binary, write_json, write_megatron


@settings(max_examples=60, deadline=None)
@given(documents=DOCUMENTS, masks=st.booleans(), seed=st.integers(0, 99))
def test_json_lines_and_the_compact_form_read_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, documents: Any, masks: bool, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("formats")
    draw = np.random.default_rng(seed)
    stored = [np.array(d) for d in documents]
    if masks:
        stored = [np.where(draw.random(len(d)) < 0.3, np.where(d == 0, MASKED_ZERO, -d), d) for d in stored]
    write_json(folder / "json" / "a.bin", stored, np.int32)
    write_binary(folder / "int32" / "a.bin", stored, 10**6)
    if not masks:
        write_binary(folder / "uint16" / "a.bin", stored, 501)
    for form, itemsize in {"json": 0, "int32": 4, **({} if masks else {"uint16": 2})}.items():
        file = TokenFile.open(folder / form / "a.bin")
        assert file.itemsize == itemsize
        assert all(np.array_equal(file.read(n), d) for n, d in enumerate(stored))
        assert np.array_equal(file.read(0, 1, 3), stored[0][1:3])


def test_the_index_is_cached_and_made_again_when_files_change(tmp_path: Path) -> None:
    write_binary(tmp_path / "en" / "a.bin", [[1, 2]], 501)
    assert open_index(tmp_path).fingerprint() == open_index(tmp_path).fingerprint()
    assert len(list((tmp_path / ".internevo").iterdir())) == 1
    write_binary(tmp_path / "cn" / "b.bin", [[1, 2, 3]], 501)
    index = open_index(tmp_path)
    assert index.types == ["cn", "en"] and index.tokens == 5


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[:-5],
    "noise": lambda content: b"\xff" * len(content),
    "zeros": lambda content: bytes(len(content)),
    "another kind": lambda content: b"[]",
    "a changed byte": lambda content: content[:-2] + bytes([content[-2] ^ 1]) + content[-1:],
}


@pytest.mark.parametrize("name", ["index.json", "first.npy", "documents.npy", "ends.npy"])
@pytest.mark.parametrize("damage", [*DAMAGE, "missing", "a folder"])
def test_a_damaged_index_is_made_again(tmp_path: Path, name: str, damage: str) -> None:
    write_binary(tmp_path / "en" / "a.bin", [[1, 2], [3]], 501)
    wanted = open_index(tmp_path)
    (path,) = tmp_path.glob(f".internevo/*/{name}")
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(DAMAGE[damage](content))
    found = open_index(tmp_path)
    assert found.fingerprint() == wanted.fingerprint() and [found.read(n).tolist() for n in range(2)] == [[1, 2], [3]]
    assert path.read_bytes() == content and len(list((tmp_path / ".internevo").iterdir())) == 1


def test_without_a_folder_for_it_the_index_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_binary(tmp_path / "en" / "a.bin", [[1, 2], [3]], 501)
    (tmp_path / ".internevo").write_text("mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".internevo"))
    assert open_index(tmp_path).tokens == 3 and (tmp_path / ".internevo").read_text() == "mine"


@pytest.mark.parametrize("other", [[[3], [1, 2]], [[1, 3], [2]], [[2, 1], [3]], [[1], [2, 3]], [[1, 2], [4]], [[1, 2, 3]]])
@pytest.mark.parametrize("write", [write_json, partial(write_binary, vocab_size=501)])
def test_the_fingerprint_changes_with_content_and_order_and_not_with_the_place(
    tmp_path: Path, other: list[list[int]], write: Callable[..., None]
) -> None:
    for name, documents in (("a", [[1, 2], [3]]), ("b", other), ("c", [[1, 2], [3]])):
        write(tmp_path / name / "en" / "a.bin", documents)
    fingerprints = [open_index(tmp_path / name).fingerprint() for name in "abc"]
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]
    assert open_index(tmp_path / "a").fingerprint() == fingerprints[0]


def test_samples_cover_large_files_and_some_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SAMPLES", 8)
    monkeypatch.setattr(files, "SAMPLE_BYTES", 10)
    paths = [tmp_path / f"{n}" for n in range(20)]
    for path in paths:
        path.write_bytes(bytes(range(100)) * 5)
    samples = [sample_content(paths[:1]), sample_content(paths[:2]), sample_content(paths)]
    assert len({*samples, sample_content([])}) == 4
    paths[0].write_bytes(bytes(reversed(range(100))) * 5)
    paths[1].write_bytes(b"")
    assert not {sample_content(paths[:1]), sample_content(paths[:2]), sample_content(paths)} & set(samples)


def test_a_process_without_a_home_and_a_user_makes_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that is started with a number as its user, here with a folder that cannot have a cache either."""

    def fail(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", fail)
    monkeypatch.chdir(tmp_path)
    write_binary(tmp_path / "data" / "part.bin", [[1, 2], [3]], 100)
    (tmp_path / "data" / ".internevo").write_text("a file in place of the folder")
    for _ in range(2):
        assert len(open_index(tmp_path / "data").documents) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_the_error_says_where_a_truncated_binary_file_ends(tmp_path: Path) -> None:
    path = tmp_path / "en" / "a.bin"
    write_binary(path, [[1, 2, 3], [4, 5, 6]], 501)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"a\.bin is truncated: it ends at byte 9, and document 1 of 2 \(byte 6, 3 tokens\)"):
        open_index(tmp_path)


def test_the_error_says_where_a_truncated_json_file_ends(tmp_path: Path) -> None:
    path = tmp_path / "en" / "a.bin"
    write_json(path, [[1, 2, 3], [4, 5, 6]])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"a\.bin, document 1 \(byte 22\) is not a line"):
        open_index(tmp_path)


def test_the_error_names_a_meta_that_does_not_match(tmp_path: Path) -> None:
    path = tmp_path / "en" / "a.bin"
    write_binary(path, [[1, 2, 3], [4, 5, 6]], 501)
    np.save(open(f"{path}.meta", "wb"), np.array([[0, 3], [6, 2]]))
    with pytest.raises(DataError, match=r"\.meta does not match its \.bin: it describes 10 bytes, but the \.bin has 12"):
        open_index(tmp_path)
    write_json(path, [[1, 2, 3], [4, 5, 6]])
    np.save(open(f"{path}.meta", "wb"), np.array([[0, 3], [22, 4]]))
    with pytest.raises(DataError, match=r"has 3 tokens, but its \.meta says 4"):
        open_index(tmp_path)
    (tmp_path / "en" / "a.bin.meta").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="is not a NumPy array"):
        open_index(tmp_path)
    (tmp_path / "en" / "a.bin.meta").unlink()
    with pytest.raises(DataError, match=r"has no a\.bin\.meta next to it"):
        open_index(tmp_path)


def test_a_folder_without_bin_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="contains no .bin file: make tokenized data with `internevo tokenize`"):
        open_index(tmp_path)


def test_raw_data_in_place_of_tokenized_data_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"nor the path .*: make .* with `internevo tokenize` .* data\.type = 'streaming'"):
        open_index(tmp_path / "chats.jsonl")
    with pytest.raises(DataError, match=r"without its suffix: leave the suffix out"):
        open_index(tmp_path / "a.bin")


def test_int32_offsets_beyond_2_gib_are_repaired(tmp_path: Path) -> None:
    offsets = np.array([0, 2**31 - 5, 2**31 + 10, 2**32 - 1, 2**32 + 7], dtype=np.int64)
    meta = np.stack([offsets, np.full(5, 3)], axis=1)
    np.save(open(tmp_path / "a.bin.meta", "wb"), meta.astype(np.int32))
    assert read_meta(tmp_path / "a.bin")[:, 0].tolist() == offsets.tolist()


@pytest.mark.parametrize(("dtype", "code"), [("<i4", 4), ("<u2", 8)])
@example([[[]], [[0]]])  # here offsets alone do not tell how many bytes an id has
@given(st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=9), min_size=1, max_size=3), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_a_megatron_dataset_has_the_rows_of_the_tokenized_one(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, code: int, documents: Any
) -> None:
    folder, again = tmp_path_factory.mktemp("megatron"), tmp_path_factory.mktemp("again")
    joined = [[token for sequence in document for token in sequence] for document in documents]
    (folder / "en").mkdir()
    write_megatron(folder / "en" / "part", documents, dtype, code)
    index = open_index(folder)
    assert [index.read(n).tolist() for n in range(len(index))] == [ids for ids in joined if ids]
    prefix = open_index(folder / "en" / "part")  # the path that Megatron-LM is given
    assert [prefix.read(n).tolist() for n in range(len(prefix))] == [ids for ids in joined if ids]
    if index.tokens:
        writer = TokenWriter(again / "en" / "part.bin")
        writer.write(np.array([t for ids in joined for t in ids]), np.array([len(ids) for ids in joined]))
        writer.close()
        ours, theirs = (PackedRows(open_index(root), 8, 65536) for root in (again, folder))
        assert len(ours) == len(theirs) > 0
        for row, other in ((ours[n], theirs[n]) for n in range(len(ours))):
            assert row.tokens.tolist() == other.tokens.tolist() and row.labels.tolist() == other.labels.tolist()


def test_the_error_names_a_damaged_megatron_index(tmp_path: Path) -> None:
    write_megatron(tmp_path / "part", [[[1, 2]], [[3]]], "<i4", 4)
    content = (tmp_path / "part.idx").read_bytes()
    for broken, message in (
        (content[:-1], r"part\.idx is truncated: it has 81 bytes; 2 sequences and 3 document boundaries take 82"),
        (b"x" + content[1:], r"part\.idx is not the index of a Megatron dataset"),
        (content[:17] + b"\x07" + content[18:], "ids of type 7"),
        (content[:-8] + b"\x09" + content[-7:], "its document boundaries do not match its 2 sequences"),
    ):
        (tmp_path / "part.idx").write_bytes(broken)
        with pytest.raises(DataError, match=message):
            TokenFile.open(tmp_path / "part.bin")
    (tmp_path / "part.idx").write_bytes(content)
    (tmp_path / "part.bin").write_bytes(b"\x00" * 8)
    with pytest.raises(DataError, match=r"part\.bin is truncated"):
        TokenFile.open(tmp_path / "part.bin")
