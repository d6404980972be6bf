"""Formats of documents: the ids are those of the templates, and the loss is only on what the assistant says."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import AddedToken
from tokenizers import Tokenizer as Fast

from internevo.data.encoding.tokenize import tokenize
from internevo.data.rows import tokens_and_labels
from internevo.data.tokenized.index import open_index
from internevo.errors import DataError, UsageError
from internevo.text.tokenizer import load_tokenizer, train_bpe

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('no role ' + message['role']) }}{% endif %}{% endfor %}"
)
Chat = list[tuple[str, str]]
"""Role and content of each message."""
CHATS: list[Chat] = [
    [("user", "What is a cat?"), ("assistant", "An animal.\n\nIt purrs.")],
    [("user", "a"), ("assistant", ""), ("user", "b c"), ("assistant", "春眠 <|im_end|> d")],
    [("user", "x" * 50), ("assistant", "\n y")],
]


def folder_with(path: Path, template: str | None, special: Sequence[str] = ("<|im_start|>", "<|im_end|>", "<s>")) -> Path:
    train_bpe(["the cat sat on the mat, and purred. <|User|>:"] * 5, 300, path)
    fast = Fast.from_file(str(path / "tokenizer.json"))
    fast.add_special_tokens([AddedToken(name, special=True) for name in special])
    fast.save(str(path / "tokenizer.json"))
    table = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**table, "chat_template": template}))
    return path


def tokenized(tmp_path: Path, source: Path, folder: Path, format: Any, **options: Any) -> list[tuple[Any, Any]]:
    tokenize([source], tmp_path / "out", tokenizer=folder, format=format, workers=1, **options)
    index = open_index(tmp_path / "out")
    return [tokens_and_labels(index.read(n)) for n in range(len(index))]


def write_chats(path: Path, chats: list[Chat], sharegpt: bool = False) -> Path:
    rows: list[dict[str, Any]] = []
    for chat in chats:
        if sharegpt:
            names = {"user": "human", "assistant": "gpt"}
            rows.append({"conversations": [{"from": names[role], "value": text} for role, text in chat]})
        else:
            rows.append({"id": 1, "messages": [{"role": role, "content": text} for role, text in chat]})
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("template", [CHATML, LLAMA2], ids=["chatml", "llama2"])
@pytest.mark.parametrize(("name", "sharegpt"), [("a.jsonl", False), ("a.parquet", False), ("a.jsonl", True)])
def test_chats_have_the_ids_of_transformers_and_the_assistant_is_predicted(
    tmp_path: Path, template: str | None, name: str, sharegpt: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = folder_with(tmp_path / "tokenizer", template)
    made = tokenized(tmp_path, write_chats(tmp_path / name, CHATS, sharegpt), folder, "chat")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert len(made) == len(CHATS)
    for chat, (tokens, labels) in zip(CHATS, made, strict=True):
        messages = [{"role": role, "content": text} for role, text in chat]
        wanted = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert tokens.tolist() == wanted
        said = ours.decode(tokens[labels >= 0].tolist())
        ends = ("", "<|im_end|>\n") if template == CHATML else (" ", " <|endoftext|>")
        assert said == "".join(f"{ends[0]}{text}{ends[1]}" for role, text in chat if role == "assistant")


def test_instructions_have_internevos_template_and_the_output_is_predicted(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "tokenizer", CHATML, special=("<eoh>", "<eoa>", "<s>"))
    rows = [
        {"instruction": "Say hi.", "input": "", "output": "Hi."},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    made = tokenized(tmp_path, tmp_path / "a.json", folder, "alpaca")
    text = load_tokenizer(folder)
    asked = ["<|User|>:Say hi.<eoh>\n<|Bot|>:", "<|User|>:Add.\n1 2<eoh>\n<|Bot|>:"]
    for question, row, (tokens, labels) in zip(asked, rows, made, strict=True):
        assert text.decode(tokens.tolist()) == f"<s>{question}{row['output']}<eoa>\n<|endoftext|>"
        seen = labels >= 0
        assert text.decode(tokens[~seen].tolist()) == question and seen[0]
        assert text.decode(tokens[seen].tolist()) == f"<s>{row['output']}<eoa>\n<|endoftext|>"
        assert text.backend.token_id("<eoh>") in tokens and text.backend.token_id("<eoa>") in tokens


def test_instructions_under_the_chat_template_are_chats(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "tok", CHATML)
    instructions = [
        {"instruction": "Add.", "input": "1 2", "output": "3", "id": 7}, {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "And you?", "output": "I, too", "system": "Be brief.", "history": [["How are you?", "Well."]]},
    ]  # fmt: skip
    chats: list[Chat] = [
        [("user", "Add.\n1 2"), ("assistant", "3")], [("user", "Hi"), ("assistant", "Hello")],
        [("system", "Be brief."), ("user", "How are you?"), ("assistant", "Well."), ("user", "And you?"),
         ("assistant", "I, too")],
    ]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(instructions))
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    found = tokenized(tmp_path / "one", tmp_path / "a.json", folder, "chat")
    wanted = tokenized(tmp_path / "two", write_chats(tmp_path / "b.jsonl", chats), folder, "chat")
    assert len(found) == len(wanted) == 3
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for row, message in (
        ({"instruction": "a"}, "has an instruction, and no output"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "'history' must be a list of \\[question, answer\\]"),
    ):
        (tmp_path / "a.json").write_text(json.dumps([row]))
        with pytest.raises(DataError, match=message):
            tokenize([tmp_path / "a.json"], tmp_path / "three", tokenizer=folder, format="chat", workers=1)


def test_the_error_for_an_instruction_without_output_does_not_advise_an_option_without_effect(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "tokenizer", CHATML)
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "Say hi."}]))
    with pytest.raises(DataError, match=r"item 0 has no instruction and output under .* \(it has 'instruction' \(str\)\)$"):
        tokenized(tmp_path, tmp_path / "a.json", folder, "alpaca")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "", "output": "a"}, "item 0: 'instruction' is empty$"),
        ({"instruction": "a", "input": "", "output": ""}, "item 0: 'output' is empty$"),
        ({"instruction": "a", "input": 5, "output": "b"}, "has no texts under .*'input' \\(int\\)"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "the format alpaca does not use 'history'"),
        ({"instruction": "a", "output": "b", "system": "c"}, "the format alpaca does not use 'system'"),
    ],
)
def test_the_error_says_what_is_wrong_with_an_instruction(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    folder = folder_with(tmp_path / "tokenizer", CHATML)
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match=message):
        tokenized(tmp_path, tmp_path / "a.json", folder, "alpaca")


def test_a_tokenizer_without_an_end_token_is_mentioned(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "tokenizer", None)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    (tmp_path / "a.txt").write_text("the cat")
    said: list[str] = []
    tokenize([tmp_path / "a.txt"], tmp_path / "out", tokenizer=folder, status=said.append)
    assert any("names no end token (eos_token)" in line for line in said)


def test_valid_ratio_also_splits_instructions(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "tokenizer", CHATML)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"instruction": f"{n}", "output": "x"}) + "\n" for n in range(200)))
    tokenize([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=folder, format="alpaca", valid_ratio=0.1)
    train, valid = (open_index(tmp_path / "out" / name) for name in ("train", "valid"))
    assert len(train) + len(valid) == 200 and 5 < len(valid) < 40


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "has no message of the assistant"),
        ({"messages": [{"role": "user"}]}, "a message must have a role and a content"),
        ({"text": "a"}, "has no messages under 'messages' or 'conversations' \\(it has 'text'\\)"),
        ({"messages": "a"}, "has no messages .*'messages' \\(str\\)"),
        ({"messages": [{"role": "tool", "content": "a"}, {"role": "gpt", "content": "b"}]}, "cannot render .*no role tool"),
    ],
)  # fmt: skip
def test_the_error_says_what_is_wrong_with_a_chat(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    folder = folder_with(tmp_path / "tokenizer", LLAMA2)
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        tokenized(tmp_path, tmp_path / "a.jsonl", folder, "chat")
    said: list[str] = []
    assert len(tokenized(tmp_path, tmp_path / "a.jsonl", folder, "chat", on_error="skip", status=said.append)) == 1
    assert sum(line.startswith("left out: ") for line in said) == 1


def test_a_template_that_renders_a_message_differently_when_others_follow_is_refused(tmp_path: Path) -> None:
    template = CHATML.replace("message['content'] +", "(message['content'] if loop.last else '') +")
    folder = folder_with(tmp_path / "tokenizer", template)
    source = write_chats(tmp_path / "a.jsonl", [[("user", "a"), ("assistant", "b"), ("user", "c")]])
    with pytest.raises(DataError, match="renders message 1 differently"):
        tokenized(tmp_path, source, folder, "chat")


def test_a_template_may_drop_the_reasoning_of_earlier_messages(tmp_path: Path) -> None:
    said = "message['content']"
    reasoning = "('<think>ok</think>' if loop.last and message['role'] == 'assistant' else '')"
    folder = folder_with(tmp_path / "tokenizer", CHATML.replace(f"{said} +", f"{reasoning} + {said} +"))
    chat = [("user", "a"), ("assistant", "b"), ("user", "b"), ("assistant", "d")]
    tokens, labels = tokenized(tmp_path, write_chats(tmp_path / "a.jsonl", [chat]), folder, "chat")[0]
    assert load_tokenizer(folder).decode(tokens[labels >= 0].tolist()) == "b<|im_end|>\n<think>ok</think>d<|im_end|>\n"


def test_the_error_names_a_tokenizer_without_a_chat_template(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "tokenizer", None)
    with pytest.raises(UsageError, match="has no chat template"):
        tokenized(tmp_path, write_chats(tmp_path / "a.jsonl", CHATS), folder, "chat")
    (folder / "chat_template.jinja").write_text(CHATML)
    assert len(tokenized(tmp_path, tmp_path / "a.jsonl", folder, "chat")) == 3


def test_a_template_has_no_access_to_anything_outside_its_sandbox(tmp_path: Path) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    folder = folder_with(tmp_path / "tokenizer", template)
    with pytest.raises(DataError, match="unsafe"):
        tokenized(tmp_path, write_chats(tmp_path / "a.jsonl", CHATS), folder, "chat")


@pytest.mark.parametrize("format", ["text", "chat"])
def test_a_killed_command_resumes_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    from internevo.data.encoding import tokenize as module
    from internevo.data.raw import inputs

    monkeypatch.setattr(inputs, "CHUNK_BYTES", 300)
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(module, "PART_TOKENS", 250)
    folder = folder_with(tmp_path / "tokenizer", CHATML)
    source = tmp_path / "a.jsonl"
    if format == "chat":
        write_chats(source, CHATS * 30)
    else:
        source.write_text("".join(json.dumps({"text": f"{n} " * (n % 30)}) + "\n" for n in range(200)))
    options: dict[str, Any] = dict(tokenizer=folder, format=format, valid_ratio=0.2)
    tokenize([source], tmp_path / "whole", **options, workers=2)

    class Killed(BaseException):
        pass

    said: list[str] = []
    for kill in (1, 3, 9):
        calls = iter(range(100))

        def progress(done: int, total: int, calls: Iterator[int] = calls, kill: int = kill) -> None:
            if next(calls) == kill:
                raise Killed

        with pytest.raises(Killed):
            tokenize([source], tmp_path / "parts", **options, workers=1, progress=progress)
        with pytest.raises(DataError, match="is unfinished"):
            open_index(tmp_path / "parts" / "train")
    tokenize([source], tmp_path / "parts", **options, workers=2, status=said.append)
    assert said[0].startswith("continuing after ")
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert sorted(p.relative_to(tmp_path / "parts") for p in (tmp_path / "parts").rglob("*") if p.is_file()) == files
    assert len(files) > 8
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_with_other_options_a_killed_command_starts_again(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "tokenizer", CHATML)
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"body": 1}\n')
    with pytest.raises(DataError):
        tokenize([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=folder)
    tokenize([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=folder, text_key="text", on_error="skip")
    index = open_index(tmp_path / "out")
    assert len(index) == 1 and np.array_equal(index.read(0)[1:-1], load_tokenizer(folder).encode("good"))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"messages": [{"role": "user", "content": "a"}]},
            r"\(it has 'messages'\); give --format chat",
        ),
        ({"instruction": "a", "output": "b"}, "; give --format alpaca"),
        ({"body": "a"}, "; give the field's name with --text-key"),
    ],
)
def test_the_format_that_fits_is_named_where_another_was_given(tmp_path: Path, document: Any, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(document) + "\n")
    with pytest.raises(DataError, match=message):
        tokenize([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=folder_with(tmp_path / "tokenizer", CHATML), workers=1)
