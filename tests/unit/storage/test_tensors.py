"""Safetensors files, against the safetensors library both ways; damaged files are named."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from internevo.checkpoint.manifest import Checksums, describe_file
from internevo.errors import UsageError
from internevo.storage import header as module
from internevo.storage.header import DTYPES, Spec
from internevo.storage.tensors import ShardWriter, TensorFile

shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)
empty_too = st.lists(st.integers(0, 6), max_size=4).map(tuple)
Tensors = dict[str, Tensor]


@st.composite
def random_tensors(draw: st.DrawFn, shapes: st.SearchStrategy[tuple[int, ...]] = shapes) -> Tensors:
    """Random bytes of every dtype and shape, also of no axis."""
    found, generator = {}, torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    for name in draw(st.lists(st.text('abc.é 文"\\', min_size=1, max_size=6), min_size=1, max_size=6, unique=True)):
        shape, dtype = draw(shapes), draw(st.sampled_from(list(DTYPES.values())))
        high = 2 if dtype == torch.bool else 256
        data = torch.randint(0, high, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        found[name] = data.view(dtype).view(shape)
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit: some of the random numbers are no numbers."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def specs_of(tensors: Tensors) -> dict[str, Spec]:
    return {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def file_name(number: int, count: int) -> str:
    return f"{number}-of-{count}.safetensors"


# Reading -------------------------------------------------------------------------------------------------------------


@given(tensors=random_tensors(empty_too), data=st.data())
def test_what_the_library_writes_is_read_by_any_range_of_rows(
    tmp_path_factory: pytest.TempPathFactory, tensors: Tensors, data: Any
) -> None:
    """Rows are those of the view [everything but the last axis, last axis]; of a vector, its elements."""
    path = tmp_path_factory.mktemp("read") / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "more": "x"})
    file = TensorFile(path)
    assert file.specs == specs_of(tensors)
    for name, tensor in tensors.items():
        spec = file.specs[name]
        rows = tensor.reshape(spec.rows, *spec.row_shape)
        assert spec.row_shape == tensor.shape[-1:] if tensor.dim() > 1 else spec.row_shape == ()
        assert len(rows) == math.prod(tensor.shape[:-1]) if tensor.dim() > 1 else len(rows) == tensor.numel()
        start = data.draw(st.integers(0, spec.rows))
        count = data.draw(st.integers(0, spec.rows - start))
        assert same(file.read(name, start, count), rows[start : start + count])
        assert bytes(file.byte_range(name, start, count).read()) == bytes(_bytes(rows[start : start + count]).tolist())
        assert same(file.read(name, 0, spec.rows).view(spec.shape), tensor)


@given(shape=shapes, dtype=st.sampled_from(list(DTYPES.values())), limit=st.integers(1, 100), data=st.data())
def test_chunks_are_all_rows_in_order_and_small(shape: tuple[int, ...], dtype: torch.dtype, limit: int, data: Any) -> None:
    spec = Spec(shape, dtype)
    start = data.draw(st.integers(0, spec.rows))
    count = data.draw(st.integers(0, spec.rows - start))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", limit)
        chunks = list(spec.chunks(start, count))
    assert [row for first, number in chunks for row in range(first, first + number)] == list(range(start, start + count))
    row_bytes = math.prod(spec.row_shape) * dtype.itemsize
    assert all(number == 1 or number * row_bytes <= limit for _, number in chunks)


# Writing -------------------------------------------------------------------------------------------------------------


@given(tensors=random_tensors(empty_too), shard_bytes=st.integers(1, 200), copied=st.booleans(), data=st.data())
def test_the_library_reads_what_is_written_in_shards(
    tmp_path_factory: pytest.TempPathFactory, tensors: Tensors, shard_bytes: int, copied: bool, data: Any
) -> None:
    """Rows come in pieces of any size, as tensors or as places in another file; checksums are told every byte."""
    folder = tmp_path_factory.mktemp("write")
    save_file(tensors, folder / "source")
    source = TensorFile(folder / "source")
    sums: dict[str, Checksums] = {}

    def seen(file: str, part: memoryview) -> None:
        sums.setdefault(file, Checksums()).update(part)

    with ShardWriter(folder / "out", specs_of(tensors), shard_bytes, file_name, seen) as writer:
        for name, spec in specs_of(tensors).items():
            start = 0
            while start < spec.rows:
                count = data.draw(st.integers(1, spec.rows - start))
                if copied:
                    writer.copy(source.byte_range(name, start, count))
                else:
                    writer.add(tensors[name].reshape(spec.rows, *spec.row_shape)[start : start + count])
                start += count

    files = sorted((folder / "out").iterdir())
    parts = {path.name: load_file(path) for path in files}
    assert {name: file for file, part in parts.items() for name in part} == writer.files
    found = {name: tensor for part in parts.values() for name, tensor in part.items()}
    assert found.keys() == tensors.keys() and all(same(found[name], tensor) for name, tensor in tensors.items())
    for path in files:
        assert sums[path.name].entry() == describe_file(path)
        size = sum(tensor.nbytes for tensor in parts[path.name].values())
        assert len(parts[path.name]) == 1 or size <= shard_bytes
    assert [path.name for path in files] == sorted(file_name(n + 1, len(files)) for n in range(len(files)))


@pytest.mark.parametrize("sizes", [[0], [0, 0], [3, 0], [0, 3], [10, 0, 10, 0], [20, 0, 0, 20]], ids=str)
@pytest.mark.parametrize("added", [True, False])
def test_tensors_without_elements_are_written(tmp_path: Path, sizes: list[int], added: bool) -> None:
    """Whether the caller adds their rows or not: there are none."""
    specs = {f"t{n}": Spec((size,), torch.uint8) for n, size in enumerate(sizes)}
    with ShardWriter(tmp_path, specs, 10, file_name) as writer:
        for spec in specs.values():
            if added or spec.rows:
                writer.add(torch.ones(spec.shape, dtype=spec.dtype))
    found = {name: tensor for path in tmp_path.iterdir() for name, tensor in load_file(path).items()}
    assert {name: tensor.tolist() for name, tensor in found.items()} == {f"t{n}": [1] * size for n, size in enumerate(sizes)}


def test_shards_are_filled_in_order(tmp_path: Path) -> None:
    specs = {name: Spec((size,), torch.uint8) for name, size in (("a", 4), ("b", 6), ("c", 1), ("d", 30), ("e", 2))}
    writer = ShardWriter(tmp_path, specs, 10, file_name)
    assert [int(writer.files[name][0]) for name in "abcde"] == [1, 1, 2, 3, 4]
    for spec in specs.values():
        writer.add(torch.zeros(spec.shape, dtype=spec.dtype))
    writer.close()


def test_a_tensor_that_is_not_contiguous_is_written_by_its_elements(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    writer = ShardWriter(tmp_path, {"x": Spec((4, 3), torch.float32)}, 100, lambda number, count: "x")
    writer.add(tensor)
    writer.close()
    assert torch.equal(load_file(tmp_path / "x")["x"], tensor)


def test_missing_rows_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"x": Spec((4, 3), torch.float32), "y": Spec((2,), torch.float32)}, 10, file_name)
    writer.add(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"1-of-2\.safetensors lacks 12 bytes; files not started: 1"):
        writer.close()


def test_an_error_of_the_writing_thread_is_raised_by_the_caller(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    writer = ShardWriter(tmp_path, {"x": Spec((4, 3), torch.float32)}, 100, lambda number, count: "folder")
    with pytest.raises(IsADirectoryError):
        for _ in range(4):
            writer.add(torch.zeros(1, 3))
        writer.close()


# Damage --------------------------------------------------------------------------------------------------------------

GOOD = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@given(data=st.data())
def test_a_file_that_is_cut_short_is_named(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.safetensors"
    content = save(GOOD)
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(UsageError, match=r"a\.safetensors is not a safetensors file"):
        TensorFile(path)


def test_a_file_that_is_cut_while_it_is_open_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(GOOD))
    file = TensorFile(path)
    with open(path, "r+b") as cut:
        cut.truncate(path.stat().st_size - 1)
    last = max(GOOD, key=lambda name: file.byte_range(name, 0, 1).offset)
    with pytest.raises(UsageError, match="ends at byte"):
        file.read(last, 0, file.specs[last].rows)
    with pytest.raises(UsageError, match="ends at byte"):
        file.byte_range(last, 0, file.specs[last].rows).read()


def opened(path: Path) -> TensorFile | str:
    """The file, or why it is refused."""
    try:
        return TensorFile(path)
    except UsageError as error:
        return str(error)


def change_a_byte(path: Path, position: int, change: int) -> bytes:
    """Writes a good file in which a byte of the header, or of its length, is changed. Returns its content."""
    content = bytearray(save(GOOD))
    content[position % (8 + int.from_bytes(content[:8], "little"))] ^= change
    path.write_bytes(content)
    return bytes(content)


@given(position=st.integers(0, 10**6), change=st.integers(1, 255))
def test_a_changed_byte_in_the_header_is_an_error_that_names_the_file_or_still_a_file(
    tmp_path_factory: pytest.TempPathFactory, position: int, change: int
) -> None:
    path = tmp_path_factory.mktemp("changed") / "a.safetensors"
    change_a_byte(path, position, change)
    found = opened(path)
    if isinstance(found, str):
        assert f"{path} is not a safetensors file" in found
    else:  # a letter of a name has changed, say
        assert all(found.read(name, 0, spec.rows).numel() == math.prod(spec.shape) for name, spec in found.specs.items())


def refused_by_library(content: bytes) -> bool:
    try:
        load(content)
    except Exception:
        return True
    return False


def entries(draw: st.DrawFn) -> Any:
    """One entry of a header, with numbers, types and keys that are wrong now and then."""
    number = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, -1, -4, 2.0, True, None, "4", 2**63, 2**64, 10**30])
    values = {
        "dtype": draw(st.sampled_from(["F32", "F32", "F32", "BF16", "U8", "f32", None])),
        "shape": draw(st.lists(number, max_size=3)),
        "data_offsets": draw(st.lists(number, min_size=2, max_size=2)),
        "more": draw(st.sampled_from([None, -1.5, {"a": [1]}])),
    }
    return {
        key: value
        for key, value in values.items()
        if draw(st.integers(0, 30)) and (key != "more" or not draw(st.integers(0, 9)))
    }


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Headers in which tensors overlap, leave holes, are too long, or have numbers that are none; some are right."""
    size, header = draw(st.sampled_from([0, 4, 8, 24])), {}
    if draw(st.booleans()):
        begin = draw(st.sampled_from([0, 0, 0, 4, -4]))
        for name in draw(st.lists(st.sampled_from(["a", "b", "c", "\ud800"]), max_size=3, unique=True)):
            count = draw(st.integers(0, 3))
            header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [begin, begin + 4 * count]}
            begin += draw(st.sampled_from([4 * count, 4 * count, 4 * count, 0]))
        size = draw(st.sampled_from([begin, begin, size]))
    else:
        header = {name: entries(draw) for name in draw(st.lists(st.sampled_from("ab"), max_size=2, unique=True))}
    if not draw(st.integers(0, 4)):
        header["__metadata__"] = draw(st.sampled_from([None, {}, {"a": "b"}, {"a": 1}, [], "x", {"a": "\udc00"}]))
    text = json.dumps(header)
    text = draw(st.sampled_from(["", "", "", " ", "\ufeff"])) + text + draw(st.sampled_from(["", "", "   ", "x", "\0"]))
    encoded = text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16"])))
    return len(encoded).to_bytes(8, "little") + encoded + bytes(max(0, size))


