"""``internevo finetune`` before it trains: what it refuses, and what it chooses. (``tests/e2e`` has the whole command.)"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from internevo.commands import finetune as command
from internevo.commands.finetune_config import FIXED, Chosen, Options, check_overrides
from internevo.data.encoding.tokenize import tokenize
from internevo.data.tokenized.index import Index, open_index
from internevo.errors import ConfigError, InternEvoError, UsageError
from internevo.storage.lock import FileLock
from internevo.train.config import HfModel, load_config
from internevo.train.lr_schedule import learning_rate
from tests.e2e.test_finetune import write_chat_model, write_chats
from tests.unit.data.encoding.test_formats import folder_with


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("finetune") / "model")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Index:
    folder = tmp_path_factory.mktemp("data")
    chats = write_chats(folder / "chats.jsonl", 90)
    tokenize([chats], folder / "train", tokenizer=model, format="chat", dataset_type="chat", workers=1)
    return open_index(folder / "train")


def found(model: Path) -> HfModel:
    return HfModel.find({"model": {"from_hf": str(model)}})


def overridden(model: Path, *texts: str) -> Options:
    return Options(str(model), "chats.jsonl", overrides=list(texts))


def test_keys_that_the_command_decides_are_refused(model: Path) -> None:
    for key in FIXED:
        for inside in ("", ".path", ".0.folder"):
            with pytest.raises(UsageError, match=f"{key}{inside}=x: finetune decides this key itself"):
                check_overrides(overridden(model, f"{key}{inside}=x"), found(model), 1)
    with pytest.raises(UsageError, match=r"give single keys, as in ckpt.KEY=VALUE"):
        check_overrides(overridden(model, "ckpt={'keep_last': 1}"), found(model), 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.total_step=3", "total_step"), ("adam.lr=fast", "adam.lr"), ("data.total_steps=0", "data.total_steps"),
        ("model.hidden_size=64", "hidden_size"), ("nothing", "does not have the form key.path=value"),
        ("lr_scheduler.eta_min=0.5", "lr_scheduler.eta_min = 0.5 is greater than adam.lr"),
        ("parallel.tensor=3", "parallel.tensor.size"), ("data.global_batch_size=3", "data.global_batch_size = 3"),
    ],
)  # fmt: skip
def test_wrong_overrides_are_refused(model: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_overrides(overridden(model, override), found(model), 2)


@pytest.mark.parametrize(
    "overrides",
    [
        ("adam.lr=1e-7",), ("lr_scheduler.init_steps=5",), ("lr_scheduler.total_steps=9", "lr_scheduler.init_steps=5"),
        ("parallel.tensor=2",), ("adam.lr=0.5", "lr_scheduler.eta_min=0.4"),
        ("lr_scheduler.kind=wsd", "lr_scheduler.warmup_steps=3", "lr_scheduler.decay_steps=5"),
    ],
)  # fmt: skip
def test_what_is_not_known_before_the_data_is_read_refuses_no_override(model: Path, overrides: tuple[str, ...]) -> None:
    check_overrides(overridden(model, *overrides), found(model), 2)


CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({"chat_template": "none.jinja"}, CHAT, "--chat-template none.jinja is not a file"),
        ({"model": "none"}, CHAT, "MODEL = 'none' does not exist"),
        ({"data": "none.jsonl"}, CHAT, "none.jsonl"),
        ({"tokenizer": "none"}, CHAT, "none"),
        ({"overrides": ["data.total_step=3"]}, CHAT, "total_step"),
        ({}, "", "has no document"),
        ({}, '{"body": "x"}\n', "no format fits the data, which has body"),
        ({}, "not JSON\n", "not JSON"),
        ({}, '{"messages": [{"role": "user", "content": 3}]}\n', "content"),
        ({}, '{"messages": [{"role": "system", "content": "a"}]}\n', "assistant"),
        ({"format": "chat"}, '{"text": "x"}\n', "messages"),
        ({"text_key": "body"}, CHAT, "body"),
        ({}, CHAT * 20 + CHAT[:30], "not JSON"),
        ({"lora": 100_000}, CHAT, "model.lora.rank"),
        ({"lr": float("inf")}, CHAT, "adam.lr"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text(text)
    with pytest.raises(InternEvoError, match=message):
        command.finetune(replace(Options(str(model), "chats.jsonl"), **options), Path("out"), 1)
    assert os.listdir() == ["chats.jsonl"]


def test_it_starts_its_processes_itself(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="finetune starts its processes itself"):
        command.finetune(Options(str(model), "chats.jsonl"), tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_of_the_user_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"is not empty \(it has thesis.tex\); give another --output"):
        command.finetune(Options(str(model), "chats.jsonl"), tmp_path, None)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.total_steps=5",),
        ("data.seq_len=100", "data.global_batch_size=3"),
        ("adam.lr=0.5",),
        ("adam.lr=1e-07",),
        ("lr_scheduler.warmup_steps=2", 'lr_scheduler.kind="wsd"'),
    ],
)
def test_what_it_says_is_what_the_config_has(tmp_path: Path, model: Path, index: Index, overrides: tuple[str, ...]) -> None:
    chosen = Chosen.of(overridden(model, *overrides), found(model), index, 1)
    said = list(chosen.write_config(tmp_path, model, 1))
    config = load_config(tmp_path / "config.py")
    assert f"rows: {chosen.rows:,} of {config.data.seq_len} tokens" in said[0]
    steps, rows, lr = config.data.total_steps, config.data.global_batch_size, config.adam.lr
    assert rows is not None
    assert f"highest learning rate {lr:g}, " in said[1] and f"= {steps} steps of {rows} row" in said[1]
    epochs = float(said[1].partition(" epochs")[0].rpartition(", ")[2])
    assert abs(epochs - steps * rows / chosen.rows) < 0.06
    for text in overrides:
        assert f"{text.rpartition('.')[2]}," in (tmp_path / "config.py").read_text()
    rates = [learning_rate(step, steps, lr, config.lr_scheduler) for step in range(steps)]
    assert rates[0] < rates[1] and max(rates) == lr and config.lr_scheduler.eta_min == lr / 10


def test_documents_beyond_the_positions_of_the_model_are_named(tmp_path: Path, model: Path, index: Index) -> None:
    longest = int(index.documents[:, 1].max())
    for positions, notes in ((longest - 1, 1), (longest, 0)):
        short = shutil.copytree(model, tmp_path / str(positions))
        values = json.loads((short / "config.json").read_text())
        (short / "config.json").write_text(json.dumps({**values, "max_position_embeddings": positions}))
        chosen = Chosen.of(replace(overridden(short), seq_len=1000), found(short), index, 1)
        said = [line for line in chosen.write_config(tmp_path, short, 1) if line.startswith("note: there are documents")]
        assert len(said) == notes
        assert all(f"of {longest:,} tokens" in line and f"--seq-len {positions}" in line for line in said)


def test_a_kill_before_the_config_is_written_leaves_what_the_same_command_goes_on_with(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats, out = write_chats(tmp_path / "chats.jsonl", 20), tmp_path / "out"
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}")
    options = Options(str(model), str(chats), chat_template=str(template))

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Chosen, "write_config", killed)
        with pytest.raises(KeyboardInterrupt):
            command.finetune(options, out, 1)
    assert (out / "finetune.json").is_file() and not (out / "config.py").exists()
    monkeypatch.setattr(command, "train", lambda *arguments: 7)
    assert command.finetune(options, out, 1) == 7
    config = load_config(out / "config.py")
    assert config.data.tokenizer_path == str(out / "tokenizer")
    assert (out / "tokenizer" / "chat_template.jinja").read_text() == template.read_text()


@pytest.mark.parametrize("running", [True, False])
def test_a_folder_in_which_another_command_has_begun_meanwhile_stays_as_it_is(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    chats, out, locks = write_chats(tmp_path / "chats.jsonl", 20), tmp_path / "out", list[FileLock]()

    def other(*arguments: object) -> None:
        out.mkdir()
        (out / "finetune.json").write_text("{}")
        locks.extend([FileLock.acquire(out / "internevo.lock", print)] if running else [])

    monkeypatch.setattr(command, "_check_beginning", other)
    said = "is in use by process" if running else "another command has begun in"
    with pytest.raises(UsageError, match=said):
        command.finetune(Options(str(model), str(chats)), out, 1)
    assert (out / "finetune.json").read_text() == "{}" and set(os.listdir(out)) == {"finetune.json", "internevo.lock"}
    for lock in locks:
        lock.release()


def test_beginning_again_with_another_tokenizer_leaves_nothing_of_the_first(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats, out = write_chats(tmp_path / "chats.jsonl", 20), tmp_path / "out"
    other, template = Path(shutil.copytree(model, tmp_path / "other")), tmp_path / "mine.jinja"
    (other / "added_tokens.json").write_text("{}")
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}")
    monkeypatch.setattr(command, "train", lambda *arguments: 7)
    out.mkdir()
    (out / "internevo.lock").touch()  # of a command that was killed before it wrote anything else
    for tokenizer in (other, model):
        options = Options(str(model), str(chats), tokenizer=str(tokenizer), chat_template=str(template))
        assert command.finetune(options, out, 1) == 7
    assert (out / "tokenizer.1" / "added_tokens.json").is_file() and not (out / "tokenizer" / "added_tokens.json").exists()
    assert (out / "tokenizer" / "chat_template.jinja").read_text() == template.read_text()


@pytest.mark.parametrize(("text", "said"), [(b" ", "is empty"), (b"{% if", "cannot be read"), (b"\xff", "cannot be read")])
def test_what_is_wrong_with_a_chat_template_names_its_file(tmp_path: Path, model: Path, text: bytes, said: str) -> None:
    chats, template = write_chats(tmp_path / "chats.jsonl", 3), tmp_path / "mine.jinja"
    template.write_bytes(text)
    options = Options(str(model), str(chats), chat_template=str(template), format="chat")
    with pytest.raises(UsageError, match=said) as error:
        command.finetune(options, tmp_path / "out", 1)
    assert "mine.jinja" in str(error.value) and "tmp/tmp" not in str(error.value) and not (tmp_path / "out").exists()


def test_data_without_a_chat_template_is_refused_with_the_way_out(tmp_path: Path, model: Path) -> None:
    plain = folder_with(tmp_path / "plain", None)
    chats = write_chats(tmp_path / "chats.jsonl", 3)
    with pytest.raises(UsageError, match="has no chat template: give --chat-template FILE"):
        command.finetune(Options(str(model), str(chats), tokenizer=str(plain)), tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_only_the_beginnings_of_long_examples_are_shown(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in ("b" * 5000, "c", "d")]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    monkeypatch.setattr(command, "train", lambda *arguments: 7)
    command.finetune(Options(str(model), str(tmp_path / "chats.jsonl"), valid_ratio=0.0), tmp_path / "out", 1)
    said = capsys.readouterr().out
    assert "b" * 900 in said and "b" * 1000 not in said and "more)" in said and "c<|im_end|>" in said
