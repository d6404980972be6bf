"""Chats: all that a chat says is used by the template or refused by name, and what the assistant says is predicted."""

import datetime
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from internevo.config.data import Data
from internevo.data.build import train_source
from internevo.data.encoding import chats
from internevo.data.encoding.formats import encode_documents
from internevo.data.encoding.questions import encode_prompt
from internevo.data.encoding.tokenize import tokenize
from internevo.data.raw.documents import Document
from internevo.data.rows import tokens_and_labels
from internevo.data.tokenized.index import open_index
from internevo.errors import DataError, UsageError
from internevo.models.huggingface.tokenizer import copy_tokenizer
from internevo.text.chat import ChatTemplate
from internevo.text.tokenizer import Tokenizer, load_tokenizer, train_bpe

from ...text.test_beginnings import reference as encode_each
from .test_formats import CHATML, LLAMA2, folder_with

AGENT = (
    "{% if tools is not none %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls %}{{ '<call>' + call.function.name + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Uses tools, which it needs as None if there are none, and calls of tools."""
THINKING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if ns.last < 0 %}{{ raise_exception('No user query') }}{% endif %}"
    "{% for m in messages %}{% set said = m.content %}{% set why = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' and '</think>' in said %}"
    "{% set why = said.split('</think>')[0].split('<think>')[-1].strip() %}{% set said = said.split('</think>')[-1].strip() %}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n' + why + '\n</think>\n\n' }}{% endif %}"
    "{{ said + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Like that of Qwen3: the thinking of messages before the last question is dropped."""