@settings(max_examples=300)
@given(content=headers())
def test_what_the_library_refuses_is_refused_and_what_is_read_is_what_it_reads(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("header") / "a.safetensors"
    path.write_bytes(content)
    found = opened(path)
    if isinstance(found, str):
        assert f"{path} is not a safetensors file" in found
    else:
        assert not refused_by_library(content)
        assert {n: found.read(n, 0, spec.rows).tolist() for n, spec in found.specs.items()} == {
            n: (t.flatten(0, -2) if t.dim() > 1 else t.flatten()).tolist() for n, t in load(content).items()
        }


@given(position=st.integers(0, 10**6), change=st.integers(1, 255))
def test_a_changed_byte_that_the_library_refuses_is_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, change: int
) -> None:
    path = tmp_path_factory.mktemp("changed") / "a.safetensors"
    content = change_a_byte(path, position, change)
    assert isinstance(opened(path), str) or not refused_by_library(content)


@pytest.mark.parametrize("depth", [100, 2_000, 200_000])
def test_a_deeply_nested_header_is_refused(tmp_path: Path, depth: int) -> None:
    text = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(UsageError, match=r"a\.safetensors is not a safetensors file"):
        TensorFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ['{"a":%s,"a":%s}', '{"a":%s,"\\u0061":%s}'])
