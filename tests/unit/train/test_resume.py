"""A run folder keeps the tokenizer of its run."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from internevo.config import Config, validate
from internevo.errors import UsageError
from internevo.parallel.world import join
from internevo.text.tokenizer import load_tokenizer, tokenizer_fingerprint, train_bpe
from internevo.train.config import load_config, local_tokenizer
from internevo.train.resume import Recorded, keep_tokenizer
from internevo.train.run import train
from internevo.train.trainer import _keep_tokenizer
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


def test_a_copy_of_an_older_version_gets_what_the_model_says(tmp_path: Path) -> None:
    """Before, only the files of the tokenizer were copied. A file that is there is left as it is."""
    (run := tmp_path / "run").mkdir()
    train_bpe(["abc abc"], 260, source := tmp_path / "model")
    keep_tokenizer(run, str(source))
    kept = run / "tokenizer" / "config.json"
    for number in (3, 4):
        (source / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8, "eos_token_id": number}))
        keep_tokenizer(run, str(source))
        assert json.loads(kept.read_text()) == {"model_type": "llama", "eos_token_id": 3}
    assert [path.name for path in run.iterdir()] == ["tokenizer"]


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
        _keep_tokenizer(config, world)
    assert "keeps no copy of the tokenizer" in caplog.text and "No space left on device" in caplog.text
    assert not any(run.iterdir())


def test_the_same_command_goes_on_again_and_again_without_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config of a run keeps what the user has said, so that its copy is found each time."""
    monkeypatch.chdir(tmp_path)
    own, run = tmp_path / "own", tmp_path / "run"
    train_bpe(["abc abc"], 260, own)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text('{"text": "abc abc abc abc abc abc"}\n' * 50)
    stated, said = "some/tokenizer", list[str]()

    def download(*_: object, **__: object) -> str:
        if not own.exists():
            raise OSError("no network")
        return str(own)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    path = tmp_path / "config.json"

    def command(steps: int, vocab_size: int = 260) -> Config:
        values = tiny(
            data__train_folder="texts", data__type="streaming", data__tokenizer_path=stated, data__total_steps=steps,
            data__num_worker=0, model__vocab_size=vocab_size, ckpt__save_ckpt_folder=str(run), ckpt__enable_save_ckpt=True,
            ckpt__checkpoint_every=1, monitor__sample_prompts=["abc"], monitor__sample_every=1, enable_tb=False,
        )  # fmt: skip
        path.write_text(json.dumps(values))
        return load_config(path)

    train(command(1))
    shutil.move(own, tmp_path / "gone")
    for steps in (2, 3):
        config = command(steps)
        train(config)
        newest = run / "checkpoints" / f"step-{steps:08d}"
        for recorded in (newest / "config.json", run / "config.json"):
            assert json.loads(recorded.read_text())["data"]["tokenizer_path"] == stated
        assert tokenizer_fingerprint(newest / "tokenizer") == tokenizer_fingerprint(tmp_path / "gone")
        train_bpe(["xyz xyz"], 259, own)  # what has changed on the hub is not taken
    assert not (run / "tokenizer.1").exists()
    with pytest.raises(UsageError, match="monitor.sample_prompts"):
        train(command(5, 257))
    shutil.rmtree(own, ignore_errors=True)
    stated = "another/tokenizer"
    with pytest.raises(UsageError, match="another/tokenizer is not a path here"):
        train(command(5))
    config = validate(tiny(data__tokenizer_path=stated, ckpt__save_ckpt_folder=str(run)))
    local_tokenizer(config, Recorded.of(config), said.append)
    assert f"the checkpoints get that in {run / 'tokenizer'}" in said[0], "the run does not need it"
