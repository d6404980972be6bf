"""Exports of checkpoints: a model that cannot be exported is refused at the start; an export that fails later is a warning."""

import base64
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internevo import save_hf
from internevo.checkpoint import Checkpoint
from internevo.checkpoint.export import Exporter, check_export
from internevo.commands.convert import convert
from internevo.errors import ConfigError, UsageError
from internevo.models.config import DecoderConfig, Lora
from internevo.models.families.registry import FAMILIES, decoder_from_hf
from internevo.models.huggingface.folder import HfFolder, as_family, naming
from internevo.models.huggingface.tokenizer import copy_tokenizer, has_tokenizer, special_ids
from internevo.storage import tensors
from internevo.text.tokenizer import load_tokenizer, train_bpe
from tests.conftest import random_model
from tests.families import CONFIGS

TINY = DecoderConfig(
    family="LLAMA2", vocab_size=300, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4
)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with one checkpoint."""
    save_hf(random_model(TINY), tmp_path / "start")
    train_bpe(["def f(x): return x"] * 5, 300, tmp_path / "start")
    convert(tmp_path / "start", tmp_path / "run" / "checkpoints" / "step-00000002", "internevo")
    return tmp_path / "run"


def test_a_checkpoint_is_exported_and_a_snapshot_is_not(run_folder: Path) -> None:
    warnings: list[str] = []
    exporter = Exporter(run_folder, torch.bfloat16, warnings.append)
    exporter(run_folder / "snapshots" / "0")
    exporter(run_folder / "checkpoints" / "step-00000002")
    (run_folder / "hf" / "step-00000002" / "scores.txt").write_text("mine")
    exporter(run_folder / "checkpoints" / "step-00000002")  # the second export replaces the first
    assert os.listdir(run_folder / "hf") == ["step-00000002"]
    assert (run_folder / "hf" / "step-00000002" / "scores.txt").read_text() == "mine"
    assert HfFolder(run_folder / "hf" / "step-00000002").dtype_of("norm.weight") == torch.bfloat16
    assert warnings == []


def broken_weights(run: Path) -> None:
    (run / "checkpoints" / "step-00000002" / "model-00000.safetensors").unlink()


def no_folder(run: Path) -> None:
    (run / "hf").write_text("in the way")


def broken_tokenizer(run: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (run / "checkpoints" / "step-00000002" / "tokenizer" / name).write_text("{")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (broken_weights, "model-00000.safetensors cannot be read"),
        (no_folder, "is not a folder"),
        (broken_tokenizer, "tokenizer"),
    ],
)
def test_a_failed_export_is_a_warning_that_names_folder_and_reason(
    run_folder: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(run_folder)
    warnings: list[str] = []
    Exporter(run_folder, torch.float32, warnings.append)(run_folder / "checkpoints" / "step-00000002")
    (warning,) = warnings
    assert warning.startswith(f"the export to {run_folder}/hf/step-00000002 failed: ")
    assert reason in warning
    assert f"internevo convert {run_folder}/checkpoints/step-00000002 " in warning
    if (run_folder / "hf").is_dir():
        assert os.listdir(run_folder / "hf") == []


def test_a_full_disk_is_a_warning(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "_reserve", full)
    warnings: list[str] = []
    Exporter(run_folder, torch.float32, warnings.append)(run_folder / "checkpoints" / "step-00000002")
    assert "No space left on device" in warnings[0]
    assert os.listdir(run_folder / "hf") == []
    assert Checkpoint(run_folder / "checkpoints" / "step-00000002").config == TINY


def test_a_model_that_cannot_be_exported_is_refused_with_the_key_to_change(tmp_path: Path) -> None:
    check_export(TINY, None)
    check_export(replace(TINY, lora=Lora(2, 4.0, ("q",))), str(tmp_path / "not there"))  # adapters are merged
    said = "its o_bias is False, and in the folder it would be True; .*enable_internevo2hf_ckpt=False"
    with pytest.raises(ConfigError, match=said):
        check_export(replace(TINY, qkv_bias=True), None)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer.json .*enable_internevo2hf_ckpt=False"):
        check_export(TINY, str(tmp_path))


@pytest.mark.parametrize("name", sorted(FAMILIES))
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_model_that_is_not_refused_can_be_written(name: str, data: st.DataObject) -> None:
    """For a model of any family that is written as any other family."""
    hf = data.draw(CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))]).to_dict()
    changes: dict[str, Any] = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "qkv_bias": st.booleans(), "o_bias": st.booleans(), "mlp_bias": st.booleans(), "tie_embeddings": st.booleans(),
                "qk_norm": st.booleans(), "norm_head": st.booleans(), "rope": st.none(), "num_kv_heads": st.just(1),
            },
        )
    )  # fmt: skip
    config = replace(decoder_from_hf(hf, "test"), **changes)
    try:
        wanted = as_family(config, name)
    except UsageError:
        return
    assert naming(wanted).shapes
    values = json.loads(json.dumps(FAMILIES[name].to_hf(wanted)))
    assert decoder_from_hf(values, "test") == wanted


@pytest.mark.parametrize("name", ["tokenizer.json", "own.json"])
def test_a_tokenizer_that_is_one_file_is_copied(tmp_path: Path, name: str) -> None:
    path = train_bpe(["def f(x): return x"] * 5, 300, tmp_path / "from")
    path = path.rename(path.with_name(name))
    copy_tokenizer(path, tmp_path / "to")
    assert has_tokenizer(tmp_path / "to")
    mine, wanted = load_tokenizer(tmp_path / "to"), load_tokenizer(path)
    assert mine.encode("def f") == wanted.encode("def f")
    assert (mine.bos_id, mine.eos_id) == (wanted.bos_id, wanted.eos_id)
    assert special_ids(tmp_path / "to") == special_ids(path)


def test_a_folder_of_tiktoken_ranks_is_copied(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    ranks = "".join(f"{base64.b64encode(bytes([n])).decode()} {n}\n" for n in range(256))
    (tmp_path / "from" / "r50k_base.tiktoken").write_text(ranks)
    copy_tokenizer(tmp_path / "from", tmp_path / "to")
    assert has_tokenizer(tmp_path / "to")
    assert load_tokenizer(tmp_path / "to").encode("def f") == load_tokenizer(tmp_path / "from").encode("def f")
