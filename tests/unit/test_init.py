"""The package's own names: ``import internevo`` is fast, and shows what it offers."""

import json
import subprocess
import sys
from collections.abc import Callable
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe(["the cat sat on the mat"] * 9, 270, folder / "tokenizer")
    internevo.save_hf(random_model(DecoderConfig("LLAMA2", 270, 16, 32, 1, 2, 2, 8)), folder / "hf", tokenizer=tokenizer)
    return folder / "hf"


MESSAGES = [{"role": "user", "content": "x"}]
API: Any = internevo  # whose types would tell what is wrong
WRONG: dict[str, tuple[Callable[[Any], object], str]] = {
    "train path": (lambda m: API.train("config.py"), "load_config returned, and not str"),
    "train values": (lambda m: API.train({}), "load_config returned, and not dict"),
    "plan path": (lambda m: API.plan("config.py", 8, "h100"), "load_config returned"),
    "plan gpus": (lambda m: API.plan(API.load_config(tiny()), 0, "h100"), "gpus = 0"),
    "evaluate config": (lambda m: API.evaluate(m, m, config="config.py"), "load_config returned"),
    "evaluate model": (lambda m: API.evaluate(torch.nn.Linear(1, 1), m), "load_model returned, and not Linear"),
    "evaluate one task": (lambda m: API.evaluate(m, tasks="arc"), r"tasks=\['arc'\]"),
    "evaluate seq_len": (lambda m: API.evaluate(m, m, seq_len=0), "seq_len = 0"),
    "evaluate batch_size": (lambda m: API.evaluate(m, m, batch_size=0), "batch_size = 0"),
    "load_model model": (lambda m: API.load_model(torch.nn.Linear(1, 1)), "path of a model, and not Linear"),
    "load_model dtype": (lambda m: API.load_model(m, "bfloat16"), "torch.bfloat16, and not str"),
    "load_model device": (lambda m: API.load_model(m, device="gpu"), "device = 'gpu' cannot be used: "),
    "load_model index": (lambda m: API.load_model(m, device="cuda:99"), "device = 'cuda:99' cannot be used: "),
    "save_hf dtype": (lambda m: API.save_hf(API.load_model(m), m.parent / "new", "float16"), "and not str"),
    "save_hf path": (lambda m: API.save_hf(str(m), m.parent / "new"), "load_model returned, and not str"),
    "generate model": (lambda m: API.generate(torch.nn.Linear(1, 1), "x"), "load_model returned"),
    "generate prompts": (lambda m: API.generate(m, ["x", "y"]), "one at a time"),
    "generate messages": (lambda m: API.generate(m, MESSAGES), "chat takes messages"),
    "generate format": (lambda m: API.generate(m, "x", format="html"), "format = 'html'"),
    "generate one stop": (lambda m: API.generate(m, "x", stop="ab"), r"stop=\['ab'\]"),
    "generate tokens": (lambda m: API.generate(m, "x", max_new_tokens=0), "max_new_tokens = 0"),
    "chat text": (lambda m: API.chat(m, "hello"), "list of"),
    "chat message": (lambda m: API.chat(m, MESSAGES[0]), "list of"),
    "chat pairs": (lambda m: API.chat(m, [("user", "x")]), "list of"),
    "chat nothing": (lambda m: API.chat(m, []), "list of"),
    "tokenize format": (lambda m: API.tokenize(m, m.parent / "new", tokenizer=m, format="html"), "format = 'html'"),
    "tokenize without": (lambda m: API.tokenize(m, m.parent / "new"), "either tokenizer, or train_vocab_size"),
    "tokenize object": (
        lambda m: API.tokenize(m, m.parent / "new", tokenizer=API.Tokenizer.load(m)), "by a path or a name, and not Tok",
    ),
    "tokenizer": (lambda m: API.Tokenizer.load(None), "by a path or a name, and not None"),
    "tokenizer of a model": (lambda m: API.generate(m, "x", tokenizer=5), "by a path or a name, and not int"),
    "tokenizer to save": (
        lambda m: API.save_hf(API.load_model(m), m.parent / "new", tokenizer=5), "by a path or a name, and not int",
    ),
    "config": (lambda m: API.load_config(None), "path of a config"),
    "override": (lambda m: API.load_config(tiny(), "data.total_steps=3"), r"overrides=\['data.total_steps=3'\]"),
    "overrides": (lambda m: API.load_config(tiny(), {"data.total_steps": 3}), "overrides must be a list of texts"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_by_name_before_anything_is_written(model: Path, case: str) -> None:
    act, message = WRONG[case]
    with pytest.raises(UsageError, match=message):
        act(model)
    assert sorted(path.name for path in model.parent.iterdir()) == ["hf", "tokenizer"]


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
