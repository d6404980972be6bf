"""The package's own names: ``import internevo`` is fast, and shows what it offers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import internevo
from internevo.errors import UsageError
from internevo.models.config import DecoderConfig
from internevo.observe.record import StepRecord
from internevo.text.tokenizer import train_bpe
from tests.conftest import random_model, tiny


def test_the_package_lists_its_functions_without_importing_pytorch() -> None:
    code = "import sys, internevo; print(*dir(internevo)); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = "Tokenizer chat evaluate generate load_config load_model plan save_hf tokenize train __version__"
    assert set(done.stdout.split()) == set(names.split())


def test_everything_that_is_listed_is_there() -> None:
    assert all(getattr(internevo, name).__doc__ for name in internevo.__all__)
    assert set(internevo.__all__) <= set(dir(internevo))


def test_a_model_is_trained_stopped_resumed_and_exported_with_its_tokenizer(tmp_path: Path) -> None:
    from internevo import train  # the function, also after files of the package of this name were imported
    from internevo.train.check import check

    tokenizer = train_bpe(["the cat sat on the mat"] * 9, 270, tmp_path / "tokenizer")
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": "the cat sat on the mat " * n}) for n in range(1, 20)))
    internevo.tokenize(tmp_path / "text.jsonl", tmp_path / "data", tokenizer=str(tokenizer), workers=1)
    config = internevo.load_config(
        tiny(
            model__vocab_size=280, data__train_folder=str(tmp_path / "data"), ckpt={"save_ckpt_folder": str(tmp_path / "run")}
        ),
        ["data.total_steps=5"],
    )
    check(config, 1)
    records: list[StepRecord] = []

    def on_step(record: StepRecord) -> bool:
        records.append(record)
        return record.step == 2

    assert train(config, on_step) == tmp_path / "run" == internevo.train(config, on_step=records.append)
    assert [record.step for record in records] == [1, 2, 3, 4, 5]  # the second call has resumed the run
    model = internevo.load_model(tmp_path / "run")
    internevo.save_hf(model, tmp_path / "hf", tokenizer=internevo.Tokenizer.load(tokenizer))
    options: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 5}
    mine = "".join(internevo.generate(model, "the", tokenizer=tokenizer, **options))
    assert mine == "".join(internevo.generate(tmp_path / "hf", "the", **options))
    with pytest.raises(UsageError, match="not this model's"):
        train_bpe(["zebras zigzag zealously and purr"] * 9, 290, tmp_path / "larger")
        internevo.save_hf(model, tmp_path / "other", tokenizer=tmp_path / "larger")


def test_labels_that_are_not_shifted_are_refused() -> None:
    model = random_model(DecoderConfig("LLAMA2", 50, 16, 32, 1, 2, 2, 8))
    tokens = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    masked = tokens.clone()
    masked[:, :4] = -100
    for labels in (tokens, tokens.clone(), masked):
        with pytest.raises(UsageError, match="Labels are not shifted here"):
            model(tokens, labels=labels)
    loss = model(tokens[:, :-1], labels=tokens[:, 1:]).total / tokens[:, 1:].numel()
    torch.testing.assert_close(loss, F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()))
    same = torch.full((1, 8), 7)
    assert model(same, labels=same.clone()).total > 0  # a text of one token predicts itself