FIRST_IS_READ = "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}" + CHATML
ALTERNATES = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
)
TRIMMED = CHATML.replace("message['content'] +", "message['content'] | trim +")
USERS_ONLY = CHATML.replace("in messages %}", "in messages if message.role in ('user', 'assistant') %}")
ASK, ANSWER = {"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "mat"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "looks", "parameters": {}}}]


def tokenizer_with(tmp_path: Path, template: str) -> Tokenizer:
    return load_tokenizer(folder_with(tmp_path / "tokenizer", template))


def encoded(chat: Any, tokenizer: Tokenizer) -> tuple[str, str]:
    """The text of a chat, and the part of it that is predicted."""
    (ids,) = encode_documents(
        "chat", [Document(chat if isinstance(chat, dict) else {"messages": chat}, "a.jsonl")], None, tokenizer
    )
    if isinstance(ids, DataError):
        raise ids
    tokens, labels = tokens_and_labels(ids.astype(np.int64))
    return tokenizer.decode(tokens.tolist()), tokenizer.decode(tokens[labels >= 0].tolist())


def test_the_system_field_is_the_first_message(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, CHATML)
    system = {"role": "system", "content": "purr"}
    wanted = encoded([system, ASK, ANSWER], tokenizer)
    assert encoded({"messages": [ASK, ANSWER], "system": "purr"}, tokenizer) == wanted and "purr" in wanted[0]
    assert encoded({"messages": [system, ASK, ANSWER], "system": "purr"}, tokenizer) == wanted
    sharegpt = [{"from": "human", "value": "the cat?"}, {"from": "gpt", "value": "sat"}]
    assert encoded({"conversations": sharegpt, "system": "purr"}, tokenizer) == wanted
    with pytest.raises(DataError, match="the field 'system' and the first message, which is a system message too, differ"):
        encoded({"messages": [system, ASK, ANSWER], "system": "hiss"}, tokenizer)


def test_a_variable_of_the_template_takes_the_field_of_its_name(tmp_path: Path) -> None:
    template = "{{ system }}{{ history | tojson }}{% if enable_thinking %}!{% endif %}" + CHATML
    tokenizer = tokenizer_with(tmp_path, template)
    more = {"system": "purr", "history": [["a", "b"]], "chat_template_kwargs": {"enable_thinking": True}, "id": 7}
    assert encoded({"messages": [ASK, ANSWER], **more}, tokenizer)[0].startswith('purr[["a", "b"]]!<|im_start|>user')


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON"])
def test_tools_and_calls_without_content_are_used(tmp_path: Path, tools: Any) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_with(tmp_path, AGENT)
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    chat = [ASK, calls, {"role": "tool", "content": "mat"}, ANSWER]
    text, said = encoded({"messages": chat, "tools": tools}, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert text == theirs.apply_chat_template(chat, tools=TOOLS, tokenize=False)
    assert said == "<call>look</call><|im_end|>\nsat<|im_end|>\n"
    del calls["content"]
    assert encoded({"messages": chat, "tools": tools}, tokenizer) == (text, said)
    assert encoded([ASK, ANSWER], tokenizer)[0].startswith("<|im_start|>user")


def test_a_template_that_needs_a_content_takes_calls_without_one(tmp_path: Path) -> None:
    template = CHATML.replace("message['content'] +", "message['content'] + (message.tool_calls or '') | string +")
    text, _ = encoded([ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}], tokenizer_with(tmp_path, template))
    assert "look" in text and "None" not in text


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (CHATML, {"messages": [ASK, ANSWER], "tools": TOOLS}, "does not use the field 'tools'"),
        (CHATML, {"messages": [ASK, ANSWER], "history": [["a", "b"]]}, "does not use the field 'history'"),
        (CHATML, [ASK, {**ANSWER, "tool_calls": [CALL]}], "does not use the field 'tool_calls' of message 1"),
        (CHATML, [ASK, {**ANSWER, "reasoning": "mat"}], "does not use the field 'reasoning"),
        (USERS_ONLY, {"messages": [ASK, ANSWER], "system": "hiss"}, r"does not use message 0 \(of the role 'system'\)"),
        (USERS_ONLY, [ASK, {"role": "tool", "content": "hiss"}, ANSWER], r"does not use message 1 \(of the role 'tool'\)"),
        (AGENT, {"messages": [ASK, ANSWER], "tools": "look"}, "'tools' is not JSON"),
        (AGENT, {"messages": [ASK, ANSWER], "tools": {"name": "look"}}, "'tools' must be a list, and is a dict"),
        (ALTERNATES, [ASK, ASK, ANSWER], r"^a\.jsonl: the chat template of .* cannot render .*roles must alternate"),
        (CHATML, {"messages": []}, "'messages' is empty"),
        (CHATML, [ASK, {"role": "assistant", "content": None}], r"message 1: .*has role \(str\), content \(NoneType\)"),
        (CHATML, [ASK, {"from": "narrator", "value": "b"}], "message 1 is from 'narrator'; known are human"),
        (CHATML, [ASK, "sat"], "message 1 must be an object, and is a str"),
        (CHATML, [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER], r"message 0 has a part .*'image_url'"),
        (CHATML, [ASK, {**ANSWER, "weight": 0.5}], "message 1 has weight 0.5; a weight must be 0 or 1"),
        (CHATML, [{**ASK, "weight": 1}, ANSWER], "message 0 has weight 1, but only messages of the assistant"),
        (CHATML, [ASK, {**ANSWER, "weight": 0}], "no message of the assistant .of weight 1., so there is nothing to predict"),
    ],
)  # fmt: skip
def test_what_would_be_dropped_or_is_wrong_is_refused_by_name(tmp_path: Path, template: str, chat: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        encoded(chat, tokenizer_with(tmp_path, template))
    assert "a.jsonl" in str(raised.value)


def test_empty_fields_are_as_none(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, CHATML)
    empty: dict[str, Any] = {"tools": "", "system": "", "history": [], "functions": None}
    answer: dict[str, Any] = {**ANSWER, "tool_calls": [], "reasoning_content": None, "weight": None}
    assert encoded({"messages": [ASK, answer], **empty}, tokenizer) == encoded([ASK, ANSWER], tokenizer)


def test_messages_of_weight_0_are_not_predicted(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, CHATML)
    answers = [{"role": "assistant", "content": text} for text in ("one", "two", "three")]
    plain = [m for answer in answers for m in (ASK, answer)]
    weighted = [m for n, answer in enumerate(answers) for m in ({**ASK, "weight": 0}, {**answer, "weight": int(n != 1)})]
    text, said = encoded(weighted, tokenizer)
    assert text == encoded(plain, tokenizer)[0] and said == "one<|im_end|>\nthree<|im_end|>\n"
    assert encoded({"messages": weighted, "system": "purr"}, tokenizer)[1] == said


def test_a_content_may_be_a_list_of_texts(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, CHATML)
    parts = [{"type": "text", "text": "the "}, "cat?"]
    assert encoded([{"role": "user", "content": parts}, ANSWER], tokenizer) == encoded([ASK, ANSWER], tokenizer)


def test_of_a_message_whose_thinking_is_dropped_the_rest_is_predicted(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, THINKING)
    think = [{"role": "assistant", "content": f"<think>\nwhy {n}\n</think>\n\nso {n}"} for n in range(3)]
    text, said = encoded([ASK, think[0], ASK, think[1], ASK, think[2]], tokenizer)
    end = "<|im_end|>\n"
    assert said == f"so 0{end}so 1{end}<think>\nwhy 2\n</think>\n\nso 2{end}" and "why 1" not in text
    field = [{"role": "assistant", "content": f"so {n}", "reasoning_content": f"why {n}"} for n in range(3)]
    assert encoded([ASK, field[0], ASK, field[1], ASK, field[2]], tokenizer) == (text, said)
    assert encoded([ASK, {**think[0], "weight": 0}, ASK, think[1]], tokenizer)[1] == f"<think>\nwhy 1\n</think>\n\nso 1{end}"


def test_answers_between_calls_keep_their_thinking_until_the_next_question(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, THINKING)
    think = [{"role": "assistant", "content": f"<think>\nwhy {n}\n</think>\n\nso {n}"} for n in range(4)]
    tool, end = {"role": "tool", "content": "mat"}, "<|im_end|>\n"
    text, said = encoded([ASK, think[0], tool, think[1], ASK, think[2], tool, think[3]], tokenizer)
    kept = [f"<think>\nwhy {n}\n</think>\n\nso {n}{end}" for n in (2, 3)]
    assert said == f"so 0{end}so 1{end}" + "".join(kept) and "why 1" not in text


def test_an_answer_may_be_all_thinking(tmp_path: Path) -> None:
    chat = [ASK, {"role": "assistant", "content": "<think>\nwhy\n</think>"}, ASK, ANSWER]
    _, said = encoded(chat, tokenizer_with(tmp_path, THINKING))
    assert said == "<|im_end|>\n<think>\n\n</think>\n\nsat<|im_end|>\n"


def test_a_chat_that_the_assistant_begins_needs_no_rendering_of_nothing(tmp_path: Path) -> None:
    assert encoded([ANSWER, ASK, ANSWER], tokenizer_with(tmp_path, FIRST_IS_READ))[1] == "sat<|im_end|>\n" * 2


@pytest.mark.parametrize("added", [True, False], ids=["added tokens", "no added token"])
@pytest.mark.parametrize(
    "template", [CHATML, AGENT, THINKING, FIRST_IS_READ, ALTERNATES, LLAMA2, TRIMMED],
    ids=["ChatML", "agent", "thinking", "first is read", "alternates", "Llama 2", "trimmed"],
)  # fmt: skip
def test_what_is_predicted_is_what_encoding_each_beginning_of_the_chat_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, added: bool
) -> None:
    """Random chats are encoded as they were at first: with two beginnings of the text from its start for each answer."""
    tokenizer = load_tokenizer(folder_with(tmp_path / "tokenizer", template, *([] if added else [["<s>"]])))
    draw, documents = random.Random(11), []
    words = ["the", " cat", "\n", "\n\n", "  ", "<|im_end|>", "<|im", "<think>", "</think>", "春眠", "u\u0308", "<s>", "'s"]
    for number in range(60):
        messages = []
        for turn in range(draw.randint(1, 5) * 2):
            role = "user" if turn % 2 == 0 else "assistant"
            more = {"weight": draw.randint(0, 1)} if role == "assistant" else {}
            messages.append({"role": role, "content": "".join(draw.choices(words, k=draw.randint(0, 8))), **more})
        documents.append(Document({"messages": messages}, f"{number}"))

    def results() -> list[list[int] | str]:
        found = encode_documents("chat", documents, None, tokenizer)
        return [str(ids) if isinstance(ids, DataError) else ids.tolist() for ids in found]

    ours = results()
    monkeypatch.setattr(chats, "encode_with_beginnings", encode_each)
    assert ours == results() and sum(isinstance(ids, list) for ids in ours) > 20


