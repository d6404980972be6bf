"""A manifest can be read as it was written. Files that differ from it are found, and the message says where the damage is."""

import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internevo.checkpoint import manifest as module
from internevo.checkpoint.manifest import (
    FORMAT,
    NAME,
    Checksums,
    Chunk,
    FileEntry,
    Head,
    Manifest,
    TensorEntry,
    describe_file,
    instead,
    verify,
)
from internevo.errors import CheckpointError

names = st.text(min_size=1, max_size=8)
numbers = st.integers(0, 2**40)
lists = st.lists(numbers, max_size=3)
manifests = st.builds(
    Manifest,
    step=numbers,
    layout=st.dictionaries(names, numbers, max_size=3),
    versions=st.dictionaries(names, names, max_size=3),
    files=st.dictionaries(names, st.builds(FileEntry, numbers, lists), max_size=3),
    tensors=st.dictionaries(
        names,
        st.builds(TensorEntry, names, lists, st.lists(st.builds(Chunk, names, names, lists, lists), max_size=2)),
        max_size=3,
    ),
    run=names,
)
SMALL = Manifest(3, {"world": 2}, {"torch": "2.13"}, {"a": FileEntry(1, [5])}, {"w": TensorEntry("float32", [2], [])})


@given(manifest=manifests)
def test_a_manifest_can_be_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    manifest.write(folder)
    assert Manifest.read(folder) == manifest
    assert json.loads((folder / NAME).read_text()) == asdict(manifest)
    with mock.patch.object(Manifest, "read", side_effect=AssertionError("the head is enough")):
        assert Head.read(folder) == (manifest.step, manifest.run)
    assert [path.name for path in folder.iterdir()] == [NAME]


@given(manifest=manifests)
def test_manifests_of_older_versions_can_be_read(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> None:
    """Their step is at the beginning, and the identity of the run, if there is one, at the end."""
    folder = tmp_path_factory.mktemp("manifest")
    older = asdict(manifest)
    (folder / NAME).write_text(json.dumps(older) + "\n")
    assert Manifest.read(folder) == manifest
    assert Head.read(folder) == (manifest.step, manifest.run)
    del older["run"]
    (folder / NAME).write_text(json.dumps(older) + "\n")
    assert Head.read(folder) == (manifest.step, "")


def test_writing_again_replaces_the_manifest(tmp_path: Path) -> None:
    SMALL.write(tmp_path)
    later = Manifest(4, {}, {})
    later.write(tmp_path)
    assert Manifest.read(tmp_path) == later


def test_a_folder_without_a_manifest_is_not_a_complete_checkpoint(tmp_path: Path) -> None:
    for read in (Manifest.read, Head.read):
        with pytest.raises(CheckpointError, match=f"is not a complete checkpoint: it has no {NAME}"):
            read(tmp_path)
    (tmp_path / (NAME + ".tmp")).write_text("{}")  # a save that was killed
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        Manifest.read(tmp_path)


def test_another_format_is_named(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(json.dumps({**asdict(SMALL), "format": FORMAT + 1}))
    for read in (Manifest.read, Head.read):
        with pytest.raises(
            CheckpointError, match=f"{NAME} has format {FORMAT + 1}, and this version of internevo reads {FORMAT}"
        ):
            read(tmp_path)


@given(data=st.data())
def test_a_truncated_manifest_is_damaged(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    SMALL.write(folder)
    content = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(content[: data.draw(st.integers(0, len(content.rstrip()) - 1))])
    for read in (Manifest.read, Head.read):
        with pytest.raises(CheckpointError, match=f"{NAME} is damaged"):
            read(folder)


@pytest.mark.parametrize("key", ["format", "step", "layout", "versions", "files", "tensors"])
def test_a_manifest_without_one_of_its_parts_is_damaged(tmp_path: Path, key: str) -> None:
    (tmp_path / NAME).write_text(json.dumps({name: value for name, value in asdict(SMALL).items() if name != key}))
    with pytest.raises(CheckpointError, match=rf"{NAME} is damaged: '{key}'"):
        Manifest.read(tmp_path)


CHANGES: list[dict[str, Any]] = [
    {"files": []}, {"files": None}, {"files": {"a": 3}}, {"files": {"a": {"size": 1}}}, {"tensors": [1]},
    {"files": {"a": {"size": 1, "crc32": [], "more": 1}}}, {"tensors": {"w": None}},
    {"step": "6"}, {"step": None}, {"step": -1}, {"step": True}, {"run": None},
    {"tensors": {"w": {"dtype": "x", "shape": [1]}}}, {"tensors": {"w": {"dtype": "x", "shape": [1], "chunks": [1]}}},
]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        b"[]", b"3", b"null", b"\xff", b'{"format": 2, "files": []}',
        *(json.dumps({**asdict(SMALL), **change}).encode() for change in CHANGES),
    ],
)  # fmt: skip
def test_json_that_is_not_a_manifest_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    for read in (Manifest.read, Head.read):
        with pytest.raises(CheckpointError, match=f"{NAME} is damaged"):
            read(tmp_path)


@pytest.mark.parametrize("step", ['"6"', "null", "-1", "1.0"])
def test_a_head_of_wrong_values_is_damaged(tmp_path: Path, step: str) -> None:
    SMALL.write(tmp_path)
    path = tmp_path / NAME
    path.write_text(path.read_text().replace(f'"step": {SMALL.step}', f'"step": {step}', 1))
    with pytest.raises(CheckpointError, match=f"{NAME} is damaged: step = "):
        Head.read(tmp_path)


# Checksums -----------------------------------------------------------------------------------------------------------

BLOCK = 16
contents = st.binary(max_size=5 * BLOCK)


@given(pieces=st.lists(contents, max_size=6), views=st.booleans())
def test_checksums_do_not_depend_on_the_pieces_in_which_the_bytes_come(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], views: bool
) -> None:
    whole = b"".join(pieces)
    path = tmp_path_factory.mktemp("sums") / "file"
    path.write_bytes(whole)
    with mock.patch.object(module, "BLOCK", BLOCK):
        sums = Checksums()
        for piece in pieces:
            sums.update(memoryview(piece) if views else piece)
        wanted = FileEntry(len(whole), [zlib.crc32(whole[n : n + BLOCK]) for n in range(0, len(whole), BLOCK)])
        assert sums.entry() == describe_file(path) == wanted