def test_a_name_that_comes_twice_is_refused(tmp_path: Path, text: str) -> None:
    header = text.replace("%s", json.dumps(entry())).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    with pytest.raises(UsageError, match="a key twice"):
        TensorFile(tmp_path / "a.safetensors")


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        [], 3, None, {"a": 3}, {"a": {}}, {"a": entry(dtype="F33")}, {"a": entry(dtype=[1])}, {"a": entry(dtype=None)},
        {"a": entry(shape=5)}, {"a": entry(shape=["x", 3])}, {"a": entry(offsets=[0])}, {"a": entry(offsets=[0, 23])},
        {"a": entry(offsets=None)}, {"a": entry(offsets=[24, 48])}, {"a": entry(shape=[2, 4])},
        {"a": entry(shape=[-2, -3])}, {"a": entry(shape=[2.0, 3])}, {"a": entry(shape=[True, 6])},
        {"a": entry(offsets=[-24, 0])},
        {"a": entry(), "b": entry()}, {"a": entry(shape=[1], offsets=[20, 24])}, {"a": entry(shape=[0, 2**40, 2**40])},
        {"__metadata__": {"x": 1}, "a": entry()}, {"a": entry(shape=[0, 10**30])}, {"__metadata__": [], "a": entry()}, {},
    ],
)  # fmt: skip
def test_a_header_that_does_not_fit_is_named(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    with pytest.raises(UsageError, match=r"a\.safetensors is not a safetensors file"):
        TensorFile(tmp_path / "a.safetensors")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.safetensors cannot be read"):
        TensorFile(tmp_path / "none.safetensors")


@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_a_part_of_a_tensor_is_read_wherever_it_is(
    tmp_path_factory: pytest.TempPathFactory, data: Any, shape: list[int]
) -> None:
    path = tmp_path_factory.mktemp("part") / "model.safetensors"
    tensor = torch.randn(shape)
    save_file({"before": torch.ones(3), "x": tensor}, path)
    slices = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        slices.append(slice(start, data.draw(st.integers(start, size))))
    expected = tensor[tuple(slices)]
    out = torch.full((2, *expected.shape), -1.0)[1]  # a part of another tensor
    TensorFile(path).read_box("x", [part.start for part in slices], out)
    assert torch.equal(out, expected)