def test_columns_next_to_the_messages_are_read_from_parquet(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "tokenizer", CHATML)
    rows = [{"id": 1, "messages": [ASK, ANSWER], "system": "purr"}, {"id": 2, "messages": [ASK, ANSWER], "system": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    tokenize([tmp_path / "a.parquet"], tmp_path / "out", tokenizer=folder, format="chat", workers=1)
    index, tokenizer = open_index(tmp_path / "out"), load_tokenizer(folder)
    texts = [tokenizer.decode(tokens_and_labels(index.read(n))[0].tolist()) for n in range(2)]
    assert "purr" in texts[0] and "purr" not in texts[1]


def write_templates(folder: Path, templates: dict[str, str], form: str) -> None:
    """Writes named templates in one of the forms that folders have."""
    table = json.loads((folder / "tokenizer_config.json").read_text())
    table["chat_template"] = None
    if form == "list":
        table["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    for name, text in templates.items() if form == "files" else ():
        path = folder / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(table))


@pytest.mark.parametrize("form", ["list", "files"])
def test_chats_with_tools_have_their_own_template(tmp_path: Path, form: str) -> None:
    folder = folder_with(tmp_path / "tokenizer", CHATML)
    write_templates(folder, {"default": CHATML, "tool_use": AGENT}, form)
    tokenizer = load_tokenizer(folder)
    assert encoded({"messages": [ASK, ANSWER], "tools": TOOLS}, tokenizer)[0].startswith("<|im_start|>tools")
    assert encoded([ASK, ANSWER], tokenizer)[0].startswith("<|im_start|>user")
    copy_tokenizer(folder, tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert encoded({"messages": [ASK, ANSWER], "tools": TOOLS}, copy)[0].startswith("<|im_start|>tools")
    write_templates(folder, {"rag": CHATML}, "list")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    for path in folder.glob("additional_chat_templates/*"):
        path.unlink()
    with pytest.raises(UsageError, match=r"no chat template called default \(it has rag\)"):
        encoded([ASK, ANSWER], tokenizer)


def test_templates_know_tokens_that_only_special_tokens_map_names(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "tokenizer", None)
    (folder / "chat_template.jinja").write_text(ALTERNATES)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "<|endoftext|>"}}))
    text, _ = encoded([ASK, ANSWER], load_tokenizer(folder))
    assert text == "<s>user: the cat?<|endoftext|>assistant: sat<|endoftext|>"