@given(content=st.binary(min_size=1, max_size=5 * BLOCK), data=st.data())
def test_a_changed_byte_is_found_and_its_block_is_named(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data: Any
) -> None:
    folder = tmp_path_factory.mktemp("verify")
    position = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[position] ^= data.draw(st.integers(1, 255))
    with mock.patch.object(module, "BLOCK", BLOCK):
        (folder / "file").write_bytes(content)
        manifest = Manifest(1, {}, {}, {"file": describe_file(folder / "file")})
        verify(folder, ["file"], manifest)
        (folder / "file").write_bytes(changed)
        first = position // BLOCK * BLOCK
        damage = f"in bytes {first} to {min(first + BLOCK, len(content))};"
        with pytest.raises(CheckpointError, match=f"file is damaged: its checksum differs {damage}"):
            verify(folder, ["file"], manifest)


def test_files_that_are_missing_or_of_another_size_are_named_and_other_files_are_not_read(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"12345")
    manifest = Manifest(1, {}, {}, {name: describe_file(tmp_path / name) for name in ("a", "b", "c")})
    (tmp_path / "b").write_bytes(b"123456")
    (tmp_path / "c").unlink()
    verify(tmp_path, ["a"], manifest)
    with pytest.raises(CheckpointError, match="b has 6 bytes, and the manifest says 5"):
        verify(tmp_path, ["a", "b"], manifest)
    with pytest.raises(CheckpointError, match="c is missing: the checkpoint is incomplete"):
        verify(tmp_path, ["c"], manifest)


def test_a_file_without_checksums_in_the_manifest_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(CheckpointError, match="a is damaged: its checksum differs in bytes 0 to 5"):
        verify(tmp_path, ["a"], Manifest(1, {}, {}, {"a": FileEntry(5, [])}))


def test_the_error_says_how_to_go_on_without_a_damaged_checkpoint(tmp_path: Path) -> None:
    """It names the folder to move away, and the one to go on from."""
    one, two, three = (tmp_path / "run" / "checkpoints" / f"step-0000000{step}" for step in (1, 2, 3))
    for folder in (one, two, three):
        folder.mkdir(parents=True)
        SMALL.write(folder)
    (two / NAME).unlink()  # it is not complete
    with pytest.raises(CheckpointError) as error:
        verify(three, ["a"], SMALL)
    said = f"move {three} to another place, and the same command goes on from step-00000001; or start a run in another folder"
    assert said in str(error.value) and f"ckpt.load_ckpt_info.path={one}" in str(error.value)
    (tmp_path / "run" / "snapshots" / "0").mkdir(parents=True)
    SMALL.write(tmp_path / "run" / "snapshots" / "0")
    assert "goes on from step-00000001 or a later snapshot" in instead(three)
    assert "there is no earlier checkpoint" in instead(one) and "use another copy of it" in instead(tmp_path / "converted")
