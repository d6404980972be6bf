"""A conversion writes its target, and changes nothing else."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from internevo import load_model, save_hf
from internevo.commands.arguments import parse_size
from internevo.commands.convert import convert
from internevo.errors import UsageError
from internevo.models.config import DecoderConfig
from internevo.models.decoder import Decoder
from internevo.models.huggingface.owned import MARK
from tests.conftest import Run, random_model
from tests.kills import kill_at_every_moment
from tests.unit.data.encoding.test_formats import CHATML, folder_with

TINY = DecoderConfig(
    family="LLAMA2", vocab_size=30, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4
)


@pytest.fixture
def model() -> Decoder:
    return random_model(TINY)


def same(folder: Path, model: Decoder) -> bool:
    return all(torch.equal(a, b) for a, b in zip(load_model(folder).parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("to", ["hf", "internevo"])
def test_other_folders_next_to_the_target_stay_unchanged(tmp_path: Path, model: Decoder, to: str) -> None:
    save_hf(model, tmp_path / "from")
    for name in ("out.tmp", "out.old", ".out.tmp", ".out.0123abcd.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text(name)
    before = sorted(os.listdir(tmp_path))

    def stop(done: int, total: int | None) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        convert(tmp_path / "from", tmp_path / "out", to, progress=stop)
    assert sorted(os.listdir(tmp_path)) == before
    convert(tmp_path / "from", tmp_path / "out", to)
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "out"])
    assert all((tmp_path / name / "notes").read_text() == name for name in before if name != "from")
    assert same(tmp_path / "out", model)


@pytest.mark.parametrize("to", ["hf", "internevo"])
def test_a_target_that_is_a_link_is_written_to_the_folder_it_points_to(tmp_path: Path, model: Decoder, to: str) -> None:
    save_hf(model, tmp_path / "from")
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    convert(tmp_path / "from", tmp_path / "out", to)
    assert (tmp_path / "out").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["out"]
    assert same(tmp_path / "disk" / "out", model)
    assert sorted(os.listdir(tmp_path)) == ["disk", "from", "out"]


Write = Callable[[Path, Path, Decoder], object]
"""Writes a model (also in the first folder) to the second folder."""
WAYS: dict[str, Write] = {
    "save_hf": lambda source, folder, model: save_hf(model, folder),
    "hf": lambda source, folder, model: convert(source, folder, "hf"),
    "internevo": lambda source, folder, model: convert(source, folder, "internevo"),
}


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("other", ["thesis.tex", ".git/HEAD", "model.safetensors", "config.json"])
def test_a_folder_with_files_is_refused_and_stays(tmp_path: Path, model: Decoder, way: str, other: str) -> None:
    save_hf(model, tmp_path / "from")
    (tmp_path / "project" / other).parent.mkdir(parents=True)
    (tmp_path / "project" / other).write_text("{}")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=f"project is not empty \\(it has {other.split('/')[0]}\\)"):
        WAYS[way](tmp_path / "from", tmp_path / "project", model)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_target_that_is_a_file_is_refused(tmp_path: Path, model: Decoder, way: str, name: str) -> None:
    save_hf(model, tmp_path / "from")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="file is not a folder"):
        WAYS[way](tmp_path / "from", tmp_path / name, model)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("way", WAYS)
def test_the_current_folder_is_filled_and_stays_the_same_folder(
    tmp_path: Path, model: Decoder, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a mount point, or a folder with its own permissions: a folder that exists is not replaced by another one."""
    save_hf(model, tmp_path / "from")
    (tmp_path / "here").mkdir(mode=0o700)
    monkeypatch.chdir(tmp_path / "here")
    number = os.stat(".").st_ino
    WAYS[way](tmp_path / "from", Path("."), model)
    assert os.stat(".").st_ino == os.stat(tmp_path / "here").st_ino == number
    assert same(Path("."), model)
    assert not [name for name in os.listdir(".") if name.startswith(".")]


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, model: Decoder, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_hf(model, tmp_path / "from")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(UsageError, match=f"out cannot be written: you have no permission to write to {tmp_path}"):
        WAYS[way](tmp_path / "from", tmp_path / "out", model)


