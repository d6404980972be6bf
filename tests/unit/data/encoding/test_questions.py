"""Questions: what ends an answer is a token apart or a text, never a token that an answer may have."""

import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import internevo
from internevo.data.encoding.questions import Ending, encode_prompt
from internevo.data.encoding.tokenize import tokenize
from internevo.errors import UsageError
from internevo.inference.tasks import Requests
from internevo.inference.text import TextModel
from internevo.models.config import DecoderConfig
from internevo.text.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import random_model

from .test_chats import ALTERNATES, ASK
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