def test_a_template_that_is_not_text_is_refused_by_name(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_bpe(["abc"], 280, tmp_path))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="the chat templates of .* cannot be read: 'utf-8'"):
        ChatTemplate.load(tokenizer)


DATED = "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y %H') + '<|im_end|>\n' }}" + CHATML


@pytest.mark.parametrize("date", [None, "2031-12-30"])
def test_training_data_is_the_same_on_any_day_and_a_generation_knows_the_present_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, date: str | None
) -> None:
    """Also if a command is given again, or a stream resumes, on another day."""
    tokenizer = tokenizer_with(tmp_path, DATED)
    place = tmp_path / "tokenizer"
    lines = [json.dumps({"messages": [{"role": "user", "content": f"{n} cats?"}, ANSWER]}) for n in range(40)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.jsonl").write_text("\n".join(lines))
    given: dict[str, Any] = {} if date is None else {"template_date": date}
    data = Data(
        type="streaming", train_folder=str(tmp_path / "in"), tokenizer_path=str(place), seq_len=32, micro_bsz=1, total_steps=99,
        num_worker=0, format="chat", **given,
    )  # fmt: skip
    position: Any = None
    files, rows, prints = set[bytes](), list[list[int]](), set[str]()
    for number, day in enumerate([datetime.datetime(2026, 3, 1, 23), datetime.datetime(2026, 3, 2, 1)]):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None, day: Any = day) -> Any:
                return day

        monkeypatch.setattr(datetime, "datetime", Clock)
        out = tmp_path / f"out{number}"
        tokenize(tmp_path / "in", out, tokenizer=place, format="chat", **given)
        files.add((out / "en" / "part-00000.bin").read_bytes())
        origin = json.loads((out / "tokenized.json").read_text())
        source = train_source(data, tokenizer.vocab_size)
        prints.add(source.fingerprint())
        found = source.next_rows(source.start_position() if position is None else position, 7, range(7))
        source.close()
        position, rows = found.position, [*rows, *(row.tokens.tolist() for row in found.rows)]
        prompt = tokenizer.decode(encode_prompt("chat", "the cat?", tokenizer).ids)
        assert day.strftime("%d %b %Y %H") in prompt
    assert len(files) == 1 and len(prints) == 1
    wanted = datetime.date.fromisoformat(date or "2024-07-26")
    assert origin["template_date"] == wanted.isoformat()
    text = tokenizer.decode([token for row in rows for token in row])
    assert text.count(wanted.strftime("%d %b %Y 00")) >= 2 and "2026" not in text


def test_a_date_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match="template_date = '2024-7-1' must be a date, as in 2024-07-26"):
        tokenize(tmp_path / "a.txt", tmp_path / "out", train_vocab_size=300, template_date="2024-7-1")
