"""``internevo config --from-hf``: the config that it writes is the model's, and can be trained."""

from pathlib import Path

import pytest

from internevo.commands.config_from_hf import from_hf
from internevo.errors import UsageError
from internevo.models.families.registry import decoder_config, decoder_from_hf
from internevo.models.huggingface.folder import HfFolder, save_hf
from internevo.train.check import check
from internevo.train.config import load_config
from tests.conftest import Run, random_model
from tests.unit.train.test_config import SIZES


def test_the_config_that_is_written_trains_the_model(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / 'a "model"'
    save_hf(random_model(decoder_from_hf({**SIZES, "model_type": "llama", "rope_theta": 777.0}, "test")), folder)
    monkeypatch.chdir(tmp_path)
    text = from_hf(folder.name)
    assert text.startswith('# Written by internevo config --from-hf a "model"\n# LLAMA2, ') and "rotary base 777" in text
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path / "other")  # it does not matter where the config is used
    config = load_config("mine.py")
    assert decoder_config(config.model_type, config.model) == HfFolder(folder).config
    check(config, 1)
    assert run("config", "--from-hf", folder).stdout.splitlines()[1:] == text.splitlines()[1:]
    assert "leave out CONFIG" in run("config", "mine.py", "--from-hf", folder, code=2).stderr
    with pytest.raises(UsageError, match="no/such/model' does not exist"):
        from_hf("no/such/model")
