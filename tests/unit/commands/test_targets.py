"""A conversion writes its target, and changes nothing else."""

import os
from pathlib import Path

import pytest
import torch

from internevo import load_model, save_hf
from internevo.commands.convert import convert
from internevo.models.config import DecoderConfig
from internevo.models.decoder import Decoder

TINY = DecoderConfig(
    family="LLAMA2", vocab_size=30, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4
)


@pytest.fixture
def model() -> Decoder:
    with torch.device("meta"):
        made = Decoder(TINY)
    made.materialize("cpu")
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


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