@pytest.mark.parametrize("to", ["hf", "internevo"])
def test_a_target_inside_the_source_is_refused(tmp_path: Path, model: Decoder, to: str) -> None:
    """It would be deleted together with the checkpoint (ckpt.keep_last). Elsewhere in a run folder it is safe."""
    save_hf(model, tmp_path / "from")
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    convert(tmp_path / "from", step, "internevo")
    for source, target in (
        (tmp_path / "from", tmp_path / "from" / "out"),
        (step, step / "a" / "b"),
        (tmp_path / "run", step / "a"),
    ):
        before = tree(source)
        with pytest.raises(UsageError, match="is inside"):
            convert(source, target, to)
        assert tree(source) == before
    convert(tmp_path / "run", tmp_path / "run" / "exported", to)
    assert same(tmp_path / "run" / "exported", model)


def test_overwrite_replaces_the_files_of_a_model_only(tmp_path: Path, model: Decoder) -> None:
    save_hf(model, tmp_path / "from", max_shard_size=1000)
    other = {"thesis.tex": b"x", "notes/model.safetensors": b"y", "tokenizer.json": b"z", "pytorch_model.bin": b"b"}
    for name, text in other.items():
        (tmp_path / "from" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "from" / name).write_bytes(text)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    save_hf(model, tmp_path / "from", overwrite=True)
    assert tree(tmp_path / "from").keys() == {"config.json", "model.safetensors", MARK, *other}
    assert {name: (tmp_path / "from" / name).read_bytes() for name in other} == other
    assert same(tmp_path / "from", model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_overwrite_keeps_files_that_are_not_of_a_model(tmp_path: Path, model: Decoder, name: str) -> None:
    """Those of another program, those that were changed, and folders."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_hf(model, tmp_path / "changed")
    (tmp_path / "changed" / name).write_text("mine")
    (tmp_path / "folder" / name).mkdir(parents=True)
    before = tree(tmp_path)
    for folder, why in (("other", "was not written by"), ("changed", "was changed after"), ("folder", "is a folder")):
        with pytest.raises(UsageError, match=f"{name} {why}"):
            save_hf(model, tmp_path / folder, overwrite=True)
    assert tree(tmp_path) == before


def test_a_kill_while_a_model_is_replaced_leaves_a_whole_model_or_one_that_can_be_replaced(tmp_path: Path) -> None:
    """Also if the tokenizer is another one. Each file of the folder stays known as this program's."""
    model = random_model(replace(TINY, vocab_size=310))
    old, new = (folder_with(tmp_path / name, template) for name, template in (("old", CHATML), ("new", None)))
    (new / "added_tokens.json").write_text("{}")

    def save(folder: Path) -> None:
        save_hf(model, folder, max_shard_size=10_000, overwrite=True, tokenizer=new)

    def check(parent: Path) -> None:
        if (parent / "out" / "config.json").is_file():
            assert same(parent / "out", model)
        save(parent / "out")
        assert same(parent / "out", model) and (parent / "out" / "thesis.tex").is_file()
        assert json.loads((parent / "out" / "tokenizer_config.json").read_text())["chat_template"] is None

    def prepare(parent: Path) -> None:
        save_hf(model, parent / "out", tokenizer=old)
        (parent / "out" / "thesis.tex").write_text("x")

    (tmp_path / "moments").mkdir()
    assert kill_at_every_moment(tmp_path / "moments", prepare, lambda parent: save(parent / "out"), check) > 8


def test_different_forms_of_a_model_in_one_folder_do_not_forget_each_other(tmp_path: Path, model: Decoder) -> None:
    pytest.importorskip("gguf")
    for _ in range(2):
        convert_all(model, tmp_path)
    assert {"config.json", "model.safetensors", "model.gguf", MARK} <= set(os.listdir(tmp_path / "out"))


def convert_all(model: Decoder, folder: Path) -> None:
    """Writes a model in two forms into the same folder."""
    save_hf(model, folder / "from", overwrite=True, tokenizer=None)
    for to in ("hf", "gguf"):
        convert(folder / "from", folder / "out", to, overwrite=True)


@pytest.mark.parametrize("size", ["0GB", "-1GB", "nanGB", "infGB", "1e999GB", "5", "GB", "", "0.0001KB"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(UsageError, match=f"{size!r} is not a size"):
        parse_size(size)


@pytest.mark.parametrize(("size", "nbytes"), [("5GB", 5 * 10**9), ("1.5kib", 1536), ("2 GiB", 2**31), ("1tb", 10**12)])
def test_units_of_sizes(size: str, nbytes: int) -> None:
    assert parse_size(size) == nbytes


def test_an_error_is_printed_without_a_progress_bar(tmp_path: Path, run: Run) -> None:
    done = run("convert", tmp_path / "none", tmp_path / "out", "--to", "hf", code=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1
