"""Questions: what ends an answer is a token apart or a text, never a token that an answer may have."""

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import internevo
from internevo.commands.generate import Options, complete_file
from internevo.data.encoding.formats import encode_documents
from internevo.data.encoding.questions import Ending, encode_prompt
from internevo.data.encoding.tokenize import tokenize
from internevo.data.raw.documents import Document
from internevo.data.rows import tokens_and_labels
from internevo.errors import DataError, UsageError
from internevo.inference.tasks import Requests
from internevo.inference.text import Prompt, TextModel
from internevo.models.config import DecoderConfig
from internevo.models.generate import Sampling
from internevo.text.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import random_model

from .test_chats import ALTERNATES, ANSWER, ASK, CALL, TOOLS
from .test_formats import CHATML, folder_with, write_chats

ENDS = {
    "<|im_end|>\n": ("<|im_end|>", ""), "\n \n<|im_end|>": ("<|im_end|>", ""), "<|other|>\n": (None, "<|other|>"),
    "<|other|> <s>": ("<s>", "<|other|>"), "\n### End \n": (None, "### End"), "": (None, ""), " \n": (None, ""),
    "<|im_end|><|endoftext|>": ("<|im_end|>", ""), "春眠": (None, "春眠"),
}  # fmt: skip
"""What a template puts after an answer: the token and the text that end one. There is no token <|other|>."""


def tokenizer_with(folder: Path, template: str, *special: Any) -> Tokenizer:
    return load_tokenizer(folder_with(folder / "tokenizer", template, *special))


def template_with(end: str) -> str:
    return CHATML.replace("'<|im_end|>' + '\\n'", repr(end))


@pytest.mark.parametrize("end", ENDS)
def test_an_answer_ends_at_a_token_apart_or_at_a_text(tmp_path: Path, end: str) -> None:
    tokenizer = tokenizer_with(tmp_path, template_with(end))
    token, text = ENDS[end]
    number = None if token is None else tokenizer.backend.token_id(token)
    question = encode_prompt("chat", "the cat?", tokenizer)
    assert Ending.usual(tokenizer) == (number, text)
    assert question.stop_ids == {tokenizer.eos_id} | ({number} - {None})
    assert question.stop == ((text,) if text else ())
    assert bool(Ending.usual(tokenizer).problem(tokenizer)) == (token is None)


@pytest.mark.parametrize("end", ENDS)
def test_no_token_of_a_plain_text_ends_an_answer(tmp_path: Path, end: str) -> None:
    tokenizer, draw = tokenizer_with(tmp_path, template_with(end)), random.Random(1)
    plain = "".join(draw.choices("abc <>|_#.\n春眠End", k=2000))
    assert not encode_prompt("chat", plain, tokenizer).stop_ids & set(tokenizer.encode(plain))


def saying(ids: list[int], tokenizer: Tokenizer) -> TextModel:
    """A model that says given ids."""
    model, rest = random_model(DecoderConfig("LLAMA2", 400, 16, 32, 1, 2, 2, 8)), iter(ids)
    model.register_forward_hook(lambda *_: nn.functional.one_hot(torch.tensor([[next(rest)]]), 400) * 1000.0)
    return TextModel(model.config, tokenizer, lambda: model)


WITH_ALL = (
    "{% if tools %}{{ 'tools ' + (tools | tojson) }}{% endif %}{% if documents %}{{ documents | tojson }}{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}no thinking{% endif %}"
) + CHATML
ROWS: dict[str, dict[str, Any]] = {
    "tools": {"tools": TOOLS}, "tools as JSON": {"tools": json.dumps(TOOLS)}, "documents": {"documents": [{"text": "purr"}]},
    "thinking": {"enable_thinking": False}, "keywords": {"chat_template_kwargs": {"enable_thinking": False}},
    "system": {"system": "Purr."}, "nothing": {"tools": [], "documents": None, "id": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_the_question_of_a_row_is_how_it_begins_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder, row = folder_with(tmp_path / "tokenizer", None), ROWS[name]
    (folder / "chat_template.jinja").write_text(WITH_ALL)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tool_use" + WITH_ALL)
    tokenizer = load_tokenizer(folder)
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"messages": [ASK], **row}) + "\n" + json.dumps({"prompt": ASK["content"], **row})
    )
    prompts = list[Prompt]()

    def stream(self: TextModel, given: list[Prompt], *_: object) -> list[tuple[int, str]]:
        prompts.extend(given)
        return []

    monkeypatch.setattr(TextModel, "stream", stream)
    monkeypatch.setattr(TextModel, "open", lambda *_: saying([], tokenizer))
    complete_file(Path("model"), None, tmp_path / "a.jsonl", None, 8, Options(1, Sampling(), format="chat"))
    (trained,) = encode_documents("chat", [Document({"messages": [ASK, ANSWER], **row}, "a")], None, tokenizer)
    assert not isinstance(trained, DataError)
    tokens, labels = tokens_and_labels(trained.astype(np.int64))
    assert [prompt.ids for prompt in prompts] == [tokens[: int((labels >= 0).argmax())].tolist()] * 2
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
    tools = TOOLS if row.get("tools") else None
    messages = [{"role": "system", "content": row["system"]}, ASK] if "system" in row else [ASK]
    keywords = {key: row[key] for key in ("enable_thinking", "documents") if row.get(key) is not None}
    wanted = theirs.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False, **keywords, **row.get("chat_template_kwargs", {})
    )
    assert tokenizer.decode(prompts[0].ids) == wanted


