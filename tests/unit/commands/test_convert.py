"""The commands convert, generate and inspect with models."""

from pathlib import Path

import pytest
import torch

from internevo.checkpoint import Checkpoint
from internevo.commands.convert import convert
from internevo.errors import CheckpointError
from internevo.models.source import dtypes
from tests.conftest import Run


def test_a_damaged_file_of_a_checkpoint_is_named_with_the_damaged_bytes(llama_folder: Path, tmp_path: Path, run: Run) -> None:
    convert(llama_folder, tmp_path / "ours", "internevo")
    assert "intact" in run("inspect", tmp_path / "ours").stdout
    path = tmp_path / "ours" / "model-00000.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-100] + bytes([good[-100] ^ 1]) + good[-99:])
    done = run("inspect", tmp_path / "ours", code=1)
    assert "model-00000.safetensors is damaged: its checksum differs in bytes 0 to" in done.stderr
    path.write_bytes(good[:-1])
    assert "bytes, and the manifest says" in run("inspect", tmp_path / "ours", code=1).stderr
    path.unlink()
    assert "model-00000.safetensors is missing" in run("inspect", tmp_path / "ours", code=1).stderr
    path.write_bytes(good)
    (tmp_path / "ours" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        Checkpoint(tmp_path / "ours")


def test_generate_and_convert(llama_folder: Path, tmp_path: Path, run: Run) -> None:
    done = run("generate", llama_folder, "--prompt", "def ", "--max-new-tokens", 5, "--seed", 3)
    assert done.stdout.startswith("def ")
    assert done.stdout == run("generate", llama_folder, "--prompt", "def ", "--max-new-tokens", 5, "--seed", 3).stdout
    run("convert", llama_folder, tmp_path / "ours", "--to", "internevo", "--dtype", "bfloat16")
    assert dtypes(Checkpoint(tmp_path / "ours")) == [torch.bfloat16]
    assert "another folder, or --overwrite" in run("convert", llama_folder, tmp_path / "ours", "--to", "hf", code=2).stderr
    assert "does not exist" in run("convert", tmp_path / "none", tmp_path / "x", "--to", "hf", code=2).stderr
    assert "5XB" in run("convert", llama_folder, tmp_path / "y", "--to", "hf", "--max-shard-size", "5XB", code=2).stderr
    assert "LlamaForCausalLM" in run("inspect", llama_folder).stdout
