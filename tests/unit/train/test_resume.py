"""A run folder keeps the tokenizer of its run."""

import logging
import shutil
from pathlib import Path

import pytest

from internevo.config import validate
from internevo.parallel.world import join
from internevo.text.tokenizer import load_tokenizer, tokenizer_fingerprint, train_bpe
from internevo.train.resume import keep_tokenizer
from internevo.train.trainer import _prepare_saving
from tests.conftest import tiny


def test_a_run_keeps_its_tokenizer_and_sets_another_one_aside(tmp_path: Path) -> None:
    run, one, two = tmp_path / "run", tmp_path / "one", tmp_path / "two"
    run.mkdir()
    first, second = train_bpe(["abc abc"], 260, one), train_bpe(["xyz xyz"], 259, two)
    keep_tokenizer(run, None)
    keep_tokenizer(run, str(tmp_path / "none"))
    assert not any(run.iterdir())
    keep_tokenizer(run, str(first))  # a file
    kept = run / "tokenizer"
    assert load_tokenizer(kept).encode("abc") == load_tokenizer(one).encode("abc")
    before = kept.stat().st_ino
    for path in (one, kept):
        keep_tokenizer(run, str(path))
        assert kept.stat().st_ino == before, "it is the same"
    keep_tokenizer(run, str(second))
    assert tokenizer_fingerprint(kept) == tokenizer_fingerprint(two)
    assert tokenizer_fingerprint(run / "tokenizer.1") == tokenizer_fingerprint(one)
    assert sorted(path.name for path in run.iterdir()) == ["tokenizer", "tokenizer.1"]


def test_a_copy_that_cannot_be_made_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is made on rank 0, for which the others wait; and no step needs it."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    monkeypatch.setattr(logging.getLogger("internevo"), "propagate", True)
    own = train_bpe(["abc abc"], 260, tmp_path / "own")
    run = tmp_path / "run"
    run.mkdir()
    config = validate(tiny(data__tokenizer_path=str(own), ckpt__save_ckpt_folder=str(run), ckpt__enable_save_ckpt=True))
    with join() as world:
        _prepare_saving(config, world)
    assert "keeps no copy of the tokenizer" in caplog.text and "No space left on device" in caplog.text
    assert not any(run.iterdir())