@pytest.mark.parametrize(
    ("row", "format", "message"),
    [
        ({"messages": [ASK], "tools": TOOLS}, "chat", "line 1: .* does not use the field 'tools'"),
        ({"prompt": "a", "enable_thinking": False}, "chat", "line 1: .* does not use the field 'enable_thinking'"),
        ({"messages": [{**ASK, "tool_calls": [CALL]}]}, "text", "line 1: .* does not use the field 'tool_calls' of message 0"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "chat", "message 0 has a part that is not text"),
        ({"prompt": "a", "system": "b"}, "alpaca", "line 1: .* the format alpaca does not use 'system'"),
    ],
)
def test_what_a_row_says_and_the_template_does_not_use_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], format: Any, message: str
) -> None:
    tokenizer = tokenizer_with(tmp_path, CHATML)
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr(TextModel, "open", lambda *_: saying([], tokenizer))
    with pytest.raises(UsageError, match=message):
        complete_file(Path("model"), None, tmp_path / "a.jsonl", None, 8, Options(1, Sampling(), format=format))


@pytest.mark.parametrize("said", ["a < b | c", "<|im", "x<|im_ends"])
@pytest.mark.parametrize("special", [["<s>"], ["<s>", "<|im_end|>"]], ids=["text", "token"])
def test_an_answer_with_pieces_of_its_end_is_whole(tmp_path: Path, said: str, special: list[str]) -> None:
    tokenizer = tokenizer_with(tmp_path, CHATML, special)
    ids = tokenizer.encode(f"{said}<|im_end|>\n<|im_start|>user\nmore")

    assert "".join(internevo.chat(saying(ids, tokenizer), [ASK], max_new_tokens=len(ids))) == said
    requests = Requests(saying(ids, tokenizer), 1, 100)
    requests.ending = Ending.usual(tokenizer)
    request: Any = SimpleNamespace(args=("the cat?", {"max_gen_toks": len(ids)}))
    assert requests.generate_until([request]) == [said]


@pytest.mark.parametrize(
    ("template", "special", "message"),
    [
        (
            CHATML,
            ["<s>"],
            r"ends an answer with '<\|im_end\|>', which is no token of the tokenizer, so other programs",
        ),
        (CHATML.replace("+ '<|im_end|>'", ""), ["<s>"], "ends answers with nothing, .* special token .as <.endoftext.>.$"),
        (CHATML, ["<s>", "<|im_end|>"], None),
        (ALTERNATES, ["<s>"], None),
    ],
)
def test_tokenizing_says_that_other_programs_will_not_see_the_end(
    tmp_path: Path, template: str, special: list[str], message: str | None
) -> None:
    folder, said = folder_with(tmp_path / "tokenizer", template, special), list[str]()
    source = write_chats(tmp_path / "a.jsonl", [[("user", "a"), ("assistant", "b")]])
    tokenize([source], tmp_path / "out", tokenizer=folder, format="chat", workers=1, status=said.append)
    assert len(said) == (message is not None) and all(re.search(message or "", line) for line in said)


def test_a_template_that_makes_nothing_of_a_question_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="makes no text of the question 'the cat"):
        encode_prompt("chat", "the cat?", tokenizer_with(tmp_path, "{{ '' }}"))


@pytest.mark.parametrize("format", ["text", "alpaca", "chat"])
def test_a_prompt_with_invalid_bytes_is_refused(tmp_path: Path, format: Any) -> None:
    with pytest.raises(UsageError, match=r"the prompt is not UTF-8: character 2 is '\\udcff'"):
        encode_prompt(format, "ab\udcff", tokenizer_with(tmp_path, CHATML))
